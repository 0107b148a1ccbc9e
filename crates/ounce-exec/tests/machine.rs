//! The measured machine: scratch is what runs, costs are sane, and the file saves measuring.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use ounce_exec::MeasuredMachine;
use ounce_ir::{Graph, GraphBuilder, InputKind, OpId, OpKind, OptimizerKind, Shape, WeightLayout};
use ounce_kernels::pool::Pool;
use ounce_program::{Machine, StepShape};
use support::{ROW_TOKENS, gpt2_like, llama_like, llama_like_decode, training};

const LIMIT_BYTES: u64 = 32 << 20;

fn machine(cache: Option<std::path::PathBuf>) -> MeasuredMachine {
    MeasuredMachine::new(Arc::new(Pool::new(2)), LIMIT_BYTES, 123, cache)
}

fn graphs() -> [Graph; 3] {
    [
        training(&gpt2_like(0.1), OptimizerKind::AdamW, true),
        training(&llama_like(), OptimizerKind::Sgd, false),
        llama_like_decode(),
    ]
}

#[test]
fn costs_are_positive_do_not_fall_with_tokens_and_come_quickly() {
    let machine = machine(None);
    let shape = StepShape { n_selected: 3, ..StepShape::new(8, ROW_TOKENS) };
    let start = Instant::now();
    for graph in graphs() {
        for op in graph.ops.ids() {
            let costs: Vec<f64> = [1, 2, 5, 8]
                .map(|n_rows| machine.cost_s(&graph, op, &shape, n_rows * shape.row_stride()))
                .into();
            assert!(costs[0] > 0.0, "{}", graph.ops[op].kind.name());
            assert!(
                costs.windows(2).all(|w| w[0] <= w[1]),
                "{} {costs:?}",
                graph.ops[op].kind.name()
            );
            assert!(costs[3] < 1.0, "{} {costs:?}", graph.ops[op].kind.name());
        }
    }
    // Three graphs; a busy machine takes its time.
    assert!(start.elapsed() < Duration::from_secs(5), "took {:?}", start.elapsed());
    assert_eq!(machine.baseline_bytes(), 123);
}

#[test]
fn alike_ops_are_measured_once_and_the_file_makes_the_next_run_measure_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("costs.txt");
    let shape = StepShape::new(2, ROW_TOKENS);
    let graph = training(&llama_like(), OptimizerKind::AdamW, true);
    let ask = |machine: &MeasuredMachine| -> Vec<f64> {
        graph.ops.ids().map(|op| machine.cost_s(&graph, op, &shape, 256)).collect()
    };
    let first = machine(Some(path.clone()));
    let costs = ask(&first);
    let n_measured = first.n_measured();
    assert!(n_measured < graph.ops.len(), "both layers are alike");
    assert_eq!(ask(&first), costs);
    assert_eq!(first.n_measured(), n_measured);
    first.save().expect("saved");

    let second = machine(Some(path.clone()));
    assert_eq!(ask(&second), costs, "the same table gives the same plan");
    assert_eq!(second.n_measured(), 0);

    std::fs::write(&path, "garbage").expect("written");
    let third = machine(Some(path));
    ask(&third);
    assert_eq!(third.n_measured(), n_measured);
}

/// A head over a large vocabulary is measured in part and scaled, within the memory allowed.
#[test]
fn large_ops_are_measured_in_part() {
    let graph = |n_vocab: u64| {
        let mut b = GraphBuilder::new();
        let ids = b.input(InputKind::TokenIds);
        let table = b.param("table", Shape::fixed(&[n_vocab, 64]), true);
        b.stage("all", "all");
        let x = b.embed(ids, table);
        b.cross_entropy(x, table);
        training(&b.finish().expect("a graph"), OptimizerKind::AdamW, false)
    };
    let (whole, large) = (graph(8192), graph(10 * 8192));
    let machine = machine(None);
    let shape = StepShape::new(1, 64);
    for kind in [OpKind::CrossEntropyTrain { soft_cap: None }, OpKind::EmbedScatter] {
        let op = whole.ops.iter().find(|(_, op)| op.kind == kind).expect("the op").0;
        let cost_whole = machine.cost_s(&whole, op, &shape, 64);
        let n_measured = machine.n_measured();
        let cost_large = machine.cost_s(&large, op, &shape, 64);
        assert_eq!(machine.n_measured(), n_measured, "nothing new to measure");
        let factor = if kind == OpKind::EmbedScatter { 1.0 } else { 10.0 };
        assert!((cost_large - factor * cost_whole).abs() < 1e-9, "{cost_large} {cost_whole}");
    }
}

/// A few MiB are enough to measure a model of any size.
#[test]
fn little_memory_measures_smaller_parts() {
    let mut b = GraphBuilder::new();
    let ids = b.input(InputKind::TokenIds);
    let table = b.param("table", Shape::fixed(&[50_000, 512]), true);
    let w = b.param("w", Shape::fixed(&[4096, 512]), true);
    let w_out = b.param("w_out", Shape::fixed(&[512, 4096]), true);
    b.stage("all", "all");
    let x = b.embed(ids, table);
    let y = b.linear(x, w, None, WeightLayout::OutIn);
    let y = b.linear(y, w_out, None, WeightLayout::OutIn);
    b.cross_entropy(y, table);
    let graph = training(&b.finish().expect("a graph"), OptimizerKind::AdamW, true);
    let machine = MeasuredMachine::new(Arc::new(Pool::new(2)), 9 << 20, 0, None);
    let shape = StepShape::new(2, 64);
    for (id, op) in graph.ops.iter() {
        let n_measured = machine.n_measured();
        assert!(machine.cost_s(&graph, id, &shape, 64) > 0.0);
        let again = graph.ops.iter().take(id.0 as usize).any(|(_, o)| o.kind == op.kind);
        let name = op.kind.name();
        assert!(again || machine.n_measured() > n_measured, "{name} was measured");
    }
}

#[test]
fn without_memory_costs_are_estimated() {
    let graph = training(&llama_like(), OptimizerKind::AdamW, true);
    let machine = MeasuredMachine::new(Arc::new(Pool::new(1)), 0, 0, None);
    let shape = StepShape::new(2, ROW_TOKENS);
    for op in graph.ops.ids() {
        assert!(machine.cost_s(&graph, op, &shape, 128) > 0.0);
    }
    assert_eq!(machine.n_measured(), 0);
    machine.save().expect("there is nothing to save");
}

#[test]
fn scratch_grows_with_tokens_and_is_aligned() {
    let machine = machine(None);
    for graph in graphs() {
        for op in graph.ops.ids() {
            let [few, many] = [64, 512].map(|n| machine.scratch_bytes(&graph, op, n));
            assert!(few <= many && few.is_multiple_of(64) && many.is_multiple_of(64));
        }
    }
    let graph = training(&llama_like(), OptimizerKind::AdamW, true);
    let head = graph.ops.iter().find(|(_, op)| matches!(op.kind, OpKind::CrossEntropyTrain { .. }));
    let head: OpId = head.expect("a head").0;
    let logits_bytes = 4 * 64 * support::VOCAB;
    assert!(machine.scratch_bytes(&graph, head, 64) >= logits_bytes);
}
