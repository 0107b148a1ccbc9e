//! From a model to runnable plans: the whole flow on one screen, see [`compile`].
//!
//! One arena serves every plan of a run. The planner puts parameters first, then optimizer states, so
//! the training, the evaluation and the sampling plan find the parameters in the same place; the two
//! forward plans leave the bytes of the states alone. The peak is the largest of the plans'.

use std::collections::BTreeMap;
use std::sync::Arc;

use ounce_exec::heap::release_free_heap;
use ounce_exec::{Arena, Executor, MeasuredMachine};
use ounce_io::checkpoint::Checkpoint;
use ounce_ir::{DType, Graph, OpId, ParamId, ValueId, ValueKind};
use ounce_kernels::pool::Pool;
use ounce_passes::OpClass;
use ounce_program::{Buffer, BufferRole, Certificate, Choice, Instr, Machine, Plan, StepShape};

use crate::baseline::{Baseline, Sizes};
use crate::batch::DataInputs;
use crate::budget::format_bytes;
use crate::checkpoint::states;
use crate::graphs::{Graphs, Wanted, build, everything_bytes};
use crate::limits::Limits;
use crate::model::Model;
use crate::planning::Planner;
use crate::stream::{StreamWanted, streaming_bytes};
use crate::tokenize;
use crate::watch::plan_html;
use crate::weights::{PIECE_ELEMS, Source, fill_fresh};
use crate::{Environment, Error, PhaseRecord, PlanRecord, Result};

/// A graph with its plan, checked and resolved.
pub(crate) struct Program {
    pub(crate) graph: Graph,
    pub(crate) shape: StepShape,
    pub(crate) inputs: DataInputs,
    /// Loss of every token, or logits of the selected ones.
    pub(crate) output: ValueId,
    pub(crate) executor: Executor,
    /// Ids are below it.
    pub(crate) vocab_size: u64,
    pub(crate) certificate: Certificate,
    /// Predicted seconds of a step by kind of op, by the op's name.
    pub(crate) predicted_s: BTreeMap<&'static str, f64>,
    choice: Choice,
    table: String,
    /// `plan.html` of a training step.
    picture: Option<String>,
    /// (offset, bytes) of every parameter, by `ParamId`.
    params: Vec<(u64, u64)>,
    /// (offset, bytes) of every optimizer state, by parameter.
    states: Vec<(u64, u64)>,
    /// Parameters and optimizer states: what loading fills and saving reads.
    stored_bytes: u64,
    /// Where anything else begins.
    working_at: u64,
    /// What its many instructions take beside the baseline.
    tables_bytes: u64,
}

/// An op whose numbers left the range of what they are stored in.
pub(crate) struct Overflow {
    pub(crate) class: OpClass,
    /// The op and the value that it wrote.
    pub(crate) name: String,
}

impl Program {
    /// What there is to say of an op that overflowed.
    pub(crate) fn overflow(&self, (op, value): (OpId, ValueId)) -> Overflow {
        let kind = &self.graph.ops[op].kind;
        let name = format!("{} ({})", kind.name(), self.graph.values[value].name);
        Overflow { class: OpClass::of(kind), name }
    }
}

/// Every plan of a run, and the arena they share.
pub(crate) struct Session {
    pub(crate) train: Option<Program>,
    /// Classes of ops that `train` has in f32 because they overflowed.
    demoted: Vec<OpClass>,
    /// The training step with other classes of ops in f32.
    variants: Vec<(Vec<OpClass>, Program)>,
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
    arena_bytes: u64,
    baseline: Baseline,
    /// What the many instructions of the plans take beside the baseline.
    tables_bytes: u64,
    stream: Option<StreamWanted>,
}

/// The graphs of a run, and what planning them asks.
struct Prepared<'a> {
    model: &'a Model,
    wanted: &'a Wanted,
    graphs: Graphs,
    budget_bytes: u64,
    baseline: Baseline,
    machine: MeasuredMachine,
    pool: Arc<Pool>,
}

