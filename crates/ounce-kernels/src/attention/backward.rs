//! Attention backward: scores are computed again, tile by tile, and turned into gradients.
//!
//! With `p = exp(scale q k - lse)`, `delta = dO . o` and `ds = scale p (dO v - delta)`, times the
//! slope of the soft cap:
//! ```text
//! dv[key] = sum over queries p dO      dk[key] = sum over queries ds q      dq[query] = sum over keys ds k
//! ```
//! One pass over a key-value head makes all three (5 products per pair of tiles); its key tiles go
//! in blocks, outermost, and query tiles inside, which gives each sum its ascending order. With too
//! few key-value heads for the threads, one pass makes `dk` and `dv`, split by key blocks, and
//! another makes `dq`, split by query tiles (7 products, the same bits).

use super::layout::{Carver, Part, scores, weighted_sum};
use super::{AttentionDims, HeadsMut, HeadsRef, RowSpan, TILE, TILES_PER_BLOCK};
use crate::gemm::tile::{Panel, Tile};
use crate::gemm::{ALIGN_ELEMS, aligned};
use crate::math::{lane_sum, softmax_term, tanh};
use crate::pool::{Pool, SharedMut};
use std::ops::Range;

/// Elements of one thread's scratch: a block of keys and values with their gradients, one tile of
/// queries and output gradients, and two tiles of scores.
fn per_thread_elems(dims: AttentionDims) -> usize {
    let (transposed, natural) = (dims.transposed_elems(), dims.natural_elems());
    TILES_PER_BLOCK * (2 * transposed + natural + 2 * dims.sums_elems())
        + 2 * natural
        + 2 * TILE * TILE
        + TILE
}

/// Scratch of [`attention_backward`] in elements.
pub fn attention_backward_scratch_elems(dims: AttentionDims, n_threads: usize) -> usize {
    n_threads * per_thread_elems(dims) + ALIGN_ELEMS
}

/// Gradients of [`super::attention_forward`]: overwrites `dq`, `dk`, `dv`.
///
/// # Shapes
/// `dq` (N, H, D), `dk`, `dv` (N, K, D); `d_o`, `o` (N, H, D), `lse` (N, H); `q`, `k`, `v`, `rows`
/// as in the forward. Tokens outside `rows` get zeros.
/// # Memory
/// [`attention_backward_scratch_elems`] elements.
pub fn attention_backward(
    pool: &Pool,
    dq: HeadsMut<'_>,
    dk: HeadsMut<'_>,
    dv: HeadsMut<'_>,
    d_o: &[f32],
    q: HeadsRef<'_>,
    k: HeadsRef<'_>,
    v: HeadsRef<'_>,
    o: &[f32],
    lse: &[f32],
    rows: &[RowSpan],
    dims: AttentionDims,
    scratch: &mut [f32],
) {
    let AttentionDims { n_heads, n_kv_heads, head_dim, .. } = dims;
    let n_tokens = lse.len() / n_heads;
    assert_eq!(lse.len(), n_tokens * n_heads, "lse is whole tokens");
    assert!(o.len() == lse.len() * head_dim && d_o.len() == o.len(), "length of o and d_o");
    dims.check(n_tokens, rows);
    let needed = attention_backward_scratch_elems(dims, pool.n_threads());
    assert!(scratch.len() >= needed, "attention scratch: {} of {needed} elements", scratch.len());
    for (heads, n_heads) in [(&dq, n_heads), (&dk, n_kv_heads), (&dv, n_kv_heads)] {
        heads.check(n_tokens, n_heads, head_dim);
    }
    let job = Backward {
        tile: Tile::dividing_64(),
        dq,
        dk,
        dv,
        d_o: HeadsRef::dense(d_o, n_heads, head_dim),
        o: HeadsRef::dense(o, n_heads, head_dim),
        lse,
        q,
        k,
        v,
        dims,
        scratch: SharedMut::new(aligned(scratch)),
    };
    job.zero_gaps(rows, n_tokens);
    if one_pass_is_cheaper(rows.len() * n_kv_heads, pool.n_threads()) {
        job.one_pass(pool, rows);
    } else {
        job.two_passes(pool, rows);
    }
}

