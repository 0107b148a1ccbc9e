//! A model of your own, trained inside a budget: any chain of stages built with `GraphBuilder` is
//! differentiated, planned, checked and run like the families that Ounce knows.
//!
//! The model here reads a byte at a time through two gated MLP stages, without any attention, and
//! learns to continue a short text. The budget is the smallest that works.
//!
//! `cargo run --release -p ounce-train --example custom_model`
#![expect(clippy::print_stdout, reason = "an example prints")]

use std::error::Error;
use std::sync::Arc;

use ounce_exec::{Arena, Executor, MeasuredMachine, OptimizerHyper, RowSpan, StepInputs};
use ounce_ir::{
    Graph, GraphBuilder, Init, InputKind, OptimizerKind, Shape, ValueKind, WeightLayout,
};
use ounce_kernels::pool::Pool;
use ounce_plan::{Frontier, PlanOptions, explain};
use ounce_program::StepShape;

const TEXT: &[u8] = b"the quick brown fox jumps over the lazy dog. ";
const WIDTH: u64 = 64;

fn model() -> Result<Graph, Box<dyn Error>> {
    let mut b = GraphBuilder::new();
    b.stage("embed", "embed");
    let ids = b.input(InputKind::TokenIds);
    let table = b.param("embed.weight", Shape::fixed(&[256, WIDTH]), true);
    let mut x = b.embed(ids, table);
    for i in 0..2 {
        b.stage(&format!("mlp.{i}"), "mlp");
        let mut matrix = |name: &str, rows, cols| {
            b.param(&format!("mlp.{i}.{name}"), Shape::fixed(&[rows, cols]), true)
        };
        let gate = matrix("gate.weight", 2 * WIDTH, WIDTH);
        let up = matrix("up.weight", 2 * WIDTH, WIDTH);
        let down = matrix("down.weight", WIDTH, 2 * WIDTH);
        let norm =
            b.param_init(&format!("mlp.{i}.norm"), Shape::fixed(&[WIDTH]), false, Init::Ones);
        let n = b.rms_norm(x, norm, 1e-6);
        let (gate, up) = (
            b.linear(n, gate, None, WeightLayout::OutIn),
            b.linear(n, up, None, WeightLayout::OutIn),
        );
        let h = b.swiglu(gate, up);
        let y = b.linear(h, down, None, WeightLayout::OutIn);
        x = b.add(x, y);
    }
    b.stage("head", "head");
    b.cross_entropy(x, table);
    let gradients = ounce_passes::differentiate(&b.finish()?)?;
    Ok(ounce_passes::attach_optimizer(&gradients, OptimizerKind::AdamW, false)?)
}

fn main() -> Result<(), Box<dyn Error>> {
    let graph = model()?;
    let shape = StepShape::new(4, TEXT.len() as u64);
    let pool = Arc::new(Pool::new(2));
    let machine = MeasuredMachine::new(Arc::clone(&pool), 16 << 20, 0, None);

    let frontier = Frontier::solve(&graph, &shape, &machine, &PlanOptions::default());
    let plan = frontier.plan(frontier.smallest_bytes())?;
    ounce_check::check(&graph, &plan, &machine)?;
    println!("{}", explain(&plan));

    let executor = Executor::new(&graph, &plan, pool)?;
    let mut arena = Arena::reserve(executor.arena_bytes())?;
    let mut buffers = executor.buffers(&mut arena);
    for (p, param) in graph.params.iter() {
        // A little deterministic noise; norms start at one.
        let noise = |i: usize| ((i * 2_654_435_761) % 1000) as f32 / 5000.0 - 0.1;
        let ones = param.init == Init::Ones;
        for (i, w) in buffers.param(p).iter_mut().enumerate() {
            *w = if ones { 1.0 } else { noise(i) };
        }
    }
    let find = |kind| graph.find_value(kind).ok_or("the graph has ids, targets and a loss");
    let ids = find(ValueKind::Input(InputKind::TokenIds))?;
    let targets = find(ValueKind::Input(InputKind::Targets))?;
    let loss = find(ValueKind::Loss)?;
    let stride = shape.row_stride() as usize;
    buffers.session_i32(ids).fill(-1);
    buffers.session_i32(targets).fill(-1);
    let mut rows = Vec::new();
    for r in 0..shape.n_rows as usize {
        let start = r * stride;
        let next = TEXT.iter().cycle().skip(1);
        for (t, (&byte, &next)) in TEXT.iter().zip(next).enumerate() {
            buffers.session_i32(ids)[start + t] = i32::from(byte);
            buffers.session_i32(targets)[start + t] = i32::from(next);
        }
        rows.push(RowSpan { start, len: TEXT.len() });
    }
    let n_tokens = (rows.len() * TEXT.len()) as f32;
    for step in 1..=60 {
        let hyper = OptimizerHyper::default();
        let (grad_scale, lr) = (1.0 / n_tokens, 3e-3);
        let max_grad_norm = f32::INFINITY;
        let inputs = StepInputs {
            step,
            update: step,
            grad_scale,
            lr,
            hyper,
            max_grad_norm,
            ..StepInputs::forward(&rows)
        };
        executor.run(&mut arena, &inputs)?;
        let sum: f32 = executor.buffers(&mut arena).session_f32(loss).iter().sum();
        if step == 1 || step % 20 == 0 {
            println!("step {step}  loss {:.4}", sum / n_tokens);
        }
    }
    Ok(())
}
