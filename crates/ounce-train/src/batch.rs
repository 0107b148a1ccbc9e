//! Rows of token ids on the token axis of a step.
//!
//! Row `r` starts at token `r * row_stride` and holds one sample, or several, each from a granule on.
//! Token `t` of a sample predicts id `t + 1` where that is supervised; the last one predicts nothing.
//! Positions start from 0 in every sample, and attention stays within it. Everything else on the axis
//! is a gap: no id, position 0, no target.

use ounce_exec::{Buffers, RowSpan};
use ounce_ir::{Graph, InputKind, ValueId, ValueKind};
use ounce_program::{GRANULE_TOKENS, StepShape};

use crate::{Error, Result};

/// The data inputs that a graph has.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DataInputs {
    token_ids: Option<ValueId>,
    positions: Option<ValueId>,
    targets: Option<ValueId>,
    selected: Option<ValueId>,
}

impl DataInputs {
    /// Those of `graph`.
    pub(crate) fn of(graph: &Graph) -> Self {
        let find = |kind| graph.find_value(ValueKind::Input(kind));
        Self {
            token_ids: find(InputKind::TokenIds),
            positions: find(InputKind::Positions),
            targets: find(InputKind::Targets),
            selected: find(InputKind::SelectedRows),
        }
    }
}

/// One row in the making: its samples one after the other, each from a granule on.
#[derive(Debug)]
pub(crate) struct Row {
    /// Ids, as many as a row may have.
    pub(crate) ids: Vec<i32>,
    /// Which of them are supervised.
    pub(crate) supervised: Vec<bool>,
    /// Ids of each sample.
    pub(crate) lengths: Vec<usize>,
}

impl Row {
    /// One sample of `n` ids, all of which are supervised.
    pub(crate) fn is_text(&mut self, n: usize) {
        self.supervised[..n].fill(true);
        self.lengths.push(n);
    }
}

/// What rows take in the process where steps have this shape: a batch of them, and what the executor knows of them.
pub(crate) fn rows_bytes(shape: StepShape) -> u64 {
    let bytes = |n: usize| n as u64;
    let per_token = bytes(size_of::<i32>() + size_of::<bool>()) * shape.row_stride();
    let n_granules = shape.row_stride() / GRANULE_TOKENS;
    let spans = 2 * bytes(size_of::<RowSpan>()) * (shape.n_tokens() / GRANULE_TOKENS);
    per_token + bytes(size_of::<usize>()) * n_granules + spans
}

/// The rows of the step that is next; reused from step to step.
#[derive(Debug)]
pub(crate) struct Batch {
    shape: StepShape,
    vocab_size: u64,
    spans: Vec<RowSpan>,
    n_predictions: u64,
    row: Row,
}

impl Batch {
    /// An empty batch for steps of `shape`; ids are below `vocab_size`.
    pub(crate) fn new(shape: StepShape, vocab_size: u64) -> Self {
        let n_tokens = shape.row_stride() as usize;
        let n_samples = (shape.n_tokens() / GRANULE_TOKENS) as usize;
        Self {
            shape,
            vocab_size,
            spans: Vec::with_capacity(n_samples),
            n_predictions: 0,
            row: Row {
                ids: vec![0; n_tokens],
                supervised: vec![false; n_tokens],
                lengths: Vec::with_capacity(n_tokens / GRANULE_TOKENS as usize),
            },
        }
    }

