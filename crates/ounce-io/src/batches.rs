//! Which ids a step trains on, in an order that depends on the seed only: blocks of a token stream, or rows.
//!
//! Idea: the stream is cut into consecutive blocks of `max_length` ids; with weights, file by file. Rows are numbered
//! through the whole run: row `b` of step `s` is number `s * rows_per_step + b`. Number `g` is block
//! `permutation(seed, epoch)[g mod n_blocks]` of epoch `g / n_blocks` (`mixture.rs` has it with weights). Samples of a
//! cache of rows are taken the same way, one in a row or several (`packs.rs`).
//!
//! Invariants: every block once per epoch; the rows of a step do not depend on how it is cut into micro-batches, so
//! 12 x 1 and 3 x 4 are the same run; any step is found in O(1), so a resumed run needs nothing but its number.
//! The last, shorter block is evaluated, not trained on.

use std::ops::Range;

use crate::error::IoError;
use crate::mixture::Mixture;
use crate::packs::{GRANULE_TOKENS, PackNotes, pack_samples};
use crate::row_tokens::RowNotes;
use crate::token_cache::TokenCache;

/// The training blocks of a token cache.
#[derive(Debug)]
pub struct BlockSampler {
    cache: TokenCache,
    max_length: usize,
    /// First id of each part, and the number of its first block.
    parts: Vec<(u64, u64)>,
    mixture: Mixture,
}

impl BlockSampler {
    /// Cuts the ids of `cache` into blocks of `max_length`.
    ///
    /// # Errors
    /// `Usage` for blocks of fewer than 2 ids, `TooFewTokens` where the ids do not fill one block.
    pub fn new(cache: TokenCache, max_length: usize, seed: u64) -> Result<Self, IoError> {
        let whole = [(cache.n_tokens(), 1.0)];
        Self::with_weights(cache, &whole, max_length, seed)
    }

    /// The same, cut part by part: each of so many ids, with its weight.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn with_weights(
        cache: TokenCache,
        parts: &[(u64, f64)],
        max_length: usize,
        seed: u64,
    ) -> Result<Self, IoError> {
        check_max_length(max_length)?;
        let (mut starts, mut blocks, mut first) = (Vec::new(), Vec::new(), (0, 0));
        for &(n_tokens, weight) in parts {
            starts.push(first);
            let n_blocks = n_tokens / max_length as u64;
            blocks.push((n_blocks, weight));
            first = (first.0 + n_tokens, first.1 + n_blocks);
        }
        let mixture = Mixture::new(&blocks, seed);
        if blocks.iter().any(|&(n_blocks, _)| n_blocks > 0) {
            // There is text; whether any of it is wanted is for the weights to say.
            check_weights(&mixture)?;
        }
        if mixture.n_per_epoch() == 0 {
            let hint = match cache.n_tokens() {
                0 => "the file is empty: give one with text".into(),
                1 => "give more text".into(),
                n => format!("give more text, or `--max-length` of at most {n}").into(),
            };
            return Err(IoError::TooFewTokens {
                path: cache.source_path().into(),
                n_tokens: cache.n_tokens(),
                n_needed: max_length as u64,
                hint,
            });
        }
        Ok(Self { cache, max_length, parts: starts, mixture })
    }

    /// Number of blocks in an epoch.
    pub fn n_blocks(&self) -> u64 {
        self.mixture.n_per_epoch()
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
        (n_epochs * self.n_blocks() as f64 / rows_per_step as f64).ceil() as u64
    }

    /// The block that row `row` of step `step` (both from 0) trains on.
    pub fn block(&self, step: u64, rows_per_step: usize, row: usize) -> u64 {
        assert!(row < rows_per_step, "row {row} of {rows_per_step}");
        self.mixture.at(step * rows_per_step as u64 + row as u64)
    }

    /// The first id of a block.
    fn first_id(&self, block: u64) -> u64 {
        let part = self.parts.partition_point(|&(_, first_block)| first_block <= block) - 1;
        // Parts without a block begin where the next one does: the last of them is meant.
        let (first_id, first_block) = self.parts[part];
        first_id + (block - first_block) * self.max_length as u64
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
            self.cache.read(self.first_id(block), ids_t)?;
        }
        Ok(())
    }
}

/// The samples of a cache of rows, one in a row or several.
#[derive(Debug)]
pub struct RowSampler {
    cache: TokenCache,
    packs: Option<TokenCache>,
    mixture: Mixture,
}

