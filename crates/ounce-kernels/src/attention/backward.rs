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
//!
//! Sums live in scratch as f32 and are stored once: `dq` of a query head when its last key block is
//! done, `dk` and `dv` of a key tile when the last head of the group has been added. So gradients of
//! 16 bits are the rounded gradients of f32.

use super::layout::{Carver, Part, Weights, gaps, scores, weighted_sum};
use super::{AttentionDims, HeadsMut, HeadsRef, RowSpan, TILE, TILES_PER_BLOCK};
use crate::gemm::tile::Tile;
use crate::gemm::{ALIGN_ELEMS, aligned};
use crate::math::{LANES, add_to_lanes, fold_lanes, softmax_term, tanh};
use crate::pool::{Pool, SharedMut};
use crate::view::View;
use std::ops::Range;

/// Scratch of [`attention_backward`] in elements: per thread a block of keys and values with their
/// gradients, one tile of queries and output gradients, two tiles of scores, and `dq` of one head
/// (with grouped heads also `dk` and `dv`) of a row as long as all `n_tokens`.
pub fn attention_backward_scratch_elems(
    dims: AttentionDims,
    n_tokens: usize,
    n_threads: usize,
) -> usize {
    n_threads * per_thread_elems(dims, n_tokens.div_ceil(TILE)) + ALIGN_ELEMS
}

/// Elements of one thread's scratch for rows of at most `n_tiles` tiles.
fn per_thread_elems(dims: AttentionDims, n_tiles: usize) -> usize {
    let (transposed, natural) = (dims.transposed_elems(), dims.natural_elems());
    TILES_PER_BLOCK * (2 * transposed + natural + 2 * dims.sums_elems())
        + 2 * natural
        + 2 * TILE * TILE
        + TILE
        + n_tiles * (dims.sums_elems() + 2 * group_sums_elems(dims))
}

/// Elements of the sum of `dk` or `dv` over the heads of a group, per key tile. A head that is alone
/// needs none.
fn group_sums_elems(dims: AttentionDims) -> usize {
    if dims.group() > 1 { dims.sums_elems() } else { 0 }
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
    d_o: View<'_>,
    q: HeadsRef<'_>,
    k: HeadsRef<'_>,
    v: HeadsRef<'_>,
    o: View<'_>,
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
    let needed = attention_backward_scratch_elems(dims, n_tokens, pool.n_threads());
    assert!(scratch.len() >= needed, "attention scratch: {} of {needed} elements", scratch.len());
    let outputs = [(&dq, n_heads), (&dk, n_kv_heads), (&dv, n_kv_heads)];
    for (heads, n_heads) in outputs {
        heads.check(n_heads, head_dim);
        for gap in gaps(rows, n_tokens) {
            // SAFETY: no thread runs yet.
            unsafe { heads.zero(gap, n_heads, head_dim) };
        }
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
        n_tiles: rows.iter().map(|row| row.n_tiles()).max().unwrap_or(0),
        scratch: SharedMut::new(aligned(scratch)),
    };
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
    /// Of the longest row.
    n_tiles: usize,
    scratch: SharedMut<'a, f32>,
}

