//! What no kernel can exceed: multiply-adds that never leave registers.
//!
//! Idea: independent sums, as many as there are registers for, hide the latency of one multiply-add
//! behind the others, and nothing is loaded or stored. Complexity: `n_steps` times as many vector
//! instructions.

use crate::tier::{Tier, tier};

/// Sums of a thread that do not wait for each other.
const N_SUMS: usize = if cfg!(target_arch = "aarch64") { 24 } else { 12 };

/// A kind of multiply-add.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Fused, on the f32 lanes of the tier in use. 16-bit operands that are widened go here too.
    F32,
    /// Pairs of bf16 products that are added to an f32 lane by one instruction.
    Bf16Pairs,
}

impl Unit {
    /// Floating-point operations of one instruction; 0 where the tier in use has no such unit.
    #[cfg(target_arch = "x86_64")]
    fn flop(self) -> usize {
        match (self, tier()) {
            (Self::F32, Tier::Avx2) => 2 * 8,
            (_, Tier::Portable | Tier::Neon | Tier::Avx2) => 0,
            (Self::F32, _) => 2 * 16,
            (Self::Bf16Pairs, _) if Tier::Avx512Bf16.is_available() => 4 * 16,
            (Self::Bf16Pairs, _) => 0,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn flop(self) -> usize {
        if (self, tier()) == (Self::F32, Tier::Neon) { 2 * 4 } else { 0 }
    }
}

/// Runs on this thread; the floating-point operations that were done, or `None` where the tier in use
/// has no such unit.
pub fn multiply_adds(unit: Unit, n_steps: usize) -> Option<f64> {
    let flop = unit.flop();
    if flop == 0 {
        return None;
    }
    std::hint::black_box(run(unit, n_steps));
    Some((flop * N_SUMS * n_steps) as f64)
}

#[cfg(target_arch = "x86_64")]
fn run(unit: Unit, n_steps: usize) -> f32 {
    use std::arch::x86_64::{
        _mm256_cvtss_f32, _mm256_fmadd_ps, _mm256_set1_ps, _mm512_cvtne2ps_pbh, _mm512_cvtss_f32,
        _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_set1_ps,
    };
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn pairs(n_steps: usize) -> f32 {
        let (x, mut sums) = (_mm512_set1_ps(0.5), [_mm512_set1_ps(0.5); N_SUMS]);
        let x = _mm512_cvtne2ps_pbh(x, x);
        for _ in 0..n_steps {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, x, x);
            }
        }
        sums.iter().map(|&s| _mm512_cvtss_f32(s)).sum()
    }
    #[target_feature(enable = "avx512f")]
    fn wide(n_steps: usize) -> f32 {
        let (x, mut sums) = (_mm512_set1_ps(0.999), [_mm512_set1_ps(0.5); N_SUMS]);
        for _ in 0..n_steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, x, x);
            }
        }
        sums.iter().map(|&s| _mm512_cvtss_f32(s)).sum()
    }
    #[target_feature(enable = "avx2,fma")]
    fn narrow(n_steps: usize) -> f32 {
        let (x, mut sums) = (_mm256_set1_ps(0.999), [_mm256_set1_ps(0.5); N_SUMS]);
        for _ in 0..n_steps {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, x, x);
            }
        }
        sums.iter().map(|&s| _mm256_cvtss_f32(s)).sum()
    }
    // SAFETY: `tier()` returns only tiers that this machine has, and the caller has asked
    // `Unit::flop`, which leaves out the portable one and machines without bf16 pairs.
    unsafe {
        match (unit, tier()) {
            (Unit::Bf16Pairs, _) => pairs(n_steps),
            (Unit::F32, Tier::Avx2) => narrow(n_steps),
            (Unit::F32, _) => wide(n_steps),
        }
    }
}

#[cfg(target_arch = "aarch64")]
fn run(_unit: Unit, n_steps: usize) -> f32 {
    use std::arch::aarch64::{vdupq_n_f32, vfmaq_f32, vgetq_lane_f32};
    #[target_feature(enable = "neon")]
    fn neon(n_steps: usize) -> f32 {
        let (x, mut sums) = (vdupq_n_f32(0.999), [vdupq_n_f32(0.5); N_SUMS]);
        for _ in 0..n_steps {
            for sum in &mut sums {
                *sum = vfmaq_f32(x, *sum, x);
            }
        }
        sums.iter().map(|&s| vgetq_lane_f32::<0>(s)).sum()
    }
    // SAFETY: every 64-bit Arm target has this unit.
    unsafe { neon(n_steps) }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn run(_unit: Unit, _n_steps: usize) -> f32 {
    0.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_is_counted() {
        for unit in [Unit::F32, Unit::Bf16Pairs] {
            let [once, thrice] = [1, 3].map(|n_steps| multiply_adds(unit, n_steps));
            assert_eq!(thrice, once.map(|flop| 3.0 * flop), "{unit:?}");
            // A multiply-add is two operations on each of at least four lanes.
            assert!(once.is_none_or(|flop| flop >= (N_SUMS * 2 * 4) as f64), "{unit:?}: {once:?}");
        }
        assert_eq!(multiply_adds(Unit::F32, 1).is_some(), tier() != Tier::Portable);
    }
}
