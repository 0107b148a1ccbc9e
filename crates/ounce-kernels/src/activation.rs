//! GELU (tanh and erf forms) and SwiGLU, forward and backward, elementwise.
//!
//! Idea: `0.5 (1 + tanh(u)) = sigmoid(2u)` and `0.5 (1 + erf(x / sqrt 2)) = Phi(x)`, which keep
//! full relative precision where `1 + tanh` would cancel. Backward recomputes from the input.
//!
//! Sources: Hendrycks, Gimpel 2016 (arXiv:1606.08415); Shazeer 2020 (arXiv:2002.05202).

use crate::inout::{InOut, for_block_pairs, for_blocks};
use crate::math::{normal, sigmoid_pair};
use crate::pool::Pool;
use crate::view::View;

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
    for_blocks(pool, y, [], |y, x, []| match kind {
        GeluKind::Tanh => gelu_tanh(y, x),
        GeluKind::Erf => gelu_erf(y, x),
    });
}

/// `dx = dy gelu'(x)`; `dx` may overwrite `dy`.
///
/// # Shapes
/// Any; source `dy`, and `x` of the same length.
pub fn gelu_backward(pool: &Pool, dx: InOut<'_>, x: View<'_>, kind: GeluKind) {
    assert_eq!(dx.len(), x.len(), "length of x");
    for_blocks(pool, dx, [x], |dx, dy, [x]| match kind {
        GeluKind::Tanh => gelu_tanh_grad(dx, dy, x),
        GeluKind::Erf => gelu_erf_grad(dx, dy, x),
    });
}

/// `y = silu(gate) up`, `silu(g) = g sigmoid(g)`; `y` may overwrite `gate`.
///
/// # Shapes
/// Any; source `gate`, and `up` of the same length.
pub fn swiglu_forward(pool: &Pool, y: InOut<'_>, up: View<'_>) {
    assert_eq!(y.len(), up.len(), "length of up");
    for_blocks(pool, y, [up], |y, gate, [up]| swiglu(y, gate, up));
}

/// `dgate = dy up silu'(gate)` and `dup = dy silu(gate)`; `dgate` may overwrite `gate`, and `dup`
/// may overwrite `up`.
///
/// # Shapes
/// Any; sources `gate` and `up`, and `dy` of the same length.
pub fn swiglu_backward(pool: &Pool, dgate: InOut<'_>, dup: InOut<'_>, dy: View<'_>) {
    assert_eq!(dgate.len(), dy.len(), "length of dy");
    for_block_pairs(pool, dgate, dup, [dy], |(dgate, gate), (dup, up), [dy]| {
        swiglu_grad(dgate, dup, dy, gate, up);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, noise};
    use crate::tier::{Tier, set_tier};

    /// Longer than an in-place block, not a multiple of anything.
    const N: usize = 2 * 1024 + 37;

    fn inputs() -> (Vec<f32>, Vec<f32>, Vec<f32>) {
        let wide = |seed| noise(N, seed).iter().map(|x| 12.0 * x).collect();
        (wide(1), wide(2), noise(N, 3))
    }

    /// `(f(x), f'(x))` in f64, the derivative by a central difference.
    fn with_slope(f: impl Fn(f64) -> f64, x: f32) -> (f64, f64) {
        let (x, h) = (f64::from(x), 1e-4);
        (f(x), (f(x + h) - f(x - h)) / (2.0 * h))
    }

    fn gelu_tanh_f64(x: f64) -> f64 {
        0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
    }

    /// `x Phi(x)` with Phi by its continued fraction (x <= -2) or its series.
    fn gelu_erf_f64(x: f64) -> f64 {
        let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        if x.abs() < 2.0 {
            let (mut term, mut sum) = (x, x);
            for k in 1..60 {
                term *= x * x / f64::from(2 * k + 1);
                sum += term;
            }
            return x * (0.5 + density * sum);
        }
        let tail = (1..200).rev().fold(0.0, |f, k| f64::from(k) / (x.abs() + f));
        let tail = density / (x.abs() + tail);
        if x < 0.0 { x * tail } else { x * (1.0 - tail) }
    }

    #[test]
    fn gelu_and_its_gradient_agree_with_f64() {
        let (x, _, dy) = inputs();
        let pool = Pool::new(2);
        for kind in [GeluKind::Tanh, GeluKind::Erf] {
            let f = if kind == GeluKind::Tanh { gelu_tanh_f64 } else { gelu_erf_f64 };
            let want: Vec<_> = x.iter().map(|&x| with_slope(f, x)).collect();
            let (mut y, mut dx) = (vec![9.0; N], vec![9.0; N]);
            gelu_forward(&pool, InOut::separate(&mut y, &x), kind);
            gelu_backward(&pool, InOut::separate(&mut dx, &dy), (&x).into(), kind);
            assert_close(&y, &want.iter().map(|w| w.0).collect::<Vec<_>>(), 3e-7);
            let slopes = want.iter().zip(&dy).map(|(w, &dy)| w.1 * f64::from(dy));
            assert_close(&dx, &slopes.collect::<Vec<_>>(), 1e-6);
        }
    }

    #[test]
    fn swiglu_and_its_gradients_agree_with_f64() {
        let (gate, up, dy) = inputs();
        let pool = Pool::new(2);
        let silu = |g: f64| g / (1.0 + (-g).exp());
        let (mut y, mut dgate, mut dup) = (vec![9.0; N], gate.clone(), up.clone());
        swiglu_forward(&pool, InOut::separate(&mut y, &gate), (&up).into());
        swiglu_backward(
            &pool,
            InOut::in_place(&mut dgate),
            InOut::in_place(&mut dup),
            (&dy).into(),
        );
        for i in 0..N {
            let ((value, slope), up, dy) =
                (with_slope(silu, gate[i]), f64::from(up[i]), f64::from(dy[i]));
            assert_close(
                &[y[i], dgate[i], dup[i]],
                &[value * up, dy * up * slope, dy * value],
                2e-6,
            );
        }
    }

    #[test]
    fn in_place_threads_and_tiers_do_not_change_the_bits() {
        let (x, _, dy) = inputs();
        for kind in [GeluKind::Tanh, GeluKind::Erf] {
            let mut want = vec![0.0; N];
            gelu_backward(&Pool::new(1), InOut::separate(&mut want, &dy), (&x).into(), kind);
            for tier in Tier::available() {
                set_tier(Some(tier));
                let mut got = dy.clone();
                gelu_backward(&Pool::new(3), InOut::in_place(&mut got), (&x).into(), kind);
                assert_eq!(got, want, "{tier}");
            }
            set_tier(None);
        }
    }
}
