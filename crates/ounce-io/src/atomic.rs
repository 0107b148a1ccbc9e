//! Files that are either the old ones or the new ones, never half of one.
//!
//! Idea: write under a temporary name on the same file system, flush it to the disk, then rename; a rename is atomic.
//! Invariants:
//! * a reader of the final path sees the old bytes or all of the new bytes, at every moment, also after a power cut
//!   (file and directory are both flushed before and after the rename);
//! * every failure before the rename leaves what was there untouched and removes the temporary;
//! * a temporary is locked while its writer lives, so the next writer can remove what a killed one left behind.
//!
//! A directory that does not exist yet is published by one rename of a whole staging directory. Into an existing one
//! the files go one by one, weights last; hard links to the old files undo a failure midway. Only a crash between two
//! renames can then leave new side files beside the old weights.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::IoError;

/// A file that appears under its name only when it is complete. Dropped before `finish`, it leaves nothing behind.
#[derive(Debug)]
pub struct AtomicFile {
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
        let (dir, name) = split(path)?;
        remove_stale_temps(&dir, &name);
        let (file, temp_path) = create_locked(&dir, &name, |temp| {
            OpenOptions::new().read(true).write(true).create_new(true).open(temp)
        })
        .map_err(|e| IoError::writing(path, 0, e))?;
        Ok(Self { file, temp_path, final_path: path.into(), n_written_bytes: 0, finished: false })
    }

    /// Appends `bytes`.
    ///
    /// # Errors
    /// `Write`, with the length that the file was to reach.
    pub fn write_all(&mut self, bytes: &[u8]) -> Result<(), IoError> {
        let n_bytes = self.n_written_bytes + bytes.len() as u64;
        self.file.write_all(bytes).map_err(|e| IoError::writing(&self.final_path, n_bytes, e))?;
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
        self.file
            .write_all_at(bytes, offset_bytes)
            .map_err(|e| IoError::writing(&self.final_path, self.n_written_bytes, e))
    }

    /// Bytes appended so far.
    pub fn n_written_bytes(&self) -> u64 {
        self.n_written_bytes
    }

    /// Flushes the file to the disk and gives it its name.
    ///
    /// # Errors
    /// `Write`; the old file, if any, is then still there.
    pub fn finish(mut self) -> Result<(), IoError> {
        let (dir, _) = split(&self.final_path)?;
        self.file
            .sync_all()
            .and_then(|()| fs::rename(&self.temp_path, &self.final_path))
            .map_err(|e| IoError::writing(&self.final_path, self.n_written_bytes, e))?;
        self.finished = true;
        sync_dir(&dir)
    }
}

impl Drop for AtomicFile {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing better can be done about a failure here: the error that led here is the one to report.
            let _ = fs::remove_file(&self.temp_path);
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

/// A directory in the making: fill `path()`, then `publish()`. Dropped before that, it leaves nothing behind.
#[derive(Debug)]
pub struct StagingDir {
    path: PathBuf,
    final_dir: PathBuf,
    // Held, not read: the lock says that the writer lives.
    _lock: File,
    published: bool,
}

impl StagingDir {
    /// Makes an empty directory on the file system of `final_dir`, inside it where it exists, beside it otherwise.
    ///
    /// # Errors
    /// `Usage` where `final_dir` is a file, `Write` otherwise.
    pub fn create(final_dir: &Path) -> Result<Self, IoError> {
        let (dir, name) = match fs::metadata(final_dir) {
            Ok(metadata) if metadata.is_dir() => (final_dir.to_path_buf(), "staging".to_owned()),
            Ok(_) => {
                return Err(IoError::Usage {
                    what: format!("{} is a file, not a directory", final_dir.display()),
                    hint: "choose another output directory".into(),
                });
            }
            Err(_) => split(final_dir)?,
        };
        let failed = |e| IoError::writing(final_dir, 0, e);
        fs::create_dir_all(&dir).map_err(failed)?;
        remove_stale_temps(&dir, &name);
        let (lock, path) = create_locked(&dir, &name, |temp| {
            fs::create_dir(temp)?;
            File::open(temp)
        })
        .map_err(failed)?;
        Ok(Self { path, final_dir: final_dir.into(), _lock: lock, published: false })
    }