impl RowSampler {
    /// One sample in a row; `weights` has one number for each file.
    ///
    /// # Errors
    /// `BadFile` where the notes of the cache are broken.
    pub fn new(cache: TokenCache, weights: &[f64], seed: u64) -> Result<Self, IoError> {
        let parts = part_samples(&cache)?;
        let parts: Vec<(u64, f64)> = parts.into_iter().zip(weights.iter().copied()).collect();
        Self::checked(Self { mixture: Mixture::new(&parts, seed), cache, packs: None })
    }

    /// Several samples in a row of `max_length` ids.
    ///
    /// # Errors
    /// As [`Self::new`], and those of [`pack_samples`].
    pub fn packed(
        cache: TokenCache,
        weights: &[f64],
        max_length: usize,
        seed: u64,
    ) -> Result<Self, IoError> {
        let packs = pack_samples(&cache, &part_samples(&cache)?, max_length, seed)?;
        let notes: PackNotes = packs.notes()?;
        let parts: Vec<(u64, f64)> =
            notes.part_rows.into_iter().zip(weights.iter().copied()).collect();
        Self::checked(Self { mixture: Mixture::new(&parts, seed), cache, packs: Some(packs) })
    }

    /// All samples of a cache as one part, packed into rows of `max_length` ids if that is given.
    pub(crate) fn of_window(
        cache: TokenCache,
        max_length: Option<usize>,
        seed: u64,
    ) -> Result<Self, IoError> {
        let n_samples = [cache.n_rows()];
        let packs = max_length.map(|n| pack_samples(&cache, &n_samples, n, seed)).transpose()?;
        let n_rows = packs.as_ref().map_or(cache.n_rows(), TokenCache::n_rows);
        Self::checked(Self { mixture: Mixture::new(&[(n_rows, 1.0)], seed), cache, packs })
    }

    /// Removes the names of the files, which stay readable while they are open.
    pub(crate) fn remove_files(&self) -> Result<(), IoError> {
        self.cache.remove_file()?;
        self.packs.as_ref().map_or(Ok(()), TokenCache::remove_file)
    }

    fn checked(sampler: Self) -> Result<Self, IoError> {
        check_weights(&sampler.mixture)?;
        Ok(sampler)
    }

    /// Rows in an epoch.
    pub fn n_rows(&self) -> u64 {
        self.mixture.n_per_epoch()
    }

    /// The samples' tokens.
    pub fn cache(&self) -> &TokenCache {
        &self.cache
    }

    /// The row of the data that row `row` of step `step` (both from 0) trains on.
    pub fn row(&self, step: u64, rows_per_step: usize, row: usize) -> u64 {
        assert!(row < rows_per_step, "row {row} of {rows_per_step}");
        self.mixture.at(step * rows_per_step as u64 + row as u64)
    }

    /// Reads row `row` of the data: its samples one after the other, each from a multiple of 64 tokens on.
    /// Their lengths go to `lengths`.
    ///
    /// # Errors
    /// `Read`.
    pub fn read(
        &self,
        row: u64,
        ids: &mut [i32],
        supervised: &mut [bool],
        lengths: &mut Vec<usize>,
    ) -> Result<(), IoError> {
        lengths.clear();
        let Some(packs) = &self.packs else {
            lengths.push(self.cache.read_row(row, ids, supervised)?);
            return Ok(());
        };
        let (first, n_samples) = packs.row(row)?;
        let mut at = 0;
        for k in 0..n_samples as u64 {
            let mut sample = [0];
            packs.read(first + k, &mut sample)?;
            let n = self.cache.read_row(sample[0] as u64, &mut ids[at..], &mut supervised[at..])?;
            lengths.push(n);
            at = (at + n).next_multiple_of(GRANULE_TOKENS).min(ids.len());
        }
        Ok(())
    }
}

/// Refuses weights that are all zero.
fn check_weights(mixture: &Mixture) -> Result<(), IoError> {
    if mixture.n_per_epoch() > 0 {
        return Ok(());
    }
    Err(IoError::Usage {
        what: "the weights of the data files leave nothing to train on".into(),
        hint: "give at least one file a weight of 1".into(),
    })
}

/// Samples of each file of a cache of rows.
fn part_samples(cache: &TokenCache) -> Result<Vec<u64>, IoError> {
    let notes: RowNotes = cache.notes()?;
    Ok(notes.files.iter().map(|f| f.counts.n_kept).collect())
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
