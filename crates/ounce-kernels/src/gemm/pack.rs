//! Copies a block of a matrix into panels: groups of `width` rows, unit by unit of depth.
//!
//! ```text
//! rows r0 r1 .. of a panel, at unit 0, then at unit 1, ...:   r0u0 r1u0 .. | r0u1 r1u1 .. | ..
//! ```
//! A unit is what a register tile takes in one step: an f32, to which 16-bit elements are widened
//! on the way, or a pair of bf16 of neighbouring depths (an odd depth is completed by zero). Rows
//! beyond the block are zeros, so that the edge tile is the full tile. If the matrix stores its rows
//! along memory this is a transpose, done in blocks of 8 x 8 units in registers where the tier
//! allows it; otherwise it is a copy of `width` neighbours at a time.

use super::MatRef;
use crate::convert::{widen_bf16, widen_f16};
#[cfg(target_arch = "x86_64")]
use crate::tier::{Tier, tier};
use crate::view::View;
use half::{bf16, f16};
use std::ops::Range;

/// Units copied for one panel before the next panel's turn: keeps the source rows streaming.
#[cfg(target_arch = "x86_64")]
const COPY_UNITS: usize = 8;
/// Units in a vector of 256 bits.
#[cfg(target_arch = "x86_64")]
const LANES: usize = 8;

/// Packs `rows` x `depth` of `src` into panels of `width` rows as f32. For the right operand of a
/// product pass its transpose: its columns are the rows of the panels.
pub(crate) fn pack(
    dst: &mut [f32],
    src: MatRef<'_>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    match src.data {
        View::F32(data) => pack_source::<Plain>(dst, &src.of(data), rows, depth, width),
        View::Bf16(data) => pack_source::<WideBf16>(dst, &src.of(data), rows, depth, width),
        View::F16(data) => pack_source::<WideF16>(dst, &src.of(data), rows, depth, width),
    }
}

/// As [`pack`] in units of a pair of depths, two bf16 in the bits of an f32.
///
/// # Panics
/// If the matrix is not stored as bf16.
pub(crate) fn pack_pairs(
    dst: &mut [f32],
    src: MatRef<'_>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    let View::Bf16(data) = src.data else { panic!("pairs are made of bf16") };
    pack_source::<Pairs>(dst, &src.of(data), rows, depth, width);
}

/// The elements of a matrix, see [`MatRef`].
pub(super) struct Strided<'a, T> {
    pub(super) data: &'a [T],
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

/// How elements become units.
trait Source {
    /// As stored.
    type Elem: Copy;
    /// Depths in a unit.
    const DEPTHS: usize;

    /// The unit of one element, or of it and the next in depth.
    fn unit(first: Self::Elem, second: Option<Self::Elem>) -> f32;

    /// Eight units of one row, whose depths are neighbours at `p`.
    ///
    /// # Safety
    /// The elements exist, and the machine has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn along_depth(p: *const Self::Elem) -> std::arch::x86_64::__m256;

    /// A unit of eight rows, which are neighbours at `p`; `next` elements on is the next depth.
    ///
    /// # Safety
    /// As for `along_depth`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn across_rows(p: *const Self::Elem, next: usize) -> std::arch::x86_64::__m256;
}

