//! A model directory that appears when it is complete.
//!
//! Idea: files are written into a hidden directory on the same file system. Where there is no directory of the final
//! name yet, one rename publishes all of them. Into an existing one they go as `publication.rs` says.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::atomic::split;
use crate::disk::{Disk, create_dirs, parent_of, real_disk};
use crate::error::IoError;
use crate::publication::{complete_on, publish_into, weight_rank};
use crate::temp::{TempDir, remove_stale_temps};

/// A directory in the making: fill `path()`, then `publish()`. Dropped before that, it leaves nothing behind.
#[derive(Debug)]
pub struct StagingDir {
    temp: TempDir,
    final_dir: PathBuf,
}

impl StagingDir {
    /// Makes an empty directory on the file system of `final_dir`, inside it where it exists, beside it otherwise.
    /// Completes the publication that a crash interrupted there, if any.
    ///
    /// # Errors
    /// `Usage` where `final_dir` is a file; `Read`, `Write`, `BadFile` otherwise.
    pub fn create(final_dir: &Path) -> Result<Self, IoError> {
        Self::create_on(real_disk(), final_dir)
    }

    /// The same on a disk of the caller's choice.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_on(disk: Arc<dyn Disk>, final_dir: &Path) -> Result<Self, IoError> {
        let (dir, name) = match fs::metadata(final_dir) {
            Ok(metadata) if metadata.is_dir() => {
                refuse_checkpoint(final_dir)?;
                complete_on(&*disk, final_dir)?;
                (final_dir.to_path_buf(), "staging".to_owned())
            }
            Ok(_) => {
                return Err(IoError::Usage {
                    what: format!("{} is a file, not a directory", final_dir.display()),
                    hint: "choose another output directory".into(),
                });
            }
            Err(_) if fs::symlink_metadata(final_dir).is_ok_and(|m| m.is_symlink()) => {
                return Err(IoError::Usage {
                    what: format!("{} is a link to nothing", final_dir.display()),
                    hint: "remove it, or choose another output directory".into(),
                });
            }
            Err(_) => split(final_dir)?,
        };
        create_dirs(&*disk, &dir)?;
        remove_stale_temps(&*disk, &dir, |stale| stale == name);
        let temp = TempDir::create(disk, &dir, &name);
        let temp = temp.map_err(|e| IoError::writing(final_dir, 0, e))?;
        Ok(Self { temp, final_dir: final_dir.into() })
    }

    /// Where to write the files. Plain files only, no directories, no hidden names.
    pub fn path(&self) -> &Path {
        &self.temp.path
    }

    /// Flushes the files and moves them to the final directory, replacing files of the same name and removing
    /// weight files of a former model that the new one does not have.
    ///
    /// # Errors
    /// `Write`; the final directory is then as it was.
    pub fn publish(mut self) -> Result<(), IoError> {
        let failed = |e| IoError::writing(&self.final_dir, 0, e);
        let names = self.sync_files().map_err(failed)?;
        let disk = Arc::clone(&self.temp.disk);
        disk.sync_dir(&self.temp.path).map_err(failed)?;
        if self.final_dir.is_dir() {
            return publish_into(&*disk, &self.temp.path, &self.final_dir, &names);
        }
        disk.rename(&self.temp.path, &self.final_dir).map_err(failed)?;
        let synced = disk.sync_dir(&parent_of(&self.final_dir)).map_err(failed);
        // What may not survive a power cut must not look finished after the failure that is reported.
        self.temp.stays = synced.is_ok() || disk.rename(&self.final_dir, &self.temp.path).is_err();
        synced
    }

    /// Flushes every file; returns the names in the order of publishing: weights last.
    fn sync_files(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.temp.path)? {
            let entry = entry?;
            let name = entry.file_name().into_string();
            let name = name.map_err(|_| io::Error::other("a file name is not UTF-8"))?;
            let is_plain = entry.file_type()?.is_file() && !name.starts_with('.');
            assert!(is_plain, "a staging directory holds plain files only, not `{name}`");
            self.temp.disk.sync(&File::open(entry.path())?)?;
            names.push(name);
        }
        names.sort_by_key(|name| (weight_rank(name), name.clone()));
        Ok(names)
    }
}

/// A model in the place of a checkpoint's files would leave the rest of it without use.
fn refuse_checkpoint(dir: &Path) -> Result<(), IoError> {
    if ["manifest.json", "trainer_state.json"].iter().all(|name| dir.join(name).is_file()) {
        return Err(IoError::Usage {
            what: format!("{} is a checkpoint, which a model would destroy", dir.display()),
            hint: "choose another output directory".into(),
        });
    }
    Ok(())
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

    fn fill(staging: &StagingDir, files: &[(&str, &str)]) {
        for (name, text) in files {
            fs::write(staging.path().join(name), text).unwrap();
        }
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
    fn a_directory_in_the_way_of_a_file_stays_and_so_does_everything_else() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("config.json"), "old").unwrap();
        // A directory where the weights should go, which is not for a model to remove.
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
        let checkpoint = dir.path().join("checkpoint-1");
        fs::create_dir(&checkpoint).unwrap();
        for name in ["manifest.json", "trainer_state.json"] {
            fs::write(checkpoint.join(name), "{}").unwrap();
        }
        assert_eq!(StagingDir::create(&checkpoint).unwrap_err().kind(), crate::ErrorKind::Usage);
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        assert_eq!(StagingDir::create(&link).unwrap_err().kind(), crate::ErrorKind::Usage);
    }
}
