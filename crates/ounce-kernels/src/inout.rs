//! An output with the input it may overwrite, and the loop of elementwise kernels.
//!
//! Idea: an elementwise kernel may run in place, but a `&[f32]` and a `&mut [f32]` never alias.
//! [`InOut`] says which of the two a call is. In place, kernels read a small block into a stack
//! buffer first, so there is one body, it is safe, and the bits are the same. Operands of 16 bits
//! pass through the same buffers.

use crate::pool::{Pool, split_by};
use crate::view::{BLOCK, SharedViewMut, View, ViewMut, blocks};
use std::ops::Range;

/// A destination and its main source, separate or the same memory.
#[derive(Debug)]
pub enum InOut<'a> {
    /// `dst` is written from `src`; both have the same length.
    Separate {
        /// Written.
        dst: ViewMut<'a>,
        /// Read; may be stored in another type.
        src: View<'a>,
    },
    /// Read and then overwritten.
    InPlace(ViewMut<'a>),
}

impl<'a> InOut<'a> {
    /// A separate destination and source.
    pub fn separate(dst: impl Into<ViewMut<'a>>, src: impl Into<View<'a>>) -> Self {
        InOut::Separate { dst: dst.into(), src: src.into() }
    }

    /// A destination that is its own source.
    pub fn in_place(dst: impl Into<ViewMut<'a>>) -> Self {
        InOut::InPlace(dst.into())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            InOut::Separate { dst, .. } => dst.len(),
            InOut::InPlace(dst) => dst.len(),
        }
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn share(self) -> SharedInOut<'a> {
        match self {
            InOut::Separate { dst, src } => {
                assert_eq!(dst.len(), src.len(), "destination and source have the same length");
                SharedInOut { dst: SharedViewMut::new(dst), src: Some(src) }
            }
            InOut::InPlace(dst) => SharedInOut { dst: SharedViewMut::new(dst), src: None },
        }
    }
}

/// An [`InOut`] that threads work on together, each on its own range.
pub(crate) struct SharedInOut<'a> {
    dst: SharedViewMut<'a>,
    src: Option<View<'a>>,
}

/// A thread's buffers for the blocks of one [`InOut`].
pub(crate) struct Buffers {
    src: [f32; BLOCK],
    dst: [f32; BLOCK],
}

impl Buffers {
    pub(crate) const NEW: Self = Self { src: [0.0; BLOCK], dst: [0.0; BLOCK] };
}

impl SharedInOut<'_> {
    /// Calls `f(dst, src)` for `range`, which must hold at most [`BLOCK`] elements.
    ///
    /// # Safety
    /// No two live ranges may overlap.
    #[inline]
    pub(crate) unsafe fn with(
        &self,
        range: Range<usize>,
        buffers: &mut Buffers,
        f: impl FnOnce(&mut [f32], &[f32]),
    ) {
        // SAFETY: the caller's promise.
        let mut dst = unsafe { self.dst.range(range.clone()) };
        let n = range.len();
        let src = if let Some(src) = self.src {
            src.load(range, &mut buffers.src)
        } else {
            let copy = &mut buffers.src[..n];
            dst.as_view().widen(copy);
            copy
        };
        let block = dst.begin(0..n, &mut buffers.dst);
        f(block.out, src);
        block.end();
    }
}

/// Calls `f(dst, src, others)` for every block of an elementwise kernel, in parallel; `others` are
/// the same elements of further sources, as long as `y`.
///
/// Blocks start at multiples of [`BLOCK`] elements.
pub(crate) fn for_blocks<const S: usize>(
    pool: &Pool,
    y: InOut<'_>,
    others: [View<'_>; S],
    f: impl Fn(&mut [f32], &[f32], [&[f32]; S]) + Sync,
) {
    let n_elems = y.len();
    let shared = y.share();
    pool.run_sized(n_elems, &|thread_idx| {
        let (mut buffers, mut other_buffers) = (Buffers::NEW, [[0.0; BLOCK]; S]);
        for range in blocks(split_by(n_elems, BLOCK, pool.n_threads(), thread_idx)) {
            let others = load_all(others, range.clone(), &mut other_buffers);
            // SAFETY: blocks of a part are disjoint, and so are the parts of the threads.
            unsafe { shared.with(range, &mut buffers, |dst, src| f(dst, src, others)) };
        }
    });
}

/// As [`for_blocks`] for two outputs of the same length, each with its own source.
pub(crate) fn for_block_pairs<const S: usize>(
    pool: &Pool,
    y: InOut<'_>,
    z: InOut<'_>,
    others: [View<'_>; S],
    f: impl Fn((&mut [f32], &[f32]), (&mut [f32], &[f32]), [&[f32]; S]) + Sync,
) {
    let n_elems = y.len();
    assert_eq!(n_elems, z.len(), "both outputs have the same length");
    let (shared_y, shared_z) = (y.share(), z.share());
    pool.run_sized(n_elems, &|thread_idx| {
        let [mut buffers_y, mut buffers_z] = [Buffers::NEW; 2];
        let mut other_buffers = [[0.0; BLOCK]; S];
        for range in blocks(split_by(n_elems, BLOCK, pool.n_threads(), thread_idx)) {
            let others = load_all(others, range.clone(), &mut other_buffers);
            // SAFETY: blocks of a part are disjoint, and so are the parts of the threads; `y` and
            // `z` are different mutable borrows.
            unsafe {
                shared_y.with(range.clone(), &mut buffers_y, |y_dst, y_src| {
                    shared_z.with(range, &mut buffers_z, |z_dst, z_src| {
                        f((y_dst, y_src), (z_dst, z_src), others);
                    });
                });
            }
        }
    });
}

/// The elements of `range` of every view, at most [`BLOCK`] of them; a buffer for each.
#[inline(always)]
pub(crate) fn load_all<'b, 'a: 'b, const S: usize>(
    views: [View<'a>; S],
    range: Range<usize>,
    buffers: &'b mut [[f32; BLOCK]],
) -> [&'b [f32]; S] {
    let mut buffers = buffers.iter_mut();
    views.map(|view| view.load(range.clone(), buffers.next().expect("a buffer for every view")))
}
