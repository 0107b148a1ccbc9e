//! Copies a block of a matrix into panels: groups of `width` rows, depth by depth.
//!
//! ```text
//! rows r0 r1 .. of a panel, at depth 0, then at depth 1, ...:   r0p0 r1p0 .. | r0p1 r1p1 .. | ..
//! ```
//! Rows beyond the block are zeros, so that the edge tile is the full tile. If the matrix stores
//! its rows along memory this is a transpose, done in 8 x 8 blocks in registers where the tier
//! allows it; otherwise it is a copy of `width` neighbours at a time.

use super::MatRef;
#[cfg(target_arch = "x86_64")]
use crate::tier::{Tier, tier};
use std::ops::Range;

/// Depths copied for one panel before the next panel's turn: keeps the source rows streaming.
const COPY_DEPTH: usize = 8;

/// Packs `rows` x `depth` of `src` into panels of `width` rows. For the right operand of a product
/// pass its transpose: its columns are the rows of the panels.
pub(crate) fn pack(
    dst: &mut [f32],
    src: MatRef<'_>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    if depth.is_empty() {
        return;
    }
    let n_panels = rows.len().div_ceil(width);
    let dst = &mut dst[..n_panels * width * depth.len()];
    match (src.row_stride, src.col_stride) {
        (1, _) => match width {
            4 => copy_panels::<4>(dst, src, rows, depth),
            6 => copy_panels::<6>(dst, src, rows, depth),
            8 => copy_panels::<8>(dst, src, rows, depth),
            12 => copy_panels::<12>(dst, src, rows, depth),
            16 => copy_panels::<16>(dst, src, rows, depth),
            32 => copy_panels::<32>(dst, src, rows, depth),
            _ => gather_panels(dst, src, rows, depth, width),
        },
        #[cfg(target_arch = "x86_64")]
        (_, 1) if tier() >= Tier::Avx2 => {
            // SAFETY: both vector tiers include AVX2.
            unsafe { transpose_panels(dst, src, rows, depth, width) };
        }
        _ => gather_panels(dst, src, rows, depth, width),
    }
}

/// The definition, for any strides.
fn gather_panels(
    dst: &mut [f32],
    src: MatRef<'_>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    let panels = dst.chunks_exact_mut(width * depth.len());
    for (panel, i) in panels.zip(rows.clone().step_by(width)) {
        for (dst, p) in panel.chunks_exact_mut(width).zip(depth.clone()) {
            for (dst, row) in dst.iter_mut().zip(i..) {
                *dst = if row < rows.end {
                    src.data[row * src.row_stride + p * src.col_stride]
                } else {
                    0.0
                };
            }
        }
    }
}

/// Rows are neighbours in memory: copies of a constant width.
fn copy_panels<const W: usize>(
    dst: &mut [f32],
    src: MatRef<'_>,
    rows: Range<usize>,
    depth: Range<usize>,
) {
    let panel_elems = W * depth.len();
    for first in depth.clone().step_by(COPY_DEPTH) {
        let some = first..(first + COPY_DEPTH).min(depth.end);
        let panels = dst.chunks_exact_mut(panel_elems);
        for (panel, i) in panels.zip(rows.clone().step_by(W)) {
            let height = W.min(rows.end - i);
            let part = &mut panel[(first - depth.start) * W..(some.end - depth.start) * W];
            for (dst, p) in part.as_chunks_mut::<W>().0.iter_mut().zip(some.clone()) {
                let src = &src.data[p * src.col_stride + i..];
                if let Some((src, _)) = src.split_first_chunk::<W>().filter(|_| height == W) {
                    *dst = *src;
                } else {
                    dst[..height].copy_from_slice(&src[..height]);
                    dst[height..].fill(0.0);
                }
            }
        }
    }
}

/// Columns are neighbours in memory: transposes of 8 rows x 8 depths.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn transpose_panels(
    dst: &mut [f32],
    src: MatRef<'_>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    use std::arch::x86_64::{
        _mm_storeu_ps, _mm256_castps256_ps128, _mm256_loadu_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    };
    const B: usize = 8;
    let (kc, whole) = (depth.len(), depth.len() - depth.len() % B);
    let panels = dst.chunks_exact_mut(width * kc);
    for (panel, i) in panels.zip(rows.clone().step_by(width)) {
        for r in (0..width).step_by(B) {
            let group = B.min(width - r);
            let n_valid = group.min(rows.end.saturating_sub(i + r));
            // The slices check once that every row's depth range exists.
            let mut src_rows = [[].as_slice(); B];
            for (row, i) in src_rows[..n_valid].iter_mut().zip(i + r..) {
                *row = &src.data[i * src.row_stride + depth.start..][..kc];
            }
            for p in (0..whole).step_by(B) {
                let mut block = [_mm256_setzero_ps(); B];
                for (v, row) in block[..n_valid].iter_mut().zip(&src_rows) {
                    // SAFETY: `p + B <= kc`, the length of the row.
                    *v = unsafe { _mm256_loadu_ps(row.as_ptr().add(p)) };
                }
                for (j, v) in transpose_8x8(block).into_iter().enumerate() {
                    let dst = &mut panel[(p + j) * width + r..][..group];
                    // SAFETY: each store writes as many elements as `dst` has.
                    unsafe {
                        match group {
                            8 => _mm256_storeu_ps(dst.as_mut_ptr(), v),
                            4 => _mm_storeu_ps(dst.as_mut_ptr(), _mm256_castps256_ps128(v)),
                            _ => {
                                let mut lanes = [0.0; B];
                                _mm256_storeu_ps(lanes.as_mut_ptr(), v);
                                dst.copy_from_slice(&lanes[..group]);
                            }
                        }
                    }
                }
            }
            for p in whole..kc {
                for (j, dst) in panel[p * width + r..][..group].iter_mut().enumerate() {
                    *dst = src_rows[j].get(p).copied().unwrap_or(0.0);
                }
            }
        }
    }
}

/// Eight vectors of eight, transposed: pairs, then quads, then halves.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
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