/// Whether 5 products per pair of tiles with whole key-value heads per thread cost less than 7 with
/// an even load. Either way the bits are the same.
pub(super) fn one_pass_is_cheaper(n_units: usize, n_threads: usize) -> bool {
    5 * n_units.div_ceil(n_threads) * n_threads <= 7 * n_units
}

/// Which gradients a block makes.
#[derive(Clone, Copy, PartialEq)]
enum Want {
    All,
    Queries,
    KeysValues,
}

struct Backward<'a> {
    tile: Tile,
    dq: HeadsMut<'a>,
    dk: HeadsMut<'a>,
    dv: HeadsMut<'a>,
    d_o: HeadsRef<'a>,
    o: HeadsRef<'a>,
    lse: &'a [f32],
    q: HeadsRef<'a>,
    k: HeadsRef<'a>,
    v: HeadsRef<'a>,
    dims: AttentionDims,
    scratch: SharedMut<'a, f32>,
}

impl Backward<'_> {
    /// A thread owns a key-value head of a row with all its query heads.
    fn one_pass(&self, pool: &Pool, rows: &[RowSpan]) {
        let n_kv_heads = self.dims.n_kv_heads;
        pool.run_items(rows.len() * n_kv_heads, |thread_idx, item| {
            let (row, kv_head) = (rows[item / n_kv_heads], item % n_kv_heads);
            let queries = 0..row.n_tiles();
            for head in self.heads_of(kv_head) {
                for keys in blocks(row) {
                    self.block(row, head, &keys, &queries, Want::All, thread_idx);
                }
            }
        });
    }

    /// First a thread owns a block of keys with all query heads, then a block of queries.
    fn two_passes(&self, pool: &Pool, rows: &[RowSpan]) {
        let AttentionDims { n_heads, n_kv_heads, .. } = self.dims;
        let n_blocks: usize = rows.iter().map(|row| blocks(*row).count()).sum();
        pool.run_items(n_blocks * n_kv_heads, |thread_idx, item| {
            // Early keys are seen by the most queries; they come first.
            let (row, keys) = find_block(rows, item / n_kv_heads);
            let queries = 0..row.n_tiles();
            for head in self.heads_of(item % n_kv_heads) {
                self.block(row, head, &keys, &queries, Want::KeysValues, thread_idx);
            }
        });
        pool.run_items(n_blocks * n_heads, |thread_idx, item| {
            let (row, queries) = find_block(rows, n_blocks - 1 - item / n_heads);
            let first = self.dims.first_key_tile(queries.start);
            for keys in blocks(row).filter(|k| k.start < queries.end && k.end > first) {
                self.block(row, item % n_heads, &keys, &queries, Want::Queries, thread_idx);
            }
        });
    }

    fn heads_of(&self, kv_head: usize) -> Range<usize> {
        kv_head * self.dims.group()..(kv_head + 1) * self.dims.group()
    }

    /// The contributions of one query head between a block of key tiles and a range of query tiles.
    fn block(
        &self,
        row: RowSpan,
        head: usize,
        keys: &Range<usize>,
        queries: &Range<usize>,
        want: Want,
        thread_idx: usize,
    ) {
        let d = self.dims.head_dim;
        let (kv_head, natural) = (head / self.dims.group(), self.dims.natural_elems());
        // SAFETY: a thread works on one block at a time.
        let mut carver =
            unsafe { Carver::new(&self.scratch, per_thread_elems(self.dims), thread_idx) };
        let mut key_tiles: [KeyTile<'_>; TILES_PER_BLOCK] =
            std::array::from_fn(|_| KeyTile::carve(&mut carver, self.dims));
        let (q_n, do_n) = (carver.take(natural), carver.take(natural));
        let (p, ds) = (carver.take(TILE * TILE), carver.take(TILE * TILE));
        let delta = carver.take(TILE);
        for (tile, j) in key_tiles.iter_mut().zip(keys.clone()) {
            self.k.pack_transposed(tile.k_t, row.tile(j), kv_head, d);
            self.v.pack_transposed(tile.v_t, row.tile(j), kv_head, d);
            self.k.pack_natural(tile.k_n, row.tile(j), kv_head, d);
        }
        let seeing = self.dims.query_tiles(keys.end - 1, queries.end);
        for i in queries.start.max(keys.start)..seeing.end {
            let first_key_tile = self.dims.first_key_tile(i);
            let tokens = row.tile(i);
            self.q.pack_natural(q_n, tokens.clone(), head, d);
            self.d_o.pack_natural(do_n, tokens.clone(), head, d);
            for (delta, token) in delta.iter_mut().zip(tokens.clone()) {
                *delta = dot(self.d_o.row(token, head, d), self.o.row(token, head, d));
            }
            let lse = &self.lse[tokens.start * self.dims.n_heads..];
            for (tile, j) in key_tiles.iter_mut().zip(keys.clone()) {
                if j > i || j < first_key_tile {
                    continue;
                }
                let part = Part::LowerScores.if_diagonal(i == j);
                scores(&self.tile, d, q_n, tile.k_t, p, part);
                scores(&self.tile, d, do_n, tile.v_t, ds, part);
                let lse = (&lse[head..], self.dims.n_heads);
                score_gradients(p, ds, lse, &delta[..tokens.len()], self.dims, i - j);
                if want != Want::Queries {
                    let part = Part::DepthFromRow.if_diagonal(i == j);
                    let (p, ds) = (Panel::new(p.as_ptr(), TILE), Panel::new(ds.as_ptr(), TILE));
                    let (dv, dk) = ((tile.dv.as_mut_ptr(), d), (tile.dk.as_mut_ptr(), d));
                    // SAFETY: `dv` and `dk` have 64 rows.
                    unsafe {
                        weighted_sum(&self.tile, d, p, do_n, dv, TILE, i > j, part);
                        weighted_sum(&self.tile, d, ds, q_n, dk, TILE, i > j, part);
                    }
                }
                if want != Want::KeysValues {
                    let part = Part::DepthUpToRow.if_diagonal(i == j);
                    let ds = Panel::rows_of_64(ds.as_ptr());
                    let dq = (self.dq.at(tokens.start, head, d), self.dq.row_stride);
                    // SAFETY: the rows of `dq` of this head and tile belong to this thread's item;
                    // `check` accepted the sizes.
                    unsafe {
                        let n_rows = tokens.len();
                        let from_c = j > first_key_tile;
                        weighted_sum(&self.tile, d, ds, tile.k_n, dq, n_rows, from_c, part);
                    }
                }
            }
        }
        if want != Want::Queries {
            for (tile, j) in key_tiles.iter().zip(keys.clone()) {
                self.store_keys_values(row.tile(j), head, tile.dk, tile.dv);
            }
        }
    }

    /// Stores the gradients of a tile of keys and values, or adds them to those of the heads of the
    /// group before.
    fn store_keys_values(&self, tokens: Range<usize>, head: usize, dk: &[f32], dv: &[f32]) {
        let d = self.dims.head_dim;
        let (kv_head, is_first) =
            (head / self.dims.group(), head.is_multiple_of(self.dims.group()));
        for (heads, tile) in [(&self.dk, dk), (&self.dv, dv)] {
            for (token, src) in tokens.clone().zip(tile.chunks_exact(d)) {
                // SAFETY: the tokens of this key-value head belong to this thread's item.
                let dst = unsafe { heads.row(token, kv_head, d) };
                if is_first {
                    dst.copy_from_slice(src);
                } else {
                    for (dst, src) in dst.iter_mut().zip(src) {
                        *dst += src;
                    }
                }
            }
        }
    }

    fn zero_gaps(&self, rows: &[RowSpan], n_tokens: usize) {
        let AttentionDims { n_heads, n_kv_heads, head_dim, .. } = self.dims;
        let mut gap_start = 0;
        let ends = rows.iter().map(|row| (row.start, row.start + row.len));
        for (gap_end, next) in ends.chain([(n_tokens, n_tokens)]) {
            for token in gap_start..gap_end {
                let all = [(&self.dq, n_heads), (&self.dk, n_kv_heads), (&self.dv, n_kv_heads)];
                for (heads, n_heads) in all {
                    // SAFETY: no thread runs yet; `check` accepted the sizes.
                    (0..n_heads).for_each(|h| unsafe { heads.row(token, h, head_dim) }.fill(0.0));
                }
            }
            gap_start = next;
        }
    }
}

