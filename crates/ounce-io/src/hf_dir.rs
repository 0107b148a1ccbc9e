//! The side files of a Hugging Face model directory: everything but the weights.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;

use crate::atomic::{AtomicFile, write_file};
use crate::error::IoError;
use crate::json::{open_regular, read_json};
use crate::model_files::{TOKENIZER_FILES, side_files};
use crate::publication::{interrupted_hint, is_interrupted};

/// Longest configuration file accepted.
pub const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Reads `config.json` of a model directory, or a configuration file named directly.
///
/// # Errors
/// `Missing`, `Read`, `BadFile` (over [`MAX_CONFIG_BYTES`], not an object), `BadLine` (not strict JSON).
pub fn read_config(dir_or_file: &Path) -> Result<Value, IoError> {
    let path =
        if dir_or_file.is_dir() { dir_or_file.join("config.json") } else { dir_or_file.into() };
    let config = match read_json(&path, MAX_CONFIG_BYTES) {
        Err(IoError::Missing { path, .. }) if is_interrupted(dir_or_file) => {
            return Err(IoError::Missing { path, hint: interrupted_hint(dir_or_file).into() });
        }
        Err(IoError::Missing { path, .. }) if dir_or_file.is_dir() => {
            let hint = "a model directory holds config.json, weights and a tokenizer, as `ounce init` writes it";
            return Err(IoError::Missing { path, hint: hint.into() });
        }
        other => other?,
    };
    if config.is_object() {
        return Ok(config);
    }
    Err(IoError::bad_file(
        &path,
        "holds no JSON object",
        "a Hugging Face config.json is an object with a `model_type`",
    ))
}

/// Writes a JSON file atomically, indented as Hugging Face does, with a newline at its end.
///
/// # Errors
/// `Write`.
pub fn write_json(path: &Path, value: &Value) -> Result<(), IoError> {
    write_file(path, format!("{value:#}\n").as_bytes())
}

/// Copies the tokenizer's files from one directory to another, byte for byte; returns the names copied.
///
/// # Errors
/// `Read`, `Write`, `BadFile` for a link out of the directory.
pub fn copy_tokenizer_files(from: &Path, to: &Path) -> Result<Vec<&'static str>, IoError> {
    let is_tokenizer = |name: &&str| TOKENIZER_FILES.contains(name);
    copy_files(from, to, side_files(from).into_iter().filter(is_tokenizer).collect())
}

/// Copies configuration and tokenizer from one model directory to another, byte for byte; returns the names copied.
///
/// # Errors
/// `Missing` without a `config.json`, `Read`, `Write`, `BadFile` for a link out of the directory.
pub fn copy_side_files(from: &Path, to: &Path) -> Result<Vec<&'static str>, IoError> {
    open_regular(&from.join("config.json"))?;
    copy_files(from, to, side_files(from))
}

/// Refuses a link that leads out of the model directory; into the blobs of a hub's cache it may.
pub(crate) fn stay_inside(dir: &Path, file: &Path) -> Result<(), IoError> {
    let resolve = |path: &Path| path.canonicalize().map_err(|e| IoError::reading(path, e));
    let (real_dir, real_file) = (resolve(dir)?, resolve(file)?);
    let cache_blobs = real_dir
        .parent()
        .filter(|snapshots| snapshots.file_name().is_some_and(|name| name == "snapshots"))
        .and_then(|snapshots| Some(snapshots.parent()?.join("blobs")));
    if real_file.starts_with(&real_dir) || cache_blobs.is_some_and(|b| real_file.starts_with(b)) {
        return Ok(());
    }
    Err(IoError::bad_file(
        file,
        format!("is a link out of the model directory, to {}", real_file.display()),
        "copy the file into the directory",
    ))
}

/// Copies the files called `names`.
fn copy_files(
    from: &Path,
    to: &Path,
    names: Vec<&'static str>,
) -> Result<Vec<&'static str>, IoError> {
    for name in &names {
        stay_inside(from, &from.join(name))?;
        copy_file(&from.join(name), &to.join(name))?;
    }
    Ok(names)
}

/// Copies one file through a small buffer; a copy onto itself changes nothing.
fn copy_file(from: &Path, to: &Path) -> Result<(), IoError> {
    let mut source: File = open_regular(from)?;
    let mut target = AtomicFile::create(to)?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let n = source.read(&mut buffer).map_err(|e| IoError::reading(from, e))?;
        if n == 0 {
            return target.finish();
        }
        target.write_all(&buffer[..n])?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn side_files_that_are_links_out_of_the_directory_are_not_copied() {
        let [from, to] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let secret = to.path().join("secret");
        std::fs::write(&secret, "private").unwrap();
        std::fs::write(from.path().join("config.json"), "{}").unwrap();
        std::os::unix::fs::symlink(&secret, from.path().join("merges.txt")).unwrap();
        let message = copy_side_files(from.path(), to.path()).unwrap_err().to_string();
        assert!(message.contains("merges.txt: is a link out of the model directory"), "{message}");
        assert!(!to.path().join("merges.txt").exists());
    }

    #[test]
    fn side_files_are_copied_byte_for_byte_also_onto_themselves() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(from.path().join("config.json"), "{ \"odd\" :1}\n\n").unwrap();
        fs::write(from.path().join("merges.txt"), [0xff, 0, 13]).unwrap();
        fs::write(from.path().join("model.safetensors"), "weights").unwrap();
        let copied = copy_side_files(from.path(), to.path()).unwrap();
        assert_eq!(copied, ["config.json", "merges.txt"]);
        assert_eq!(fs::read(to.path().join("config.json")).unwrap(), b"{ \"odd\" :1}\n\n");
        assert_eq!(fs::read(to.path().join("merges.txt")).unwrap(), [0xff, 0, 13]);
        copy_side_files(from.path(), from.path()).unwrap();
        assert_eq!(fs::read(from.path().join("merges.txt")).unwrap(), [0xff, 0, 13]);
    }

    #[test]
    fn a_directory_without_config_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let message = copy_side_files(dir.path(), dir.path()).unwrap_err().to_string();
        assert!(message.contains("config.json does not exist\nhint: "), "{message}");
        assert!(read_config(dir.path()).unwrap_err().to_string().contains("config.json"));
    }

    #[test]
    fn configs_that_are_too_long_or_no_object_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        fs::write(&path, " ".repeat(MAX_CONFIG_BYTES as usize + 1)).unwrap();
        assert!(read_config(&path).unwrap_err().to_string().contains("over the limit of 1048576"));
        fs::write(&path, "[1]").unwrap();
        assert!(read_config(dir.path()).unwrap_err().to_string().contains("no JSON object"));
        fs::write(&path, "{\"model_type\": \"gpt2\"}").unwrap();
        assert_eq!(read_config(dir.path()).unwrap()["model_type"], "gpt2");
    }

    #[test]
    fn written_json_is_indented_and_ends_in_a_newline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        write_json(&path, &serde_json::json!({"a": [1]})).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "{\n  \"a\": [\n    1\n  ]\n}\n");
    }
}
