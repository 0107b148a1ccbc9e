//! The declared size of the process outside the arena, and the budget that belongs to an arena.
//!
//! The tokenizing child has its own bound (`tokenizing_bytes` in `ounce-io`); it ends before the arena
//! is touched, so of the two the larger counts. Where data is streamed, a child tokenizes beside the
//! steps as well, and its bound is added to every phase behind the first.
//!
//! What a process takes besides the planned bytes: code and libraries that were touched, the stacks
//! of the threads, the tables of graph, plan and executor, the table from id to bytes, rows of data, I/O buffers,
//! and, charged by the kernel though not resident memory, the page tables that map the arena (8 bytes
//! per page of 4 KiB). Each has a bound that is known before planning; the sum is checked against the
//! running process before step 1.
//!
//! Measured on Linux x86-64 before the first touch of the arena: 10.9 MiB for 2 layers read from chat
//! data in a development build, 8.6 MiB from text in an earlier release build for 4 layers (230
//! instructions), 11.8 MiB for GPT-2 124M in its smallest budget (12,790 instructions). The bounds
//! below are 1 to 3 MiB above.

use ounce_plan::InstrBytes;

use crate::budget::{BUDGET_QUANTUM_BYTES, resident_bytes};
use crate::{Error, Result};

/// Code, libraries, main stack, heap of a process that has planned nothing yet.
pub(crate) const PROCESS_BYTES: u64 = 12 << 20;
/// Touched stack of one thread, and what the kernel keeps for it.
const THREAD_BYTES: u64 = 64 << 10;
/// Graph, plan and executor tables per op of a graph.
const OP_BYTES: u64 = 4 << 10;
/// What instructions take. While a plan is made each is there several times over, with its operands, buffers and their
/// places (measured: 1.9 KiB for plans of 20,000 to 90,000 instructions); of a plan that runs there is a task and its
/// offsets, for which the tables per op have room up to a number.
pub(crate) const INSTR_BYTES: InstrBytes =
    InstrBytes { planning: 2304, running: 64, n_declared_per_op: OP_BYTES / 64 };
/// Table from id to bytes (a token's bytes and their end), and a sampler's weight per id.
const TOKEN_BYTES: u64 = 24;
/// Rows of data for which the process has room already.
const DECLARED_ROWS_BYTES: u64 = 512 << 10;
/// One byte of page tables maps this many.
const PAGE_TABLE_SHARE: u64 = 512;

/// Declared bytes outside the arena, for one budget.
#[derive(Debug, Clone)]
pub(crate) struct Baseline {
    sizes: Sizes,
    budget_bytes: u64,
}

/// What a run is, as far as its baseline depends on it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    /// Threads of the pool.
    pub(crate) n_threads: u64,
    /// Ops of all graphs together.
    pub(crate) n_ops: u64,
    /// Ids of the model.
    pub(crate) vocab_size: u64,
    /// No plan needs a larger arena, however large the budget.
    pub(crate) most_arena_bytes: u64,
    /// What rows of data take beside the arena, of all graphs together.
    pub(crate) rows_bytes: u64,
    /// Most that the tokenizing child takes besides code and libraries, which are counted once.
    pub(crate) tokenizing_bytes: u64,
    /// The same of the child that works beside the steps; 0 without one.
    pub(crate) streaming_bytes: u64,
}

impl Baseline {
    /// The bound for a run in a budget.
    pub(crate) fn declare(sizes: Sizes, budget_bytes: u64) -> Self {
        Self { sizes, budget_bytes }
    }

