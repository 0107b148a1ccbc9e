//! Shapes with one symbolic leading dimension.

use crate::DType;

/// The leading dimension of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lead {
    /// None: all dimensions are numbers.
    Fixed,
    /// `N`, the tokens on the token axis. Cut by micro-batches and chunks.
    Tokens,
    /// `R`, a few selected tokens (the last one of each row, when decoding).
    Selected,
}

/// A shape: an optional symbolic leading dimension, then fixed ones.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shape {
    /// The symbolic leading dimension.
    pub lead: Lead,
    /// The fixed dimensions, outermost first; empty means one element per lead.
    pub dims: Vec<u64>,
}

impl Shape {
    /// A shape of numbers only, such as a parameter's.
    pub fn fixed(dims: &[u64]) -> Self {
        Self { lead: Lead::Fixed, dims: dims.to_vec() }
    }
    /// `[N, dims..]`: one entry per token.
    pub fn tokens(dims: &[u64]) -> Self {
        Self { lead: Lead::Tokens, dims: dims.to_vec() }
    }
    /// `[R, dims..]`: one entry per selected token.
    pub fn selected(dims: &[u64]) -> Self {
        Self { lead: Lead::Selected, dims: dims.to_vec() }
    }
    /// Elements per entry of the leading dimension (all of them if the lead is fixed).
    pub fn row_elems(&self) -> u64 {
        self.dims.iter().product()
    }
    /// Elements when the leading dimension is `n` (ignored if the lead is fixed).
    pub fn elems(&self, n: u64) -> u64 {
        match self.lead {
            Lead::Fixed => self.row_elems(),
            Lead::Tokens | Lead::Selected => n * self.row_elems(),
        }
    }
    /// Bytes in `dtype` when the leading dimension is `n`.
    pub fn bytes(&self, dtype: DType, n: u64) -> u64 {
        match self.lead {
            Lead::Fixed => dtype.bytes(self.row_elems()),
            // Rows are whole blocks, so that a row can be addressed.
            Lead::Tokens | Lead::Selected => n * dtype.bytes(self.row_elems()),
        }
    }
    /// The last fixed dimension (1 if there is none).
    pub fn last(&self) -> u64 {
        self.dims.last().copied().unwrap_or(1)
    }
}

impl std::fmt::Display for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let lead = match self.lead {
            Lead::Fixed => None,
            Lead::Tokens => Some("N".to_owned()),
            Lead::Selected => Some("R".to_owned()),
        };
        let dims = lead.into_iter().chain(self.dims.iter().map(u64::to_string));
        write!(f, "[{}]", dims.collect::<Vec<_>>().join(","))
    }
}
