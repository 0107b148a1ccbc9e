//! What tests of this crate and of those above it need: a disk with faults, small runs, bodies for fuzzing.
//!
//! Files in reading order: `faulty_disk.rs`, `small_run.rs`, `mutate.rs` (damage), `fuzz.rs` (one body per parser),
//! `templates.rs` (chat templates against Python's), `masks.rs` (what is supervised against TRL's).

mod faulty_disk;
mod fuzz;
mod masks;
mod mutate;
mod small_run;
mod templates;

pub use faulty_disk::{Fault, FaultyDisk, Survival};
pub use fuzz::{FuzzCase, Target};
pub use masks::compare_masks;
pub use small_run::SmallRun;
pub use templates::{Comparison, compare_templates};
