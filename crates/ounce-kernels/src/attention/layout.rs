//! Where heads lie in memory, and how their tiles are packed.

use super::TILE;
use crate::gemm::MatRef;
use crate::gemm::pack::pack;
use crate::gemm::tile::{Panel, Tile};
use crate::pool::SharedMut;
use std::marker::PhantomData;
use std::ops::Range;

/// Elements of 64 tokens x 64 channels.
const CHUNK_ELEMS: usize = TILE * TILE;

/// One row: tokens `start .. start + len` of the token axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowSpan {
    /// First token.
    pub start: usize,
    /// Number of tokens.
    pub len: usize,
}

impl RowSpan {
    /// Number of tiles.
    pub(super) fn n_tiles(self) -> usize {
        self.len.div_ceil(TILE)
    }

    /// Tokens of tile `tile_idx`.
    pub(super) fn tile(self, tile_idx: usize) -> Range<usize> {
        let start = self.start + tile_idx * TILE;
        start..(start + TILE).min(self.start + self.len)
    }
}

/// Sizes of an attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionDims {
    /// H.
    pub n_heads: usize,
    /// K, a divisor of H; query head `h` reads key-value head `h / (H / K)`.
    pub n_kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Multiplies `q k`, usually `1 / sqrt(D)`; positive.
    pub scale: f32,
    /// Keys that a query sees, itself included; at least 1. `None` is all up to itself.
    pub window: Option<usize>,
    /// Scores `s` become `cap tanh(s / cap)`; positive.
    pub soft_cap: Option<f32>,
}

impl AttentionDims {
    /// Query heads per key-value head.
    pub(super) fn group(self) -> usize {
        self.n_heads / self.n_kv_heads
    }

    /// Elements of a natural tile: whole chunks of 64 tokens x 64 channels.
    pub(super) fn natural_elems(self) -> usize {
        self.head_dim.div_ceil(TILE) * CHUNK_ELEMS
    }

    /// Elements of 64 rows of sums, D apart.
    pub(super) fn sums_elems(self) -> usize {
        TILE * self.head_dim
    }

    /// Elements of a transposed tile.
    pub(super) fn transposed_elems(self) -> usize {
        self.head_dim * TILE
    }

    /// Tiles before its own that a query tile sees at least one key of.
    pub(super) fn tiles_back(self) -> usize {
        // The first query of a tile sees `window - 1` keys before its own tile.
        self.window.map_or(usize::MAX, |window| (window - 1).div_ceil(TILE))
    }

    /// The first key tile that query tile `i` sees.
    pub(super) fn first_key_tile(self, i: usize) -> usize {
        i.saturating_sub(self.tiles_back())
    }

    /// Query tiles that see a key of tile `j`, of the `n_tiles` of a row.
    pub(super) fn query_tiles(self, j: usize, n_tiles: usize) -> Range<usize> {
        j..n_tiles.min(j.saturating_add(self.tiles_back()).saturating_add(1))
    }

    /// What a query tile sees of the key tile `distance` tiles before it.
    pub(super) fn sight(self, distance: usize) -> Sight {
        let window = self.window.unwrap_or(usize::MAX);
        Sight {
            is_diagonal: distance == 0,
            // Query `q` sees key `k` while `64 distance + q - k < window`.
            hidden: (distance * TILE + TILE).saturating_sub(window).min(2 * TILE),
        }
    }

    /// # Panics
    /// If the sizes contradict each other, or spans descend, overlap or leave the token axis.
    pub(super) fn check(self, n_tokens: usize, rows: &[RowSpan]) {
        assert!(self.n_heads.is_multiple_of(self.n_kv_heads), "groups of heads are even: {self:?}");
        assert!(self.head_dim > 0 && self.scale > 0.0, "sizes and scale are positive: {self:?}");
        assert!(self.window != Some(0), "a query sees itself at least: {self:?}");
        assert!(self.soft_cap.is_none_or(|cap| cap > 0.0), "a soft cap is positive: {self:?}");
        let mut end = 0;
        for row in rows {
            assert!(end <= row.start, "rows ascend and do not overlap: {row:?} after {end}");
            end = row.start + row.len;
        }
        assert!(end <= n_tokens, "rows end at {end} of {n_tokens} tokens");
    }
}