/// A key tile of a block: operands and sums.
struct KeyTile<'a> {
    k_t: &'a mut [f32],
    v_t: &'a mut [f32],
    k_n: &'a mut [f32],
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl<'a> KeyTile<'a> {
    fn carve(carver: &mut Carver<'a>, dims: AttentionDims) -> Self {
        let (transposed, sums) = (dims.transposed_elems(), dims.sums_elems());
        Self {
            k_t: carver.take(transposed),
            v_t: carver.take(transposed),
            k_n: carver.take(dims.natural_elems()),
            dk: carver.take(sums),
            dv: carver.take(sums),
        }
    }
}

/// The tiles of a row in blocks.
fn blocks(row: RowSpan) -> impl Iterator<Item = Range<usize>> {
    let n_tiles = row.n_tiles();
    (0..n_tiles)
        .step_by(TILES_PER_BLOCK)
        .map(move |start| start..(start + TILES_PER_BLOCK).min(n_tiles))
}

/// Block `block_idx`, counted over all rows.
fn find_block(rows: &[RowSpan], block_idx: usize) -> (RowSpan, Range<usize>) {
    rows.iter()
        .flat_map(|row| blocks(*row).map(|block| (*row, block)))
        .nth(block_idx)
        .expect("blocks are counted over the same rows")
}

