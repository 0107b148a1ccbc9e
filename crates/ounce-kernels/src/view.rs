//! Slices of f32, bf16 or f16, read and written as f32.
//!
//! Idea: a kernel computes in f32 whatever its operands are stored as. It takes a block of a [`View`]
//! into a buffer on its stack, or borrows it where it is f32 already, computes, and stores a block of
//! a [`ViewMut`], rounded once. So there is one body per kernel, the f32 path copies nothing, and
//! the 16-bit result is the rounded f32 result.
//!
//! Invariants: rounding is that of [`crate::convert`]; a view is plain memory and knows no shape.

use crate::convert::{bf16_to_f32, f16_to_f32, f32_to_bf16, f32_to_f16};
use crate::pool::{Pool, SharedMut, split_by};
use half::{bf16, f16};
use std::ops::Range;

/// Elements that kernels widen at a time (4 KiB of f32, well within L1).
pub const BLOCK: usize = 1024;

/// How floating-point elements are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// bfloat16, the upper half of binary32.
    Bf16,
    /// IEEE binary16.
    F16,
}

/// Elements to read.
#[derive(Clone, Copy, Debug)]
pub enum View<'a> {
    /// Read as they are.
    F32(&'a [f32]),
    /// Widened.
    Bf16(&'a [bf16]),
    /// Widened.
    F16(&'a [f16]),
}

/// Elements to write, and to read back.
#[derive(Debug)]
pub enum ViewMut<'a> {
    /// Written as computed.
    F32(&'a mut [f32]),
    /// Rounded.
    Bf16(&'a mut [bf16]),
    /// Rounded.
    F16(&'a mut [f16]),
}

impl<'a> View<'a> {
    /// How the elements are stored.
    #[inline]
    pub fn float_type(self) -> FloatType {
        match self {
            View::F32(_) => FloatType::F32,
            View::Bf16(_) => FloatType::Bf16,
            View::F16(_) => FloatType::F16,
        }
    }

    /// Number of elements.
    #[inline]
    pub fn len(self) -> usize {
        match self {
            View::F32(x) => x.len(),
            View::Bf16(x) => x.len(),
            View::F16(x) => x.len(),
        }
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// A part.
    #[inline]
    pub fn slice(self, range: Range<usize>) -> View<'a> {
        match self {
            View::F32(x) => View::F32(&x[range]),
            View::Bf16(x) => View::Bf16(&x[range]),
            View::F16(x) => View::F16(&x[range]),
        }
    }

    /// The elements of `range` as f32: borrowed where they are stored so, else widened into `buf`.
    ///
    /// # Panics
    /// If the range ends beyond the view, or 16-bit elements are more than a block.
    #[inline(always)]
    pub fn load<'b>(self, range: Range<usize>, buf: &'b mut [f32; BLOCK]) -> &'b [f32]
    where
        'a: 'b,
    {
        if let View::F32(x) = self {
            return &x[range];
        }
        let buf = &mut buf[..range.len()];
        self.slice(range).widen(buf);
        buf
    }

    /// Writes all elements to `dst`, which is as long.
    pub fn widen(self, dst: &mut [f32]) {
        match self {
            View::F32(x) => dst.copy_from_slice(x),
            View::Bf16(x) => bf16_to_f32(dst, x),
            View::F16(x) => f16_to_f32(dst, x),
        }
    }
}

impl<'a> ViewMut<'a> {
    /// How the elements are stored.
    #[inline]
    pub fn float_type(&self) -> FloatType {
        self.as_view().float_type()
    }

    /// Number of elements.
    #[inline]
    pub fn len(&self) -> usize {
        self.as_view().len()
    }

    /// Whether there are none.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same elements to read.
    #[inline]
    pub fn as_view(&self) -> View<'_> {
        match self {
            ViewMut::F32(x) => View::F32(x),
            ViewMut::Bf16(x) => View::Bf16(x),
            ViewMut::F16(x) => View::F16(x),
        }
    }

    /// The same elements for a shorter time.
    #[inline]
    pub fn reborrow(&mut self) -> ViewMut<'_> {
        match self {
            ViewMut::F32(x) => ViewMut::F32(x),
            ViewMut::Bf16(x) => ViewMut::Bf16(x),
            ViewMut::F16(x) => ViewMut::F16(x),
        }
    }

    /// A part, for as long as the whole.
    #[inline]
    pub fn slice(self, range: Range<usize>) -> ViewMut<'a> {
        match self {
            ViewMut::F32(x) => ViewMut::F32(&mut x[range]),
            ViewMut::Bf16(x) => ViewMut::Bf16(&mut x[range]),
            ViewMut::F16(x) => ViewMut::F16(&mut x[range]),
        }
    }

    /// The elements before `mid` and those from there on.
    pub fn split_at(self, mid: usize) -> (ViewMut<'a>, ViewMut<'a>) {
        match self {
            ViewMut::F32(x) => {
                let (a, b) = x.split_at_mut(mid);
                (ViewMut::F32(a), ViewMut::F32(b))
            }
            ViewMut::Bf16(x) => {
                let (a, b) = x.split_at_mut(mid);
                (ViewMut::Bf16(a), ViewMut::Bf16(b))
            }
            ViewMut::F16(x) => {
                let (a, b) = x.split_at_mut(mid);
                (ViewMut::F16(a), ViewMut::F16(b))
            }
        }
    }

    /// Writes `src`, rounded, to the elements of `range`, which is as long.
    #[inline]
    pub fn store(&mut self, range: Range<usize>, src: &[f32]) {
        match self {
            ViewMut::F32(x) => x[range].copy_from_slice(src),
            ViewMut::Bf16(x) => f32_to_bf16(&mut x[range], src),
            ViewMut::F16(x) => f32_to_f16(&mut x[range], src),
        }
    }

    /// Opens the elements of `range` for writing as f32: themselves where they are stored so, else
    /// `buf`, from which [`BlockMut::end`] rounds. What is found there is unspecified.
    ///
    /// # Panics
    /// If the range ends beyond the view, or 16-bit elements are more than a block.
    #[inline(always)]
    pub fn begin<'b>(&'b mut self, range: Range<usize>, buf: &'b mut [f32; BLOCK]) -> BlockMut<'b> {
        let n = range.len();
        match self {
            ViewMut::F32(x) => BlockMut { out: &mut x[range], target: ViewMut::F32(&mut []) },
            ViewMut::Bf16(x) => {
                BlockMut { out: &mut buf[..n], target: ViewMut::Bf16(&mut x[range]) }
            }
            ViewMut::F16(x) => BlockMut { out: &mut buf[..n], target: ViewMut::F16(&mut x[range]) },
        }
    }

    /// Writes the elements of `src`, which is as long and stored in any type.
    pub fn copy_from(&mut self, src: View<'_>) {
        assert_eq!(self.len(), src.len(), "length of the source");
        match (&mut *self, src) {
            (ViewMut::F32(dst), src) => src.widen(dst),
            (ViewMut::Bf16(dst), View::Bf16(src)) => dst.copy_from_slice(src),
            (ViewMut::F16(dst), View::F16(src)) => dst.copy_from_slice(src),
            (dst, View::F32(src)) => dst.store(0..src.len(), src),
            (dst, src) => {
                let mut buf = [0.0; BLOCK];
                for range in blocks(0..src.len()) {
                    dst.store(range.clone(), src.load(range, &mut buf));
                }
            }
        }
    }

    /// Writes zeros.
    pub fn zero(&mut self) {
        match self {
            ViewMut::F32(x) => x.fill(0.0),
            ViewMut::Bf16(x) => x.fill(bf16::ZERO),
            ViewMut::F16(x) => x.fill(f16::ZERO),
        }
    }
}

