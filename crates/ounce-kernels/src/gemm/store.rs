//! The end of a tile: bias and rounding.

use crate::convert::{f32_to_f16, round_bf16};
use crate::gemm::tile::MAX_NR;
use half::{bf16, f16};

/// `height` rows of sums at `src`, `stride` apart, of which each has `width` columns.
#[derive(Clone, Copy)]
pub(super) struct SumTile {
    pub(super) src: *const f32,
    pub(super) stride: usize,
    pub(super) height: usize,
    pub(super) width: usize,
}

impl SumTile {
    /// # Safety
    /// `i < height`, and the row is readable.
    #[inline(always)]
    unsafe fn row<'a>(self, i: usize) -> &'a [f32] {
        // SAFETY: the caller's promise.
        unsafe { std::slice::from_raw_parts(self.src.add(i * self.stride), self.width) }
    }
}

/// Adds `bias` to `height` rows in place.
///
/// # Safety
/// `c` points at `height` rows, `stride` apart, of at least `bias.len()` elements that are ours.
pub(super) unsafe fn add_bias(c: *mut f32, stride: usize, height: usize, bias: &[f32]) {
    for i in 0..height {
        // SAFETY: the caller's promise.
        let row = unsafe { std::slice::from_raw_parts_mut(c.add(i * stride), bias.len()) };
        for (c, bias) in row.iter_mut().zip(bias) {
            *c += bias;
        }
    }
}

tiered! {
    /// Writes `sums` plus `bias`, rounded, to rows `stride` apart.
    ///
    /// # Safety
    /// The rows of `sums` are readable and those at `dst` exclusively ours.
    pub(super) unsafe fn round_to_bf16(dst: *mut bf16, stride: usize, sums: SumTile, bias: Option<&[f32]>) {
        for i in 0..sums.height {
            // SAFETY: the caller's promise.
            let (dst, src) = unsafe {
                (std::slice::from_raw_parts_mut(dst.add(i * stride), sums.width), sums.row(i))
            };
            if let Some(bias) = bias {
                for ((dst, src), bias) in dst.iter_mut().zip(src).zip(bias) {
                    *dst = round_bf16(src + bias);
                }
            } else {
                for (dst, &src) in dst.iter_mut().zip(src) {
                    *dst = round_bf16(src);
                }
            }
        }
    }
}

/// As [`round_to_bf16`].
///
/// # Safety
/// The same.
pub(super) unsafe fn round_to_f16(
    dst: *mut f16,
    stride: usize,
    sums: SumTile,
    bias: Option<&[f32]>,
) {
    for i in 0..sums.height {
        // SAFETY: the caller's promise.
        let (dst, src) = unsafe {
            (std::slice::from_raw_parts_mut(dst.add(i * stride), sums.width), sums.row(i))
        };
        let Some(bias) = bias else {
            f32_to_f16(dst, src);
            continue;
        };
        let mut row = [0.0; MAX_NR];
        for ((row, src), bias) in row.iter_mut().zip(src).zip(bias) {
            *row = src + bias;
        }
        f32_to_f16(dst, &row[..sums.width]);
    }
}
