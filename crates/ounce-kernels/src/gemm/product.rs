//! One product in work: what its threads share, and what each of them does.

use super::blocks::{Blocks, Part, Sums};
use super::pack::{pack, pack_pairs};
use super::store::{SumTile, add_bias, round_to_bf16, round_to_f16};
use super::tile::{Ahead, LINE_BYTES, MAX_MR, MAX_NR, Panel, Tile, prefetch_far};
use super::{MatMut, MatRef, Start, aligned};
use crate::pool::{SharedMut, split};
use crate::view::{SharedViewMut, View};
use std::ops::Range;

/// Everything the threads of one product share.
pub(super) struct Product<'a> {
    tile: Tile,
    blocks: Blocks,
    c: SharedViewMut<'a>,
    c_stride: usize,
    a: MatRef<'a>,
    b: MatRef<'a>,
    start: Start,
    bias: Option<View<'a>>,
    packed_b: SharedMut<'a, f32>,
    packed_a: SharedMut<'a, f32>,
    sums: SharedMut<'a, f32>,
    n_threads: usize,
}

/// A block of A that a thread has packed, and where its products go.
struct Block<'a> {
    part: &'a Part,
    rows: Range<usize>,
    /// In units.
    depth: Range<usize>,
    /// Panels of B in the part.
    panels: Range<usize>,
    packed_a: &'a [f32],
    /// Where sums wait for the next block, element (0, 0) of the rows and the part's columns.
    sums: *mut f32,
    from_c: bool,
    /// After it the elements of C are complete.
    is_last: bool,
}

impl<'a> Product<'a> {
    pub(super) fn new(
        tile: Tile,
        blocks: Blocks,
        c: MatMut<'a>,
        a: MatRef<'a>,
        b: MatRef<'a>,
        start: Start,
        bias: Option<View<'a>>,
        n_threads: usize,
        scratch: &'a mut [f32],
    ) -> Self {
        let (packed_b, rest) = aligned(scratch).split_at_mut(blocks.b_elems);
        let (packed_a, sums) = rest.split_at_mut(n_threads * blocks.a_elems);
        Self {
            tile,
            blocks,
            c: SharedViewMut::new(c.data),
            c_stride: c.row_stride,
            a,
            b,
            start,
            bias,
            packed_b: SharedMut::new(packed_b),
            packed_a: SharedMut::new(packed_a),
            sums: SharedMut::new(&mut sums[..blocks.sum_elems]),
            n_threads,
        }
    }

    /// Packs this thread's panels of a part of B.
    pub(super) fn pack_b(&self, part: &Part, thread_idx: usize) {
        let nr = self.tile.nr;
        let n_panels = part.cols.len().div_ceil(nr);
        let panels = split(n_panels, self.n_threads, thread_idx);
        let own = part.cols.start + panels.start * nr..;
        let own = own.start..(part.cols.start + panels.end * nr).min(part.cols.end);
        for depth in self.depth_blocks(part) {
            let at = (depth.start - part.depth.start) * n_panels + panels.start * depth.len();
            // SAFETY: panels are dealt to threads without overlap.
            let dst =
                unsafe { self.packed_b.range(at * nr..(at + panels.len() * depth.len()) * nr) };
            self.pack(dst, self.b.t(), own.clone(), &depth, nr);
        }
    }

    /// Computes this thread's rectangle of a part of C.
    pub(super) fn multiply(&self, part: &Part, thread_idx: usize) {
        let Tile { mr, nr, .. } = self.tile;
        let (n_tiles, n_panels) = (part.rows.len().div_ceil(mr), part.cols.len().div_ceil(nr));
        let (grid_m, grid_n) = grid(n_tiles, n_panels, self.n_threads, &self.tile);
        let tiles = split(n_tiles, grid_m, thread_idx / grid_n);
        let panels = split(n_panels, grid_n, thread_idx % grid_n);
        let rows = part.rows.start + tiles.start * mr
            ..(part.rows.start + tiles.end * mr).min(part.rows.end);
        let a_at = thread_idx * self.blocks.a_elems;
        // SAFETY: each thread has its own area.
        let packed_a = unsafe { self.packed_a.range(a_at..a_at + self.blocks.a_elems) };
        let k_units = self.a.cols.div_ceil(self.tile.unit_depth);
        let mc = Blocks::row_block(rows.len(), mr);
        for ic in rows.clone().step_by(mc) {
            let block_rows = ic..(ic + mc).min(rows.end);
            let sums = self.sums_of(part, thread_idx, ic);
            for depth in self.depth_blocks(part) {
                self.pack(packed_a, self.a, block_rows.clone(), &depth, mr);
                let next = if depth.end < part.depth.end {
                    let end = (depth.end + self.blocks.kc).min(part.depth.end);
                    (block_rows.clone(), depth.end..end)
                } else {
                    let rows = block_rows.end..(block_rows.end + mc).min(rows.end);
                    (rows, part.depth.start..(part.depth.start + depth.len()).min(part.depth.end))
                };
                let block = Block {
                    part,
                    rows: block_rows.clone(),
                    from_c: depth.start > 0 || self.start == Start::FromC,
                    is_last: depth.end == k_units,
                    depth,
                    panels: panels.clone(),
                    packed_a,
                    sums,
                };
                self.multiply_block(&block, self.lines(&next.0, &next.1));
            }
        }
    }

