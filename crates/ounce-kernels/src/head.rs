//! The head: linear and cross entropy in one, without ever holding all logits.
//!
//! Idea: a chunk of tokens at a time, its logits (chunk x V) live in scratch only. Training turns
//! them into their own gradient in place and multiplies twice more, so that loss, `dx` and `dw`
//! come from one pass and nothing is saved for a backward. N tokens, C channels, V words.
//!
//! A soft cap turns a logit `l` into `cap tanh(l / cap)` before anything else.
//!
//! Logits, softmax and losses are f32 whatever the operands are stored as. So is the gradient of the
//! logits, with one exception: for bf16 tokens it is rounded to bf16 (in place, to the front of its
//! row), so that the products for `dx` and `dw` multiply bf16 with bf16, and on every tier alike.
//!
//! Invariants: a row's (max, sum of exponentials) is combined over fixed vocabulary tiles in
//! ascending order; `dw` is one chain over ascending tokens that starts from what is stored. So
//! neither `chunk_tokens` nor the threads change any bit.
//!
//! Complexity: 2NVC FLOP forward, 6NVC in training. Sources: `[Hsu24]` (Liger Kernel: chunks, the
//! gradient in place), `[Wijmans24]` (Cut Cross-Entropy: never all logits), `[Milakov18]` (max and sum in one pass).

use crate::convert::f32_to_bf16;
use crate::gemm::{MatMut, MatRef, Start, gemm, gemm_scratch_elems};
use crate::math::{fold_lanes, lane_sum, softmax_term, tanh};
use crate::pool::{Pool, SharedMut, split_by};
use crate::view::{BLOCK, FloatType, View, ViewMut, blocks};
use half::bf16;

/// Columns of logits over which one (max, sum) is taken.
const VOCAB_TILE: usize = 1024;

/// Scratch of [`head_forward`] and [`head_train`] in elements: a chunk's logits and the products'.
/// `dx` is how the gradient of the tokens is stored.
pub fn head_scratch_elems(
    chunk_tokens: usize,
    n_vocab: usize,
    n_channels: usize,
    dx: FloatType,
    n_threads: usize,
) -> usize {
    let product = |m, n, k, c| gemm_scratch_elems(m, n, k, c, n_threads);
    let products = product(chunk_tokens, n_vocab, n_channels, FloatType::F32)
        .max(product(chunk_tokens, n_channels, n_vocab, dx))
        .max(product(n_vocab, n_channels, chunk_tokens, FloatType::F32));
    chunk_tokens * n_vocab + products
}

/// Per-token loss `log(sum(exp(logits))) - logits[target]`, 0 where the target is negative.
///
/// # Shapes
/// `loss_n`, `targets` (N); `x` (N, C); `w` (V, C). C and V follow from the lengths.
/// # Memory
/// [`head_scratch_elems`] elements.
/// # Panics
/// If a target is V or more.
pub fn head_forward(
    pool: &Pool,
    loss_n: &mut [f32],
    x: View<'_>,
    w: View<'_>,
    targets: &[i32],
    soft_cap: Option<f32>,
    chunk_tokens: usize,
    scratch: &mut [f32],
) {
    if targets.is_empty() {
        return;
    }
    let head = Head::new(loss_n.len(), x, w, targets, chunk_tokens);
    for chunk in (0..targets.len()).step_by(chunk_tokens) {
        let n = chunk_tokens.min(targets.len() - chunk);
        let (logits, scratch) = scratch.split_at_mut(n * head.n_vocab);
        head.logits(pool, logits, chunk, scratch);
        let (loss_n, targets) = (&mut loss_n[chunk..chunk + n], &targets[chunk..chunk + n]);
        losses(pool, loss_n, logits, targets, head.n_vocab, soft_cap, None);
    }
}

