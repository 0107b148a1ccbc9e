//! An output with the input it may overwrite.
//!
//! Idea: an elementwise kernel may run in place, but a `&[f32]` and a `&mut [f32]` never alias.
//! [`InOut`] says which of the two a call is. In place, kernels read a small block into a stack
//! buffer first, so there is one body, it is safe, and the bits are the same.

use crate::pool::{Pool, SharedMut, split_by};
use std::ops::Range;

/// Elements that an in-place kernel copies to its stack at a time (4 KiB, well within L1).
const BLOCK: usize = 1024;

/// A destination and its main source, separate or the same memory.
#[derive(Debug)]
pub enum InOut<'a> {
    /// `dst` is written from `src`; both have the same length.
    Separate {
        /// Written.
        dst: &'a mut [f32],
        /// Read.
        src: &'a [f32],
    },
    /// Read and then overwritten.
    InPlace(&'a mut [f32]),
}

impl<'a> InOut<'a> {
    /// A separate destination and source.
    pub fn separate(dst: &'a mut [f32], src: &'a [f32]) -> Self {
        InOut::Separate { dst, src }
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
                SharedInOut { dst: SharedMut::new(dst), src: Some(src) }
            }
            InOut::InPlace(dst) => SharedInOut { dst: SharedMut::new(dst), src: None },
        }
    }
}

/// An [`InOut`] that threads work on together, each on its own range.
pub(crate) struct SharedInOut<'a> {
    dst: SharedMut<'a, f32>,
    src: Option<&'a [f32]>,
}

impl SharedInOut<'_> {
    /// Calls `f(dst, src)` for `range`, which must hold at most [`BLOCK`] elements.
    ///
    /// # Safety
    /// No two live ranges may overlap.
    pub(crate) unsafe fn with(&self, range: Range<usize>, f: impl FnOnce(&mut [f32], &[f32])) {
        // SAFETY: the caller's promise.
        let dst = unsafe { self.dst.range(range.clone()) };
        if let Some(src) = self.src {
            f(dst, &src[range]);
        } else {
            let mut copy = [0.0; BLOCK];
            let copy = &mut copy[..dst.len()];
            copy.copy_from_slice(dst);
            f(dst, copy);
        }
    }
}

/// Calls `f(range, dst, src)` for every block of an elementwise kernel, in parallel.
///
/// Blocks start at multiples of [`BLOCK`] elements.
pub(crate) fn for_blocks(
    pool: &Pool,
    y: InOut<'_>,
    f: impl Fn(Range<usize>, &mut [f32], &[f32]) + Sync,
) {
    let n_elems = y.len();
    let shared = y.share();
    pool.run_sized(n_elems, &|thread_idx| {
        let part = split_by(n_elems, BLOCK, pool.n_threads(), thread_idx);
        for start in part.clone().step_by(BLOCK) {
            let range = start..(start + BLOCK).min(part.end);
            // SAFETY: blocks of a part are disjoint, and so are the parts of the threads.
            unsafe { shared.with(range.clone(), |dst, src| f(range, dst, src)) };
        }
    });
}

/// As [`for_blocks`] for two outputs of the same length, each with its own source.
pub(crate) fn for_block_pairs(
    pool: &Pool,
    y: InOut<'_>,
    z: InOut<'_>,
    f: impl Fn(Range<usize>, (&mut [f32], &[f32]), (&mut [f32], &[f32])) + Sync,
) {
    let n_elems = y.len();
    assert_eq!(n_elems, z.len(), "both outputs have the same length");
    let (shared_y, shared_z) = (y.share(), z.share());
    pool.run_sized(n_elems, &|thread_idx| {
        let part = split_by(n_elems, BLOCK, pool.n_threads(), thread_idx);
        for start in part.clone().step_by(BLOCK) {
            let range = start..(start + BLOCK).min(part.end);
            // SAFETY: blocks of a part are disjoint, and so are the parts of the threads; `y` and
            // `z` are different mutable borrows.
            unsafe {
                shared_y.with(range.clone(), |y_dst, y_src| {
                    shared_z.with(range.clone(), |z_dst, z_src| {
                        f(range, (y_dst, y_src), (z_dst, z_src));
                    });
                });
            }
        }
    });
}
