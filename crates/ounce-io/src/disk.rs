//! The few requests through which everything is written, so that a test can let any one of them fail.
//!
//! Idea: writers never call the operating system themselves but a [`Disk`]; its default methods are the real thing.
//! [`crate::testing::FaultyDisk`] puts faults and crashes before them. Reading stays outside: damage to what is read
//! needs no seam, it can be put into the files.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::IoError;

/// A place to write to. Every method is one request and may fail on its own.
pub trait Disk: fmt::Debug + Send + Sync {
    /// Makes a file that must not be there yet.
    fn create(&self, path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).create_new(true).open(path)
    }

    /// Writes a beginning of `bytes` at `offset_bytes`; returns its length.
    fn write_at(&self, file: &File, bytes: &[u8], offset_bytes: u64) -> io::Result<usize> {
        file.write_at(bytes, offset_bytes)
    }

    /// Waits until what the file holds would survive a power cut.
    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    /// The same for the names in a directory. File systems that cannot do that have nothing to wait for.
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        match File::open(dir)?.sync_all() {
            Err(e) if cannot(&e) => Ok(()),
            other => other,
        }
    }

    /// Makes a directory in an existing one.
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    /// Gives a file or directory another name, at once; replaces a file of that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    /// Lets two names change places, at once. Not every file system can.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        use rustix::fs::{CWD, RenameFlags, renameat_with};
        Ok(renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)?)
    }

    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    /// Removes a directory and all that is in it.
    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir_all(path)
    }

    /// Bytes that may still be written to the file system of `path`.
    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(path)?;
        // A file system in memory without a limit says that it has no blocks at all.
        let is_unlimited = stat.f_blocks == 0;
        Ok(if is_unlimited { u64::MAX } else { stat.f_bavail.saturating_mul(stat.f_frsize) })
    }
}

/// The disk of this machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RealDisk;

impl Disk for RealDisk {}

/// The disk of this machine, to be shared.
pub fn real_disk() -> Arc<dyn Disk> {
    Arc::new(RealDisk)
}

/// Whether a request failed because the file system has nothing of the kind.
pub(crate) fn cannot(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
}

/// Refuses to begin with `path` where the file system of `dir` has less than `needed_bytes` free.
///
/// # Errors
/// `Save` with both numbers.
pub fn check_room(
    disk: &dyn Disk,
    dir: &Path,
    path: &Path,
    needed_bytes: u64,
) -> Result<(), IoError> {
    let failed = |source| IoError::Save { path: path.into(), needed_bytes, source };
    let free_bytes = disk.free_bytes(dir).map_err(failed)?;
    if free_bytes >= needed_bytes {
        return Ok(());
    }
    let what = format!("the disk has {free_bytes} bytes free");
    Err(failed(io::Error::new(io::ErrorKind::StorageFull, what)))
}

/// Writes all of `bytes`, in as many requests as it takes.
pub(crate) fn write_all_at(
    disk: &dyn Disk,
    file: &File,
    mut bytes: &[u8],
    mut offset_bytes: u64,
) -> io::Result<()> {
    while !bytes.is_empty() {
        match disk.write_at(file, bytes, offset_bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                bytes = &bytes[n..];
                offset_bytes += n as u64;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Makes a directory with all that lead to it, so that a power cut does not take them away again.
pub(crate) fn create_dirs(disk: &dyn Disk, dir: &Path) -> Result<(), IoError> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = parent_of(dir);
    create_dirs(disk, &parent)?;
    match disk.create_dir(dir) {
        // Another process was faster.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        other => other.and_then(|()| disk.sync_dir(&parent)),
    }
    .map_err(|e| IoError::writing(dir, 0, e))
}

/// The directory that a path lies in, never empty.
pub(crate) fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(dir) if dir != Path::new("") => dir.into(),
        _ if path.has_root() => "/".into(),
        _ => ".".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_directories_change_places() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        for (path, text) in [(&a, "in a"), (&b, "in b")] {
            fs::create_dir(path).unwrap();
            fs::write(path.join("x"), text).unwrap();
        }
        RealDisk.exchange(&a, &b).unwrap();
        assert_eq!(fs::read(a.join("x")).unwrap(), b"in b");
        assert_eq!(fs::read(b.join("x")).unwrap(), b"in a");
    }

    #[test]
    fn a_file_system_says_how_much_room_it_has() {
        let dir = tempfile::tempdir().unwrap();
        assert!(RealDisk.free_bytes(dir.path()).unwrap() > 0);
        assert!(RealDisk.free_bytes(&dir.path().join("nowhere")).is_err());
    }

    #[test]
    fn directories_are_made_down_to_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a/b/c");
        create_dirs(&RealDisk, &deep).unwrap();
        create_dirs(&RealDisk, &deep).unwrap();
        assert!(deep.is_dir());
        fs::write(dir.path().join("file"), "").unwrap();
        assert!(create_dirs(&RealDisk, &dir.path().join("file/x")).is_err());
    }
}
