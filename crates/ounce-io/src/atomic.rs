//! Files that are either the old ones or the new ones, never half of one.
//!
//! Idea: write under a temporary name on the same file system, flush it to the disk, then rename; a rename is atomic.
//! Invariants:
//! * a reader of the final path sees the old bytes or all of the new bytes, at every moment, also after a power cut
//!   (file and directory are both flushed before and after the rename);
//! * every failure before the rename leaves what was there untouched and removes the temporary.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::disk::{Disk, parent_of, real_disk, write_all_at};
use crate::error::IoError;
use crate::temp::{create_locked, remove_stale_temps};

/// A file that appears under its name only when it is complete. Dropped before `finish`, it leaves nothing behind.
#[derive(Debug)]
pub struct AtomicFile {
    disk: Arc<dyn Disk>,
    file: File,
    temp_path: PathBuf,
    final_path: PathBuf,
    n_written_bytes: u64,
    finished: bool,
}

impl AtomicFile {
    /// Opens a temporary beside `path`, whose directory must exist.
    ///
    /// # Errors
    /// `Write`; `Usage` where `path` names no file.
    pub fn create(path: &Path) -> Result<Self, IoError> {
        Self::create_on(real_disk(), path)
    }

    /// The same on a disk of the caller's choice.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_on(disk: Arc<dyn Disk>, path: &Path) -> Result<Self, IoError> {
        let (dir, name) = split(path)?;
        remove_stale_temps(&*disk, &dir, |stale| stale == name);
        let (file, temp_path) = create_locked(&dir, &name, |temp| disk.create(temp))
            .map_err(|e| IoError::writing(path, 0, e))?;
        let final_path = path.into();
        Ok(Self { disk, file, temp_path, final_path, n_written_bytes: 0, finished: false })
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// `Write`, with the length that the file was to reach.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        let n_bytes = self.n_written_bytes + bytes.len() as u64;
        write_all_at(&*self.disk, &self.file, bytes, self.n_written_bytes)
            .map_err(|e| IoError::writing(&self.final_path, n_bytes, e))?;
        self.n_written_bytes = n_bytes;
        Ok(())
    }

    /// Overwrites bytes that were appended before, at `offset_bytes`.
    ///
    /// # Errors
    /// `Write`.
    pub fn write_all_at(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), IoError> {
        assert!(
            offset_bytes + bytes.len() as u64 <= self.n_written_bytes,
            "only bytes already appended are overwritten"
        );
        write_all_at(&*self.disk, &self.file, bytes, offset_bytes)
            .map_err(|e| IoError::writing(&self.final_path, self.n_written_bytes, e))
    }

    /// Bytes appended so far.
    pub fn n_written_bytes(&self) -> u64 {
        self.n_written_bytes
    }

    /// Flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// `Write`; before the rename, the old file, if any, is then still there.
    pub fn finish(mut self) -> Result<(), IoError> {
        let failed = |e| IoError::writing(&self.final_path, self.n_written_bytes, e);
        self.disk
            .sync(&self.file)
            .and_then(|()| self.disk.rename(&self.temp_path, &self.final_path))
            .map_err(failed)?;
        self.finished = true;
        self.disk.sync_dir(&parent_of(&self.final_path)).map_err(failed)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing better can be done about a failure here: the error that led here is the one to report.
            let _ = self.disk.remove_file(&self.temp_path);
        }
    }
}

/// Writes a small file atomically.
///
/// # Errors
/// `Write`; the old file, if any, is then still there.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<(), IoError> {
    let mut file = AtomicFile::create(path)?;
    file.write_all(bytes)?;
    file.finish()
}

/// Directory (never empty) and final name of a path.
pub(crate) fn split(path: &Path) -> Result<(PathBuf, String), IoError> {
    let name = path.file_name().and_then(OsStr::to_str).ok_or_else(|| IoError::Usage {
        what: format!("`{}` does not name a file or directory that can be written", path.display()),
        hint: "give a path that ends in a name".into(),
    })?;
    Ok((parent_of(path), name.to_owned()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn an_unfinished_file_leaves_the_old_one_and_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_file(&path, b"old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"new, half").unwrap();
        assert_eq!(names(dir.path()).len(), 2);
        drop(file);
        assert_eq!(names(dir.path()), ["a.json"]);
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn temporaries_of_dead_writers_are_removed_and_those_of_living_ones_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let living = AtomicFile::create(&path).unwrap();
        fs::write(dir.path().join(".a.999999-0.tmp"), "left by a killed writer").unwrap();
        fs::write(dir.path().join(".a.notes.tmp"), "not ours").unwrap();
        write_file(&path, b"new").unwrap();
        let left = names(dir.path());
        assert_eq!(left.len(), 3, "{left:?}");
        assert!(!left.contains(&".a.999999-0.tmp".to_owned()));
        living.finish().unwrap();
        assert_eq!(names(dir.path()), [".a.notes.tmp", "a"]);
    }
}
