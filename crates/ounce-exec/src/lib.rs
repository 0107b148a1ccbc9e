//! Plan to steps: the arena, dispatch to kernels, timings.
//!
//! An [`Executor`] is a plan with everything looked up beforehand: byte offsets, sizes, attributes.
//! It decides nothing and allocates nothing while it runs; every byte it touches lies in the one
//! [`Arena`] at the place the plan gave it. [`MeasuredMachine`] answers a planner's questions with
//! the kernels' own scratch sizes and with timings taken on this machine.
//!
//! Files, in reading order: [`error`], [`arena`] (the reservation, and the only place that turns
//! offsets into slices), `spec` (an op's operands without the graph), `scratch` (scratch bytes of
//! every op), `resolve` (plan and graph to tasks), `gate` (where a step stops before its updates),
//! [`inputs`] (what changes from step to step), `dispatch` (a task to its kernel), [`step`] (the
//! executor), [`buffers`] (what the session reads and writes between steps), [`profile`] (time per
//! op), [`machine`] (costs measured on this machine), `problem` (what is measured of an op),
//! `measure` (how), `contention` (what other programs took meanwhile), `cost_file` (where costs are
//! kept), [`heap`] (freed memory given back).
//!
//! ```
//! use std::sync::Arc;
//! use ounce_exec::MeasuredMachine;
//! use ounce_ir::{GraphBuilder, InputKind, OpId, Shape};
//! use ounce_kernels::pool::Pool;
//! use ounce_program::{Machine, StepShape};
//!
//! let mut b = GraphBuilder::new();
//! let ids = b.input(InputKind::TokenIds);
//! let table = b.param("table", Shape::fixed(&[11, 4]), true);
//! b.stage("embed", "embed");
//! b.embed(ids, table);
//! let graph = b.finish().expect("a well-formed graph");
//! let machine = MeasuredMachine::new(Arc::new(Pool::new(1)), 1 << 20, 0, None);
//! assert!(machine.cost_s(&graph, OpId(0), &StepShape::new(2, 64), 128) > 0.0);
//! ```

pub mod error;

pub mod arena;

mod spec;

mod scratch;

mod resolve;

mod gate;

pub mod inputs;

mod dispatch;

pub mod step;

pub mod buffers;

pub mod profile;

pub mod machine;

mod problem;

mod measure;

mod contention;

mod cost_file;

pub mod heap;

pub use arena::Arena;
pub use buffers::Buffers;
pub use error::{ExecError, NonFinite};
pub use inputs::{OptimizerHyper, StepInputs};
pub use machine::{MeasuredMachine, machine_fingerprint};
pub use ounce_kernels::attention::RowSpan;
pub use profile::{OpTime, TimeClass};
pub use resolve::MAX_ARENA_BYTES;
pub use step::Executor;
