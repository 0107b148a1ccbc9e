//! Which ids a step trains on: blocks of a token stream, in an order that depends on the seed only.
//!
//! Idea: the stream is cut into consecutive blocks of `max_length` ids. Rows are numbered through the whole run: row
//! `b` of step `s` is number `s * rows_per_step + b`. Number `g` is block `permutation(seed, epoch)[g mod n_blocks]`
//! of epoch `g / n_blocks`.
//!
//! Invariants: every block once per epoch; the rows of a step do not depend on how it is cut into micro-batches, so
//! 12 x 1 and 3 x 4 are the same run; any step is found in O(1), so a resumed run needs nothing but its number.
//! The last, shorter block is evaluated, not trained on.

use std::ops::Range;

use crate::error::IoError;
use crate::shuffle::Permutation;
use crate::token_cache::TokenCache;

/// The training blocks of a token cache.
#[derive(Debug)]
pub struct BlockSampler {
    cache: TokenCache,
    max_length: usize,
    n_blocks: u64,
    seed: u64,
}

impl BlockSampler {
    /// Cuts the ids of `cache` into blocks of `max_length`.
    ///
    /// # Errors
    /// `Usage` for blocks of fewer than 2 ids, `TooFewTokens` where the ids do not fill one block.
    pub fn new(cache: TokenCache, max_length: usize, seed: u64) -> Result<Self, IoError> {
        check_max_length(max_length)?;
        let n_blocks = cache.n_tokens() / max_length as u64;
        if n_blocks == 0 {
            return Err(IoError::TooFewTokens {
                path: cache.source_path().into(),
                n_tokens: cache.n_tokens(),
                n_needed: max_length as u64,
                hint: format!("give more text, or `--max-length` of at most {}", cache.n_tokens())
                    .into(),
            });
        }
        Ok(Self { cache, max_length, n_blocks, seed })
    }

    /// Number of blocks in an epoch.
    pub fn n_blocks(&self) -> u64 {
        self.n_blocks
    }

    /// Ids per block.
    pub fn max_length(&self) -> usize {
        self.max_length
    }

    /// The ids that the blocks are cut from.
    pub fn cache(&self) -> &TokenCache {
        &self.cache
    }

    /// Steps that pass over the data `n_epochs` times, rounded up to whole steps.
    pub fn n_steps(&self, n_epochs: f64, rows_per_step: usize) -> u64 {
        (n_epochs * self.n_blocks as f64 / rows_per_step as f64).ceil() as u64
    }

    /// The block that row `row` of step `step` (both from 0) trains on.
    pub fn block(&self, step: u64, rows_per_step: usize, row: usize) -> u64 {
        assert!(row < rows_per_step, "row {row} of {rows_per_step}");
        let number = step * rows_per_step as u64 + row as u64;
        let epoch = number / self.n_blocks;
        Permutation::new(self.n_blocks, self.seed, epoch).at(number % self.n_blocks)
    }

    /// Reads all rows of a step (from 0). Allocates nothing.
    ///
    /// # Shapes
    /// `ids_bt` (rows_per_step, max_length).
    ///
    /// # Errors
    /// `Read`.
    pub fn fill_rows(
        &self,
        step: u64,
        rows_per_step: usize,
        ids_bt: &mut [i32],
    ) -> Result<(), IoError> {
        self.fill_row_range(step, rows_per_step, 0..rows_per_step, ids_bt)
    }

    /// Reads some rows of a step (from 0): one micro-batch. Allocates nothing.
    ///
    /// # Shapes
    /// `ids_bt` (rows.len(), max_length).
    ///
    /// # Errors
    /// `Read`.
    pub fn fill_row_range(
        &self,
        step: u64,
        rows_per_step: usize,
        rows: Range<usize>,
        ids_bt: &mut [i32],
    ) -> Result<(), IoError> {
        assert_eq!(ids_bt.len(), rows.len() * self.max_length, "ids_bt is (rows, max_length)");
        for (row, ids_t) in rows.zip(ids_bt.chunks_exact_mut(self.max_length)) {
            let block = self.block(step, rows_per_step, row);
            self.cache.read(block * self.max_length as u64, ids_t)?;
        }
        Ok(())
    }
}

/// The blocks to evaluate, in order: `(first id, number of ids)`, the last one shorter if need be. A block of one id
/// has nothing to predict and is left out.
#[derive(Debug, Clone)]
pub struct EvalBlocks {
    n_tokens: u64,
    max_length: usize,
    at: u64,
}

impl EvalBlocks {
    /// Cuts the ids of `cache` into blocks of at most `max_length`; read them with [`TokenCache::read`].
    ///
    /// # Errors
    /// `Usage` for blocks of fewer than 2 ids, `TooFewTokens` where there is nothing to predict.
    pub fn new(cache: &TokenCache, max_length: usize) -> Result<Self, IoError> {
        check_max_length(max_length)?;
        if cache.n_tokens() < 2 {
            return Err(IoError::TooFewTokens {
                path: cache.source_path().into(),
                n_tokens: cache.n_tokens(),
                n_needed: 2,
                hint: "give a file with more text".into(),
            });
        }
        Ok(Self { n_tokens: cache.n_tokens(), max_length, at: 0 })
    }

    /// Predictions in all blocks that are still to come: one less than its ids per block.
    pub fn n_predictions(&self) -> u64 {
        let n_left = self.n_tokens - self.at;
        n_left - n_left.div_ceil(self.max_length as u64)
    }
}

impl Iterator for EvalBlocks {
    type Item = (u64, usize);

    fn next(&mut self) -> Option<(u64, usize)> {
        let start = self.at;
        let n_ids = (self.n_tokens - start).min(self.max_length as u64);
        self.at += n_ids;
        (n_ids >= 2).then_some((start, n_ids as usize))
    }
}

fn check_max_length(max_length: usize) -> Result<(), IoError> {
    if max_length >= 2 {
        return Ok(());
    }
    Err(IoError::Usage {
        what: format!("blocks of {max_length} ids have nothing to predict"),
        hint: "use `--max-length` of at least 2".into(),
    })
}
