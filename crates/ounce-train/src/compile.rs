//! From a model to runnable plans: the whole flow on one screen, see [`compile`].

use std::sync::Arc;

use ounce_exec::{Arena, ExecError, MeasuredMachine};
use ounce_kernels::pool::Pool;
use ounce_program::Plan;

use crate::baseline::{Baseline, Sizes};
use crate::batch::rows_bytes;
use crate::budget::format_bytes;
use crate::graphs::{Graphs, Job, PerPurpose, Wanted, build, everything_bytes};
use crate::limits::{Limits, start_pool};
use crate::model::Model;
use crate::planning::Planner;
use crate::program::{Program, check_shared_params, resolve};
use crate::session::Session;
use crate::stream::streaming_bytes;
use crate::together::{Need, plan_together};
use crate::tokenize;
use crate::{Environment, Error, Observer, Result};

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
        // Before anything is counted in tokens times channels.
        let longest = graphs.iter().map(|job| job.shape.n_tokens()).max().unwrap_or(0);
        if longest > u64::from(u32::MAX) {
            return Err(ExecError::TooManyTokens { n_tokens: longest }.into());
        }
        let baseline = declare(&graphs, model, wanted, limits);
        let budget_bytes = limits.budget_bytes;
        let pool = Arc::new(start_pool(limits.n_threads)?);
        let timing_bytes = budget_bytes.saturating_sub(baseline.bytes());
        let costs = Some(env.cache_dir.join(format!("costs-{}", limits.n_threads)));
        let machine = MeasuredMachine::new(pool.clone(), timing_bytes, baseline.bytes(), costs);
        Ok(Self { model, wanted, graphs, budget_bytes, baseline, machine, pool })
    }

    fn planner(&self) -> Planner<'_> {
        let Self { model, wanted, budget_bytes, baseline, machine, .. } = self;
        Planner { machine, model, wanted, budget_bytes: *budget_bytes, baseline }
    }

    /// Plans, checks and resolves every graph, so that all of it fits into the budget together.
    fn programs(&self) -> Result<PerPurpose<Program>> {
        let planner = self.planner();
        let refuse = || Err(planner.does_not_fit(&self.graphs));
        if self.baseline.tokenizing_peak_bytes() > self.budget_bytes {
            return refuse();
        }
        planner.time(&self.graphs);
        let has_tables = |programs: &[Program]| programs.iter().any(|p| p.tables_bytes > 0);
        let mut found = self.together(self.budget_bytes, |job, bytes| planner.plan(job, bytes))?;
        // Where tables count, what fits depends on how plans are chosen; what is refused must not.
        if found.as_deref().is_none_or(has_tables) {
            let (smallest_bytes, _) = planner.smallest_together(&self.graphs);
            if smallest_bytes > self.budget_bytes {
                return refuse();
            }
            if found.is_none() {
                let least = |job: &Job, bytes| planner.plan_least(job, bytes);
                found = self.together(smallest_bytes, least)?;
            }
        }
        let Some(programs) = found else { return refuse() };
        let mut programs = programs.into_iter();
        Ok(self.graphs.map(|_| programs.next().expect("there is one for each graph")))
    }

    /// Programs of all graphs by `plan`, which is given a graph and its budget.
    fn together(
        &self,
        budget_bytes: u64,
        plan: impl Fn(&Job, u64) -> Option<Plan>,
    ) -> Result<Option<Vec<Program>>> {
        let jobs: Vec<&Job> = self.graphs.iter().collect();
        let need = |p: &Program| Need {
            peak_bytes: p.certificate.peak_bytes,
            tables_bytes: p.tables_bytes,
        };
        plan_together(jobs.len(), budget_bytes, need, |i, bytes| {
            let plan = plan(jobs[i], bytes);
            plan.map(|p| resolve(self.model, jobs[i], &p, &self.machine, &self.pool, bytes))
                .transpose()
        })
    }
}

