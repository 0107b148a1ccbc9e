//! How a product is cut: sizes only, so that scratch can be planned.
//!
//! Idea: the packed block of A (MC x KC) and a panel or two of B live in a core's second cache; the
//! packed B is as large as a plan should bear, so that A is packed once for most products. Depths
//! are counted in units of a tile's step, 4 bytes each: an f32, or a pair of bf16.
//!
//! Invariants: blocks depend on the shape, the type of C and the number of threads, never on the tier.

use super::ALIGN_ELEMS;
use super::tile::MAX_NR;
use crate::view::FloatType;
use std::ops::Range;

/// Rows of A packed at a time by one thread; a multiple of every tile's height. Enough to read a
/// panel of B seldom; more would leave no room beside it in a second cache of 1 MiB (Zen 4).
const MC: usize = 96;
/// Units of depth of a block.
const KC: usize = 768;
/// Columns of B packed at a time.
const NC: usize = 3072;
/// Units of B packed at a time (9 MiB).
const B_UNITS: usize = KC * NC;
/// Rows of C whose sums are kept while B is packed piece by piece; a multiple of [`GRANULE`].
const SUM_ROWS: usize = 1152;
/// A multiple of the height of every tile.
const GRANULE: usize = 12;

/// The length of nearly equal blocks that cut `n` into as many as `max` long ones would, in whole
/// `granule`s (of which `max` is a multiple).
fn even_block(n: usize, max: usize, granule: usize) -> usize {
    n.div_ceil(n.div_ceil(max).max(1)).next_multiple_of(granule).max(granule)
}

/// Where sums wait between two blocks of depth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sums {
    /// In C, which is f32, or nowhere: there is one block.
    InPlace,
    /// In scratch, for the rows that a thread has packed: all of their depth follows at once.
    PerThread,
    /// In scratch, for all rows of a part: B is packed in between.
    PerPart,
}

/// Sizes of the blocks of one product.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    /// Units of depth of a block.
    pub(super) kc: usize,
    /// Units of depth of a part, whole blocks.
    depth: usize,
    /// Columns of a part.
    pub(super) cols: usize,
    /// Rows of a part.
    rows: usize,
    pub(super) a_elems: usize,
    pub(super) b_elems: usize,
    pub(super) sums: Sums,
    pub(super) sum_elems: usize,
}

/// What is computed from one packing of B.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    /// In units.
    pub(super) depth: Range<usize>,
}

impl Blocks {
    /// Blocks of an (m, n) product over `units` of depth.
    pub(super) fn new(m: usize, n: usize, units: usize, c: FloatType, n_threads: usize) -> Self {
        let kc = even_block(units, KC, 8).min(units.max(1));
        let cols = even_block(n, NC, MAX_NR);
        let n_blocks = units.div_ceil(kc).max(1);
        let n_packs = n_blocks.div_ceil((B_UNITS / (kc * cols)).max(1));
        let depth = n_blocks.div_ceil(n_packs) * kc;
        let mc = m.next_multiple_of(GRANULE).clamp(GRANULE, MC);
        let sums = match n_packs {
            _ if c == FloatType::F32 || n_blocks == 1 => Sums::InPlace,
            1 => Sums::PerThread,
            _ => Sums::PerPart,
        };
        let rows = if sums == Sums::PerPart { even_block(m, SUM_ROWS, GRANULE) } else { m.max(1) };
        let sum_rows = match sums {
            Sums::InPlace => 0,
            Sums::PerThread => mc * n_threads,
            Sums::PerPart => rows,
        };
        Self {
            kc,
            depth,
            cols,
            rows,
            a_elems: (mc * kc).next_multiple_of(ALIGN_ELEMS),
            b_elems: cols * depth,
            sums,
            sum_elems: sum_rows * cols,
        }
    }

    /// What a product of these blocks needs in all.
    pub(super) fn scratch_elems(&self, n_threads: usize) -> usize {
        self.b_elems + n_threads * self.a_elems + self.sum_elems + ALIGN_ELEMS
    }

    /// Rows packed at a time of a thread's `n_rows`, for tiles of `mr` rows.
    pub(super) fn row_block(n_rows: usize, mr: usize) -> usize {
        even_block(n_rows, MC, mr)
    }

    /// The parts in the order in which they are to be computed. A product of depth 0 still has an
    /// (empty) depth, which stores zeros or adds the bias.
    pub(super) fn parts(self, m: usize, n: usize, units: usize) -> impl Iterator<Item = Part> {
        let cut = |n: usize, step: usize| {
            (0..n.max(1)).step_by(step).map(move |start| start..(start + step).min(n))
        };
        cut(m, self.rows).flat_map(move |rows| {
            cut(n, self.cols).flat_map(move |cols| {
                let rows = rows.clone();
                cut(units, self.depth).map(move |depth| {
                    let (rows, cols) = (rows.clone(), cols.clone());
                    Part { rows, cols, depth }
                })
            })
        })
    }
}