impl<'a> Prepared<'a> {
    /// Builds, differentiates, attaches the optimizer, and declares the size of the process.
    fn new(
        model: &'a Model,
        wanted: &'a Wanted,
        limits: &Limits,
        env: &Environment,
    ) -> Result<Self> {
        let graphs = build(model, wanted)?;
        let baseline = declare(&graphs, model, wanted, limits);
        let budget_bytes = limits.budget_bytes;
        let pool = Arc::new(Pool::new(limits.n_threads));
        let timing_bytes = budget_bytes.saturating_sub(baseline.bytes());
        let costs = Some(env.cache_dir.join("costs"));
        let machine = MeasuredMachine::new(pool.clone(), timing_bytes, baseline.bytes(), costs);
        Ok(Self { model, wanted, graphs, budget_bytes, baseline, machine, pool })
    }

    fn planner(&self) -> Planner<'_> {
        let Self { model, wanted, budget_bytes, baseline, machine, .. } = self;
        Planner { machine, model, wanted, budget_bytes: *budget_bytes, baseline }
    }
}

/// Builds, differentiates, attaches the optimizer, plans, checks and resolves. Nothing is run, and no
/// planned memory is touched.
pub(crate) fn compile(
    model: &Model,
    wanted: &Wanted,
    limits: &Limits,
    env: &Environment,
) -> Result<Session> {
    let prepared = Prepared::new(model, wanted, limits, env)?;
    let (planner, graphs) = (prepared.planner(), &prepared.graphs);
    let Prepared { machine, pool, .. } = &prepared;
    let mut programs = Vec::with_capacity(3);
    for (graph, shape, reserved_bytes) in graphs.jobs(wanted) {
        let plan = planner.plan(graph, shape, reserved_bytes);
        let plan = plan.ok_or_else(|| planner.does_not_fit(graphs))?;
        let budget_bytes = limits.budget_bytes;
        programs.push(resolve(model, graph, shape, &plan, machine, pool, budget_bytes)?);
    }
    let touched_bytes = machine.touched_bytes();
    let cores_taken = machine.cores_taken();
    // Without the file the costs are only measured again.
    let _ = machine.save();
    machine.release_memory();
    check_shared_params(&programs);
    let arena_bytes = programs.iter().map(|p| p.executor.arena_bytes()).max().unwrap_or(0);
    let tables_bytes = programs.iter().map(|p| p.tables_bytes).sum();
    let peak = |p: &Program| p.certificate.peak_bytes - p.tables_bytes + tables_bytes;
    let peak_bytes = programs.iter().map(peak).max().unwrap_or(0);
    if peak_bytes > limits.budget_bytes {
        return Err(too_many_instructions(peak_bytes, limits.budget_bytes));
    }
    let warnings = limits.warnings(peak_bytes, cores_taken);
    let arena = Arena::reserve(arena_bytes)?;
    let mut programs = programs.into_iter();
    // In the order of `Graphs::jobs`.
    let mut take = |is_there: bool| if is_there { programs.next() } else { None };
    let train = take(graphs.train.is_some());
    let demoted = graphs.variants.iter().map(|(demoted, _)| demoted.clone());
    let variants = demoted.filter_map(|demoted| Some((demoted, take(true)?))).collect();
    Ok(Session {
        train,
        demoted: Vec::new(),
        variants,
        eval: take(graphs.eval.is_some()),
        sample: take(graphs.sample.is_some()),
        arena,
        budget_bytes: limits.budget_bytes,
        peak_bytes,
        touched_bytes,
        warnings,
        arena_bytes,
        baseline: prepared.baseline,
        tables_bytes,
        stream: wanted.stream,
    })
}

