//! A disk on which the n-th request goes wrong, or after which the power is cut.
//!
//! Idea: requests go to a real directory. Beside it the disk keeps what a power cut would leave of it: of a file what
//! was there when it was last synced, of a directory the names that were there when it was last synced. A crash
//! makes every later request fail, as if the process were gone; [`FaultyDisk::power_cut`] then rebuilds the directory.
//!
//! Model of a file system: renames are atomic, and the names of all directories are kept in one journal, as ext4, XFS
//! and Btrfs do it; the bytes of files that were not synced may be there, not be there, or be there in part.
//! What it does not model: a device that forgets what it said was synced.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::disk::{Disk, RealDisk};

/// What goes wrong at the chosen request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// The device fails once.
    Io,
    /// From this request on the disk is full; a write may still write its first half.
    Full,
    /// A write writes its first half only, once, which is no error.
    Short,
    /// The process ends; a write may still write its first half, and of a directory half of the files be removed.
    Crash,
}

/// What a power cut leaves of bytes and names that were not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    /// Nothing.
    Nothing,
    /// All of them.
    All,
    /// The names, and of the bytes some, by this seed.
    Torn(u64),
}

/// A directory tree whose disk goes wrong.
#[derive(Debug)]
pub struct FaultyDisk {
    root: PathBuf,
    fault: Fault,
    at: u64,
    state: Mutex<State>,
}

type Inode = u64;
type Names = BTreeMap<OsString, Inode>;

#[derive(Debug, Default)]
struct State {
    n_requests: u64,
    /// Every file and directory seen, open, so that no inode number is used twice.
    open: BTreeMap<Inode, File>,
    /// What is safe of each file.
    bytes: BTreeMap<Inode, Vec<u8>>,
    /// What is safe of each directory.
    names: BTreeMap<Inode, Names>,
}

/// What the disk does with one request.
enum Verdict {
    Obey,
    Half,
    Refuse(io::Error),
}

impl FaultyDisk {
    /// A disk whose request number `at` (from 1) meets `fault`. Everything under `root` is safe by now.
    ///
    /// # Errors
    /// Where `root` cannot be read.
    pub fn new(root: &Path, fault: Fault, at: u64) -> io::Result<Self> {
        let mut state = State::default();
        let mut dirs = vec![root.to_path_buf()];
        while let Some(dir) = dirs.pop() {
            state.note_names(&dir)?;
            for entry in fs::read_dir(&dir)? {
                let path = entry?.path();
                if path.is_dir() {
                    dirs.push(path);
                } else {
                    state.note_bytes(&File::open(path)?)?;
                }
            }
        }
        Ok(Self { root: root.into(), fault, at, state: Mutex::new(state) })
    }

    /// Requests so far.
    pub fn n_requests(&self) -> u64 {
        self.state().n_requests
    }

    /// Makes the directory what it would be after a power cut.
    ///
    /// # Errors
    /// Where it cannot be rebuilt.
    pub fn power_cut(&self, survival: Survival) -> io::Result<()> {
        let mut state = self.state();
        let root = fs::metadata(&self.root)?.ino();
        let mut left = Vec::new();
        state.collect(root, &self.root, survival, &mut left)?;
        for entry in fs::read_dir(&self.root)? {
            let path = entry?.path();
            if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
        }
        for (path, bytes) in left {
            match bytes {
                None => fs::create_dir(path)?,
                Some(bytes) => fs::write(path, bytes)?,
            }
        }
        Ok(())
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic of a test elsewhere leaves the counts as they are.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request and decides about it.
    fn verdict(&self, takes_room: bool) -> Verdict {
        let mut state = self.state();
        state.n_requests += 1;
        let full = || Verdict::Refuse(io::Error::from_raw_os_error(28));
        let gone = || Verdict::Refuse(io::Error::other("the process is gone"));
        match (self.fault, state.n_requests.cmp(&self.at)) {
            (Fault::None, _) | (_, std::cmp::Ordering::Less) => Verdict::Obey,
            (Fault::Io, std::cmp::Ordering::Equal) => {
                Verdict::Refuse(io::Error::from_raw_os_error(5))
            }
            (Fault::Short | Fault::Full | Fault::Crash, std::cmp::Ordering::Equal) => Verdict::Half,
            (Fault::Full, _) if takes_room => full(),
            (Fault::Crash, _) => gone(),
            _ => Verdict::Obey,
        }
    }

    /// Decides about a request that is done as a whole or not at all.
    fn gate(&self, takes_room: bool) -> io::Result<()> {
        match self.verdict(takes_room) {
            Verdict::Obey => Ok(()),
            Verdict::Refuse(error) => Err(error),
            Verdict::Half => match self.fault {
                Fault::Full if takes_room => Err(io::Error::from_raw_os_error(28)),
                Fault::Crash => Err(io::Error::other("the process is gone")),
                _ => Ok(()),
            },
        }
    }
}

impl Disk for FaultyDisk {
    fn create(&self, path: &Path) -> io::Result<File> {
        self.gate(true)?;
        RealDisk.create(path)
    }

