//! GELU (tanh and erf forms), gated linear units (SwiGLU, GeGLU) and the soft cap, forward and
//! backward, elementwise.
//!
//! Idea: `0.5 (1 + tanh(u)) = sigmoid(2u)` and `0.5 (1 + erf(x / sqrt 2)) = Phi(x)`, which keep
//! full relative precision where `1 + tanh` would cancel. Backward recomputes from the input.
//!
//! Sources: `[HendrycksGimpel16]` (GELU), `[Shazeer20]` (gated units).

use crate::inout::{InOut, for_block_pairs, for_blocks, load_all};
use crate::math::{normal, sigmoid_pair, tanh};
use crate::pool::Pool;
use crate::view::{BLOCK, View, ViewMut, blocks};

/// Which GELU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GeluKind {
    /// `x sigmoid(2 u)`, `u = sqrt(2 / pi) (x + 0.044715 x^3)`: GPT-2's `gelu_new`.
    Tanh,
    /// `x Phi(x)`: the exact one, `gelu`.
    Erf,
}

/// What the gate of a gated linear unit goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// `g sigmoid(g)`: SwiGLU.
    Silu,
    /// GELU: GeGLU.
    Gelu(GeluKind),
}

/// Rows of packed gates and ups that a thread takes at least.
const ROW_GRANULE: usize = 4;

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

/// `y = act(gate) up`; `y` may overwrite `gate`.
///
/// # Shapes
/// Any; source `gate`, and `up` of the same length.
pub fn glu_forward(pool: &Pool, y: InOut<'_>, up: View<'_>, gate: Gate) {
    assert_eq!(y.len(), up.len(), "length of up");
    for_blocks(pool, y, [up], |y, x, [up]| glu(y, x, up, gate));
}

/// `dgate = dy up act'(gate)` and `dup = dy act(gate)`; `dgate` may overwrite `gate`, and `dup`
/// may overwrite `up`.
///
/// # Shapes
/// Any; sources `gate` and `up`, and `dy` of the same length.
pub fn glu_backward(pool: &Pool, dgate: InOut<'_>, dup: InOut<'_>, dy: View<'_>, gate: Gate) {
    assert_eq!(dgate.len(), dy.len(), "length of dy");
    for_block_pairs(pool, dgate, dup, [dy], |(dgate, x), (dup, up), [dy]| {
        glu_grad(dgate, dup, dy, x, up, gate);
    });
}

/// [`glu_forward`] of gates and ups side by side in one matrix.
///
/// # Shapes
/// `y` (N, F); `x` (N, 2 F), gates first; `width` is F.
pub fn glu_packed_forward(pool: &Pool, y: ViewMut<'_>, x: View<'_>, width: usize, gate: Gate) {
    assert_eq!(x.len(), 2 * y.len(), "length of x");
    pool.split_view_rows(x.len(), y, width, ROW_GRANULE, |rows, mut y| {
        let (mut bufs, mut buf_y) = ([[0.0; BLOCK]; 2], [0.0; BLOCK]);
        for (i, row) in rows.enumerate() {
            let [gates, ups] = halves(x, row, width);
            for cols in blocks(0..width) {
                let [g, up] = load_all([gates, ups], cols.clone(), &mut bufs);
                let y = y.begin(i * width + cols.start..i * width + cols.end, &mut buf_y);
                glu(y.out, g, up, gate);
                y.end();
            }
        }
    });
}

/// [`glu_backward`] of gates and ups side by side in one matrix.
///
/// # Shapes
/// `dx`, `x` (N, 2 F), gates first; `dy` (N, F); `width` is F.
pub fn glu_packed_backward(
    pool: &Pool,
    dx: ViewMut<'_>,
    dy: View<'_>,
    x: View<'_>,
    width: usize,
    gate: Gate,
) {
    assert!(x.len() == dx.len() && x.len() == 2 * dy.len(), "lengths of dx and dy");
    pool.split_view_rows(x.len(), dx, 2 * width, ROW_GRANULE, |rows, mut dx| {
        let (mut bufs, [mut buf_g, mut buf_u]) = ([[0.0; BLOCK]; 3], [[0.0; BLOCK]; 2]);
        for (i, row) in rows.enumerate() {
            let [gates, ups] = halves(x, row, width);
            let dy = dy.slice(row * width..(row + 1) * width);
            let start = i * 2 * width;
            let (mut dgate, mut dup) =
                dx.reborrow().slice(start..start + 2 * width).split_at(width);
            for cols in blocks(0..width) {
                let [dy, g, up] = load_all([dy, gates, ups], cols.clone(), &mut bufs);
                let dgate = dgate.begin(cols.clone(), &mut buf_g);
                let dup = dup.begin(cols, &mut buf_u);
                glu_grad(dgate.out, dup.out, dy, g, up, gate);
                dgate.end();
                dup.end();
            }
        }
    });
}