/// Each plan fits, but the tables of all of them together do not.
fn too_many_instructions(peak_bytes: u64, budget_bytes: u64) -> Error {
    Error::Usage {
        message: format!(
            "the plans of training, evaluation and samples, each of which fits, take {} together with their tables, \
             more than the budget of {}",
            format_bytes(peak_bytes),
            format_bytes(budget_bytes)
        ),
        hint: format!(
            "give `--memory {}`, or fewer rows per step",
            format_bytes(peak_bytes + (1 << 20)).replace(' ', "")
        ),
    }
}

/// Refuses a budget in which the text of a run cannot be tokenized, before that is tried.
///
/// # Errors
/// [`Error::DoesNotFit`] with the smallest budget of the whole run.
pub(crate) fn check_tokenizing(
    model: &Model,
    wanted: &Wanted,
    limits: &Limits,
    env: &Environment,
) -> Result<()> {
    let prepared = Prepared::new(model, wanted, limits, env)?;
    if prepared.baseline.tokenizing_peak_bytes() <= limits.budget_bytes {
        return Ok(());
    }
    Err(prepared.planner().does_not_fit(&prepared.graphs))
}

/// The smallest budget of a run, and the predicted seconds of its training step if it fits into the
/// limits. Nothing is made that could run.
pub(crate) fn estimate(
    model: &Model,
    wanted: &Wanted,
    limits: &Limits,
    env: &Environment,
) -> Result<(u64, Option<f64>)> {
    let prepared = Prepared::new(model, wanted, limits, env)?;
    let (planner, graphs) = (prepared.planner(), &prepared.graphs);
    let (smallest_bytes, _) = planner.smallest(graphs, wanted);
    let first = graphs.jobs(wanted).into_iter().next();
    let fits = smallest_bytes <= limits.budget_bytes;
    let plan = first.filter(|_| fits).and_then(|(g, shape, n)| planner.plan(g, shape, n));
    // Without the file the costs are only measured again.
    let _ = prepared.machine.save();
    Ok((smallest_bytes, plan.map(|plan| plan.certificate.step_s)))
}

/// The declared size of the process that runs these graphs.
fn declare(graphs: &Graphs, model: &Model, wanted: &Wanted, limits: &Limits) -> Baseline {
    let jobs = graphs.jobs(wanted).into_iter();
    let sizes = Sizes {
        n_threads: limits.n_threads as u64,
        n_ops: graphs.iter().map(|g| g.ops.len() as u64).sum(),
        vocab_size: model.config.vocab_size(),
        most_arena_bytes: jobs.map(|(g, shape, _)| everything_bytes(g, shape)).max().unwrap_or(0),
        tokenizing_bytes: wanted.stream.map_or(0, |stream| stream.window_bytes)
            + tokenize::bytes(&model.dir, tokenize::n_threads(&model.dir, limits), limits),
        streaming_bytes: wanted.stream.map_or(0, |stream| streaming_bytes(&model.dir, stream)),
    };
    Baseline::declare(sizes, limits.budget_bytes)
}

