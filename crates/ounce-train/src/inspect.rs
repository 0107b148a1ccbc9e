//! `ounce data inspect`: what a run would make of data files, without a run.
//!
//! Files are read to their end; nothing is written. Rows of text are only counted.

use std::path::{Path, PathBuf};

use ounce_io::dataset::has_conversations;
use ounce_io::{
    EncodedRow, FileNotes, IdTable, PieceStart, RowTokens, TextPieces, Tokenizer, Words,
};
use serde::Serialize;

use crate::error::message_and_hint;
use crate::limits::Limits;
use crate::model::Model;
use crate::tokenize::{RowRequest, file_lines, load_template, now_s};
use crate::{Environment, Result, Settings};

/// What to look at.
#[derive(Debug, Clone)]
pub struct InspectSettings {
    /// Data files.
    pub files: Vec<PathBuf>,
    /// Rows whose tokens are shown, of each file.
    pub n_samples: usize,
}

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct InspectRecord {
    /// About template and tokenizer.
    pub remarks: Vec<String>,
    /// Each file.
    pub files: Vec<FileRecord>,
}

/// One file.
#[derive(Debug, Clone, Serialize)]
pub struct FileRecord {
    /// The file.
    pub path: PathBuf,
    /// How it is read; `text` for one stream of text.
    pub format: String,
    /// Rows of the file.
    pub rows: u64,
    /// Broken rows that would be passed over.
    pub bad_rows: u64,
    /// Samples that would be supervised from.
    pub samples: u64,
    /// Samples without anything to learn.
    pub without_answer: u64,
    /// Samples longer than `max_length`.
    pub truncated: u64,
    /// Samples that lose a part of an answer by that.
    pub cut_answers: u64,
    /// Tokens of the samples.
    pub tokens: u64,
    /// Those of them that are supervised.
    pub supervised: u64,
    /// Tokens of the longest sample, before it is cut.
    pub longest: u64,
    /// Samples from `2^k` tokens on and below `2^(k+1)`.
    pub histogram: Vec<u64>,
    /// Lines for people.
    #[serde(skip)]
    pub lines: Vec<String>,
    /// The first samples, token by token.
    pub shown: Vec<Vec<TokenRecord>>,
}

/// One token of a sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TokenRecord {
    /// Its id.
    pub id: u32,
    /// Its text.
    pub text: String,
    /// Whether it is supervised.
    pub supervised: bool,
}

/// Reads the files as a run with these settings would.
///
/// # Errors
/// A model, tokenizer or data that is missing or wrong.
pub fn inspect(
    settings: &Settings,
    wanted: &InspectSettings,
    env: &Environment,
) -> Result<InspectRecord> {
    let model = Model::open(settings, env)?;
    let tokenizer = Tokenizer::load(&model.dir)?;
    let max_length = model.max_length(settings) as usize;
    let request = RowRequest::of(settings, max_length as u64);
    let options = request.options();
    let template = load_template(&model.dir, &tokenizer, now_s())?;
    let rows = RowTokens {
        tokenizer: &tokenizer,
        template: &template,
        options: &options,
        max_length,
        n_workers: Limits::of(settings).n_threads,
    };
    let table = IdTable::new(&tokenizer)?;
    let mut record = InspectRecord { remarks: Vec::new(), files: Vec::new() };
    // As in a run: beside conversations, rows of text are samples, too. Files that no run takes together are looked at
    // one by one.
    let together = has_conversations(&wanted.files, &options);
    let mut has_samples = false;
    for path in &wanted.files {
        let are_samples = match together {
            Ok(are_samples) => are_samples,
            Err(_) => has_conversations(std::slice::from_ref(path), &options)?,
        };
        has_samples |= are_samples;
        if are_samples {
            let (notes, shown) = rows.inspect(path, wanted.n_samples)?;
            record.files.push(file_record(&notes, &shown, &table, max_length));
        } else {
            record.files.push(text_record(path, &tokenizer, &options)?);
        }
    }
    if has_samples {
        record.remarks = rows.remarks(&rows.end_of_turn());
    }
    if let Err(e) = together {
        let (message, _) = message_and_hint(&e);
        record.remarks.push(format!("warning: a run refuses these files together: {message}"));
    }
    Ok(record)
}

fn file_record(
    notes: &FileNotes,
    shown: &[EncodedRow],
    table: &IdTable,
    max_length: usize,
) -> FileRecord {
    let c = &notes.counts;
    let token = |(id, supervised)| {
        let text = String::from_utf8_lossy(table.token_bytes(id)).into_owned();
        TokenRecord { id, text, supervised }
    };
    FileRecord {
        path: notes.path.clone(),
        format: notes.format.clone(),
        rows: c.n_rows,
        bad_rows: c.n_bad,
        samples: c.n_kept,
        without_answer: c.n_without_answer,
        truncated: c.n_truncated,
        cut_answers: c.n_cut_answers,
        tokens: c.n_tokens,
        supervised: c.n_supervised,
        longest: c.longest,
        histogram: c.histogram.clone(),
        lines: file_lines(notes, max_length),
        shown: shown.iter().map(|row| row.tokens().map(token).collect()).collect(),
    }
}

/// A text, or rows of texts, as one stream.
fn text_record(
    path: &Path,
    tokenizer: &Tokenizer,
    options: &ounce_io::RowOptions,
) -> Result<FileRecord> {
    let mut pieces = TextPieces::open_with(&[path.to_path_buf()], options)?;
    let (mut tokens, mut rows, mut ids, mut words) = (0, 0, Vec::new(), Words::default());
    while let Some(piece) = pieces.next_piece()? {
        ids.clear();
        rows += u64::from(matches!(piece.start, PieceStart::Row { .. }));
        let is_joined = piece.start == PieceStart::Row { joined: true };
        tokens += u64::from(is_joined && tokenizer.eos_id().is_some());
        tokenizer.encode_piece(&piece, &mut words, &mut ids)?;
        tokens += ids.len() as u64;
    }
    let name = path.display();
    Ok(FileRecord {
        path: path.to_path_buf(),
        format: "text".to_owned(),
        rows,
        bad_rows: pieces.n_bad(),
        samples: rows,
        without_answer: 0,
        truncated: 0,
        cut_answers: 0,
        tokens,
        supervised: tokens,
        longest: 0,
        histogram: Vec::new(),
        lines: vec![format!("{name}: {rows} rows of text in one stream of {tokens} tokens")],
        shown: Vec::new(),
    })
}
