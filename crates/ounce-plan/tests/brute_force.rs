//! The planner against the truth: on tiny graphs every schedule is tried.
//!
//! A step of one granule cannot be cut along the token axis, so the brute force's class of schedules
//! contains every schedule that the planner could choose: it is never slower, and from 1.25 times
//! the smallest budget on the planner is as fast. Sums released in stages, in-place ops, tied heads
//! and clipping are all among the cases.

use ounce_ir::{Graph, OptimizerKind, Phase};
use ounce_oracle::{brute_force, least_bytes, random_case};
use ounce_plan::{Frontier, PlanOptions};
use ounce_program::{FixedMachine, StepShape};

const N_CASES: u64 = 400;
const N_FORWARD_MAX: usize = 10;

fn tiny_graph(seed: u64) -> Option<Graph> {
    let case = random_case(seed, 2);
    let both = ounce_passes::differentiate(&case.graph).expect("every op has a gradient");
    let graph = ounce_passes::attach_optimizer(&both, OptimizerKind::AdamW, seed.is_multiple_of(3))
        .expect("the optimizer attaches");
    let forward = graph.ops.values().filter(|op| op.phase == Phase::Forward);
    let n_values: usize = forward.map(|op| op.outputs.len()).sum();
    (n_values <= N_FORWARD_MAX).then_some(graph)
}

#[test]
fn plans_are_never_better_than_brute_force_and_soon_as_good() {
    // Times that are mostly arithmetic, as on a real machine, so that recomputation has a price.
    let machine = FixedMachine { flop_per_s: 1e9, bytes_per_s: 1e9, ..FixedMachine::default() };
    let shape = StepShape::new(1, 50);
    let (mut n_graphs, mut n_roomy, mut n_tight) = (0, 0, 0);
    let mut n_tight_equal = 0;
    for seed in 0..N_CASES {
        let Some(graph) = tiny_graph(seed) else { continue };
        n_graphs += 1;
        // Nothing given away: by default the unconstrained plan may be 1 % slower than the fastest.
        let options = PlanOptions { unconstrained_permille: 0, ..PlanOptions::default() };
        let frontier = Frontier::solve(&graph, &shape, &machine, &options);
        let smallest = frontier.smallest_bytes();
        let least = least_bytes(&graph, shape, &machine);
        assert!(least <= smallest, "seed {seed}: {smallest} bytes, brute force needs {least}");
        let largest = frontier.points().last().expect("a frontier has points").0;
        for k in 0..=6 {
            let budget = smallest + (largest.max(smallest * 5 / 4) - smallest) * k / 6;
            let exact_s = brute_force(&graph, shape, &machine, budget).expect("fits");
            let (_, plan_s) = frontier.peak_and_time(budget).expect("fits");
            assert!(plan_s >= exact_s * (1.0 - 1e-9), "seed {seed}: {plan_s} s beats {exact_s} s");
            if budget * 4 >= smallest * 5 {
                n_roomy += 1;
                assert!(
                    plan_s <= exact_s * (1.0 + 1e-9),
                    "seed {seed}, {budget} of {smallest} bytes: {plan_s} s, exact {exact_s} s"
                );
            } else {
                n_tight += 1;
                n_tight_equal += u32::from(plan_s <= exact_s * (1.0 + 1e-9));
            }
        }
    }
    assert!(n_graphs >= 20, "only {n_graphs} graphs are tiny enough");
    assert!(n_roomy >= 150, "only {n_roomy} comparisons");
    assert!(n_tight_equal * 10 >= n_tight * 6, "{n_tight_equal} of {n_tight} tight ones are");
}
