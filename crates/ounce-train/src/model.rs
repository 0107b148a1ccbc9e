//! The model that a run starts from: a directory, a GGUF file, or a name in the hub's cache.
//!
//! Of a GGUF file only the weights are read in place. Its configuration and tokenizer become the files of a
//! directory in the cache, once, made by a child process (a vocabulary takes memory that must not stay
//! ours); everything after that sees a directory.

use std::path::{Path, PathBuf};

use ounce_io::{GgufModel, StagingDir};
use ounce_models::{ModelConfig, ModelError, Purpose, build_for_length};
use serde::{Deserialize, Serialize};

use crate::child::Working;
use crate::error::message_and_hint;
use crate::{Environment, Error, Result, Settings, Silent};

/// The kind of the child's work.
pub(crate) const WORK: &str = "unpack";

/// Rows are at most this long where neither the user nor the model says less.
const DEFAULT_MAX_LENGTH: u64 = 1024;
/// Changes when a GGUF file would become other files.
const SIDE_FILES_VERSION: u32 = 2;

/// A configuration and where it came from.
#[derive(Debug, Clone)]
pub(crate) struct Model {
    /// What holds the weights, as the user called it: a directory or a GGUF file.
    pub(crate) path: PathBuf,
    /// The directory of configuration and tokenizer.
    pub(crate) dir: PathBuf,
    pub(crate) config: ModelConfig,
}

impl Model {
    /// Reads the configuration of the model that the settings name.
    pub(crate) fn open(settings: &Settings, env: &Environment) -> Result<Self> {
        let path = settings.model.as_deref().ok_or_else(|| missing("--model DIR"))?;
        Self::find(path, env)
    }

    /// Reads the configuration of a model: a directory, a GGUF file, or ORG/NAME in the hub's cache.
    pub(crate) fn find(path: &Path, env: &Environment) -> Result<Self> {
        if path.is_file() && ounce_io::is_gguf(path)? {
            let dir = side_files(path, env)?;
            return Ok(Self { path: path.to_path_buf(), config: read_config(&dir)?, dir });
        }
        match ounce_io::hub_name(path).filter(|_| !path.exists()) {
            Some(name) => {
                let snapshot = ounce_io::cached_snapshot(&env.hub_dir, &name)?;
                match only_gguf(&snapshot) {
                    Some(file) => Self::find(&file, env),
                    None => Self::at(&snapshot),
                }
            }
            None => Self::at(path),
        }
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
            let hint = "`--model` takes a directory or a GGUF file, or ORG/NAME after \
                        `ounce pull ORG/NAME`";
            return Err(refuse("does not exist", hint));
        }
        let extension = dir.extension().and_then(|e| e.to_str());
        if dir.is_file() && matches!(extension, Some("safetensors" | "bin" | "pt")) {
            let hint = "name the directory, with `config.json` and tokenizer beside the weights";
            return Err(refuse("is a file of weights, not a model directory", hint));
        }
        if dir.is_file() && extension == Some("gguf") {
            let hint = "fetch it again; where it is a pointer of Git LFS, with `git lfs pull`";
            return Err(refuse("is not a GGUF file, whatever its name says", hint));
        }
        Ok(Self { path: dir.to_path_buf(), dir: dir.to_path_buf(), config: read_config(dir)? })
    }

    /// A configuration without files.
    pub(crate) fn without_files(name: &str, config: ModelConfig) -> Self {
        Self { path: name.into(), dir: name.into(), config }
    }

    /// Refuses rows longer than the model has positions for, by the number that was set.
    pub(crate) fn check_length(&self, settings: &Settings) -> Result<()> {
        let Some(max_length) = settings.max_length else { return Ok(()) };
        build_for_length(&self.config, Purpose::Decode, 0.0, max_length)
            .map(drop)
            .map_err(|e| model_error(&self.path, &e))
    }

    /// Tokens per row: as set, or the model's context, at most 1024.
    pub(crate) fn max_length(&self, settings: &Settings) -> u64 {
        let most = self.config.max_positions();
        settings.max_length.unwrap_or_else(|| most.min(DEFAULT_MAX_LENGTH))
    }
}

/// The GGUF file of a directory that holds nothing else to be a model.
fn only_gguf(dir: &Path) -> Option<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let is_gguf = |path: &PathBuf| path.extension().is_some_and(|e| e == "gguf");
    let files: Vec<PathBuf> = entries.map(|entry| entry.path()).filter(is_gguf).collect();
    let [file] = &files[..] else { return None };
    (!dir.join("config.json").exists()).then(|| file.clone())
}

/// The directory of a GGUF file's configuration and tokenizer, made if it is not there yet.
fn side_files(path: &Path, env: &Environment) -> Result<PathBuf> {
    let hash = GgufModel::open(path)?.header_hash();
    let dir = env.cache_dir.join("gguf").join(format!("{hash:016x}-{SIDE_FILES_VERSION}"));
    // Files appear in it all at once.
    if !dir.join("config.json").exists() {
        let request = SideFiles { gguf: path.to_path_buf(), dir: dir.clone() };
        let working = Working::start(&env.worker, WORK, &request);
        let unpacked = working.and_then(|child| child.finish::<()>(&Silent));
        // Another process may have been faster.
        if !dir.join("config.json").exists() {
            unpacked?;
        }
    }
    Ok(dir)
}

/// A GGUF file whose configuration and tokenizer are to be files of a directory.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SideFiles {
    gguf: PathBuf,
    dir: PathBuf,
}

/// The child's work: writes them all at once, so that half of them is never taken for all.
pub(crate) fn write_side_files(request: &SideFiles) -> Result<()> {
    let model = GgufModel::open(&request.gguf)?;
    let staging = StagingDir::create(&request.dir)?;
    model.write_side_files(staging.path())?;
    Ok(staging.publish()?)
}

/// Reads `config.json` of a directory, or a configuration file.
pub(crate) fn read_config(path: &Path) -> Result<ModelConfig> {
    let value = ounce_io::read_config(path)?;
    ModelConfig::from_json(&value.to_string()).map_err(|e| model_error(path, &e))
}

/// A configuration that cannot be built, with the file it is in.
pub(crate) fn model_error(path: &Path, e: &ModelError) -> Error {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_path_buf() };
    let (message, hint) = message_and_hint(e);
    match e {
        // What the flags ask of a model that is fine.
        ModelError::TooLong { .. } | ModelError::Dropout { .. } => Error::Usage { message, hint },
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
