//! The token axis of a step: rows of tokens in one canonical order.
//!
//! Every row starts at a multiple of the granule (64 tokens); the tokens between the end of a row
//! and the next granule are gaps. Every cut of the axis, into micro-batches or chunks, falls on a
//! granule, and for ops that mix the tokens of a row, between rows.

use std::ops::Range;

/// Rows start and cuts fall at multiples of this many tokens.
pub const GRANULE_TOKENS: u64 = 64;

/// The token axis that a plan is made for: `n_rows` rows of at most `row_tokens` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepShape {
    /// Rows (sequences) per step.
    pub n_rows: u64,
    /// Longest row in tokens; the space of a row is this, rounded up to the granule.
    pub row_tokens: u64,
    /// Selected tokens per step (`R`), for decoding; 0 otherwise.
    pub n_selected: u64,
}

impl StepShape {
    /// A step of `n_rows` rows of at most `row_tokens` tokens.
    pub fn new(n_rows: u64, row_tokens: u64) -> Self {
        Self { n_rows, row_tokens, n_selected: 0 }
    }
    /// Tokens from the start of one row to the start of the next.
    pub fn row_stride(&self) -> u64 {
        self.row_tokens.next_multiple_of(GRANULE_TOKENS)
    }
    /// Tokens on the axis, gaps included.
    pub fn n_tokens(&self) -> u64 {
        self.n_rows * self.row_stride()
    }
    /// The tokens of rows `rows`.
    pub fn tokens_of_rows(&self, rows: Range<u64>) -> Range<u64> {
        rows.start * self.row_stride()..rows.end * self.row_stride()
    }
}
