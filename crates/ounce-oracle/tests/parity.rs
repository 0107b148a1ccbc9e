//! The interpreter against `transformers`: logits, loss, every gradient, ten AdamW steps.
//!
//! Goal: graph, gradient rules and op definitions together mean what PyTorch means. The goldens were
//! computed in f64 from f32 weights and rounded to f32 when stored (tests/golden/README.md), and the
//! graph carries epsilons, scales and rotary frequencies as f32, so relative errors are around 1e-7.
#![expect(clippy::unwrap_used, reason = "a test that cannot read its goldens should panic")]

use std::path::{Path, PathBuf};

use ounce_io::SafetensorsDir;
use ounce_ir::{Graph, OpKind, OptimizerKind, WeightLayout};
use ounce_models::{ModelConfig, Purpose, build_for_length};
use ounce_oracle::ops::{Weight, linear};
use ounce_oracle::{Hyper, Interpreter, Row};
use ounce_passes::{attach_optimizer, differentiate};
use ounce_program::StepShape;
use serde_json::Value;

/// Relative, in the Euclidean norm of a tensor.
const TOLERANCE: f64 = 1e-6;

/// One folder of goldens.
struct Golden {
    folder: PathBuf,
    facts: Value,
    tensors: SafetensorsDir,
}

impl Golden {
    fn open(folder: &Path) -> Self {
        let facts = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        Self {
            folder: folder.to_owned(),
            facts: serde_json::from_str(&facts).unwrap(),
            tensors: SafetensorsDir::open(&folder.join("golden.safetensors")).unwrap(),
        }
    }

    fn fact(&self, name: &str) -> f64 {
        self.facts[name].as_f64().unwrap()
    }

    fn integers(&self, name: &str) -> Vec<i32> {
        let mut bytes = vec![0; self.tensors.get(name).unwrap().bytes as usize];
        self.tensors.read_exact_bytes(name, 0, &mut bytes).unwrap();
        let integer = |b: &[u8]| i64::from_le_bytes(b.try_into().unwrap()) as i32;
        bytes.chunks(8).map(integer).collect()
    }

    /// Rows with targets as the graph wants them: shifted by one, the last token without.
    fn rows(&self) -> Vec<Row> {
        let n_tokens = self.fact("tokens") as usize;
        let (ids, labels) = (self.integers("input_ids"), self.integers("labels"));
        let row = |(ids, labels): (&[i32], &[i32])| Row {
            token_ids: ids.to_vec(),
            targets: labels[1..].iter().copied().chain([-100]).collect(),
        };
        ids.chunks(n_tokens).zip(labels.chunks(n_tokens)).map(row).collect()
    }

    /// The training graph for rows of the golden's length.
    fn graph(&self) -> Graph {
        let config = std::fs::read_to_string(self.folder.join("config.json")).unwrap();
        let config = ModelConfig::from_json(&config).unwrap();
        let n_tokens = self.fact("tokens") as u64;
        let forward = build_for_length(&config, Purpose::Loss, 0.0, n_tokens).unwrap();
        let clip = self.fact("clip") > 0.0;
        attach_optimizer(&differentiate(&forward).unwrap(), OptimizerKind::AdamW, clip).unwrap()
    }

    /// The step before training.
    fn step<'g>(&self, graph: &'g Graph) -> Interpreter<'g> {
        let shape = StepShape::new(self.fact("batch") as u64, self.fact("tokens") as u64);
        let mut step = Interpreter::new(graph, shape);
        step.set_rows(&self.rows());
        let model = SafetensorsDir::open(&self.folder.join("model.safetensors")).unwrap();
        assert_eq!(model.tensors().len(), graph.params.len());
        for (p, param) in graph.params.iter() {
            step.set_param(p, &read(&model, &param.name));
        }
        step
    }

    fn check(&self, what: &str, ours: &[f64], theirs: &[f64]) {
        let error = relative_error(ours, theirs);
        assert!(error < TOLERANCE, "{}: {what} is off by {error:e}", self.folder.display());
    }
}

fn read(tensors: &SafetensorsDir, name: &str) -> Vec<f64> {
    let mut data = vec![0.0; tensors.get(name).unwrap().n_elems()];
    tensors.read_f32(name, &mut data).unwrap();
    data.into_iter().map(f64::from).collect()
}

/// Relative to the larger norm; tensors below 1e-9 are zero (a bias of keys has no gradient).
fn relative_error(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let distance = norm(&mut a.iter().zip(b).map(|(a, b)| a - b));
    distance / norm(&mut a.iter().copied()).max(norm(&mut b.iter().copied())).max(1e-9)
}

/// The logits that the head never stores, of the rows' tokens only.
fn logits(step: &Interpreter<'_>, n_tokens: usize) -> Vec<f64> {
    let graph = step.graph();
    let (_, head) = graph.ops.iter().find(|(_, op)| op.kind == OpKind::CrossEntropyTrain).unwrap();
    let param = graph.param_of(head.uses[0]);
    let dims: Vec<usize> = graph.params[param].shape.dims.iter().map(|&d| d as usize).collect();
    let data = step.param(param);
    let w = Weight { data, n_in: dims[1], n_out: dims[0], layout: WeightLayout::OutIn };
    let all = linear(step.value(head.inputs[0]), w, None);
    let row_stride = n_tokens.next_multiple_of(64) * dims[0];
    all.chunks(row_stride).flat_map(|row| row[..n_tokens * dims[0]].to_vec()).collect()
}

fn check_folder(folder: &Path) {
    let golden = Golden::open(folder);
    let graph = golden.graph();
    let mut step = golden.step(&graph);

    step.run_backward();
    golden.check("loss", &[step.loss()], &[golden.fact("loss")]);
    let ours = logits(&step, golden.fact("tokens") as usize);
    golden.check("logits", &ours, &read(&golden.tensors, "logits"));
    for (p, param) in graph.params.iter() {
        let name = format!("grad.{}", param.name);
        golden.check(&name, step.gradient(p), &read(&golden.tensors, &name));
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
        golden.check("losses", &[step.loss()], &fact("losses"));
        golden.check("grad_norms", &[step.grad_norm()], &fact("grad_norms"));
    }
    for (p, param) in graph.params.iter() {
        let name = format!("adamw10.{}", param.name);
        golden.check(&name, step.param(p), &read(&golden.tensors, &name));
    }
}

fn check_family(family: &str, n_models: usize) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let folders = std::fs::read_dir(golden).unwrap().map(|entry| entry.unwrap().path());
    let of_family = |f: &PathBuf| f.file_name().unwrap().to_str().unwrap().starts_with(family);
    let mut folders: Vec<PathBuf> = folders.filter(of_family).collect();
    folders.sort();
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
