//! What tests of this crate and of those above it need: a disk with faults, small runs, bodies for fuzzing.
//!
//! Files in reading order: `faulty_disk.rs`, `small_run.rs`.

mod faulty_disk;
mod small_run;

pub use faulty_disk::{Fault, FaultyDisk, Survival};
pub use small_run::SmallRun;
