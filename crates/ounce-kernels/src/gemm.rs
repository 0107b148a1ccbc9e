//! Matrix products: `C = A B`, `C = C + A B`, with any of the operands transposed.
//!
//! Idea: the blocked algorithm of Goto and van de Geijn 2008 as BLIS arranges it. Panels of B and
//! blocks of A are copied ("packed") into the order in which the register tile reads them, which
//! also absorbs every transpose and every edge:
//! ```text
//!            n: NC columns, panels of NR            the tile: MR x NR sums in registers
//!          +--------------------+
//!      k:  |  packed B (shared) |  KC deep          for jc in n by NC
//!          +--------------------+                     for pc in k by KC
//!   +----+ +----+---------------+                       pack B (all threads), then each thread:
//! m | A  | |tile|               |  MC rows              for ic in its rows by MC: pack A
//!   +----+ +----+---------------+                         for every panel, for every tile: multiply
//! ```
//!
//! Invariants: every element of C is one chain of fused multiply-adds over ascending k that starts
//! at zero or at the stored C. The tile loads its start from C when it is not the first block, so
//! results do not depend on block sizes, on threads, on the tier, or on how a product over k is
//! cut into several calls. Edges are padded in the packed copies and run the same tile. The bias
//! is added once, after the last block.
//!
//! Complexity: 2mnk FLOP; packing reads A once per NC columns and B once.

pub(crate) mod pack;
pub(crate) mod tile;

use crate::pool::{Pool, SharedMut, split};
use std::ops::Range;
use tile::{MAX_MR, MAX_NR, Panel, Tile};

/// Rows of A packed at a time by one thread.
const MC: usize = 192;
/// Depth of a block.
const KC: usize = 768;
/// Columns of B packed at a time.
const NC: usize = 1024;
/// Elements by which a scratch area may have to move to start on a cache line.
pub(crate) const ALIGN_ELEMS: usize = 16;