    /// Where to write the files. Plain files only, no directories.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes the files and moves them to the final directory, replacing files of the same name and removing
    /// weight files of a former model that the new one does not have.
    ///
    /// # Errors
    /// `Write`; the final directory is then as it was.
    pub fn publish(mut self) -> Result<(), IoError> {
        let failed = |e| IoError::writing(&self.final_dir, 0, e);
        let names = self.sync_files().map_err(failed)?;
        sync_dir(&self.path)?;
        if self.final_dir.is_dir() {
            replace_files(&self.path, &self.final_dir, &names)?;
            sync_dir(&self.final_dir)?;
        } else {
            fs::rename(&self.path, &self.final_dir).map_err(failed)?;
            self.published = true;
            let (parent, _) = split(&self.final_dir)?;
            sync_dir(&parent)?;
        }
        Ok(())
    }

    /// Flushes every file; returns the names in the order of publishing: weights last.
    fn sync_files(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            assert!(entry.file_type()?.is_file(), "a staging directory holds plain files only");
            File::open(entry.path())?.sync_all()?;
            let name = entry.file_name().into_string();
            names.push(name.map_err(|_| io::Error::other("a file name is not UTF-8"))?);
        }
        names.sort_by_key(|name| (weight_rank(name), name.clone()));
        Ok(names)
    }
}

