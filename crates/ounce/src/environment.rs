//! What the library may know of this process.

use std::path::PathBuf;

use ounce_train::{Environment, Error, Result};

/// The process's own program file, and where caches go.
pub(crate) fn environment() -> Result<Environment> {
    let worker = std::env::current_exe().map_err(|e| Error::Files {
        message: format!("cannot find the program's own file: {e}"),
        hint: "start ounce by its full path".to_owned(),
    })?;
    let home = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache_dir = home("OUNCE_CACHE_DIR")
        .or_else(|| home("XDG_CACHE_HOME").map(|d| d.join("ounce")))
        .or_else(|| home("HOME").map(|d| d.join(".cache/ounce")))
        .unwrap_or_else(|| std::env::temp_dir().join("ounce"));
    let hub_dir = home("HF_HUB_CACHE")
        .or_else(|| home("HF_HOME").map(|d| d.join("hub")))
        .or_else(|| home("XDG_CACHE_HOME").map(|d| d.join("huggingface/hub")))
        .or_else(|| home("HOME").map(|d| d.join(".cache/huggingface/hub")))
        .unwrap_or_else(|| cache_dir.join("hub"));
    Ok(Environment { hub_dir, ..Environment::new(worker, cache_dir) })
}