/// A matrix that is read: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A dense row-major matrix (rows, cols).
    pub fn new(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::with_stride(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the last element lies beyond `data`.
    pub fn with_stride(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let end = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
        assert!(end <= data.len(), "matrix {rows} x {cols} ends at {end} of {}", data.len());
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// The transpose: the same data, seen as (cols, rows).
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

/// A row-major matrix that is written.
#[derive(Debug)]
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A dense row-major matrix (rows, cols).
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::with_stride(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the last element lies beyond `data`.
    pub fn with_stride(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        let end = if rows == 0 || cols == 0 { 0 } else { (rows - 1) * row_stride + cols };
        assert!(end <= data.len(), "matrix {rows} x {cols} ends at {end} of {}", data.len());
        assert!(row_stride >= cols, "rows of a written matrix do not overlap");
        Self { data, rows, cols, row_stride }
    }
}

/// What the sums of a product start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Zero: C is overwritten.
    Zero,
    /// The stored C: the product is accumulated, in the same chain of additions.
    FromC,
}

/// Elements of scratch for the packed copies, for the largest tile of any tier, so that scratch
/// does not depend on the tier. Grows with m, n and k.
struct Blocks {
    a_elems: usize,
    b_elems: usize,
}

impl Blocks {
    fn new(m: usize, n: usize, k: usize) -> Self {
        let kc = k.clamp(1, KC);
        let rows = m.clamp(1, MC) + MAX_MR;
        let cols = n.clamp(1, NC) + MAX_NR;
        Self {
            a_elems: (rows * kc).next_multiple_of(ALIGN_ELEMS),
            b_elems: (cols * kc).next_multiple_of(ALIGN_ELEMS),
        }
    }
}

/// The length of nearly equal blocks that cut `n` into as many as `max` long ones would, in whole
/// `granule`s (of which `max` is a multiple).
fn even_block(n: usize, max: usize, granule: usize) -> usize {
    n.div_ceil(n.div_ceil(max).max(1)).next_multiple_of(granule).max(granule)
}

/// Scratch of [`gemm`] in elements, for an (m, k) x (k, n) product: at most a few MiB.
pub fn gemm_scratch_elems(m: usize, n: usize, k: usize, n_threads: usize) -> usize {
    let blocks = Blocks::new(m, n, k);
    blocks.b_elems + n_threads * blocks.a_elems + ALIGN_ELEMS
}

/// The part of `scratch` that starts on a cache line.
pub(crate) fn aligned(scratch: &mut [f32]) -> &mut [f32] {
    let skip = scratch.as_ptr().align_offset(64);
    &mut scratch[skip.min(ALIGN_ELEMS)..]
}

/// `c = a b + bias` ([`Start::Zero`]) or `c = c + a b + bias` ([`Start::FromC`]).
///
/// # Shapes
/// `a` (m, k), `b` (k, n), `c` (m, n), `bias` (n).
/// # Memory
/// `scratch`: at least [`gemm_scratch_elems`]`(m, n, k, pool.n_threads())` elements; its contents
/// do not matter.
/// # Order
/// Each output is one chain of fused multiply-adds over ascending k, then the bias.
/// # Panics
/// If shapes do not agree or scratch is too small.
pub fn gemm(
    pool: &Pool,
    c: MatMut<'_>,
    a: MatRef<'_>,
    b: MatRef<'_>,
    start: Start,
    bias: Option<&[f32]>,
    scratch: &mut [f32],
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let MatMut { data: c, rows, cols, row_stride: c_stride } = c;
    assert_eq!((rows, cols), (m, n), "shape of c");
    assert_eq!(b.rows, k, "depth of b");
    assert!(bias.is_none_or(|bias| bias.len() == n), "length of bias");
    let n_threads = pool.n_threads();
    let needed = gemm_scratch_elems(m, n, k, n_threads);
    assert!(scratch.len() >= needed, "gemm scratch: {} of {needed} elements", scratch.len());
    if m == 0 || n == 0 {
        return;
    }
    let blocks = Blocks::new(m, n, k);
    let (packed_b, packed_a) = aligned(scratch).split_at_mut(blocks.b_elems);
    let job = Product {
        tile: Tile::current(),
        c: SharedMut::new(c),
        c_stride,
        a,
        b,
        packed_b: SharedMut::new(packed_b),
        packed_a: SharedMut::new(packed_a),
        a_elems: blocks.a_elems,
    };
    let (nc, kc) = (even_block(n, NC, MAX_NR), even_block(k, KC, 8));
    for jc in (0..n).step_by(nc) {
        let cols = jc..(jc + nc).min(n);
        // A product of depth 0 still runs one (empty) block, which stores zeros or adds the bias.
        for pc in (0..k.max(1)).step_by(kc) {
            let depth = pc..(pc + kc).min(k);
            let from_c = pc > 0 || start == Start::FromC;
            let bias = if depth.end == k { bias } else { None };
            pool.run(&|thread_idx| job.pack_b(&cols, &depth, n_threads, thread_idx));
            pool.run(&|thread_idx| {
                job.multiply(&cols, &depth, from_c, bias, n_threads, thread_idx);
            });
        }
    }
}

/// Everything the threads of one product share.
struct Product<'a> {
    tile: Tile,
    c: SharedMut<'a, f32>,
    c_stride: usize,
    a: MatRef<'a>,
    b: MatRef<'a>,
    packed_b: SharedMut<'a, f32>,
    packed_a: SharedMut<'a, f32>,
    a_elems: usize,
}

impl Product<'_> {
    /// Packs this thread's panels of the block `depth` x `cols` of B.
    fn pack_b(
        &self,
        cols: &Range<usize>,
        depth: &Range<usize>,
        n_threads: usize,
        thread_idx: usize,
    ) {
        let nr = self.tile.nr;
        let panels = split(cols.len().div_ceil(nr), n_threads, thread_idx);
        let own = cols.start + panels.start * nr..(cols.start + panels.end * nr).min(cols.end);
        let at = panels.start * nr * depth.len();
        // SAFETY: panels are dealt to threads without overlap.
        let dst = unsafe { self.packed_b.range(at..at + panels.len() * nr * depth.len()) };
        pack::pack(dst, self.b.t(), own, depth.clone(), nr);
    }

    /// Computes this thread's rectangle of the block of C for one depth block.
    fn multiply(
        &self,
        cols: &Range<usize>,
        depth: &Range<usize>,
        from_c: bool,
        bias: Option<&[f32]>,
        n_threads: usize,
        thread_idx: usize,
    ) {
        let Tile { mr, nr, .. } = self.tile;
        let (n_tiles, n_panels) = (self.a.rows.div_ceil(mr), cols.len().div_ceil(nr));
        let (grid_m, grid_n) = grid(n_tiles, n_panels, n_threads, &self.tile);
        let tiles = split(n_tiles, grid_m, thread_idx / grid_n);
        let panels = split(n_panels, grid_n, thread_idx % grid_n);
        let rows = tiles.start * mr..(tiles.end * mr).min(self.a.rows);
        let (kc, a_at) = (depth.len(), thread_idx * self.a_elems);
        // SAFETY: each thread has its own area.
        let packed_a = unsafe { self.packed_a.range(a_at..a_at + self.a_elems) };
        let mc = even_block(rows.len(), MC, mr);
        for ic in rows.clone().step_by(mc) {
            let block = ic..(ic + mc).min(rows.end);
            pack::pack(packed_a, self.a, block.clone(), depth.clone(), mr);
            for panel in panels.clone() {
                let j = cols.start + panel * nr;
                let width = nr.min(cols.end - j);
                for (tile_idx, i) in block.clone().step_by(mr).enumerate() {
                    let height = mr.min(block.end - i);
                    self.prefetch_c(i + mr..(i + 2 * mr).min(block.end), j);
                    // SAFETY: packed panels are `kc * mr` and `kc * nr` long at these places and
                    // B's were written in the run before; the tile of C lies within C, and the
                    // rectangles of the threads do not overlap.
                    unsafe {
                        let c = self.c.ptr().add(i * self.c_stride + j);
                        let a = packed_a.as_ptr().add(tile_idx * mr * kc);
                        let a = Panel::new(a, mr);
                        let b = self.packed_b.ptr().add(panel * nr * kc);
                        let b = Panel::new(b, nr);
                        self.tile.run(kc, a, b, c, self.c_stride, height, width, from_c);
                        if let Some(bias) = bias {
                            add_bias(c, self.c_stride, height, &bias[j..j + width]);
                        }
                    }
                }
            }
        }
    }

    /// Starts loading the tile of C after the one in work: C comes from memory, unlike the packed
    /// operands, and its latency would stall every tile.
    #[inline(always)]
    fn prefetch_c(&self, rows: Range<usize>, col: usize) {
        for i in rows {
            let row = self.c.ptr().wrapping_add(i * self.c_stride + col);
            for line in (0..self.tile.nr).step_by(ALIGN_ELEMS) {
                prefetch(row.wrapping_add(line));
            }
        }
    }
}