impl Drop for StagingDir {
    fn drop(&mut self) {
        if !self.published {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// 0 for side files, then shards, then what makes a loader look at them.
fn weight_rank(name: &str) -> u8 {
    match name {
        "model.safetensors" | "model.safetensors.index.json" => 2,
        _ if name.ends_with(".safetensors") => 1,
        _ => 0,
    }
}

/// Renames `names` from `staging` into the existing directory `target`, and undoes it all if one fails.
fn replace_files(staging: &Path, target: &Path, names: &[String]) -> Result<(), IoError> {
    let backup_path = |name: &str| staging.join(format!(".old-{name}"));
    let mut n_done = 0;
    let mut failure = None;
    for name in names {
        let old = target.join(name);
        // The old file stays in place for readers; the link only keeps its bytes in case of a failure later on.
        let linked = if old.exists() { fs::hard_link(&old, backup_path(name)) } else { Ok(()) };
        if let Err(error) = linked.and_then(|()| fs::rename(staging.join(name), &old)) {
            failure = Some(IoError::writing(&old, 0, error));
            break;
        }
        n_done += 1;
    }
    let Some(failure) = failure else {
        return remove_superseded_weights(target, names);
    };
    for name in &names[..n_done] {
        let backup = backup_path(name);
        // Best effort: the failure that made this necessary is the one to report.
        let _ = if backup.exists() {
            fs::rename(&backup, target.join(name))
        } else {
            fs::remove_file(target.join(name))
        };
    }
    Err(failure)
}

/// Removes weight files in `target` that belong to a former model: a loader would prefer a stale `model.safetensors`
/// to the new shards.
fn remove_superseded_weights(target: &Path, names: &[String]) -> Result<(), IoError> {
    if !names.iter().any(|name| weight_rank(name) == 2) {
        return Ok(());
    }
    let failed = |e| IoError::writing(target, 0, e);
    for entry in fs::read_dir(target).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(name) = name.to_str() else { continue };
        let is_shard = name.starts_with("model-") && name.ends_with(".safetensors");
        if (is_shard || weight_rank(name) == 2) && !names.iter().any(|new| new == name) {
            fs::remove_file(target.join(name)).map_err(failed)?;
        }
    }
    Ok(())
}

/// Directory (never empty) and final name of a path.
fn split(path: &Path) -> Result<(PathBuf, String), IoError> {
    let name = path.file_name().and_then(OsStr::to_str).ok_or_else(|| IoError::Usage {
        what: format!("`{}` does not name a file or directory that can be written", path.display()),
        hint: "give a path that ends in a name".into(),
    })?;
    let dir = match path.parent() {
        Some(dir) if dir != Path::new("") => dir.to_path_buf(),
        _ => PathBuf::from("."),
    };
    Ok((dir, name.to_owned()))
}

/// Flushes a directory's entries. File systems that cannot do that have nothing to flush.
fn sync_dir(dir: &Path) -> Result<(), IoError> {
    match File::open(dir).and_then(|d| d.sync_all()) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {
            Err(IoError::writing(dir, 0, e))
        }
        _ => Ok(()),
    }
}

/// Makes and locks a new entry `.NAME.PID-COUNTER.tmp` of `dir`.
fn create_locked(
    dir: &Path,
    name: &str,
    create: impl Fn(&Path) -> io::Result<File>,
) -> io::Result<(File, PathBuf)> {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    loop {
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = dir.join(format!(".{name}.{}-{n}.tmp", std::process::id()));
        let file = match create(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            other => other?,
        };
        // Between creation and lock another writer may take the entry for a stale one and remove it: then try again.
        match file.try_lock() {
            Err(fs::TryLockError::WouldBlock) => {}
            // Without locks on this file system nothing is ever taken for stale.
            Err(fs::TryLockError::Error(_)) => return Ok((file, path)),
            Ok(()) if file.metadata()?.nlink() > 0 => return Ok((file, path)),
            Ok(()) => {}
        }
    }
}

/// Removes temporaries for `name` in `dir` whose writers are gone. Failures are left for a later run.
fn remove_stale_temps(dir: &Path, name: &str) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let prefix = format!(".{name}.");
    for entry in entries.flatten() {
        let entry_name = entry.file_name();
        let Some(rest) = entry_name.to_str().and_then(|n| n.strip_prefix(&prefix)) else {
            continue;
        };
        let is_ours = rest
            .strip_suffix(".tmp")
            .and_then(|r| r.split_once('-'))
            .is_some_and(|(pid, n)| pid.parse::<u32>().is_ok() && n.parse::<u64>().is_ok());
        let Ok(kind) = entry.file_type() else { continue };
        if !is_ours || kind.is_symlink() {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else { continue };
        if file.try_lock().is_ok() {
            let _ = if kind.is_dir() {
                fs::remove_dir_all(entry.path())
            } else {
                fs::remove_file(entry.path())
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(dir)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn fill(staging: &StagingDir, files: &[(&str, &str)]) {
        for (name, text) in files {
            fs::write(staging.path().join(name), text).unwrap();
        }
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

    #[test]
    fn a_new_directory_appears_at_once_and_complete() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("deep/out");
        let staging = StagingDir::create(&out).unwrap();
        fill(&staging, &[("config.json", "{}"), ("model.safetensors", "w")]);
        assert!(!out.exists());
        staging.publish().unwrap();
        assert_eq!(names(&out), ["config.json", "model.safetensors"]);
        assert_eq!(names(out.parent().unwrap()), ["out"]);
    }

    #[test]
    fn an_abandoned_staging_directory_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let staging = StagingDir::create(&dir.path().join("out")).unwrap();
        fill(&staging, &[("config.json", "{}")]);
        drop(staging);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn publishing_into_an_existing_directory_replaces_and_keeps_and_drops_stale_weights() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["config.json", "notes.txt", "model.safetensors", "adapter.safetensors"] {
            fs::write(dir.path().join(name), "old").unwrap();
        }
        let staging = StagingDir::create(dir.path()).unwrap();
        fill(
            &staging,
            &[
                ("config.json", "new"),
                ("model-00001-of-00001.safetensors", "new"),
                ("model.safetensors.index.json", "new"),
            ],
        );
        staging.publish().unwrap();
        assert_eq!(
            names(dir.path()),
            [
                "adapter.safetensors",
                "config.json",
                "model-00001-of-00001.safetensors",
                "model.safetensors.index.json",
                "notes.txt"
            ]
        );
        assert_eq!(fs::read(dir.path().join("config.json")).unwrap(), b"new");
    }

    #[test]
    fn a_failure_midway_puts_the_old_files_back() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "old").unwrap();
        // A directory where the weights should go: the rename onto it fails, after the side files went in.
        fs::create_dir(dir.path().join("model.safetensors")).unwrap();
        let staging = StagingDir::create(dir.path()).unwrap();
        fill(
            &staging,
            &[("config.json", "new"), ("extra.json", "new"), ("model.safetensors", "w")],
        );
        let error = staging.publish().unwrap_err();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
        assert_eq!(names(dir.path()), ["config.json", "model.safetensors"]);
        assert_eq!(fs::read(dir.path().join("config.json")).unwrap(), b"old");
    }

    #[test]
    fn a_file_in_the_way_of_a_directory_is_a_usage_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        fs::write(&path, "x").unwrap();
        assert_eq!(StagingDir::create(&path).unwrap_err().kind(), crate::ErrorKind::Usage);
    }
}
