//! What the rows of a file mean, and how that is found out.
//!
//! Rule: the keys of the first row decide, the most telling keys first. All rows of a file have one format; a row that
//! is not of it is a broken row. The user may name the format, and say which of the file's keys stands for which key of
//! the format.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde_json::{Map, Value};

use super::{Place, RawRow, RowReader};
use crate::dataset::RowOptions;
use crate::error::IoError;

/// First rows that are looked at.
const N_LOOKED_AT: usize = 16;

/// The meaning of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowFormat {
    /// `{"text"}`: a text, every token of which is supervised.
    Text,
    /// `{"messages": [{"role", "content"}]}`, with `tools` if there are any.
    Messages,
    /// `{"prompt", "completion"}`: two strings, or two lists of messages.
    PromptCompletion,
    /// `{"instruction", "input", "output"}`, with `system` and `history` if there are any.
    Alpaca,
    /// `{"conversations": [{"from", "value"}]}`, with `system` and `tools` if there are any.
    ShareGpt,
    /// `{"prompt", "chosen", "rejected"}`, of which the chosen answer is supervised.
    Preference,
    /// `{"question", "answer"}`.
    QuestionAnswer,
    /// `{"turns", "reference"}`: questions of a benchmark, with answers to some of them.
    Turns,
    /// `{"instruction", "instances": [{"input", "output"}]}`.
    Instances,
}

/// Each format, the name it is called by, and the keys that it needs; the most telling come first.
const FORMATS: [(RowFormat, &str, &[&str]); 9] = [
    (RowFormat::Preference, "preference", &["chosen"]),
    (RowFormat::Messages, "messages", &["messages"]),
    (RowFormat::ShareGpt, "sharegpt", &["conversations"]),
    (RowFormat::PromptCompletion, "prompt-completion", &["prompt", "completion"]),
    (RowFormat::Instances, "instances", &["instruction", "instances"]),
    (RowFormat::Alpaca, "alpaca", &["instruction", "output"]),
    (RowFormat::QuestionAnswer, "question-answer", &["question", "answer"]),
    (RowFormat::Turns, "turns", &["turns"]),
    (RowFormat::Text, "text", &["text"]),
];

impl RowFormat {
    /// The format of that name.
    pub fn parse(name: &str) -> Option<Self> {
        let alike = |known: &&(Self, &str, &[&str])| known.1 == name.replace('_', "-");
        FORMATS.iter().find(alike).map(|f| f.0)
    }

    /// Every name.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FORMATS.iter().map(|f| f.1)
    }

    /// The keys that every row has.
    pub fn keys(self) -> &'static [&'static str] {
        FORMATS.iter().find(|f| f.0 == self).expect("every format is listed").2
    }

    /// The first format whose keys a row has.
    fn of_row(row: &Map<String, Value>, columns: &ColumnMapping) -> Option<Self> {
        let has = |key: &&str| columns.get(row, key).is_some_and(|v| !v.is_null());
        FORMATS.iter().find(|f| f.2.iter().all(has)).map(|f| f.0)
    }

    /// The format of the rows of `path`, by its first rows.
    ///
    /// # Errors
    /// Reading the file; `BadLine` or `BadFile` where none of the first rows is of a known format.
    pub fn detect(path: &Path, options: &RowOptions) -> Result<Self, IoError> {
        let (mut rows, columns) =
            (RowReader::open_within(path, options.row_bytes)?, &options.columns);
        let mut first_fault = None;
        for _ in 0..N_LOOKED_AT {
            match rows.next_row()? {
                None => break,
                Some(Err(fault)) => first_fault = first_fault.or(Some(fault)),
                Some(Ok(row)) => {
                    let object = row.value.as_object();
                    if let Some(format) = object.and_then(|o| Self::of_row(o, columns)) {
                        return Ok(format);
                    }
                    let fault = || Some(unknown(path, row.place, &row.value, columns));
                    first_fault = first_fault.or_else(fault);
                }
            }
        }
        Err(first_fault.unwrap_or_else(|| {
            IoError::bad_file(path, "holds no rows", "give a file with at least one row")
        }))
    }
}