/// A block that is being written, see [`ViewMut::begin`].
#[derive(Debug)]
pub struct BlockMut<'b> {
    /// Where to write.
    pub out: &'b mut [f32],
    /// Where it is stored in 16 bits, or nothing.
    target: ViewMut<'b>,
}

impl BlockMut<'_> {
    /// Rounds what was written to where it belongs; f32 is there already.
    #[inline(always)]
    pub fn end(self) {
        match self.target {
            ViewMut::F32(_) => {}
            ViewMut::Bf16(x) => f32_to_bf16(x, self.out),
            ViewMut::F16(x) => f32_to_f16(x, self.out),
        }
    }
}

/// `range` in pieces of at most [`BLOCK`] elements, each but the last that long.
#[inline(always)]
pub fn blocks(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(BLOCK).map(move |start| start..(start + BLOCK).min(end))
}

impl<'a, T: AsRef<[f32]> + ?Sized> From<&'a T> for View<'a> {
    fn from(x: &'a T) -> Self {
        View::F32(x.as_ref())
    }
}

impl<'a, T: AsMut<[f32]> + ?Sized> From<&'a mut T> for ViewMut<'a> {
    fn from(x: &'a mut T) -> Self {
        ViewMut::F32(x.as_mut())
    }
}

/// A [`ViewMut`] that threads write together, each its own range. A clone is the same elements.
#[derive(Clone)]
pub(crate) enum SharedViewMut<'a> {
    F32(SharedMut<'a, f32>),
    Bf16(SharedMut<'a, bf16>),
    F16(SharedMut<'a, f16>),
}

impl<'a> SharedViewMut<'a> {
    pub(crate) fn new(view: ViewMut<'a>) -> Self {
        match view {
            ViewMut::F32(x) => Self::F32(SharedMut::new(x)),
            ViewMut::Bf16(x) => Self::Bf16(SharedMut::new(x)),
            ViewMut::F16(x) => Self::F16(SharedMut::new(x)),
        }
    }

    /// # Safety
    /// No two live ranges may overlap.
    ///
    /// # Panics
    /// If the range ends beyond the view.
    #[inline]
    pub(crate) unsafe fn range(&self, range: Range<usize>) -> ViewMut<'_> {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32(x) => ViewMut::F32(x.range(range)),
                Self::Bf16(x) => ViewMut::Bf16(x.range(range)),
                Self::F16(x) => ViewMut::F16(x.range(range)),
            }
        }
    }
}

