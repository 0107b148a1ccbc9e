//! What 16 bits keep of a number: rounding to a dtype, and the split of a master.
//!
//! A binary format with `m` bits behind the point and smallest exponent `e_min` holds the multiples
//! of `2^(max(e, e_min) - m)` near a number of exponent `e`; what lies above its largest number after
//! rounding is infinite. Sources: IEEE 754-2019 section 4.3.1; bfloat16 is the upper half of
//! binary32.

use ounce_ir::DType;

/// `x` as a value of `dtype` keeps it: to nearest, ties to even, for bf16 and f16; `x` itself for
/// f32 and f64, since the oracle computes in f64 throughout.
pub fn round_to(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::Bf16 => round_binary(x, 7, -126, 127),
        DType::F16 => round_binary(x, 10, -14, 15),
        _ => x,
    }
}

fn round_binary(x: f64, mantissa_bits: i32, e_min: i32, e_max: i32) -> f64 {
    if x == 0.0 || !x.is_finite() {
        return x;
    }
    let exponent = ((x.to_bits() >> 52) & 0x7FF) as i32 - 1023;
    let unit = 2.0_f64.powi(exponent.max(e_min) - mantissa_bits);
    let rounded = (x / unit).round_ties_even() * unit;
    // Rounding may carry into the next power of two.
    if rounded.abs() >= 2.0_f64.powi(e_max + 1) { f64::INFINITY.copysign(x) } else { rounded }
}

/// A master as a bf16 parameter and the state that completes it: `hi = (bits + 0x8000) >> 16` (the
/// upper half of an f32, to nearest, ties away from zero) and `lo = bits - (hi << 16)`.
pub fn split(master: f32) -> (f32, i16) {
    let bits = master.to_bits();
    let hi = bits.wrapping_add(0x8000) & 0xFFFF_0000;
    // The low half as a signed number; no carry happened where it is below 0x8000.
    (f32::from_bits(hi), bits as u16 as i16)
}

/// The master that [`split`] took apart.
pub fn join(hi: f32, lo: i16) -> f32 {
    f32::from_bits(hi.to_bits().wrapping_add_signed(i32::from(lo)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_keeps_what_fits_and_takes_ties_to_even() {
        for (dtype, x, kept) in [
            (DType::Bf16, 1.0, 1.0),
            (DType::Bf16, 1.0 + 2.0_f64.powi(-8), 1.0),
            (DType::Bf16, 1.0 + 3.0 * 2.0_f64.powi(-8), 1.0 + 2.0_f64.powi(-6)),
            (DType::Bf16, -1.0 - 2.1 * 2.0_f64.powi(-8), -1.0 - 2.0_f64.powi(-7)),
            (DType::Bf16, 3.4e38, f64::INFINITY),
            (DType::Bf16, 3.0 * 2.0_f64.powi(-134), 2.0_f64.powi(-132)),
            (DType::F16, 65519.0, 65504.0),
            (DType::F16, -65520.0, f64::NEG_INFINITY),
            (DType::F16, 2.0_f64.powi(-25), 0.0),
            (DType::F16, 1.1 * 2.0_f64.powi(-25), 2.0_f64.powi(-24)),
            (DType::F16, 2049.0, 2048.0),
            (DType::F32, 0.1, 0.1),
        ] {
            assert_eq!(round_to(dtype, x), kept, "{x} in {dtype}");
        }
        assert!(round_to(DType::F16, f64::NAN).is_nan());
    }

    #[test]
    fn every_low_half_comes_back_from_its_split() {
        // Signs, an ordinary exponent, the smallest numbers, and a carry into the exponent.
        for upper in [0x3F80_u32, 0xBF80, 0x0000, 0x8000, 0x007F, 0x3FFF, 0x7F7E] {
            for low in 0..=0xFFFF_u32 {
                let x = f32::from_bits(upper << 16 | low);
                let (hi, lo) = split(x);
                assert_eq!(hi.to_bits() & 0xFFFF, 0, "{x:?}");
                assert_eq!(join(hi, lo).to_bits(), x.to_bits(), "{x:?}");
            }
        }
    }
}