    fn write_at(&self, file: &File, bytes: &[u8], offset_bytes: u64) -> io::Result<usize> {
        let n_bytes = match self.verdict(true) {
            Verdict::Obey => bytes.len(),
            Verdict::Half => bytes.len().div_ceil(2),
            Verdict::Refuse(error) => return Err(error),
        };
        RealDisk.write_at(file, &bytes[..n_bytes], offset_bytes)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        self.gate(true)?;
        self.state().note_bytes(file)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.gate(true)?;
        self.state().note_names(dir)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.gate(true)?;
        RealDisk.create_dir(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.gate(false)?;
        RealDisk.rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.gate(false)?;
        RealDisk.exchange(a, b)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.gate(false)?;
        RealDisk.remove_file(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        let gone = self.gate(false);
        if gone.is_err() && self.fault == Fault::Crash && self.n_requests() == self.at {
            // Half of the names are removed before the process ends.
            let mut files = fs::read_dir(path)?.collect::<io::Result<Vec<_>>>()?;
            files.sort_by_key(fs::DirEntry::file_name);
            for file in files.iter().step_by(2) {
                fs::remove_file(file.path())?;
            }
        }
        gone?;
        RealDisk.remove_dir_all(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        self.gate(false)?;
        RealDisk.free_bytes(path)
    }
}

impl State {
    /// Makes the bytes of a file safe.
    fn note_bytes(&mut self, file: &File) -> io::Result<()> {
        let inode = file.metadata()?.ino();
        self.bytes.insert(inode, read_all(file)?);
        self.open.insert(inode, file.try_clone()?);
        Ok(())
    }

    /// Makes the names in a directory safe.
    fn note_names(&mut self, dir: &Path) -> io::Result<()> {
        let mut names = Names::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let file = File::open(entry.path())?;
            let inode = file.metadata()?.ino();
            names.insert(entry.file_name(), inode);
            self.open.entry(inode).or_insert(file);
        }
        let file = File::open(dir)?;
        let inode = file.metadata()?.ino();
        self.names.insert(inode, names);
        self.open.insert(inode, file);
        Ok(())
    }

    /// Lists what is left of directory `inode`, as paths under `path`; `None` for a directory.
    fn collect(
        &mut self,
        inode: Inode,
        path: &Path,
        survival: Survival,
        left: &mut Vec<(PathBuf, Option<Vec<u8>>)>,
    ) -> io::Result<()> {
        if survival != Survival::Nothing && path.is_dir() && fs::metadata(path)?.ino() == inode {
            self.note_names(path)?;
        }
        for (name, child) in self.names.get(&inode).cloned().unwrap_or_default() {
            let child_path = path.join(name);
            if self.open[&child].metadata()?.is_dir() {
                left.push((child_path.clone(), None));
                self.collect(child, &child_path, survival, left)?;
            } else {
                let bytes = self.surviving_bytes(child, survival)?;
                left.push((child_path, Some(bytes)));
            }
        }
        Ok(())
    }

    fn surviving_bytes(&self, inode: Inode, survival: Survival) -> io::Result<Vec<u8>> {
        let safe = self.bytes.get(&inode).cloned().unwrap_or_default();
        let mut now = read_all(&self.open[&inode])?;
        match survival {
            Survival::Nothing => Ok(safe),
            Survival::All => Ok(now),
            Survival::Torn(_) if safe == now => Ok(safe),
            Survival::Torn(seed) => {
                let random = seed.wrapping_add(inode).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
                let n_kept = random as usize % (now.len() + 1);
                if random & 1 == 0 {
                    now.truncate(n_kept);
                } else {
                    now[n_kept..].fill(0);
                }
                Ok(now)
            }
        }
    }
}

fn read_all(file: &File) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_cut_leaves_what_was_synced() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("old"), "safe").unwrap();
        let disk = FaultyDisk::new(dir.path(), Fault::None, 0).unwrap();
        let file = disk.create(&dir.path().join("new")).unwrap();
        disk.write_at(&file, b"abc", 0).unwrap();
        disk.sync(&file).unwrap();
        disk.rename(&dir.path().join("old"), &dir.path().join("moved")).unwrap();
        disk.sync_dir(dir.path()).unwrap();
        disk.write_at(&file, b"def", 3).unwrap();
        disk.remove_file(&dir.path().join("moved")).unwrap();
        disk.power_cut(Survival::Nothing).unwrap();
        assert_eq!(fs::read(dir.path().join("new")).unwrap(), b"abc");
        assert_eq!(fs::read(dir.path().join("moved")).unwrap(), b"safe");
        assert!(!dir.path().join("old").exists());
        assert_eq!(disk.n_requests(), 7);
    }

    #[test]
    fn what_was_not_synced_may_survive() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FaultyDisk::new(dir.path(), Fault::None, 0).unwrap();
        let file = disk.create(&dir.path().join("new")).unwrap();
        disk.write_at(&file, b"abc", 0).unwrap();
        disk.power_cut(Survival::All).unwrap();
        assert_eq!(fs::read(dir.path().join("new")).unwrap(), b"abc");
        let disk = FaultyDisk::new(dir.path(), Fault::None, 0).unwrap();
        disk.create(&dir.path().join("newer")).unwrap();
        disk.power_cut(Survival::Nothing).unwrap();
        assert!(!dir.path().join("newer").exists());
    }

    #[test]
    fn faults_come_at_their_request() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let disk = FaultyDisk::new(dir.path(), Fault::Full, 2).unwrap();
        let file = disk.create(&path("a")).unwrap();
        assert_eq!(disk.write_at(&file, b"abcd", 0).unwrap(), 2);
        let full = disk.write_at(&file, b"cd", 2).unwrap_err();
        assert_eq!(full.kind(), io::ErrorKind::StorageFull);
        disk.remove_file(&path("a")).unwrap();
        let disk = FaultyDisk::new(dir.path(), Fault::Crash, 1).unwrap();
        assert!(disk.create(&path("b")).is_err() && disk.create(&path("b")).is_err());
        let disk = FaultyDisk::new(dir.path(), Fault::Io, 1).unwrap();
        assert_eq!(disk.create(&path("b")).unwrap_err().raw_os_error(), Some(5));
        assert!(disk.create(&path("b")).is_ok());
    }
}
