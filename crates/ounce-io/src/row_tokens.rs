//! Rows to tokens: conversations through a chat template into a token cache, with what of them is supervised.
//!
//! Idea: rows are read in order, a job at a time; threads render and encode the rows of a job; results are written in
//! order (`pipeline.rs`). So the cache is the same for any number of threads, and memory is that of a few jobs.
//!
//! A token is supervised where it overlaps the bytes that are (`chat_template/supervised.rs`). The text is encoded
//! whole, with the special tokens that the template writes and no others, so that none is there twice. Rows are cut at
//! `max_length` ids from the start; what that costs is counted. Rows that have nothing to learn are left out, and
//! counted.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::chat_template::{ChatTemplate, EndOfTurn, SupervisedText};
use crate::dataset::{
    Conversation, OnBadRow, RawRow, RowFormat, RowOptions, RowReader, Sample, samples,
};
use crate::error::IoError;
use crate::hash::Xxh64;
use crate::pipeline;
use crate::token_cache::{CacheWriter, SUPERVISED_BIT, TokenCache};
use crate::tokenizer::{Tokenizer, Words};

/// Most rows of a job.
const JOB_ROWS: usize = 32;
/// Bytes of rows, after which a job is full.
const JOB_BYTES: usize = 64 << 10;
/// Longest text that one row may become.
const MAX_TEXT_BYTES: usize = 4 << 20;
/// Classes of length: below 2, 4, 8, ... tokens.
const N_CLASSES: usize = 32;

/// What is counted over the rows of one file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowCounts {
    /// Rows of the file.
    pub n_rows: u64,
    /// Broken rows that were passed over.
    pub n_bad: u64,
    /// Samples that have nothing to learn, and are left out.
    pub n_without_answer: u64,
    /// Samples that are kept.
    pub n_kept: u64,
    /// Samples that are cut at `max_length`.
    pub n_truncated: u64,
    /// Samples that lose a part of an answer by that.
    pub n_cut_answers: u64,
    /// Answers whose place in the text was not found, so that they are not supervised.
    pub n_lost_answers: u64,
    /// Samples in which a token is partly supervised and partly not.
    pub n_straddling: u64,
    /// Tokens of the samples that are kept, as they are kept.
    pub n_tokens: u64,
    /// Those of them that are supervised.
    pub n_supervised: u64,
    /// Tokens of the longest sample, before it is cut.
    pub longest: u64,
    /// Samples by length before they are cut: class `k` holds those from `2^k` tokens on.
    pub histogram: Vec<u64>,
    /// The first broken row.
    pub first_bad: Option<String>,
}

/// One file and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileNotes {
    /// The file.
    pub path: PathBuf,
    /// How its rows are read.
    pub format: String,
    /// What was counted.
    pub counts: RowCounts,
}

/// Notes of a cache of rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowNotes {
    /// The files, in order; their rows follow each other in the cache.
    pub files: Vec<FileNotes>,
    /// What is said about template and tokenizer.
    pub remarks: Vec<String>,
}

/// How rows become tokens.
#[derive(Debug)]
pub struct RowTokens<'a> {
    /// The tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The template, with its special tokens.
    pub template: &'a ChatTemplate,
    /// How rows are read.
    pub options: &'a RowOptions,
    /// Longest row in ids.
    pub max_length: usize,
    /// Threads that render and encode.
    pub n_workers: usize,
}

/// A row as ids, those that are supervised with their top bit set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EncodedRow {
    /// Ids, at most `max_length`.
    pub ids: Vec<u32>,
    /// Ids before they were cut.
    pub n_before: usize,
    /// Whether an answer was cut.
    pub cuts_answer: bool,
    /// Answers that were not found.
    pub n_lost: usize,
    /// Whether a token is partly supervised.
    pub straddles: bool,
}

impl EncodedRow {
    /// Ids that are supervised and can be: the first of a row is predicted by nothing.
    pub fn n_supervised(&self) -> usize {
        self.ids.iter().skip(1).filter(|&&id| id & SUPERVISED_BIT != 0).count()
    }

    /// Each id, and whether it is supervised.
    pub fn tokens(&self) -> impl Iterator<Item = (u32, bool)> {
        self.ids.iter().map(|id| (id & !SUPERVISED_BIT, id & SUPERVISED_BIT != 0))
    }
}