    /// Multiplies a packed block of A with this thread's panels of B, while the lines of the next
    /// block of A are asked for.
    fn multiply_block(&self, block: &Block<'_>, mut next_a: Lines) {
        let Tile { mr, nr, .. } = self.tile;
        let (steps, cols) = (block.depth.len(), &block.part.cols);
        let n_panels = cols.len().div_ceil(nr);
        let b_at = (block.depth.start - block.part.depth.start) * n_panels * nr;
        let n_tiles = block.rows.len().div_ceil(mr);
        let a_lines_per_tile = next_a.len().div_ceil((n_tiles * block.panels.len()).max(1));
        // The panel after the one in work is asked for in as many pieces as it has tiles.
        let piece_bytes = (4 * steps * nr).div_ceil(n_tiles).next_multiple_of(LINE_BYTES);
        let mut bias_of_panel = [0.0; MAX_NR];
        for panel in block.panels.clone() {
            let j = cols.start + panel * nr;
            let width = nr.min(cols.end - j);
            let bias = self.bias.filter(|_| block.is_last).map(|bias| {
                bias.slice(j..j + width).widen(&mut bias_of_panel[..width]);
                &bias_of_panel[..width]
            });
            let b_ptr = self.packed_b.ptr().wrapping_add(b_at + panel * nr * steps);
            let next_b = b_ptr.wrapping_add(nr * steps).cast::<u8>().cast_const();
            for (tile_idx, i) in block.rows.clone().step_by(mr).enumerate() {
                next_a.prefetch(a_lines_per_tile);
                let line = next_b.wrapping_add(tile_idx * piece_bytes);
                let ahead = if panel + 1 < block.panels.end {
                    Ahead { line, end: line.wrapping_add(piece_bytes), ..Ahead::NONE }
                } else {
                    Ahead::NONE
                };
                let place = Place { i, j, height: mr.min(block.rows.end - i), width };
                let a = Panel::new(block.packed_a[tile_idx * mr * steps..].as_ptr(), mr);
                // SAFETY: packed panels are `steps * mr` and `steps * nr` long at these places, and
                // B's were written in the run before.
                unsafe { self.tile_of_block(block, a, Panel::new(b_ptr, nr), &place, bias, ahead) };
            }
        }
    }

    /// One tile, to C or to where its sums wait.
    ///
    /// # Safety
    /// The panels are readable as [`Tile::run`] wants it; `place` lies in this thread's part of C.
    #[inline(always)]
    unsafe fn tile_of_block(
        &self,
        block: &Block<'_>,
        a: Panel,
        b: Panel,
        place: &Place,
        bias: Option<&[f32]>,
        ahead: Ahead,
    ) {
        let Place { i, j, height, width } = *place;
        let (steps, at) = (block.depth.len(), i * self.c_stride + j);
        let tile = |c: *mut f32, stride: usize, from_c: bool| {
            // Where the rows of the next tile lie, if it is the one below.
            let c_ahead = c.wrapping_add(self.tile.mr * stride).cast::<u8>().cast_const();
            let ahead = if i + height < block.rows.end {
                Ahead { c: c_ahead, c_stride: 4 * stride, ..ahead }
            } else {
                ahead
            };
            // SAFETY: the caller's promise; rectangles of threads do not overlap, nor do their sums.
            unsafe { self.tile.run_ahead(steps, a, b, c, stride, height, width, from_c, ahead) };
        };
        if let SharedViewMut::F32(c) = &self.c {
            let c = c.ptr().wrapping_add(at);
            tile(c, self.c_stride, block.from_c);
            if let Some(bias) = bias {
                // SAFETY: the tile is ours.
                unsafe { add_bias(c, self.c_stride, height, bias) };
            }
            return;
        }
        let mut buffer = [0.0; MAX_MR * MAX_NR];
        let (sums, stride) = if self.blocks.sums == Sums::InPlace {
            (buffer.as_mut_ptr(), MAX_NR)
        } else {
            let (row, col) = (i - block.rows.start, j - block.part.cols.start);
            (block.sums.wrapping_add(row * self.blocks.cols + col), self.blocks.cols)
        };
        tile(sums, stride, block.from_c);
        if !block.is_last {
            return;
        }
        let sums = SumTile { src: sums, stride, height, width };
        // SAFETY: the sums were written and the tile of C is ours.
        unsafe {
            match &self.c {
                SharedViewMut::F32(_) => {}
                SharedViewMut::Bf16(c) => {
                    round_to_bf16(c.ptr().wrapping_add(at), self.c_stride, sums, bias);
                }
                SharedViewMut::F16(c) => {
                    round_to_f16(c.ptr().wrapping_add(at), self.c_stride, sums, bias);
                }
            }
        }
    }

