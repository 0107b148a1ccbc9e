//! Replacing the model in an existing directory, all of it or nothing.
//!
//! A model is several files, and no file system replaces several names at once. So the new files, complete and
//! flushed, first come into the directory as the hidden `.publishing/`; that one rename is the decision. From then on:
//!
//! 1. every old file that has a successor is moved to `.publishing/.old-NAME`, weights first, and so are the weights
//!    of a former model that has none; then the directory is flushed;
//! 2. the new files are moved in, weights last, and the directory is flushed;
//! 3. `.publishing` is renamed away and removed.
//!
//! Invariants:
//! * no new file comes in before the last old one is gone for good. So at no moment, nor after a power cut, do new
//!   weights lie beside an old configuration or the other way round: in between there are no weights, which every
//!   loader says loudly;
//! * a failure is undone in the reverse order, and the directory is as it was;
//! * after a crash nothing is lost: both models are complete in the directory and `.publishing`, and the next writer
//!   finishes the steps above, each of which can be repeated. By hand: `mv DIR/.publishing/* DIR`.
//!
//! `.publishing/.files` lists the new names, so that repeating knows which of the files in place are already new.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use crate::disk::{Disk, real_disk, write_all_at};
use crate::error::IoError;
use crate::json::read_small_file;
use crate::model_files::{is_plain_name, is_side_file};
use crate::temp::temp_path;

const PUBLISHING: &str = ".publishing";
const LIST: &str = ".files";
const OLD: &str = ".old-";
const MAX_LIST_BYTES: u64 = 1 << 20;

/// 0 for side files, then shards, then what makes a loader look at them.
pub(crate) fn weight_rank(name: &str) -> u8 {
    match name {
        "model.safetensors" | "model.safetensors.index.json" => 2,
        _ if name.ends_with(".safetensors") => 1,
        _ => 0,
    }
}

/// Replaces files of `dir` by those of `staging`, which are `names`, flushed and in the order of [`weight_rank`].
///
/// # Errors
/// `Write`; the files of `dir` are then as they were, unless undoing failed too: then `.publishing` stays, and
/// [`complete_publication`] ends what was begun.
pub(crate) fn publish_into(
    disk: &dyn Disk,
    staging: &Path,
    dir: &Path,
    names: &[String],
) -> Result<(), IoError> {
    refuse_directories(dir, names)?;
    let failed = |e| IoError::writing(dir, 0, e);
    let publishing = dir.join(PUBLISHING);
    write_list(disk, &staging.join(LIST), names).map_err(failed)?;
    disk.sync_dir(staging).and_then(|()| disk.rename(staging, &publishing)).map_err(failed)?;
    let moved = disk.sync_dir(dir).map_err(failed).and_then(|()| move_in(disk, dir, names));
    if moved.is_ok() || undo(disk, dir, names).is_ok() {
        end(disk, dir);
    }
    moved
}

/// Ends what a crash interrupted in `dir`; says whether there was anything to end. Every writer does so first.
///
/// # Errors
/// `Read`, `Write`, `BadFile`.
pub fn complete_publication(dir: &Path) -> Result<bool, IoError> {
    complete_on(&*real_disk(), dir)
}

pub(crate) fn complete_on(disk: &dyn Disk, dir: &Path) -> Result<bool, IoError> {
    if !is_interrupted(dir) {
        return Ok(false);
    }
    let publishing = dir.join(PUBLISHING);
    let lock = File::open(&publishing).map_err(|e| IoError::reading(&publishing, e))?;
    if matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock)) {
        // Its publisher lives and goes on with it.
        return Ok(false);
    }
    move_in(disk, dir, &read_list(&publishing)?)?;
    end(disk, dir);
    Ok(true)
}

/// Whether a publication into `dir` is under way or was interrupted.
pub(crate) fn is_interrupted(dir: &Path) -> bool {
    fs::symlink_metadata(dir.join(PUBLISHING)).is_ok_and(|metadata| metadata.is_dir())
}

/// What to do about a directory whose publication was interrupted.
pub(crate) fn interrupted_hint(dir: &Path) -> String {
    format!(
        "a crash interrupted the publication of a new model here: `mv {0}/{PUBLISHING}/* {0}` completes it, and so \
         does the next run with this output directory",
        dir.display()
    )
}