impl RowTokens<'_> {
    /// Writes the rows of `files` into a cache at `cache_path` that goes by `fingerprint`.
    ///
    /// # Errors
    /// Files that cannot be read or are broken; broken rows unless they are passed over; `BadFile` where nothing in the
    /// files is supervised; `Write`.
    pub fn write_cache(
        &self,
        files: &[PathBuf],
        fingerprint: u64,
        cache_path: &Path,
    ) -> Result<TokenCache, IoError> {
        let mut writer = CacheWriter::create(cache_path, 4, fingerprint, files)?;
        let end = self.end_of_turn();
        let mut notes = RowNotes { files: Vec::new(), remarks: self.remarks(&end) };
        let mut hashes = Vec::new();
        for path in files {
            let format = self.format_of(path)?;
            let mut rows = RowReader::open_within(path, self.options.row_bytes)?;
            let mut counts = RowCounts::default();
            self.each_row(path, format, &mut rows, &end, &mut counts, &mut |row| {
                writer.append_row(&row.ids)
            })?;
            hashes.push(rows.fingerprint()?);
            notes.files.push(FileNotes { path: path.clone(), format: format.to_string(), counts });
        }
        if notes.files.iter().all(|f| f.counts.n_kept == 0) {
            return Err(nothing_to_learn(&notes));
        }
        writer.finish(&hashes, &notes)?;
        TokenCache::open(cache_path)
    }

    /// Counts the rows of `path`, and hands the first `n_samples` of them out with the tokens' own words.
    ///
    /// # Errors
    /// As [`Self::write_cache`], except that nothing need be supervised.
    pub fn inspect(
        &self,
        path: &Path,
        n_samples: usize,
    ) -> Result<(FileNotes, Vec<EncodedRow>), IoError> {
        let format = self.format_of(path)?;
        let mut rows = RowReader::open_within(path, self.options.row_bytes)?;
        let (mut counts, mut shown) = (RowCounts::default(), Vec::new());
        let end = self.end_of_turn();
        self.each_row(path, format, &mut rows, &end, &mut counts, &mut |row| {
            if shown.len() < n_samples {
                shown.push(row.clone());
            }
            Ok(())
        })?;
        Ok((FileNotes { path: path.into(), format: format.to_string(), counts }, shown))
    }

    /// What the template writes behind an answer.
    pub fn end_of_turn(&self) -> EndOfTurn {
        self.template.end_of_turn(|text| self.tokenizer.added_token_id(text).is_some())
    }

    pub(crate) fn format_of(&self, path: &Path) -> Result<RowFormat, IoError> {
        match self.options.format {
            Some(format) => Ok(format),
            None => RowFormat::detect(path, self.options),
        }
    }

    /// Encodes the rows of a file, in order.
    fn each_row(
        &self,
        path: &Path,
        format: RowFormat,
        rows: &mut RowReader,
        end: &EndOfTurn,
        counts: &mut RowCounts,
        keep: &mut dyn FnMut(&EncodedRow) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        counts.histogram = vec![0; N_CLASSES];
        pipeline::in_order(
            self.n_workers,
            |job: &RowJob| job.n_bytes,
            |job: &mut RowJob| job.fill(rows),
            |job, words| {
                let encode = |row: Result<RawRow, IoError>| {
                    row.and_then(|row| self.encode_row(path, format, end, &row, words))
                };
                job.encoded = job.rows.drain(..).map(encode).collect();
            },
            |job| job.encoded.drain(..).try_for_each(|row| self.hand_on(row, counts, keep)),
        )
    }

    /// Counts a row and hands its samples on.
    fn hand_on(
        &self,
        row: Result<Vec<EncodedRow>, IoError>,
        counts: &mut RowCounts,
        keep: &mut dyn FnMut(&EncodedRow) -> Result<(), IoError>,
    ) -> Result<(), IoError> {
        let samples = self.count_row(row, counts)?.unwrap_or_default();
        samples.iter().try_for_each(|sample| count(sample, counts, keep))
    }

    /// Counts a row; `None` for a broken one that is passed over.
    pub(crate) fn count_row(
        &self,
        encoded: Result<Vec<EncodedRow>, IoError>,
        counts: &mut RowCounts,
    ) -> Result<Option<Vec<EncodedRow>>, IoError> {
        counts.n_rows += 1;
        match encoded {
            Ok(samples) => Ok(Some(samples)),
            Err(fault) if self.options.on_bad_row == OnBadRow::Skip => {
                counts.n_bad += 1;
                counts.first_bad.get_or_insert_with(|| fault.to_string());
                Ok(None)
            }
            Err(fault) => Err(fault),
        }
    }

    /// The samples of a row.
    pub(crate) fn encode_row(
        &self,
        path: &Path,
        format: RowFormat,
        end: &EndOfTurn,
        row: &RawRow,
        words: &mut Words,
    ) -> Result<Vec<EncodedRow>, IoError> {
        let samples = samples(path, row, format, &self.options.columns)?;
        let one = |sample: &Sample| {
            self.encode_sample(sample, end, words).map_err(|reason| {
                row.place.fault(
                    path,
                    reason,
                    "correct the row, or `--on-bad-row skip` passes such rows over",
                )
            })
        };
        samples.iter().map(one).collect()
    }

    /// The ids of a sample.
    ///
    /// # Errors
    /// What the template or the tokenizer refuses: a reason without a place.
    pub fn encode_sample(
        &self,
        sample: &Sample,
        end: &EndOfTurn,
        words: &mut Words,
    ) -> Result<EncodedRow, String> {
        let text = match sample {
            Sample::Text(text) => self.whole_text(text),
            Sample::Conversation(conversation) => self.conversation(conversation, end)?,
        };
        if text.text.len() > MAX_TEXT_BYTES {
            let (n, most) = (text.text.len(), MAX_TEXT_BYTES);
            return Err(format!("the row becomes a text of {n} bytes; at most {most} are taken"));
        }
        let mut row = EncodedRow { n_lost: text.n_lost, ..EncodedRow::default() };
        let mut spans = text.supervised.iter().peekable();
        let take = |id: u32, place: Range<usize>| {
            while spans.next_if(|span| span.end <= place.start).is_some() {}
            // Some tokenizers trim a token that is all space to nothing: it counts where it stood.
            let end = place.end.max(place.start + 1);
            let span = spans.peek().filter(|span| span.start < end);
            let supervised = span.is_some();
            row.straddles |= span.is_some_and(|s| s.start > place.start || place.end > s.end);
            if row.n_before < self.max_length {
                row.ids.push(if supervised { id | SUPERVISED_BIT } else { id });
            }
            row.cuts_answer |= supervised && row.n_before >= self.max_length;
            row.n_before += 1;
        };
        self.tokenizer.encode_with_places(&text.text, words, take).map_err(|e| {
            let message = e.to_string();
            message.split("\nhint: ").next().unwrap_or_default().to_owned()
        })?;
        Ok(row)
    }

    /// A conversation, which says first what was wrong with its messages.
    fn conversation(
        &self,
        conversation: &Conversation,
        end: &EndOfTurn,
    ) -> Result<SupervisedText, String> {
        self.template
            .supervised_text(conversation, end)
            .map_err(|reason| format!("the chat template refuses the row: {reason}"))
    }

    /// A text all of which is supervised, between the tokens that begin and end a text.
    fn whole_text(&self, text: &str) -> SupervisedText {
        let tokenizer = self.tokenizer;
        let special = |name: &str, id: Option<u32>| {
            // Only what the tokenizer makes one token of.
            let own =
                || tokenizer.token_name(id?).filter(|t| tokenizer.added_token_id(t).is_some());
            self.template.special_token(name).map(str::to_owned).or_else(own).unwrap_or_default()
        };
        let bos = special("bos_token", tokenizer.bos_id().filter(|_| tokenizer.adds_bos()));
        let bos = if tokenizer.adds_bos() { bos } else { String::new() };
        let whole = format!("{bos}{text}{}", special("eos_token", tokenizer.eos_id()));
        let supervised = std::iter::once(bos.len()..whole.len()).collect();
        SupervisedText { text: whole, supervised, n_lost: 0 }
    }

    /// What a person should know about template, tokenizer and generation settings before training on them.
    pub fn remarks(&self, end: &EndOfTurn) -> Vec<String> {
        use crate::chat_template::TemplateOrigin;
        let (template, tokenizer) = (self.template, self.tokenizer);
        let mut remarks = Vec::new();
        match template.origin() {
            TemplateOrigin::Model => {}
            TemplateOrigin::ChatMl => remarks.push(
                "the model has no chat template: ChatML is taken, whose tokens its tokenizer has".to_owned(),
            ),
            TemplateOrigin::Plain => remarks.push(
                "the model has no chat template: messages are written one after the other, each ended by a line feed, \
                 answers by the end-of-text token"
                    .to_owned(),
            ),
        }
        if template.written_s().is_some() {
            remarks.push(
                "the chat template writes the date: the rows keep that of the day they were tokenized on".to_owned(),
            );
        }
        match end {
            EndOfTurn::Token(token) => {
                let id = tokenizer.added_token_id(token);
                if !id.is_some_and(|id| tokenizer.stop_ids().contains(&id)) {
                    let eos = tokenizer.eos_id().and_then(|id| tokenizer.token_name(id));
                    let eos = eos.map_or("nothing".to_owned(), |name| format!("`{name}`"));
                    remarks.push(format!(
                        "warning: answers end with `{token}`, but generation stops at {eos}: add its id to \
                         `eos_token_id` in generation_config.json"
                    ));
                }
                if template.special_token("pad_token") == Some(token) {
                    remarks.push(format!(
                        "`{token}` ends answers and also pads: it is supervised here all the same, since nothing is \
                         masked by id"
                    ));
                }
            }
            EndOfTurn::NoToken(text) => remarks.push(format!(
                "warning: the chat template ends answers with `{text}`, which is not a token of this tokenizer but \
                 several: generation cannot stop at it"
            )),
            // Templates that mark answers themselves have no end that a probe must find.
            EndOfTurn::None if template.has_generation() => {}
            EndOfTurn::None => remarks.push(
                "warning: the chat template writes no token after an answer: the model will not learn where to stop"
                    .to_owned(),
            ),
        }
        remarks
    }
}

