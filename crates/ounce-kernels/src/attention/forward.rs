//! Attention forward: online softmax (`[Milakov18]`) over ascending key tiles.
//!
//! Scores are kept transposed, `s[key][query]`: maxima, exponentials and sums then run along
//! queries, one vector lane each, and the probabilities are already the left operand of `p v`.

use super::layout::{Carver, Part, Sight, Weights, gaps, scores, weighted_sum};
use super::{AttentionDims, HeadsMut, HeadsRef, RowSpan, TILE, TILES_PER_BLOCK};
use crate::gemm::tile::Tile;
use crate::gemm::{ALIGN_ELEMS, aligned};
use crate::math::{softmax_term, tanh};
use crate::pool::{Pool, SharedMut};
use crate::view::ViewMut;
use std::ops::Range;

/// Channels of query tiles that share one packing of keys and values: 16 tiles of 64. With their
/// outputs they take half a MiB, well within a second cache.
const CHANNELS_PER_BLOCK: usize = 1024;
/// Blocks that each thread should get at least, so that all end at nearly the same time.
const BLOCKS_PER_THREAD: usize = 4;

/// The most query tiles in a block.
fn max_tiles_per_block(dims: AttentionDims) -> usize {
    (CHANNELS_PER_BLOCK / dims.head_dim).max(TILES_PER_BLOCK)
}

/// Query tiles in a block; whatever it is, the bits are the same.
fn tiles_per_block(rows: &[RowSpan], dims: AttentionDims, n_threads: usize) -> usize {
    let n_tiles = dims.n_heads * rows.iter().map(|row| row.n_tiles()).sum::<usize>();
    (n_tiles / (BLOCKS_PER_THREAD * n_threads)).clamp(1, max_tiles_per_block(dims))
}

/// Elements of one thread's scratch: a block of queries and outputs with (maximum, sum) of every
/// query; one tile of keys, values and scores, and one factor per query.
fn per_thread_elems(dims: AttentionDims) -> usize {
    let per_tile = dims.transposed_elems() + dims.sums_elems() + 2 * TILE;
    max_tiles_per_block(dims) * per_tile + 2 * dims.natural_elems() + TILE * TILE + TILE
}

/// Scratch of [`attention_forward`] in elements.
pub fn attention_forward_scratch_elems(dims: AttentionDims, n_threads: usize) -> usize {
    n_threads * per_thread_elems(dims) + ALIGN_ELEMS
}

/// Where running maxima start: at the lowest number, but finite, so that a query that sees no key of a
/// tile gets zeros and not the exponential of a difference of infinities.
const LOWEST: f32 = f32::MIN;

/// `o = softmax(scale q k^T, causal) v` per row and head, and `lse = log(sum(exp(scale q k)))`,
/// within the window and with softly capped scores if `dims` has them.
///
/// # Shapes
/// `o` (N, H, D), `lse` (N, H), `q` (N, H, D), `k`, `v` (N, K, D). `rows` ascend and do not
/// overlap; tokens outside of them get zeros.
/// # Memory
/// [`attention_forward_scratch_elems`] elements.
pub fn attention_forward(
    pool: &Pool,
    mut o: ViewMut<'_>,
    lse: &mut [f32],
    q: HeadsRef<'_>,
    k: HeadsRef<'_>,
    v: HeadsRef<'_>,
    rows: &[RowSpan],
    dims: AttentionDims,
    scratch: &mut [f32],
) {
    let AttentionDims { n_heads, head_dim, .. } = dims;
    let n_tokens = lse.len() / n_heads;
    assert_eq!(lse.len(), n_tokens * n_heads, "lse is whole tokens");
    assert_eq!(o.len(), lse.len() * head_dim, "length of o");
    dims.check(n_tokens, rows);
    let needed = attention_forward_scratch_elems(dims, pool.n_threads());
    assert!(scratch.len() >= needed, "attention scratch: {} of {needed} elements", scratch.len());
    for gap in gaps(rows, n_tokens) {
        let width = n_heads * head_dim;
        o.reborrow().slice(gap.start * width..gap.end * width).zero();
        lse[gap.start * n_heads..gap.end * n_heads].fill(0.0);
    }
    let job = Forward {
        tile: Tile::dividing_64(),
        o: HeadsMut::dense(o, n_heads, head_dim),
        lse: SharedMut::new(lse),
        scratch: SharedMut::new(aligned(scratch)),
        q,
        k,
        v,
        dims,
    };
    let block_tiles = tiles_per_block(rows, dims, pool.n_threads());
    let blocks_of = |row: &RowSpan| row.n_tiles().div_ceil(block_tiles);
    let n_blocks: usize = rows.iter().map(blocks_of).sum();
    pool.run_items(n_blocks * n_heads, |thread_idx, item| {
        // Late blocks of a row see the most keys; they come first.
        let (mut block, head) = (n_blocks - 1 - item / n_heads, item % n_heads);
        for row in rows {
            if block < blocks_of(row) {
                let first = block * block_tiles;
                let tiles = first..(first + block_tiles).min(row.n_tiles());
                return job.block(*row, head, tiles, thread_idx);
            }
            block -= blocks_of(row);
        }
    });
}

