//! GELU (tanh and erf forms) and SwiGLU, forward and backward, elementwise.
//!
//! Idea: `0.5 (1 + tanh(u)) = sigmoid(2u)` and `0.5 (1 + erf(x / sqrt 2)) = Phi(x)`, which keep
//! full relative precision where `1 + tanh` would cancel. Backward recomputes from the input.
//!
//! Sources: Hendrycks, Gimpel 2016 (arXiv:1606.08415); Shazeer 2020 (arXiv:2002.05202).

use crate::inout::{InOut, for_block_pairs, for_blocks};
use crate::math::{normal, sigmoid_pair};
use crate::pool::Pool;

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GeluKind {
    /// `x sigmoid(2 u)`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`: GPT-2's `gelu_new`.
    Tanh,
    /// `x Phi(x)`: the exact one, `gelu`.
    Erf,
}

/// `2 sqrt(2 / pi)`.
const TANH_SCALE: f32 = 1.595_769;
const TANH_CUBE: f32 = 0.044_715;

/// `y = gelu(x)`; `y` may overwrite `x`.
///
/// # Shapes
/// Any; source `x`.
pub fn gelu_forward(pool: &Pool, y: InOut<'_>, kind: GeluKind) {
    for_blocks(pool, y, |_, y, x| match kind {
        GeluKind::Tanh => gelu_tanh(y, x),
        GeluKind::Erf => gelu_erf(y, x),
    });
}

/// `dx = dy gelu'(x)`; `dx` may overwrite `dy`.
///
/// # Shapes
/// Any; source `dy`, and `x` of the same length.
pub fn gelu_backward(pool: &Pool, dx: InOut<'_>, x: &[f32], kind: GeluKind) {
    assert_eq!(dx.len(), x.len(), "length of x");
    for_blocks(pool, dx, |range, dx, dy| match kind {
        GeluKind::Tanh => gelu_tanh_grad(dx, dy, &x[range]),
        GeluKind::Erf => gelu_erf_grad(dx, dy, &x[range]),
    });
}

/// `y = silu(gate) up`, `silu(g) = g sigmoid(g)`; `y` may overwrite `gate`.
///
/// # Shapes
/// Any; source `gate`, and `up` of the same length.
pub fn swiglu_forward(pool: &Pool, y: InOut<'_>, up: &[f32]) {
    assert_eq!(y.len(), up.len(), "length of up");
    for_blocks(pool, y, |range, y, gate| swiglu(y, gate, &up[range]));
}

/// `dgate = dy up silu'(gate)` and `dup = dy silu(gate)`; `dgate` may overwrite `gate`, and `dup`
/// may overwrite `up`.
///
/// # Shapes
/// Any; sources `gate` and `up`, and `dy` of the same length.
pub fn swiglu_backward(pool: &Pool, dgate: InOut<'_>, dup: InOut<'_>, dy: &[f32]) {
    assert_eq!(dgate.len(), dy.len(), "length of dy");
    for_block_pairs(pool, dgate, dup, |range, (dgate, gate), (dup, up)| {
        swiglu_grad(dgate, dup, &dy[range], gate, up);
    });
}

/// `2 u` of the tanh form.
#[inline(always)]
fn tanh_argument(x: f32) -> f32 {
    TANH_SCALE * (x * x * x).mul_add(TANH_CUBE, x)
}

tiered! {
    fn gelu_tanh(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * sigmoid_pair(tanh_argument(x)).0;
        }
    }
}

tiered! {
    fn gelu_erf(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * normal(x).0;
        }
    }
}

tiered! {
    /// `(x s(v))' = s + x s (1 - s) v'` with `v = 2u`.
    fn gelu_tanh_grad(dx: &mut [f32], dy: &[f32], x: &[f32]) {
        for ((dx, &dy), &x) in dx.iter_mut().zip(dy).zip(x) {
            let (s, rest) = sigmoid_pair(tanh_argument(x));
            let slope = TANH_SCALE * (x * x).mul_add(3.0 * TANH_CUBE, 1.0);
            *dx = dy * (x * s * rest).mul_add(slope, s);
        }
    }
}

tiered! {
    /// `(x Phi(x))' = Phi(x) + x phi(x)`.
    fn gelu_erf_grad(dx: &mut [f32], dy: &[f32], x: &[f32]) {
        for ((dx, &dy), &x) in dx.iter_mut().zip(dy).zip(x) {
            let (below, density) = normal(x);
            *dx = dy * x.mul_add(density, below);
        }
    }
}

tiered! {
    fn swiglu(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
            *y = gate * sigmoid_pair(gate).0 * up;
        }
    }
}

tiered! {
    /// `silu'(g) = s + g s (1 - s)`.
    fn swiglu_grad(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
        let sources = dy.iter().zip(gate).zip(up);
        for ((dgate, dup), ((&dy, &gate), &up)) in dgate.iter_mut().zip(dup).zip(sources) {
            let (s, rest) = sigmoid_pair(gate);
            *dgate = dy * up * (gate * s).mul_add(rest, s);
            *dup = dy * (gate * s);
        }
    }
}