/// Builds, differentiates, attaches the optimizer, plans, checks and resolves. Nothing is run, and no
/// planned memory is touched.
///
/// # Errors
/// A model that cannot be built; [`Error::DoesNotFit`] with the smallest budget of the whole run.
pub(crate) fn compile(
    model: &Model,
    wanted: &Wanted,
    limits: &Limits,
    env: &Environment,
) -> Result<Session> {
    let prepared = Prepared::new(model, wanted, limits, env)?;
    let programs = prepared.programs()?;
    check_shared_params(&programs);
    let machine = &prepared.machine;
    // Without the file the costs are only measured again.
    let _ = machine.save();
    machine.release_memory();
    let arena_bytes = programs.iter().map(|p| p.executor.arena_bytes()).max().unwrap_or(0);
    let tables_bytes = programs.iter().map(|p| p.tables_bytes).sum();
    let peak = |p: &Program| p.certificate.peak_bytes - p.tables_bytes + tables_bytes;
    let peak_bytes = programs.iter().map(peak).max().unwrap_or(0);
    if peak_bytes > limits.budget_bytes {
        let message = format!(
            "plans that take {} together were taken for a budget of {}",
            format_bytes(peak_bytes),
            format_bytes(limits.budget_bytes)
        );
        return Err(Error::Bug { message });
    }
    let PerPurpose { train, variants, eval, sample } = programs;
    Ok(Session {
        train,
        demoted: Vec::new(),
        variants,
        eval,
        sample,
        arena: Arena::reserve(arena_bytes)?,
        budget_bytes: limits.budget_bytes,
        peak_bytes,
        touched_bytes: machine.touched_bytes(),
        warnings: limits.warnings(peak_bytes, machine.cores_taken()),
        arena_bytes,
        baseline: prepared.baseline,
        tables_bytes,
        tokenizes: wanted.tokenizes,
        stream: wanted.stream,
    })
}

/// The same with the weights of the model in their places, for a forward pass; tells what the machine does not have.
///
/// # Errors
/// As [`compile`]; weights that are missing, damaged, or of another model; a process larger than declared.
pub(crate) fn compile_and_load(
    model: &Model,
    wanted: &Wanted,
    limits: &Limits,
    env: &Environment,
    observer: &mut dyn Observer,
) -> Result<Session> {
    let mut session = compile(model, wanted, limits, env)?;
    let weights = session.open_weights(model)?;
    session.check_baseline()?;
    session.load(&weights)?;
    session.warnings.iter().for_each(|warning| observer.note(warning));
    Ok(session)
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
    let planner = prepared.planner();
    let (smallest_bytes, _) = planner.smallest(&prepared.graphs);
    let fits = smallest_bytes <= limits.budget_bytes;
    if fits {
        planner.time(&prepared.graphs);
    }
    let plan = prepared
        .graphs
        .iter()
        .next()
        .filter(|_| fits)
        .and_then(|job| planner.plan(job, limits.budget_bytes));
    // Without the file the costs are only measured again.
    let _ = prepared.machine.save();
    Ok((smallest_bytes, plan.map(|plan| plan.certificate.step_s)))
}

/// The declared size of the process that runs these graphs.
fn declare(graphs: &Graphs, model: &Model, wanted: &Wanted, limits: &Limits) -> Baseline {
    let n_tokenizing = tokenize::n_threads(&model.dir, limits);
    let sizes = Sizes {
        n_threads: limits.n_threads as u64,
        n_ops: graphs.iter().map(|job| job.graph.ops.len() as u64).sum(),
        vocab_size: model.config.vocab_size(),
        most_arena_bytes: graphs.iter().map(everything_bytes).max().unwrap_or(0),
        tokenizing_bytes: if wanted.tokenizes {
            tokenize::bytes(&model.dir, n_tokenizing, limits)
        } else {
            0
        },
        rows_bytes: graphs.iter().map(|job| rows_bytes(job.shape)).sum(),
        streaming_bytes: wanted.stream.map_or(0, |stream| streaming_bytes(&model.dir, stream)),
    };
    Baseline::declare(sizes, limits.budget_bytes)
}