/// Which keys of a tile the queries of a tile see.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Sight {
    /// Both tiles are the same tokens: a query sees no later key.
    pub(super) is_diagonal: bool,
    /// How far the window's edge has come in: query `q` does not see keys below `q + hidden - 63`.
    hidden: usize,
}

impl Sight {
    /// Whether keys are hidden by the window.
    pub(super) fn is_cut(self) -> bool {
        self.hidden > 0
    }

    /// Keys before this one are hidden from query `q` by the window.
    pub(super) fn first_key(self, q: usize) -> usize {
        (q + self.hidden).saturating_sub(TILE - 1).min(TILE)
    }

    /// Queries from this one on do not see key `k` because of the window.
    pub(super) fn end_query(self, k: usize) -> usize {
        (k + TILE).saturating_sub(self.hidden).min(TILE)
    }
}

/// Heads that are read: element (token, head, d) is
/// `data[token * row_stride + col_offset + head * D + d]`.
#[derive(Clone, Copy, Debug)]
pub struct HeadsRef<'a> {
    /// The matrix of which the heads are columns.
    pub data: &'a [f32],
    /// Elements from one token to the next.
    pub row_stride: usize,
    /// Column of head 0.
    pub col_offset: usize,
}

impl<'a> HeadsRef<'a> {
    /// Dense heads (N, heads, D).
    pub fn dense(data: &'a [f32], n_heads: usize, head_dim: usize) -> Self {
        Self { data, row_stride: n_heads * head_dim, col_offset: 0 }
    }

    /// Tokens x channels of one head.
    fn matrix(&self, tokens: Range<usize>, head: usize, head_dim: usize) -> MatRef<'a> {
        let at = tokens.start * self.row_stride + self.col_offset + head * head_dim;
        MatRef::with_stride(&self.data[at..], tokens.len(), head_dim, self.row_stride)
    }

    /// Writes a transposed tile; tokens beyond it are zeros.
    pub(super) fn pack_transposed(
        &self,
        dst: &mut [f32],
        tokens: Range<usize>,
        head: usize,
        head_dim: usize,
    ) {
        let src = self.matrix(tokens.clone(), head, head_dim);
        pack(dst, src, 0..tokens.len(), 0..head_dim, TILE);
    }

    /// Writes a natural tile; tokens and channels beyond it are zeros.
    pub(super) fn pack_natural(
        &self,
        dst: &mut [f32],
        tokens: Range<usize>,
        head: usize,
        head_dim: usize,
    ) {
        for (chunk, dst) in dst.chunks_exact_mut(CHUNK_ELEMS).enumerate() {
            let (used, rest) = dst.as_chunks_mut::<TILE>().0.split_at_mut(tokens.len());
            for (dst, token) in used.iter_mut().zip(tokens.clone()) {
                let src = &self.row(token, head, head_dim)[chunk * TILE..];
                if let Some((src, _)) = src.split_first_chunk::<TILE>() {
                    *dst = *src;
                } else {
                    dst[..src.len()].copy_from_slice(src);
                    dst[src.len()..].fill(0.0);
                }
            }
            rest.as_flattened_mut().fill(0.0);
        }
    }

    #[inline(always)]
    pub(super) fn row(&self, token: usize, head: usize, head_dim: usize) -> &'a [f32] {
        &self.data[token * self.row_stride + self.col_offset + head * head_dim..][..head_dim]
    }
}

/// Heads that are written, laid out as in [`HeadsRef`].
#[derive(Debug)]
pub struct HeadsMut<'a> {
    ptr: *mut f32,
    len: usize,
    pub(super) row_stride: usize,
    col_offset: usize,
    /// Columns from `col_offset` on that are ours.
    width: usize,
    life: PhantomData<&'a mut [f32]>,
}

// SAFETY: as `&mut [f32]`, of which this is a set of columns that nobody else holds.
unsafe impl Send for HeadsMut<'_> {}
// SAFETY: threads write through `rows_ptr`, whose callers promise disjoint rows.
unsafe impl Sync for HeadsMut<'_> {}

