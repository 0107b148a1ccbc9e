//! Graph to Graph: from a forward graph to the graph of a whole training step.
//!
//! A pass takes a graph and returns a new one; it decides nothing about memory or time. What it
//! does decide is every order of additions: where gradients meet, and in which order parts of a
//! norm are added. A plan may cut, repeat and interleave, but never change that.
//!
//! Files, in reading order: [`mod@differentiate`] (adds the backward, one rule per op), [`precision`]
//! (chooses dtypes, by a table), [`optimizer`] (adds the update), `error` (what a pass may refuse).
//!
//! ```
//! use ounce_ir::{GraphBuilder, InputKind, OptimizerKind, Shape};
//! let mut b = GraphBuilder::new();
//! let ids = b.input(InputKind::TokenIds);
//! let wte = b.param("wte.weight", Shape::fixed(&[11, 4]), true);
//! b.stage("embed", "embed");
//! let x = b.embed(ids, wte);
//! b.stage("head", "head");
//! b.cross_entropy(x, wte);
//! let forward = b.finish().expect("a well-formed graph");
//!
//! let graph = ounce_passes::differentiate(&forward)?;
//! let graph = ounce_passes::attach_optimizer(&graph, OptimizerKind::AdamW, false)?;
//! let names: Vec<_> = graph.ops.values().map(|op| op.kind.name()).collect();
//! assert_eq!(
//!     names,
//!     ["embed", "cross_entropy_train", "embed_grad_rows", "embed_scatter", "sum_squares", "adamw"]
//! );
//! # Ok::<(), ounce_passes::PassError>(())
//! ```
#![forbid(unsafe_code)]

pub mod differentiate;

pub mod precision;

pub mod optimizer;

mod error;

pub use differentiate::differentiate;
pub use error::PassError;
pub use optimizer::attach_optimizer;
pub use precision::{ClassPrecision, OpClass, Precision, PrecisionPolicy, TABLE, lower_precision};