/// Rows for one thread.
#[derive(Debug, Default)]
struct RowJob {
    rows: Vec<Result<RawRow, IoError>>,
    /// Of the rows.
    n_bytes: usize,
    encoded: Vec<Result<Vec<EncodedRow>, IoError>>,
}

impl RowJob {
    /// Reads rows until there are enough; false after the last.
    fn fill(&mut self, rows: &mut RowReader) -> Result<bool, IoError> {
        self.n_bytes = 0;
        while self.rows.len() < JOB_ROWS && self.n_bytes < JOB_BYTES {
            let Some(row) = rows.next_row()? else { return Ok(false) };
            self.n_bytes += row.as_ref().map_or(0, |row| row.n_bytes);
            self.rows.push(row);
        }
        Ok(true)
    }
}

/// Counts a sample, and hands it on if anything in it is supervised.
pub(crate) fn count(
    row: &EncodedRow,
    counts: &mut RowCounts,
    keep: &mut dyn FnMut(&EncodedRow) -> Result<(), IoError>,
) -> Result<(), IoError> {
    let class = row.n_before.max(1).ilog2() as usize;
    counts.histogram.resize(N_CLASSES, 0);
    counts.histogram[class.min(N_CLASSES - 1)] += 1;
    counts.longest = counts.longest.max(row.n_before as u64);
    counts.n_truncated += u64::from(row.n_before > row.ids.len());
    counts.n_cut_answers += u64::from(row.cuts_answer);
    counts.n_lost_answers += row.n_lost as u64;
    counts.n_straddling += u64::from(row.straddles);
    let n_supervised = row.n_supervised() as u64;
    if n_supervised == 0 {
        counts.n_without_answer += 1;
        return Ok(());
    }
    counts.n_kept += 1;
    counts.n_tokens += row.ids.len() as u64;
    counts.n_supervised += n_supervised;
    keep(row)
}

