//! The slow truth, for tests only: an f64 interpreter that defines every op, finite differences, a
//! brute-force planner.
//!
//! Nothing here is fast and nothing of it is in the product. The interpreter runs a [`Graph`] over a
//! whole step, all tokens at once and every value kept, in f64; kernels and plans are compared with
//! it. Finite differences check the interpreter's gradients with nothing but its losses. The
//! brute-force planner finds the fastest schedule of a tiny graph within a number of bytes.
//!
//! ```
//! use ounce_ir::{GraphBuilder, InputKind, Shape};
//! use ounce_oracle::{Interpreter, Row};
//! use ounce_program::StepShape;
//! let mut b = GraphBuilder::new();
//! let ids = b.input(InputKind::TokenIds);
//! let wte = b.param("wte.weight", Shape::fixed(&[4, 2]), true);
//! b.stage("all", "all");
//! let x = b.embed(ids, wte);
//! b.cross_entropy(x, wte);
//! let graph = b.finish().expect("a well-formed graph");
//!
//! let mut step = Interpreter::new(&graph, StepShape::new(1, 3));
//! step.set_rows(&[Row { token_ids: vec![0, 1, 2], targets: vec![1, 2, 3] }]);
//! step.run_forward();
//! assert!((step.loss() - 4.0_f64.ln()).abs() < 1e-15, "all weights are zero: every id is as likely");
//! ```
//!
//! Files, in reading order: [`ops`] (every op's definition, on slices), [`round`] (what
//! 16 bits keep), [`philox`] (random bits),
//! [`interpret`] (a graph on a step), [`finite_difference`] (gradients without a backward),
//! [`mod@brute_force`] (the fastest schedule in a number of bytes), [`random_graph`] (models for
//! property tests).
//!
//! [`Graph`]: ounce_ir::Graph
#![forbid(unsafe_code)]

pub mod ops;

pub mod round;

pub mod philox;

pub mod interpret;

pub mod finite_difference;

pub mod brute_force;

pub mod random_graph;

pub use brute_force::{brute_force, least_bytes};
pub use finite_difference::{GradientCheck, check_gradients};
pub use interpret::{Hyper, Interpreter, Row};
pub use random_graph::{RandomCase, TestRng, random_case};
