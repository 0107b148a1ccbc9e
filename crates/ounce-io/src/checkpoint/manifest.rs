//! `manifest.json`: length and checksum of every other file of a checkpoint.
//!
//! A manifest is written last, so a checkpoint without one was never complete. XXH64 detects damage and mistakes; it
//! is no defence against someone who forges files, and what a checkpoint says is checked like any other input.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{FORMAT, MANIFEST};
use crate::error::IoError;
use crate::hash::hash_file;
use crate::json::read_json;
use crate::model_files::is_plain_name;

pub(super) const DAMAGED: &str = "resume from an earlier checkpoint, or give \
     `--resume-from-checkpoint auto` to take the newest that is whole";

/// What to do about a checkpoint of a newer layout.
pub(super) const OTHER_VERSION: &str = "resume with the version of the program that saved it";

const MAX_MANIFEST_BYTES: u64 = 1 << 20;

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FileRecord {
    pub(super) name: String,
    pub(super) bytes: u64,
    /// Sixteen hexadecimal digits.
    pub(super) xxh64: String,
}

/// All files, and the step that they belong to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Manifest {
    pub(super) format: u32,
    pub(super) step: u64,
    pub(super) files: Vec<FileRecord>,
}

impl FileRecord {
    pub(super) fn new(name: &str, bytes: u64, hash: u64) -> Self {
        Self { name: name.into(), bytes, xxh64: format!("{hash:016x}") }
    }
}

/// Refuses a file of a checkpoint that is laid out otherwise.
///
/// # Errors
/// `BadFile`.
pub(super) fn check_format(path: &Path, value: &Value) -> Result<(), IoError> {
    let format = value.get("format").and_then(Value::as_u64);
    if format == Some(FORMAT.into()) {
        return Ok(());
    }
    let found = format.map_or("none".to_owned(), |format| format.to_string());
    let reason = format!("has format {found}, but this program reads format {FORMAT}");
    Err(IoError::bad_file(path, reason, if format.is_some() { OTHER_VERSION } else { DAMAGED }))
}

impl Manifest {
    pub(super) fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("strings and numbers become JSON") + "\n"
    }

    /// Reads the manifest of a checkpoint.
    ///
    /// # Errors
    /// `Read`; `BadFile` where it is missing, damaged, or names what cannot be in a checkpoint; `BadLine`.
    pub(super) fn read(dir: &Path) -> Result<Self, IoError> {
        let path = dir.join(MANIFEST);
        let bad = |reason: String| IoError::bad_file(&path, reason, DAMAGED);
        let value = match read_json(&path, MAX_MANIFEST_BYTES) {
            Err(IoError::Missing { .. }) => {
                return Err(bad("is missing: the checkpoint is not complete".into()));
            }
            other => other?,
        };
        check_format(&path, &value)?;
        let manifest: Self = serde_json::from_value(value).map_err(|e| bad(e.to_string()))?;
        match manifest.files.iter().find(|file| !is_plain_name(&file.name)) {
            Some(file) => Err(bad(format!("`{}` is not a plain file name", file.name))),
            None => Ok(manifest),
        }
    }

    /// Compares every file with its record: first all lengths, then all bytes, through one small buffer.
    ///
    /// # Errors
    /// `Read`; `BadFile` for the first file that is missing, is no plain file, or differs.
    pub(super) fn verify(&self, dir: &Path) -> Result<(), IoError> {
        for file in &self.files {
            let path = dir.join(&file.name);
            let bad = |reason: String| Err(IoError::bad_file(&path, reason, DAMAGED));
            match fs::symlink_metadata(&path) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    return bad("is missing".into());
                }
                Err(e) => return Err(IoError::reading(&path, e)),
                Ok(found) if !found.is_file() => return bad("is not a plain file".into()),
                Ok(found) if found.len() != file.bytes => {
                    return bad(format!(
                        "has {} bytes, but was saved with {}",
                        found.len(),
                        file.bytes
                    ));
                }
                Ok(_) => {}
            }
        }
        for file in &self.files {
            let path = dir.join(&file.name);
            let (n_bytes, hash) = hash_file(&path)?;
            if FileRecord::new(&file.name, n_bytes, hash) != *file {
                return Err(IoError::bad_file(&path, "does not match its checksum", DAMAGED));
            }
        }
        Ok(())
    }
}