/// Changes when rows become other tokens than before.
const ROWS_VERSION: u32 = 2;

/// What a cache of rows or of a stream goes by: the tokenizer, how rows are read, and for rows the template and where
/// they are cut.
pub fn data_fingerprint(
    tokenizer: &Tokenizer,
    options: &RowOptions,
    rows: Option<(&ChatTemplate, usize)>,
) -> u64 {
    let mut hash = Xxh64::new();
    hash.update(&tokenizer.fingerprint().to_le_bytes());
    let format = options.format.map(|f| f.to_string()).unwrap_or_default();
    let columns: Vec<_> = options.columns.pairs().collect();
    hash.update(format!("{format} {columns:?} {:?} ", options.on_bad_row).as_bytes());
    if let Some((template, max_length)) = rows {
        let time = template.written_s();
        hash.update(
            format!("{ROWS_VERSION} {max_length} {time:?} {}", template.source()).as_bytes(),
        );
    }
    hash.digest()
}

/// The error for data without a single token to learn.
pub(crate) fn nothing_to_learn(notes: &RowNotes) -> IoError {
    let n_rows: u64 = notes.files.iter().map(|f| f.counts.n_rows).sum();
    let n_cut: u64 = notes.files.iter().map(|f| f.counts.n_cut_answers).sum();
    let path = notes.files.first().map_or_else(PathBuf::new, |f| f.path.clone());
    let format = notes.files.first().map_or("", |f| f.format.as_str());
    let hint = if n_cut > 0 {
        "every answer lies beyond the cut: raise `--max-length`"
    } else {
        "`ounce data inspect` shows what is supervised of each row; check roles and `--dataset-format`"
    };
    let reason = format!("none of its {n_rows} rows, read as `{format}`, has a token to learn");
    IoError::bad_file(&path, reason, hint)
}
