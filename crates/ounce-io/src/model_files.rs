//! The files of a Hugging Face model directory beside its weights: their names, and where they may lie.

use std::path::Path;

use crate::error::IoError;

pub(crate) const TOKENIZER_CONFIG: &str = "tokenizer_config.json";

/// Tokenizer files, as published by one program or another. They are copied byte for byte.
pub(crate) const TOKENIZER_FILES: [&str; 9] = [
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];

/// A name that any file in a directory may have: visible, no way out, not longer than file systems allow.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let is_plain = |c: char| !c.is_control() && c != '/' && c != '\\';
    !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && name.chars().all(is_plain)
}

/// The files of a model beside its weights: configuration and tokenizer.
fn side_file_names() -> impl Iterator<Item = &'static str> {
    ["config.json", "generation_config.json"].into_iter().chain(TOKENIZER_FILES)
}

/// Whether a file of that name belongs to a model.
pub(crate) fn is_side_file(name: &str) -> bool {
    side_file_names().any(|side_file| side_file == name)
}

/// The side files that `dir` has.
pub(crate) fn side_files(dir: &Path) -> Vec<&'static str> {
    side_file_names().filter(|name| dir.join(name).exists()).collect()
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
