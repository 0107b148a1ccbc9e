//! Temporary files and directories: hidden names that say whose they are, locked while their writer lives.
//!
//! Idea: a temporary is called `.NAME.PID-COUNTER.tmp` and lies in the directory of the thing in the making, so that a
//! rename moves it into place. Its writer holds a lock on it. What a killed writer left behind has no lock any more,
//! and the next writer of the same thing removes it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::{Disk, cannot, parent_of};

/// A name in `dir` that no other temporary of this process has.
pub(crate) fn temp_path(dir: &Path, name: &str) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    dir.join(format!(".{name}.{}-{n}.tmp", std::process::id()))
}

/// The `NAME` of a temporary called `.NAME.PID-COUNTER.tmp`.
fn name_of_temp(file_name: &str) -> Option<&str> {
    let (name, tail) = file_name.strip_prefix('.')?.strip_suffix(".tmp")?.rsplit_once('.')?;
    let (pid, n) = tail.split_once('-')?;
    (pid.parse::<u32>().is_ok() && n.parse::<u64>().is_ok()).then_some(name)
}

/// Makes and locks a new temporary in `dir`.
pub(crate) fn create_locked(
    dir: &Path,
    name: &str,
    create: impl Fn(&Path) -> io::Result<File>,
) -> io::Result<(File, PathBuf)> {
    loop {
        let path = temp_path(dir, name);
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

/// Removes the temporaries in `dir` whose names are wanted and whose writers are gone. Failures are left for a later
/// run.
pub(crate) fn remove_stale_temps(disk: &dyn Disk, dir: &Path, wanted: impl Fn(&str) -> bool) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let file_name = entry.file_name();
        let name = file_name.to_str().and_then(name_of_temp);
        let Ok(kind) = entry.file_type() else { continue };
        if !name.is_some_and(&wanted) || kind.is_symlink() {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else { continue };
        if file.try_lock().is_ok() {
            let _ = if kind.is_dir() {
                disk.remove_dir_all(&entry.path())
            } else {
                disk.remove_file(&entry.path())
            };
        }
    }
}

/// A directory in the making. Dropped, it is removed, unless it was moved to where it belongs.
#[derive(Debug)]
pub(crate) struct TempDir {
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) path: PathBuf,
    /// Whether to leave the directory alone when this is dropped.
    pub(crate) stays: bool,
    // Held, not read: the lock says that the writer lives.
    _lock: File,
}

impl TempDir {
    /// Makes an empty directory for `name` in `dir`.
    pub(crate) fn create(disk: Arc<dyn Disk>, dir: &Path, name: &str) -> io::Result<Self> {
        let (lock, path) = create_locked(dir, name, |temp| {
            disk.create_dir(temp)?;
            File::open(temp)
        })?;
        Ok(Self { disk, path, stays: false, _lock: lock })
    }

    /// Moves the directory to `target`, of the same parent, in the place of what is there, which is removed. `name`
    /// is that of the temporary.
    pub(crate) fn replace(&mut self, target: &Path, name: &str) -> io::Result<()> {
        if fs::symlink_metadata(target).is_err() {
            self.disk.rename(&self.path, target)?;
            self.stays = true;
            return Ok(());
        }
        match self.disk.exchange(&self.path, target) {
            Err(e) if cannot(&e) => {
                let aside = temp_path(&parent_of(target), name);
                self.disk.rename(target, &aside)?;
                self.disk.rename(&self.path, target)?;
                self.path = aside;
                Ok(())
            }
            other => other,
        }
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if !self.stays {
            // Nothing better can be done about a failure here: the error that led here is the one to report.
            let _ = self.disk.remove_dir_all(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_temporary_tells_what_it_is_for() {
        let path = temp_path(Path::new("out"), "checkpoint-12");
        let file_name = path.file_name().unwrap().to_str().unwrap();
        assert_eq!(name_of_temp(file_name), Some("checkpoint-12"));
        for other in [".a.notes.tmp", "a.1-1.tmp", ".a.1-1.tm", ".1-1.tmp", ".a.1-.tmp", ".tmp"] {
            assert_eq!(name_of_temp(other), None, "{other}");
        }
    }
}
