//! Planner, checker and executor together: every budget gives the same bits.

mod support;

use std::sync::Arc;

use ounce_exec::MeasuredMachine;
use ounce_ir::{Graph, OptimizerKind};
use ounce_kernels::pool::Pool;
use ounce_passes::Precision;
use ounce_plan::{Frontier, PlanOptions, n_runs};
use ounce_program::{LoopOrder, StepShape};
use support::{
    Cut, ROW_TOKENS, Session, assert_same_bits, gpt2_like, llama_like, run, training_in,
};

/// Plans from the smallest budget to the largest that buys time.
fn check_budgets(graph: &Graph, shape: StepShape, machine: &MeasuredMachine) {
    let whole = run(graph, shape, Session::new(graph, shape, Cut::NONE, 2));
    for loop_order in [LoopOrder::TokenMajor, LoopOrder::LayerMajor] {
        let options = PlanOptions {
            loop_order: Some(loop_order),
            max_points: 128,
            n_halvings: 4,
            ..PlanOptions::default()
        };
        let frontier = Frontier::solve(graph, &shape, machine, &options);
        let smallest = frontier.smallest_bytes();
        let largest = frontier.points().map(|(bytes, _)| bytes).max().expect("a point");
        assert!(smallest < largest, "{loop_order}: memory buys time");
        for third in 0..=3 {
            let budget_bytes = smallest + (largest - smallest) * third / 3;
            let plan = frontier.plan(budget_bytes).expect("a feasible budget");
            ounce_check::check(graph, &plan, machine).expect("a sound plan");
            let what = format!("{loop_order}, {budget_bytes} bytes, {} runs", n_runs(&plan));
            let session = Session::of_plan(graph, &plan, Arc::new(Pool::new(2)));
            assert_same_bits(&run(graph, shape, session), &whole, &what);
        }
    }
}

#[test]
fn every_budget_gives_the_bits_of_the_plan_that_keeps_everything() {
    let machine = MeasuredMachine::new(Arc::new(Pool::new(2)), 0, 0, None);
    let shape = StepShape::new(4, ROW_TOKENS);
    for precision in Precision::ALL {
        let graph = training_in(precision, &gpt2_like(0.1), OptimizerKind::AdamW, true);
        check_budgets(&graph, shape, &machine);
        let graph = training_in(precision, &llama_like(), OptimizerKind::AdamW, false);
        check_budgets(&graph, shape, &machine);
    }
}
