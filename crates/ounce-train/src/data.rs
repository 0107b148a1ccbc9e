//! Data files to token files, and back to text.

use ounce_io::checkpoint::{Checkpoint, DataCursor};
use ounce_io::{BlockSampler, RowSampler, StreamCursor, StreamNotes, TokenCache};

use crate::batch::Row;
use crate::evaluate::EvalData;
use crate::limits::Limits;
use crate::model::{Model, missing};
use crate::step::Rows;
use crate::stream::TrainStream;
use crate::text_table::TextTable;
use crate::tokenize::{self, Prompt, Request, RowRequest};
use crate::{Environment, Observer, Result, Settings};

/// The tokens of a run, and what turns ids into text.
pub(crate) struct Data {
    pub(crate) train: TrainRows,
    pub(crate) eval: Option<EvalData>,
    /// The time that chat templates wrote, in seconds since 1970.
    pub(crate) rows_made_s: u64,
    pub(crate) table: TextTable,
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) stop_ids: Vec<u32>,
}

/// The rows of a run, one after the other.
pub(crate) struct TrainRows {
    source: Source,
    /// Rows by which the run is ahead of its steps times its rows per step, since it had more of them before.
    ahead: i64,
}

/// What rows are made of.
enum Source {
    /// Blocks of a stream of text.
    Blocks(BlockSampler),
    /// Samples, one in a row or several.
    Samples(RowSampler),
    /// Rows that are tokenized as they are needed.
    Stream(Box<TrainStream>),
}

impl Data {
    /// Tokenizes what is not tokenized yet, in a child process, and opens it; of a stream its first
    /// window, or that of the checkpoint which the run goes on from.
    ///
    /// # Errors
    /// Data or a tokenizer that is missing or wrong; a request to stop.
    pub(crate) fn open(
        settings: &Settings,
        env: &Environment,
        model: &Model,
        limits: &Limits,
        from: Option<&Checkpoint>,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        if settings.data.is_empty() {
            return Err(missing("--data FILE"));
        }
        let files = settings.data.iter().map(|file| file.path().to_path_buf()).collect();
        let mut streams = if settings.streaming { Vec::new() } else { vec![files] };
        if !settings.eval_data.is_empty() {
            streams.push(settings.eval_data.clone());
        }
        let max_length = model.max_length(settings) as usize;
        // A run that goes on has the rows that it was begun with, whatever day it is.
        let rows_made_s = from.and_then(|checkpoint| checkpoint.state().rows_made_s);
        let now_s = rows_made_s.unwrap_or_else(tokenize::today_s);
        let request = Request {
            tokenizer: model.dir.clone(),
            cache_dir: tokenize::cache_dir(env),
            streams,
            rows: RowRequest::of(settings, max_length as u64).within(&model.dir, limits),
            prompt: settings.samples().then(|| Prompt {
                flag: "--sample-prompt".to_owned(),
                text: settings.sample_prompt.clone(),
                is_default: settings.sample_prompt == Settings::default().sample_prompt,
            }),
            n_threads: tokenize::n_threads(&model.dir, limits),
            now_s,
        };
        let answer = tokenize::ask(env, &request, observer)?;
        for note in &answer.notes {
            observer.note(note);
        }
        tokenize::check_vocab(&model.dir, &answer, model.config.vocab_size())?;
        let mut token_files = answer.token_files.iter();
        let train = if settings.streaming {
            let stream = TrainStream::open(settings, env, model, limits, from, observer)?;
            TrainRows { source: Source::Stream(Box::new(stream)), ahead: 0 }
        } else {
            let path = token_files.next().expect("each data set has a token file");
            let source = Source::of(TokenCache::open(path)?, settings, max_length)?;
            if settings.packing && matches!(source, Source::Blocks(_)) {
                observer.note("`--packing` changes nothing here: blocks of text are full");
            }
            TrainRows::of(source, settings, from)
        };
        let eval = token_files
            .next()
            .map(|path| EvalData::open(path, max_length, settings.packing, settings.seed));
        Ok(Self {
            train,
            eval: eval.transpose()?,
            rows_made_s: now_s,
            table: TextTable::read(&answer.text_table)?,
            prompt_ids: answer.prompt_ids,
            stop_ids: answer.stop_ids,
        })
    }
}

impl Source {
    /// The rows of a token file, mixed by the weights of its data files.
    fn of(cache: TokenCache, settings: &Settings, max_length: usize) -> Result<Self> {
        let weights: Vec<f64> =
            settings.data.iter().map(crate::settings::DataFile::weight).collect();
        let seed = settings.seed;
        if cache.n_rows() > 0 {
            return Ok(Self::Samples(if settings.packing {
                RowSampler::packed(cache, &weights, max_length, seed)?
            } else {
                RowSampler::new(cache, &weights, seed)?
            }));
        }
        // Without weights blocks run on from one file into the next.
        Ok(Self::Blocks(if weights.iter().all(|&w| w == 1.0) {
            BlockSampler::new(cache, max_length, seed)?
        } else {
            let notes: StreamNotes = cache.notes()?;
            let parts: Vec<(u64, f64)> = notes.file_tokens.into_iter().zip(weights).collect();
            BlockSampler::with_weights(cache, &parts, max_length, seed)?
        }))
    }