    /// Where sums of the rows from `ic` on wait.
    fn sums_of(&self, part: &Part, thread_idx: usize, ic: usize) -> *mut f32 {
        let at = match self.blocks.sums {
            Sums::InPlace => 0,
            Sums::PerThread => thread_idx * (self.blocks.sum_elems / self.n_threads),
            Sums::PerPart => (ic - part.rows.start) * self.blocks.cols,
        };
        self.sums.ptr().wrapping_add(at)
    }

    /// The depth of a part, block by block, in units.
    fn depth_blocks(&self, part: &Part) -> impl Iterator<Item = Range<usize>> {
        let (kc, depth) = (self.blocks.kc, part.depth.clone());
        // A depth of 0 is one empty block.
        let end = depth.end.max(depth.start + 1);
        (depth.start..end).step_by(kc).map(move |start| start..(start + kc).min(depth.end))
    }

    /// Packs a block in the units of the tile; `depth` is in units.
    fn pack(
        &self,
        dst: &mut [f32],
        src: MatRef<'_>,
        rows: Range<usize>,
        depth: &Range<usize>,
        width: usize,
    ) {
        let per_unit = self.tile.unit_depth;
        let elems = depth.start * per_unit..(depth.end * per_unit).min(src.cols);
        let pack = if per_unit == 2 { pack_pairs } else { pack };
        pack(dst, src, rows, elems, width);
    }

    /// The lines that hold a block of A.
    fn lines(&self, rows: &Range<usize>, depth: &Range<usize>) -> Lines {
        let per_unit = self.tile.unit_depth;
        let depth = depth.start * per_unit..(depth.end * per_unit).min(self.a.cols);
        let (base, elem_bytes) = match self.a.data {
            View::F32(x) => (x.as_ptr().cast::<u8>(), 4),
            View::Bf16(x) => (x.as_ptr().cast(), 2),
            View::F16(x) => (x.as_ptr().cast(), 2),
        };
        let MatRef { row_stride, col_stride, .. } = self.a;
        let at = rows.start * row_stride + depth.start * col_stride;
        let (n_outer, stride, n_inner) = if col_stride == 1 {
            (rows.len(), row_stride, depth.len())
        } else {
            (depth.len(), col_stride, rows.len())
        };
        Lines::new(
            base.wrapping_add(at * elem_bytes),
            n_outer,
            stride * elem_bytes,
            n_inner * elem_bytes,
        )
    }
}

/// Where a tile lies in C.
struct Place {
    i: usize,
    j: usize,
    height: usize,
    width: usize,
}

/// The cache lines of a block of a matrix, asked for a few at a time.
struct Lines {
    row: *const u8,
    row_bytes: usize,
    stride_bytes: usize,
    rows_left: usize,
    /// Bytes of the row in work that were asked for.
    done_bytes: usize,
}

impl Lines {
    fn new(row: *const u8, n_rows: usize, stride_bytes: usize, row_bytes: usize) -> Self {
        Self { row, row_bytes, stride_bytes, rows_left: n_rows, done_bytes: 0 }
    }

    /// Lines not asked for yet, at most.
    fn len(&self) -> usize {
        self.rows_left * (self.row_bytes.div_ceil(LINE_BYTES) + 1)
    }

    /// Asks for the next `n` lines.
    #[inline]
    fn prefetch(&mut self, n: usize) {
        for _ in 0..n {
            if self.rows_left == 0 {
                return;
            }
            prefetch_far(self.row.wrapping_add(self.done_bytes));
            self.done_bytes += LINE_BYTES;
            // A row that starts within a line ends within one more.
            if self.done_bytes >= self.row_bytes + LINE_BYTES {
                (self.done_bytes, self.rows_left) = (0, self.rows_left - 1);
                self.row = self.row.wrapping_add(self.stride_bytes);
            }
        }
    }
}

/// Threads along (rows, columns) whose product is `n_threads`: the least work of the busiest.
fn grid(n_tiles: usize, n_panels: usize, n_threads: usize, tile: &Tile) -> (usize, usize) {
    /// Packing one element of A costs about as much as this many multiply-adds.
    const PACK_COST: usize = 24;
    (1..=n_threads)
        .filter(|grid_m| n_threads.is_multiple_of(*grid_m))
        .map(|grid_m| (grid_m, n_threads / grid_m))
        .min_by_key(|&(grid_m, grid_n)| {
            let rows = n_tiles.div_ceil(grid_m) * tile.mr;
            rows * (n_panels.div_ceil(grid_n) * tile.nr + PACK_COST)
        })
        .expect("1 divides every number of threads")
}
