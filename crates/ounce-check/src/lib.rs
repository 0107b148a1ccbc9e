//! The independent checker: a plan is proved right for its graph, or what is wrong with it is named.
//!
//! The checker shares only nouns with the planner. It looks at a plan twice: as a packing of bytes
//! (every buffer, whatever it holds) and as a computation (every address, whatever buffer it belongs
//! to). A plan that passes both gives the numbers that a keep-everything run would give, inside its
//! budget.
//!
//! Files, in reading order: `check` (the idea, what is proved and what is not, the replay of a step),
//! `operands` (what an op demands of its operands), `memory` (the symbolic memory), `buffers` (the
//! packing and the resident buffers), `error` (every defect), `mutate` (certainly wrong variants of
//! a plan, for tests of planners).
#![forbid(unsafe_code)]

mod check;

mod operands;

mod memory;

mod buffers;

mod error;

#[cfg(any(test, feature = "testing"))]
pub mod mutate;

pub use check::{Proof, check};
pub use error::{At, CheckError};