    /// Rows of an epoch.
    fn n_per_epoch(&self) -> Option<u64> {
        match self {
            Self::Blocks(blocks) => Some(blocks.n_blocks()),
            Self::Samples(samples) => Some(samples.n_rows()),
            Self::Stream(_) => None,
        }
    }
}

impl TrainRows {
    /// The rows of a token file from the beginning, or from where a checkpoint stands in it.
    fn of(source: Source, settings: &Settings, from: Option<&Checkpoint>) -> Self {
        let n_per_epoch = source.n_per_epoch().unwrap_or(0);
        let ahead = from.map_or(0, |checkpoint| {
            let state = checkpoint.state();
            let first = state.cursor.epoch * n_per_epoch + state.cursor.row;
            first as i64 - (state.step * settings.n_rows()) as i64
        });
        Self { source, ahead }
    }

    /// The number of a row that steps times rows per step say.
    fn number(&self, row: u64) -> u64 {
        row.saturating_add_signed(self.ahead)
    }

    /// Steps that pass over the data `n_epochs` times, rounded up to whole steps; of a stream nobody knows.
    pub(crate) fn n_steps(&self, n_epochs: f64, rows_per_step: u64) -> u64 {
        let n_per_epoch = self.source.n_per_epoch().unwrap_or(0);
        (n_epochs * n_per_epoch as f64 / rows_per_step as f64).ceil() as u64
    }

    /// Where a run stands after `n_rows` rows.
    pub(crate) fn cursor(&self, n_rows: u64) -> (DataCursor, Option<StreamCursor>) {
        if let Source::Stream(stream) = &self.source {
            let (cursor, place) = stream.cursor(n_rows);
            return (cursor, Some(place));
        }
        let (n, number) = (self.source.n_per_epoch().unwrap_or(1), self.number(n_rows));
        (DataCursor { epoch: number / n, row: number % n }, None)
    }

    /// What the data files held, in words for a checkpoint; a stream keeps it in its cursor.
    pub(crate) fn contents(&self) -> Option<String> {
        let cache = match &self.source {
            Source::Blocks(blocks) => blocks.cache(),
            Source::Samples(samples) => samples.cache(),
            Source::Stream(_) => return None,
        };
        Some(format!("{:016x}", cache.contents_hash()))
    }
}

impl Rows for TrainRows {
    fn read(
        &mut self,
        step: u64,
        n_rows: u64,
        row: u64,
        to: &mut Row,
        observer: &mut dyn Observer,
    ) -> Result<()> {
        let number = self.number((step - 1) * n_rows + row);
        let (step, in_step) = (number / n_rows, (number % n_rows) as usize);
        match &mut self.source {
            Source::Blocks(blocks) => {
                let (n, rows) = (blocks.max_length(), in_step..in_step + 1);
                blocks.fill_row_range(step, n_rows as usize, rows, &mut to.ids[..n])?;
                to.is_text(n);
            }
            Source::Samples(samples) => {
                let number = samples.row(step, n_rows as usize, in_step);
                samples.read(number, &mut to.ids, &mut to.supervised, &mut to.lengths)?;
            }
            Source::Stream(stream) => {
                if row == 0 {
                    stream.begin_step();
                }
                stream.read(number, to, observer)?;
            }
        }
        Ok(())
    }

    fn name(&self, step: u64, n_rows: u64) -> String {
        let first = self.number((step - 1) * n_rows);
        let place = |row: u64| ((first + row) / n_rows, ((first + row) % n_rows) as usize);
        let number: Box<dyn Fn(u64) -> u64 + '_> = match &self.source {
            Source::Blocks(blocks) => Box::new(|row| {
                let (step, row) = place(row);
                blocks.block(step, n_rows as usize, row)
            }),
            Source::Samples(samples) => Box::new(|row| {
                let (step, row) = place(row);
                samples.row(step, n_rows as usize, row)
            }),
            Source::Stream(stream) => return stream.name(first..first + n_rows),
        };
        // Enough to find the text; a large batch is not listed whole.
        let listed = n_rows.min(16);
        let numbers: Vec<String> = (0..listed).map(|row| number(row).to_string()).collect();
        let more = if listed < n_rows { ", ..." } else { "" };
        let what = match self.source {
            Source::Blocks(_) => "blocks",
            _ => "rows (from 0, without those that were left out)",
        };
        format!("{what} {}{more} of the data", numbers.join(", "))
    }
}
