//! Embedding: gather rows forward, scatter-add rows backward.
//!
//! Idea of the gradient: tokens with the same id must be summed in token order, whatever the
//! threads do. Sorting the keys `id << 32 | token` brings each id's tokens together, in order; a
//! thread owns whole groups. Complexity: N log N for the sort, N C additions.

use crate::pool::{Pool, SharedMut, split};
use crate::view::{BLOCK, View, ViewMut};

/// Channels summed at a time in registers and L1.
const COLS: usize = 256;

/// `y[n] = table[ids[n]]`, and zeros where the id is negative.
///
/// # Shapes
/// `ids` (N), `table` (V, C), `y` (N, C); `n_channels` is C.
/// # Panics
/// If an id is V or more.
pub fn embed_forward(pool: &Pool, y: ViewMut<'_>, ids: &[i32], table: View<'_>, n_channels: usize) {
    assert_eq!(y.len(), ids.len() * n_channels, "length of y");
    pool.split_view_rows(usize::MAX, y, n_channels, 16, |rows, mut y| {
        for (at, &id) in ids[rows].iter().enumerate() {
            let mut y = y.reborrow().slice(at * n_channels..(at + 1) * n_channels);
            if id < 0 {
                y.zero();
            } else {
                let first = id as usize * n_channels;
                y.copy_from(table.slice(first..first + n_channels));
            }
        }
    });
}

/// Scratch of [`embed_scatter`] in u64 elements.
pub fn embed_scatter_scratch_u64(n_tokens: usize) -> usize {
    n_tokens
}

/// Adds to every row of `dtable` the sum of the rows of its tokens.
///
/// # Shapes
/// `dtable` (V, C), `ids` (N), `rows` (N, C); `n_channels` is C. Negative ids are skipped.
/// # Memory
/// [`embed_scatter_scratch_u64`] elements.
/// # Order
/// Each id's rows are summed from zero in token order, then the sum is added to the stored row.
/// # Panics
/// If an id is V or more.
pub fn embed_scatter(
    pool: &Pool,
    dtable: &mut [f32],
    ids: &[i32],
    rows: View<'_>,
    n_channels: usize,
    scratch: &mut [u64],
) {
    assert_eq!(rows.len(), ids.len() * n_channels, "length of rows");
    assert!(dtable.len().is_multiple_of(n_channels), "dtable is whole rows");
    let mut n_keys = 0;
    for (token, &id) in ids.iter().enumerate().filter(|(_, id)| **id >= 0) {
        scratch[n_keys] = (id as u64) << 32 | token as u64;
        n_keys += 1;
    }
    let keys = &mut scratch[..n_keys];
    keys.sort_unstable();
    let keys = &*keys;
    let id_at = |i: usize| keys[i] >> 32;
    let shared = SharedMut::new(dtable);
    pool.run(&|thread_idx| {
        // A cut inside a group moves to the group's end, on both sides of it alike.
        let group_end = |mut i: usize| {
            while i > 0 && i < n_keys && id_at(i) == id_at(i - 1) {
                i += 1;
            }
            i
        };
        let part = split(n_keys, pool.n_threads(), thread_idx);
        let (mut i, end) = (group_end(part.start), group_end(part.end));
        while i < end {
            let next = group_end(i + 1);
            let at = id_at(i) as usize * n_channels;
            // SAFETY: a group, and so a row of the table, belongs to one thread.
            let dst = unsafe { shared.range(at..at + n_channels) };
            add_rows(dst, &keys[i..next], rows);
            i = next;
        }
    });
}

tiered! {
    /// Adds to `dst` the sum of the rows that the low halves of `keys` name.
    fn add_rows(dst: &mut [f32], keys: &[u64], rows: View<'_>) {
        let n_channels = dst.len();
        let mut buf = [0.0; BLOCK];
        for (block, dst) in dst.chunks_mut(COLS).enumerate() {
            let mut sums = [0.0f32; COLS];
            let sums = &mut sums[..dst.len()];
            for &key in keys {
                let at = (key as u32) as usize * n_channels + block * COLS;
                for (sum, x) in sums.iter_mut().zip(rows.load(at..at + dst.len(), &mut buf)) {
                    *sum += x;
                }
            }
            for (dst, sum) in dst.iter_mut().zip(sums) {
                *dst += *sum;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    const C: usize = 300;
    const V: usize = 11;

    fn ids(n: usize) -> Vec<i32> {
        noise(n, 5).iter().map(|x| (x.abs() * (V + 2) as f32) as i32 - 2).collect()
    }

    #[test]
    fn rows_are_gathered_and_negative_ids_give_zeros() {
        let (ids, table) = (ids(50), noise(V * C, 1));
        assert!(ids.iter().any(|&id| id < 0));
        let mut y = vec![9.0; ids.len() * C];
        embed_forward(&Pool::new(2), (&mut y).into(), &ids, (&table).into(), C);
        for (y, &id) in y.chunks_exact(C).zip(&ids) {
            let want = (id >= 0).then(|| &table[id as usize * C..][..C]);
            assert!(want.map_or(y.iter().all(|&y| y == 0.0), |want| want == y));
        }
    }

    /// Few distinct ids, so that groups straddle the cuts between threads.
    #[test]
    fn scatter_sums_in_token_order_and_then_adds_whatever_the_threads() {
        let ids = ids(200);
        let rows = noise(ids.len() * C, 1);
        let mut want = noise(V * C, 2);
        for id in 0..V {
            let mut sum = vec![0.0f32; C];
            for token in (0..ids.len()).filter(|&t| ids[t] == id as i32) {
                sum.iter_mut().zip(&rows[token * C..]).for_each(|(s, x)| *s += x);
            }
            want[id * C..].iter_mut().zip(&sum).for_each(|(w, s)| *w += s);
        }
        for n_threads in [1, 2, 3, 16] {
            let mut got = noise(V * C, 2);
            let mut scratch = vec![0; embed_scatter_scratch_u64(ids.len())];
            embed_scatter(&Pool::new(n_threads), &mut got, &ids, (&rows).into(), C, &mut scratch);
            assert_eq!(got, want, "{n_threads} threads");
        }
    }
}
