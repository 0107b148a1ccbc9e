//! The interpreter against `transformers`: logits, loss, every gradient, ten AdamW steps.
//!
//! Goal: graph, gradient rules and op definitions together mean what PyTorch means. The goldens were
//! computed in f64 from f32 weights and rounded to f32 when stored (tests/golden/README.md), and the
//! graph carries epsilons, scales and rotary frequencies as f32, so relative errors are around 1e-7.
#![expect(clippy::unwrap_used, reason = "a test that cannot read its goldens should panic")]

#[path = "../../../tests/golden/golden.rs"]
mod golden;

use std::path::Path;

use golden::{Golden, folders, read};
use ounce_ir::{Graph, OpKind, OptimizerKind, WeightLayout};
use ounce_models::{Purpose, build_for_length};
use ounce_oracle::ops::{Weight, linear, soft_caps};
use ounce_oracle::{Hyper, Interpreter};
use ounce_passes::{attach_optimizer, differentiate};
use ounce_program::StepShape;

/// Relative, in the Euclidean norm of a tensor.
const TOLERANCE: f64 = 1e-6;

/// The training graph for rows of the golden's length.
fn training_graph(golden: &Golden) -> Graph {
    let config = golden.config();
    let n_tokens = golden.fact("tokens") as u64;
    let forward = build_for_length(&config, Purpose::Loss, 0.0, n_tokens).unwrap();
    let clip = golden.fact("clip") > 0.0;
    attach_optimizer(&differentiate(&forward).unwrap(), OptimizerKind::AdamW, clip).unwrap()
}

/// The step before training.
fn first_step<'g>(golden: &Golden, graph: &'g Graph) -> Interpreter<'g> {
    let shape = StepShape::new(golden.fact("batch") as u64, golden.fact("tokens") as u64);
    let mut step = Interpreter::new(graph, shape);
    step.set_rows(&golden.rows());
    let model = golden.model();
    assert_eq!(model.tensors().len(), graph.params.len());
    for (p, param) in graph.params.iter() {
        step.set_param(p, &read(&model, &param.name));
    }
    step
}

/// The logits that the head never stores, of the rows' tokens only.
fn logits(step: &Interpreter<'_>, n_tokens: usize) -> Vec<f64> {
    let graph = step.graph();
    let (_, head) = graph
        .ops
        .iter()
        .find(|(_, op)| matches!(op.kind, OpKind::CrossEntropyTrain { .. }))
        .unwrap();
    let param = graph.param_of(head.uses[0]);
    let dims: Vec<usize> = graph.params[param].shape.dims.iter().map(|&d| d as usize).collect();
    let data = step.param(param);
    let w = Weight { data, n_in: dims[1], n_out: dims[0], layout: WeightLayout::OutIn };
    let all = linear(step.value(head.inputs[0]), w, None);
    let OpKind::CrossEntropyTrain { soft_cap } = head.kind else { unreachable!("found as one") };
    let all = soft_cap.map_or(all.clone(), |cap| soft_caps(&all, cap.into()));
    let row_stride = n_tokens.next_multiple_of(64) * dims[0];
    all.chunks(row_stride).flat_map(|row| row[..n_tokens * dims[0]].to_vec()).collect()
}

fn check_folder(folder: &Path) {
    let golden = Golden::open(folder);
    let graph = training_graph(&golden);
    let mut step = first_step(&golden, &graph);

    step.run_backward();
    golden.check("loss", &[step.loss()], &[golden.fact("loss")], TOLERANCE);
    let ours = logits(&step, golden.fact("tokens") as usize);
    golden.check("logits", &ours, &read(&golden.tensors, "logits"), TOLERANCE);
    for (p, param) in graph.params.iter() {
        let name = format!("grad.{}", param.name);
        golden.check(&name, step.gradient(p), &read(&golden.tensors, &name), TOLERANCE);
    }

    let hyper = Hyper {
        lr: golden.fact("learning_rate"),
        beta1: golden.fact("beta1"),
        beta2: golden.fact("beta2"),
        eps: golden.fact("eps"),
        weight_decay: golden.fact("weight_decay"),
        max_grad_norm: golden.fact("clip"),
    };
    for i in 0..10 {
        step.run_step(&hyper);
        let fact = |name: &str| [golden.facts[name][i].as_f64().unwrap()];
        golden.check("losses", &[step.loss()], &fact("losses"), TOLERANCE);
        golden.check("grad_norms", &[step.grad_norm()], &fact("grad_norms"), TOLERANCE);
    }
    for (p, param) in graph.params.iter() {
        let name = format!("adamw10.{}", param.name);
        golden.check(&name, step.param(p), &read(&golden.tensors, &name), TOLERANCE);
    }
}

fn check_family(family: &str, n_models: usize) {
    let folders = folders(family);
    assert_eq!(folders.len(), n_models);
    for folder in &folders {
        check_folder(folder);
    }
}

#[test]
fn every_gpt2_model_trains_as_in_transformers() {
    check_family("gpt2-", 9);
}

#[test]
fn every_llama_model_trains_as_in_transformers() {
    check_family("llama-", 13);
}

#[test]
fn every_mistral_model_trains_as_in_transformers() {
    check_family("mistral-", 3);
}

#[test]
fn every_qwen2_model_trains_as_in_transformers() {
    check_family("qwen2-", 3);
}

#[test]
fn every_qwen3_model_trains_as_in_transformers() {
    check_family("qwen3-", 3);
}

#[test]
fn every_gemma2_model_trains_as_in_transformers() {
    check_family("gemma2-", 3);
}

#[test]
fn every_gemma3_model_trains_as_in_transformers() {
    check_family("gemma3-", 3);
}

#[test]
fn every_phi3_model_trains_as_in_transformers() {
    check_family("phi3-", 3);
}

#[test]
fn every_smollm3_model_trains_as_in_transformers() {
    check_family("smollm3-", 3);
}

#[test]
fn every_olmo2_model_trains_as_in_transformers() {
    check_family("olmo2-", 3);
}
