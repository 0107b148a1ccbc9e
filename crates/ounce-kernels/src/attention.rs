//! Causal attention with grouped heads, in tiles: never a T x T matrix.
//!
//! Shapes: N tokens, H query heads, K key-value heads (H a multiple of K), D head dim. Rows are
//! spans of the token axis; a token attends within its span, to itself and what came before, or to
//! itself and what came before within a window. A soft cap turns a score `s` into `cap tanh(s / cap)`.
//!
//! Idea: a span is cut into tiles of 64 tokens, counted from its start. For a tile of queries and
//! one of keys all intermediate matrices are 64 x 64 and stay in L1; operands are laid out so that
//! the register tile of the matrix product reads them directly:
//! ```text
//! transposed  [D][64]      channels by tokens: right operand of q k, dO v
//! natural     [64][64]..   tokens by channels, 64 channels at a time: left operand of q k, dO v, and
//!                          right operand of p v, p dO, ds q, ds k
//! ```
//! Files: `forward` (online softmax), `backward` (scores again, then gradients), `layout`.
//!
//! Key tiles that lie outside of the window of every query of a tile are not touched. Key 0 of a
//! window may fall into the middle of a tile; what is outside is masked there.
//!
//! Invariants: an output row of the forward is folded over ascending key tiles; `dq` over ascending
//! key tiles; `dk` and `dv` of one query head over ascending query tiles, from zero, and then the
//! heads of a group in order. So neither threads nor the grouping of tiles change any bit.
//!
//! Complexity: 2 products of 64 x 64 x D per pair of tiles forward, 5 backward (7 where there are
//! too few heads for the threads). Sources: `[Vaswani17]`; `[Ainslie23]` (grouped heads);
//! `[Dao22]`, `[Dao23]` (tiles, scores again in the backward).

mod backward;
mod forward;
mod layout;

pub use backward::{attention_backward, attention_backward_scratch_elems};
pub use forward::{attention_forward, attention_forward_scratch_elems};
pub use layout::{AttentionDims, HeadsMut, HeadsRef, RowSpan};

/// Tokens per tile, fixed: part of the order of additions.
const TILE: usize = 64;
/// Tiles of queries (forward) or keys (backward) that share one packing of the other side.
const TILES_PER_BLOCK: usize = 4;

#[cfg(test)]
mod tests;
