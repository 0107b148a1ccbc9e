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

const N_CASES: u64 = 150;
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
    let (mut n_graphs, mut n_equal, mut n_compared) = (0, 0, 0);
    for seed in 0..N_CASES {
        let Some(graph) = tiny_graph(seed) else { continue };
        n_graphs += 1;
        let frontier = Frontier::solve(&graph, &shape, &machine, &PlanOptions::default());
        let smallest = frontier.smallest_bytes();
        let least = least_bytes(&graph, shape, &machine);
        assert!(least <= smallest, "seed {seed}: {smallest} bytes, brute force needs {least}");
        let largest = frontier.points().last().expect("a frontier has points").0;
        for k in 0..=6 {
            let budget = smallest + (largest.max(smallest * 5 / 4) - smallest) * k / 6;
            let exact_s = brute_force(&graph, shape, &machine, budget).expect("fits");
            let (_, plan_s) = frontier.peak_and_time(budget).expect("fits");
            assert!(plan_s >= exact_s * (1.0 - 1e-9), "seed {seed}: {plan_s} s beats {exact_s} s");
            // The planner may choose a smaller plan within 1 % of the fastest.
            let equal = plan_s <= exact_s * 1.01 + 1e-12;
            n_compared += 1;
            n_equal += u32::from(equal);
            if budget * 4 >= smallest * 5 {
                assert!(
                    equal,
                    "seed {seed}, {budget} of {smallest} bytes: {plan_s} s, exact {exact_s} s"
                );
            }
        }
    }
    assert!(n_graphs >= 20, "only {n_graphs} graphs are tiny enough");
    assert!(n_equal * 10 >= n_compared * 8, "{n_equal} of {n_compared} plans are as fast");
}