struct Forward<'a> {
    tile: Tile,
    o: HeadsMut<'a>,
    lse: SharedMut<'a, f32>,
    scratch: SharedMut<'a, f32>,
    q: HeadsRef<'a>,
    k: HeadsRef<'a>,
    v: HeadsRef<'a>,
    dims: AttentionDims,
}

impl Forward<'_> {
    /// Outputs of one head for a block of query tiles.
    fn block(&self, row: RowSpan, head: usize, tiles: Range<usize>, thread_idx: usize) {
        let AttentionDims { head_dim: d, scale, soft_cap, .. } = self.dims;
        let kv_head = head / self.dims.group();
        // SAFETY: a thread works on one block at a time.
        let mut carver =
            unsafe { Carver::new(&self.scratch, per_thread_elems(self.dims), thread_idx) };
        let (first, last, n_tiles) = (tiles.start, tiles.end, tiles.len());
        let q_block = carver.take(n_tiles * d * TILE);
        let o_block = carver.take(n_tiles * d * TILE);
        let stats = carver.take(n_tiles * 2 * TILE);
        let k_tile = carver.take(self.dims.natural_elems());
        let v_tile = carver.take(self.dims.natural_elems());
        let (s, factor) = (carver.take(TILE * TILE), carver.take(TILE));
        for (q_tile, i) in q_block.chunks_exact_mut(d * TILE).zip(first..last) {
            self.q.pack_transposed(q_tile, row.tile(i), head, d);
        }
        for j in self.dims.first_key_tile(first)..last {
            self.k.pack_natural(k_tile, row.tile(j), kv_head, d);
            self.v.pack_natural(v_tile, row.tile(j), kv_head, d);
            let seeing = self.dims.query_tiles(j, last);
            for i in first.max(seeing.start)..seeing.end {
                let at = i - first;
                let is_first = j == self.dims.first_key_tile(i);
                let q_tile = &q_block[at * d * TILE..][..d * TILE];
                let o_tile = &mut o_block[at * d * TILE..][..d * TILE];
                let (max, sum) = stats[at * 2 * TILE..][..2 * TILE].split_at_mut(TILE);
                let part = Part::UpperScores.if_diagonal(i == j);
                scores(&self.tile, d, k_tile, q_tile, s, part);
                let scale = match soft_cap {
                    Some(cap) => {
                        cap_scores(s, scale, cap);
                        1.0
                    }
                    None => scale,
                };
                online_softmax(s, max, sum, factor, scale, is_first, self.dims.sight(i - j));
                if !is_first {
                    scale_rows(o_tile, factor, d);
                }
                let part = Part::DepthUpToRow.if_diagonal(i == j);
                weighted_sum(&self.tile, d, Weights::ByDepth(s), v_tile, o_tile, !is_first, part);
            }
        }
        for i in first..last {
            let o_tile = &mut o_block[(i - first) * d * TILE..][..d * TILE];
            let stats = stats[(i - first) * 2 * TILE..][..2 * TILE].split_at(TILE);
            self.store(row.tile(i), head, o_tile, stats);
        }
    }

    /// Divides the outputs of a tile by their sums and stores them.
    fn store(
        &self,
        tokens: Range<usize>,
        head: usize,
        o: &mut [f32],
        (max, sum): (&[f32], &[f32]),
    ) {
        let (h, d) = (self.dims.n_heads, self.dims.head_dim);
        let mut inverse = [0.0; TILE];
        for (inverse, sum) in inverse.iter_mut().zip(sum) {
            *inverse = 1.0 / sum;
        }
        scale_rows(o, &inverse, d);
        for (token, (max, sum)) in tokens.clone().zip(max.iter().zip(sum)) {
            let at = token * h + head;
            // SAFETY: a (token, head) belongs to one block and so to one thread.
            let lse = unsafe { self.lse.range(at..at + 1) };
            lse[0] = max + libm::logf(*sum);
        }
        // SAFETY: as above, and `o` is `n_heads` heads wide.
        unsafe { self.o.store(tokens, head, d, o) };
    }
}

