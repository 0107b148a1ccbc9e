//! What can end a run, and whose doing it is.

use std::path::{Path, PathBuf};

use crate::budget::{format_budget, format_bytes};

/// Every failure of this crate. Each message ends with a `hint:` line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is missing, unknown or out of range.
    #[error("{message}\nhint: {hint}")]
    Usage {
        /// What is wrong with which setting.
        message: String,
        /// What to try.
        hint: String,
    },
    /// The feature is named by the command line contract, but there is no code for it.
    #[error("{what} is not built yet\nhint: leave it out; `ounce --help` shows what there is")]
    NotBuilt {
        /// The flag or command.
        what: String,
    },
    /// No plan fits into the budget.
    #[error(
        "the plan does not fit: budget {}\n{breakdown}smallest feasible budget: {}\nhint: {hint}",
        format_bytes(*budget_bytes),
        format_budget(*smallest_bytes)
    )]
    DoesNotFit {
        /// What was asked for.
        budget_bytes: u64,
        /// What would do.
        smallest_bytes: u64,
        /// What dominates the smallest plan, one line per category.
        breakdown: String,
        /// The cheapest change that fits.
        hint: String,
    },
    /// The model or the data is wrong.
    #[error("{message}\nhint: {hint}")]
    Input {
        /// File, tensor or key, and what is wrong with it.
        message: String,
        /// What to try.
        hint: String,
    },
    /// A loss or a gradient is infinite or not a number.
    #[error(
        "step {step}: {what} (learning rate {learning_rate:?}, {rows}); {kept}{}\n\
         hint: try a lower --learning-rate, a longer --warmup-steps or --max-grad-norm 1{}; \
         `--on-nonfinite skip` goes on without such steps",
        last_good(checkpoint.as_deref()),
        from_last_good(checkpoint.as_deref())
    )]
    NonFinite {
        /// The step, counted from 1.
        step: u64,
        /// Which number is not finite.
        what: String,
        /// Learning rate of the step.
        learning_rate: f64,
        /// The rows of the step.
        rows: String,
        /// What became of the parameters.
        kept: &'static str,
        /// The last checkpoint whose weights gave a finite loss.
        checkpoint: Option<PathBuf>,
    },
    /// A model whose loss is infinite or not a number.
    #[error(
        "the loss is {loss}\n\
         hint: the weights hold numbers that are not finite, or make such: take an earlier checkpoint, or \
         `--precision f32`"
    )]
    BrokenModel {
        /// The loss.
        loss: f64,
    },
    /// Reading or writing failed.
    #[error("{message}\nhint: {hint}")]
    Files {
        /// The file and the system's reason.
        message: String,
        /// What to try.
        hint: String,
    },
    /// The caller asked to stop.
    #[error("stopped after step {step}\nhint: {}", how_to_go_on(checkpoint.as_deref()))]
    Interrupted {
        /// Steps that were done.
        step: u64,
        /// The checkpoint that was written.
        checkpoint: Option<PathBuf>,
    },
    /// The caller asked to stop something that goes on where it was.
    #[error("{message}\nhint: {hint}")]
    Paused {
        /// What was stopped.
        message: String,
        /// How it goes on.
        hint: String,
    },
    /// The process outside the arena is larger than declared.
    #[error(
        "the process takes {} before its first step, more than the {} that are declared for it\n\
         hint: raise --memory; this is a bug in ounce, please report it",
        format_bytes(*resident_bytes),
        format_bytes(*declared_bytes)
    )]
    Baseline {
        /// What is resident.
        resident_bytes: u64,
        /// What was declared.
        declared_bytes: u64,
    },
    /// A bug of ours: the checker refused a plan, or a graph was malformed.
    #[error(
        "{message}\nhint: this is a bug in ounce; please report it with the command and config"
    )]
    Bug {
        /// What does not hold.
        message: String,
    },
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of failure it is: the binary maps it to the exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorClass {
    /// Wrong use of the command.
    Usage,
    /// No plan fits.
    DoesNotFit,
    /// The model or the data is wrong.
    Input,
    /// A non-finite loss.
    NonFinite,
    /// Reading or writing failed.
    Files,
    /// Stopped by a signal.
    Interrupted,
    /// A bug of ours.
    Bug,
}

/// Where what was good is kept.
fn last_good(checkpoint: Option<&Path>) -> String {
    checkpoint.map_or_else(String::new, |path| {
        format!("; the last good checkpoint is {}", path.display())
    })
}

/// How to go on from it: by its name, since a later one may be there that is whole and yet of no use.
fn from_last_good(checkpoint: Option<&Path>) -> String {
    checkpoint.map_or_else(String::new, |path| {
        format!(", with `--resume-from-checkpoint {} --override`", path.display())
    })
}

/// What to do after an interruption.
fn how_to_go_on(checkpoint: Option<&Path>) -> String {
    match checkpoint {
        Some(path) => format!("go on with `--resume-from-checkpoint {}`", path.display()),
        None => "nothing was written; start again".to_owned(),
    }
}

/// What an error of any crate of the workspace says, and the hint that its text ends in.
pub fn message_and_hint(e: &impl std::fmt::Display) -> (String, String) {
    let text = e.to_string();
    let parts = text.split_once("\nhint: ");
    debug_assert!(parts.is_some(), "without a hint: {text}");
    let (message, hint) = parts.unwrap_or((&text, "please report this message"));
    (message.to_owned(), hint.to_owned())
}

impl Error {
    /// What kind of failure it is.
    pub fn class(&self) -> ErrorClass {
        match self {
            Self::Usage { .. } | Self::NotBuilt { .. } => ErrorClass::Usage,
            Self::DoesNotFit { .. } => ErrorClass::DoesNotFit,
            Self::Input { .. } => ErrorClass::Input,
            Self::NonFinite { .. } | Self::BrokenModel { .. } => ErrorClass::NonFinite,
            Self::Files { .. } => ErrorClass::Files,
            Self::Interrupted { .. } | Self::Paused { .. } => ErrorClass::Interrupted,
            Self::Baseline { .. } | Self::Bug { .. } => ErrorClass::Bug,
        }
    }

    /// Bytes on disk: their own message and hint, and their own class.
    fn from_io(e: &ounce_io::IoError) -> Self {
        let (message, hint) = message_and_hint(e);
        match e.kind() {
            ounce_io::ErrorKind::Usage => Self::Usage { message, hint },
            ounce_io::ErrorKind::BadInput => Self::Input { message, hint },
            ounce_io::ErrorKind::WriteFailed => Self::Files { message, hint },
        }
    }

    /// Reading or writing `path` failed.
    pub(crate) fn file(path: &Path, e: &std::io::Error) -> Self {
        let hint = match e.kind() {
            std::io::ErrorKind::NotFound => "check the path",
            std::io::ErrorKind::PermissionDenied => "check the permissions",
            std::io::ErrorKind::StorageFull => "free some disk space",
            _ => "check the disk and the path",
        };
        Self::Files { message: format!("{}: {e}", path.display()), hint: hint.to_owned() }
    }
}

impl From<ounce_io::IoError> for Error {
    fn from(e: ounce_io::IoError) -> Self {
        Self::from_io(&e)
    }
}

impl From<ounce_passes::PassError> for Error {
    fn from(e: ounce_passes::PassError) -> Self {
        let (message, hint) = message_and_hint(&e);
        Self::Input { message, hint }
    }
}

impl From<ounce_exec::ExecError> for Error {
    fn from(e: ounce_exec::ExecError) -> Self {
        let (message, hint) = message_and_hint(&e);
        Self::Usage { message, hint }
    }
}
