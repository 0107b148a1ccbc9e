//! What is computed: a transformer's training step as a graph of coarse ops.
//!
//! A [`Graph`] is one symbolic micro-batch of `N` tokens: values of shape `[N, C]`, parameters and
//! their uses, gradient sums, the update, and the chain of [`Stage`]s that a planner may cut between.
//! The plan instantiates `N` and unrolls the step. The same form serves training, evaluation and
//! decoding.
//!
//! Files, in reading order: [`mod@entity`] (u32 ids and the tables they index), [`dtype`], [`shape`],
//! [`op`] (every op, its attributes and what it reads), [`graph`] (the nouns), [`builder`] (the
//! public way to build one), `infer` (one shape rule per op), [`mod@verify`] (every invariant), `text`
//! (print), `parse` (and back).
//!
//! ```
//! use ounce_ir::{DType, GraphBuilder, InputKind, Shape, WeightLayout};
//! let mut b = GraphBuilder::new();
//! let ids = b.input(InputKind::TokenIds);
//! let wte = b.param("wte.weight", Shape::fixed(&[11, 4]), true);
//! b.stage("embed", "embed");
//! let x = b.embed(ids, wte);
//! b.stage("mlp.0", "mlp");
//! let w = b.param("fc.weight", Shape::fixed(&[4, 4]), true);
//! let y = b.linear(x, w, None, WeightLayout::OutIn);
//! let x = b.add(x, y);
//! b.stage("head", "head");
//! b.cross_entropy(x, wte);
//! let graph = b.finish().expect("a well-formed graph");
//! assert_eq!(graph.stages.len(), 3);
//! assert_eq!(graph.n_params_elems(), 11 * 4 + 16);
//! ```
#![forbid(unsafe_code)]

pub mod entity;

pub mod dtype;
pub mod shape;

pub mod op;

pub mod graph;

pub mod builder;

mod infer;

pub mod verify;

mod parse;
mod text;

pub use builder::GraphBuilder;
pub use dtype::DType;
pub use entity::{EntityId, Table};
pub use graph::{
    Graph, Init, InputKind, MASTER_LO, OptimizerKind, Param, ParamId, Phase, RandomSite, RopeTable,
    RopeTableId, Stage, StageId, StateSpec, Use, UseId, Value, ValueId, ValueKind,
};
pub use infer::{InferError, infer_outputs};
pub use op::{AttentionSpec, Gate, GeluKind, Op, OpId, OpKind, WeightLayout};
pub use parse::ParseError;
pub use shape::{Lead, Shape};
pub use verify::{VerifyError, verify};
