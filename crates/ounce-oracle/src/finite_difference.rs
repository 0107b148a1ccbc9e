//! Checks gradients with nothing but losses: central differences along random directions.
//!
//! For a direction `d` in the space of a parameter `p`, the slope
//! `(loss(p + h d) - loss(p - h d)) / 2h` must be the inner product of the gradient with `d`. The
//! truncation error is of order h^2 and the rounding error of order 1e-16 / h, so that h = 1e-5
//! leaves about 1e-10 of each. Cost: two forwards per parameter and one backward.

use ounce_ir::{EntityId, ParamId};

use crate::Interpreter;
use crate::philox;

/// Step along the direction.
const STEP: f64 = 1e-5;

/// A gradient beside differences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradientCheck {
    /// The parameter whose space the direction lies in; `None` for that of all parameters.
    pub param: Option<ParamId>,
    /// Slope of the loss along the direction, by central differences.
    pub slope: f64,
    /// Inner product of the gradient with the direction.
    pub inner_product: f64,
    /// Distance of the two, relative to the largest of them and the gradient's norm (a random
    /// direction may happen to be nearly level), but to no less than 1/1000 of the norm of the whole
    /// gradient (some gradients are zero).
    pub error: f64,
}

/// Compares the gradient of every trained parameter, and of all of them together, with differences
/// along directions that `seed` chooses.
///
/// Parameters and data are as set in `step`, whose graph is differentiated. Parameters are left as
/// they were.
pub fn check_gradients(step: &mut Interpreter<'_>, seed: u64) -> Vec<GradientCheck> {
    step.run_backward();
    let trained = step.graph().params.iter().filter(|(_, p)| p.trainable);
    let all: Vec<Part> =
        trained.map(|(param, _)| Part::new(param, step.gradient(param), seed)).collect();
    let least = 1e-3 * norm(&all);
    let mut checks: Vec<GradientCheck> = all
        .iter()
        .map(|part| GradientCheck {
            param: Some(part.param),
            ..compare(step, std::slice::from_ref(part), least)
        })
        .collect();
    checks.push(compare(step, &all, least));
    checks
}

/// One parameter's gradient and its part of a direction.
struct Part {
    param: ParamId,
    gradient: Vec<f64>,
    direction: Vec<f64>,
}

impl Part {
    fn new(param: ParamId, gradient: &[f64], seed: u64) -> Self {
        let direction = direction(seed, param, gradient.len());
        Self { param, gradient: gradient.to_vec(), direction }
    }
}

fn compare(step: &mut Interpreter<'_>, parts: &[Part], least: f64) -> GradientCheck {
    let slope = (loss_at(step, parts, STEP) - loss_at(step, parts, -STEP)) / (2.0 * STEP);
    let inner_product: f64 = parts.iter().map(|p| dot(&p.gradient, &p.direction)).sum();
    let scale = slope.abs().max(inner_product.abs()).max(norm(parts)).max(least);
    GradientCheck {
        param: None,
        slope,
        inner_product,
        error: (slope - inner_product).abs() / scale,
    }
}

/// The loss at `h` along the direction; the parameters come back bit for bit.
fn loss_at(step: &mut Interpreter<'_>, parts: &[Part], h: f64) -> f64 {
    let before: Vec<Vec<f64>> = parts.iter().map(|p| step.param(p.param).to_vec()).collect();
    for (part, w) in parts.iter().zip(&before) {
        let moved: Vec<f64> = w.iter().zip(&part.direction).map(|(w, d)| w + h * d).collect();
        step.set_param(part.param, &moved);
    }
    step.run_forward();
    for (part, w) in parts.iter().zip(&before) {
        step.set_param(part.param, w);
    }
    step.loss()
}

/// Elements uniform in (-1, 1), so that a product with a gradient is about the gradient's norm.
fn direction(seed: u64, param: ParamId, n_elems: usize) -> Vec<f64> {
    let word = |i| philox::word(seed, 0, param.index() as u32, i, 0);
    (0..n_elems).map(|i| f64::from(word(i)) / 2.0_f64.powi(31) - 1.0).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(parts: &[Part]) -> f64 {
    parts.iter().map(|p| dot(&p.gradient, &p.gradient)).sum::<f64>().sqrt()
}
