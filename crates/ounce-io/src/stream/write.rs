//! A window in the making: rows and pieces of all sources in, one small token cache out.

use std::path::Path;

use crate::chat_template::EndOfTurn;
use crate::dataset::RowOptions;
use crate::dataset::source::RowPlace;
use crate::error::IoError;
use crate::hash::Xxh64;
use crate::packs::pack_samples;
use crate::pipeline;
use crate::row_tokens::{
    EncodedRow, FileNotes, RowNotes, RowTokens, count, data_fingerprint, nothing_to_learn,
};
use crate::text::{Piece, PieceStart, TextPlace};
use crate::token_cache::{CacheWriter, TokenCache};
use crate::tokenizer::{Tokenizer, Words};

use super::source::{At, Origin, Source, SourcePlace, Unit};
use super::{StreamOptions, StreamPlace, WindowNotes};

/// Rows or pieces that are worked on at once.
const BATCH_UNITS: usize = 256;
/// Bytes of them, after which a batch is full.
const BATCH_BYTES: usize = 256 << 10;
/// Of them, those that one thread takes at once.
const JOB_UNITS: usize = 16;

/// How rows become ids.
#[derive(Debug)]
pub enum StreamEncoder<'a> {
    /// Samples, by a chat template.
    Rows(RowTokens<'a>),
    /// Text, to be cut into blocks.
    Text {
        /// The tokenizer.
        tokenizer: &'a Tokenizer,
        /// How rows are read.
        options: &'a RowOptions,
        /// Threads that encode.
        n_workers: usize,
    },
}

impl StreamEncoder<'_> {
    fn options(&self) -> &RowOptions {
        match self {
            Self::Rows(rows) => rows.options,
            Self::Text { options, .. } => options,
        }
    }

    fn n_workers(&self) -> usize {
        match self {
            Self::Rows(rows) => rows.n_workers,
            Self::Text { n_workers, .. } => *n_workers,
        }
    }

    /// What the ids depend on besides the files, and the bytes of one.
    fn fingerprint(&self) -> (u64, u32) {
        match self {
            Self::Rows(rows) => {
                let of_rows = Some((rows.template, rows.max_length));
                (data_fingerprint(rows.tokenizer, rows.options, of_rows), 4)
            }
            Self::Text { tokenizer, options, .. } => {
                let id_bytes = if tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 };
                (data_fingerprint(tokenizer, options, None), id_bytes)
            }
        }
    }
}

/// Writes the window that begins at `place` to `path`, with its packs beside it where samples are packed.
///
/// # Errors
/// Files that have changed or are broken; data without anything to learn; `Write`.
pub fn write_window(
    options: &StreamOptions,
    encoder: &StreamEncoder<'_>,
    place: &StreamPlace,
    path: &Path,
) -> Result<(), IoError> {
    let (stamps, mut remarks) = place.check_files(options)?;
    let mut making = Making::begin(options, encoder, place, path)?;
    while !making.batch()? {}
    let sources = making.sources.iter().map(Source::next_place).collect();
    let (window, epoch, now_s) = (place.window + 1, making.epoch, place.now_s);
    if let (StreamEncoder::Rows(rows), 0) = (encoder, place.window) {
        remarks.extend(rows.remarks(&making.end));
    }
    let notes = WindowNotes {
        place: place.clone(),
        next: StreamPlace { window, epoch, now_s, files: stamps, sources },
        epoch: making.rows_epoch,
        ids_hash: making.hash.digest(),
        files: making.file_notes(),
        remarks,
    };
    making.writer.finish(&[], &notes)?;
    if options.packs && place.has_rows() {
        let cache = TokenCache::open(path)?;
        pack_samples(&cache, &[cache.n_rows()], options.max_length, options.seed)?;
    }
    Ok(())
}

/// What is read, in order.
enum Event {
    /// Of a source.
    Unit(usize, Unit),
    EndOfEpoch,
}

/// What becomes of it.
enum Done {
    Row {
        source: usize,
        samples: Result<Vec<EncodedRow>, IoError>,
        before: RowPlace,
        after: RowPlace,
    },
    Piece {
        source: usize,
        ids: Result<Vec<u32>, IoError>,
        place: TextPlace,
        n_bad: u64,
    },
    EndOfPass {
        source: usize,
        n_bad: Option<u64>,
    },
    EndOfEpoch,
}

/// Events for one thread.
#[derive(Default)]
struct Job {
    events: Vec<Event>,
    done: Vec<Done>,
}

