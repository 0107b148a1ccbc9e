//! Matrix products: `C = A B`, `C = C + A B`, with any of the operands transposed.
//!
//! Idea: the blocked algorithm of `[GotoGeijn08]` as BLIS (`[VanZee15]`) arranges it. Panels of B and
//! blocks of A are copied ("packed") into the order in which the register tile reads them, which
//! also absorbs every transpose, every edge and every 16-bit element: it is widened to f32 on the
//! way, or kept in pairs where the processor multiplies bf16 faster than f32.
//! ```text
//!            n: NC columns, panels of NR            the tile: MR x NR sums in registers
//!          +--------------------+
//!      k:  |  packed B (shared) |  some KC deep     for jc in n by NC
//!          +--------------------+                     for sc in k by some KC
//!   +----+ +----+---------------+                       pack B (all threads), then each thread:
//! m | A  | |tile|               |  MC rows              for ic in its rows by MC
//!   +----+ +----+---------------+                         for pc in the depth of B by KC: pack A
//!                                                          for every panel, for every tile: multiply
//! ```
//!
//! Invariants: every element of C is one chain of fused multiply-adds over ascending k that starts
//! at zero or at the stored C. The tile loads its start from C when it is not the first block, so
//! results do not depend on block sizes, on threads, on the tier, or on how a product over k is
//! cut into several calls. Edges are padded in the packed copies and run the same tile. The bias
//! is added once, after the last block. A C of 16 bits has its sums in scratch as f32 and is rounded
//! once, so it is the rounded f32 result. Only on tier avx512bf16 is a product of two bf16 matrices
//! another chain: over ascending pairs of k, each pair in the order of `vdpbf16ps`; it does not
//! depend on blocks, threads, rows or cuts at even k either.
//!
//! Complexity: 2mnk FLOP; A and B are each packed about once.

mod blocks;
pub(crate) mod pack;
mod product;
mod store;
pub(crate) mod tile;

use crate::pool::Pool;
use crate::view::{FloatType, View, ViewMut};
use blocks::Blocks;
use product::Product;
use tile::Tile;

/// Elements by which a scratch area may have to move to start on a cache line.
pub(crate) const ALIGN_ELEMS: usize = 16;

/// A matrix that is read: element `(i, j)` is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct MatRef<'a> {
    data: View<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> MatRef<'a> {
    /// A dense row-major matrix (rows, cols).
    pub fn new(data: impl Into<View<'a>>, rows: usize, cols: usize) -> Self {
        Self::with_stride(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the last element lies beyond `data`.
    pub fn with_stride(
        data: impl Into<View<'a>>,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        let data = data.into();
        assert_within(rows, cols, row_stride, data.len());
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

    /// Its shape with elements of a known type.
    fn of<T>(&self, data: &'a [T]) -> pack::Strided<'a, T> {
        pack::Strided { data, row_stride: self.row_stride, col_stride: self.col_stride }
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
    data: ViewMut<'a>,
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// A dense row-major matrix (rows, cols).
    pub fn new(data: impl Into<ViewMut<'a>>, rows: usize, cols: usize) -> Self {
        Self::with_stride(data, rows, cols, cols)
    }

    /// A row-major matrix whose rows start `row_stride` elements apart.
    ///
    /// # Panics
    /// If the last element lies beyond `data`.
    pub fn with_stride(
        data: impl Into<ViewMut<'a>>,
        rows: usize,
        cols: usize,
        row_stride: usize,
    ) -> Self {
        let data = data.into();
        assert_within(rows, cols, row_stride, data.len());
        assert!(row_stride >= cols, "rows of a written matrix do not overlap");
        Self { data, rows, cols, row_stride }
    }
}

/// # Panics
/// If the last element of such a matrix lies beyond `len`.
fn assert_within(rows: usize, cols: usize, row_stride: usize, len: usize) {
    let end = match (rows, cols) {
        (0, _) | (_, 0) => Some(0),
        _ => (rows - 1).checked_mul(row_stride).and_then(|start| start.checked_add(cols)),
    };
    let is_within = end.is_some_and(|end| end <= len);
    assert!(is_within, "matrix {rows} x {cols}, rows {row_stride} apart, ends beyond {len}");
}

/// What the sums of a product start from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Zero: C is overwritten.
    Zero,
    /// The stored C, in f32: the product is accumulated, in the same chain of additions.
    FromC,
}

/// Scratch of [`gemm`] in elements, for an (m, k) x (k, n) product that is stored as `c`: the packed
/// copies of up to 10 MiB and, if `c` has 16 bits, sums of up to 14 MiB. It is enough for operands of
/// any type on any tier.
pub fn gemm_scratch_elems(m: usize, n: usize, k: usize, c: FloatType, n_threads: usize) -> usize {
    let of_units = |units: usize| Blocks::new(m, n, units, c, n_threads).scratch_elems(n_threads);
    of_units(k).max(of_units(k.div_ceil(2)))
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
/// `scratch`: at least [`gemm_scratch_elems`]`(m, n, k, type of c, pool.n_threads())` elements; its
/// contents do not matter.
/// # Order
/// Each output is one chain of fused multiply-adds over ascending k, then the bias, then, for 16
/// bits, the rounding. Two bf16 matrices on tier avx512bf16: a chain of pairs of k.
/// # Panics
/// If shapes do not agree, scratch is too small, or a 16-bit `c` is to be added to.
pub fn gemm(
    pool: &Pool,
    c: MatMut<'_>,
    a: MatRef<'_>,
    b: MatRef<'_>,
    start: Start,
    bias: Option<View<'_>>,
    scratch: &mut [f32],
) {
    let (m, n, k) = (a.rows, b.cols, a.cols);
    let c_type = c.data.float_type();
    assert_eq!((c.rows, c.cols), (m, n), "shape of c");
    assert_eq!(b.rows, k, "depth of b");
    assert!(bias.is_none_or(|bias| bias.len() == n), "length of bias");
    assert!(start == Start::Zero || c_type == FloatType::F32, "sums are f32");
    let n_threads = pool.n_threads();
    let needed = gemm_scratch_elems(m, n, k, c_type, n_threads);
    assert!(scratch.len() >= needed, "gemm scratch: {} of {needed} elements", scratch.len());
    if m == 0 || n == 0 {
        return;
    }
    let tile = Tile::of(a.data.float_type(), b.data.float_type());
    let units = k.div_ceil(tile.unit_depth);
    let blocks = Blocks::new(m, n, units, c_type, n_threads);
    let product = Product::new(tile, blocks, c, a, b, start, bias, n_threads, scratch);
    for part in blocks.parts(m, n, units) {
        pool.run(&|thread_idx| product.pack_b(&part, thread_idx));
        pool.run(&|thread_idx| product.multiply(&part, thread_idx));
    }
}

#[cfg(test)]
mod tests;
