//! The model directory that a run starts from.

use std::path::{Path, PathBuf};

use ounce_models::{ModelConfig, ModelError};

use crate::{Error, Result, Settings};

/// Rows are at most this long where neither the user nor the model says less.
const DEFAULT_MAX_LENGTH: u64 = 1024;

/// A configuration and where it came from.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    pub(crate) dir: PathBuf,
    pub(crate) config: ModelConfig,
}

impl Model {
    /// Reads the configuration in the directory that the settings name.
    pub(crate) fn open(settings: &Settings) -> Result<Self> {
        let dir = settings.model.as_deref().ok_or_else(|| missing("--model DIR"))?;
        Self::at(dir)
    }

    /// Reads the configuration in a directory. Completes the publication that a crash interrupted there.
    pub(crate) fn at(dir: &Path) -> Result<Self> {
        // A directory that cannot be written is read as it is; what is missing then says why.
        let _ = ounce_io::complete_publication(dir);
        let refuse = |what: &str, hint: &str| Error::Input {
            message: format!("{} {what}", dir.display()),
            hint: hint.to_owned(),
        };
        if !dir.exists() {
            let hint = "`--model` takes a directory on this machine; nothing is downloaded";
            return Err(refuse("does not exist", hint));
        }
        let extension = dir.extension().and_then(|e| e.to_str());
        if dir.is_file() && matches!(extension, Some("safetensors" | "bin" | "pt")) {
            let hint = "name the directory, with `config.json` and tokenizer beside the weights";
            return Err(refuse("is a file of weights, not a model directory", hint));
        }
        Ok(Self { dir: dir.to_path_buf(), config: read_config(dir)? })
    }

    /// Tokens per row: as set, or the model's context, at most 1024.
    pub(crate) fn max_length(&self, settings: &Settings) -> u64 {
        let most = self.config.max_positions();
        settings.max_length.unwrap_or_else(|| most.min(DEFAULT_MAX_LENGTH))
    }
}

/// Reads `config.json` of a directory, or a configuration file.
pub(crate) fn read_config(path: &Path) -> Result<ModelConfig> {
    let value = ounce_io::read_config(path)?;
    ModelConfig::from_json(&value.to_string()).map_err(|e| model_error(path, &e))
}

/// A configuration that cannot be built, with the file it is in.
pub(crate) fn model_error(path: &Path, e: &ModelError) -> Error {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
    let text = e.to_string();
    let (message, hint) = text.split_once("\nhint: ").unwrap_or((&text, "check config.json"));
    let hint = hint.to_owned();
    match e {
        // What the flags ask of a model that is fine.
        ModelError::TooLong { .. } | ModelError::Dropout { .. } => {
            Error::Usage { message: message.to_owned(), hint }
        }
        _ => Error::Input { message: format!("{}: {message}", file.display()), hint },
    }
}

/// A setting that the command needs.
pub(crate) fn missing(flag: &str) -> Error {
    Error::Usage {
        message: format!("`{flag}` is missing"),
        hint: format!("give `{flag}`, or the same key in the file of --config"),
    }
}
