//! Tokenizing in a child process, before the arena is touched.
//!
//! A tokenizer takes tens of MiB. What stays of it: token files on disk, read with `pread`, and the table from id to
//! bytes.

use std::path::{Path, PathBuf};

use ounce_io::chat_template::ChatTemplate;
use ounce_io::dataset::{ColumnMapping, OnBadRow, RowFormat, has_conversations, row_bytes};
use ounce_io::{
    FileNotes, IdTable, RowNotes, RowOptions, RowTokens, StreamNotes, TokenCache, Tokenizer,
    data_fingerprint,
};
use serde::{Deserialize, Serialize};

use crate::baseline::PROCESS_BYTES;
use crate::budget::peak_resident_bytes;
use crate::child::Working;
use crate::error::message_and_hint;
use crate::limits::Limits;
use crate::settings::{BadRows, Columns};
use crate::text_table::TextTable;
use crate::{Environment, Error, Observer, Result, Settings};

/// The kind of work.
pub(crate) const WORK: &str = "tokenize";

/// What the child is asked to do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Request {
    /// Model directory with the tokenizer.
    pub(crate) tokenizer: PathBuf,
    /// Where token files and the table go.
    pub(crate) cache_dir: PathBuf,
    /// Data sets, each of several files, to be turned into token files.
    pub(crate) streams: Vec<Vec<PathBuf>>,
    /// How their rows are read.
    pub(crate) rows: RowRequest,
    /// Text to encode as a prompt.
    pub(crate) prompt: Option<Prompt>,
    /// Threads that encode.
    pub(crate) n_threads: usize,
    /// The time that chat templates write, in seconds since 1970.
    pub(crate) now_s: u64,
}

/// A text that is continued.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Prompt {
    /// The flag that gave it.
    pub(crate) flag: String,
    pub(crate) text: String,
    /// Whether it is nobody's wish: one that the tokenizer has no words for is then left out.
    pub(crate) is_default: bool,
}

impl Prompt {
    /// Its ids.
    ///
    /// # Errors
    /// A character that the tokenizer does not know.
    fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        match tokenizer.encode_prompt(&self.text) {
            Err(_) if self.is_default => Ok(tokenizer.encode_prompt("")?),
            Err(e) => {
                let (message, _) = message_and_hint(&e);
                Err(Error::Input {
                    message: format!("`{}`: {message}", self.flag),
                    hint: "give another one, of characters that the model was made for".to_owned(),
                })
            }
            Ok(ids) => Ok(ids),
        }
    }
}

/// How the rows of data files are read and cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct RowRequest {
    pub(crate) format: Option<String>,
    pub(crate) columns: Vec<(String, String)>,
    pub(crate) skips_bad_rows: bool,
    pub(crate) max_length: u64,
    /// Longest row of JSON that there is room for.
    pub(crate) row_bytes: usize,
}

impl RowRequest {
    /// What the settings say.
    pub(crate) fn of(settings: &Settings, max_length: u64) -> Self {
        Self {
            format: settings.dataset_format.clone(),
            columns: settings.column_mapping.iter().flat_map(Columns::pairs).collect(),
            skips_bad_rows: settings.on_bad_row == BadRows::Skip,
            max_length,
            row_bytes: ounce_io::MAX_LINE_BYTES,
        }
    }

    /// With rows that fit into the budget while the tokenizer in `dir` is loaded.
    pub(crate) fn within(self, dir: &Path, limits: &Limits) -> Self {
        let taken_bytes = PROCESS_BYTES + bytes(dir, n_threads(dir, limits), limits);
        let spare_bytes = limits.budget_bytes.saturating_sub(taken_bytes);
        Self { row_bytes: row_bytes(spare_bytes), ..self }
    }

    /// With rows for which there is room in any budget: what is left belongs to the steps.
    pub(crate) fn beside_the_steps(self) -> Self {
        Self { row_bytes: row_bytes(0), ..self }
    }

