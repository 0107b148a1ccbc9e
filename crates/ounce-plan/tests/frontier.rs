//! The frontier on real models with a fixed machine.
use std::collections::BTreeMap;

use expect_test::expect;
use ounce_check::check;
use ounce_ir::{Graph, OpId, OptimizerKind};
use ounce_models::Purpose;
use ounce_plan::{Frontier, PlanOptions, explain};
use ounce_program::{FixedMachine, Instr, LoopOrder, Machine, Plan, StepShape};

fn training_graph(model: &str, clip: bool) -> Graph {
    let config = ounce_models::preset(model).expect("a preset trains");
    let forward = ounce_models::build(&config, Purpose::Loss, 0.0).expect("a preset trains");
    let both = ounce_passes::differentiate(&forward).expect("a preset trains");
    ounce_passes::attach_optimizer(&both, OptimizerKind::AdamW, clip).expect("a preset trains")
}

#[test]
fn gpt2_fits_in_a_third_of_what_keeping_everything_takes() {
    let graph = training_graph("gpt2", false);
    let machine = FixedMachine::default();
    let shape = StepShape::new(4, 1024);
    let frontier = Frontier::solve(&graph, &shape, &machine, &PlanOptions::default());
    // Parameters, two states and the tied gradient alone are 1,571 MiB.
    let smallest = frontier.smallest_bytes();
    assert!(smallest < 1_640 << 20, "smallest is {smallest} bytes");
    for budget in [u64::MAX, 3 << 30, 2 << 30, smallest] {
        let plan = frontier.plan(budget).expect("fits");
        let c = plan.certificate;
        assert!(c.peak_bytes <= budget);
        // Greedy placement meets the lower bound on transformer schedules.
        assert_eq!(c.peak_bytes, c.max_load_bytes);
        check(&graph, &plan, &machine).expect("the checker accepts the plan");
    }
    let roomy = frontier.plan(2500 << 20).expect("fits").certificate;
    assert!(roomy.step_s < 1.03 * roomy.step_bound_s, "within 3 % of the bound: {roomy:?}");
}

/// A machine on which a token costs more in a long chunk than in a short one, as where caches are small.
struct SmallCaches(FixedMachine);

impl Machine for SmallCaches {
    fn n_threads(&self) -> u32 {
        self.0.n_threads()
    }

    fn scratch_bytes(&self, graph: &Graph, op: OpId, n_tokens: u64) -> u64 {
        self.0.scratch_bytes(graph, op, n_tokens)
    }

    fn cost_s(&self, graph: &Graph, op: OpId, shape: &StepShape, n_tokens: u64) -> f64 {
        self.0.cost_s(graph, op, shape, n_tokens) * (1.0 + n_tokens as f64 / 64.0)
    }

    fn baseline_bytes(&self) -> u64 {
        self.0.baseline_bytes()
    }
}

#[test]
fn no_plan_beats_its_bound_where_short_chunks_are_the_cheaper_ones() {
    let graph = training_graph("gpt2", false);
    let machine = SmallCaches(FixedMachine::default());
    let shape = StepShape::new(1, 2048);
    let frontier = Frontier::solve(&graph, &shape, &machine, &PlanOptions::default());
    let (smallest, largest) =
        (frontier.smallest_bytes(), frontier.points().last().expect("a frontier has points").0);
    for k in 0..=8 {
        let budget = smallest + (largest - smallest) * k / 8;
        let plan = frontier.plan(budget).expect("fits");
        let c = plan.certificate;
        assert!(c.step_bound_s <= c.step_s, "{budget} bytes: {c:?}");
        check(&graph, &plan, &machine).expect("the checker accepts the plan");
    }
}

/// How many tokens each op runs on, all its runs together.
fn tokens_run(plan: &Plan) -> BTreeMap<OpId, u64> {
    let mut tokens_of = BTreeMap::new();
    for instr in &plan.instrs {
        if let Instr::Run { op, tokens, .. } = instr {
            *tokens_of.entry(*op).or_insert(0) += tokens.end - tokens.start;
        }
    }
    tokens_of
}

#[test]
fn the_fastest_plan_runs_nothing_again() {
    let graph = training_graph("gpt2", false);
    let machine = FixedMachine::default();
    let shape = StepShape::new(4, 1024);
    let n_again = |unconstrained_permille| {
        let options = PlanOptions { unconstrained_permille, ..PlanOptions::default() };
        let plan = Frontier::solve(&graph, &shape, &machine, &options).plan(u64::MAX);
        let ran = tokens_run(&plan.expect("there is no budget"));
        assert_eq!(ran.len(), graph.ops.len(), "every op runs");
        ran.values().filter(|&&n_tokens| n_tokens > shape.n_tokens()).count()
    };
    assert_eq!(n_again(0), 0);
    assert!(n_again(20) > 0, "two per cent of time are worth bytes");
}

#[test]
fn forced_loop_orders_are_kept() {
    let graph = training_graph("gpt2", true);
    let machine = FixedMachine::default();
    let shape = StepShape::new(4, 256);
    for order in [LoopOrder::TokenMajor, LoopOrder::LayerMajor] {
        let options = PlanOptions { loop_order: Some(order), ..PlanOptions::default() };
        let plan =
            Frontier::solve(&graph, &shape, &machine, &options).plan(u64::MAX).expect("fits");
        assert_eq!(plan.choice.loop_order, order);
        assert_eq!(plan.choice.n_micro_batches > 1, order == LoopOrder::TokenMajor);
        check(&graph, &plan, &machine).expect("the checker accepts the plan");
    }
}

#[test]
fn the_report_reads_well() {
    let graph = training_graph("gpt2", true);
    let machine = FixedMachine { baseline_bytes: 16 << 20, ..FixedMachine::default() };
    let shape = StepShape::new(12, 64);
    let frontier = Frontier::solve(&graph, &shape, &machine, &PlanOptions::default());
    let plan = frontier.plan(3 << 30).expect("fits");
    expect![[r"
        at the peak                  MiB    share
        weights                   474.70    24.2%
        optimizer state           949.40    48.4%
        gradients                 147.24     7.5%
        saved values              295.17    15.1%
        working values              4.50     0.2%
        kernel scratch             73.62     3.8%
        data                        0.02     0.0%
        process                    16.00     0.8%
        peak 1960.66 MiB of budget 3072.00 MiB
        no placement needs less than 1960.66 MiB (slack 0.00 MiB)
        1 micro-batch (layer-major), head in chunks of 384 tokens, gradients held for the update
        46 values kept, 26 forward ops run again, 672 instructions
        step 3.870 s predicted, +2.0 % against the fastest plan
        no schedule is faster than 3.794 s (gap 2.0 %)
    "]]
    .assert_eq(&explain(&plan));
    let refused = frontier.plan(1 << 30).expect_err("does not fit");
    expect![[r"
        the plan does not fit: budget 1024.00 MiB, smallest feasible budget: 1919.33 MiB; of that optimizer state 949.40 MiB, gradients 476.95 MiB, weights 474.70 MiB, process 16.00 MiB, working values 2.25 MiB, data 0.02 MiB, kernel scratch 0.01 MiB
        hint: give that budget, or plan a smaller step"]].assert_eq(&refused.to_string());
}
