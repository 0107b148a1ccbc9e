//! From a model to runnable plans: the whole flow on one screen, see [`compile`].
//!
//! One arena serves every plan of a run. The planner puts parameters first, then optimizer states, so
//! the training, the evaluation and the sampling plan find the parameters in the same place; the two
//! forward plans leave the bytes of the states alone. The peak is the largest of the plans'.
//!
//! A plan that does not fit is planned again for its least peak, so that the error can name the
//! smallest budget that works for every plan of the run.

use std::sync::Arc;

use ounce_exec::{Arena, Executor, MeasuredMachine};
use ounce_io::checkpoint::Checkpoint;
use ounce_ir::{Graph, Lead, OptimizerKind, ParamId, ValueId, ValueKind};
use ounce_kernels::pool::Pool;
use ounce_models::{Purpose, build_for_length};
use ounce_plan::{PlanError, PlanOptions};
use ounce_program::{BufferRole, Category, Certificate, Choice, GRANULE_TOKENS, Plan, StepShape};

use crate::baseline::{Baseline, Sizes};
use crate::batch::DataInputs;
use crate::budget::{format_budget, format_bytes};
use crate::checkpoint::states;
use crate::model::{Model, model_error};
use crate::watch::plan_html;
use crate::weights::{Source, fill_fresh};
use crate::{Environment, Error, PlanRecord, Result};

/// What a run needs plans for.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// The training step and its update.
    pub(crate) train: Option<TrainWanted>,
    /// Evaluation batches.
    pub(crate) eval: Option<StepShape>,
    /// Sample texts of up to this many tokens.
    pub(crate) sample_tokens: Option<u64>,
    /// Longest row that rotary frequencies are made for.
    pub(crate) max_length: u64,
}

/// What a training step is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TrainWanted {
    pub(crate) shape: StepShape,
    pub(crate) optimizer: OptimizerKind,
    pub(crate) clip: bool,
    pub(crate) dropout: f32,
}

/// The budget and what it buys it on.
pub(crate) struct Limits {
    pub(crate) budget_bytes: u64,
    pub(crate) n_threads: usize,
}

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
    choice: Choice,
    table: String,
    /// `plan.html` of a training step.
    picture: Option<String>,
    /// (offset, bytes) of every parameter, by `ParamId`.
    params: Vec<(u64, u64)>,
}

/// Every plan of a run, and the arena they share.
pub(crate) struct Session {
    pub(crate) train: Option<Program>,
    pub(crate) eval: Option<Program>,
    pub(crate) sample: Option<Program>,
    pub(crate) arena: Arena,
    pub(crate) budget_bytes: u64,
    /// Peak of the process over all plans.
    pub(crate) peak_bytes: u64,
    arena_bytes: u64,
    baseline: Baseline,
}

/// The graphs of a run.
struct Graphs {
    train: Option<Graph>,
    eval: Option<Graph>,
    sample: Option<Graph>,
}

/// Builds, differentiates, attaches the optimizer, plans, checks and resolves. Nothing is run, and no
/// planned memory is touched.
pub(crate) fn compile(
    model: &Model,
    wanted: &Wanted,
    limits: &Limits,
    env: &Environment,
) -> Result<Session> {
    let graphs = build(model, wanted)?;
    let baseline = declare(&graphs, model, wanted, limits);
    let pool = Arc::new(Pool::new(limits.n_threads));
    let timing_bytes = limits.budget_bytes.saturating_sub(baseline.bytes());
    let costs = env.cache_dir.join("costs");
    let machine = MeasuredMachine::new(pool.clone(), timing_bytes, baseline.bytes(), Some(costs));
    let planner = Planner { machine: &machine, pool: &pool, model, wanted, limits, baseline };
    let session = planner.compile(&graphs)?;
    // Without the file the costs are only measured again.
    let _ = machine.save();
    Ok(session)
}

/// The declared size of the process that runs these graphs.
fn declare(graphs: &Graphs, model: &Model, wanted: &Wanted, limits: &Limits) -> Baseline {
    let jobs = graphs.jobs(wanted).into_iter();
    let sizes = Sizes {
        n_threads: limits.n_threads as u64,
        n_ops: graphs.iter().map(|g| g.ops.len() as u64).sum(),
        vocab_size: model.config.vocab_size(),
        most_arena_bytes: jobs.map(|(g, shape, _)| everything_bytes(g, shape)).max().unwrap_or(0),
    };
    Baseline::declare(sizes, limits.budget_bytes)
}

