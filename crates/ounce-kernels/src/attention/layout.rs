//! Where heads lie in memory, and how their tiles are packed.

use super::TILE;
use crate::gemm::MatRef;
use crate::gemm::pack::pack;
use crate::gemm::tile::{Panel, Tile};
use crate::pool::SharedMut;
use crate::view::{SharedViewMut, View, ViewMut};
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

/// The tokens that no row covers.
pub(super) fn gaps(rows: &[RowSpan], n_tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let mut end = 0;
    let starts = rows.iter().map(|row| (row.start, row.start + row.len));
    starts.chain([(n_tokens, n_tokens)]).map(move |(start, next)| {
        let gap = end..start;
        end = next;
        gap
    })
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
    pub data: View<'a>,
    /// Elements from one token to the next.
    pub row_stride: usize,
    /// Column of head 0.
    pub col_offset: usize,
}

impl<'a> HeadsRef<'a> {
    /// Dense heads (N, heads, D).
    pub fn dense(data: impl Into<View<'a>>, n_heads: usize, head_dim: usize) -> Self {
        Self { data: data.into(), row_stride: n_heads * head_dim, col_offset: 0 }
    }

    /// Tokens x channels of one head.
    fn matrix(&self, tokens: Range<usize>, head: usize, head_dim: usize) -> MatRef<'a> {
        let at = tokens.start * self.row_stride + self.col_offset + head * head_dim;
        let data = self.data.slice(at..self.data.len());
        MatRef::with_stride(data, tokens.len(), head_dim, self.row_stride)
    }

    /// Writes a transposed tile; tokens beyond it are zeros.
    pub(super) fn pack_transposed(
        &self,
        dst: &mut [f32],
        tokens: Range<usize>,
        head: usize,
        head_dim: usize,
    ) {
        let n_tokens = tokens.len();
        pack(dst, self.matrix(tokens, head, head_dim), 0..n_tokens, 0..head_dim, TILE);
    }

    /// Writes a natural tile; tokens and channels beyond it are zeros.
    pub(super) fn pack_natural(
        &self,
        dst: &mut [f32],
        tokens: Range<usize>,
        head: usize,
        head_dim: usize,
    ) {
        let n_tokens = tokens.len();
        let channels_by_tokens = self.matrix(tokens, head, head_dim).t();
        for ((chunk, width), dst) in chunks(head_dim).zip(dst.chunks_exact_mut(CHUNK_ELEMS)) {
            let channels = chunk * TILE..chunk * TILE + width;
            pack(dst, channels_by_tokens, channels, 0..n_tokens, TILE);
            dst[n_tokens * TILE..].fill(0.0);
        }
    }
}

/// Heads that are written, laid out as in [`HeadsRef`].
pub struct HeadsMut<'a> {
    data: SharedViewMut<'a>,
    row_stride: usize,
    col_offset: usize,
    /// Columns from `col_offset` on that are ours.
    width: usize,
}

impl<'a> HeadsMut<'a> {
    /// Dense heads (N, heads, D).
    pub fn dense(data: impl Into<ViewMut<'a>>, n_heads: usize, head_dim: usize) -> Self {
        let width = n_heads * head_dim;
        let data = SharedViewMut::new(data.into());
        Self { data, row_stride: width, col_offset: 0, width }
    }

    /// Three column ranges `[offset, offset + width)` of one matrix: `dq`, `dk`, `dv` in `dqkv`.
    ///
    /// # Panics
    /// If the ranges overlap or leave a row.
    pub fn packed(
        data: impl Into<ViewMut<'a>>,
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
        let data = SharedViewMut::new(data.into());
        [0, 1, 2].map(|i| Self {
            data: data.clone(),
            row_stride,
            col_offset: offsets[i],
            width: widths[i],
        })
    }

    /// # Panics
    /// If `n_heads` heads are wider than the columns that are ours.
    pub(super) fn check(&self, n_heads: usize, head_dim: usize) {
        assert!(n_heads * head_dim <= self.width, "{n_heads} heads fit {} columns", self.width);
    }