struct Making<'a> {
    options: &'a StreamOptions,
    encoder: &'a StreamEncoder<'a>,
    end: EndOfTurn,
    origins: Vec<Origin>,
    sources: Vec<Source>,
    writer: CacheWriter,
    hash: Xxh64,
    n_rows: u64,
    /// Epochs that are over.
    epoch: u64,
    /// Those that were over before the first row.
    rows_epoch: u64,
}

impl<'a> Making<'a> {
    fn begin(
        options: &'a StreamOptions,
        encoder: &'a StreamEncoder<'a>,
        place: &StreamPlace,
        path: &Path,
    ) -> Result<Self, IoError> {
        let (fingerprint, id_bytes) = encoder.fingerprint();
        let groups = options.groups(place.has_rows());
        let (mut origins, mut sources) = (Vec::new(), Vec::new());
        for ((files, weight), place) in groups.into_iter().zip(&place.sources) {
            let format = match encoder {
                StreamEncoder::Rows(rows) => Some(rows.format_of(&files[0])?),
                StreamEncoder::Text { .. } => None,
            };
            sources.push(Source::open(files.clone(), weight, encoder.options(), place)?);
            origins.push(Origin { files, format });
        }
        Ok(Self {
            options,
            encoder,
            end: match encoder {
                StreamEncoder::Rows(rows) => rows.end_of_turn(),
                StreamEncoder::Text { .. } => EndOfTurn::None,
            },
            origins,
            sources,
            writer: CacheWriter::create(path, id_bytes, fingerprint, &[])?,
            hash: Xxh64::new(),
            n_rows: 0,
            epoch: place.epoch,
            rows_epoch: place.epoch,
        })
    }

    /// Reads, encodes and writes some units; whether the window is complete.
    fn batch(&mut self) -> Result<bool, IoError> {
        let mut events = Vec::new();
        let fault = self.read(&mut events).err();
        for done in self.encode(events)? {
            let is_complete = match done {
                Done::Row { source, samples, before, after } => {
                    self.take_row(source, samples, before, after)?
                }
                Done::Piece { source, ids, place, n_bad } => {
                    self.sources[source].counts.n_bad = n_bad;
                    self.take_piece(source, &ids?, place)?
                }
                Done::EndOfPass { source, n_bad } => {
                    self.sources[source].end_pass(n_bad);
                    false
                }
                Done::EndOfEpoch => self.end_epoch()?,
            };
            if is_complete {
                return Ok(true);
            }
        }
        // What was read before a fault comes first: it may complete the window.
        fault.map_or(Ok(false), Err)
    }

    /// What becomes of events, in their order, on all threads.
    fn encode(&self, events: Vec<Event>) -> Result<Vec<Done>, IoError> {
        let (mut events, mut all) = (events.into_iter(), Vec::new());
        // Not `self`: its sources stay on this thread.
        let (encoder, origins, end) = (self.encoder, &self.origins, &self.end);
        pipeline::in_order(
            encoder.n_workers(),
            |_| 0,
            |job: &mut Job| {
                job.events.extend(events.by_ref().take(JOB_UNITS));
                Ok(events.len() > 0)
            },
            |job, words| {
                let one = |event| encode(encoder, origins, end, event, words);
                job.done = job.events.drain(..).map(one).collect();
            },
            |job| {
                all.append(&mut job.done);
                Ok::<_, IoError>(())
            },
        )?;
        Ok(all)
    }

    fn read(&mut self, events: &mut Vec<Event>) -> Result<(), IoError> {
        let n_left = self.options.window_rows - self.n_rows;
        let (most, mut n_bytes) = (BATCH_UNITS.min(n_left as usize), 0);
        while events.len() < most && n_bytes < BATCH_BYTES {
            let times = self.sources.iter().map(Source::time).enumerate();
            // Of several that are as far, the first.
            let next = times.reduce(|least, other| if other.1 < least.1 { other } else { least });
            let (k, time) = next.expect("a stream has a source");
            if time >= (self.epoch + 1) as f64 {
                events.push(Event::EndOfEpoch);
                break;
            }
            let unit = self.sources[k].next(self.encoder.options())?;
            n_bytes += unit.n_bytes();
            events.push(Event::Unit(k, unit));
        }
        Ok(())
    }