/// Gates and ups of one row.
fn halves(x: View<'_>, row: usize, width: usize) -> [View<'_>; 2] {
    [2 * row, 2 * row + 1].map(|half| x.slice(half * width..(half + 1) * width))
}

/// `y = cap tanh(x / cap)`; `y` may overwrite `x`.
///
/// # Shapes
/// Any; source `x`.
pub fn soft_cap_forward(pool: &Pool, y: InOut<'_>, cap: f32) {
    for_blocks(pool, y, [], |y, x, []| soft_cap(y, x, cap));
}

/// `dx = dy (1 - tanh(x / cap)^2)`; `dx` may overwrite `dy`.
///
/// # Shapes
/// Any; source `dy`, and `x` of the same length.
pub fn soft_cap_backward(pool: &Pool, dx: InOut<'_>, x: View<'_>, cap: f32) {
    assert_eq!(dx.len(), x.len(), "length of x");
    for_blocks(pool, dx, [x], |dx, dy, [x]| soft_cap_grad(dx, dy, x, cap));
}

fn glu(y: &mut [f32], gate: &[f32], up: &[f32], kind: Gate) {
    match kind {
        Gate::Silu => glu_silu(y, gate, up),
        Gate::Gelu(GeluKind::Tanh) => glu_tanh(y, gate, up),
        Gate::Gelu(GeluKind::Erf) => glu_erf(y, gate, up),
    }
}

fn glu_grad(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32], kind: Gate) {
    match kind {
        Gate::Silu => glu_silu_grad(dgate, dup, dy, gate, up),
        Gate::Gelu(GeluKind::Tanh) => glu_tanh_grad(dgate, dup, dy, gate, up),
        Gate::Gelu(GeluKind::Erf) => glu_erf_grad(dgate, dup, dy, gate, up),
    }
}

/// A gate's value and slope: `silu'(g) = s + g s (1 - s)`.
#[inline(always)]
fn silu_with_slope(x: f32) -> (f32, f32) {
    let (s, rest) = sigmoid_pair(x);
    (x * s, (x * s).mul_add(rest, s))
}

/// `(x s(v))' = s + x s (1 - s) v'` with `v = 2u`.
#[inline(always)]
fn tanh_with_slope(x: f32) -> (f32, f32) {
    let (s, rest) = sigmoid_pair(tanh_argument(x));
    let slope = TANH_SCALE * (x * x).mul_add(3.0 * TANH_CUBE, 1.0);
    (x * s, (x * s * rest).mul_add(slope, s))
}

/// `(x Phi(x))' = Phi(x) + x phi(x)`.
#[inline(always)]
fn erf_with_slope(x: f32) -> (f32, f32) {
    let (below, density) = normal(x);
    (x * below, x.mul_add(density, below))
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
    fn gelu_tanh_grad(dx: &mut [f32], dy: &[f32], x: &[f32]) {
        for ((dx, &dy), &x) in dx.iter_mut().zip(dy).zip(x) {
            *dx = dy * tanh_with_slope(x).1;
        }
    }
}

tiered! {
    fn gelu_erf_grad(dx: &mut [f32], dy: &[f32], x: &[f32]) {
        for ((dx, &dy), &x) in dx.iter_mut().zip(dy).zip(x) {
            *dx = dy * erf_with_slope(x).1;
        }
    }
}

tiered! {
    fn glu_silu(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
            *y = silu_with_slope(gate).0 * up;
        }
    }
}

tiered! {
    fn glu_silu_grad(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
        glu_grads(dgate, dup, dy, gate, up, silu_with_slope);
    }
}

tiered! {
    fn glu_tanh(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
            *y = tanh_with_slope(gate).0 * up;
        }
    }
}

tiered! {
    fn glu_tanh_grad(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
        glu_grads(dgate, dup, dy, gate, up, tanh_with_slope);
    }
}

tiered! {
    fn glu_erf(y: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((y, &gate), &up) in y.iter_mut().zip(gate).zip(up) {
            *y = erf_with_slope(gate).0 * up;
        }
    }
}

tiered! {
    fn glu_erf_grad(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
        glu_grads(dgate, dup, dy, gate, up, erf_with_slope);
    }
}

/// `dgate = dy up act'(gate)` and `dup = dy act(gate)`, `act` giving value and slope.
#[inline(always)]
fn glu_grads(
    dgate: &mut [f32],
    dup: &mut [f32],
    dy: &[f32],
    gate: &[f32],
    up: &[f32],
    act: impl Fn(f32) -> (f32, f32),
) {
    let sources = dy.iter().zip(gate).zip(up);
    for ((dgate, dup), ((&dy, &gate), &up)) in dgate.iter_mut().zip(dup).zip(sources) {
        let (value, slope) = act(gate);
        *dgate = dy * up * slope;
        *dup = dy * value;
    }
}

