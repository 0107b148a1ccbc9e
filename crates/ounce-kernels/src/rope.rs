//! Rotary position embedding in Hugging Face's half-split form.
//!
//! Idea: with R = `inv_freq.len()`, channel `i < R` of a head is paired with channel `i + R`, and
//! the pair is turned by the angle `position * inv_freq[i]`. Channels from `2R` on are copied, and so
//! are columns behind the heads (values packed with queries and keys). The inverse turn is the
//! gradient. Source: `[Su21]`.

use crate::inout::{Buffers, InOut};
use crate::math::sin_cos;
use crate::pool::{Pool, split_by};
use crate::view::{BLOCK, blocks};

/// The largest `inv_freq.len()`: cosines and sines of one token live on the stack.
pub const MAX_PAIRS: usize = 512;

/// Rotates the first `n_heads` heads of `x` by its token's position; `y` may overwrite `x`.
///
/// # Shapes
/// `x`, `y` (N, W), W at least `n_heads * head_dim`; `positions` (N); `inv_freq` (R), `2 R <= head_dim`.
/// A head of 16-bit numbers has at most [`BLOCK`] channels, and so has one rotated in place.
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
    let columns = y.len() / positions.len().max(1);
    assert_eq!(y.len(), positions.len() * columns, "length of x");
    let turned = n_heads * head_dim;
    assert!(turned <= columns || positions.is_empty(), "{n_heads} heads fit {columns} columns");
    // As many heads of a token as fit a block.
    let width = (BLOCK / head_dim).clamp(1, n_heads.max(1)) * head_dim;
    let shared = y.share();
    pool.run(&|thread_idx| {
        let (mut cos, mut sin) = ([0.0; MAX_PAIRS], [0.0; MAX_PAIRS]);
        let mut buffers = Buffers::NEW;
        for token in split_by(positions.len(), 4, pool.n_threads(), thread_idx) {
            let sin_scale = if inverse { -scale } else { scale };
            angles(&mut cos, &mut sin, inv_freq, positions[token] as f32, scale, sin_scale);
            let row = token * columns;
            let end = row + turned;
            for at in (row..end).step_by(width) {
                // SAFETY: every thread has its own tokens.
                unsafe {
                    shared.with(at..(at + width).min(end), &mut buffers, |y, x| {
                        rotate_heads(y, x, &cos[..n_pairs], &sin[..n_pairs], head_dim);
                    });
                }
            }
            for range in blocks(end..row + columns) {
                // SAFETY: as above.
                unsafe { shared.with(range, &mut buffers, <[f32]>::copy_from_slice) };
            }
        }
    });
}

tiered! {
    fn angles(cos: &mut [f32], sin: &mut [f32], inv_freq: &[f32], position: f32, cos_scale: f32, sin_scale: f32) {
        for ((cos, sin), freq) in cos.iter_mut().zip(sin).zip(inv_freq) {
            let (s, c) = sin_cos(position * freq);
            *cos = c * cos_scale;
            *sin = s * sin_scale;
        }
    }
}

tiered! {
    fn rotate_heads(y: &mut [f32], x: &[f32], cos: &[f32], sin: &[f32], head_dim: usize) {
        let n_pairs = cos.len();
        for (y, x) in y.chunks_exact_mut(head_dim).zip(x.chunks_exact(head_dim)) {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, noise};

    const POSITIONS: [i32; 5] = [0, 1, 7, 500, 100_000];

    /// Three heads of 10 channels, of which 8 are rotated.
    fn run(pool: &Pool, y: InOut<'_>, scale: f32, inverse: bool) {
        rope(pool, y, &POSITIONS, &[1.0, 0.3, 0.01, 0.0001], scale, 3, 10, inverse);
    }

    #[test]
    fn pairs_are_turned_by_position_times_frequency_and_the_rest_is_copied() {
        let x = noise(5 * 3 * 10, 1);
        let mut y = vec![9.0; x.len()];
        run(&Pool::new(2), InOut::separate(&mut y, &x), 0.5, false);
        let mut want: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        for (head, want) in want.chunks_exact_mut(10).enumerate() {
            for (i, freq) in [1.0f32, 0.3, 0.01, 0.0001].into_iter().enumerate() {
                let (s, c) = f64::from(POSITIONS[head / 3] as f32 * freq).sin_cos();
                let (a, b) = (want[i], want[i + 4]);
                want[i] = 0.5 * (a * c - b * s);
                want[i + 4] = 0.5 * (b * c + a * s);
            }
        }
        assert_close(&y, &want, 4e-7);
    }

    #[test]
    fn columns_behind_the_heads_are_copied() {
        let x = noise(5 * 43, 1);
        let heads: Vec<f32> = x.chunks(43).flat_map(|row| row[..30].to_vec()).collect();
        let (mut want, mut y, mut z) = (vec![9.0; heads.len()], vec![9.0; x.len()], x.clone());
        run(&Pool::new(1), InOut::separate(&mut want, &heads), 0.5, false);
        run(&Pool::new(2), InOut::separate(&mut y, &x), 0.5, false);
        run(&Pool::new(3), InOut::in_place(&mut z), 0.5, false);
        for ((y, want), x) in y.chunks(43).zip(want.chunks(30)).zip(x.chunks(43)) {
            assert_eq!((&y[..30], &y[30..]), (want, &x[30..]));
        }
        assert_eq!(y, z);
    }

    #[test]
    fn the_inverse_turns_back_and_in_place_gives_the_same_bits() {
        let x = noise(5 * 3 * 10, 2);
        let (mut y, mut z) = (vec![0.0; x.len()], x.clone());
        run(&Pool::new(1), InOut::separate(&mut y, &x), 1.0, false);
        run(&Pool::new(3), InOut::in_place(&mut z), 1.0, false);
        assert_eq!(y, z);
        run(&Pool::new(2), InOut::in_place(&mut z), 1.0, true);
        let want: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        assert_close(&z, &want, 5e-7);
    }
}