/// Asks the caches for the line at `p`, which need not be valid.
#[inline(always)]
fn prefetch(p: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch of any address has no effect but on caches.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// Threads along (rows, columns) whose product is `n_threads`: the least work of the busiest.
fn grid(n_tiles: usize, n_panels: usize, n_threads: usize, tile: &Tile) -> (usize, usize) {
    /// Packing one element of A costs about as much as this many multiply-adds.
    const PACK_COST: usize = 24;
    (1..=n_threads)
        .filter(|grid_m| n_threads.is_multiple_of(*grid_m))
        .map(|grid_m| (grid_m, n_threads / grid_m))
        .min_by_key(|&(grid_m, grid_n)| {
            let rows = n_tiles.div_ceil(grid_m) * tile.mr;
            rows * (n_panels.div_ceil(grid_n) * tile.nr + PACK_COST)
        })
        .expect("1 divides every number of threads")
}

/// # Safety
/// `c` points at `height` rows, `stride` apart, of at least `bias.len()` writable elements.
unsafe fn add_bias(c: *mut f32, stride: usize, height: usize, bias: &[f32]) {
    for i in 0..height {
        // SAFETY: the caller's promise.
        let row = unsafe { std::slice::from_raw_parts_mut(c.add(i * stride), bias.len()) };
        for (c, bias) in row.iter_mut().zip(bias) {
            *c += bias;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;
    use crate::tier::{Tier, set_tier};

    /// The definition: one fused chain over ascending k, then the bias.
    fn reference(c: &mut [f32], a: MatRef, b: MatRef, start: Start, bias: Option<&[f32]>) {
        for i in 0..a.rows {
            for j in 0..b.cols {
                let mut sum = if start == Start::Zero { 0.0 } else { c[i * b.cols + j] };
                for p in 0..a.cols {
                    let x = a.data[i * a.row_stride + p * a.col_stride];
                    sum = x.mul_add(b.data[p * b.row_stride + j * b.col_stride], sum);
                }
                c[i * b.cols + j] = sum + bias.map_or(0.0, |bias| bias[j]);
            }
        }
    }

    fn run(pool: &Pool, c: &mut [f32], a: MatRef, b: MatRef, start: Start, bias: Option<&[f32]>) {
        let mut scratch =
            vec![f32::NAN; gemm_scratch_elems(a.rows, b.cols, a.cols, pool.n_threads())];
        gemm(pool, MatMut::new(c, a.rows, b.cols), a, b, start, bias, &mut scratch);
    }

    /// Every tier, number of threads, transpose, start and edge gives exactly the bits of the
    /// definition: stronger than a tolerance, since the order of additions is part of the contract.
    #[test]
    fn all_tiers_threads_and_transposes_give_the_bits_of_the_definition() {
        let pools = [Pool::new(1), Pool::new(2), Pool::new(3)];
        let shapes = [(1, 1, 1), (3, 5, 2), (7, 67, 33), (33, 130, 70), (15, 64, 400), (70, 3, 0)];
        for (m, n, k) in shapes {
            let (a, b, bias) = (noise(m * k, 1), noise(k * n, 2), noise(n, 3));
            for case in 0..8 {
                let a_mat =
                    if case & 1 == 0 { MatRef::new(&a, m, k) } else { MatRef::new(&a, k, m).t() };
                let b_mat =
                    if case & 2 == 0 { MatRef::new(&b, k, n) } else { MatRef::new(&b, n, k).t() };
                let (start, bias) = if case & 4 == 0 {
                    (Start::Zero, Some(&bias[..]))
                } else {
                    (Start::FromC, None)
                };
                let mut want = noise(m * n, 4);
                reference(&mut want, a_mat, b_mat, start, bias);
                for tier in Tier::available() {
                    set_tier(Some(tier));
                    for pool in &pools {
                        let mut got = noise(m * n, 4);
                        run(pool, &mut got, a_mat, b_mat, start, bias);
                        assert_eq!(got, want, "{m} {n} {k} case {case} {tier}");
                    }
                }
                set_tier(None);
            }
        }
    }

    #[test]
    fn cutting_the_depth_into_calls_does_not_change_the_bits() {
        let (m, n, k) = (40, 90, 1000);
        let pool = Pool::new(2);
        let (dy, x) = (noise(k * m, 1), noise(k * n, 2));
        let mut whole = vec![0.0; m * n];
        run(
            &pool,
            &mut whole,
            MatRef::new(&dy, k, m).t(),
            MatRef::new(&x, k, n),
            Start::Zero,
            None,
        );
        for cuts in [vec![64, 1000], vec![448, 960, 1000]] {
            let (mut got, mut begin) = (vec![0.0; m * n], 0);
            for end in cuts {
                let a = MatRef::new(&dy[begin * m..end * m], end - begin, m).t();
                let b = MatRef::new(&x[begin * n..end * n], end - begin, n);
                run(&pool, &mut got, a, b, Start::FromC, None);
                begin = end;
            }
            assert_eq!(got, whole);
        }
    }

    #[test]
    fn strided_operands_leave_their_neighbours_alone() {
        let (m, n, k) = (20, 30, 10);
        let pool = Pool::new(2);
        let (a, b) = (noise(m * 50, 1), noise(k * 70, 2));
        let (a, b) = (MatRef::with_stride(&a, m, k, 50), MatRef::with_stride(&b[5..], k, n, 70));
        let mut want = vec![0.0; m * n];
        reference(&mut want, a, b, Start::Zero, None);
        let mut got = vec![7.0; m * 40];
        let mut scratch = vec![0.0; gemm_scratch_elems(m, n, k, 2)];
        let c = MatMut::with_stride(&mut got[3..], m, n, 40);
        gemm(&pool, c, a, b, Start::Zero, None, &mut scratch);
        for i in 0..m {
            assert_eq!(got[i * 40 + 3..i * 40 + 3 + n], want[i * n..(i + 1) * n]);
            assert!(got[i * 40 + 3 + n..(i + 1) * 40].iter().all(|&v| v == 7.0));
        }
    }
}
