//! 16-bit floats in files: conversions between f32 and the bits of `F16` (IEEE binary16) and `BF16`.
//!
//! Widening is exact. Narrowing rounds to nearest, ties to even, as PyTorch does; overflow gives infinity and a NaN
//! stays one. Source: IEEE 754-2019, 5.4.2.

/// The f32 with the value of binary16 `bits`.
pub(crate) fn f16_to_f32(bits: u16) -> f32 {
    let sign = u32::from(bits >> 15) << 31;
    let exponent = u32::from(bits >> 10) & 0x1f;
    let fraction = u32::from(bits) & 0x3ff;
    match exponent {
        // Subnormal: fraction * 2^-24, exact in f32.
        0 => {
            let magnitude = fraction as f32 * f32::from_bits((127 - 24) << 23);
            f32::from_bits(magnitude.to_bits() | sign)
        }
        0x1f => f32::from_bits(sign | 0x7f80_0000 | fraction << 13),
        _ => f32::from_bits(sign | (exponent + 127 - 15) << 23 | fraction << 13),
    }
}

/// The binary16 bits nearest to `value`.
pub(crate) fn f32_to_f16(value: f32) -> u16 {
    let bits = value.to_bits();
    let sign = ((bits >> 16) & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | ((magnitude >> 13) & 0x3ff) as u16;
    }
    // 65520 and above round to infinity.
    if magnitude >= 0x477f_f000 {
        return sign | 0x7c00;
    }
    // Below 2^-14 the result is subnormal: adding 0.5 to a number below 2^-14 leaves, in the low bits of the f32 sum,
    // the number rounded to multiples of 2^-24.
    if magnitude < 0x3880_0000 {
        let shifted = f32::from_bits(magnitude) + 0.5;
        return sign | (shifted.to_bits() - 0.5f32.to_bits()) as u16;
    }
    let odd = (magnitude >> 13) & 1;
    let rounded = magnitude - ((127 - 15) << 23) + 0xfff + odd;
    sign | (rounded >> 13) as u16
}

/// The f32 with the value of bfloat16 `bits`.
pub(crate) fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The bfloat16 bits nearest to `value`.
pub(crate) fn f32_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    let odd = (bits >> 16) & 1;
    ((bits + 0x7fff + odd) >> 16) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_16_bit_value_survives_the_way_to_f32_and_back() {
        for bits in 0..=u16::MAX {
            let wide = f16_to_f32(bits);
            if wide.is_nan() {
                assert!(f16_to_f32(f32_to_f16(wide)).is_nan());
            } else {
                assert_eq!(f32_to_f16(wide), bits);
            }
            let wide = bf16_to_f32(bits);
            if wide.is_nan() {
                assert!(bf16_to_f32(f32_to_bf16(wide)).is_nan());
            } else {
                assert_eq!(f32_to_bf16(wide), bits);
            }
        }
    }

    #[test]
    fn between_neighbours_the_nearer_wins_and_a_tie_goes_to_the_even_one() {
        type Narrow = fn(f32) -> u16;
        type Widen = fn(u16) -> f32;
        // Largest finite bits of each format.
        let formats: [(Narrow, Widen, u16); 2] =
            [(f32_to_f16, f16_to_f32, 0x7bff), (f32_to_bf16, bf16_to_f32, 0x7f7f)];
        for (narrow, widen, max) in formats {
            for low in 0..max {
                let (a, b) = (f64::from(widen(low)), f64::from(widen(low + 1)));
                let middle = f64::midpoint(a, b) as f32;
                assert_eq!(f64::from(middle), f64::midpoint(a, b), "f32 holds the middle exactly");
                assert_eq!(narrow(middle), low + (low & 1));
                assert_eq!(narrow(f32::from_bits(middle.to_bits() - 1)), low);
                assert_eq!(narrow(f32::from_bits(middle.to_bits() + 1)), low + 1);
                assert_eq!(narrow(-middle), (low + (low & 1)) | 0x8000);
            }
        }
    }

    #[test]
    fn overflow_gives_infinity() {
        assert_eq!(f32_to_f16(65519.0), 0x7bff);
        assert_eq!(f32_to_f16(65520.0), 0x7c00);
        assert_eq!(f32_to_f16(f32::NEG_INFINITY), 0xfc00);
        assert_eq!(f32_to_bf16(f32::MAX), 0x7f80);
    }
}
