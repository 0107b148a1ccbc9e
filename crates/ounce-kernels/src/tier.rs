//! Which instruction set the kernels use, chosen once at run time.
//!
//! Idea: a kernel body is ordinary Rust with explicit `mul_add`; `tiered!` compiles it once per
//! tier and jumps to the best one the machine has. Every tier computes the same sequence of
//! rounded operations per element, so all tiers give the same bits. One exception has a tier of its
//! own: products of two bf16 matrices by `vdpbf16ps`, which adds pairs and flushes subnormal numbers.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set the kernels are compiled for, slowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tier {
    /// What every target has; fused multiply-add may be a library call.
    Portable,
    /// 64-bit Arm with its vector unit (4 lanes), which is part of every such target: other kernels
    /// than matrix products are those of [`Tier::Portable`], compiled for it.
    Neon,
    /// x86-64 with AVX2, FMA and F16C (8 lanes).
    Avx2,
    /// x86-64 with AVX-512 F, VL, BW, DQ (16 lanes).
    Avx512,
    /// As [`Tier::Avx512`], and products of two bf16 matrices run on AVX-512-BF16 (32 lanes).
    Avx512Bf16,
}

/// The tier in use plus one; 0: not asked for yet.
static CURRENT: AtomicU8 = AtomicU8::new(0);

impl Tier {
    const ALL: [Tier; 5] = [Tier::Portable, Tier::Neon, Tier::Avx2, Tier::Avx512, Tier::Avx512Bf16];

    /// The fastest tier of this machine.
    ///
    /// That is the last available one, but [`Tier::Avx512Bf16`] only on processors of AMD. Measured
    /// per core and register-only, `vdpbf16ps` does twice the FLOP of f32 multiply-adds on Zen 4 and Zen 5 and
    /// half of them on Emerald Rapids, where bf16 widened to f32 is faster and exact.
    pub fn detect() -> Tier {
        let best = Tier::available().last().unwrap_or(Tier::Portable);
        if best == Tier::Avx512Bf16 && !is_amd() { Tier::Avx512 } else { best }
    }

    /// Every tier this machine can run, slowest first.
    pub fn available() -> impl Iterator<Item = Tier> {
        Tier::ALL.into_iter().filter(|t| t.is_available())
    }

    /// Whether this machine can run the tier.
    #[cfg(target_arch = "x86_64")]
    pub fn is_available(self) -> bool {
        match self {
            Tier::Portable => true,
            Tier::Neon => false,
            Tier::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            Tier::Avx512 => {
                Tier::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
            }
            Tier::Avx512Bf16 => {
                Tier::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
        }
    }

    /// Whether this machine can run the tier.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn is_available(self) -> bool {
        self == Tier::Portable || cfg!(target_arch = "aarch64") && self == Tier::Neon
    }
}

/// Whether the processor says that AMD made it.
fn is_amd() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let vendor = std::arch::x86_64::__cpuid(0);
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes) == [*b"Auth", *b"enti", *b"cAMD"]
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Tier::Portable => "portable",
            Tier::Neon => "neon",
            Tier::Avx2 => "avx2",
            Tier::Avx512 => "avx512",
            Tier::Avx512Bf16 => "avx512bf16",
        })
    }
}

/// The tier in use: the one that was set, else the best of this machine.
#[inline]
pub fn tier() -> Tier {
    match CURRENT.load(Ordering::Relaxed) {
        0 => {
            set_tier(None);
            Tier::detect()
        }
        n => Tier::ALL[usize::from(n - 1)],
    }
}

/// Makes the whole process use `tier` (`None`: the best again). For tests and measurements.
///
/// # Panics
/// If this machine cannot run the tier.
pub fn set_tier(tier: Option<Tier>) {
    assert!(tier.is_none_or(Tier::is_available), "this machine cannot run tier {tier:?}");
    CURRENT.store(tier.unwrap_or_else(Tier::detect) as u8 + 1, Ordering::Relaxed);
}

/// Compiles a function once per tier and calls the one in use.
///
/// The body must call only functions that are inlined into it, or they run at the portable tier.
macro_rules! tiered {
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $body:block) => {
        $(#[$meta])*
        $vis unsafe fn $name($($arg: $ty),*) {
            tiered! {
                /// The body relies on what the caller of the function around it promises.
                fn promised($($arg: $ty),*) $body
            }
            promised($($arg),*);
        }
    };
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body($($arg: $ty),*) $(-> $ret)? $body
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
            fn avx512($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $ty),*) $(-> $ret)? { body($($arg),*) }
            match $crate::tier::tier() {
                // SAFETY: `tier()` returns only tiers that this machine has.
                #[cfg(target_arch = "x86_64")]
                $crate::tier::Tier::Avx512 | $crate::tier::Tier::Avx512Bf16 => unsafe {
                    avx512($($arg),*)
                },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::tier::Tier::Avx2 => unsafe { avx2($($arg),*) },
                _ => body($($arg),*),
            }
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detected_tier_is_the_last_available_one_but_for_slow_bf16_products() {
        let best = Tier::available().last();
        assert!(Tier::detect().is_available());
        assert!(Some(Tier::detect()) == best || best == Some(Tier::Avx512Bf16));
        assert_eq!(Tier::detect() == Tier::Avx512Bf16, best == Some(Tier::Avx512Bf16) && is_amd());
        assert_eq!(Tier::Avx512Bf16.to_string(), "avx512bf16");
    }
}