/// Loss and gradients in one pass: overwrites `loss_n` and `dx`, adds to `dw`.
///
/// The gradient is that of `grad_scale * sum(loss_n)`.
///
/// # Shapes
/// `loss_n`, `targets` (N); `dx`, `x` (N, C); `dw`, `w` (V, C).
/// # Memory
/// [`head_scratch_elems`] elements.
/// # Panics
/// If a target is V or more.
pub fn head_train(
    pool: &Pool,
    loss_n: &mut [f32],
    mut dx: ViewMut<'_>,
    mut dw: Option<&mut [f32]>,
    x: View<'_>,
    w: View<'_>,
    targets: &[i32],
    soft_cap: Option<f32>,
    grad_scale: f32,
    chunk_tokens: usize,
    scratch: &mut [f32],
) {
    if targets.is_empty() {
        return;
    }
    let head = Head::new(loss_n.len(), x, w, targets, chunk_tokens);
    let (c, v) = (head.n_channels, head.n_vocab);
    assert_eq!(dx.len(), x.len(), "length of dx");
    assert!(dw.as_ref().is_none_or(|dw| dw.len() == w.len()), "length of dw");
    for chunk in (0..targets.len()).step_by(chunk_tokens) {
        let n = chunk_tokens.min(targets.len() - chunk);
        let (logits, scratch) = scratch.split_at_mut(n * v);
        head.logits(pool, logits, chunk, scratch);
        let (loss_n, targets) = (&mut loss_n[chunk..chunk + n], &targets[chunk..chunk + n]);
        let gradient = Gradient { scale: grad_scale, stored: head.gradient_type() };
        losses(pool, loss_n, logits, targets, v, soft_cap, Some(gradient));
        let dlogits = gradient.matrix(logits, n, v);
        let tokens = chunk * c..(chunk + n) * c;
        let dx = MatMut::new(dx.reborrow().slice(tokens.clone()), n, c);
        gemm(pool, dx, dlogits, MatRef::new(w, v, c), Start::Zero, None, scratch);
        if let Some(dw) = dw.as_deref_mut() {
            let x = MatRef::new(x.slice(tokens), n, c);
            gemm(pool, MatMut::new(dw, v, c), dlogits.t(), x, Start::FromC, None, scratch);
        }
    }
}

/// The operands of a call and the sizes that follow from them.
struct Head<'a> {
    x: View<'a>,
    w: View<'a>,
    n_channels: usize,
    n_vocab: usize,
}

/// The gradient of the logits that [`losses`] leaves in their place.
#[derive(Clone, Copy)]
struct Gradient {
    /// Of the loss.
    scale: f32,
    /// f32, or bf16 at the front of rows of twice as many.
    stored: FloatType,
}

impl Gradient {
    /// The gradient of `n` tokens and `n_vocab` words.
    fn matrix(self, logits: &[f32], n: usize, n_vocab: usize) -> MatRef<'_> {
        if self.stored == FloatType::F32 {
            return MatRef::new(logits, n, n_vocab);
        }
        // SAFETY: every f32 is two bf16, of which every bit pattern is valid.
        let pairs =
            unsafe { std::slice::from_raw_parts(logits.as_ptr().cast::<bf16>(), 2 * logits.len()) };
        MatRef::with_stride(View::Bf16(pairs), n, n_vocab, 2 * n_vocab)
    }
}

impl<'a> Head<'a> {
    fn new(
        n_losses: usize,
        x: View<'a>,
        w: View<'a>,
        targets: &[i32],
        chunk_tokens: usize,
    ) -> Self {
        assert_eq!(n_losses, targets.len(), "length of loss_n");
        assert!(chunk_tokens > 0, "a chunk holds at least one token");
        let n_channels = x.len() / targets.len();
        assert_eq!(x.len(), targets.len() * n_channels, "x is whole tokens");
        assert!(n_channels > 0, "tokens have channels");
        let n_vocab = w.len() / n_channels;
        assert_eq!(w.len(), n_vocab * n_channels, "w is whole rows");
        Self { x, w, n_channels, n_vocab }
    }

    fn gradient_type(&self) -> FloatType {
        match self.x {
            View::Bf16(_) => FloatType::Bf16,
            View::F32(_) | View::F16(_) => FloatType::F32,
        }
    }

    /// Logits of the tokens from `chunk` on, as many as fit `logits`.
    fn logits(&self, pool: &Pool, logits: &mut [f32], chunk: usize, scratch: &mut [f32]) {
        let (c, v) = (self.n_channels, self.n_vocab);
        let n = logits.len() / v;
        let x = MatRef::new(self.x.slice(chunk * c..(chunk + n) * c), n, c);
        let w = MatRef::new(self.w, v, c).t();
        gemm(pool, MatMut::new(logits, n, v), x, w, Start::Zero, None, scratch);
    }
}

/// Losses of a chunk; with `gradient` the logits become `(softmax - onehot) * scale`, times the
/// slope of the soft cap, stored as it says.
fn losses(
    pool: &Pool,
    loss_n: &mut [f32],
    logits: &mut [f32],
    targets: &[i32],
    n_vocab: usize,
    soft_cap: Option<f32>,
    gradient: Option<Gradient>,
) {
    let (loss, logits) = (SharedMut::new(loss_n), SharedMut::new(logits));
    pool.run(&|thread_idx| {
        for row in split_by(targets.len(), 1, pool.n_threads(), thread_idx) {
            // SAFETY: every thread has its own rows.
            let logits = unsafe { logits.range(row * n_vocab..(row + 1) * n_vocab) };
            // SAFETY: as above.
            let loss = unsafe { &mut loss.range(row..row + 1)[0] };
            *loss = loss_row(logits, targets[row], soft_cap, gradient.map(|g| g.scale));
            if gradient.is_some_and(|g| g.stored == FloatType::Bf16) {
                round_in_place(logits);
            }
        }
    });
}

