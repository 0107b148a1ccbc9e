//! What can go wrong between Ounce and the disk: one enum whose messages name the file (and line, key or tensor), give
//! the numbers, and end with a `hint:` line, plus the three classes that the binary maps to exit codes.

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

/// Longest text of a file that a message repeats whole.
const MAX_SHOWN_BYTES: usize = 400;

/// A failure to read, understand or write bytes on disk.
#[derive(Debug, thiserror::Error)]
pub enum IoError {
    /// A request that makes no sense, whatever the files hold.
    #[error("{what}\nhint: {hint}")]
    Usage {
        /// What was asked for.
        what: String,
        /// What to ask for instead.
        hint: Cow<'static, str>,
    },
    /// A file or directory that does not exist.
    #[error("{} does not exist\nhint: {hint}", path.display())]
    Missing {
        /// The path as the caller gave it.
        path: PathBuf,
        /// Where such a file comes from.
        hint: Cow<'static, str>,
    },
    /// The operating system refused or failed to read an existing file.
    #[error("cannot read {}: {source}\nhint: check its permissions and the disk it lies on", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The operating system refused or failed to write; whatever was there before is untouched.
    #[error("cannot write {} ({bytes} bytes): {source}\nhint: {}", path.display(), write_hint(source))]
    Write {
        /// The file or directory that was to be written.
        path: PathBuf,
        /// Bytes that the failed operation was about to write, or that the file holds so far.
        bytes: u64,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A checkpoint could not be saved; those before it are untouched.
    #[error(
        "cannot save {} ({needed_bytes} bytes are needed in all): {source}\nhint: {}; the checkpoints before it are \
         untouched",
        path.display(),
        write_hint(source)
    )]
    Save {
        /// The file of the checkpoint, or the checkpoint itself.
        path: PathBuf,
        /// Bytes of the whole checkpoint.
        needed_bytes: u64,
        /// The operating system's reason.
        source: io::Error,
    },
    /// A file or directory as a whole is not what it should be.
    #[error("{}: {reason}\nhint: {hint}", path.display())]
    BadFile {
        /// The file.
        path: PathBuf,
        /// What is wrong, with numbers.
        reason: String,
        /// What to do about it.
        hint: Cow<'static, str>,
    },
    /// One line of a text or JSON file is wrong.
    #[error("{}:{line}: {reason}\nhint: {hint}", path.display())]
    BadLine {
        /// The file.
        path: PathBuf,
        /// Line, counted from 1.
        line: u64,
        /// What is wrong, with an excerpt.
        reason: String,
        /// What to do about it.
        hint: Cow<'static, str>,
    },
    /// One tensor of a safetensors file is wrong or missing.
    #[error("{}: tensor `{tensor}`: {reason}\nhint: {hint}", path.display())]
    BadTensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// What is wrong, with numbers.
        reason: String,
        /// What to do about it.
        hint: Cow<'static, str>,
    },
    /// Text that the tokenizer cannot encode, or ids that it cannot decode.
    #[error("{reason}\nhint: {hint}")]
    Token {
        /// What is wrong, with an excerpt.
        reason: String,
        /// What to do about it.
        hint: Cow<'static, str>,
    },
    /// Data too short to cut even one block from.
    #[error(
        "{} holds {n_tokens} tokens, fewer than the {n_needed} of one block\nhint: {hint}",
        path.display()
    )]
    TooFewTokens {
        /// The data file, or the first of several.
        path: PathBuf,
        /// Tokens in the data.
        n_tokens: u64,
        /// Tokens that one block needs.
        n_needed: u64,
        /// What to do about it.
        hint: Cow<'static, str>,
    },
}

/// What kind of mistake an error is; the binary gives each its exit code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// The request is wrong (exit 2).
    Usage,
    /// A model or data file is missing or wrong (exit 4).
    BadInput,
    /// Reading or writing failed: disk full, no permission, a failing disk (exit 6).
    WriteFailed,
}