impl Backward<'_> {
    /// A thread owns a key-value head of a row with all its query heads.
    fn one_pass(&self, pool: &Pool, rows: &[RowSpan]) {
        let n_kv_heads = self.dims.n_kv_heads;
        pool.run_items(rows.len() * n_kv_heads, |thread_idx, item| {
            let (row, kv_head) = (rows[item / n_kv_heads], item % n_kv_heads);
            let queries = 0..row.n_tiles();
            let mut work = self.workspace(thread_idx);
            for head in self.heads_of(kv_head) {
                for keys in blocks(row) {
                    self.block(row, head, &keys, &queries, Want::All, &mut work);
                    self.end_keys(row, head, &keys, 0, &mut work);
                }
                self.end_queries(row, head, &queries, &work);
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
            let mut work = self.workspace(thread_idx);
            for head in self.heads_of(item % n_kv_heads) {
                self.block(row, head, &keys, &queries, Want::KeysValues, &mut work);
                self.end_keys(row, head, &keys, keys.start, &mut work);
            }
        });
        pool.run_items(n_blocks * n_heads, |thread_idx, item| {
            let (row, queries) = find_block(rows, n_blocks - 1 - item / n_heads);
            let (head, first) = (item % n_heads, self.dims.first_key_tile(queries.start));
            let mut work = self.workspace(thread_idx);
            for keys in blocks(row).filter(|k| k.start < queries.end && k.end > first) {
                self.block(row, head, &keys, &queries, Want::Queries, &mut work);
            }
            self.end_queries(row, head, &queries, &work);
        });
    }

    fn heads_of(&self, kv_head: usize) -> Range<usize> {
        kv_head * self.dims.group()..(kv_head + 1) * self.dims.group()
    }

    fn workspace(&self, thread_idx: usize) -> Workspace<'_> {
        let per_thread = per_thread_elems(self.dims, self.n_tiles);
        // SAFETY: a thread works on one item at a time.
        let mut carver = unsafe { Carver::new(&self.scratch, per_thread, thread_idx) };
        Workspace::carve(&mut carver, self.dims, self.n_tiles)
    }

    /// The contributions of one query head between a block of key tiles and a range of query tiles.
    /// Those to `dq` are added to what earlier blocks of keys gave.
    fn block(
        &self,
        row: RowSpan,
        head: usize,
        keys: &Range<usize>,
        queries: &Range<usize>,
        want: Want,
        work: &mut Workspace<'_>,
    ) {
        let (d, kv_head) = (self.dims.head_dim, head / self.dims.group());
        for (tile, j) in work.key_tiles.iter_mut().zip(keys.clone()) {
            self.k.pack_transposed(tile.k_t, row.tile(j), kv_head, d);
            self.v.pack_transposed(tile.v_t, row.tile(j), kv_head, d);
            self.k.pack_natural(tile.k_n, row.tile(j), kv_head, d);
        }
        let seeing = self.dims.query_tiles(keys.end - 1, queries.end);
        for i in queries.start.max(keys.start)..seeing.end {
            let tokens = row.tile(i);
            // Where q will be, o may wait.
            self.o.pack_natural(work.q_n, tokens.clone(), head, d);
            self.d_o.pack_natural(work.do_n, tokens.clone(), head, d);
            row_dots(work.delta, work.do_n, work.q_n);
            self.q.pack_natural(work.q_n, tokens.clone(), head, d);
            let seen = keys.start.max(self.dims.first_key_tile(i))..keys.end.min(i + 1);
            for j in seen {
                self.pair(
                    head,
                    tokens.clone(),
                    (i, i - queries.start),
                    (j, j - keys.start),
                    want,
                    work,
                );
            }
        }
    }

    /// The contributions between query tile `i` (of `tokens`) and key tile `j`. The second of each
    /// pair is its place in the range of query tiles and in the block of key tiles.
    fn pair(
        &self,
        head: usize,
        tokens: Range<usize>,
        (i, i_at): (usize, usize),
        (j, j_at): (usize, usize),
        want: Want,
        work: &mut Workspace<'_>,
    ) {
        let d = self.dims.head_dim;
        let Workspace { key_tiles, q_n, do_n, p, ds, delta, dq, .. } = work;
        let tile = &mut key_tiles[j_at];
        let part = Part::LowerScores.if_diagonal(i == j);
        scores(&self.tile, d, q_n, tile.k_t, p, part);
        scores(&self.tile, d, do_n, tile.v_t, ds, part);
        let lse = (&self.lse[tokens.start * self.dims.n_heads + head..], self.dims.n_heads);
        score_gradients(p, ds, lse, &delta[..tokens.len()], self.dims, i - j);
        if want != Want::Queries {
            let part = Part::DepthFromRow.if_diagonal(i == j);
            weighted_sum(&self.tile, d, Weights::ByDepth(p), do_n, tile.dv, i > j, part);
            weighted_sum(&self.tile, d, Weights::ByDepth(ds), q_n, tile.dk, i > j, part);
        }
        if want != Want::KeysValues {
            let part = Part::DepthUpToRow.if_diagonal(i == j);
            let dq = &mut dq[i_at * self.dims.sums_elems()..];
            let from_c = j > self.dims.first_key_tile(i);
            weighted_sum(&self.tile, d, Weights::ByRows(ds), tile.k_n, dq, from_c, part);
        }
    }

    /// Adds a head's gradients of a block of keys to those of the heads of the group before it, and
    /// stores them after the last. The group's sums begin at key tile `first`.
    fn end_keys(
        &self,
        row: RowSpan,
        head: usize,
        keys: &Range<usize>,
        first: usize,
        work: &mut Workspace<'_>,
    ) {
        let (d, group, n) = (self.dims.head_dim, self.dims.group(), self.dims.sums_elems());
        let Workspace { key_tiles, dk, dv, .. } = work;
        for (tile, j) in key_tiles.iter_mut().zip(keys.clone()) {
            let sums = (j - first) * n..(j - first + 1) * n;
            for (out, of_head, of_group) in
                [(&self.dk, &mut *tile.dk, &mut *dk), (&self.dv, &mut *tile.dv, &mut *dv)]
            {
                let mut sum = of_head;
                if group > 1 {
                    let of_group = &mut of_group[sums.clone()];
                    add_head(of_group, sum, head.is_multiple_of(group));
                    sum = of_group;
                }
                if (head + 1).is_multiple_of(group) {
                    // SAFETY: the tokens of this key-value head belong to this thread's item, and
                    // `check` accepted the sizes.
                    unsafe { out.store(row.tile(j), head / group, d, sum) };
                }
            }
        }
    }

    /// Stores a head's gradients of query tiles.
    fn end_queries(&self, row: RowSpan, head: usize, queries: &Range<usize>, work: &Workspace<'_>) {
        let tiles = work.dq.chunks_exact(self.dims.sums_elems());
        for (i, sums) in queries.clone().zip(tiles) {
            // SAFETY: the tokens of this head belong to this thread's item, and `check` accepted
            // the sizes.
            unsafe { self.dq.store(row.tile(i), head, self.dims.head_dim, sums) };
        }
    }
}

