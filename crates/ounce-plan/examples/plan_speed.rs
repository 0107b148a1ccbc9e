//! How long planning takes: whole frontiers of 12, 32 and 80 layers, one plan each, and
//! `peak_and_time` of a candidate as the architecture search asks for it.
//!
//! `cargo run --release -p ounce-plan --example plan_speed`
#![expect(clippy::print_stdout, reason = "an example prints")]

use std::time::Instant;

use ounce_ir::{Graph, OptimizerKind};
use ounce_models::{ModelConfig, Purpose};
use ounce_plan::{Frontier, PlanOptions};
use ounce_program::{FixedMachine, StepShape};

fn llama(n_layers: u32, width: u32) -> Graph {
    let config = format!(
        r#"{{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": {width},
        "intermediate_size": {}, "num_hidden_layers": {n_layers}, "num_attention_heads": {},
        "num_key_value_heads": {}, "vocab_size": 32000, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": false}}"#,
        width * 7 / 2,
        width / 64,
        width / 256
    );
    let config = ModelConfig::from_json(&config).expect("a valid configuration");
    let forward = ounce_models::build(&config, Purpose::Loss, 0.0).expect("a supported model");
    let both = ounce_passes::differentiate(&forward).expect("every op has a gradient");
    ounce_passes::attach_optimizer(&both, OptimizerKind::AdamW, false).expect("attaches")
}

fn main() {
    let machine = FixedMachine::default();
    for n_layers in [12, 32, 80] {
        let graph = llama(n_layers, 2048);
        let shape = StepShape::new(4, 1024);
        let start = Instant::now();
        let frontier = Frontier::solve(&graph, &shape, &machine, &PlanOptions::default());
        let solved = start.elapsed();
        let start = Instant::now();
        let low_end = PlanOptions { max_points: 64, ..PlanOptions::default() };
        let low_end = Frontier::solve(&graph, &shape, &machine, &low_end);
        let low_solved = start.elapsed();
        let smallest = low_end.smallest_bytes();
        let low_end = start.elapsed();
        let start = Instant::now();
        let plan = frontier.plan(smallest * 5 / 4).expect("fits");
        println!(
            "{n_layers} layers: {} plans for every budget in {:.3} s, the low end alone in {:.3} s, \
             with the smallest budget in {:.3} s, \
             one unrolled and placed in {:.3} s, {} instructions, gap {:.2} %",
            frontier.points().count(),
            solved.as_secs_f64(),
            low_solved.as_secs_f64(),
            low_end.as_secs_f64(),
            start.elapsed().as_secs_f64(),
            plan.instrs.len(),
            100.0 * (plan.certificate.step_s / plan.certificate.step_bound_s - 1.0)
        );
    }
    let graph = llama(12, 512);
    let shape = StepShape::new(4, 256);
    let start = Instant::now();
    let frontier = Frontier::solve(&graph, &shape, &machine, &PlanOptions::coarse());
    let answer = frontier.peak_and_time(1 << 30);
    println!(
        "peak_and_time of a candidate: {:.2} ms {answer:?}",
        start.elapsed().as_secs_f64() * 1e3
    );
}
