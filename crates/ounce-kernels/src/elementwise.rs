//! Adding, scaling, copying, bias gradients, dropout.
//!
//! All are bound by memory; threads take contiguous parts. N tokens, C channels.

use crate::inout::{InOut, for_blocks};
use crate::philox::PhiloxKey;
use crate::pool::{Pool, split_by};

/// Elements that a thread takes at least when nothing else bounds it.
const GRANULE: usize = 1024;

/// `y = a + b`; source `a`, which `y` may overwrite.
pub fn add(pool: &Pool, y: InOut<'_>, b: &[f32]) {
    assert_eq!(y.len(), b.len(), "length of b");
    for_blocks(pool, y, |range, y, a| {
        for ((y, a), b) in y.iter_mut().zip(a).zip(&b[range]) {
            *y = a + b;
        }
    });
}

/// `y = factor x`; source `x`, which `y` may overwrite.
pub fn scale(pool: &Pool, y: InOut<'_>, factor: f32) {
    for_blocks(pool, y, |_, y, x| {
        for (y, x) in y.iter_mut().zip(x) {
            *y = factor * x;
        }
    });
}

/// `y = x`.
pub fn copy(pool: &Pool, y: &mut [f32], x: &[f32]) {
    assert_eq!(y.len(), x.len(), "length of x");
    pool.split_rows(y, 1, GRANULE, |range, y| y.copy_from_slice(&x[range]));
}

/// `y = 0`.
pub fn zero(pool: &Pool, y: &mut [f32]) {
    pool.split_rows(y, 1, GRANULE, |_, y| y.fill(0.0));
}

/// Adds the sum of `dy` over tokens to `db`.
///
/// # Shapes
/// `db` (C), `dy` (N, C); `n_channels` is C.
/// # Order
/// One sequential f32 sum per column along ascending tokens, started from the stored `db`.
pub fn bias_grad(pool: &Pool, db: &mut [f32], dy: &[f32], n_channels: usize) {
    assert_eq!(db.len(), n_channels, "length of db");
    assert!(dy.len().is_multiple_of(n_channels), "dy is whole tokens");
    pool.split_rows(db, 1, 16, |cols, db| column_sum(db, dy, cols.start, n_channels));
}

tiered! {
    fn column_sum(db: &mut [f32], dy: &[f32], first_col: usize, n_channels: usize) {
        for dy in dy.chunks_exact(n_channels) {
            for (db, dy) in db.iter_mut().zip(&dy[first_col..]) {
                *db += dy;
            }
        }
    }
}

/// Inverted dropout: `y = x / (1 - p)` where the mask keeps, 0 elsewhere; source `x`, which `y` may
/// overwrite. The same call on `dy` is the gradient.
///
/// # Shapes
/// `x`, `y` (N, C); `n_channels` is C; row 0 is token `first_token` of the step.
/// # Order
/// Element (token, channel) depends on (key, token, channel) alone.
pub fn dropout(
    pool: &Pool,
    y: InOut<'_>,
    n_channels: usize,
    p: f32,
    key: PhiloxKey,
    first_token: usize,
) {
    /// Channels at a time: a multiple of 4, and what fits an in-place block.
    const COLS: usize = 512;
    assert!((0.0..1.0).contains(&p), "dropout probability {p} lies in [0, 1)");
    assert!(y.len().is_multiple_of(n_channels), "x is whole tokens");
    let n_tokens = y.len() / n_channels;
    // A word below the threshold drops; 2^32 p is exact enough in f64 and below 2^32.
    let threshold = (f64::from(p) * 4_294_967_296.0) as u32;
    let shared = y.share();
    pool.run(&|thread_idx| {
        for row in split_by(n_tokens, 4, pool.n_threads(), thread_idx) {
            for col in (0..n_channels).step_by(COLS) {
                let end = (col + COLS).min(n_channels);
                let token = (first_token + row) as u32;
                let range = row * n_channels + col..row * n_channels + end;
                // SAFETY: every thread has its own rows.
                unsafe {
                    shared.with(range, |y, x| {
                        dropout_row(y, x, key, token, (col / 4) as u32, threshold, 1.0 / (1.0 - p));
                    });
                }
            }
        }
    });
}

tiered! {
    fn dropout_row(y: &mut [f32], x: &[f32], key: PhiloxKey, token: u32, first_group: u32, threshold: u32, scale: f32) {
        for (group, (y, x)) in y.chunks_mut(4).zip(x.chunks(4)).enumerate() {
            let words = key.words(token, first_group + group as u32);
            for ((y, &x), word) in y.iter_mut().zip(x).zip(words) {
                *y = if word < threshold { 0.0 } else { x * scale };
            }
        }
    }
}
