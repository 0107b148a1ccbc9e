//! A plan for each graph of a run; where the budget is too small, the smallest that is not.
//!
//! Whether a budget is feasible must not depend on the noise of measured times: the smallest feasible
//! one is printed, and that very figure has to work in another process, also after the file of costs
//! is gone. So the least peak is that of a planner with declared costs ([`Declared`]: arithmetic over
//! a fixed speed), and measured costs choose among the plans above it. The declared planner only
//! looks for the low end, which short lists keep exactly, so it takes a small part of the time.

use ounce_exec::MeasuredMachine;
use ounce_exec::heap::release_free_heap;
use ounce_ir::{Graph, OpId, OptimizerKind};
use ounce_plan::{Frontier, PlanError, PlanOptions};
use ounce_program::{Category, FixedMachine, GRANULE_TOKENS, Instr, Machine, Plan, StepShape};

use crate::Error;
use crate::baseline::{Baseline, INSTR_BYTES};
use crate::budget::{format_budget, format_bytes};
use crate::graphs::{Graphs, Job, TrainWanted, Wanted, build};
use crate::model::Model;
use crate::together::{Need, plan_together};

/// Flags of a step of one row.
pub(crate) const ONE_ROW_FLAGS: &str =
    "--per-device-train-batch-size 1 --gradient-accumulation-steps 1";

/// What planning needs to know, for every plan of a run.
pub(crate) struct Planner<'a> {
    pub(crate) machine: &'a MeasuredMachine,
    pub(crate) model: &'a Model,
    pub(crate) wanted: &'a Wanted,
    pub(crate) budget_bytes: u64,
    pub(crate) baseline: &'a Baseline,
}

/// The bytes of a measured machine with times that are the same everywhere.
struct Declared<'a>(&'a MeasuredMachine);

impl Machine for Declared<'_> {
    fn n_threads(&self) -> u32 {
        self.0.n_threads()
    }

    fn scratch_bytes(&self, graph: &Graph, op: OpId, n_tokens: u64) -> u64 {
        self.0.scratch_bytes(graph, op, n_tokens)
    }

    fn cost_s(&self, graph: &Graph, op: OpId, shape: &StepShape, n_tokens: u64) -> f64 {
        FixedMachine::default().cost_s(graph, op, shape, n_tokens)
    }

    fn baseline_bytes(&self) -> u64 {
        self.0.baseline_bytes()
    }
}

/// Options of the planner that looks for the least peak.
fn low_end(reserved_bytes: u64) -> PlanOptions {
    PlanOptions { max_points: 64, ..options(reserved_bytes) }
}

/// Options of any planner.
fn options(reserved_bytes: u64) -> PlanOptions {
    PlanOptions { reserved_bytes, instr_bytes: INSTR_BYTES, ..PlanOptions::default() }
}

