//! Copies a block of a matrix into panels: groups of `width` rows, depth by depth.
//!
//! ```text
//! rows r0 r1 .. of a panel, at depth 0, then at depth 1, ...:   r0p0 r1p0 .. | r0p1 r1p1 .. | ..
//! ```
//! Rows beyond the block are zeros, so that the edge tile is the full tile.

use super::MatRef;
use std::ops::Range;

/// Packs `rows` x `depth` of `src` into panels of `width` rows. For the right operand of a product
/// pass its transpose: its columns are the rows of the panels.
pub(super) fn pack(
    dst: &mut [f32],
    src: MatRef<'_>,
    rows: Range<usize>,
    depth: Range<usize>,
    width: usize,
) {
    let panel_elems = width * depth.len();
    if panel_elems == 0 {
        return;
    }
    for (panel, i) in dst.chunks_exact_mut(panel_elems).zip(rows.clone().step_by(width)) {
        let height = width.min(rows.end - i);
        if height < width {
            panel.fill(0.0);
        }
        if src.row_stride == 1 {
            for (dst, p) in panel.chunks_exact_mut(width).zip(depth.clone()) {
                let at = p * src.col_stride + i;
                dst[..height].copy_from_slice(&src.data[at..at + height]);
            }
        } else {
            for r in 0..height {
                let row = &src.data[(i + r) * src.row_stride..];
                for (dst, p) in panel[r..].iter_mut().step_by(width).zip(depth.clone()) {
                    *dst = row[p * src.col_stride];
                }
            }
        }
    }
}
