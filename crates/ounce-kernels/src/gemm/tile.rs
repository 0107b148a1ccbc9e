//! Register tiles: `MR x NR` sums held in registers while the depth of a block streams by.
//!
//! Each step reads NR packed units of B and MR of A and does MR x NR fused multiply-adds. A unit is
//! an f32 or, for the tile of AVX-512-BF16, a pair of bf16 of neighbouring depths. The sums start at
//! zero or at the stored C. The f32 tiles of all tiers perform the same chain per element.
//!
//! A tile also asks the caches for what comes after it ([`Ahead`]): the packed operands of a block do
//! not fit in the second level all at once, and waiting for the third took a tenth of the time.

use crate::tier::{Tier, tier};
use crate::view::FloatType;

/// The largest tile height of any tier.
pub(crate) const MAX_MR: usize = 12;
/// The largest tile width of any tier.
pub(crate) const MAX_NR: usize = 64;

/// Distance of the rows of a left operand that is stored row by row.
const ROW_LANE: usize = 64;
/// Steps between two requests of a tile to the caches.
const STEPS_PER_REQUEST: usize = 4;
/// Bytes of a cache line.
pub(crate) const LINE_BYTES: usize = 64;

/// An operand of a tile: row (or column) `i` at unit `p` is at `ptr + p * stride + i * lane`.
#[derive(Clone, Copy)]
pub(crate) struct Panel {
    pub(crate) ptr: *const f32,
    pub(crate) stride: usize,
    /// 1, or for a left operand [`ROW_LANE`].
    lane: usize,
}

impl Panel {
    /// Rows (or columns) are neighbours, depths `stride` apart.
    pub(crate) fn new(ptr: *const f32, stride: usize) -> Self {
        Self { ptr, stride, lane: 1 }
    }

    /// Depths are neighbours, rows 64 apart: only for a left operand.
    pub(crate) fn rows_of_64(ptr: *const f32) -> Self {
        Self { ptr, stride: 1, lane: ROW_LANE }
    }

    /// The operand from row (or column) `i` and depth `p` on.
    #[inline(always)]
    pub(crate) fn from(self, i: usize, p: usize) -> Self {
        Self { ptr: self.ptr.wrapping_add(i * self.lane + p * self.stride), ..self }
    }
}

/// What a tile asks the caches for while it computes. Addresses need not be valid.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    /// Lines wanted in the second level, one after another, up to `end`.
    pub(crate) line: *const u8,
    pub(crate) end: *const u8,
    /// The tile of C that comes next, and the bytes from row to row; its rows are as wide as ours.
    pub(crate) c: *const u8,
    pub(crate) c_stride: usize,
}

impl Ahead {
    /// Nothing.
    pub(crate) const NONE: Ahead =
        Ahead { line: std::ptr::null(), end: std::ptr::null(), c: std::ptr::null(), c_stride: 0 };
}

/// `(steps, a, b, c, c_stride, from_c, ahead)`.
type TileFn = unsafe fn(usize, Panel, Panel, *mut f32, usize, bool, Ahead);

/// The register tile of a tier.
#[derive(Clone, Copy)]
pub(crate) struct Tile {
    /// Rows.
    pub(crate) mr: usize,
    /// Columns.
    pub(crate) nr: usize,
    /// Depths in a unit: 1, or 2 for pairs of bf16.
    pub(crate) unit_depth: usize,
    /// For a left operand by depth, and by rows.
    by_depth: TileFn,
    by_rows: TileFn,
}

/// A tile and both its functions.
macro_rules! tile {
    ($function:ident, $mr:literal, $vectors:literal, $lanes:literal, $unit_depth:literal) => {
        Tile {
            mr: $mr,
            nr: $vectors * $lanes,
            unit_depth: $unit_depth,
            by_depth: $function::<$mr, $vectors, 1>,
            by_rows: $function::<$mr, $vectors, ROW_LANE>,
        }
    };
}

impl Tile {
    /// The fastest tile of the tier in use for operands of these types.
    pub(crate) fn of(a: FloatType, b: FloatType) -> Self {
        let are_bf16 = (a, b) == (FloatType::Bf16, FloatType::Bf16);
        match (tier(), are_bf16) {
            #[cfg(target_arch = "x86_64")]
            (Tier::Avx512Bf16, true) => tile!(avx512_pairs, 6, 4, 16, 2),
            #[cfg(target_arch = "x86_64")]
            (Tier::Avx512 | Tier::Avx512Bf16, _) => tile!(avx512, 12, 2, 16, 1),
            #[cfg(target_arch = "x86_64")]
            (Tier::Avx2, _) => tile!(avx2, 6, 2, 8, 1),
            #[cfg(target_arch = "aarch64")]
            (Tier::Neon, _) => tile!(neon, 6, 4, 4, 1),
            _ => tile!(portable, 4, 16, 1, 1),
        }
    }

