//! Data sets: rows of JSON Lines, JSON arrays and Parquet files, and what they mean.
//!
//! Idea: whatever the file, a row is a JSON value with a place that errors can name. What a row means, a text or a
//! conversation, is a [`RowFormat`], found from the first rows or given by the user.
//!
//! Invariants: one row is in memory at a time (and one page per column of a Parquet file), whatever the file says about
//! its size, and what that takes is known before ([`data_bytes`], [`row_bytes`]); a row that is broken leaves the
//! others readable, so that it may be passed over; a file that is broken as a whole is an error.
//!
//! Files in reading order: `source.rs` (JSON items in bounded memory), `parquet/`, this one (rows and their places),
//! `format.rs` (what rows mean), `conversation.rs` (rows to conversations).

mod conversation;
mod format;
#[cfg(feature = "parquet")]
mod parquet;
pub(crate) mod source;

use std::cell::Cell;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) use conversation::samples;
pub use conversation::{Conversation, Sample};
pub use format::{ColumnMapping, RowFormat, nearest};

use crate::error::{IoError, excerpt};
use crate::hash::SourceHash;
use crate::json::{check_readable, parse_at_most};
use source::{Item, JsonItems, RowPlace, encoding_hint};

/// Longest row of a file of JSON, in bytes.
pub const MAX_LINE_BYTES: usize = 16 << 20;
/// A row may have a value for so many bytes of the longest row. Of text there are more bytes to a value, of lists of
/// numbers fewer.
const BYTES_PER_VALUE: usize = 32;
/// What a value takes in memory beside its text.
const VALUE_BYTES: usize = 100;
/// In any budget there is room for rows of JSON of so many bytes.
const LEAST_ROW_BYTES: u64 = 256 << 10;
/// What a row takes while it becomes tokens, in its own lengths: its line, its strings twice, its values, its messages
/// as ours and as the template's, and what the template makes of them, twice.
const ROW_SHARE: u64 = 10;

const JSON_HINT: &str = "each row must be an object like {\"text\": \"...\"} or {\"messages\": [...]}, on one line \
                         or in an array";

/// What to do with a row that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnBadRow {
    /// Stop, naming it.
    #[default]
    Error,
    /// Pass it over and count it.
    Skip,
}

/// How rows are read.
#[derive(Debug, Clone, PartialEq)]
pub struct RowOptions {
    /// What rows mean; found out from the first of them where it is not given.
    pub format: Option<RowFormat>,
    /// Names of the file's keys.
    pub columns: ColumnMapping,
    /// What to do with broken rows.
    pub on_bad_row: OnBadRow,
    /// Longest row of JSON that there is room for; at most [`MAX_LINE_BYTES`].
    pub row_bytes: usize,
}

impl Default for RowOptions {
    fn default() -> Self {
        Self {
            format: None,
            columns: ColumnMapping::default(),
            on_bad_row: OnBadRow::default(),
            row_bytes: MAX_LINE_BYTES,
        }
    }
}

/// Where a row comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The line on which it begins, from 1.
    Line(u64),
    /// Its number in a Parquet file, from 1.
    Row(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line(n) => write!(f, "line {n}"),
            Self::Row(n) => write!(f, "row {n}"),
        }
    }
}

impl Place {
    /// The error for a row at this place of `path`.
    pub(crate) fn fault(
        self,
        path: &Path,
        reason: impl Into<String>,
        hint: impl Into<std::borrow::Cow<'static, str>>,
    ) -> IoError {
        match self {
            Self::Line(line) => IoError::bad_line(path, line, reason, hint),
            Self::Row(n) => IoError::bad_file(path, format!("row {n}: {}", reason.into()), hint),
        }
    }
}

/// A row as it lies in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct RawRow {
    /// Its content.
    pub value: Value,
    /// Where it lies.
    pub place: Place,
    /// Bytes that its content takes in memory, about.
    pub n_bytes: usize,
}

/// The rows of one file, in order.
#[derive(Debug)]
pub struct RowReader(Reader);

#[derive(Debug)]
enum Reader {
    Json(Box<JsonItems>),
    #[cfg(feature = "parquet")]
    Parquet(Box<parquet::ParquetRows>),
}

impl RowReader {
    /// Opens a file of rows; its name says which kind.
    ///
    /// # Errors
    /// `Missing`, `Read`; `BadFile` for a directory, or for a format that is not read.
    pub fn open(path: &Path) -> Result<Self, IoError> {
        Self::open_within(path, MAX_LINE_BYTES)
    }

