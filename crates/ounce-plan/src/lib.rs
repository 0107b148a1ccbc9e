//! Graph, budget and machine to [`Plan`]: what to keep, what to recompute, in chunks of how many
//! tokens, in which order, at which address.
//!
//! Pure: no I/O, no clock, no threads, no hash maps. Same inputs, same plan, byte for byte.
//!
//! Files, in reading order: `context` (tables derived from the graph), `emit` (decisions to
//! instructions), `options` (Pareto options of a stage type), `chain` (the DP over the chain),
//! `bound` (a lower bound on the time), `place` (offsets), `frontier` (all of it for every budget at
//! once), `report` (the table for people), `error`.
#![forbid(unsafe_code)]

mod context;

mod emit;

mod options;

mod chain;

mod bound;

mod place;

mod frontier;

mod report;

mod error;

use ounce_ir::Graph;
use ounce_program::{Machine, Plan, StepShape};

pub use error::PlanError;
pub use frontier::{Frontier, InstrBytes, PlanOptions};
pub use report::{category_bytes_at_peak, explain, n_runs, timeline};

/// The plan for a budget: [`Frontier::solve`] and [`Frontier::plan`] in one call.
///
/// # Errors
/// [`PlanError::DoesNotFit`] with the smallest feasible budget.
pub fn plan(
    graph: &Graph,
    shape: &StepShape,
    budget_bytes: u64,
    machine: &dyn Machine,
    options: &PlanOptions,
) -> Result<Plan, PlanError> {
    Frontier::solve(graph, shape, machine, options).plan(budget_bytes)
}
