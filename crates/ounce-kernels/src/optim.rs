//! Optimizer updates and the sums that clipping needs.
//!
//! Updates are elementwise and bound by memory; of a parameter in two halves they read and write both
//! halves in the same pass and compute in f32 what they compute for f32 parameters. Sums are f64 over
//! fixed blocks, blocks in order, so they do not depend on threads.
//! Sources: `[KingmaBa15]`, `[LoshchilovHutter19]`.

use crate::master::{MasterMut, SharedMaster};
use crate::math::fold_lanes;
use crate::pool::{Pool, SharedMut, split, split_by};
use crate::view::{BLOCK, View, blocks};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

/// Elements that one f64 partial sum covers.
pub const SUM_BLOCK: usize = 4096;

/// One step's constants of [`adamw`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamwHyper {
    /// Learning rate.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the denominator.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// `1 - beta1^t`, t counted from 1.
    pub bias_correction1: f32,
    /// `1 - beta2^t`.
    pub bias_correction2: f32,
    /// Multiplies the gradient first (clipping, averaging).
    pub grad_scale: f32,
}

impl Default for AdamwHyper {
    /// The first step with the defaults of `torch.optim.AdamW`.
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 1e-2,
            bias_correction1: 1.0 - 0.9,
            bias_correction2: 1.0 - 0.999,
            grad_scale: 1.0,
        }
    }
}

/// One step of AdamW with the semantics of `torch.optim.AdamW`: decay, moments, then
/// `w -= lr / bc1 * m / (sqrt(v) / sqrt(bc2) + eps)`.
///
/// # Shapes
/// `w`, `g`, `m`, `v` have one length.
pub fn adamw(
    pool: &Pool,
    w: MasterMut<'_>,
    g: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    hyper: &AdamwHyper,
) {
    let n = w.len();
    assert!(g.len() == n && m.len() == n && v.len() == n, "w, g, m and v have one length");
    let (m, v) = (SharedMut::new(m), SharedMut::new(v));
    update_blocks(pool, w, |range, w| {
        // SAFETY: blocks are disjoint.
        let (m, v) = unsafe { (m.range(range.clone()), v.range(range.clone())) };
        adamw_block(w, &g[range], m, v, hyper);
    });
}

/// Calls `f(range, w)` with the exact values of every block of a parameter, in parallel.
fn update_blocks(pool: &Pool, w: MasterMut<'_>, f: impl Fn(Range<usize>, &mut [f32]) + Sync) {
    let n = w.len();
    let shared = SharedMaster::new(w);
    pool.run_sized(n, &|thread_idx| {
        let mut buf = [0.0; BLOCK];
        for range in blocks(split_by(n, SUM_BLOCK, pool.n_threads(), thread_idx)) {
            // SAFETY: blocks of a part are disjoint, and so are the parts of the threads.
            unsafe { shared.update(range.clone(), &mut buf, |w| f(range, w)) };
        }
    });
}