tiered! {
    /// Turns scores `[query][key]` of tiles `distance` apart into probabilities and `dO v` into
    /// `ds`. `lse` of query `i` is
    /// at `i * lse.1`; queries beyond `delta` are padding and become zeros.
    fn score_gradients(
        p: &mut [f32],
        ds: &mut [f32],
        lse: (&[f32], usize),
        delta: &[f32],
        dims: AttentionDims,
        distance: usize,
    ) {
        let (scale, sight) = (dims.scale, dims.sight(distance));
        let rows = p.as_chunks_mut::<TILE>().0.iter_mut().zip(ds.as_chunks_mut::<TILE>().0);
        for (i, (p, ds)) in rows.enumerate() {
            let Some(&delta) = delta.get(i) else {
                p.fill(0.0);
                ds.fill(0.0);
                continue;
            };
            let lse = lse.0[i * lse.1];
            if let Some(cap) = dims.soft_cap {
                for (p, ds) in p.iter_mut().zip(&mut *ds) {
                    let t = tanh(*p * (scale / cap));
                    *p = softmax_term(t.mul_add(cap, -lse));
                    *ds = *p * (*ds - delta) * scale * (-t).mul_add(t, 1.0);
                }
            } else {
                for (p, ds) in p.iter_mut().zip(&mut *ds) {
                    *p = softmax_term(p.mul_add(scale, -lse));
                    *ds = *p * (*ds - delta) * scale;
                }
            }
            if sight.is_diagonal {
                p[i + 1..].fill(0.0);
                ds[i + 1..].fill(0.0);
            }
            if sight.is_cut() {
                p[..sight.first_key(i)].fill(0.0);
                ds[..sight.first_key(i)].fill(0.0);
            }
        }
    }
}

tiered! {
    fn dot(a: &[f32], b: &[f32]) -> f32 {
        lane_sum([a, b], |[a, b]| a * b)
    }
}
