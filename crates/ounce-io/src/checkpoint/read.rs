//! Finding and opening checkpoints.
//!
//! Which checkpoint is the newest, their names and their states say: of the last course that was taken, the one of the
//! most steps. A run that starts afresh beside the checkpoints of another, or goes on from one that is not the newest,
//! takes a new course. No checkpoint counts before every byte agrees with its manifest; what does not count is skipped
//! with the reason, for the user to read.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};

use super::manifest::{DAMAGED, Manifest, OTHER_VERSION};
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

impl Skipped {
    /// Whether it may be whole all the same: the disk failed, or a newer program saved it.
    pub fn may_be_whole(&self) -> bool {
        match &self.reason {
            IoError::Read { .. } => true,
            IoError::BadFile { hint, .. } => hint == OTHER_VERSION,
            _ => false,
        }
    }
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
    let mut all = list(output_dir)?;
    // One that cannot be read may be of any course: it is looked at, and told of.
    all.sort_by_cached_key(|(_, path)| Reverse(course_of(path).unwrap_or(u64::MAX)));
    for (step, path) in all {
        match open_step(&path, step) {
            Ok(checkpoint) => return Ok(Newest { checkpoint: Some(checkpoint), skipped }),
            Err(reason) => skipped.push(Skipped { path, reason }),
        }
    }
    Ok(Newest { checkpoint: None, skipped })
}

/// The course of a run that writes checkpoints to `output_dir` and goes on from one, if from any: the same where none
/// there is newer, else a new one.
///
/// # Errors
/// `Read` where `output_dir` itself cannot be read.
pub fn course(output_dir: &Path, from: Option<&Checkpoint>) -> Result<u64, IoError> {
    let places = list(output_dir)?.into_iter();
    let places = places.filter_map(|(step, path)| Some((course_of(&path)?, step)));
    let from = from.map(|checkpoint| (checkpoint.state.course, checkpoint.state.step));
    Ok(match (places.max(), from) {
        (Some(newest), Some(from)) if from >= newest => from.0,
        (Some((course, _)), _) => course.saturating_add(1),
        (None, from) => from.map_or(0, |(course, _)| course),
    })
}

/// The course of a checkpoint whose state can be read.
fn course_of(path: &Path) -> Option<u64> {
    TrainerState::read(&path.join(STATE)).ok().map(|state| state.course)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::checkpoint_path;
    use crate::disk::real_disk;
    use crate::hash::hash_file;
    use crate::testing::SmallRun;

    /// Steps of another course count as older, however many they are.
    #[test]
    fn the_newest_is_of_the_last_course() {
        let (model, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (run, out) = (SmallRun::new(model.path()).unwrap(), out.path());
        let save = |step: u64, course: u64| {
            let path = run.save(real_disk(), out, step).unwrap();
            let (state, manifest) = (path.join(STATE), path.join(MANIFEST));
            let hash = || format!("{:016x}", hash_file(&state).unwrap().1);
            let before = hash();
            let text = fs::read_to_string(&state).unwrap();
            let text = text.replace("\"course\": 0", &format!("\"course\": {course}"));
            fs::write(&state, text).unwrap();
            let listed = fs::read_to_string(&manifest).unwrap();
            fs::write(&manifest, listed.replace(&before, &hash())).unwrap();
        };
        let newest = || newest_valid(out).unwrap().checkpoint.unwrap();
        assert_eq!(course(out, None).unwrap(), 0);
        save(2, 0);
        save(9, 0);
        assert_eq!(newest().state().step, 9);
        let nine = newest();
        assert_eq!(course(out, Some(&nine)).unwrap(), 0, "it goes on with the newest");
        let two = open(&checkpoint_path(out, 2)).unwrap();
        assert_eq!(course(out, Some(&two)).unwrap(), 1, "it goes back");
        assert_eq!(course(out, None).unwrap(), 1, "it starts afresh");
        save(4, 1);
        save(3, 1);
        assert_eq!(newest().state().step, 4);
        assert_eq!(course(out, Some(&newest())).unwrap(), 1);
        assert_eq!(course(out, Some(&nine)).unwrap(), 2);
    }
}
