//! Training checkpoints: everything that a run needs to go on with the same bits, in one directory.
//!
//! ```text
//! OUT/checkpoint-1200/
//!   config.json, tokenizer files, ...   as in any model directory: the checkpoint is one
//!   model.safetensors                   the parameters
//!   optimizer.safetensors               the optimizer's states, called STATE.PARAMETER, F32 (lower halves of bf16
//!                                       masters: I16)
//!   trainer_state.json                  step, data cursor, seed, schedule, settings, ... (`state.rs`)
//!   manifest.json                       length and XXH64 of every other file
//! ```
//!
//! Idea: a checkpoint is written under a hidden name beside its final one, flushed, and renamed. There is no file
//! that points to the newest one, which could itself fail to be written: the newest is found by looking, and counts
//! only if every byte is as its manifest says (`read.rs`).
//!
//! Invariants:
//! * whatever fails, and wherever the process dies, the checkpoints that were there are untouched and found;
//! * what is called `checkpoint-N` was complete and flushed when it got that name;
//! * a save holds one small buffer: tensors stream from where they are, checksums are computed on the way;
//! * rotation comes after publication and never removes the newest valid checkpoint, nor one it is told to spare.
//!
//! Files in reading order: `state.rs`, `manifest.rs`, `write.rs`, `read.rs`, `rotate.rs`.

mod manifest;
mod read;
mod rotate;
mod state;
mod write;

use std::fs;
use std::path::{Path, PathBuf};

pub use read::{Checkpoint, Newest, Skipped, course, newest_valid, open};
pub use rotate::rotate;
pub use state::{DataCursor, ScalerState, TrainerState};
pub use write::{CheckpointFile, CheckpointWriter, checkpoint_bytes};

use crate::error::IoError;

/// Version of the layout; goes up when an older reader would misunderstand it.
const FORMAT: u32 = 1;
const WEIGHTS: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "trainer_state.json";
const MANIFEST: &str = "manifest.json";

/// The directory of the checkpoint after `step` steps.
pub fn checkpoint_path(output_dir: &Path, step: u64) -> PathBuf {
    output_dir.join(dir_name(step))
}

fn dir_name(step: u64) -> String {
    format!("checkpoint-{step}")
}

/// Name of a state of a parameter in `optimizer.safetensors`.
pub fn state_name(state: &str, param: &str) -> String {
    format!("{state}.{param}")
}

/// The step that a directory name stands for.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix("checkpoint-")?.parse().ok()?;
    (dir_name(step) == name).then_some(step)
}

/// Whatever is called like a checkpoint in `output_dir`, with its step, newest first; nothing where there is no such
/// directory.
///
/// # Errors
/// `Read` where the directory cannot be read.
pub fn list(output_dir: &Path) -> Result<Vec<(u64, PathBuf)>, IoError> {
    let failed = |e| IoError::reading(output_dir, e);
    let entries = match fs::read_dir(output_dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if let Some(step) = entry.file_name().to_str().and_then(step_of) {
            found.push((step, entry.path()));
        }
    }
    found.sort_by(|a, b| b.cmp(a));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_writer_would_write_is_called_a_checkpoint() {
        assert_eq!(step_of("checkpoint-0"), Some(0));
        assert_eq!(step_of("checkpoint-1200"), Some(1200));
        for name in ["checkpoint-", "checkpoint-07", "checkpoint-+7", "checkpoint-7.old", "7"] {
            assert_eq!(step_of(name), None, "{name}");
        }
        assert_eq!(step_of("checkpoint-99999999999999999999"), None);
    }

    #[test]
    fn checkpoints_are_ordered_by_number_not_by_name() {
        let dir = tempfile::tempdir().unwrap();
        for step in [900, 1000, 50] {
            fs::create_dir(checkpoint_path(dir.path(), step)).unwrap();
        }
        fs::create_dir(dir.path().join(".checkpoint-2000.1-1.tmp")).unwrap();
        let steps: Vec<u64> = list(dir.path()).unwrap().iter().map(|(step, _)| *step).collect();
        assert_eq!(steps, [1000, 900, 50]);
        assert!(list(&dir.path().join("nowhere")).unwrap().is_empty());
    }
}
