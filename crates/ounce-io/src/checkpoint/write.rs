//! Saving a checkpoint.
//!
//! Order: room is checked; the temporary is made; side files, weights and optimizer stream in, each with its checksum
//! computed on the way and flushed when it ends; state and manifest follow; the directory is flushed; the rename
//! publishes it; the parent is flushed. A checkpoint of the same step that is there already changes places with the
//! new one and is then removed.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::manifest::{FileRecord, Manifest};
use super::{FORMAT, MANIFEST, OPTIMIZER, STATE, TrainerState, WEIGHTS, checkpoint_path, dir_name};
use crate::disk::{Disk, check_room, create_dirs, real_disk, write_all_at};
use crate::error::IoError;
use crate::hash::Xxh64;
use crate::json::open_regular;
use crate::model_files::{is_plain_name, side_files, stay_inside};
use crate::safetensors::{ByteSink, SafetensorsWriter, TensorSpec, safetensors_bytes};
use crate::temp::{TempDir, remove_stale_temps};

/// Bytes of the buffer through which side files are copied.
const COPY_BYTES: usize = 16 << 10;
/// Disks give out room in units of this.
const BLOCK_BYTES: u64 = 4096;
/// Room for state, manifest and directory.
const EXTRA_BYTES: u64 = 64 << 10;

/// Bytes of disk that a checkpoint takes: weights, optimizer and the side files in `model_dir`, rounded up.
///
/// # Errors
/// `Usage` for tensors that make no file, `Read`.
pub fn checkpoint_bytes(
    weights: &[TensorSpec],
    optimizer: &[TensorSpec],
    model_dir: &Path,
) -> Result<u64, IoError> {
    let mut files = vec![safetensors_bytes(weights)?, safetensors_bytes(optimizer)?];
    for name in side_files(model_dir) {
        let path = model_dir.join(name);
        let metadata = std::fs::metadata(&path).map_err(|e| IoError::reading(&path, e))?;
        files.push(metadata.len());
    }
    Ok(files.iter().map(|bytes| bytes.next_multiple_of(BLOCK_BYTES)).sum::<u64>() + EXTRA_BYTES)
}

/// A checkpoint in the making. Dropped before `publish`, it leaves nothing behind.
#[derive(Debug)]
pub struct CheckpointWriter {
    temp: TempDir,
    output_dir: PathBuf,
    step: u64,
    needed_bytes: u64,
    files: Vec<FileRecord>,
}

impl CheckpointWriter {
    /// Begins the checkpoint after `step` steps, in `output_dir`, which is made if it is not there. `needed_bytes`
    /// is what [`checkpoint_bytes`] says. Removes what killed writers left behind.
    ///
    /// # Errors
    /// `Save` where the disk has not that much room or cannot be written; `Write`, `Usage` for the output directory.
    pub fn begin(output_dir: &Path, step: u64, needed_bytes: u64) -> Result<Self, IoError> {
        Self::begin_on(real_disk(), output_dir, step, needed_bytes)
    }

