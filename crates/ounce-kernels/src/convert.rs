//! Slices of bf16 and f16 to f32 and back.
//!
//! Idea: widening is exact. Narrowing rounds to nearest, ties to even; what is too large becomes
//! infinite, subnormal numbers are kept, and a NaN stays a (quiet) NaN. bf16 is the upper half of an
//! f32, so integer operations do it on every tier (the processor's own bf16 conversions flush
//! subnormals to zero and would give other bits). For f16 there are conversions in hardware wherever
//! there is AVX2; the portable form gives the same bits.
//!
//! Complexity: O(n), bound by memory. Source: IEEE 754-2019, 5.4.2.

#[cfg(target_arch = "x86_64")]
use crate::tier::{Tier, tier};
use half::{bf16, f16};

/// The bf16 nearest to `x`.
#[inline(always)]
pub fn round_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let odd = (bits >> 16) & 1;
    let nearest = bits.wrapping_add(0x7fff + odd) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    bf16::from_bits(if x.is_nan() { quiet_nan } else { nearest } as u16)
}

/// The f32 with the value of `x`.
#[inline(always)]
pub fn widen_bf16(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// The f16 nearest to `x`, without hardware.
#[inline(always)]
fn round_f16(x: f32) -> f16 {
    /// Magnitudes from here on round to infinity: 65520, halfway between the largest f16 and 2^16.
    const OVERFLOW: u32 = 0x477f_f000;
    /// The smallest normal f16, 2^-14.
    const NORMAL: u32 = 0x3880_0000;
    let (sign, magnitude) = ((x.to_bits() >> 16) & 0x8000, x.to_bits() & 0x7fff_ffff);
    // The exponent's bias is 15 instead of 127; rounding may carry into it, as it should.
    let odd = (magnitude >> 13) & 1;
    let normal = magnitude.wrapping_sub((127 - 15) << 23).wrapping_add(0xfff + odd) >> 13;
    // A subnormal f16 is a multiple of 2^-24, as is the last bit of an f32 between 0.5 and 1: the
    // addition rounds.
    let sum = f32::from_bits(magnitude) + 0.5;
    let subnormal = sum.to_bits().wrapping_sub(0.5f32.to_bits());
    let finite = if magnitude < NORMAL { subnormal } else { normal };
    let number = if magnitude < OVERFLOW { finite } else { 0x7c00 };
    let quiet_nan = 0x7e00 | (magnitude >> 13) & 0x3ff;
    f16::from_bits((sign | if x.is_nan() { quiet_nan } else { number }) as u16)
}

/// The f32 with the value of `x`, without hardware.
#[inline(always)]
pub(crate) fn widen_f16(x: f16) -> f32 {
    let bits = u32::from(x.to_bits());
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
    let normal = (magnitude << 13) + ((127 - 15) << 23);
    // Multiples of 2^-24, exact in f32.
    let subnormal = (magnitude as f32 * f32::from_bits((127 - 24) << 23)).to_bits();
    let quiet_bit = if magnitude > 0x7c00 { 0x0040_0000 } else { 0 };
    let infinite_or_nan = 0x7f80_0000 | magnitude << 13 | quiet_bit;
    let finite = if magnitude < 0x400 { subnormal } else { normal };
    f32::from_bits(sign | if magnitude < 0x7c00 { finite } else { infinite_or_nan })
}

tiered! {
    /// Writes the values of `src` to `dst`, which is as long.
    pub fn bf16_to_f32(dst: &mut [f32], src: &[bf16]) {
        assert_eq!(dst.len(), src.len(), "length of the source");
        for (dst, &src) in dst.iter_mut().zip(src) {
            *dst = widen_bf16(src);
        }
    }
}

tiered! {
    /// Writes the bf16 nearest to the values of `src` to `dst`, which is as long.
    pub fn f32_to_bf16(dst: &mut [bf16], src: &[f32]) {
        assert_eq!(dst.len(), src.len(), "length of the source");
        for (dst, &src) in dst.iter_mut().zip(src) {
            *dst = round_bf16(src);
        }
    }
}

/// Writes the values of `src` to `dst`, which is as long.
pub fn f16_to_f32(dst: &mut [f32], src: &[f16]) {
    assert_eq!(dst.len(), src.len(), "length of the source");
    #[cfg(target_arch = "x86_64")]
    if tier() >= Tier::Avx2 {
        // SAFETY: every vector tier has F16C.
        return unsafe { f16c::widen(dst, src) };
    }
    for (dst, &src) in dst.iter_mut().zip(src) {
        *dst = widen_f16(src);
    }
}

/// Writes the f16 nearest to the values of `src` to `dst`, which is as long.
pub fn f32_to_f16(dst: &mut [f16], src: &[f32]) {
    assert_eq!(dst.len(), src.len(), "length of the source");
    #[cfg(target_arch = "x86_64")]
    if tier() >= Tier::Avx2 {
        // SAFETY: every vector tier has F16C.
        return unsafe { f16c::round(dst, src) };
    }
    for (dst, &src) in dst.iter_mut().zip(src) {
        *dst = round_f16(src);
    }
}

/// Conversions of eight numbers at a time in hardware.
#[cfg(target_arch = "x86_64")]
mod f16c {
    use half::f16;
    use std::arch::x86_64::{
        __m128i, __m256, _MM_FROUND_TO_NEAREST_INT, _mm256_cvtph_ps, _mm256_cvtps_ph,
    };
    use std::mem::transmute;

    const LANES: usize = 8;

    #[target_feature(enable = "avx,f16c")]
    pub(super) fn widen(dst: &mut [f32], src: &[f16]) {
        let (dst, dst_rest) = dst.as_chunks_mut::<LANES>();
        let (src, src_rest) = src.as_chunks::<LANES>();
        dst.iter_mut().zip(src).for_each(|(dst, src)| widen_lanes(dst, src));
        let (mut wide, mut narrow) = ([0.0; LANES], [f16::from_bits(0); LANES]);
        narrow[..src_rest.len()].copy_from_slice(src_rest);
        widen_lanes(&mut wide, &narrow);
        dst_rest.copy_from_slice(&wide[..dst_rest.len()]);
    }

    #[target_feature(enable = "avx,f16c")]
    pub(super) fn round(dst: &mut [f16], src: &[f32]) {
        let (dst, dst_rest) = dst.as_chunks_mut::<LANES>();
        let (src, src_rest) = src.as_chunks::<LANES>();
        dst.iter_mut().zip(src).for_each(|(dst, src)| round_lanes(dst, src));
        let (mut wide, mut narrow) = ([0.0; LANES], [f16::from_bits(0); LANES]);
        wide[..src_rest.len()].copy_from_slice(src_rest);
        round_lanes(&mut narrow, &wide);
        dst_rest.copy_from_slice(&narrow[..dst_rest.len()]);
    }

    #[target_feature(enable = "avx,f16c")]
    #[inline]
    fn widen_lanes(dst: &mut [f32; LANES], src: &[f16; LANES]) {
        // SAFETY: both are 128 bits of which every pattern is valid.
        let narrow = unsafe { transmute::<[f16; LANES], __m128i>(*src) };
        // SAFETY: both are eight f32.
        *dst = unsafe { transmute::<__m256, [f32; LANES]>(_mm256_cvtph_ps(narrow)) };
    }

    #[target_feature(enable = "avx,f16c")]
    #[inline]
    fn round_lanes(dst: &mut [f16; LANES], src: &[f32; LANES]) {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT;
        // SAFETY: both are eight f32.
        let wide = unsafe { transmute::<[f32; LANES], __m256>(*src) };
        // SAFETY: both are 128 bits of which every pattern is valid.
        *dst = unsafe { transmute::<__m128i, [f16; LANES]>(_mm256_cvtps_ph::<NEAREST>(wide)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tier::{Tier, set_tier};

    /// Every 16-bit value, and what lies halfway to its neighbour, a bit below and a bit above; a
    /// million others spread over all f32; of odd length, so that there is a rest.
    fn numbers() -> Vec<f32> {
        let mut all: Vec<f32> = (0..u32::MAX).step_by(4093).map(f32::from_bits).collect();
        for bits in 0..=u16::MAX {
            let wide = f16::from_bits(bits).to_f32_const().to_bits();
            for half in [0x1000, 0] {
                let at = wide.wrapping_add(half);
                all.extend([at.wrapping_sub(1), at, at.wrapping_add(1)].map(f32::from_bits));
            }
            let wide = u32::from(bits) << 16;
            let halfway = wide | 0x8000;
            all.extend([wide, halfway - 1, halfway, halfway + 1].map(f32::from_bits));
        }
        // Halfway between subnormal f16.
        all.extend((0..2048).map(|i| (i as f32 + 0.5) * 2f32.powi(-24)));
        all.truncate((all.len() - 1) / 2 * 2 + 1);
        all
    }

    /// Equal bits, or both NaN.
    #[track_caller]
    fn assert_same<T: Copy + std::fmt::Debug>(
        got: &[T],
        want: &[T],
        bits: impl Fn(T) -> (u32, bool),
    ) {
        for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
            let ((g, g_nan), (w, w_nan)) = (bits(got), bits(want));
            assert!(g == w || (g_nan && w_nan), "number {i}: {got:?} {g:#x}, want {want:?} {w:#x}");
        }
    }

    #[test]
    fn every_16_bit_value_widens_as_in_the_half_crate_and_comes_back_on_every_tier() {
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let bf16s: Vec<bf16> = all.iter().map(|&b| bf16::from_bits(b)).collect();
        let f16s: Vec<f16> = all.iter().map(|&b| f16::from_bits(b)).collect();
        let wide_bits = |x: f32| (x.to_bits(), x.is_nan());
        for tier in Tier::available() {
            set_tier(Some(tier));
            let mut wide = vec![0.0; all.len()];
            bf16_to_f32(&mut wide, &bf16s);
            let want: Vec<f32> = bf16s.iter().map(|x| x.to_f32_const()).collect();
            assert_same(&wide, &want, wide_bits);
            let mut back = vec![bf16::from_bits(1); all.len()];
            f32_to_bf16(&mut back, &wide);
            assert_same(&back, &bf16s, |x| (x.to_bits().into(), x.is_nan()));

            f16_to_f32(&mut wide, &f16s);
            let want: Vec<f32> = f16s.iter().map(|x| x.to_f32_const()).collect();
            assert_same(&wide, &want, wide_bits);
            let mut back = vec![f16::from_bits(1); all.len()];
            f32_to_f16(&mut back, &wide);
            assert_same(&back, &f16s, |x| (x.to_bits().into(), x.is_nan()));
        }
        set_tier(None);
    }

    #[test]
    fn numbers_are_rounded_as_in_the_half_crate_with_the_same_bits_on_every_tier() {
        let numbers = numbers();
        let want_bf16: Vec<bf16> = numbers.iter().map(|&x| bf16::from_f32_const(x)).collect();
        let want_f16: Vec<f16> = numbers.iter().map(|&x| f16::from_f32_const(x)).collect();
        for tier in Tier::available() {
            set_tier(Some(tier));
            let mut got = vec![bf16::from_bits(1); numbers.len()];
            f32_to_bf16(&mut got, &numbers);
            assert_same(&got, &want_bf16, |x| (x.to_bits().into(), false));
            let mut got = vec![f16::from_bits(1); numbers.len()];
            f32_to_f16(&mut got, &numbers);
            assert_same(&got, &want_f16, |x| (x.to_bits().into(), false));
        }
        set_tier(None);
    }

    #[test]
    fn slices_of_any_length_are_converted_to_their_end() {
        for n in 0..20 {
            let x: Vec<f32> = (0..n).map(|i| i as f32 - 7.25).collect();
            let (mut narrow, mut wide) = (vec![f16::from_bits(1); n], vec![9.0; n]);
            f32_to_f16(&mut narrow, &x);
            f16_to_f32(&mut wide, &narrow);
            assert_eq!(wide, x, "these fit in 11 bits");
        }
    }
}
