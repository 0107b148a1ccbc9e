//! Finding and opening checkpoints.
//!
//! Nothing says which checkpoint is the newest but their names, and none counts before every byte agrees with its
//! manifest. What does not count is skipped with the reason, for the user to read.

use std::fs;
use std::path::{Path, PathBuf};

use super::manifest::{DAMAGED, Manifest};
use super::{MANIFEST, OPTIMIZER, STATE, TrainerState, WEIGHTS, list, state_name};
use crate::error::IoError;
use crate::safetensors::SafetensorsDir;

/// A checkpoint all of whose bytes are as they were saved.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    state: TrainerState,
    weights: SafetensorsDir,
    optimizer: SafetensorsDir,
}

/// A directory that is called like a checkpoint but cannot be resumed from.
#[derive(Debug)]
pub struct Skipped {
    /// The directory.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: IoError,
}

/// The newest checkpoint of an output directory, and what was passed over to find it.
#[derive(Debug)]
pub struct Newest {
    /// The newest that is whole, if there is any.
    pub checkpoint: Option<Checkpoint>,
    /// Newer ones that are not, newest first.
    pub skipped: Vec<Skipped>,
}

/// Finds the newest checkpoint of `output_dir` that is whole. Reads all of its bytes, and perhaps those of newer ones.
///
/// # Errors
/// `Read` where `output_dir` itself cannot be read; without such a directory there is no checkpoint.
pub fn newest_valid(output_dir: &Path) -> Result<Newest, IoError> {
    let mut skipped = Vec::new();
    for (step, path) in list(output_dir)? {
        match open_step(&path, step) {
            Ok(checkpoint) => return Ok(Newest { checkpoint: Some(checkpoint), skipped }),
            Err(reason) => skipped.push(Skipped { path, reason }),
        }
    }
    Ok(Newest { checkpoint: None, skipped })
}

/// Opens the checkpoint in the directory `path`, of whatever name, and compares every byte with its manifest.
///
/// # Errors
/// `Missing`, `Read`; `BadFile`, `BadLine`, `BadTensor` where it is not whole.
pub fn open(path: &Path) -> Result<Checkpoint, IoError> {
    let metadata = fs::metadata(path).map_err(|e| IoError::reading(path, e))?;
    if !metadata.is_dir() {
        return Err(IoError::bad_file(path, "is not a directory", DAMAGED));
    }
    let manifest = Manifest::read(path)?;
    let manifest_path = path.join(MANIFEST);
    for name in ["config.json", WEIGHTS, OPTIMIZER, STATE] {
        if !manifest.files.iter().any(|file| file.name == name) {
            let reason = format!("does not list {name}");
            return Err(IoError::bad_file(&manifest_path, reason, DAMAGED));
        }
    }
    manifest.verify(path)?;
    let state = TrainerState::read(&path.join(STATE))?;
    if state.step != manifest.step {
        let reason = format!("is of step {}, but {STATE} of step {}", manifest.step, state.step);
        return Err(IoError::bad_file(&manifest_path, reason, DAMAGED));
    }
    Ok(Checkpoint {
        path: path.into(),
        state,
        weights: SafetensorsDir::open(&path.join(WEIGHTS))?,
        optimizer: SafetensorsDir::open(&path.join(OPTIMIZER))?,
    })
}

/// Opens a checkpoint whose name says that it is of `step`.
pub(super) fn open_step(path: &Path, step: u64) -> Result<Checkpoint, IoError> {
    // A link may lead anywhere, and rotation would not remove what it leads to.
    let metadata = fs::symlink_metadata(path).map_err(|e| IoError::reading(path, e))?;
    if !metadata.is_dir() {
        return Err(IoError::bad_file(path, "is not a directory", DAMAGED));
    }
    let checkpoint = open(path)?;
    if checkpoint.state.step != step {
        let reason = format!("holds step {}", checkpoint.state.step);
        return Err(IoError::bad_file(path, reason, "give it the name of its step"));
    }
    Ok(checkpoint)
}

impl Checkpoint {
    /// Its directory, which is a model directory as well.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the run stands.
    pub fn state(&self) -> &TrainerState {
        &self.state
    }

    /// The parameters.
    pub fn weights(&self) -> &SafetensorsDir {
        &self.weights
    }

    /// The optimizer's states, by the names of [`state_name`].
    pub fn optimizer(&self) -> &SafetensorsDir {
        &self.optimizer
    }

    /// Reads a parameter into its place.
    ///
    /// # Errors
    /// `BadTensor` where it is missing or of another length, `Read`.
    pub fn read_weight(&self, param: &str, dst: &mut [f32]) -> Result<(), IoError> {
        self.weights.read_f32(param, dst)
    }

    /// Reads one state of a parameter into its place.
    ///
    /// # Errors
    /// As [`Self::read_weight`].
    pub fn read_state(&self, state: &str, param: &str, dst: &mut [f32]) -> Result<(), IoError> {
        self.optimizer.read_f32(&state_name(state, param), dst)
    }

    /// Reads one state of a parameter that is 16-bit integers.
    ///
    /// # Errors
    /// `BadTensor` where it is missing, of another type or length; `Read`.
    pub fn read_state_i16(&self, state: &str, param: &str, dst: &mut [i16]) -> Result<(), IoError> {
        self.optimizer.read_i16(&state_name(state, param), dst)
    }
}