/// Adds sums of a head to those of its group, or begins them.
fn add_head(of_group: &mut [f32], of_head: &[f32], is_first: bool) {
    if is_first {
        of_group.copy_from_slice(of_head);
    } else {
        for (sum, x) in of_group.iter_mut().zip(of_head) {
            *sum += x;
        }
    }
}

/// What a thread works with.
struct Workspace<'a> {
    key_tiles: [KeyTile<'a>; TILES_PER_BLOCK],
    q_n: &'a mut [f32],
    do_n: &'a mut [f32],
    p: &'a mut [f32],
    ds: &'a mut [f32],
    delta: &'a mut [f32],
    /// Sums of a head, tile by tile.
    dq: &'a mut [f32],
    /// Sums of a group of more than one head, tile by tile.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl<'a> Workspace<'a> {
    fn carve(carver: &mut Carver<'a>, dims: AttentionDims, n_tiles: usize) -> Self {
        let natural = dims.natural_elems();
        Self {
            key_tiles: std::array::from_fn(|_| KeyTile::carve(carver, dims)),
            q_n: carver.take(natural),
            do_n: carver.take(natural),
            p: carver.take(TILE * TILE),
            ds: carver.take(TILE * TILE),
            delta: carver.take(TILE),
            dq: carver.take(n_tiles * dims.sums_elems()),
            dk: carver.take(n_tiles * group_sums_elems(dims)),
            dv: carver.take(n_tiles * group_sums_elems(dims)),
        }
    }
}

/// A key tile of a block: operands, and sums of one head.
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
                    *p = softmax_term(*p * scale - lse);
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
    /// `a . b` of every token of two natural tiles.
    fn row_dots(dots: &mut [f32], a: &[f32], b: &[f32]) {
        let (a, b) = (a.as_chunks::<TILE>().0, b.as_chunks::<TILE>().0);
        for (token, dot) in dots[..TILE].iter_mut().enumerate() {
            let mut lanes = [0.0; LANES];
            // The channels of a token are rows of one chunk after another.
            for (a, b) in a[token..].iter().zip(&b[token..]).step_by(TILE) {
                add_to_lanes(&mut lanes, [a, b], |[a, b]| a * b);
            }
            *dot = fold_lanes(lanes, |a, b| a + b);
        }
    }
}