/// The forward graphs, and from the first of them the training step.
fn build(model: &Model, wanted: &Wanted) -> Result<Graphs> {
    let forward = |purpose, dropout| {
        build_for_length(&model.config, purpose, dropout, wanted.max_length)
            .map_err(|e| model_error(&model.dir, &e))
    };
    let train = match &wanted.train {
        Some(t) => {
            let loss = forward(Purpose::Loss, t.dropout)?;
            let gradients = ounce_passes::differentiate(&loss)?;
            Some(ounce_passes::attach_optimizer(&gradients, t.optimizer, t.clip)?)
        }
        None => None,
    };
    let eval = wanted.eval.map(|_| forward(Purpose::Loss, 0.0)).transpose()?;
    let sample = wanted.sample_tokens.map(|_| forward(Purpose::Decode, 0.0)).transpose()?;
    Ok(Graphs { train, eval, sample })
}

impl Graphs {
    fn iter(&self) -> impl Iterator<Item = &Graph> {
        [&self.train, &self.eval, &self.sample].into_iter().flatten()
    }

    /// Each graph with the shape it is planned for and the bytes after the parameters that it must
    /// leave alone: the optimizer's states outlive evaluation and sampling.
    fn jobs(&self, wanted: &Wanted) -> Vec<(&Graph, StepShape, u64)> {
        let state_bytes = self.train.as_ref().map_or(0, state_bytes);
        let sample = |row_tokens| StepShape { n_rows: 1, row_tokens, n_selected: 1 };
        let train = self.train.as_ref().zip(wanted.train).map(|(g, t)| (g, t.shape, 0));
        let eval = self.eval.as_ref().zip(wanted.eval).map(|(g, s)| (g, s, state_bytes));
        let sample = self
            .sample
            .as_ref()
            .zip(wanted.sample_tokens)
            .map(|(g, n)| (g, sample(n), state_bytes));
        [train, eval, sample].into_iter().flatten().collect()
    }
}

/// What planning needs to know, for every plan of a run.
struct Planner<'a> {
    machine: &'a MeasuredMachine,
    pool: &'a Arc<Pool>,
    model: &'a Model,
    wanted: &'a Wanted,
    limits: &'a Limits,
    baseline: Baseline,
}