    /// The same on a disk of the caller's choice.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_on(
        disk: Arc<dyn Disk>,
        output_dir: &Path,
        step: u64,
        needed_bytes: u64,
    ) -> Result<Self, IoError> {
        let path = checkpoint_path(output_dir, step);
        let failed = |source| IoError::Save { path: path.clone(), needed_bytes, source };
        create_dirs(&*disk, output_dir).map_err(|e| in_save(e, &path, needed_bytes))?;
        remove_stale_temps(&*disk, output_dir, |name| super::step_of(name).is_some());
        check_room(&*disk, output_dir, &path, needed_bytes)?;
        let temp = TempDir::create(disk, output_dir, &dir_name(step)).map_err(failed)?;
        Ok(Self { temp, output_dir: output_dir.into(), step, needed_bytes, files: Vec::new() })
    }

    /// Copies configuration and tokenizer from a model directory, byte for byte.
    ///
    /// # Errors
    /// `Missing` without a `config.json`, `Read`, `Save`.
    pub fn copy_side_files(&mut self, model_dir: &Path) -> Result<(), IoError> {
        open_regular(&model_dir.join("config.json"))?;
        for name in side_files(model_dir) {
            let path = model_dir.join(name);
            stay_inside(model_dir, &path)?;
            self.copy_file(&path, name)?;
        }
        Ok(())
    }

    /// Copies a file byte for byte, under a name of its own.
    ///
    /// # Errors
    /// `Read`, `Save`.
    ///
    /// # Panics
    /// As [`Self::write_file`].
    pub fn copy_file(&mut self, path: &Path, name: &str) -> Result<(), IoError> {
        let mut source = open_regular(path)?;
        let mut file = self.file(name)?;
        let mut buffer = [0; COPY_BYTES];
        loop {
            let n = source.read(&mut buffer).map_err(|e| IoError::reading(path, e))?;
            if n == 0 {
                return file.finish();
            }
            file.write_all(&buffer[..n])?;
        }
    }

    /// Writes a small file, such as `run.yaml`.
    ///
    /// # Errors
    /// `Save`.
    ///
    /// # Panics
    /// If `name` is no plain file name or was written before.
    pub fn write_file(&mut self, name: &str, bytes: &[u8]) -> Result<(), IoError> {
        let mut file = self.file(name)?;
        file.write_all(bytes)?;
        file.finish()
    }

    /// Begins the weights; to be written in the order of `specs`, and finished.
    ///
    /// # Errors
    /// `Usage` for names that make no file, `Save`.
    pub fn weights(
        &mut self,
        specs: &[TensorSpec],
    ) -> Result<SafetensorsWriter<CheckpointFile<'_>>, IoError> {
        let path = self.final_path().join(WEIGHTS);
        SafetensorsWriter::begin(self.file(WEIGHTS)?, &path, specs, &[])
    }

    /// Begins the optimizer's states, named by [`super::state_name`]; to be written in the order of `specs`, and
    /// finished.
    ///
    /// # Errors
    /// As [`Self::weights`].
    pub fn optimizer(
        &mut self,
        specs: &[TensorSpec],
    ) -> Result<SafetensorsWriter<CheckpointFile<'_>>, IoError> {
        let path = self.final_path().join(OPTIMIZER);
        SafetensorsWriter::begin(self.file(OPTIMIZER)?, &path, specs, &[])
    }

    /// Writes state and manifest, flushes everything and gives the checkpoint its name; returns its path.
    ///
    /// # Errors
    /// `Usage` for a state that could not be read back, `Save`. After a failure of the very last request, to flush
    /// the output directory, the checkpoint is there and whole, but a power cut may take it away.
    ///
    /// # Panics
    /// If weights or optimizer are missing, or the state is of another step.
    pub fn publish(mut self, state: &TrainerState) -> Result<PathBuf, IoError> {
        assert_eq!(state.step, self.step, "the state belongs to the checkpoint's step");
        for name in [WEIGHTS, OPTIMIZER] {
            assert!(self.files.iter().any(|f| f.name == name), "{name} is written before publish");
        }
        let text = state.to_json(&self.final_path().join(STATE))?;
        self.write_file(STATE, text.as_bytes())?;
        let manifest =
            Manifest { format: FORMAT, step: self.step, files: std::mem::take(&mut self.files) };
        self.write_file(MANIFEST, manifest.to_json().as_bytes())?;
        let path = self.final_path();
        let disk = Arc::clone(&self.temp.disk);
        disk.sync_dir(&self.temp.path)
            .and_then(|()| self.temp.replace(&path, &dir_name(self.step)))
            .and_then(|()| disk.sync_dir(&self.output_dir))
            .map_err(|e| self.failed(path.clone(), e))?;
        Ok(path)
    }

    fn final_path(&self) -> PathBuf {
        checkpoint_path(&self.output_dir, self.step)
    }

    fn failed(&self, path: PathBuf, source: io::Error) -> IoError {
        IoError::Save { path, needed_bytes: self.needed_bytes, source }
    }

    /// Begins a file.
    fn file(&mut self, name: &str) -> Result<CheckpointFile<'_>, IoError> {
        assert!(is_plain_name(name), "`{name}` is not a plain file name");
        assert!(self.files.iter().all(|file| file.name != name), "{name} is written once");
        let file = self.temp.disk.create(&self.temp.path.join(name));
        let file = file.map_err(|e| self.failed(self.final_path().join(name), e))?;
        Ok(CheckpointFile {
            writer: self,
            file,
            name: name.to_owned(),
            n_bytes: 0,
            hash: Xxh64::new(),
        })
    }
}

/// A file of a checkpoint in the making, whose checksum grows with it.
#[derive(Debug)]
pub struct CheckpointFile<'a> {
    writer: &'a mut CheckpointWriter,
    file: File,
    name: String,
    n_bytes: u64,
    hash: Xxh64,
}

impl CheckpointFile<'_> {
    fn failed(&self, source: io::Error) -> IoError {
        self.writer.failed(self.writer.final_path().join(&self.name), source)
    }
}

impl ByteSink for CheckpointFile<'_> {
    fn write_all(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        let written = write_all_at(&*self.writer.temp.disk, &self.file, bytes, self.n_bytes);
        written.map_err(|e| self.failed(e))?;
        self.hash.update(bytes);
        self.n_bytes += bytes.len() as u64;
        Ok(())
    }

    fn finish(self) -> Result<(), IoError> {
        self.writer.temp.disk.sync(&self.file).map_err(|e| self.failed(e))?;
        let record = FileRecord::new(&self.name, self.n_bytes, self.hash.digest());
        self.writer.files.push(record);
        Ok(())
    }
}

/// An error of writing the output directory, as one of saving.
fn in_save(error: IoError, path: &Path, needed_bytes: u64) -> IoError {
    match error {
        IoError::Write { source, .. } => IoError::Save { path: path.into(), needed_bytes, source },
        other => other,
    }
}