impl Planner<'_> {
    /// Times the kernels of all graphs that fit, before there are lists or tables of any plan: timing has the memory of
    /// the budget to itself.
    pub(crate) fn time(&self, graphs: &Graphs) {
        for Job { graph, shape, reserved_bytes } in graphs.iter() {
            let declared = Declared(self.machine);
            let least = Frontier::solve(graph, shape, &declared, &low_end(*reserved_bytes));
            let fits = least.smallest_bytes() <= self.budget_bytes;
            drop(least);
            release_free_heap();
            for op in graph.ops.ids().filter(|_| fits) {
                self.machine.cost_s(graph, op, shape, shape.n_tokens());
            }
        }
        self.machine.release_memory();
    }

    /// The plan of a graph, if one fits into `budget_bytes`, which is all of the run's or a part of it.
    pub(crate) fn plan(&self, job: &Job, budget_bytes: u64) -> Option<Plan> {
        let Job { graph, shape, reserved_bytes } = job;
        let mut options = options(*reserved_bytes);
        // A small budget has room for short lists.
        let free_bytes = self.budget_bytes.saturating_sub(self.baseline.bytes());
        let point_bytes = Frontier::n_lists(graph, shape, &options) * Frontier::POINT_BYTES;
        options.max_points = (free_bytes / LISTS_SHARE / point_bytes).clamp(16, 1024) as usize;
        if self.wanted.train.is_some_and(|train| train.fastest) {
            options.unconstrained_permille = 0;
        }
        let declared = Declared(self.machine);
        let least = || Frontier::solve(graph, shape, &declared, &low_end(*reserved_bytes));
        let smallest_bytes = least().smallest_bytes();
        if smallest_bytes > budget_bytes {
            return None;
        }
        // Lists are made before plans are unrolled: what that takes beside the lists is in a plan's need.
        release_free_heap();
        let measured = Frontier::solve(graph, shape, self.machine, &options);
        release_free_heap();
        if let Ok(plan) = measured.plan(budget_bytes) {
            return Some(plan);
        }
        let fastest_s = measured.fastest_s();
        drop(measured);
        self.least(graph, least().plan(budget_bytes), fastest_s).ok()
    }

    /// The plan near the least peak, with its measured times: what fits together in the smallest budget fits in any
    /// larger one.
    pub(crate) fn plan_least(&self, job: &Job, budget_bytes: u64) -> Option<Plan> {
        let Job { graph, shape, reserved_bytes } = job;
        let declared = Declared(self.machine);
        let plan =
            ounce_plan::plan(graph, shape, budget_bytes, &declared, &low_end(*reserved_bytes));
        let measured = Frontier::solve(graph, shape, self.machine, &low_end(*reserved_bytes));
        let fastest_s = measured.fastest_s();
        drop(measured);
        self.least(graph, plan, fastest_s).ok()
    }

    /// A plan near the least peak that measured costs do not find, with its measured times.
    fn least(
        &self,
        graph: &Graph,
        plan: Result<Plan, PlanError>,
        (bound_s, fastest_s): (f64, f64),
    ) -> Result<Plan, PlanError> {
        let mut plan = plan?;
        let cost = |instr: &Instr| match instr {
            Instr::Run { op, tokens, .. } => {
                self.machine.cost_s(graph, *op, &plan.shape, tokens.end - tokens.start)
            }
            Instr::Zero { .. } | Instr::Copy { .. } | Instr::Wait { .. } => 0.0,
        };
        plan.certificate.step_s = plan.instrs.iter().map(cost).sum();
        plan.certificate.step_bound_s = bound_s;
        plan.certificate.unconstrained_step_s = fastest_s;
        Ok(plan)
    }

    /// The error that names the smallest budget for all plans, what dominates it, and what would fit.
    pub(crate) fn does_not_fit(&self, graphs: &Graphs) -> Error {
        let (smallest_bytes, dominating) = self.smallest(graphs);
        let line = |name: &str, bytes| format!("  {name:<16} {:>12}\n", format_bytes(bytes));
        let tokenizing_bytes = self.baseline.tokenizing_peak_bytes();
        let is_above = tokenizing_bytes > self.budget_bytes;
        let tokenizing = is_above.then(|| {
            format!("and before the first step\n{}", line("tokenizing", tokenizing_bytes))
        });
        let streaming_bytes = self.baseline.streaming_bytes();
        let streaming = (streaming_bytes > 0).then(|| line("  for streaming", streaming_bytes));
        let planned = dominating.iter().filter(|(_, bytes)| *bytes > 0);
        let planned = planned.map(|(category, bytes)| line(category.name(), *bytes));
        Error::DoesNotFit {
            budget_bytes: self.budget_bytes,
            smallest_bytes,
            breakdown: planned.chain(streaming).chain(tokenizing).collect(),
            hint: self.cheapest_change(smallest_bytes),
        }
    }

    /// The smallest budget of a run, and what the largest of its plans holds in it.
    pub(crate) fn smallest(&self, graphs: &Graphs) -> (u64, Vec<(Category, u64)>) {
        let (together_bytes, mut parts) = self.smallest_together(graphs);
        let arena_bytes = together_bytes.saturating_sub(self.baseline.bytes());
        let smallest_bytes = self.baseline.smallest_budget(arena_bytes);
        for (category, bytes) in &mut parts {
            if *category == Category::Process {
                *bytes = self.baseline.bytes_in(smallest_bytes);
            }
        }
        (smallest_bytes, parts)
    }

    /// The smallest budget that the plans of a run fit into together, beside the process as it is declared for this
    /// budget.
    pub(crate) fn smallest_together(&self, graphs: &Graphs) -> (u64, Vec<(Category, u64)>) {
        let declared = Declared(self.machine);
        let mut worst = (0, Vec::new());
        for Job { graph, shape, reserved_bytes } in graphs.iter() {
            if let Err(PlanError::DoesNotFit { smallest_bytes, dominating, .. }) =
                ounce_plan::plan(graph, shape, 0, &declared, &low_end(*reserved_bytes))
                && smallest_bytes > worst.0
            {
                worst = (smallest_bytes, dominating);
            }
        }
        worst.0 = first_that_fits(worst.0, |bytes| self.fit_together(graphs, bytes));
        worst
    }

    /// Whether plans by declared costs fit into a budget together.
    fn fit_together(&self, graphs: &Graphs, budget_bytes: u64) -> bool {
        let declared = Declared(self.machine);
        let jobs: Vec<&Job> = graphs.iter().collect();
        let need = |&need: &Need| need;
        let found = plan_together(jobs.len(), budget_bytes, need, |i, budget_bytes| {
            let Job { graph, shape, reserved_bytes } = jobs[i];
            let plan =
                ounce_plan::plan(graph, shape, budget_bytes, &declared, &low_end(*reserved_bytes));
            Ok(plan.ok().map(|plan| Need {
                peak_bytes: plan.certificate.peak_bytes,
                tables_bytes: plan.baseline_bytes - self.machine.baseline_bytes(),
            }))
        });
        matches!(found, Ok(Some(_)))
    }

    /// Whether the budget is below what plans are modelled with, which is known before any is unrolled.
    fn is_hopeless(&self, graphs: &Graphs) -> bool {
        let declared = Declared(self.machine);
        graphs.iter().any(|Job { graph, shape, reserved_bytes }| {
            let least = Frontier::solve(graph, shape, &declared, &low_end(*reserved_bytes));
            least.least_modelled_bytes() > self.budget_bytes
        })
    }

    /// The first change, those that cost least first, after which the run fits into the budget; if none is enough by
    /// itself, together with clipping off. Another optimizer comes last.
    fn cheapest_change(&self, smallest_bytes: u64) -> String {
        let alone = changes(self.wanted);
        let both =
            alone.iter().find(|(flags, _)| flags == NO_CLIPPING).map(|(_, wanted)| changes(wanted));
        let both = both.unwrap_or_default().into_iter();
        let both = both.map(|(flags, wanted)| (format!("{NO_CLIPPING} {flags}"), wanted));
        let mut all: Vec<_> = alone.iter().cloned().chain(both).collect();
        all.sort_by_key(|(flags, _)| flags.contains(SGD));
        for (flags, changed) in all {
            let Ok(graphs) = build(self.model, &changed) else { continue };
            if self.is_hopeless(&graphs) {
                continue;
            }
            let (bytes, _) = self.smallest(&graphs);
            if bytes <= self.budget_bytes {
                return format!("`{flags}` needs {}", format_budget(bytes));
            }
        }
        let enough = format_budget(smallest_bytes).replace(' ', "");
        let is_tokenizing = self.baseline.is_tokenizing(smallest_bytes);
        let or = if is_tokenizing { "" } else { ", or take a smaller model" };
        format!("give `--memory {enough}`{or}")
    }
}