impl Planner<'_> {
    fn compile(&self, graphs: &Graphs) -> Result<Session> {
        let budget_bytes = self.limits.budget_bytes;
        let mut programs = Vec::with_capacity(3);
        for (graph, shape, reserved) in graphs.jobs(self.wanted) {
            match self.plan(graph, shape, budget_bytes, reserved) {
                Ok(plan) => programs.push(self.resolve(graph, shape, &plan)?),
                Err(PlanError::DoesNotFit { .. }) => return Err(self.does_not_fit(graphs)),
            }
        }
        check_shared_params(&programs);
        self.machine.release_memory();
        let arena_bytes = programs.iter().map(|p| p.executor.arena_bytes()).max().unwrap_or(0);
        let peak_bytes = programs.iter().map(|p| p.certificate.peak_bytes).max().unwrap_or(0);
        let arena = Arena::reserve(arena_bytes)?;
        let mut programs = programs.into_iter();
        // In the order of `Graphs::jobs`.
        let mut take = |is_there: bool| if is_there { programs.next() } else { None };
        Ok(Session {
            train: take(graphs.train.is_some()),
            eval: take(graphs.eval.is_some()),
            sample: take(graphs.sample.is_some()),
            arena,
            budget_bytes,
            peak_bytes,
            arena_bytes,
            baseline: self.baseline.clone(),
        })
    }

    fn plan(
        &self,
        graph: &Graph,
        shape: StepShape,
        budget: u64,
        reserved_bytes: u64,
    ) -> std::result::Result<Plan, PlanError> {
        let options = PlanOptions { reserved_bytes, ..PlanOptions::default() };
        ounce_plan::plan(graph, &shape, budget, self.machine, &options)
    }

    /// Checks a plan and makes it runnable. The plan that is accepted is the plan that runs.
    fn resolve(&self, graph: &Graph, shape: StepShape, plan: &Plan) -> Result<Program> {
        ounce_check::check(graph, plan, self.machine)
            .map_err(|e| Error::Bug { message: format!("the checker refuses the plan: {e}") })?;
        let executor = Executor::new(graph, plan, self.pool.clone())?;
        let trains = graph.ops.values().any(|op| op.updates.is_some());
        let title = format!("{}: one training step", self.model.dir.display());
        let output = graph
            .find_value(ValueKind::Loss)
            .or_else(|| graph.find_value(ValueKind::Result))
            .expect("a model ends in a loss or in logits");
        let place = |p: ParamId| {
            let buffer = plan.find_buffer(BufferRole::Param(p)).expect("parameters are resident");
            (plan.buffers[buffer].offset, plan.buffers[buffer].bytes)
        };
        Ok(Program {
            shape,
            inputs: DataInputs::of(graph),
            output,
            executor,
            vocab_size: self.model.config.vocab_size(),
            certificate: plan.certificate,
            choice: plan.choice.clone(),
            table: ounce_plan::explain(plan),
            picture: trains.then(|| plan_html(graph, plan, &title)),
            params: graph.params.ids().map(place).collect(),
            graph: graph.clone(),
        })
    }

    /// The error that names the smallest budget for all plans, what dominates it, and what would fit.
    fn does_not_fit(&self, graphs: &Graphs) -> Error {
        let (smallest_bytes, dominating) = self.smallest(graphs, self.wanted);
        let line = |(category, bytes): &(Category, u64)| {
            format!("  {:<16} {:>12}\n", category.name(), format_bytes(*bytes))
        };
        Error::DoesNotFit {
            budget_bytes: self.limits.budget_bytes,
            smallest_bytes,
            breakdown: dominating.iter().filter(|(_, bytes)| *bytes > 0).map(line).collect(),
            hint: self.cheapest_change(smallest_bytes),
        }
    }

    /// The smallest budget that every plan of a run fits into, and what the largest of them holds.
    fn smallest(&self, graphs: &Graphs, wanted: &Wanted) -> (u64, Vec<(Category, u64)>) {
        let mut worst = (0, Vec::new());
        for (graph, shape, reserved) in graphs.jobs(wanted) {
            if let Err(PlanError::DoesNotFit { smallest_bytes, dominating, .. }) =
                self.plan(graph, shape, 0, reserved)
                && smallest_bytes > worst.0
            {
                worst = (smallest_bytes, dominating);
            }
        }
        let arena_bytes = worst.0.saturating_sub(self.baseline.bytes());
        (self.baseline.smallest_budget(arena_bytes), worst.1)
    }

    /// The first change, those that cost least first, after which the run fits into the budget.
    fn cheapest_change(&self, smallest_bytes: u64) -> String {
        for (flags, changed) in changes(self.wanted) {
            let Ok(graphs) = build(self.model, &changed) else { continue };
            let (bytes, _) = self.smallest(&graphs, &changed);
            if bytes <= self.limits.budget_bytes {
                return format!("`{flags}` needs {}", format_budget(bytes));
            }
        }
        format!(
            "give `--memory {}MiB`, or take a smaller model",
            format_budget(smallest_bytes).trim_end_matches(" MiB")
        )
    }
}

/// Changes to a run that make it smaller, as flags, those that change the result least first.
fn changes(wanted: &Wanted) -> Vec<(String, Wanted)> {
    let Some(train) = wanted.train else { return Vec::new() };
    let mut changes = Vec::new();
    let with = |train| Wanted { train: Some(train), ..wanted.clone() };
    if train.clip {
        changes.push(("--max-grad-norm 0".to_owned(), with(TrainWanted { clip: false, ..train })));
    }
    let mut max_length = wanted.max_length;
    while max_length >= 2 * GRANULE_TOKENS {
        max_length /= 2;
        let shape = |s: StepShape| StepShape { row_tokens: max_length, ..s };
        let shorter = Wanted {
            train: Some(TrainWanted { shape: shape(train.shape), ..train }),
            eval: wanted.eval.map(shape),
            sample_tokens: wanted.sample_tokens.map(|n| n.min(max_length)),
            max_length,
        };
        changes.push((format!("--max-length {max_length}"), shorter));
    }
    if train.shape.n_rows > 1 {
        let shape = |s: StepShape| StepShape { n_rows: 1, ..s };
        let fewer = Wanted {
            eval: wanted.eval.map(shape),
            ..with(TrainWanted { shape: shape(train.shape), ..train })
        };
        let flags = "--per-device-train-batch-size 1 --gradient-accumulation-steps 1";
        changes.push((flags.to_owned(), fewer));
    }
    if train.optimizer != OptimizerKind::Sgd {
        let sgd = TrainWanted { optimizer: OptimizerKind::Sgd, ..train };
        changes.push(("--optimizer sgd".to_owned(), with(sgd)));
    }
    changes
}