    /// The same in the words of `ounce-io`.
    pub(crate) fn options(&self) -> RowOptions {
        RowOptions {
            // The settings were checked.
            format: self.format.as_deref().and_then(RowFormat::parse),
            columns: ColumnMapping::new(self.columns.iter().cloned()),
            on_bad_row: if self.skips_bad_rows { OnBadRow::Skip } else { OnBadRow::Error },
            row_bytes: self.row_bytes,
        }
    }
}

/// What the child found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// One token file per stream.
    pub(crate) token_files: Vec<PathBuf>,
    /// The table from id to bytes.
    pub(crate) text_table: PathBuf,
    /// Ids of the prompt.
    pub(crate) prompt_ids: Vec<u32>,
    /// Ids at which generation ends.
    pub(crate) stop_ids: Vec<u32>,
    /// Ids of the tokenizer.
    pub(crate) vocab_size: u64,
    /// Highest resident memory of the child.
    pub(crate) rss_peak_bytes: u64,
    /// What is worth a line about the data.
    pub(crate) notes: Vec<String>,
}

/// The child's work: token files, and the table from id to bytes.
///
/// # Errors
/// Files that are missing or wrong.
pub(crate) fn tokenize(request: &Request) -> Result<Answer> {
    std::fs::create_dir_all(&request.cache_dir).map_err(|e| Error::file(&request.cache_dir, &e))?;
    let tokenizer = Tokenizer::load(&request.tokenizer)?;
    let options = request.rows.options();
    let (mut token_files, mut notes) = (Vec::with_capacity(request.streams.len()), Vec::new());
    for files in &request.streams {
        let path = if has_conversations(files, &options)? {
            row_file(request, files, &options, &tokenizer, &mut notes)?
        } else {
            stream_file(request, files, &options, &tokenizer, &mut notes)?
        };
        token_files.push(path);
    }
    let text_table = request.cache_dir.join(format!("{:016x}.ids", tokenizer.fingerprint()));
    TextTable::write(&text_table, &IdTable::new(&tokenizer)?)?;
    let prompt_ids = request.prompt.as_ref().map(|prompt| prompt.encode(&tokenizer)).transpose()?;
    Ok(Answer {
        token_files,
        text_table,
        prompt_ids: prompt_ids.unwrap_or_default(),
        stop_ids: tokenizer.stop_ids().to_vec(),
        vocab_size: tokenizer.vocab_size() as u64,
        rss_peak_bytes: peak_resident_bytes(),
        notes,
    })
}

/// The token file of a text, made anew unless it is there and fresh.
fn stream_file(
    request: &Request,
    files: &[PathBuf],
    options: &RowOptions,
    tokenizer: &Tokenizer,
    notes: &mut Vec<String>,
) -> Result<PathBuf> {
    let fingerprint = data_fingerprint(tokenizer, options, None);
    let path = ounce_io::cache_path(&request.cache_dir, files, fingerprint)?;
    let cache = match TokenCache::open_fresh(&path, files, fingerprint)? {
        Some(cache) => cache,
        None => ounce_io::tokenize_to_cache_with(
            files,
            options,
            tokenizer,
            fingerprint,
            &path,
            request.n_threads,
        )?,
    };
    let n_bad = cache.notes::<StreamNotes>()?.n_bad;
    if n_bad > 0 {
        notes.push(format!("warning: {n_bad} broken rows were passed over"));
    }
    Ok(path)
}

/// The token file of samples, made anew unless it is there and fresh; says what is in it.
fn row_file(
    request: &Request,
    files: &[PathBuf],
    options: &RowOptions,
    tokenizer: &Tokenizer,
    notes: &mut Vec<String>,
) -> Result<PathBuf> {
    let template = load_template(&request.tokenizer, tokenizer, request.now_s)?;
    let max_length = request.rows.max_length as usize;
    let fingerprint = data_fingerprint(tokenizer, options, Some((&template, max_length)));
    let path = ounce_io::cache_path(&request.cache_dir, files, fingerprint)?;
    let cache = if let Some(cache) = TokenCache::open_fresh(&path, files, fingerprint)? {
        cache
    } else {
        let n_workers = request.n_threads;
        let rows = RowTokens { tokenizer, template: &template, options, max_length, n_workers };
        rows.write_cache(files, fingerprint, &path)?
    };
    let said: RowNotes = cache.notes()?;
    notes.extend(said.remarks);
    notes.extend(said.files.iter().flat_map(|file| file_lines(file, max_length)));
    Ok(path)
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}

