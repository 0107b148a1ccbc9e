//! The brute-force planner on chains small enough to count by hand.
#![expect(clippy::unwrap_used, reason = "a test that cannot build its graph should panic")]

use ounce_ir::{
    GeluKind, Graph, GraphBuilder, Init, InputKind, OpId, OptimizerKind, Phase, Shape, WeightLayout,
};
use ounce_oracle::{brute_force, least_bytes};
use ounce_passes::{attach_optimizer, differentiate};
use ounce_program::{FixedMachine, Machine, StepShape};

/// Every op takes a second and no scratch.
struct UnitMachine;

impl Machine for UnitMachine {
    fn n_threads(&self) -> u32 {
        1
    }
    fn scratch_bytes(&self, _: &Graph, _: OpId, _: u64) -> u64 {
        0
    }
    fn cost_s(&self, _: &Graph, _: OpId, _: &StepShape, _: u64) -> f64 {
        1.0
    }
    fn baseline_bytes(&self) -> u64 {
        0
    }
}

/// One granule, which cannot be cut.
fn shape() -> StepShape {
    StepShape::new(1, 64)
}

fn train(b: GraphBuilder, clip: bool) -> Graph {
    let graph = differentiate(&b.finish().unwrap()).unwrap();
    attach_optimizer(&graph, OptimizerKind::Sgd, clip).unwrap()
}

/// `embed, gelu, gelu, gelu, head` of width 16: a value takes 4 KiB, everything else is small.
fn chain(clip: bool) -> Graph {
    let mut b = GraphBuilder::new();
    let ids = b.input(InputKind::TokenIds);
    b.stage("all", "all");
    let table = b.param("table", Shape::fixed(&[2, 16]), true);
    let mut x = b.embed(ids, table);
    for _ in 0..3 {
        x = b.gelu(x, GeluKind::Tanh);
    }
    let head = b.param("head", Shape::fixed(&[1, 16]), true);
    b.cross_entropy(x, head);
    train(b, clip)
}

/// A norm, two linear layers and a residual between an embedding and a tied head.
fn block() -> Graph {
    let mut b = GraphBuilder::new();
    let ids = b.input(InputKind::TokenIds);
    b.stage("embed", "embed");
    let wte = b.param("wte", Shape::fixed(&[13, 24]), true);
    let x = b.embed(ids, wte);
    b.stage("mlp", "mlp");
    let w = b.param_init("norm", Shape::fixed(&[24]), false, Init::Ones);
    let y = b.rms_norm(x, w, 1e-5);
    let up = b.param("up", Shape::fixed(&[96, 24]), true);
    let y = b.linear(y, up, None, WeightLayout::OutIn);
    let y = b.gelu(y, GeluKind::Erf);
    let down = b.param("down", Shape::fixed(&[24, 96]), true);
    let y = b.linear(y, down, None, WeightLayout::OutIn);
    let x = b.add(x, y);
    b.stage("head", "head");
    b.cross_entropy(x, wte);
    train(b, true)
}

fn seconds_of_every_op_once(graph: &Graph, machine: &dyn Machine) -> f64 {
    graph.ops.ids().map(|op| machine.cost_s(graph, op, &shape(), shape().n_tokens())).sum()
}

#[test]
fn a_chain_is_recomputed_as_often_as_counted_by_hand() {
    // Two values at once are the least: x3 and its gradient, or the last gradient and its rows.
    //   2 values: the forward again from the start before every backward op: 4 + 3 + 2 + 1 runs
    //   3 values: x1 is kept for x2 and itself, then x0 is computed again: 4 + 1 + 1
    //   4 values: x0 and x1 are kept, x2 is computed again: 4 + 1
    //   5 values: all are kept: 4
    let graph = chain(false);
    let rest = graph.ops.values().filter(|op| op.phase != Phase::Forward).count();
    let least = least_bytes(&graph, shape(), &UnitMachine);
    for (extra_values, forward_runs) in [(0, 10), (1, 6), (2, 5), (3, 4), (4, 4)] {
        let cap_bytes = least + extra_values * 4 * 64 * 16;
        let found = brute_force(&graph, shape(), &UnitMachine, cap_bytes);
        assert_eq!(found, Some((forward_runs + rest) as f64), "{extra_values} values more");
    }
}

#[test]
fn the_least_bytes_are_two_values_and_what_is_always_resident() {
    // The widest moment is the copy of the last gradient into rows: 2 values of 4096 bytes.
    // Always resident: table 128, head 64, ids and targets and losses 3 * 256, two norm parts 2 * 64.
    let least = 2 * 4096 + 128 + 64 + 3 * 256 + 2 * 64;
    // At the loss, a small sum comes on top of two values: that of the head, 64 bytes.
    assert_eq!(least_bytes(&chain(false), shape(), &UnitMachine), least + 64);
}

#[test]
fn clipping_holds_sums_until_all_norms_are_known() {
    let (released, held) = (chain(false), chain(true));
    let least = |graph| least_bytes(graph, shape(), &UnitMachine);
    // The clip scale is one more scalar. At the last scatter both sums stand, which is no moment of
    // two values; the copy into rows now has the head's sum beside it, as the loss has.
    assert_eq!(least(&held), least(&released) + 64);
}

#[test]
fn nothing_fits_below_the_least_bytes_and_time_falls_with_the_cap() {
    for machine in [&UnitMachine as &dyn Machine, &FixedMachine::default()] {
        let graph = block();
        let least = least_bytes(&graph, shape(), machine);
        assert_eq!(brute_force(&graph, shape(), machine, least - 1), None);
        let seconds: Vec<f64> = (0..12)
            .map(|i| brute_force(&graph, shape(), machine, least * (20 + i) / 20).unwrap())
            .collect();
        assert!(seconds.is_sorted_by(|a, b| a >= b), "{seconds:?}");
        assert!(seconds[0] > seconds[11], "{seconds:?}");

        let all = brute_force(&graph, shape(), machine, u64::MAX).unwrap();
        let once = seconds_of_every_op_once(&graph, machine);
        assert!((all - once).abs() < 1e-12 * once, "{all} is not {once}");
    }
}

#[test]
fn the_baseline_counts() {
    let machine = |baseline_bytes| FixedMachine { baseline_bytes, ..FixedMachine::default() };
    let least = |bytes| least_bytes(&chain(true), shape(), &machine(bytes));
    assert_eq!(least(1000), least(0) + 1000);
}