    /// Fills the axis with `n_rows` rows; `read(r, row)` writes row `r`.
    pub(crate) fn fill(
        &mut self,
        buffers: &mut Buffers<'_>,
        inputs: DataInputs,
        n_rows: u64,
        mut read: impl FnMut(u64, &mut Row) -> Result<()>,
    ) -> Result<()> {
        assert!(n_rows <= self.shape.n_rows, "{n_rows} rows of at most {}", self.shape.n_rows);
        let stride = self.shape.row_stride() as usize;
        self.spans.clear();
        self.n_predictions = 0;
        for r in 0..self.shape.n_rows {
            self.row.lengths.clear();
            if r < n_rows {
                read(r, &mut self.row)?;
            }
            let start = r as usize * stride;
            for (input, gap) in
                [(inputs.token_ids, -1), (inputs.positions, 0), (inputs.targets, -1)]
            {
                if let Some(input) = input {
                    buffers.session_i32(input)[start..start + stride].fill(gap);
                }
            }
            let mut at = 0;
            for k in 0..self.row.lengths.len() {
                let len = self.row.lengths[k];
                self.put_sample(buffers, inputs, start, at..at + len)?;
                at = (at + len).next_multiple_of(GRANULE_TOKENS as usize);
            }
        }
        if let (Some(selected), Some(last)) = (inputs.selected, self.spans.last()) {
            buffers.session_i32(selected).fill((last.start + last.len - 1) as i32);
        }
        Ok(())
    }

    /// Puts the sample at `place` of the current row, which begins at token `start`, on the axis.
    fn put_sample(
        &mut self,
        buffers: &mut Buffers<'_>,
        inputs: DataInputs,
        start: usize,
        place: std::ops::Range<usize>,
    ) -> Result<()> {
        if place.is_empty() {
            return Ok(());
        }
        let (ids, supervised) = (&self.row.ids[place.clone()], &self.row.supervised[place.clone()]);
        self.check_ids(ids)?;
        let at = start + place.start;
        put(buffers, inputs.token_ids, at, ids.iter().copied());
        put(buffers, inputs.positions, at, 0..ids.len() as i32);
        let next = ids.iter().zip(supervised).skip(1);
        put(buffers, inputs.targets, at, next.map(|(&id, &is)| if is { id } else { -1 }));
        self.n_predictions += supervised.iter().skip(1).filter(|&&is| is).count() as u64;
        self.spans.push(RowSpan { start: at, len: ids.len() });
        Ok(())
    }

    /// The rows, without their gaps.
    pub(crate) fn spans(&self) -> &[RowSpan] {
        &self.spans
    }

    /// Tokens, gaps not counted.
    pub(crate) fn n_tokens(&self) -> u64 {
        self.spans.iter().map(|s| s.len as u64).sum()
    }

    /// Tokens that predict one that is supervised.
    pub(crate) fn n_predictions(&self) -> u64 {
        self.n_predictions
    }

    fn check_ids(&self, ids: &[i32]) -> Result<()> {
        match ids.iter().find(|&&id| id < 0 || id as u64 >= self.vocab_size) {
            Some(id) => Err(Error::Input {
                message: format!(
                    "token id {id} is not from 0 to below the model's vocab_size {}",
                    self.vocab_size
                ),
                hint: "the tokenizer and the model must belong together".to_owned(),
            }),
            None => Ok(()),
        }
    }
}

/// Writes a data input from token `at` on, if the graph has it.
fn put(
    buffers: &mut Buffers<'_>,
    input: Option<ValueId>,
    at: usize,
    values: impl Iterator<Item = i32>,
) {
    let Some(input) = input else { return };
    for (x, value) in buffers.session_i32(input)[at..].iter_mut().zip(values) {
        *x = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rows_take_is_what_a_batch_holds_and_the_executor_once_more() {
        for shape in [StepShape::new(1, 1), StepShape::new(3, 200), StepShape::new(500, 64)] {
            let Batch { spans, row, .. } = Batch::new(shape, 9);
            let spans_bytes = size_of::<RowSpan>() * spans.capacity();
            let lengths_bytes = size_of::<usize>() * row.lengths.capacity();
            let held = 4 * row.ids.capacity() + row.supervised.capacity() + lengths_bytes;
            assert_eq!(rows_bytes(shape), (held + 2 * spans_bytes) as u64);
        }
    }
}
