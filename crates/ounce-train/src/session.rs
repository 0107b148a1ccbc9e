//! The plans of a run in one arena: weights and states are read into their places, plans are exchanged.
//!
//! One arena serves every plan of a run. The planner puts parameters first, then optimizer states, so
//! the training, the evaluation and the sampling plan find the parameters in the same place; the two
//! forward plans leave the bytes of the states alone. The peak is the largest of the plans'.

use ounce_exec::Arena;
use ounce_exec::heap::release_free_heap;
use ounce_io::checkpoint::Checkpoint;
use ounce_ir::{DType, ParamId};
use ounce_passes::OpClass;

use crate::Result;
use crate::baseline::Baseline;
use crate::graphs::states;
use crate::model::Model;
use crate::program::Program;
use crate::stream::StreamWanted;
use crate::weights::{PIECE_ELEMS, Source, fill_fresh};

/// Every plan of a run, and the arena they share.
pub(crate) struct Session {
    pub(crate) train: Option<Program>,
    /// Classes of ops that `train` has in f32 because they overflowed.
    pub(crate) demoted: Vec<OpClass>,
    /// The training step with other classes of ops in f32.
    pub(crate) variants: Vec<(Vec<OpClass>, Program)>,
    pub(crate) eval: Option<Program>,
    pub(crate) sample: Option<Program>,
    pub(crate) arena: Arena,
    pub(crate) budget_bytes: u64,
    /// Peak of the process over all plans.
    pub(crate) peak_bytes: u64,
    /// Memory in which kernels were timed, before the arena was there.
    pub(crate) touched_bytes: u64,
    /// What the machine does not have for this run.
    pub(crate) warnings: Vec<String>,
    pub(crate) arena_bytes: u64,
    pub(crate) baseline: Baseline,
    /// What the many instructions of the plans take beside the baseline.
    pub(crate) tables_bytes: u64,
    /// Whether text was tokenized before.
    pub(crate) tokenizes: bool,
    pub(crate) stream: Option<StreamWanted>,
}

fn is_within(classes: &[OpClass], all: &[OpClass]) -> bool {
    classes.iter().all(|class| all.contains(class))
}

impl Session {
    /// The picture of the training plan, handed out once: it is not kept.
    pub(crate) fn take_picture(&mut self) -> String {
        self.train.as_mut().and_then(|p| p.picture.take()).unwrap_or_default()
    }

    /// Checks that the process outside the arena is as small as declared. Nothing of the arena has
    /// been touched yet.
    ///
    /// # Errors
    /// [`Error::Baseline`] with both numbers.
    pub(crate) fn check_baseline(&self) -> Result<()> {
        release_free_heap();
        self.baseline.check(self.tables_bytes)
    }

    /// The weights of the model, matched with the parameters of the plans.
    ///
    /// # Errors
    /// Files that are missing, damaged, or of another model.
    pub(crate) fn open_weights(&self, model: &Model) -> Result<Source> {
        Source::open(&model.path, &model.config, &self.main().graph)
    }

    /// Reads the weights into their places, and sets the optimizer's states to zero.
    ///
    /// # Errors
    /// A failed read.
    pub(crate) fn load(&mut self, weights: &Source) -> Result<()> {
        self.fill_params(|_, id, start, dst| weights.read(id, start, dst))
    }

    /// Reads the optimizer's states of a checkpoint into their places.
    ///
    /// # Errors
    /// A state that is missing or of another shape, a failed read.
    pub(crate) fn load_states(&mut self, checkpoint: &Checkpoint, moments: bool) -> Result<()> {
        let Self { train, arena, .. } = self;
        let program = train.as_ref().expect("a run that goes on has a training plan");
        let mut buffers = program.executor.buffers(arena);
        for (id, param, k) in states(&program.graph) {
            let state = &program.graph.states[k];
            if state.dtype == DType::I16 {
                let halves = buffers.state_i16(id, k as u32);
                checkpoint.read_state_i16(&state.name, &param.name, halves)?;
            } else if moments {
                checkpoint.read_state(&state.name, &param.name, buffers.state(id, k as u32))?;
            }
        }
        Ok(())
    }

    /// Makes fresh weights in their places, and sets the optimizer's states to zero.
    pub(crate) fn load_fresh(&mut self, seed: u64) {
        self.fill_params(|param, _, start, dst| {
            fill_fresh(param, seed, start, dst);
            Ok(())
        })
        .expect("making numbers cannot fail");
    }

    /// Fills every parameter with what `fill` gives from an element on: in its place where it is f32,
    /// else piece by piece, split into the halves of its masters.
    fn fill_params(
        &mut self,
        fill: impl Fn(&ounce_ir::Param, ParamId, usize, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let Self { train, eval, sample, arena, .. } = self;
        let program = [train, eval, sample].into_iter().flatten().next();
        let program = program.expect("a session has a plan");
        let mut buffers = program.executor.buffers(arena);
        for (id, param) in program.graph.params.iter() {
            if !buffers.param_is_split(id) {
                fill(param, id, 0, buffers.param(id))?;
                continue;
            }
            let mut piece = vec![0.0; PIECE_ELEMS];
            let n_elems = param.shape.row_elems() as usize;
            for start in (0..n_elems).step_by(PIECE_ELEMS) {
                let part = &mut piece[..PIECE_ELEMS.min(n_elems - start)];
                fill(param, id, start, part)?;
                buffers.write_master(id, start, part);
            }
        }
        let moments = |k: usize| program.graph.states[k].dtype == DType::F32;
        for (id, _, k) in states(&program.graph).filter(|(_, _, k)| moments(*k)) {
            buffers.state(id, k as u32).fill(0.0);
        }
        Ok(())
    }

    /// Goes on with the training step that has these classes of ops in f32, and as few others as there is one of.
    pub(crate) fn demote(&mut self, demoted: &[OpClass]) {
        if is_within(demoted, &self.demoted) {
            return;
        }
        let variants = self.variants.iter_mut();
        let fitting = variants.filter(|(classes, _)| is_within(demoted, classes));
        let fewest = fitting.min_by_key(|(classes, _)| classes.len());
        if let (Some((classes, program)), Some(train)) = (fewest, &mut self.train) {
            std::mem::swap(train, program);
            std::mem::swap(&mut self.demoted, classes);
        }
    }

    /// The training plan, or that of the only purpose there is.
    pub(crate) fn main(&self) -> &Program {
        let first = [&self.train, &self.eval, &self.sample].into_iter().flatten().next();
        first.expect("a session has a plan")
    }
}