/// When this day began, in UTC, in seconds since 1970: rows that hold the date are the same all day.
pub(crate) fn today_s() -> u64 {
    now_s() / 86400 * 86400
}

/// The chat template of a model directory, to which it is `now_s`.
pub(crate) fn load_template(dir: &Path, tokenizer: &Tokenizer, now_s: u64) -> Result<ChatTemplate> {
    let is_token = |text: &str| tokenizer.added_token_id(text).is_some();
    let template = ChatTemplate::load(dir, now_s, tokenizer.adds_bos(), is_token)?;
    // Only what the tokenizer makes one token of.
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.token_name(id)).filter(|t| is_token(t));
    let tokens = [("bos_token", name(tokenizer.bos_id())), ("eos_token", name(tokenizer.eos_id()))];
    Ok(template.or_special_tokens(tokens))
}

/// What is said of a file of rows: what was found, then what was lost.
pub(crate) fn file_lines(file: &FileNotes, max_length: usize) -> Vec<String> {
    let (name, c) = (file.path.display(), &file.counts);
    let share = 100.0 * c.n_supervised as f64 / c.n_tokens.max(1) as f64;
    let mut lines = vec![format!(
        "{name}: {} rows read as `{}`; {} samples of {} tokens, {share:.1} % of them supervised",
        c.n_rows, file.format, c.n_kept, c.n_tokens
    )];
    let mut warn = |n: u64, what: &str| {
        if n > 0 {
            lines.push(format!("warning: {name}: {n} {what}"));
        }
    };
    warn(c.n_bad, "broken rows were passed over");
    warn(
        c.n_without_answer,
        "samples have nothing to learn (no answer, or none before the cut) and are left out",
    );
    warn(
        c.n_truncated,
        &format!(
            "samples, those left out among them, are longer than {max_length} tokens and cut, {} of them before the \
             end of their answers",
            c.n_cut_answers
        ),
    );
    warn(
        c.n_lost_answers,
        "answers were not found in what the template made of them: not supervised",
    );
    warn(c.n_straddling, "samples have a token that is partly prompt and partly answer");
    lines
}

/// Has a child process tokenize, which is killed where the observer asks to stop.
pub(crate) fn ask(env: &Environment, request: &Request, observer: &dyn Observer) -> Result<Answer> {
    Working::start(&env.worker, WORK, request)?.finish(observer)
}

/// Most that tokenizing the data files of a run takes besides code and libraries.
pub(crate) fn bytes(dir: &Path, n_threads: usize, limits: &Limits) -> u64 {
    ounce_io::tokenizing_bytes(dir, n_threads) + limits.data_bytes
}

/// Threads that encode: those of the run, or as many fewer as fit into its budget, at least one.
pub(crate) fn n_threads(dir: &Path, limits: &Limits) -> usize {
    let fits = |n: &usize| PROCESS_BYTES + bytes(dir, *n, limits) <= limits.budget_bytes;
    (1..=limits.n_threads).rev().find(fits).unwrap_or(1)
}

/// Where token files go.
pub(crate) fn cache_dir(env: &Environment) -> PathBuf {
    env.cache_dir.join("tokens")
}

/// Checks that the tokenizer's ids fit the model.
pub(crate) fn check_vocab(tokenizer: &Path, answer: &Answer, model_vocab: u64) -> Result<()> {
    if answer.vocab_size <= model_vocab {
        return Ok(());
    }
    Err(Error::Input {
        message: format!(
            "{}: the tokenizer has {} ids, config.json says vocab_size {model_vocab}",
            tokenizer.display(),
            answer.vocab_size
        ),
        hint: "the tokenizer and the model must belong together".to_owned(),
    })
}