    /// All of it.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes_in(self.budget_bytes)
    }

    fn fixed_bytes(&self) -> u64 {
        let Sizes { n_threads, n_ops, vocab_size, rows_bytes, .. } = self.sizes;
        self.streaming_bytes()
            + PROCESS_BYTES
            + THREAD_BYTES * n_threads
            + OP_BYTES * n_ops
            + TOKEN_BYTES * vocab_size
            + rows_bytes.saturating_sub(DECLARED_ROWS_BYTES)
    }

    /// Page tables of the largest arena in a budget.
    fn page_table_bytes(&self, budget_bytes: u64) -> u64 {
        budget_bytes.min(self.sizes.most_arena_bytes) / PAGE_TABLE_SHARE
    }

    /// Most bytes of the child that tokenizes beside the steps; 0 without one.
    pub(crate) fn streaming_bytes(&self) -> u64 {
        self.sizes.streaming_bytes
    }

    /// Most bytes of this process and its child while text is tokenized: planning has not begun then,
    /// and of the arena nothing is touched.
    pub(crate) fn tokenizing_peak_bytes(&self) -> u64 {
        PROCESS_BYTES + self.sizes.tokenizing_bytes
    }

    /// Declared bytes outside the arena of a run in that budget.
    pub(crate) fn bytes_in(&self, budget_bytes: u64) -> u64 {
        self.fixed_bytes() + self.page_table_bytes(budget_bytes)
    }

    /// Whether the smallest budget of a run is what tokenizing takes, however small its model is.
    pub(crate) fn is_tokenizing(&self, smallest_bytes: u64) -> bool {
        self.tokenizing_peak_bytes().next_multiple_of(BUDGET_QUANTUM_BYTES) >= smallest_bytes
    }

    /// The smallest budget in which text is tokenized and whose arena has `arena_bytes`.
    pub(crate) fn smallest_budget(&self, arena_bytes: u64) -> u64 {
        let fits = |budget: u64| budget.checked_sub(self.bytes_in(budget)) >= Some(arena_bytes);
        let need = self.fixed_bytes() + arena_bytes;
        // Above `need` by the page tables of `need`, and of those in turn: close below, then counted up.
        let mut budget = (need + need / PAGE_TABLE_SHARE).next_multiple_of(BUDGET_QUANTUM_BYTES);
        while budget > BUDGET_QUANTUM_BYTES && fits(budget - BUDGET_QUANTUM_BYTES) {
            budget -= BUDGET_QUANTUM_BYTES;
        }
        while !fits(budget) {
            budget += BUDGET_QUANTUM_BYTES;
        }
        budget.max(self.tokenizing_peak_bytes().next_multiple_of(BUDGET_QUANTUM_BYTES))
    }

    /// Checks the running process, whose arena is not touched yet. `tables_bytes`: what the plans declare for their
    /// instructions.
    ///
    /// # Errors
    /// [`Error::Baseline`] with both numbers.
    pub(crate) fn check(&self, tables_bytes: u64) -> Result<()> {
        let declared_bytes = self.bytes() - self.streaming_bytes() + tables_bytes;
        let resident_bytes = resident_bytes();
        if resident_bytes <= declared_bytes {
            return Ok(());
        }
        Err(Error::Baseline { resident_bytes, declared_bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_budget_fits_its_arena_and_one_quantum_less_does_not() {
        for arena_bytes in [0, 1, 20 << 20, 300 << 20, (7 << 30) + 4096] {
            let sizes = Sizes {
                n_threads: 2,
                n_ops: 500,
                vocab_size: 65,
                most_arena_bytes: 2 << 30,
                rows_bytes: 0,
                tokenizing_bytes: 0,
                streaming_bytes: 0,
            };
            let budget = Baseline::declare(sizes, 0).smallest_budget(arena_bytes);
            let room = |b: u64| b.saturating_sub(Baseline::declare(sizes, b).bytes());
            assert_eq!(budget % BUDGET_QUANTUM_BYTES, 0);
            assert!(room(budget) >= arena_bytes);
            assert!(arena_bytes == 0 || room(budget - BUDGET_QUANTUM_BYTES) < arena_bytes);
            // Text is tokenized in the same budget.
            let heavy = Sizes { tokenizing_bytes: 90 << 20, ..sizes };
            let heavy = Baseline::declare(heavy, 0).smallest_budget(arena_bytes);
            assert_eq!(heavy, budget.max(PROCESS_BYTES + (90 << 20)));
            // Not a multiple of the quantum.
            let odd = Baseline::declare(Sizes { tokenizing_bytes: (90 << 20) + 1, ..sizes }, 0);
            let smallest = odd.smallest_budget(arena_bytes);
            assert_eq!(odd.is_tokenizing(smallest), arena_bytes < 90 << 20);
            // A few rows are in the size of the process.
            let long = |rows_bytes| Baseline::declare(Sizes { rows_bytes, ..sizes }, 0);
            assert_eq!(long(DECLARED_ROWS_BYTES).smallest_budget(arena_bytes), budget);
            let more = long(DECLARED_ROWS_BYTES + (8 << 20)).smallest_budget(arena_bytes) - budget;
            assert!((8 << 20..9 << 20).contains(&more));
            // A child beside the steps takes what it takes.
            let streaming = Sizes { streaming_bytes: 9 << 20, ..sizes };
            let streaming = Baseline::declare(streaming, 0).smallest_budget(arena_bytes);
            assert!((8 << 20..10 << 20).contains(&(streaming - budget)));
        }
    }
}
