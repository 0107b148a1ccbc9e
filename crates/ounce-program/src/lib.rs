//! What is run: a [`Plan`] is a step unrolled to instructions over planned bytes.
//!
//! What planner, checker and executor share: the planner writes plans, the checker judges them, the
//! executor runs them; none of the three knows another. [`Machine`] is what a planner may ask of the
//! machine it plans for.
//!
//! Files, in reading order: [`shape`] (the token axis of a step), [`plan`] (buffers, instructions,
//! the plan, its certificate), [`machine`] (scratch bytes and costs), `text` (a plan as text).
#![forbid(unsafe_code)]

pub mod shape;

pub mod plan;

pub mod machine;

mod text;

pub use machine::{FixedMachine, Machine};
pub use plan::{
    Buffer, BufferId, BufferRef, BufferRole, Category, Certificate, Choice, Instr, LoopOrder, Plan,
    Tag, Tier,
};
pub use shape::{GRANULE_TOKENS, StepShape};
