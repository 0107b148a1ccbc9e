//! A thousand random models and budgets: every plan is accepted by the independent checker, every
//! mutated plan is refused, the smallest feasible budget works and less does not, and the step time
//! never grows with the budget.

use ounce_check::{check, mutate::mutations};
use ounce_ir::{Graph, OptimizerKind};
use ounce_oracle::{RandomCase, TestRng, random_case};
use ounce_plan::{Frontier, PlanError, PlanOptions};
use ounce_program::{FixedMachine, LoopOrder, Plan};

const N_CASES: u64 = 1000;

fn training_graph(case: &RandomCase, seed: u64) -> Graph {
    let both = ounce_passes::differentiate(&case.graph).expect("every op has a gradient");
    let kind = if seed.is_multiple_of(5) { OptimizerKind::Sgd } else { OptimizerKind::AdamW };
    ounce_passes::attach_optimizer(&both, kind, seed.is_multiple_of(2))
        .expect("the optimizer attaches")
}

fn options(rng: &mut TestRng) -> PlanOptions {
    let loop_order =
        rng.pick(&[None, None, Some(LoopOrder::TokenMajor), Some(LoopOrder::LayerMajor)]);
    let (reserved_bytes, n_halvings) = (rng.pick(&[0, 0, 4096]), rng.below(3) as u32);
    PlanOptions {
        loop_order,
        reserved_bytes,
        n_halvings,
        max_points: 256,
        ..PlanOptions::default()
    }
}

fn accept(graph: &Graph, plan: &Plan, machine: &FixedMachine, seed: u64) {
    if let Err(e) = check(graph, plan, machine) {
        panic!("seed {seed}: the checker refuses a plan: {e}\n{graph:?}\n{plan}");
    }
}

/// Parts of [`plans_are_accepted_and_mutants_refused`], which the test runner runs side by side.
const N_PARTS: u64 = 4;

fn plans_are_accepted_and_mutants_refused(part: u64) {
    let machine = FixedMachine { baseline_bytes: 1 << 16, ..FixedMachine::default() };
    let mut n_mutants = 0;
    for seed in (part..N_CASES).step_by(N_PARTS as usize) {
        let mut rng = TestRng::new(seed ^ 0xB0D6E7);
        let case = random_case(seed, 5);
        let graph = training_graph(&case, seed);
        let frontier = Frontier::solve(&graph, &case.shape, &machine, &options(&mut rng));
        let smallest = frontier.smallest_bytes();
        let largest = frontier.points().last().expect("a frontier has points").0;
        let budget = smallest + rng.below(largest.saturating_sub(smallest) + 1);
        let plan = frontier.plan(budget).expect("at least the smallest feasible budget");
        accept(&graph, &plan, &machine, seed);
        for (name, mutant) in mutations(&graph, &plan) {
            n_mutants += 1;
            assert!(
                check(&graph, &mutant, &machine).is_err(),
                "seed {seed}: the checker accepts `{name}`\n{plan}"
            );
        }
    }
    assert!(n_mutants > 50 * N_CASES / N_PARTS, "only {n_mutants} mutants");
}

#[test]
fn plans_are_accepted_and_mutants_refused_first_quarter() {
    plans_are_accepted_and_mutants_refused(0);
}

#[test]
fn plans_are_accepted_and_mutants_refused_second_quarter() {
    plans_are_accepted_and_mutants_refused(1);
}

#[test]
fn plans_are_accepted_and_mutants_refused_third_quarter() {
    plans_are_accepted_and_mutants_refused(2);
}

#[test]
fn plans_are_accepted_and_mutants_refused_last_quarter() {
    plans_are_accepted_and_mutants_refused(3);
}

#[test]
fn the_smallest_budget_works_and_less_is_refused() {
    let machine = FixedMachine { baseline_bytes: 1 << 16, ..FixedMachine::default() };
    for seed in 0..N_CASES / 4 {
        let mut rng = TestRng::new(seed ^ 0x51);
        let case = random_case(seed, 5);
        let graph = training_graph(&case, seed);
        let frontier = Frontier::solve(&graph, &case.shape, &machine, &options(&mut rng));
        let smallest = frontier.smallest_bytes();
        let plan = frontier.plan(smallest).expect("the smallest feasible budget works");
        assert!(plan.certificate.peak_bytes <= smallest);
        accept(&graph, &plan, &machine, seed);
        let PlanError::DoesNotFit { smallest_bytes, .. } =
            frontier.plan(smallest - 1).expect_err("a byte less does not");
        assert_eq!(smallest_bytes, smallest);
    }
}

#[test]
fn overhead_never_grows_with_the_budget() {
    let machine = FixedMachine::default();
    for seed in 0..N_CASES / 4 {
        let case = random_case(seed, 6);
        let graph = training_graph(&case, seed);
        let frontier = Frontier::solve(&graph, &case.shape, &machine, &PlanOptions::default());
        let smallest = frontier.smallest_bytes();
        let largest = frontier.points().last().expect("a frontier has points").0;
        let mut before = f64::INFINITY;
        for k in 0..=12 {
            let budget = smallest + (largest.saturating_sub(smallest)) * k / 12;
            let plan = frontier.plan(budget).expect("fits");
            let c = plan.certificate;
            assert!(c.step_s <= before + 1e-12, "seed {seed}: {} after {before}", c.step_s);
            assert!(c.peak_bytes <= budget && c.max_load_bytes <= c.peak_bytes);
            assert!(c.step_bound_s <= c.step_s);
            before = c.step_s;
        }
    }
}

#[test]
fn forward_graphs_are_planned_by_the_same_call() {
    let machine = FixedMachine::default();
    for seed in 0..N_CASES / 4 {
        let case = random_case(seed, 5);
        let frontier = Frontier::solve(&case.graph, &case.shape, &machine, &PlanOptions::default());
        for budget in [u64::MAX, frontier.smallest_bytes()] {
            accept(&case.graph, &frontier.plan(budget).expect("fits"), &machine, seed);
        }
    }
}