    /// Writes the samples of a row of source `k`; whether that completes the window.
    fn take_row(
        &mut self,
        k: usize,
        samples: Result<Vec<EncodedRow>, IoError>,
        before: RowPlace,
        after: RowPlace,
    ) -> Result<bool, IoError> {
        let Self { sources, writer, hash, n_rows, options, encoder, .. } = self;
        let StreamEncoder::Rows(rows) = encoder else { unreachable!("text has no rows") };
        let Source { counts, place, .. } = &mut sources[k];
        let samples = rows.count_row(samples, counts)?.unwrap_or_default();
        let behind = SourcePlace { pass: place.pass, at: At::Row(after), skip: 0 };
        let n_before = std::mem::replace(place, behind).skip;
        for (i, sample) in samples.iter().enumerate().skip(n_before as usize) {
            count(sample, counts, &mut |row| {
                *n_rows += 1;
                hash_row(hash, &row.ids);
                writer.append_row(&row.ids)
            })?;
            if *n_rows == options.window_rows {
                if i + 1 < samples.len() {
                    (place.at, place.skip) = (At::Row(before), i as u64 + 1);
                }
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Writes the blocks that a piece of source `k` completes; whether that completes the window.
    fn take_piece(&mut self, k: usize, ids: &[u32], place: TextPlace) -> Result<bool, IoError> {
        let blocks = &mut self.sources[k].blocks;
        blocks.push(place, ids);
        while let Some(block) = blocks.take(self.options.max_length) {
            self.n_rows += 1;
            hash_row(&mut self.hash, &block);
            self.writer.append(&block)?;
            if self.n_rows == self.options.window_rows {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// An epoch is over, and with it the window, unless nothing is in it.
    fn end_epoch(&mut self) -> Result<bool, IoError> {
        self.epoch += 1;
        if self.n_rows > 0 {
            return Ok(true);
        }
        self.rows_epoch = self.epoch;
        if !self.sources.iter().all(Source::went_round) {
            return Ok(false);
        }
        if matches!(self.encoder, StreamEncoder::Rows(_)) {
            let notes = RowNotes { files: self.file_notes(), remarks: Vec::new() };
            return Err(nothing_to_learn(&notes));
        }
        let n_tokens = self.sources.iter().map(|s| s.blocks.pass_ids).max().unwrap_or(0);
        Err(IoError::TooFewTokens {
            path: self.origins[0].files[0].clone(),
            n_tokens,
            n_needed: self.options.max_length as u64,
            hint: format!("give more text, or `--max-length` of at most {n_tokens}").into(),
        })
    }

    fn file_notes(&self) -> Vec<FileNotes> {
        let note = |(origin, source): (&Origin, &Source)| FileNotes {
            path: origin.files[0].clone(),
            format: origin.format.map_or_else(|| "text".to_owned(), |format| format.to_string()),
            counts: source.counts.clone(),
        };
        self.origins.iter().zip(&self.sources).map(note).collect()
    }
}

fn encode(
    encoder: &StreamEncoder<'_>,
    origins: &[Origin],
    end: &EndOfTurn,
    event: Event,
    words: &mut Words,
) -> Done {
    let (source, unit) = match event {
        Event::Unit(source, unit) => (source, unit),
        Event::EndOfEpoch => return Done::EndOfEpoch,
    };
    let Origin { files, format } = &origins[source];
    match (encoder, unit) {
        (StreamEncoder::Rows(rows), Unit::Row { row, before, after }) => {
            let format = format.expect("a source of rows has a format");
            let samples = row.and_then(|row| rows.encode_row(&files[0], format, end, &row, words));
            Done::Row { source, samples, before, after }
        }
        (
            StreamEncoder::Text { tokenizer, .. },
            Unit::Piece { text, start, line, file, place, n_bad },
        ) => {
            let mut ids = Vec::new();
            if start == (PieceStart::Row { joined: true }) {
                ids.extend(tokenizer.eos_id());
            }
            let piece = Piece { text: &text, start, path: &files[file], line };
            let ids = tokenizer.encode_piece(&piece, words, &mut ids).map(|()| ids);
            Done::Piece { source, ids, place, n_bad }
        }
        (_, Unit::EndOfPass { n_bad }) => Done::EndOfPass { source, n_bad },
        (_, Unit::Row { .. } | Unit::Piece { .. }) => {
            unreachable!("the first place says whether there are rows or text")
        }
    }
}

/// Adds a row to the hash of a window.
fn hash_row(hash: &mut Xxh64, ids: &[u32]) {
    hash.update(&(ids.len() as u64).to_le_bytes());
    for id in ids {
        hash.update(&id.to_le_bytes());
    }
}