tiered! {
    /// Folds a tile of scores `[key][query]` into each query's (max, sum), and replaces the scores
    /// by `exp(scale s - max)`. `factor` is what older sums and outputs must be multiplied by.
    fn online_softmax(
        scores: &mut [f32],
        max: &mut [f32],
        sum: &mut [f32],
        factor: &mut [f32],
        scale: f32,
        is_first: bool,
        sight: Sight,
    ) {
        let scores = scores.as_chunks_mut::<TILE>().0;
        if sight.is_diagonal {
            for (key, row) in scores.iter_mut().enumerate() {
                row[..key].fill(f32::NEG_INFINITY);
            }
        }
        if sight.is_cut() {
            for (key, row) in scores.iter_mut().enumerate() {
                row[sight.end_query(key)..].fill(f32::NEG_INFINITY);
            }
        }
        let mut tile_max = [f32::NEG_INFINITY; TILE];
        for row in scores.iter() {
            for (max, &s) in tile_max.iter_mut().zip(row) {
                *max = if s > *max { s } else { *max };
            }
        }
        let mut new_sum = [0.0f32; TILE];
        let (max, sum, factor) = (&mut max[..TILE], &mut sum[..TILE], &mut factor[..TILE]);
        for i in 0..TILE {
            let tile_max = tile_max[i] * scale;
            let old = if is_first { LOWEST } else { max[i] };
            max[i] = if tile_max > old { tile_max } else { old };
            factor[i] = softmax_term(old - max[i]);
            new_sum[i] = if is_first { 0.0 } else { sum[i] * factor[i] };
        }
        for row in scores {
            for ((s, &max), sum) in row.iter_mut().zip(&*max).zip(&mut new_sum) {
                // Rounded as the maximum was, so that its own term is 1, however large the scores are.
                *s = softmax_term(*s * scale - max);
                *sum += *s;
            }
        }
        sum.copy_from_slice(&new_sum);
    }
}

tiered! {
    fn cap_scores(scores: &mut [f32], scale: f32, cap: f32) {
        let factor = scale / cap;
        for s in scores {
            *s = cap * tanh(*s * factor);
        }
    }
}

tiered! {
    /// Multiplies row by row; a factor of one, the usual one once a maximum is found, costs nothing.
    fn scale_rows(x: &mut [f32], factor: &[f32], stride: usize) {
        for (row, &factor) in x.chunks_exact_mut(stride).zip(factor) {
            if factor == 1.0 {
                continue;
            }
            for x in row {
                *x *= factor;
            }
        }
    }
}
