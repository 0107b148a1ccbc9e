//! Exact f32 master weights in two halves of 16 bits.
//!
//! Idea: `hi = (bits + 0x8000) >> 16` is the weight rounded to bf16, ties away from zero, and is what
//! the other kernels read; `lo = bits - (hi << 16)` lies in -32768..=32767 and is the rest. Together
//! they are the f32, bit for bit, in 4 bytes. (With ties to even the sign of a rest of 32768 would
//! be lost.) All arithmetic wraps, so the split can be undone for every bit pattern.
//!
//! Special values: infinities and the usual NaN (0x7fc00000) keep their class in `hi`. A finite
//! weight above the largest bf16 has an infinite `hi`. A NaN whose payload lies in its low half alone
//! may have an infinite `hi`, and one within 0x8000 of the end of its sign's patterns has a zero:
//! arithmetic makes no such NaN, and joining gives it back.

use crate::pool::SharedMut;
use half::bf16;
use std::ops::Range;

/// `bits` of an f32 in two halves.
#[inline(always)]
pub fn split_master(x: f32) -> (bf16, i16) {
    let bits = x.to_bits();
    let hi = bits.wrapping_add(0x8000) >> 16;
    (bf16::from_bits(hi as u16), bits.wrapping_sub(hi << 16) as i16)
}

/// The f32 of two halves.
#[inline(always)]
pub fn join_master(hi: bf16, lo: i16) -> f32 {
    f32::from_bits((u32::from(hi.to_bits()) << 16).wrapping_add(lo as u32))
}

tiered! {
    /// Writes the halves of `src` to `hi` and `lo`, which are as long.
    pub fn split_masters(hi: &mut [bf16], lo: &mut [i16], src: &[f32]) {
        assert!(hi.len() == src.len() && lo.len() == src.len(), "both halves are as long");
        for ((hi, lo), &src) in hi.iter_mut().zip(lo).zip(src) {
            (*hi, *lo) = split_master(src);
        }
    }
}

tiered! {
    /// Writes the f32 of `hi` and `lo` to `dst`, which is as long.
    pub fn join_masters(dst: &mut [f32], hi: &[bf16], lo: &[i16]) {
        assert!(hi.len() == dst.len() && lo.len() == dst.len(), "both halves are as long");
        for ((dst, &hi), &lo) in dst.iter_mut().zip(hi).zip(lo) {
            *dst = join_master(hi, lo);
        }
    }
}

/// The exact values of a parameter, as an update reads and writes them.
#[derive(Debug)]
pub enum MasterMut<'a> {
    /// The parameter is f32 itself.
    F32(&'a mut [f32]),
    /// In two halves of one length.
    Split {
        /// The parameter as other kernels read it.
        hi: &'a mut [bf16],
        /// The rest.
        lo: &'a mut [i16],
    },
}

impl MasterMut<'_> {
    /// Number of elements.
    ///
    /// # Panics
    /// If halves differ in length.
    pub fn len(&self) -> usize {
        match self {
            MasterMut::F32(w) => w.len(),
            MasterMut::Split { hi, lo } => {
                assert_eq!(hi.len(), lo.len(), "both halves have one length");
                hi.len()
            }
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A [`MasterMut`] that threads update together, each its own range.
pub(crate) enum SharedMaster<'a> {
    F32(SharedMut<'a, f32>),
    Split(SharedMut<'a, bf16>, SharedMut<'a, i16>),
}

impl<'a> SharedMaster<'a> {
    pub(crate) fn new(master: MasterMut<'a>) -> Self {
        match master {
            MasterMut::F32(w) => Self::F32(SharedMut::new(w)),
            MasterMut::Split { hi, lo } => Self::Split(SharedMut::new(hi), SharedMut::new(lo)),
        }
    }

    /// Lets `f` change the values of `range`, in `buf` if they are stored in halves.
    ///
    /// # Safety
    /// No two live ranges may overlap.
    #[inline]
    pub(crate) unsafe fn update(
        &self,
        range: Range<usize>,
        buf: &mut [f32],
        f: impl FnOnce(&mut [f32]),
    ) {
        match self {
            // SAFETY: the caller's promise.
            Self::F32(w) => f(unsafe { w.range(range) }),
            Self::Split(hi, lo) => {
                // SAFETY: the caller's promise.
                let (hi, lo) = unsafe { (hi.range(range.clone()), lo.range(range)) };
                let buf = &mut buf[..hi.len()];
                join_masters(buf, hi, lo);
                f(buf);
                split_masters(hi, lo, buf);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::{Tier, set_tier};

    /// Upper halves: zeros, subnormal, ordinary of both signs and parities, largest finite, infinite,
    /// NaN, and the last patterns of each sign.
    const UPPER: [u32; 14] = [
        0x0000, 0x8000, 0x0001, 0x007f, 0x3f80, 0x3f81, 0xbf7f, 0xc2c9, 0x7f7f, 0xff7f, 0x7f80,
        0x7fc0, 0x7fff, 0xffff,
    ];

    #[test]
    fn every_low_half_comes_back_under_every_upper_half_on_every_tier() {
        for tier in Tier::available() {
            set_tier(Some(tier));
            for upper in UPPER {
                let x: Vec<f32> =
                    (0..=0xffff).map(|lower| f32::from_bits(upper << 16 | lower)).collect();
                let mut hi = vec![bf16::from_bits(1); x.len()];
                let (mut lo, mut back) = (vec![1; x.len()], vec![1.0; x.len()]);
                split_masters(&mut hi, &mut lo, &x);
                join_masters(&mut back, &hi, &lo);
                for (x, back) in x.iter().zip(&back) {
                    assert_eq!(x.to_bits(), back.to_bits(), "{tier}");
                }
            }
        }
        set_tier(None);
    }

    #[test]
    fn the_upper_half_is_the_nearest_bf16_with_ties_away_from_zero() {
        for upper in UPPER.into_iter().filter(|u| u & 0x7fff < 0x7f80) {
            for lower in 0..=0xffffu32 {
                let x = f32::from_bits(upper << 16 | lower);
                let hi = split_master(x).0.to_f32_const();
                let away = f32::from_bits((upper + 1) << 16);
                let toward = f32::from_bits(upper << 16);
                assert_eq!(hi.to_bits(), if lower < 0x8000 { toward } else { away }.to_bits());
            }
        }
    }

    #[test]
    fn special_values_keep_their_class_where_stated() {
        let hi = |bits: u32| split_master(f32::from_bits(bits)).0;
        assert_eq!(hi(0x7f80_0000), bf16::INFINITY);
        assert_eq!(hi(0xff80_0000), bf16::NEG_INFINITY);
        assert!(hi(0x7fc0_0000).is_nan() && hi(0xffc0_0000).is_nan());
        assert_eq!(hi(f32::MAX.to_bits()), bf16::INFINITY);
        assert_eq!(hi(0x7f80_0001), bf16::INFINITY);
        assert_eq!(hi(0xffff_ffff), bf16::from_bits(0));
        assert_eq!(hi(0x7fff_ffff), bf16::from_bits(0x8000));
    }
}