/// Rounds f32 to bf16 at the front of the same memory.
fn round_in_place(row: &mut [f32]) {
    let mut block = [0.0; BLOCK];
    for range in blocks(0..row.len()) {
        let block = &mut block[..range.len()];
        block.copy_from_slice(&row[range.clone()]);
        let first = row.as_mut_ptr().cast::<bf16>();
        // SAFETY: element i takes the bytes from 2 i on, which lie within the row and before every
        // f32 that is still to be read; `row` is not used while the slice lives.
        let dst = unsafe { std::slice::from_raw_parts_mut(first.add(range.start), range.len()) };
        f32_to_bf16(dst, block);
    }
}

tiered! {
    fn loss_row(
        logits: &mut [f32],
        target: i32,
        soft_cap: Option<f32>,
        grad_scale: Option<f32>,
    ) -> f32 {
        if target < 0 {
            if grad_scale.is_some() {
                logits.fill(0.0);
            }
            return 0.0;
        }
        let target = target as usize;
        if let Some(cap) = soft_cap {
            let inverse = 1.0 / cap;
            for x in logits.iter_mut() {
                *x = cap * tanh(*x * inverse);
            }
        }
        let (max, sum) = max_and_sum(logits);
        let loss = (max - logits[target]) + libm::logf(sum);
        let Some(scale) = grad_scale else { return loss };
        let factor = scale / sum;
        if let Some(cap) = soft_cap {
            // Logits are capped by now: what is divided by the cap is the tanh.
            let inverse = 1.0 / cap;
            let slope = |x: f32| (-(x * inverse)).mul_add(x * inverse, 1.0);
            let at_target = scale * slope(logits[target]);
            for x in logits.iter_mut() {
                *x = softmax_term(*x - max) * factor * slope(*x);
            }
            logits[target] -= at_target;
        } else {
            for x in logits.iter_mut() {
                *x = softmax_term(*x - max) * factor;
            }
            logits[target] -= scale;
        }
        loss
    }
}

/// `(max, sum(exp(x - max)))` over fixed tiles in ascending order.
#[inline(always)]
fn max_and_sum(x: &[f32]) -> (f32, f32) {
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0f32);
    for tile in x.chunks(VOCAB_TILE) {
        let tile_max = lane_max(tile);
        let tile_sum = lane_sum([tile], |[x]| softmax_term(x - tile_max));
        let new_max = if tile_max > max { tile_max } else { max };
        sum = sum.mul_add(softmax_term(max - new_max), tile_sum * softmax_term(tile_max - new_max));
        max = new_max;
    }
    (max, sum)
}