    /// A tile of the tier in use whose sides divide 64, for attention.
    pub(crate) fn dividing_64() -> Self {
        match tier() {
            #[cfg(target_arch = "x86_64")]
            Tier::Avx512 | Tier::Avx512Bf16 => tile!(avx512, 8, 2, 16, 1),
            #[cfg(target_arch = "x86_64")]
            Tier::Avx2 => tile!(avx2, 4, 2, 8, 1),
            #[cfg(target_arch = "aarch64")]
            Tier::Neon => tile!(neon, 4, 4, 4, 1),
            _ => tile!(portable, 4, 16, 1, 1),
        }
    }

    /// One tile: `c[..height, ..width]` (rows `c_stride` apart) from panels of `steps` units.
    ///
    /// # Safety
    /// Every unit of `a` has `mr` and of `b` has `nr` readable elements, and the part of `c` named
    /// above is exclusively ours.
    #[inline]
    pub(crate) unsafe fn run(
        &self,
        steps: usize,
        a: Panel,
        b: Panel,
        c: *mut f32,
        c_stride: usize,
        height: usize,
        width: usize,
        from_c: bool,
    ) {
        // SAFETY: the caller's promise.
        unsafe { self.run_ahead(steps, a, b, c, c_stride, height, width, from_c, Ahead::NONE) };
    }

    /// As [`Tile::run`], with something to ask the caches for.
    ///
    /// # Safety
    /// As for [`Tile::run`].
    #[inline]
    pub(crate) unsafe fn run_ahead(
        &self,
        steps: usize,
        a: Panel,
        b: Panel,
        c: *mut f32,
        c_stride: usize,
        height: usize,
        width: usize,
        from_c: bool,
        ahead: Ahead,
    ) {
        let full = if a.lane == 1 { self.by_depth } else { self.by_rows };
        if height == self.mr && width == self.nr {
            // SAFETY: the caller's promise; the tier of the tile was checked when it was chosen.
            return unsafe { full(steps, a, b, c, c_stride, from_c, ahead) };
        }
        // An edge: the same tile on a padded copy, of which the part inside C is stored.
        let mut edge = [0.0; MAX_MR * MAX_NR];
        let nr = self.nr;
        // SAFETY: the copies touch only the part of C that is ours, and `edge` holds a full tile.
        unsafe {
            if from_c {
                for i in 0..height {
                    let src = std::slice::from_raw_parts(c.add(i * c_stride), width);
                    edge[i * nr..i * nr + width].copy_from_slice(src);
                }
            }
            full(steps, a, b, edge.as_mut_ptr(), nr, from_c, ahead);
            for i in 0..height {
                let dst = std::slice::from_raw_parts_mut(c.add(i * c_stride), width);
                dst.copy_from_slice(&edge[i * nr..i * nr + width]);
            }
        }
    }
}