/// Steps 1 and 2.
fn move_in(disk: &dyn Disk, dir: &Path, names: &[String]) -> Result<(), IoError> {
    let publishing = dir.join(PUBLISHING);
    for name in old_names(dir, names).map_err(|e| IoError::writing(dir, 0, e))? {
        let old = dir.join(&name);
        disk.rename(&old, &publishing.join(format!("{OLD}{name}")))
            .map_err(|e| IoError::writing(&old, 0, e))?;
    }
    disk.sync_dir(dir).map_err(|e| IoError::writing(dir, 0, e))?;
    for name in names.iter().filter(|name| publishing.join(name).exists()) {
        let new = dir.join(name);
        disk.rename(&publishing.join(name), &new).map_err(|e| IoError::writing(&new, 0, e))?;
    }
    disk.sync_dir(dir).map_err(|e| IoError::writing(dir, 0, e))
}

/// Files of `dir` that have to go, weights first: those whose successor still waits, and where new weights come,
/// weights and side files without a successor: a loader would prefer a stale `model.safetensors` to new shards, and
/// take a stale chat template or tokenizer for the new model's.
fn old_names(dir: &Path, names: &[String]) -> io::Result<Vec<String>> {
    let publishing = dir.join(PUBLISHING);
    let has_weights = names.iter().any(|name| weight_rank(name) == 2);
    let mut old = Vec::new();
    for entry in fs::read_dir(dir)? {
        let Ok(name) = entry?.file_name().into_string() else { continue };
        let is_shard = name.starts_with("model-") && name.ends_with(".safetensors");
        let belongs_to_a_model = is_shard || weight_rank(&name) == 2 || is_side_file(&name);
        let is_superseded = has_weights && belongs_to_a_model;
        let is_new = names.contains(&name);
        if (is_new && publishing.join(&name).exists()) || (!is_new && is_superseded) {
            old.push(name);
        }
    }
    old.sort_by_key(|name| (std::cmp::Reverse(weight_rank(name)), name.clone()));
    Ok(old)
}

/// Step 3. The name goes first and at once: half of `.publishing` must never be taken for all of it. What could not be
/// removed is a temporary for a later writer to remove.
fn end(disk: &dyn Disk, dir: &Path) {
    let temp = temp_path(dir, "staging");
    if disk.rename(&dir.join(PUBLISHING), &temp).is_ok() {
        // Before anything is removed: a name that came back without its files would be half a model.
        let _ = disk.sync_dir(dir);
        let _ = disk.remove_dir_all(&temp);
    }
}

/// Moves new files out and old ones back.
fn undo(disk: &dyn Disk, dir: &Path, names: &[String]) -> io::Result<()> {
    let publishing = dir.join(PUBLISHING);
    for name in names.iter().rev().filter(|name| !publishing.join(name).exists()) {
        disk.rename(&dir.join(name), &publishing.join(name))?;
    }
    let mut old = Vec::new();
    for entry in fs::read_dir(&publishing)? {
        let name = entry?.file_name().into_string().ok();
        old.extend(name.and_then(|name| Some(name.strip_prefix(OLD)?.to_owned())));
    }
    old.sort_by_key(|name| (weight_rank(name), name.clone()));
    for name in &old {
        disk.rename(&publishing.join(format!("{OLD}{name}")), &dir.join(name))?;
    }
    // If this fails and the power is cut, `.publishing` is back as well, and with it the new model.
    let _ = disk.sync_dir(dir);
    Ok(())
}

/// A directory is not replaced by a file: it is not ours to remove.
fn refuse_directories(dir: &Path, names: &[String]) -> Result<(), IoError> {
    let is_dir = |path: &Path| fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_dir());
    match names.iter().map(|name| dir.join(name)).find(|path| is_dir(path)) {
        None => Ok(()),
        Some(path) => Err(IoError::writing(&path, 0, io::ErrorKind::IsADirectory.into())),
    }
}

fn write_list(disk: &dyn Disk, path: &Path, names: &[String]) -> io::Result<()> {
    let file = disk.create(path)?;
    write_all_at(disk, &file, names.join("\n").as_bytes(), 0)?;
    disk.sync(&file)
}

fn read_list(publishing: &Path) -> Result<Vec<String>, IoError> {
    let path = publishing.join(LIST);
    let bytes = read_small_file(&path, MAX_LIST_BYTES).map_err(|e| match e {
        IoError::Missing { .. } => IoError::bad_file(
            publishing,
            "is left of a model that was being put in place, but its list of files is gone",
            "move what belongs to the model out of it and remove it",
        ),
        e => e,
    })?;
    let names: Vec<String> = String::from_utf8_lossy(&bytes).lines().map(str::to_owned).collect();
    match names.iter().find(|name| !is_plain_name(name)) {
        None => Ok(names),
        Some(name) => Err(IoError::bad_file(
            &path,
            format!("`{name}` is not the name of a model's file"),
            "move what belongs to the model out of the directory of this file and remove it",
        )),
    }
}
