//! The planner against all schedules of tiny models that cannot be cut along the token axis.
//!
//! Goal: the planner's costs and bytes are those of the game that [`brute_force`] plays (it is never
//! better), and its options and chain search lose little from 1.25 times the smallest budget on.
#![expect(clippy::unwrap_used, reason = "a test that cannot build its graph should panic")]

use ounce_ir::{
    AttentionSpec, GeluKind, Graph, GraphBuilder, Init, InputKind, OptimizerKind, Shape, ValueId,
    WeightLayout,
};
use ounce_oracle::{brute_force, least_bytes};
use ounce_passes::{attach_optimizer, differentiate};
use ounce_plan::{Frontier, PlanOptions};
use ounce_program::{FixedMachine, StepShape};

const WIDTH: u64 = 24;

/// Adds one half of a layer, named by its number, to a residual stream.
type Half = fn(&mut GraphBuilder, ValueId, &str) -> ValueId;

/// An embedding, halves of layers, a head.
fn model(tied: bool, clip: bool, halves: &[Half]) -> Graph {
    let mut b = GraphBuilder::new();
    let ids = b.input(InputKind::TokenIds);
    b.stage("embed", "embed");
    let wte = b.param("wte", Shape::fixed(&[13, WIDTH]), true);
    let mut x = b.embed(ids, wte);
    for (i, half) in halves.iter().enumerate() {
        x = half(&mut b, x, &i.to_string());
    }
    b.stage("head", "head");
    let head = if tied { wte } else { b.param("head", Shape::fixed(&[13, WIDTH]), true) };
    b.cross_entropy(x, head);
    let graph = differentiate(&b.finish().unwrap()).unwrap();
    attach_optimizer(&graph, OptimizerKind::Sgd, clip).unwrap()
}

fn linear(b: &mut GraphBuilder, x: ValueId, name: &str, n_in: u64, n_out: u64) -> ValueId {
    let w = b.param(name, Shape::fixed(&[n_out, n_in]), true);
    b.linear(x, w, None, WeightLayout::OutIn)
}

fn norm(b: &mut GraphBuilder, x: ValueId, name: &str) -> ValueId {
    let w = b.param_init(name, Shape::fixed(&[WIDTH]), false, Init::Ones);
    b.rms_norm(x, w, 1e-5)
}

fn mlp(b: &mut GraphBuilder, x: ValueId, i: &str) -> ValueId {
    b.stage(&format!("mlp.{i}"), "mlp");
    let y = norm(b, x, &format!("norm.{i}"));
    let y = linear(b, y, &format!("up.{i}"), WIDTH, 4 * WIDTH);
    let y = b.gelu(y, GeluKind::Erf);
    let y = linear(b, y, &format!("down.{i}"), 4 * WIDTH, WIDTH);
    b.add(x, y)
}

fn attention(b: &mut GraphBuilder, x: ValueId, i: &str) -> ValueId {
    b.stage(&format!("attn.{i}"), "attn");
    let y = norm(b, x, &format!("norm.{i}"));
    let y = linear(b, y, &format!("qkv.{i}"), WIDTH, 3 * WIDTH);
    let spec = AttentionSpec { n_heads: 2, n_kv_heads: 2, head_dim: 12, scale: 0.3, packed: true };
    let y = b.attention(&[y], spec);
    let y = linear(b, y, &format!("out.{i}"), WIDTH, WIDTH);
    b.add(x, y)
}

/// Compares plans for budgets of 100 % to 160 % of the smallest with the fastest schedules, and
/// returns the largest slowdown from 125 % on.
fn compare(graph: &Graph) -> f64 {
    let shape = StepShape::new(1, 64);
    let machine = FixedMachine { overhead_s: 0.0, ..FixedMachine::default() };
    let frontier = Frontier::solve(graph, &shape, &machine, &PlanOptions::default());
    let smallest = frontier.smallest_bytes();
    let least = least_bytes(graph, shape, &machine);
    assert!(least <= smallest, "the planner needs {smallest} bytes, all schedules {least}");
    assert!(smallest < least * 6 / 5, "the planner needs {smallest} bytes, all schedules {least}");
    let slowdown = |percent: u64| {
        let budget_bytes = smallest * percent / 100;
        let planned_s = frontier.plan(budget_bytes).unwrap().certificate.step_s;
        let best_s = brute_force(graph, shape, &machine, budget_bytes).unwrap();
        assert!(planned_s > best_s * (1.0 - 1e-9), "{budget_bytes} bytes: {planned_s} < {best_s}");
        planned_s / best_s
    };
    for percent in [100, 110] {
        slowdown(percent);
    }
    [125, 140, 160].map(slowdown).into_iter().fold(1.0, f64::max)
}

#[test]
fn one_half_layer_is_planned_as_well_as_possible() {
    for half in [mlp as Half, attention] {
        for (tied, clip) in [(false, false), (true, false), (false, true), (true, true)] {
            let slowdown = compare(&model(tied, clip, &[half]));
            // The planner gives away 1 % for the least peak.
            assert!(slowdown < 1.01, "tied {tied}, clip {clip}: {slowdown}");
        }
    }
}

#[test]
fn two_half_layers_are_planned_nearly_as_well_as_possible() {
    for halves in [[mlp as Half, mlp], [attention, mlp]] {
        let slowdown = compare(&model(false, false, &halves));
        assert!(slowdown < 1.015, "{slowdown}");
        // With clipping the planner counts every gradient sum during the whole step.
        let slowdown = compare(&model(true, true, &halves));
        assert!(slowdown < 1.05, "{slowdown}");
    }
}