/// Every parameter, state and value of a graph at once, and half as much again for scratch.
fn everything_bytes(graph: &Graph, shape: StepShape) -> u64 {
    let lead = |s: &ounce_ir::Shape| match s.lead {
        Lead::Fixed => 1,
        Lead::Tokens => shape.n_tokens(),
        Lead::Selected => shape.n_selected,
    };
    let values: u64 = graph.values.values().map(|v| v.bytes(lead(&v.shape))).sum();
    let params: u64 = graph.params.values().map(ounce_ir::Param::bytes).sum();
    (values + params + state_bytes(graph)) / 2 * 3
}

/// Bytes of all optimizer states, each at a multiple of 64.
fn state_bytes(graph: &Graph) -> u64 {
    let of = |p: &ounce_ir::Param| -> u64 {
        let bytes = |s: &ounce_ir::StateSpec| p.shape.bytes(s.dtype, 0).next_multiple_of(64);
        graph.states.iter().map(bytes).sum()
    };
    graph.params.values().filter(|p| p.trainable).map(of).sum()
}

/// Every plan must find the same parameters in the same place.
fn check_shared_params(programs: &[Program]) {
    let names = |p: &Program| -> Vec<String> {
        p.graph.params.values().map(|param| param.name.clone()).collect()
    };
    for pair in programs.windows(2) {
        assert_eq!(names(&pair[0]), names(&pair[1]), "graphs of one model have one parameter list");
        assert_eq!(pair[0].params, pair[1].params, "plans of one run place parameters alike");
    }
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
            table: main.table.clone(),
        }
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
        self.baseline.check()
    }

    /// The weights of the model, matched with the parameters of the plans.
    ///
    /// # Errors
    /// Files that are missing, damaged, or of another model.
    pub(crate) fn open_weights(&self, model: &Model) -> Result<Source> {
        Source::open(&model.dir, &model.config, &self.main().graph)
    }

    /// Reads the weights into their places, and sets the optimizer's states to zero.
    ///
    /// # Errors
    /// A failed read.
    pub(crate) fn load(&mut self, weights: &Source) -> Result<()> {
        self.fill_params(|_, id, dst| weights.read(id, dst))
    }

    /// Reads the optimizer's states of a checkpoint into their places.
    ///
    /// # Errors
    /// A state that is missing or of another shape, a failed read.
    pub(crate) fn load_states(&mut self, checkpoint: &Checkpoint) -> Result<()> {
        let Self { train, arena, .. } = self;
        let program = train.as_ref().expect("a run that goes on has a training plan");
        let mut buffers = program.executor.buffers(arena);
        for (id, param, k) in states(&program.graph) {
            let name = &program.graph.states[k].name;
            checkpoint.read_state(name, &param.name, buffers.state(id, k as u32))?;
        }
        Ok(())
    }

    /// Makes fresh weights in their places, and sets the optimizer's states to zero.
    pub(crate) fn load_fresh(&mut self, seed: u64) {
        self.fill_params(|param, _, dst| {
            fill_fresh(param, seed, 0, dst);
            Ok(())
        })
        .expect("making numbers cannot fail");
    }

    fn fill_params(
        &mut self,
        fill: impl Fn(&ounce_ir::Param, ParamId, &mut [f32]) -> Result<()>,
    ) -> Result<()> {
        let Self { train, eval, sample, arena, .. } = self;
        let program = [train, eval, sample].into_iter().flatten().next();
        let program = program.expect("a session has a plan");
        let mut buffers = program.executor.buffers(arena);
        for (id, param) in program.graph.params.iter() {
            fill(param, id, buffers.param(id))?;
        }
        for (id, _, k) in states(&program.graph) {
            buffers.state(id, k as u32).fill(0.0);
        }
        Ok(())
    }

    /// The training plan, or that of the only purpose there is.
    fn main(&self) -> &Program {
        let first = [&self.train, &self.eval, &self.sample].into_iter().flatten().next();
        first.expect("a session has a plan")
    }
}