/// Checks a plan and makes it runnable. The plan that is accepted is the plan that runs.
fn resolve(
    model: &Model,
    graph: &Graph,
    shape: StepShape,
    plan: &Plan,
    machine: &MeasuredMachine,
    pool: &Arc<Pool>,
    budget_bytes: u64,
) -> Result<Program> {
    let proof = ounce_check::check(graph, plan, machine)
        .map_err(|e| Error::Bug { message: format!("the checker refuses the plan: {e}") })?;
    // Not the step and the budget that the plan itself says it was made for.
    if plan.shape != shape {
        return Err(Error::Bug { message: format!("the plan is for {:?}", plan.shape) });
    }
    if proof.peak_bytes > budget_bytes {
        let peak = format_bytes(proof.peak_bytes);
        return Err(Error::Bug {
            message: format!("the plan's peak of {peak} is over the budget"),
        });
    }
    if plan.arena_bytes > ounce_exec::MAX_ARENA_BYTES {
        return Err(Error::Usage {
            message: format!(
                "the plan takes an arena of {}, and {} are the most that this version addresses",
                format_bytes(plan.arena_bytes),
                format_bytes(ounce_exec::MAX_ARENA_BYTES)
            ),
            hint: "give less `--memory`, or take a smaller model or step".to_owned(),
        });
    }
    let executor = Executor::new(graph, plan, pool.clone())?;
    let trains = graph.ops.values().any(|op| op.updates.is_some());
    let title = format!("{}: one training step", model.path.display());
    let output = graph
        .find_value(ValueKind::Loss)
        .or_else(|| graph.find_value(ValueKind::Result))
        .expect("a model ends in a loss or in logits");
    let place = |p: ParamId| {
        let buffer = plan.find_buffer(BufferRole::Param(p)).expect("parameters are resident");
        (plan.buffers[buffer].offset, plan.buffers[buffer].bytes)
    };
    let state = |p: ParamId, k: u32| {
        let buffer = plan.find_buffer(BufferRole::State(p, k)).expect("states are resident");
        (plan.buffers[buffer].offset, plan.buffers[buffer].bytes)
    };
    let is_stored = |b: &&Buffer| matches!(b.role, BufferRole::Param(_) | BufferRole::State(_, _));
    let working = plan.buffers.values().filter(|b| !is_stored(b));
    Ok(Program {
        states: states(graph).map(|(p, _, k)| state(p, k as u32)).collect(),
        shape,
        inputs: DataInputs::of(graph),
        output,
        executor,
        vocab_size: model.config.vocab_size(),
        certificate: plan.certificate,
        predicted_s: predicted_s(graph, plan, machine),
        choice: plan.choice.clone(),
        table: ounce_plan::explain(plan),
        picture: trains.then(|| plan_html(graph, plan, &title)),
        params: graph.params.ids().map(place).collect(),
        stored_bytes: plan.buffers.values().filter(is_stored).map(|b| b.bytes).sum(),
        tables_bytes: plan.baseline_bytes - machine.baseline_bytes(),
        working_at: working.map(|b| b.offset).min().unwrap_or(u64::MAX),
        graph: graph.clone(),
    })
}

/// Predicted seconds of a step by kind of op.
fn predicted_s(
    graph: &Graph,
    plan: &Plan,
    machine: &MeasuredMachine,
) -> BTreeMap<&'static str, f64> {
    // A cost is looked up once for all runs on as many tokens.
    let mut n_runs: BTreeMap<(OpId, u64), u64> = BTreeMap::new();
    for instr in &plan.instrs {
        if let Instr::Run { op, tokens, .. } = instr {
            *n_runs.entry((*op, tokens.end - tokens.start)).or_default() += 1;
        }
    }
    let mut predicted_s = BTreeMap::new();
    for ((op, n_tokens), n_runs) in n_runs {
        let cost_s = machine.cost_s(graph, op, &plan.shape, n_tokens);
        *predicted_s.entry(graph.ops[op].kind.name()).or_default() += n_runs as f64 * cost_s;
    }
    predicted_s
}

/// The phases for people.
fn phases_line(phases: &[PhaseRecord]) -> String {
    let one = |p: &PhaseRecord| format!("{} {}", p.phase, format_bytes(p.peak_bytes));
    let all: Vec<String> = phases.iter().map(one).collect();
    format!("peak of the whole process in each phase: {}", all.join(", "))
}

/// Every plan must find the same parameters, and every training step the same states, in the same
/// place; no plan writes anything else there.
fn check_shared_params(programs: &[Program]) {
    let names = |p: &Program| -> Vec<String> {
        p.graph.params.values().map(|param| param.name.clone()).collect()
    };
    for pair in programs.windows(2) {
        assert_eq!(names(&pair[0]), names(&pair[1]), "graphs of one model have one parameter list");
        assert_eq!(pair[0].params, pair[1].params, "plans of one run place parameters alike");
        let both_train = !pair[0].states.is_empty() && !pair[1].states.is_empty();
        assert!(!both_train || pair[0].states == pair[1].states, "and training steps their states");
    }
    let stored = programs.iter().flat_map(|p| p.params.iter().chain(&p.states));
    let end = stored.map(|(offset, bytes)| offset + bytes).max().unwrap_or(0);
    let is_apart = programs.iter().all(|p| p.working_at >= end);
    assert!(is_apart, "no plan of a run works where another keeps parameters or states");
}