/// The first budget from `bytes` on that fits, in steps of [`BUDGET_STEP_BYTES`]: in strides that double until one
/// does, then halved down to the step.
fn first_that_fits(bytes: u64, fits: impl Fn(u64) -> bool) -> u64 {
    let mut least = bytes;
    let mut stride = BUDGET_STEP_BYTES;
    while !fits(least) {
        least += stride;
        stride *= 2;
    }
    stride /= 2;
    while stride > BUDGET_STEP_BYTES {
        stride /= 2;
        if fits(least - stride) {
            least -= stride;
        }
    }
    least
}

/// By what budgets are tried.
const BUDGET_STEP_BYTES: u64 = 64 << 10;
/// The planner's lists take one of so many parts of what a budget leaves free.
const LISTS_SHARE: u64 = 16;
const NO_CLIPPING: &str = "--max-grad-norm 0";
const SGD: &str = "--optimizer sgd";

/// Changes to a run that make it smaller, as flags, those that change the result least first.
fn changes(wanted: &Wanted) -> Vec<(String, Wanted)> {
    let mut changes = Vec::new();
    let Some(train) = wanted.train else {
        if let Some(eval) = wanted.eval.filter(|eval| eval.n_rows > 1) {
            let fewer = Wanted { eval: Some(StepShape { n_rows: 1, ..eval }), ..wanted.clone() };
            changes.push(("--per-device-train-batch-size 1".to_owned(), fewer));
        }
        return changes;
    };
    let with = |train| Wanted { train: Some(train), ..wanted.clone() };
    if train.clip {
        changes.push((NO_CLIPPING.to_owned(), with(TrainWanted { clip: false, ..train })));
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
            ..wanted.clone()
        };
        changes.push((format!("--max-length {max_length}"), shorter));
    }
    if train.shape.n_rows > 1 {
        let shape = |s: StepShape| StepShape { n_rows: 1, ..s };
        let fewer = Wanted {
            eval: wanted.eval.map(shape),
            ..with(TrainWanted { shape: shape(train.shape), ..train })
        };
        changes.push((ONE_ROW_FLAGS.to_owned(), fewer));
    }
    if train.optimizer != OptimizerKind::Sgd {
        let sgd = TrainWanted { optimizer: OptimizerKind::Sgd, ..train };
        changes.push((SGD.to_owned(), with(sgd)));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_budget_that_fits_is_found_in_few_trials() {
        for n in [0_u64, 1, 2, 3, 4, 5, 63, 64, 65, 1000] {
            let (begin, n_trials) = (7 << 20, std::cell::Cell::new(0));
            let wanted = begin + n * BUDGET_STEP_BYTES;
            let found = first_that_fits(begin, |bytes| {
                n_trials.set(n_trials.get() + 1);
                bytes >= wanted
            });
            assert_eq!(found, wanted, "{n} steps");
            assert!(n_trials.get() <= 21, "{} trials", n_trials.get());
        }
    }
}