impl IoError {
    /// The class of the error, from which the exit code follows.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Usage { .. } => ErrorKind::Usage,
            Self::Missing { .. }
            | Self::BadFile { .. }
            | Self::BadLine { .. }
            | Self::BadTensor { .. }
            | Self::Token { .. }
            | Self::TooFewTokens { .. } => ErrorKind::BadInput,
            Self::Read { .. } | Self::Write { .. } | Self::Save { .. } => ErrorKind::WriteFailed,
        }
    }

    /// An error of opening or reading `path`: `Missing` where it is not there, `Read` otherwise.
    pub(crate) fn reading(path: &Path, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => {
                Self::Missing { path: path.into(), hint: "check the path for a typo".into() }
            }
            io::ErrorKind::UnexpectedEof => Self::BadFile {
                path: path.into(),
                reason: "the file ended early: it changed while it was read".into(),
                hint: "do not write to the file while it is in use".into(),
            },
            _ => Self::Read { path: path.into(), source },
        }
    }

    /// An error of writing `bytes` bytes to `path`.
    pub(crate) fn writing(path: &Path, bytes: u64, source: io::Error) -> Self {
        Self::Write { path: path.into(), bytes, source }
    }

    /// A file that is wrong as a whole.
    pub(crate) fn bad_file(
        path: &Path,
        reason: impl Into<String>,
        hint: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::BadFile { path: path.into(), reason: shorten(&reason.into()), hint: hint.into() }
    }

    /// A wrong line (from 1) of a text or JSON file.
    pub(crate) fn bad_line(
        path: &Path,
        line: u64,
        reason: impl Into<String>,
        hint: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::BadLine {
            path: path.into(),
            line,
            reason: shorten(&reason.into()),
            hint: hint.into(),
        }
    }

    /// A wrong or missing tensor.
    pub(crate) fn bad_tensor(
        path: &Path,
        tensor: &str,
        reason: impl Into<String>,
        hint: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::BadTensor {
            path: path.into(),
            tensor: shorten(tensor),
            reason: shorten(&reason.into()),
            hint: hint.into(),
        }
    }
}

/// What helps against a failed write, by its cause.
fn write_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free space on that disk or choose another output directory"
        }
        io::ErrorKind::FileTooLarge => "the file system or `ulimit -f` limits the size of a file",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "choose an output directory that you may write to"
        }
        _ => "check that the output directory exists and can be written to",
    }
}

/// `text` for an error message: what came from a file may be as long as the file and hold anything, so the middle of a
/// long text is left out and control characters are escaped.
pub(crate) fn shorten(text: &str) -> String {
    let escaped = |part: &str| -> String {
        let spell =
            |c: char| if c.is_control() { c.escape_default().to_string() } else { c.into() };
        part.chars().map(spell).collect()
    };
    if text.len() <= MAX_SHOWN_BYTES {
        return escaped(text);
    }
    let boundary = |from: usize| {
        (from..=text.len()).find(|&at| text.is_char_boundary(at)).expect("the end of a text is one")
    };
    let start = &text[..boundary(MAX_SHOWN_BYTES / 2)];
    let end = &text[boundary(text.len() - MAX_SHOWN_BYTES / 4)..];
    format!("{} ... {}", escaped(start), escaped(end))
}

/// At most 40 characters of `text` around byte `at`, with control characters escaped, for an error message.
pub(crate) fn excerpt(text: &[u8], at: usize) -> String {
    let start = at.saturating_sub(24).min(text.len());
    let end = (at + 32).min(text.len());
    let lossy = String::from_utf8_lossy(&text[start..end]);
    // A cut inside a character leaves replacement characters at the edges only.
    let trimmed = lossy.trim_matches('\u{fffd}');
    let mut shown = String::new();
    for c in trimmed.chars().take(40) {
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_stays_short_and_on_its_line_whatever_the_file_holds() {
        let text = format!("unknown field `{}` at the end", "\u{1b}\u{e9}".repeat(1000));
        let error = IoError::bad_file(Path::new("x.json"), text, "look").to_string();
        assert!(error.len() < 4000 && error.starts_with("x.json: unknown field `\\u{1b}\u{e9}"));
        assert!(
            error.ends_with("` at the end\nhint: look") && !error.contains('\u{1b}'),
            "{error}"
        );
        let error = IoError::bad_tensor(Path::new("x"), "a\nb", "is missing", "look").to_string();
        assert_eq!(error, "x: tensor `a\\nb`: is missing\nhint: look");
    }
}
