//! What 16 bits take: exactly half of what the same values take in 32.

use std::collections::BTreeMap;

use ounce_ir::{DType, Graph, OptimizerKind, ValueId};
use ounce_models::Purpose;
use ounce_passes::{Precision, PrecisionPolicy, lower_precision};
use ounce_plan::{Frontier, PlanOptions};
use ounce_program::{BufferRole, Category, FixedMachine, StepShape};

fn training_graph(precision: Precision) -> Graph {
    let config = ounce_models::preset("gpt2").expect("a preset trains");
    let forward = ounce_models::build(&config, Purpose::Loss, 0.0).expect("a preset trains");
    let both = ounce_passes::differentiate(&forward).expect("a preset trains");
    let policy = PrecisionPolicy { precision, keep_f32: Vec::new() };
    let lowered = lower_precision(&both, &policy);
    ounce_passes::attach_optimizer(&lowered, OptimizerKind::AdamW, false).expect("it attaches")
}

/// Bytes of every value that the plan that recomputes nothing saves for the backward.
fn saved_bytes(graph: &Graph) -> BTreeMap<ValueId, u64> {
    let machine = FixedMachine::default();
    let options = PlanOptions {
        micro_batches: Some(1),
        n_halvings: 0,
        unconstrained_permille: 0,
        ..PlanOptions::default()
    };
    let frontier = Frontier::solve(graph, &StepShape::new(4, 1024), &machine, &options);
    let plan = frontier.plan(u64::MAX).expect("there is no budget");
    let saved = plan.buffers.values().filter(|b| b.category == Category::Saved);
    let value = |b: &ounce_program::Buffer| match b.role {
        BufferRole::Value(v) => (v, b.bytes),
        role => panic!("{role:?} is saved"),
    };
    saved.map(value).collect()
}

#[test]
fn saved_values_take_half_the_bytes_in_bf16_and_f16() {
    let full = saved_bytes(&training_graph(Precision::F32));
    for precision in [Precision::Bf16, Precision::F16] {
        let graph = training_graph(precision);
        let half = saved_bytes(&graph);
        assert_eq!(half.len(), full.len(), "the same values are saved");
        let mut n_halved = 0;
        for (v, bytes) in &half {
            // The sums of softmax stay in f32: a number per head and token.
            let is_f32 = graph.values[*v].dtype == DType::F32;
            assert!(!is_f32 || graph.values[*v].name.ends_with("lse"), "{}", graph.values[*v].name);
            assert_eq!(full[v], if is_f32 { *bytes } else { 2 * bytes });
            n_halved += u32::from(!is_f32);
        }
        assert!(n_halved > 60, "only {n_halved} values are saved in 16 bits");
    }
}
