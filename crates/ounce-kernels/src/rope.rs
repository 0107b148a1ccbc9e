//! Rotary position embedding in Hugging Face's half-split form.
//!
//! Idea: with R = `inv_freq.len()`, channel `i < R` of a head is paired with channel `i + R`, and
//! the pair is turned by the angle `position * inv_freq[i]`. Channels from `2R` on are copied. The
//! inverse turn is the gradient. Source: Su et al. 2021 (arXiv:2104.09864).

use crate::inout::InOut;
use crate::pool::{Pool, split_by};

/// The largest `inv_freq.len()`: cosines and sines of one token live on the stack.
pub const MAX_PAIRS: usize = 512;

/// Rotates every head of `x` by its token's position; `y` may overwrite `x`.
///
/// # Shapes
/// `x`, `y` (N, n_heads, head_dim); `positions` (N); `inv_freq` (R), `2 R <= head_dim`.
/// Cosine and sine are multiplied by `scale` (1 unless the model scales its attention by length).
/// `inverse` rotates back: with it the same call on `dy` gives `dx`.
pub fn rope(
    pool: &Pool,
    y: InOut<'_>,
    positions: &[i32],
    inv_freq: &[f32],
    scale: f32,
    n_heads: usize,
    head_dim: usize,
    inverse: bool,
) {
    let n_pairs = inv_freq.len();
    assert!(n_pairs <= MAX_PAIRS && 2 * n_pairs <= head_dim, "{n_pairs} pairs in {head_dim}");
    assert_eq!(y.len(), positions.len() * n_heads * head_dim, "length of x");
    let shared = y.share();
    pool.run(&|thread_idx| {
        let (mut cos, mut sin) = ([0.0; MAX_PAIRS], [0.0; MAX_PAIRS]);
        for token in split_by(positions.len(), 4, pool.n_threads(), thread_idx) {
            for (i, &freq) in inv_freq.iter().enumerate() {
                let angle = positions[token] as f32 * freq;
                cos[i] = angle.cos() * scale;
                sin[i] = if inverse { -angle.sin() * scale } else { angle.sin() * scale };
            }
            for head in 0..n_heads {
                let at = (token * n_heads + head) * head_dim;
                // SAFETY: every thread has its own tokens.
                unsafe {
                    shared.with(at..at + head_dim, |y, x| {
                        rotate(y, x, &cos[..n_pairs], &sin[..n_pairs]);
                    });
                }
            }
        }
    });
}

tiered! {
    fn rotate(y: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32]) {
        let n_pairs = cos.len();
        let (y0, y_rest) = y.split_at_mut(n_pairs);
        let (x0, x_rest) = x.split_at(n_pairs);
        let (y1, y_rest) = y_rest.split_at_mut(n_pairs);
        let (x1, x_rest) = x_rest.split_at(n_pairs);
        for i in 0..n_pairs {
            y0[i] = x0[i].mul_add(cos[i], -(x1[i] * sin[i]));
            y1[i] = x1[i].mul_add(cos[i], x0[i] * sin[i]);
        }
        y_rest.copy_from_slice(x_rest);
    }
}