/// The largest element, over 16 lanes; NaN elements are passed over here and surface in the sum.
#[inline(always)]
fn lane_max(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let whole = x.chunks_exact(16);
    let rest = whole.remainder();
    for x in whole {
        for (lane, &x) in lanes.iter_mut().zip(x) {
            *lane = if x > *lane { x } else { *lane };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = if x > *lane { x } else { *lane };
    }
    fold_lanes(lanes, |a, b| if b > a { b } else { a })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{FLOAT_TYPES, Stored, assert_close, noise};
    use crate::tier::{Tier, set_tier};

    const N: usize = 200;
    const C: usize = 24;
    /// Two vocabulary tiles and an odd rest.
    const V: usize = 2 * VOCAB_TILE + 101;

    /// `(loss, dx, dw)`; `dw` starts from 0.5.
    type Output = (Vec<f32>, Vec<f32>, Vec<f32>);

    fn targets() -> Vec<i32> {
        noise(N, 3).iter().map(|t| (t * V as f32) as i32).collect()
    }

    fn inputs(float_type: FloatType) -> (Stored, Stored) {
        (Stored::new(&noise(N * C, 1), float_type), Stored::new(&noise(V * C, 2), float_type))
    }

    fn train(
        float_type: FloatType,
        n_threads: usize,
        chunk_tokens: usize,
        soft_cap: Option<f32>,
    ) -> Output {
        let (x, w) = inputs(float_type);
        let (mut loss, mut dw) = (vec![9.0; N], vec![0.5; V * C]);
        let mut dx = Stored::new(&vec![9.0; N * C], float_type);
        let needed = head_scratch_elems(chunk_tokens, V, C, float_type, n_threads);
        let mut scratch = vec![f32::NAN; needed];
        head_train(
            &Pool::new(n_threads),
            &mut loss,
            dx.view_mut(),
            Some(&mut dw),
            x.view(),
            w.view(),
            &targets(),
            soft_cap,
            0.25,
            chunk_tokens,
            &mut scratch,
        );
        (loss, dx.wide(), dw)
    }

    /// A bf16 gradient of the logits is off by 2^-9 of each of its elements, whose magnitudes add up
    /// to 0.5 for a token at a scale of 0.25; they meet numbers below 1. Rounding `dx` to 16 bits
    /// adds 2^-9 of at most 0.5, so 2^-8 leaves room.
    fn tolerance(float_type: FloatType) -> f64 {
        if float_type == FloatType::F32 { 2e-6 } else { 1.0 / 256.0 }
    }

    #[test]
    fn losses_and_gradients_agree_with_the_definition_in_f64() {
        for float_type in FLOAT_TYPES {
            for soft_cap in [None, Some(1.5)] {
                agrees_with_the_definition(float_type, soft_cap);
            }
        }
    }

    fn agrees_with_the_definition(float_type: FloatType, soft_cap: Option<f32>) {
        let cap = soft_cap.map_or(f64::INFINITY, f64::from);
        let (x, w) = inputs(float_type);
        let (x, w, targets) = (x.wide(), w.wide(), targets());
        let (mut loss, mut dx) = (vec![0.0; N], vec![0.0; N * C]);
        let mut dw = vec![0.5; V * C];
        for (n, &target) in targets.iter().enumerate().filter(|(_, target)| **target >= 0) {
            let x_n = &x[n * C..(n + 1) * C];
            let dot = |v: usize| -> f64 {
                x_n.iter().zip(&w[v * C..]).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum()
            };
            let capped = |x: f64| if soft_cap.is_some() { cap * (x / cap).tanh() } else { x };
            let logits: Vec<f64> = (0..V).map(dot).map(capped).collect();
            let sum: f64 = logits.iter().map(|l| l.exp()).sum();
            loss[n] = sum.ln() - logits[target as usize];
            for (v, logit) in logits.iter().enumerate() {
                let d = 0.25 * (logit.exp() / sum - f64::from(u8::from(v == target as usize)));
                let d = d * (1.0 - (logit / cap).powi(2));
                for c in 0..C {
                    dx[n * C + c] += d * f64::from(w[v * C + c]);
                    dw[v * C + c] += d * f64::from(x_n[c]);
                }
            }
        }
        let got = train(float_type, 2, 64, soft_cap);
        assert!(targets.iter().any(|&t| t < 0), "some tokens are not supervised");
        assert_close(&got.0, &loss, 2e-6);
        assert_close(&got.1, &dx, tolerance(float_type));
        assert_close(&got.2, &dw, tolerance(float_type));
    }

    #[test]
    fn chunks_and_threads_do_not_change_the_bits() {
        for tier in [Tier::detect(), Tier::available().last().expect("portable at least")] {
            set_tier(Some(tier));
            for float_type in FLOAT_TYPES {
                let want = train(float_type, 1, 256, None);
                for (n_threads, chunk_tokens) in [(2, 64), (3, 128), (1, 64)] {
                    let got = train(float_type, n_threads, chunk_tokens, None);
                    assert!(got == want, "{float_type:?}, {n_threads} threads, {chunk_tokens}");
                }
            }
        }
        set_tier(None);
    }

    #[test]
    fn forward_alone_gives_the_losses_of_training() {
        for float_type in FLOAT_TYPES {
            let (x, w) = inputs(float_type);
            let mut loss = vec![9.0; N];
            let mut scratch = vec![f32::NAN; head_scratch_elems(64, V, C, float_type, 2)];
            let (x, w) = (x.view(), w.view());
            head_forward(&Pool::new(2), &mut loss, x, w, &targets(), None, 64, &mut scratch);
            assert_eq!(loss, train(float_type, 1, 256, None).0);
        }
    }

    #[test]
    fn large_logits_neither_overflow_nor_lose_the_loss() {
        let (x, w) = ([1.0, 0.0], [300.0, 0.0, -300.0, 0.0, 290.0, 0.0]);
        let (mut loss, mut dx) = ([0.0], [0.0; 2]);
        let mut scratch = vec![0.0; head_scratch_elems(64, 3, 2, FloatType::F32, 1)];
        let (x, w, dx_view) = (View::from(&x), View::from(&w), ViewMut::from(&mut dx));
        let pool = Pool::new(1);
        head_train(&pool, &mut loss, dx_view, None, x, w, &[1], None, 1.0, 64, &mut scratch);
        assert_close(&loss, &[600.000_045], 1e-6);
        assert_close(&dx, &[599.999_55, 0.0], 1e-6);
    }
}