/// Sources of one depth: what is along depth and across rows is the same load.
macro_rules! widening {
    ($(#[$meta:meta])* $name:ident, $elem:ty, $widen:expr, |$p:ident| $load:expr) => {
        $(#[$meta])*
        struct $name;

        impl Source for $name {
            type Elem = $elem;
            const DEPTHS: usize = 1;

            #[inline(always)]
            fn unit(first: $elem, _: Option<$elem>) -> f32 {
                $widen(first)
            }

            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn along_depth($p: *const $elem) -> std::arch::x86_64::__m256 {
                #[allow(clippy::wildcard_imports, reason = "one line of intrinsics")]
                use std::arch::x86_64::*;
                // SAFETY: the caller's promise.
                unsafe { $load }
            }

            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            unsafe fn across_rows(p: *const $elem, _: usize) -> std::arch::x86_64::__m256 {
                // SAFETY: the caller's promise.
                unsafe { Self::along_depth(p) }
            }
        }
    };
}

widening!(
    /// f32 as they are.
    Plain, f32, std::convert::identity, |p| _mm256_loadu_ps(p)
);
widening!(
    /// bf16 to f32.
    WideBf16, bf16, widen_bf16, |p| {
        let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
);
widening!(
    /// f16 to f32.
    WideF16, f16, widen_f16, |p| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()))
);

/// Pairs of bf16.
struct Pairs;

impl Source for Pairs {
    type Elem = bf16;
    const DEPTHS: usize = 2;

    #[inline(always)]
    fn unit(first: bf16, second: Option<bf16>) -> f32 {
        let second = second.map_or(0, |second| u32::from(second.to_bits()));
        f32::from_bits(u32::from(first.to_bits()) | second << 16)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn along_depth(p: *const bf16) -> std::arch::x86_64::__m256 {
        // SAFETY: the caller's promise; the load needs no alignment.
        unsafe { std::arch::x86_64::_mm256_loadu_ps(p.cast()) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn across_rows(p: *const bf16, next: usize) -> std::arch::x86_64::__m256 {
        use std::arch::x86_64::{
            _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_or_si256,
            _mm256_slli_epi32,
        };
        // SAFETY: the caller's promise.
        unsafe {
            let first = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
            let second = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(next).cast()));
            _mm256_castsi256_ps(_mm256_or_si256(first, _mm256_slli_epi32::<16>(second)))
        }
    }
}

fn pack_source<S: Source>(
    dst: &mut [f32],
    src: &Strided<'_, S::Elem>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    if depth.is_empty() || rows.is_empty() {
        return;
    }
    let units = depth.len().div_ceil(S::DEPTHS);
    let dst = &mut dst[..rows.len().div_ceil(width) * width * units];
    // Every place that is read lies at or before the last element of the block.
    let last = (rows.end - 1) * src.row_stride + (depth.end - 1) * src.col_stride;
    assert!(last < src.data.len(), "a block ends at {last} of {}", src.data.len());
    #[cfg(target_arch = "x86_64")]
    if tier() >= Tier::Avx2 {
        match (src.row_stride, src.col_stride) {
            // SAFETY: every vector tier has AVX2 and F16C.
            (1, _) => return unsafe { copy_panels::<S>(dst, src, rows, depth, width) },
            // SAFETY: as above.
            (_, 1) => return unsafe { transpose_panels::<S>(dst, src, rows, depth, width) },
            _ => {}
        }
    }
    if S::DEPTHS == 1 && (src.row_stride == 1 || src.col_stride == 1) {
        return stream_panels::<S>(dst, src, rows, depth, width);
    }
    gather_panels::<S>(dst, src, rows, depth, width);
}

/// The unit of `row` at depth `p`; zero beyond `rows`, and half of it beyond `depth`.
#[inline(always)]
fn unit_or_zero<S: Source>(
    src: &Strided<'_, S::Elem>,
    row: usize,
    p: usize,
    rows: &Range<usize>,
    depth: &Range<usize>,
) -> f32 {
    if row >= rows.end {
        return 0.0;
    }
    let at = row * src.row_stride + p * src.col_stride;
    let has_second = S::DEPTHS > 1 && p + 1 < depth.end;
    S::unit(src.data[at], has_second.then(|| src.data[at + src.col_stride]))
}

/// The definition, for any strides.
fn gather_panels<S: Source>(
    dst: &mut [f32],
    src: &Strided<'_, S::Elem>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    let panels = dst.chunks_exact_mut(width * depth.len().div_ceil(S::DEPTHS));
    for (panel, i) in panels.zip(rows.clone().step_by(width)) {
        let units = depth.clone().step_by(S::DEPTHS);
        for (dst, p) in panel.chunks_exact_mut(width).zip(units) {
            for (row, dst) in (i..).zip(dst) {
                *dst = unit_or_zero::<S>(src, row, p, &rows, &depth);
            }
        }
    }
}

/// Units of one depth without explicit vectors: reads along memory, whichever way it runs.
fn stream_panels<S: Source>(
    dst: &mut [f32],
    src: &Strided<'_, S::Elem>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    let panels = dst.chunks_exact_mut(width * depth.len());
    for (panel, i) in panels.zip(rows.clone().step_by(width)) {
        let n_valid = width.min(rows.end - i);
        if n_valid < width {
            panel.fill(0.0);
        }
        if src.row_stride == 1 {
            for (dst, p) in panel.chunks_exact_mut(width).zip(depth.clone()) {
                let neighbours = &src.data[p * src.col_stride + i..][..n_valid];
                for (dst, &elem) in dst.iter_mut().zip(neighbours) {
                    *dst = S::unit(elem, None);
                }
            }
            continue;
        }
        for r in 0..n_valid {
            let row = &src.data[(i + r) * src.row_stride + depth.start..][..depth.len()];
            for (dst, &elem) in panel[r..].iter_mut().step_by(width).zip(row) {
                *dst = S::unit(elem, None);
            }
        }
    }
}

/// Rows are neighbours in memory: copies of neighbours, for the widths of tiles a constant number.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn copy_panels<S: Source>(
    dst: &mut [f32],
    src: &Strided<'_, S::Elem>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    match width {
        4 => copy_panels_of::<S, 4>(dst, src, rows, depth),
        6 => copy_panels_of::<S, 6>(dst, src, rows, depth),
        12 => copy_panels_of::<S, 12>(dst, src, rows, depth),
        16 => copy_panels_of::<S, 16>(dst, src, rows, depth),
        32 => copy_panels_of::<S, 32>(dst, src, rows, depth),
        64 => copy_panels_of::<S, 64>(dst, src, rows, depth),
        _ => gather_panels::<S>(dst, src, rows, depth, width),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn copy_panels_of<S: Source, const W: usize>(
    dst: &mut [f32],
    src: &Strided<'_, S::Elem>,
    rows: Range<usize>,
    depth: Range<usize>,
) {
    let units = depth.len().div_ceil(S::DEPTHS);
    // Units of which all depths exist.
    let whole = depth.len() / S::DEPTHS;
    // From the first row of a unit to behind what its last vector reads.
    let reach = W.next_multiple_of(LANES) + (S::DEPTHS - 1) * src.col_stride;
    for first in (0..units).step_by(COPY_UNITS) {
        let some = first..(first + COPY_UNITS).min(units);
        let panels = dst.chunks_exact_mut(W * units);
        for (panel, i) in panels.zip(rows.clone().step_by(W)) {
            let part = &mut panel[some.start * W..some.end * W];
            for (dst, unit) in part.as_chunks_mut::<W>().0.iter_mut().zip(some.clone()) {
                let p = depth.start + unit * S::DEPTHS;
                let at = p * src.col_stride + i;
                if unit < whole && at + reach <= src.data.len() {
                    // SAFETY: all that is read exists, though not all of it need be ours.
                    unsafe {
                        let p = src.data.as_ptr().add(at);
                        if i + W <= rows.end {
                            copy_unit::<S, W>(dst, p, src.col_stride);
                        } else {
                            copy_some::<S>(&mut dst[..rows.end - i], p, src.col_stride);
                            dst[rows.end - i..].fill(0.0);
                        }
                    }
                } else {
                    for (row, dst) in (i..).zip(dst) {
                        *dst = unit_or_zero::<S>(src, row, p, &rows, &depth);
                    }
                }
            }
        }
    }
}

/// A unit of `W` rows, which are neighbours at `p`.
///
/// # Safety
/// `W` rounded up to whole vectors of elements exist there and, for a second depth, `next` on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn copy_unit<S: Source, const W: usize>(dst: &mut [f32; W], p: *const S::Elem, next: usize) {
    for r in (0..W).step_by(LANES) {
        // SAFETY: the caller's promise.
        let v = unsafe { S::across_rows(p.add(r), next) };
        store_lanes(&mut dst[r..W.min(r + LANES)], v);
    }
}