    /// The same, with rows of JSON of at most `row_bytes`, where the memory has no room for the longest that are read
    /// at all. A longer one is an error for the whole file then: with more memory it is no broken row.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_within(path: &Path, row_bytes: usize) -> Result<Self, IoError> {
        Self::open_at(path, RowPlace::default(), row_bytes)
    }

    /// The same, to be read from `place` on.
    pub(crate) fn open_at(path: &Path, place: RowPlace, row_bytes: usize) -> Result<Self, IoError> {
        match FileKind::of(path)? {
            FileKind::Rows => {
                let row_bytes = row_bytes.min(MAX_LINE_BYTES);
                Ok(Self(Reader::Json(Box::new(JsonItems::open_at(path, place, row_bytes)?))))
            }
            #[cfg(feature = "parquet")]
            FileKind::Parquet => {
                Ok(Self(Reader::Parquet(Box::new(parquet::ParquetRows::open_at(path, place.at)?))))
            }
            #[cfg(not(feature = "parquet"))]
            FileKind::Parquet => Err(IoError::bad_file(
                path,
                "this build does not read Parquet",
                "build ounce with its feature `parquet`, or convert the file to .jsonl",
            )),
            FileKind::Text => Err(IoError::bad_file(
                path,
                "plain text has no rows",
                "rows are read from .jsonl, .json and .parquet files",
            )),
        }
    }

    /// The next row, or `None` after the last. The inner error is a row that is broken while the rows after it are
    /// still readable.
    ///
    /// # Errors
    /// `Read`; `BadLine` or `BadFile` where the file is broken as a whole.
    pub fn next_row(&mut self) -> Result<Option<Result<RawRow, IoError>>, IoError> {
        match &mut self.0 {
            Reader::Json(items) => next_json_row(items),
            #[cfg(feature = "parquet")]
            Reader::Parquet(rows) => Ok(rows.next_row()?.map(Ok)),
        }
    }

    /// Behind the row that was read last.
    pub(crate) fn place(&self) -> RowPlace {
        match &self.0 {
            Reader::Json(items) => items.place(),
            #[cfg(feature = "parquet")]
            Reader::Parquet(rows) => RowPlace { at: rows.n_read(), ..RowPlace::default() },
        }
    }

    /// What [`Self::place`] counts at the end of the file.
    pub(crate) fn end(&self) -> u64 {
        match &self.0 {
            Reader::Json(items) => items.file_bytes(),
            #[cfg(feature = "parquet")]
            Reader::Parquet(rows) => rows.n_claimed(),
        }
    }

    /// Length and hash of the file; valid after its last row.
    ///
    /// # Errors
    /// `Missing`, `Read`.
    pub(crate) fn fingerprint(&self) -> Result<SourceHash, IoError> {
        match &self.0 {
            Reader::Json(items) => Ok(items.fingerprint()),
            #[cfg(feature = "parquet")]
            Reader::Parquet(rows) => rows.fingerprint(),
        }
    }
}

/// What a file holds, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum FileKind {
    /// One text.
    Text,
    /// Rows of JSON.
    Rows,
    /// Rows of columns.
    Parquet,
}

impl FileKind {
    /// The kind that a file name stands for.
    pub(crate) fn of(path: &Path) -> Result<Self, IoError> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or("").to_lowercase();
        match extension.as_str() {
            "jsonl" | "ndjson" | "json" => Ok(Self::Rows),
            "parquet" => Ok(Self::Parquet),
            "arrow" | "csv" | "tsv" | "gz" | "zst" | "zip" | "xz" | "bz2" => {
                Err(IoError::bad_file(
                    path,
                    format!("data in .{extension} files is not read"),
                    "give plain text (.txt) or rows (.jsonl, .json, .parquet)",
                ))
            }
            _ => Ok(Self::Text),
        }
    }
}

/// Whether a data file can be opened, and is of a kind that is read.
///
/// # Errors
/// `Missing`, `Read`, `BadFile`.
pub fn check_file(path: &Path) -> Result<(), IoError> {
    check_readable(path)?;
    FileKind::of(path).map(drop)
}

fn next_json_row(items: &mut JsonItems) -> Result<Option<Result<RawRow, IoError>>, IoError> {
    let item = items.advance()?;
    let place = Place::Line(items.line());
    let fault = |reason: String, at: usize, hint: &'static str| {
        let near = excerpt(items.bytes(), at);
        let near = near.trim_end_matches("\\n");
        place.fault(items.path(), format!("{reason} near `{near}`"), hint)
    };
    let is_limited = items.row_bytes() < MAX_LINE_BYTES;
    let no_room = |what: String| {
        let hint = "raise `--memory`, or split the row into several";
        Err(fault(format!("{what} than the budget has room for"), 0, hint))
    };
    match item {
        Item::End => Ok(None),
        Item::TooLong if is_limited => {
            let mib = items.row_bytes() as f64 / (1 << 20) as f64;
            no_room(format!("the row is longer than {mib:.2} MiB, more"))
        }
        Item::TooLong => {
            let reason = format!("the row is longer than {} MiB", MAX_LINE_BYTES >> 20);
            Ok(Some(Err(fault(reason, 0, "split the row into several"))))
        }
        Item::Row => {
            let n_values = items.row_bytes() / BYTES_PER_VALUE;
            let n_left = Cell::new(n_values);
            let row = parse_row(items.bytes(), place, &n_left, fault);
            Ok(Some(match row {
                Err(_) if n_left.get() == 0 && is_limited => {
                    return no_room(format!("the row has over {n_values} values, more"));
                }
                Err(_) if n_left.get() == 0 => {
                    let reason = format!("the row has over {n_values} values");
                    Err(fault(reason, 0, "split the row into several"))
                }
                other => other,
            }))
        }
    }
}