/// Refuses a mapped key that none of the first rows has where it looks like one that they have: a key that is not
/// needed would be read as empty.
///
/// # Errors
/// Reading the file; `BadFile` with the key that was meant.
pub(super) fn check_columns(path: &Path, options: &RowOptions) -> Result<(), IoError> {
    if options.columns.pairs().next().is_none() {
        return Ok(());
    }
    let mut rows = RowReader::open_within(path, options.row_bytes)?;
    let mut keys = BTreeSet::new();
    for _ in 0..N_LOOKED_AT {
        match rows.next_row()? {
            None => break,
            Some(Ok(RawRow { value: Value::Object(row), .. })) => {
                keys.extend(row.into_iter().map(|(key, _)| key));
            }
            Some(_) => {}
        }
    }
    for (key, name) in options.columns.pairs().filter(|(_, name)| !keys.contains(*name)) {
        if let Some(meant) = nearest(name, keys.iter().map(String::as_str)) {
            let reason = format!(
                "`--column-mapping {key}={name}`: none of the first rows has a key `{name}`"
            );
            return Err(IoError::bad_file(path, reason, format!("the nearest key is `{meant}`")));
        }
    }
    Ok(())
}

/// The candidate most like `word`, if any is alike.
pub fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let scored = candidates.map(|c| (strsim::jaro_winkler(word, c), c));
    scored.max_by(|a, b| a.0.total_cmp(&b.0)).filter(|(score, _)| *score > 0.7).map(|(_, c)| c)
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(FORMATS.iter().find(|f| f.0 == *self).expect("every format is listed").1)
    }
}

/// The error for a row of no known format.
fn unknown(path: &Path, place: Place, row: &Value, columns: &ColumnMapping) -> IoError {
    let Some(object) = row.as_object() else {
        let start: String = row.to_string().chars().take(40).collect();
        let reason = format!("the row is not an object, but `{start}`");
        return place.fault(path, reason, "each row must be an object like {\"text\": \"...\"}");
    };
    let keys: Vec<&str> = object.keys().map(String::as_str).take(12).collect();
    let missing = columns.pairs().find(|(_, name)| !object.contains_key(*name));
    if let Some((key, name)) = missing {
        let reason = format!("`--column-mapping {key}={name}`: the row has no key `{name}`");
        return place.fault(path, reason, format!("its keys are {}", keys.join(", ")));
    }
    let reason = format!("rows with the keys `{}` are of no known format", keys.join("`, `"));
    let hint = "name the keys with `--column-mapping`, for instance \
                `--column-mapping prompt=QUESTION,completion=ANSWER`";
    place.fault(path, reason, hint)
}

/// Which of the file's keys stands for which key of the format.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ColumnMapping(BTreeMap<String, String>);

impl ColumnMapping {
    /// Every key of a row that a format reads.
    pub const KEYS: [&'static str; 19] = [
        "chosen",
        "rejected",
        "messages",
        "conversations",
        "prompt",
        "completion",
        "label",
        "instruction",
        "instances",
        "input",
        "output",
        "question",
        "answer",
        "turns",
        "reference",
        "text",
        "system",
        "history",
        "tools",
    ];

    /// From pairs of (key of the format, key of the file).
    pub fn new(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(pairs.into_iter().collect())
    }

    /// The pairs, by key of the format.
    pub fn pairs(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(a, b)| (a.as_str(), b.as_str()))
    }

    /// What a row holds for a key of the format.
    pub(crate) fn get<'a>(&self, row: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
        debug_assert!(Self::KEYS.contains(&key), "a key that no mapping may name: {key}");
        row.get(self.name(key))
    }

    /// The file's name for a key of the format.
    pub(crate) fn name<'a>(&'a self, key: &'a str) -> &'a str {
        self.0.get(key).map_or(key, String::as_str)
    }
}