/// As [`copy_unit`] for as many rows as `dst` has.
///
/// # Safety
/// As for [`copy_unit`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
#[inline]
unsafe fn copy_some<S: Source>(dst: &mut [f32], p: *const S::Elem, next: usize) {
    for (i, dst) in dst.chunks_mut(LANES).enumerate() {
        // SAFETY: the caller's promise.
        store_lanes(dst, unsafe { S::across_rows(p.add(i * LANES), next) });
    }
}

/// Columns are neighbours in memory: transposes of 8 rows x 8 units.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,f16c")]
fn transpose_panels<S: Source>(
    dst: &mut [f32],
    src: &Strided<'_, S::Elem>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    let units = depth.len().div_ceil(S::DEPTHS);
    let whole = depth.len() / S::DEPTHS / LANES * LANES;
    let panels = dst.chunks_exact_mut(width * units);
    for (panel, i) in panels.zip(rows.clone().step_by(width)) {
        for r in (0..width).step_by(LANES) {
            let group = LANES.min(width - r);
            let n_valid = group.min(rows.end.saturating_sub(i + r));
            for u in (0..whole).step_by(LANES) {
                let mut block = [std::arch::x86_64::_mm256_setzero_ps(); LANES];
                for (v, row) in block[..n_valid].iter_mut().zip(i + r..) {
                    // SAFETY: eight units of a row of the block, which `pack_source` has checked.
                    *v = unsafe {
                        let at = row * src.row_stride + depth.start + u * S::DEPTHS;
                        S::along_depth(src.data.as_ptr().add(at))
                    };
                }
                for (j, v) in transpose_8x8(block).into_iter().enumerate() {
                    store_lanes(&mut panel[(u + j) * width + r..][..group], v);
                }
            }
            for u in whole..units {
                let p = depth.start + u * S::DEPTHS;
                for (row, dst) in (i + r..).zip(&mut panel[u * width + r..][..group]) {
                    *dst = unit_or_zero::<S>(src, row, p, &rows, &depth);
                }
            }
        }
    }
}

