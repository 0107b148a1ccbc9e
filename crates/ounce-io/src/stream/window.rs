//! A window in use: its rows, in the order of the seed and its number.

use std::path::Path;

use crate::batches::{BlockSampler, RowSampler};
use crate::error::IoError;
use crate::token_cache::TokenCache;

use super::{StreamOptions, WindowNotes};

/// The rows of one window.
#[derive(Debug)]
pub struct StreamWindow {
    rows: Rows,
    notes: WindowNotes,
    n_rows: u64,
}

#[derive(Debug)]
enum Rows {
    Blocks(BlockSampler),
    Samples(RowSampler),
}

impl StreamWindow {
    /// Opens the window at `path` and removes its name, so that its bytes on disk go with it.
    ///
    /// # Errors
    /// `Missing`, `Read`, `BadFile`.
    pub fn open(path: &Path, options: &StreamOptions) -> Result<Self, IoError> {
        let cache = TokenCache::open(path)?;
        let notes: WindowNotes = cache.notes()?;
        let (rows, n_rows) = if notes.place.has_rows() {
            let max_length = options.packs.then_some(options.max_length);
            let rows = RowSampler::of_window(cache, max_length, options.seed)?;
            rows.remove_files()?;
            let n = rows.n_rows();
            (Rows::Samples(rows), n)
        } else {
            let blocks = BlockSampler::new(cache, options.max_length, options.seed)?;
            blocks.cache().remove_file()?;
            let n = blocks.n_blocks();
            (Rows::Blocks(blocks), n)
        };
        Ok(Self { rows, notes, n_rows })
    }

    /// Rows to train on.
    pub fn n_rows(&self) -> u64 {
        self.n_rows
    }

    /// What it notes about itself.
    pub fn notes(&self) -> &WindowNotes {
        &self.notes
    }

    /// The largest id.
    pub fn max_id(&self) -> u32 {
        match &self.rows {
            Rows::Blocks(blocks) => blocks.cache().max_id(),
            Rows::Samples(samples) => samples.cache().max_id(),
        }
    }

    /// Reads row `row` of the window's order: its samples one after the other, each from a multiple of 64 tokens on.
    /// Their lengths go to `lengths`.
    ///
    /// # Errors
    /// `Read`.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn read(
        &self,
        row: u64,
        ids: &mut [i32],
        supervised: &mut [bool],
        lengths: &mut Vec<usize>,
    ) -> Result<(), IoError> {
        // To the sampler, windows are epochs.
        let (epoch, n, row) = (self.notes.place.window, self.n_rows as usize, row as usize);
        match &self.rows {
            Rows::Blocks(blocks) => {
                let len = blocks.max_length();
                blocks.fill_row_range(epoch, n, row..row + 1, &mut ids[..len])?;
                supervised[..len].fill(true);
                lengths.clear();
                lengths.push(len);
                Ok(())
            }
            Rows::Samples(samples) => {
                samples.read(samples.row(epoch, n, row), ids, supervised, lengths)
            }
        }
    }
}