impl<'a> HeadsMut<'a> {
    /// Dense heads (N, heads, D).
    pub fn dense(data: &'a mut [f32], n_heads: usize, head_dim: usize) -> Self {
        Self::new(data, n_heads * head_dim, 0)
    }

    /// Heads that are columns of `data` from `col_offset` to the end of a row.
    ///
    /// # Panics
    /// If the offset lies beyond a row.
    pub fn new(data: &'a mut [f32], row_stride: usize, col_offset: usize) -> Self {
        assert!(col_offset <= row_stride, "column {col_offset} lies within a row of {row_stride}");
        let (ptr, len, width) = (data.as_mut_ptr(), data.len(), row_stride - col_offset);
        Self { ptr, len, row_stride, col_offset, width, life: PhantomData }
    }

    /// Three column ranges `[offset, offset + width)` of one matrix: `dq`, `dk`, `dv` in `dqkv`.
    ///
    /// # Panics
    /// If the ranges overlap or leave a row.
    pub fn packed(
        data: &'a mut [f32],
        row_stride: usize,
        offsets: [usize; 3],
        widths: [usize; 3],
    ) -> [Self; 3] {
        for i in 0..3 {
            assert!(offsets[i] + widths[i] <= row_stride, "columns {i} lie within a row");
            for j in 0..i {
                let apart =
                    offsets[i] + widths[i] <= offsets[j] || offsets[j] + widths[j] <= offsets[i];
                assert!(apart, "columns {i} and {j} do not overlap");
            }
        }
        let (ptr, len) = (data.as_mut_ptr(), data.len());
        [0, 1, 2].map(|i| Self {
            ptr,
            len,
            row_stride,
            col_offset: offsets[i],
            width: widths[i],
            life: PhantomData,
        })
    }

    /// # Panics
    /// If `n_tokens` rows of `n_heads` heads do not fit.
    pub(super) fn check(&self, n_tokens: usize, n_heads: usize, head_dim: usize) {
        assert!(n_heads * head_dim <= self.width, "{n_heads} heads fit {} columns", self.width);
        let end = (n_tokens * self.row_stride + self.col_offset + n_heads * head_dim)
            .saturating_sub(self.row_stride);
        assert!(n_tokens == 0 || end <= self.len, "heads end at {end} of {}", self.len);
    }

    /// Pointer to channel 0 of a head of a token. In bounds for what [`Self::check`] accepted.
    pub(super) fn at(&self, token: usize, head: usize, head_dim: usize) -> *mut f32 {
        self.ptr.wrapping_add(token * self.row_stride + self.col_offset + head * head_dim)
    }

    /// One head of one token.
    ///
    /// # Safety
    /// [`Self::check`] accepted the sizes, and no two live rows are the same.
    #[expect(clippy::mut_from_ref, reason = "handing out disjoint rows is this type's purpose")]
    pub(super) unsafe fn row(&self, token: usize, head: usize, head_dim: usize) -> &mut [f32] {
        // SAFETY: in bounds and exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.at(token, head, head_dim), head_dim) }
    }
}

/// What a product of tiles may leave out when both are the same tokens, so that half of the scores
/// are masked. What is left out is stale (scores) or a sum with zeros (the others).
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Part {
    /// Nothing.
    All,
    /// Elements of `c` right of the diagonal.
    LowerScores,
    /// Elements of `c` left of the diagonal.
    UpperScores,
    /// Row `i` needs depths up to `i`.
    DepthUpToRow,
    /// Row `i` needs depths from `i` on.
    DepthFromRow,
}

impl Part {
    /// `self` on the diagonal, else everything.
    pub(super) fn if_diagonal(self, is_diagonal: bool) -> Self {
        if is_diagonal { self } else { Part::All }
    }
}