/// Writes the first lanes of `v`, at most eight.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn store_lanes(dst: &mut [f32], v: std::arch::x86_64::__m256) {
    use std::arch::x86_64::{
        _mm_castps_pd, _mm_storel_pd, _mm_storeu_ps, _mm256_castps256_ps128, _mm256_extractf128_ps,
        _mm256_storeu_ps,
    };
    let p = dst.as_mut_ptr();
    // SAFETY: each arm writes as many elements as `dst` has.
    unsafe {
        match dst.len() {
            8 => _mm256_storeu_ps(p, v),
            6 => {
                _mm_storeu_ps(p, _mm256_castps256_ps128(v));
                _mm_storel_pd(p.add(4).cast(), _mm_castps_pd(_mm256_extractf128_ps::<1>(v)));
            }
            4 => _mm_storeu_ps(p, _mm256_castps256_ps128(v)),
            _ => {
                let mut lanes = [0.0; LANES];
                _mm256_storeu_ps(lanes.as_mut_ptr(), v);
                dst.copy_from_slice(&lanes[..dst.len()]);
            }
        }
    }
}

/// Eight vectors of eight, transposed: pairs, then quads, then halves.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
#[inline]
fn transpose_8x8(v: [std::arch::x86_64::__m256; 8]) -> [std::arch::x86_64::__m256; 8] {
    use std::arch::x86_64::{
        _mm256_permute2f128_ps, _mm256_shuffle_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };
    let [a, b, c, d, e, f, g, h] = v;
    let (ab0, ab1) = (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let (cd0, cd1) = (_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
    let (ef0, ef1) = (_mm256_unpacklo_ps(e, f), _mm256_unpackhi_ps(e, f));
    let (gh0, gh1) = (_mm256_unpacklo_ps(g, h), _mm256_unpackhi_ps(g, h));
    let top = [
        _mm256_shuffle_ps::<0x44>(ab0, cd0),
        _mm256_shuffle_ps::<0xEE>(ab0, cd0),
        _mm256_shuffle_ps::<0x44>(ab1, cd1),
        _mm256_shuffle_ps::<0xEE>(ab1, cd1),
    ];
    let low = [
        _mm256_shuffle_ps::<0x44>(ef0, gh0),
        _mm256_shuffle_ps::<0xEE>(ef0, gh0),
        _mm256_shuffle_ps::<0x44>(ef1, gh1),
        _mm256_shuffle_ps::<0xEE>(ef1, gh1),
    ];
    [
        _mm256_permute2f128_ps::<0x20>(top[0], low[0]),
        _mm256_permute2f128_ps::<0x20>(top[1], low[1]),
        _mm256_permute2f128_ps::<0x20>(top[2], low[2]),
        _mm256_permute2f128_ps::<0x20>(top[3], low[3]),
        _mm256_permute2f128_ps::<0x31>(top[0], low[0]),
        _mm256_permute2f128_ps::<0x31>(top[1], low[1]),
        _mm256_permute2f128_ps::<0x31>(top[2], low[2]),
        _mm256_permute2f128_ps::<0x31>(top[3], low[3]),
    ]
}