tiered! {
    fn adamw_block(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], h: &AdamwHyper) {
        let decay = 1.0 - h.lr * h.weight_decay;
        let step = h.lr / h.bias_correction1;
        let root_bc2 = h.bias_correction2.sqrt();
        let (rest1, rest2) = (1.0 - h.beta1, 1.0 - h.beta2);
        for (((w, &g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * h.grad_scale;
            *m = (g - *m).mul_add(rest1, *m);
            *v = (g * g).mul_add(rest2, *v * h.beta2);
            let denominator = v.sqrt() / root_bc2 + h.eps;
            *w = (-step).mul_add(*m / denominator, *w * decay);
        }
    }
}

/// One step of plain gradient descent as `torch.optim.SGD`: `w -= lr (grad_scale g + decay w)`.
///
/// # Shapes
/// `w` and `g` have one length.
pub fn sgd(pool: &Pool, w: MasterMut<'_>, g: &[f32], lr: f32, weight_decay: f32, grad_scale: f32) {
    assert_eq!(w.len(), g.len(), "length of g");
    update_blocks(pool, w, |range, w| sgd_block(w, &g[range], lr, weight_decay, grad_scale));
}

tiered! {
    fn sgd_block(w: &mut [f32], g: &[f32], lr: f32, weight_decay: f32, grad_scale: f32) {
        for (w, &g) in w.iter_mut().zip(g) {
            *w = (-lr).mul_add(w.mul_add(weight_decay, g * grad_scale), *w);
        }
    }
}

/// Scratch of [`sum_squares`] in f64 elements.
pub fn sum_squares_scratch_f64(n_elems: usize) -> usize {
    n_elems.div_ceil(SUM_BLOCK)
}

/// The sum of the squares of `g` in f64.
///
/// # Memory
/// [`sum_squares_scratch_f64`]`(g.len())` elements.
/// # Order
/// Blocks of [`SUM_BLOCK`] elements, each over 8 fixed lanes; blocks are added in order.
pub fn sum_squares(pool: &Pool, g: &[f32], scratch: &mut [f64]) -> f64 {
    let n_blocks = sum_squares_scratch_f64(g.len());
    let blocks = &mut scratch[..n_blocks];
    pool.split_rows_sized(g.len(), blocks, 1, 1, |range, sums| {
        for (block, sum) in range.zip(sums) {
            *sum = block_sum_squares(&g[block * SUM_BLOCK..g.len().min((block + 1) * SUM_BLOCK)]);
        }
    });
    blocks.iter().sum()
}

tiered! {
    fn block_sum_squares(g: &[f32]) -> f64 {
        let mut sums = [0.0f64; 8];
        let whole = g.chunks_exact(8);
        let rest = whole.remainder();
        for g in whole {
            for (sum, &g) in sums.iter_mut().zip(g) {
                *sum = f64::from(g).mul_add(f64::from(g), *sum);
            }
        }
        for (sum, &g) in sums.iter_mut().zip(rest) {
            *sum = f64::from(g).mul_add(f64::from(g), *sum);
        }
        fold_lanes(sums, |a, b| a + b)
    }
}

/// Whether any element is infinite or NaN.
pub fn any_nonfinite(pool: &Pool, x: View<'_>) -> bool {
    let found = AtomicBool::new(false);
    pool.run(&|thread_idx| {
        let mut buf = [0.0; BLOCK];
        for range in blocks(split(x.len(), pool.n_threads(), thread_idx)) {
            if has_nonfinite(x.load(range, &mut buf)) {
                found.store(true, Ordering::Relaxed);
            }
        }
    });
    found.into_inner()
}

tiered! {
    fn has_nonfinite(x: &[f32]) -> bool {
        // An exponent of all ones; or-ing flags vectorises where an early exit would not.
        x.iter().fold(false, |found, x| found | (x.to_bits() & 0x7F80_0000 == 0x7F80_0000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::master::split_master;
    use crate::testing::{assert_close, noise};
    use crate::tier::{Tier, set_tier};
    use half::bf16;

    const N: usize = 3 * SUM_BLOCK + 77;

    /// Ten steps against the algorithm of `torch.optim.AdamW` in f64.
    #[test]
    fn adamw_follows_the_algorithm_of_torch() {
        let (lr, beta1, beta2, eps, decay) = (1e-2, 0.9, 0.95, 1e-8, 0.1);
        let mut w = noise(100, 1);
        let mut want: Vec<[f64; 3]> = w.iter().map(|&w| [f64::from(w), 0.0, 0.0]).collect();
        let (mut m, mut v) = (vec![0.0; 100], vec![0.0; 100]);
        for step in 1..=10 {
            let g = noise(100, 100 + step as u32);
            let (bc1, bc2) = (1.0 - f64::powi(beta1, step), 1.0 - f64::powi(beta2, step));
            let hyper = AdamwHyper {
                lr: lr as f32,
                beta1: beta1 as f32,
                beta2: beta2 as f32,
                eps: eps as f32,
                weight_decay: decay as f32,
                bias_correction1: bc1 as f32,
                bias_correction2: bc2 as f32,
                grad_scale: 0.5,
            };
            adamw(&Pool::new(2), MasterMut::F32(&mut w), &g, &mut m, &mut v, &hyper);
            for ([w, m, v], g) in want.iter_mut().zip(&g) {
                let g = 0.5 * f64::from(*g);
                *w *= 1.0 - lr * decay;
                *m += (g - *m) * (1.0 - beta1);
                *v = *v * beta2 + (1.0 - beta2) * g * g;
                *w -= lr / bc1 * *m / (v.sqrt() / bc2.sqrt() + eps);
            }
        }
        assert_close(&w, &want.iter().map(|w| w[0]).collect::<Vec<_>>(), 1e-6);
        assert_close(&v, &want.iter().map(|w| w[2]).collect::<Vec<_>>(), 1e-6);
    }

    #[test]
    fn sgd_adds_the_decay_to_the_gradient() {
        let (mut w, g) = (noise(N, 1), noise(N, 2));
        let want: Vec<f64> = w
            .iter()
            .zip(&g)
            .map(|(&w, &g)| f64::from(w) - 0.1 * (0.5 * f64::from(g) + 0.01 * f64::from(w)))
            .collect();
        sgd(&Pool::new(2), MasterMut::F32(&mut w), &g, 0.1, 0.01, 0.5);
        assert_close(&w, &want, 2e-7);
    }

    /// The halves of `w`.
    fn split(w: &[f32]) -> (Vec<bf16>, Vec<i16>) {
        w.iter().map(|&w| split_master(w)).unzip()
    }

    #[test]
    fn updates_of_split_parameters_are_those_of_f32_to_the_bit_on_every_tier() {
        let (start, g) = (noise(N, 1), noise(N, 2));
        let hyper = AdamwHyper { lr: 1e-2, grad_scale: 0.5, ..AdamwHyper::default() };
        for tier in Tier::available() {
            set_tier(Some(tier));
            let (mut w, (mut hi, mut lo)) = (start.clone(), split(&start));
            let [mut m, mut v, mut m_split, mut v_split] = [(); 4].map(|()| vec![0.0; N]);
            for n_threads in [2, 3] {
                let pool = Pool::new(n_threads);
                adamw(&pool, MasterMut::F32(&mut w), &g, &mut m, &mut v, &hyper);
                let master = MasterMut::Split { hi: &mut hi, lo: &mut lo };
                adamw(&pool, master, &g, &mut m_split, &mut v_split, &hyper);
                sgd(&pool, MasterMut::F32(&mut w), &g, 0.1, 0.01, 0.5);
                let master = MasterMut::Split { hi: &mut hi, lo: &mut lo };
                sgd(&pool, master, &g, 0.1, 0.01, 0.5);
            }
            assert_eq!((&hi, &lo), (&split(&w).0, &split(&w).1), "{tier}");
            assert_eq!((&m, &v), (&m_split, &v_split), "{tier}");
        }
        set_tier(None);
    }

    #[test]
    fn sums_of_squares_are_exact_enough_and_the_same_for_any_threads() {
        let g = noise(N, 1);
        let want: f64 = g.iter().map(|&g| f64::from(g).powi(2)).sum();
        let mut scratch = vec![f64::NAN; sum_squares_scratch_f64(N)];
        let first = sum_squares(&Pool::new(1), &g, &mut scratch);
        assert!((first - want).abs() < 1e-12 * want);
        for n_threads in [2, 3] {
            assert_eq!(sum_squares(&Pool::new(n_threads), &g, &mut scratch), first);
        }
        assert_eq!(sum_squares(&Pool::new(2), &[], &mut []), 0.0);
    }

    #[test]
    fn one_bad_element_anywhere_is_found() {
        let pool = Pool::new(2);
        let mut x = noise(N, 1);
        assert!(!any_nonfinite(&pool, (&x).into()));
        for (i, bad) in [(0, f32::NAN), (N / 2, f32::INFINITY), (N - 1, f32::NEG_INFINITY)] {
            let good = std::mem::replace(&mut x[i], bad);
            assert!(any_nonfinite(&pool, (&x).into()));
            x[i] = good;
        }
    }
}