impl Pool {
    /// As [`Pool::split_rows_sized`] for a view.
    pub fn split_view_rows(
        &self,
        n_elems: usize,
        dst: ViewMut<'_>,
        row_len: usize,
        granule: usize,
        f: impl Fn(Range<usize>, ViewMut<'_>) + Sync,
    ) {
        assert!(row_len > 0 && dst.len().is_multiple_of(row_len), "dst is whole rows");
        let n_rows = dst.len() / row_len;
        let shared = SharedViewMut::new(dst);
        self.run_sized(n_elems, &|thread_idx| {
            let rows = split_by(n_rows, granule, self.n_threads(), thread_idx);
            if rows.is_empty() {
                return;
            }
            // SAFETY: `split_by` gives every thread its own rows, and they end within `dst`.
            let part = unsafe { shared.range(rows.start * row_len..rows.end * row_len) };
            f(rows, part);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::noise;

    const N: usize = 2 * BLOCK + 77;

    fn bf16s(x: &[f32]) -> Vec<bf16> {
        x.iter().map(|&x| bf16::from_f32_const(x)).collect()
    }

    fn f16s(x: &[f32]) -> Vec<f16> {
        x.iter().map(|&x| f16::from_f32_const(x)).collect()
    }

    #[test]
    fn f32_is_borrowed_and_16_bits_are_widened() {
        let x = noise(N, 1);
        let (b, h) = (bf16s(&x), f16s(&x));
        let mut buf = [9.0; BLOCK];
        assert_eq!(View::F32(&x).load(5..N, &mut buf).as_ptr(), x[5..].as_ptr());
        for range in blocks(0..N) {
            let want: Vec<f32> = b[range.clone()].iter().map(|x| x.to_f32_const()).collect();
            assert_eq!(View::Bf16(&b).load(range.clone(), &mut buf), want);
            let want: Vec<f32> = h[range.clone()].iter().map(|x| x.to_f32_const()).collect();
            assert_eq!(View::F16(&h).slice(range.clone()).load(0..range.len(), &mut buf), want);
        }
    }

    #[test]
    fn what_is_written_is_rounded_once_and_nothing_else_is_touched() {
        let x = noise(N, 1);
        let (mut b, mut h) = (vec![bf16::ONE; N], vec![f16::ONE; N]);
        let (mut buf, range) = ([0.0; BLOCK], 3..1000);
        let mut view = ViewMut::Bf16(&mut b);
        let block = view.begin(range.clone(), &mut buf);
        block.out.copy_from_slice(&x[range.clone()]);
        block.end();
        ViewMut::F16(&mut h).store(range.clone(), &x[range.clone()]);
        assert_eq!(b[range.clone()], bf16s(&x[range.clone()]));
        assert_eq!(h[range.clone()], f16s(&x[range]));
        assert!(b[..3].iter().chain(&b[1000..]).all(|&b| b == bf16::ONE));
        assert!(h[..3].iter().chain(&h[1000..]).all(|&h| h == f16::ONE));
    }

    #[test]
    fn views_of_any_two_types_are_copied() {
        let x = noise(N, 1);
        let (b, h) = (bf16s(&x), f16s(&x));
        let wide_b: Vec<f32> = b.iter().map(|x| x.to_f32_const()).collect();
        let wide_h: Vec<f32> = h.iter().map(|x| x.to_f32_const()).collect();
        for (src, wide) in
            [(View::F32(&x), &x), (View::Bf16(&b), &wide_b), (View::F16(&h), &wide_h)]
        {
            let (mut to_f32, mut to_bf16) = (vec![9.0; N], vec![bf16::ONE; N]);
            let mut to_f16 = vec![f16::ONE; N];
            ViewMut::F32(&mut to_f32).copy_from(src);
            ViewMut::Bf16(&mut to_bf16).copy_from(src);
            ViewMut::F16(&mut to_f16).copy_from(src);
            assert_eq!((&to_f32, to_bf16, to_f16), (wide, bf16s(wide), f16s(wide)));
        }
    }

    #[test]
    fn threads_get_disjoint_rows_of_a_view() {
        for n_threads in [1, 2, 3] {
            let mut y = vec![bf16::ONE; 5 * 10];
            let view = ViewMut::Bf16(&mut y);
            Pool::new(n_threads).split_view_rows(usize::MAX, view, 10, 2, |rows, mut y| {
                for (i, row) in rows.enumerate() {
                    y.store(i * 10..(i + 1) * 10, &[row as f32; 10]);
                }
            });
            assert!(y.iter().enumerate().all(|(i, y)| y.to_f32_const() == (i / 10) as f32));
        }
    }
}