/// Asks the caches, down to the first level, for the line at `p`, which need not be valid.
#[inline(always)]
pub(crate) fn prefetch_near(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE is part of x86-64, and a prefetch of any address has no effect but on caches.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// As [`prefetch_near`], down to the second level only.
#[inline(always)]
pub(crate) fn prefetch_far(p: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: as above.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(p.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = p;
}

/// A tile written with the intrinsics of one vector width.
macro_rules! vector_tile {
    ($name:ident, $arch:ident, $target:literal, $features:literal, $lanes:literal,
     $load:ident, $store:ident, $set:ident, $fma:expr) => {
        /// # Safety
        /// As [`Tile::run`], for a full tile; the machine has the tile's features.
        #[cfg(target_arch = $target)]
        #[target_feature(enable = $features)]
        unsafe fn $name<const MR: usize, const NV: usize, const LANE: usize>(
            steps: usize,
            a: Panel,
            b: Panel,
            c: *mut f32,
            c_stride: usize,
            from_c: bool,
            ahead: Ahead,
        ) {
            use std::arch::$arch::{$load, $set, $store};
            let mut sum = [[$set(0.0); NV]; MR];
            let (mut a_ptr, mut b_ptr) = (a.ptr, b.ptr);
            let (mut line, mut row) = (ahead.line, 0);
            // SAFETY: every access lies within the panels and the tile of C promised by the caller.
            unsafe {
                if from_c {
                    for i in 0..MR {
                        for j in 0..NV {
                            sum[i][j] = $load(c.add(i * c_stride + j * $lanes));
                        }
                    }
                }
                for step in 0..steps {
                    if step % STEPS_PER_REQUEST == 0 {
                        if line < ahead.end {
                            prefetch_far(line);
                            line = line.wrapping_add(LINE_BYTES);
                        }
                        if row < MR && !ahead.c.is_null() {
                            let c = ahead.c.wrapping_add(row * ahead.c_stride);
                            for at in (0..4 * $lanes * NV).step_by(LINE_BYTES) {
                                prefetch_near(c.wrapping_add(at));
                            }
                            row += 1;
                        }
                    }
                    let mut b_p = [$set(0.0); NV];
                    for j in 0..NV {
                        b_p[j] = $load(b_ptr.add(j * $lanes));
                    }
                    for i in 0..MR {
                        let a_p = $set(*a_ptr.add(i * LANE));
                        for j in 0..NV {
                            sum[i][j] = $fma(a_p, b_p[j], sum[i][j]);
                        }
                    }
                    // Wrapping: after the last depth the next one need not exist.
                    a_ptr = a_ptr.wrapping_add(a.stride);
                    b_ptr = b_ptr.wrapping_add(b.stride);
                }
                for i in 0..MR {
                    for j in 0..NV {
                        $store(c.add(i * c_stride + j * $lanes), sum[i][j]);
                    }
                }
            }
        }
    };
}

vector_tile!(
    avx512,
    x86_64,
    "x86_64",
    "avx512f",
    16,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    std::arch::x86_64::_mm512_fmadd_ps
);
vector_tile!(
    avx512_pairs,
    x86_64,
    "x86_64",
    "avx512f,avx512bf16",
    16,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    add_pairs
);
vector_tile!(
    avx2,
    x86_64,
    "x86_64",
    "avx2,fma",
    8,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    std::arch::x86_64::_mm256_fmadd_ps
);
vector_tile!(
    neon,
    aarch64,
    "aarch64",
    "neon",
    4,
    vld1q_f32,
    vst1q_f32,
    vdupq_n_f32,
    |a, b, sum| std::arch::aarch64::vfmaq_f32(sum, a, b)
);

/// `sum` plus both products of every pair of bf16 in `a` and `b`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn add_pairs(
    a: std::arch::x86_64::__m512,
    b: std::arch::x86_64::__m512,
    sum: std::arch::x86_64::__m512,
) -> std::arch::x86_64::__m512 {
    use std::arch::x86_64::{__m512, __m512bh, _mm512_dpbf16_ps};
    use std::mem::transmute;
    // SAFETY: both are 512 bits of which every pattern is valid.
    let (a, b) = unsafe { (transmute::<__m512, __m512bh>(a), transmute::<__m512, __m512bh>(b)) };
    _mm512_dpbf16_ps(sum, a, b)
}

/// The tile in plain Rust.
///
/// # Safety
/// As [`Tile::run`], for a full tile.
unsafe fn portable<const MR: usize, const NR: usize, const LANE: usize>(
    steps: usize,
    a: Panel,
    b: Panel,
    c: *mut f32,
    c_stride: usize,
    from_c: bool,
    _: Ahead,
) {
    let mut sum = [[0.0f32; NR]; MR];
    // SAFETY: every access lies within the panels and the tile of C promised by the caller.
    unsafe {
        if from_c {
            for (i, row) in sum.iter_mut().enumerate() {
                row.copy_from_slice(std::slice::from_raw_parts(c.add(i * c_stride), NR));
            }
        }
        for p in 0..steps {
            let a_p = a.ptr.add(p * a.stride);
            let b_p = std::slice::from_raw_parts(b.ptr.add(p * b.stride), NR);
            for (i, row) in sum.iter_mut().enumerate() {
                let a_ip = *a_p.add(i * LANE);
                for (s, &b_pj) in row.iter_mut().zip(b_p) {
                    *s = a_ip.mul_add(b_pj, *s);
                }
            }
        }
        for (i, row) in sum.iter().enumerate() {
            std::slice::from_raw_parts_mut(c.add(i * c_stride), NR).copy_from_slice(row);
        }
    }
}