/// Scores: `c` (64, 64) `= left^T right` over channels, of a natural and a transposed tile.
pub(super) fn scores(
    tile: &Tile,
    head_dim: usize,
    left: &[f32],
    right: &[f32],
    c: &mut [f32],
    part: Part,
) {
    assert!(left.len() >= head_dim * TILE && right.len() >= head_dim * TILE, "operands are tiles");
    assert!(c.len() >= TILE * TILE, "c is a tile");
    for (chunk, depth) in chunks(head_dim) {
        let left = Panel::rows_of_64(left[chunk * CHUNK_ELEMS..].as_ptr());
        let right = Panel::new(right[chunk * CHUNK_ELEMS..].as_ptr(), TILE);
        let size = (TILE, TILE);
        // SAFETY: all three are whole tiles by the assertions.
        unsafe {
            product(tile, depth, left, right, (c.as_mut_ptr(), TILE), size, chunk > 0, part);
        }
    }
}

/// Sums over tokens: `c` (height, D) `= left right` or `c + left right`, `left` (64, 64) a tile of
/// scores and `right` a natural tile.
///
/// # Safety
/// Rows `..height`, `c_stride` apart, of `c` are D wide and exclusively ours.
pub(super) unsafe fn weighted_sum(
    tile: &Tile,
    head_dim: usize,
    left: Panel,
    right: &[f32],
    (c, c_stride): (*mut f32, usize),
    height: usize,
    from_c: bool,
    part: Part,
) {
    for (chunk, cols) in chunks(head_dim) {
        let right = Panel::new(right[chunk * CHUNK_ELEMS..][..CHUNK_ELEMS].as_ptr(), TILE);
        let c = (c.wrapping_add(chunk * TILE), c_stride);
        // SAFETY: `right` is a whole chunk; `c` is promised by the caller.
        unsafe { product(tile, TILE, left, right, c, (height, cols), from_c, part) };
    }
}

/// `(index, width)` of the chunks of 64 channels.
fn chunks(head_dim: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..head_dim.div_ceil(TILE)).map(move |chunk| (chunk, TILE.min(head_dim - chunk * TILE)))
}

/// `c = left right` or `c + left right`: `left` (64, depth), `right` (depth, cols), cols <= 64.
///
/// # Safety
/// `left` has 64 rows and `right` 64 columns at every depth; rows `..height` and columns `..cols`
/// of `c` are exclusively ours.
unsafe fn product(
    tile: &Tile,
    depth: usize,
    left: Panel,
    right: Panel,
    (c, c_stride): (*mut f32, usize),
    (height, cols): (usize, usize),
    from_c: bool,
    part: Part,
) {
    let Tile { mr, nr, .. } = *tile;
    for j in (0..cols).step_by(nr) {
        for i in (0..height).step_by(mr) {
            let (first, end) = match part {
                Part::LowerScores if j >= i + mr => continue,
                Part::UpperScores if i >= j + nr => continue,
                Part::DepthUpToRow => (0, depth.min(i + mr)),
                Part::DepthFromRow => (i, depth),
                _ => (0, depth),
            };
            let (tall, wide) = (mr.min(height - i), nr.min(cols - j));
            let (a, b) = (left.from(i, first), right.from(j, first));
            // SAFETY: `i` and `j` stay within the operands that the caller promised, and register
            // tiles divide 64, so a full one exists also at an edge of `c`.
            unsafe {
                let c = c.add(i * c_stride + j);
                tile.run(end - first, a, b, c, c_stride, tall, wide, from_c);
            }
        }
    }
}

/// Deals the start of one thread's scratch out in pieces.
pub(super) struct Carver<'a> {
    rest: &'a mut [f32],
}

impl<'a> Carver<'a> {
    /// Thread `thread_idx`'s share of `per_thread` elements.
    ///
    /// # Safety
    /// Every thread index is used by one thread at a time.
    pub(super) unsafe fn new(
        scratch: &'a SharedMut<'_, f32>,
        per_thread: usize,
        thread_idx: usize,
    ) -> Self {
        let at = thread_idx * per_thread;
        // SAFETY: the caller's promise.
        Self { rest: unsafe { scratch.range(at..at + per_thread) } }
    }

    /// The next `n` elements.
    pub(super) fn take(&mut self, n: usize) -> &'a mut [f32] {
        let (piece, rest) = std::mem::take(&mut self.rest).split_at_mut(n);
        self.rest = rest;
        piece
    }
}
