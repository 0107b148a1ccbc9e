//! Where the time of steps goes, per kind of op.

use std::cell::Cell;
use std::time::Duration;

use crate::spec::OpSpec;

/// Time spent in one kind of op since profiling was switched on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpTime {
    /// The op's name in the graph's textual form, or `zero`.
    pub op: &'static str,
    /// Runs.
    pub n_runs: u64,
    /// Their sum.
    pub total: Duration,
}

/// One preallocated cell per op, and one for zeroing sums.
#[derive(Debug)]
pub(crate) struct Profile {
    cells: Vec<Cell<(u64, Duration)>>,
}

impl Profile {
    pub(crate) fn new(n_ops: usize) -> Self {
        Self { cells: vec![Cell::default(); n_ops + 1] }
    }

    /// Counts one run of op `op` (`None`: zeroing).
    pub(crate) fn add(&self, op: Option<u32>, time: Duration) {
        let index = op.map_or(self.cells.len() - 1, |op| op as usize);
        let (n_runs, total) = self.cells[index].get();
        self.cells[index].set((n_runs + 1, total + time));
    }

    /// Sums per kind of op, the longest first.
    pub(crate) fn report(&self, ops: &[OpSpec]) -> Vec<OpTime> {
        let mut kinds: Vec<OpTime> = Vec::new();
        let names = ops.iter().map(|op| op.kind.name()).chain(["zero"]);
        for (op, cell) in names.zip(&self.cells) {
            let (n_runs, total) = cell.get();
            match kinds.iter_mut().find(|k| k.op == op) {
                Some(kind) => {
                    kind.n_runs += n_runs;
                    kind.total += total;
                }
                None => kinds.push(OpTime { op, n_runs, total }),
            }
        }
        kinds.retain(|k| k.n_runs > 0);
        kinds.sort_by_key(|k| std::cmp::Reverse(k.total));
        kinds
    }
}