fn is_within(classes: &[OpClass], all: &[OpClass]) -> bool {
    classes.iter().all(|class| all.contains(class))
}

impl Session {
    /// The plans in numbers; the table is the training plan's, or that of the only one.
    pub(crate) fn record(&self) -> PlanRecord {
        let main = self.main();
        let (c, choice) = (&main.certificate, &main.choice);
        PlanRecord {
            budget_bytes: self.budget_bytes,
            peak_bytes: self.peak_bytes,
            step_peak_bytes: c.peak_bytes,
            arena_bytes: self.arena_bytes,
            baseline_bytes: self.baseline.bytes(),
            max_load_bytes: c.max_load_bytes,
            step_s: c.step_s,
            step_bound_s: c.step_bound_s,
            unconstrained_step_s: c.unconstrained_step_s,
            n_params: main.graph.n_params_elems(),
            rows: main.shape.n_rows,
            max_length: main.shape.row_tokens,
            micro_batches: choice.n_micro_batches,
            loop_order: choice.loop_order.to_string(),
            head_chunk_tokens: choice.head_chunk_tokens,
            release_gradients: choice.release_gradients,
            kept_values: choice.n_kept,
            recomputed_ops: choice.n_recomputed,
            streaming_bytes: self.baseline.streaming_bytes(),
            table: [main.table.trim_end(), &phases_line(&self.phases()), &self.data_line()]
                .join("\n"),
            phases: self.phases(),
            warnings: self.warnings.clone(),
        }
    }

    /// What the data takes beside and before the steps, for people; of a run that trains.
    fn data_line(&self) -> String {
        let Some(stream) = self.stream else {
            return match &self.train {
                Some(_) => "data: tokenized to disk before step 1, then read row by row".to_owned(),
                None => String::new(),
            };
        };
        format!(
            "data: streamed; {} of every phase are for the child process that tokenizes beside the steps; two \
             windows on disk of at most {} each",
            format_bytes(self.baseline.streaming_bytes()),
            format_bytes(stream.window_disk_bytes)
        )
    }

    /// What timing kernels took, if they were timed, which is once on a machine.
    fn timed_peak_bytes(&self) -> Option<u64> {
        (self.touched_bytes > 0).then(|| self.baseline.bytes() + self.touched_bytes)
    }

    /// Peak of the process over all plans, and over timing kernels before them.
    pub(crate) fn whole_peak_bytes(&self) -> u64 {
        self.peak_bytes.max(self.timed_peak_bytes().unwrap_or(0))
    }

    /// What each phase takes. Saving streams from where training has left the tensors: nothing is added.
    fn phases(&self) -> Vec<PhaseRecord> {
        let peak = |program: &Program| program.certificate.peak_bytes;
        let timed = self.timed_peak_bytes();
        let loaded = self.baseline.bytes() + self.main().stored_bytes;
        [
            ("tokenize", Some(self.baseline.tokenizing_peak_bytes())),
            ("time kernels", timed),
            ("load", Some(loaded)),
            ("train", self.train.as_ref().map(peak)),
            ("evaluate", self.eval.as_ref().map(peak)),
            ("sample", self.sample.as_ref().map(peak)),
            ("save", self.train.as_ref().map(peak)),
        ]
        .into_iter()
        .filter_map(|(phase, bytes)| Some(PhaseRecord { phase, peak_bytes: bytes? }))
        .collect()
    }

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
    fn main(&self) -> &Program {
        let first = [&self.train, &self.eval, &self.sample].into_iter().flatten().next();
        first.expect("a session has a plan")
    }
}
