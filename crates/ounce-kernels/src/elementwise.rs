//! Adding, scaling, copying, bias gradients, dropout.
//!
//! All are bound by memory; threads take contiguous parts. N tokens, C channels.

use crate::inout::{Buffers, InOut, for_blocks};
use crate::philox::PhiloxKey;
use crate::pool::{Pool, split_by};
use crate::view::{BLOCK, View, ViewMut};

/// Elements that a thread takes at least when nothing else bounds it.
const GRANULE: usize = 1024;

/// `y = a + b`; source `a`, which `y` may overwrite.
pub fn add(pool: &Pool, y: InOut<'_>, b: View<'_>) {
    assert_eq!(y.len(), b.len(), "length of b");
    for_blocks(pool, y, [b], |y, a, [b]| add_block(y, a, b));
}

tiered! {
    fn add_block(y: &mut [f32], a: &[f32], b: &[f32]) {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a + b;
        }
    }
}

/// `y = factor x`; source `x`, which `y` may overwrite.
pub fn scale(pool: &Pool, y: InOut<'_>, factor: f32) {
    for_blocks(pool, y, [], |y, x, []| scale_block(y, x, factor));
}

tiered! {
    fn scale_block(y: &mut [f32], x: &[f32], factor: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = factor * x;
        }
    }
}

/// `y = x`, rounded if `y` is stored in fewer bits.
pub fn copy(pool: &Pool, y: ViewMut<'_>, x: View<'_>) {
    assert_eq!(y.len(), x.len(), "length of x");
    pool.split_view_rows(y.len(), y, 1, GRANULE, |range, mut y| y.copy_from(x.slice(range)));
}

/// `y = 0`.
pub fn zero(pool: &Pool, y: ViewMut<'_>) {
    pool.split_view_rows(y.len(), y, 1, GRANULE, |_, mut y| y.zero());
}

/// Adds the sum of `dy` over tokens to `db`.
///
/// # Shapes
/// `db` (C), `dy` (N, C); `n_channels` is C.
/// # Order
/// One sequential f32 sum per column along ascending tokens, started from the stored `db`.
pub fn bias_grad(pool: &Pool, db: &mut [f32], dy: View<'_>, n_channels: usize) {
    assert_eq!(db.len(), n_channels, "length of db");
    assert!(dy.len().is_multiple_of(n_channels), "dy is whole tokens");
    pool.split_rows(db, 1, 16, |cols, db| column_sum(db, dy, cols.start, n_channels));
}

tiered! {
    fn column_sum(db: &mut [f32], dy: View<'_>, first_col: usize, n_channels: usize) {
        let mut buf = [0.0; BLOCK];
        for (block, db) in db.chunks_mut(BLOCK).enumerate() {
            let first = first_col + block * BLOCK;
            for row in (0..dy.len()).step_by(n_channels) {
                let dy = dy.load(row + first..row + first + db.len(), &mut buf);
                for (db, dy) in db.iter_mut().zip(dy) {
                    *db += dy;
                }
            }
        }
    }
}

/// Inverted dropout: `y = x / (1 - p)` where the mask keeps, 0 elsewhere; source `x`, which `y` may
/// overwrite. The same call on `dy` is the gradient. Taken from `[Srivastava14]`.
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
    assert!((0.0..1.0).contains(&p), "dropout probability {p} lies in [0, 1)");
    assert!(y.len().is_multiple_of(n_channels), "x is whole tokens");
    let n_tokens = y.len() / n_channels;
    // A word below the threshold drops; 2^32 p is exact enough in f64 and below 2^32.
    let threshold = (f64::from(p) * 4_294_967_296.0) as u32;
    let shared = y.share();
    pool.run(&|thread_idx| {
        let mut buffers = Buffers::NEW;
        for row in split_by(n_tokens, 4, pool.n_threads(), thread_idx) {
            for col in (0..n_channels).step_by(BLOCK) {
                let end = (col + BLOCK).min(n_channels);
                let token = (first_token + row) as u32;
                let range = row * n_channels + col..row * n_channels + end;
                // SAFETY: every thread has its own rows.
                unsafe {
                    shared.with(range, &mut buffers, |y, x| {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    const KEY: PhiloxKey = PhiloxKey { seed: 0x1234_5678_9abc_def0, step: 7, site: 3 };

    #[test]
    fn add_scale_copy_and_zero_do_what_they_say_also_in_place() {
        let (a, b) = (noise(5000, 1), noise(5000, 2));
        let pool = Pool::new(2);
        let mut y = vec![9.0; a.len()];
        copy(&pool, (&mut y).into(), (&a).into());
        assert_eq!(y, a);
        add(&pool, InOut::in_place(&mut y), (&b).into());
        assert!(y.iter().zip(a.iter().zip(&b)).all(|(y, (a, b))| *y == a + b));
        scale(&pool, InOut::separate(&mut y, &a), -2.0);
        assert!(y.iter().zip(&a).all(|(y, a)| *y == -2.0 * a));
        zero(&pool, (&mut y).into());
        assert!(y.iter().all(|&y| y == 0.0));
    }

    /// The sums are the sequential ones, bit for bit, however tokens are cut.
    #[test]
    fn bias_gradients_are_sequential_sums_over_tokens() {
        let (n, c) = (192, 37);
        let dy = noise(n * c, 1);
        let mut want = noise(c, 2);
        let mut got = want.clone();
        for (i, dy) in dy.iter().enumerate() {
            want[i % c] += dy;
        }
        bias_grad(&Pool::new(2), &mut got, (&dy[..64 * c]).into(), c);
        bias_grad(&Pool::new(3), &mut got, (&dy[64 * c..]).into(), c);
        assert_eq!(got, want);
    }

    #[test]
    fn dropout_masks_by_the_philox_words_of_token_and_channel() {
        let (n, c, p) = (40, 1030, 0.25);
        let x = vec![3.0; n * c];
        let mut y = vec![9.0; n * c];
        dropout(&Pool::new(2), InOut::separate(&mut y, &x), c, p, KEY, 5);
        for (i, &y) in y.iter().enumerate() {
            let (token, channel) = (5 + i / c, i % c);
            let word = KEY.words(token as u32, (channel / 4) as u32)[channel % 4];
            let want = if word < 1 << 30 { 0.0 } else { 3.0 * (1.0 / (1.0 - p)) };
            assert_eq!(y, want, "token {token} channel {channel}");
        }
        let dropped = y.iter().filter(|&&y| y == 0.0).count() as f64 / y.len() as f64;
        assert!((dropped - 0.25).abs() < 0.01, "{dropped} of the elements were dropped");
    }

    #[test]
    fn dropout_does_not_depend_on_cuts_threads_or_place() {
        let (n, c) = (128, 30);
        let x = noise(n * c, 1);
        let mut want = vec![0.0; n * c];
        dropout(&Pool::new(1), InOut::separate(&mut want, &x), c, 0.1, KEY, 0);
        let mut got = x;
        let (first, second) = got.split_at_mut(64 * c);
        dropout(&Pool::new(3), InOut::in_place(first), c, 0.1, KEY, 0);
        dropout(&Pool::new(2), InOut::in_place(second), c, 0.1, KEY, 64);
        assert_eq!(got, want);
    }
}