tiered! {
    fn soft_cap(y: &mut [f32], x: &[f32], cap: f32) {
        let inverse = 1.0 / cap;
        for (y, &x) in y.iter_mut().zip(x) {
            *y = cap * tanh(x * inverse);
        }
    }
}

tiered! {
    fn soft_cap_grad(dx: &mut [f32], dy: &[f32], x: &[f32], cap: f32) {
        let inverse = 1.0 / cap;
        for ((dx, &dy), &x) in dx.iter_mut().zip(dy).zip(x) {
            let t = tanh(x * inverse);
            *dx = dy * (-t).mul_add(t, 1.0);
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

    const GATES: [Gate; 3] = [Gate::Silu, Gate::Gelu(GeluKind::Tanh), Gate::Gelu(GeluKind::Erf)];

    fn gate_f64(gate: Gate) -> fn(f64) -> f64 {
        match gate {
            Gate::Silu => |g| g / (1.0 + (-g).exp()),
            Gate::Gelu(GeluKind::Tanh) => gelu_tanh_f64,
            Gate::Gelu(GeluKind::Erf) => gelu_erf_f64,
        }
    }

    #[test]
    fn gated_units_and_their_gradients_agree_with_f64() {
        let (gate, up, dy) = inputs();
        let pool = Pool::new(2);
        for kind in GATES {
            let (mut y, mut dgate, mut dup) = (vec![9.0; N], gate.clone(), up.clone());
            glu_forward(&pool, InOut::separate(&mut y, &gate), (&up).into(), kind);
            let (g, u) = (InOut::in_place(&mut dgate), InOut::in_place(&mut dup));
            glu_backward(&pool, g, u, (&dy).into(), kind);
            for i in 0..N {
                let (value, slope) = with_slope(gate_f64(kind), gate[i]);
                let (up, dy) = (f64::from(up[i]), f64::from(dy[i]));
                assert_close(
                    &[y[i], dgate[i], dup[i]],
                    &[value * up, dy * up * slope, dy * value],
                    2e-6,
                );
            }
        }
    }

    #[test]
    fn packed_gates_and_ups_give_the_bits_of_separate_ones() {
        const F: usize = 37;
        let (x, dy) = (noise(6 * 2 * F, 1), noise(6 * F, 2));
        let half = |side: usize| -> Vec<f32> {
            x.chunks(2 * F).flat_map(|x| x[side * F..(side + 1) * F].to_vec()).collect()
        };
        let (gate, up) = (half(0), half(1));
        for kind in GATES {
            let (mut want, mut dgate, mut dup) = (vec![9.0; 6 * F], gate.clone(), up.clone());
            let pool = Pool::new(2);
            glu_forward(&pool, InOut::separate(&mut want, &gate), (&up).into(), kind);
            let (g, u) = (InOut::in_place(&mut dgate), InOut::in_place(&mut dup));
            glu_backward(&pool, g, u, (&dy).into(), kind);
            let (mut y, mut dx) = (vec![9.0; 6 * F], vec![9.0; 6 * 2 * F]);
            glu_packed_forward(&pool, (&mut y).into(), (&x).into(), F, kind);
            let [dy, x] = [&dy, &x].map(View::from);
            glu_packed_backward(&pool, (&mut dx).into(), dy, x, F, kind);
            assert_eq!(y, want);
            for (dx, (dgate, dup)) in dx.chunks(2 * F).zip(dgate.chunks(F).zip(dup.chunks(F))) {
                assert_eq!((&dx[..F], &dx[F..]), (dgate, dup));
            }
        }
    }

    #[test]
    fn the_soft_cap_and_its_gradient_agree_with_f64() {
        let (x, _, dy) = inputs();
        let pool = Pool::new(2);
        for cap in [0.5, 3.0, 50.0] {
            let (mut y, mut dx) = (vec![9.0; N], dy.clone());
            soft_cap_forward(&pool, InOut::separate(&mut y, &x), cap);
            soft_cap_backward(&pool, InOut::in_place(&mut dx), (&x).into(), cap);
            let t = |i: usize| (f64::from(x[i]) / f64::from(cap)).tanh();
            let want: Vec<f64> = (0..N).map(|i| f64::from(cap) * t(i)).collect();
            assert_close(&y, &want, 4e-7);
            let want: Vec<f64> = (0..N).map(|i| f64::from(dy[i]) * (1.0 - t(i).powi(2))).collect();
            assert_close(&dx, &want, 1e-6);
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