fn parse_row(
    bytes: &[u8],
    place: Place,
    n_left: &Cell<usize>,
    fault: impl Fn(String, usize, &'static str) -> IoError,
) -> Result<RawRow, IoError> {
    if let Err(e) = std::str::from_utf8(bytes) {
        let reason = format!("is not UTF-8 (byte 0x{:02x})", bytes[e.valid_up_to()]);
        let hint = encoding_hint(if e.valid_up_to() == 0 { bytes } else { &[] });
        return Err(fault(reason, e.valid_up_to(), hint));
    }
    match parse_at_most(bytes, n_left) {
        Ok(value) => Ok(RawRow { n_bytes: memory_of(&value), value, place }),
        Err(e) => {
            let full = e.to_string();
            let reason = full.split(" at line ").next().unwrap_or(&full);
            let line_start = line_start(bytes, e.line());
            let at = line_start + e.column().saturating_sub(1);
            Err(fault(format!("not valid JSON: {reason}"), at, JSON_HINT))
        }
    }
}

/// Bytes that a value takes, about.
fn memory_of(value: &Value) -> usize {
    VALUE_BYTES
        + match value {
            Value::String(text) => text.len(),
            Value::Array(list) => list.iter().map(memory_of).sum(),
            Value::Object(map) => map.iter().map(|(key, v)| key.len() + memory_of(v)).sum(),
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
        }
}

/// Most bytes that reading these files takes, beside tokenizing: a row of JSON, or footer, pages and row of a Parquet
/// file. What cannot be read takes none; whoever reads it says why.
pub fn data_bytes<'a>(paths: impl IntoIterator<Item = &'a Path>) -> u64 {
    let bytes_of = |path: &Path| match FileKind::of(path) {
        Ok(FileKind::Rows) => ROW_SHARE * LEAST_ROW_BYTES,
        #[cfg(feature = "parquet")]
        Ok(FileKind::Parquet) => parquet::memory_of(path).unwrap_or(0),
        _ => 0,
    };
    paths.into_iter().map(bytes_of).max().unwrap_or(0)
}

/// [`data_bytes`] where all of the files are open at once, and one row at a time becomes tokens.
pub fn data_bytes_at_once<'a>(paths: impl IntoIterator<Item = &'a Path>) -> u64 {
    let (mut longest, mut open) = (0, 0);
    for path in paths {
        match FileKind::of(path) {
            #[cfg(feature = "parquet")]
            Ok(FileKind::Parquet) => open += data_bytes([path]),
            _ => longest = data_bytes([path]).max(longest),
        }
    }
    longest + open
}

/// Longest row of JSON for which there is room, where a budget leaves `spare_bytes` beside tokenizing and
/// [`data_bytes`].
pub fn row_bytes(spare_bytes: u64) -> usize {
    (LEAST_ROW_BYTES + spare_bytes / ROW_SHARE).min(MAX_LINE_BYTES as u64) as usize
}

/// Where line `line` (from 1) of `bytes` begins.
fn line_start(bytes: &[u8], line: usize) -> usize {
    let newlines = bytes.iter().enumerate().filter(|(_, b)| **b == b'\n').map(|(i, _)| i + 1);
    std::iter::once(0).chain(newlines).nth(line.saturating_sub(1)).unwrap_or(0)
}

/// Whether the rows of these files are taken one by one, as conversations are, and not as one stream of text.
///
/// # Errors
/// As [`RowFormat::detect`]; `BadFile` for plain text beside conversations.
pub fn has_conversations(paths: &[PathBuf], options: &RowOptions) -> Result<bool, IoError> {
    let (mut rows, mut text) = (None, None);
    for path in paths {
        let format = match (FileKind::of(path)?, options.format) {
            (FileKind::Text, None | Some(RowFormat::Text)) => None,
            (FileKind::Text, Some(format)) => {
                let reason = format!(
                    "is plain text by its name, which has no rows of the format `{format}`"
                );
                let hint = "call it .jsonl, .json or .parquet, or leave `--dataset-format` out";
                return Err(IoError::bad_file(path, reason, hint));
            }
            (_, Some(format)) => Some(format),
            (_, None) => Some(RowFormat::detect(path, options)?),
        };
        if format.is_some() {
            format::check_columns(path, options)?;
        }
        match format {
            None => text = Some(path),
            Some(RowFormat::Text) => {}
            Some(format) => rows = Some((path, format)),
        }
    }
    match (rows, text) {
        (Some((path, format)), Some(text)) => Err(IoError::bad_file(
            text,
            format!("plain text cannot be mixed with the rows of {} (`{format}`)", path.display()),
            "put each text into a row {\"text\": \"...\"} of a .jsonl file",
        )),
        (rows, _) => Ok(rows.is_some()),
    }
}