    /// One head of one token.
    ///
    /// # Safety
    /// [`Self::check`] accepted the sizes, and no two live rows are the same.
    ///
    /// # Panics
    /// If the token lies beyond the matrix.
    unsafe fn row(&self, token: usize, head: usize, head_dim: usize) -> ViewMut<'_> {
        let at = token * self.row_stride + self.col_offset + head * head_dim;
        // SAFETY: columns of ours by `check`, and exclusive by the caller's promise.
        unsafe { self.data.range(at..at + head_dim) }
    }

    /// Writes one head of `tokens` from rows of `head_dim` sums, each rounded once.
    ///
    /// # Safety
    /// [`Self::check`] accepted the sizes, and nobody else accesses this head of these tokens.
    pub(super) unsafe fn store(
        &self,
        tokens: Range<usize>,
        head: usize,
        head_dim: usize,
        sums: &[f32],
    ) {
        for (token, sums) in tokens.zip(sums.chunks_exact(head_dim)) {
            // SAFETY: the caller's promise.
            unsafe { self.row(token, head, head_dim) }.store(0..head_dim, sums);
        }
    }

    /// Writes zeros to all heads of `tokens`.
    ///
    /// # Safety
    /// As for [`Self::store`], for all `n_heads` heads.
    pub(super) unsafe fn zero(&self, tokens: Range<usize>, n_heads: usize, head_dim: usize) {
        for token in tokens {
            // SAFETY: the caller's promise; the heads of a token are neighbours.
            unsafe { self.row(token, 0, n_heads * head_dim) }.zero();
        }
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
        // SAFETY: all three are whole tiles by the assertions.
        unsafe {
            product(tile, depth, left, right, (c.as_mut_ptr(), TILE), TILE, chunk > 0, part);
        }
    }
}

/// A tile of scores (64, 64) as the left operand of a product.
#[derive(Clone, Copy)]
pub(super) enum Weights<'a> {
    /// Stored depth by depth.
    ByDepth(&'a [f32]),
    /// Stored row by row.
    ByRows(&'a [f32]),
}

/// Sums over tokens: `c` (64, D) `= left right` or `c + left right`, `right` a natural tile.
pub(super) fn weighted_sum(
    tile: &Tile,
    head_dim: usize,
    left: Weights<'_>,
    right: &[f32],
    c: &mut [f32],
    from_c: bool,
    part: Part,
) {
    assert!(c.len() >= TILE * head_dim, "c is 64 rows");
    let left = match left {
        Weights::ByDepth(x) => Panel::new(x[..TILE * TILE].as_ptr(), TILE),
        Weights::ByRows(x) => Panel::rows_of_64(x[..TILE * TILE].as_ptr()),
    };
    for (chunk, cols) in chunks(head_dim) {
        let right = Panel::new(right[chunk * CHUNK_ELEMS..][..CHUNK_ELEMS].as_ptr(), TILE);
        let c = (c[chunk * TILE..].as_mut_ptr(), head_dim);
        // SAFETY: both operands are whole tiles and `c` has 64 rows.
        unsafe { product(tile, TILE, left, right, c, cols, from_c, part) };
    }
}

/// `(index, width)` of the chunks of 64 channels.
fn chunks(head_dim: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..head_dim.div_ceil(TILE)).map(move |chunk| (chunk, TILE.min(head_dim - chunk * TILE)))
}

/// `c = left right` or `c + left right`: `left` (64, depth), `right` (depth, cols), cols <= 64.
///
/// # Safety
/// `left` has 64 rows and `right` 64 columns at every depth; 64 rows and columns `..cols` of `c` are
/// exclusively ours.
unsafe fn product(
    tile: &Tile,
    depth: usize,
    left: Panel,
    right: Panel,
    (c, c_stride): (*mut f32, usize),
    cols: usize,
    from_c: bool,
    part: Part,
) {
    let Tile { mr, nr, .. } = *tile;
    for j in (0..cols).step_by(nr) {
        for i in (0..TILE).step_by(mr) {
            let (first, end) = match part {
                Part::LowerScores if j >= i + mr => continue,
                Part::UpperScores if i >= j + nr => continue,
                Part::DepthUpToRow => (0, depth.min(i + mr)),
                Part::DepthFromRow => (i, depth),
                _ => (0, depth),
            };
            let wide = nr.min(cols - j);
            let (a, b) = (left.from(i, first), right.from(j, first));
            // SAFETY: `i` and `j` stay within the operands that the caller promised, and register
            // tiles divide 64, so a full one exists also at an edge of `c`.
            unsafe {
                let c = c.add(i * c_stride + j);
                tile.run(end - first, a, b, c, c_stride, mr, wide, from_c);
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
