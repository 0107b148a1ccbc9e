//! Rows of token ids on the token axis of a step.
//!
//! Row `r` starts at token `r * row_stride`. Token `t` of a row predicts id `t + 1`; the last one
//! predicts nothing. Everything else on the axis is a gap: no id, position 0, no target.

use ounce_exec::{Buffers, RowSpan};
use ounce_ir::{Graph, InputKind, ValueId, ValueKind};
use ounce_program::StepShape;

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

/// The rows of the step that is next; reused from step to step.
#[derive(Debug)]
pub(crate) struct Batch {
    shape: StepShape,
    vocab_size: u64,
    spans: Vec<RowSpan>,
    row: Vec<i32>,
}

impl Batch {
    /// An empty batch for steps of `shape`; ids are below `vocab_size`.
    pub(crate) fn new(shape: StepShape, vocab_size: u64) -> Self {
        Self {
            shape,
            vocab_size,
            spans: Vec::with_capacity(shape.n_rows as usize),
            row: vec![0; shape.row_tokens as usize],
        }
    }

    /// Fills the axis with `n_rows` rows; `read(r, ids)` writes row `r` and returns its length.
    pub(crate) fn fill(
        &mut self,
        buffers: &mut Buffers<'_>,
        inputs: DataInputs,
        n_rows: u64,
        mut read: impl FnMut(u64, &mut [i32]) -> Result<usize>,
    ) -> Result<()> {
        assert!(n_rows <= self.shape.n_rows, "{n_rows} rows of at most {}", self.shape.n_rows);
        let stride = self.shape.row_stride() as usize;
        self.spans.clear();
        for r in 0..self.shape.n_rows {
            let len = if r < n_rows { read(r, &mut self.row)? } else { 0 };
            let start = r as usize * stride;
            if len > 0 {
                self.spans.push(RowSpan { start, len });
            }
            self.check_ids(len)?;
            let row = &self.row[..len];
            put(buffers, inputs.token_ids, start, stride, -1, row.iter().copied());
            put(buffers, inputs.positions, start, stride, 0, 0..len as i32);
            let targets = row.iter().skip(1).copied();
            put(buffers, inputs.targets, start, stride, -1, targets);
        }
        if let (Some(selected), Some(last)) = (inputs.selected, self.spans.last()) {
            buffers.session_i32(selected).fill((last.start + last.len - 1) as i32);
        }
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

    /// Tokens that predict one.
    pub(crate) fn n_predictions(&self) -> u64 {
        self.spans.iter().map(|s| s.len as u64 - 1).sum()
    }

    fn check_ids(&self, len: usize) -> Result<()> {
        match self.row[..len].iter().find(|&&id| id < 0 || id as u64 >= self.vocab_size) {
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

/// Writes one row of a data input, if the graph has it: the ids, then the gap.
fn put(
    buffers: &mut Buffers<'_>,
    input: Option<ValueId>,
    start: usize,
    stride: usize,
    gap: i32,
    ids: impl Iterator<Item = i32>,
) {
    let Some(input) = input else { return };
    let dst = &mut buffers.session_i32(input)[start..start + stride];
    dst.fill(gap);
    for (x, id) in dst.iter_mut().zip(ids) {
        *x = id;
    }
}
