//! Data files to token files, and back to text.

use ounce_io::{BlockSampler, RowSampler, StreamNotes, TokenCache};

use crate::batch::Row;
use crate::evaluate::EvalData;
use crate::model::{Model, missing};
use crate::session::Limits;
use crate::step::Rows;
use crate::text_table::TextTable;
use crate::tokenize::{self, Request, RowRequest};
use crate::{Environment, Observer, Result, Settings};

/// The tokens of a run, and what turns ids into text.
pub(crate) struct Data {
    pub(crate) train: TrainRows,
    pub(crate) eval: Option<EvalData>,
    pub(crate) table: TextTable,
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) stop_ids: Vec<u32>,
}

/// What rows are made of.
pub(crate) enum TrainRows {
    /// Blocks of a stream of text.
    Blocks(BlockSampler),
    /// Samples, one in a row or several.
    Samples(RowSampler),
}

impl Data {
    /// Tokenizes what is not tokenized yet, in a child process, and opens it.
    ///
    /// # Errors
    /// Data or a tokenizer that is missing or wrong; a request to stop.
    pub(crate) fn open(
        settings: &Settings,
        env: &Environment,
        model: &Model,
        limits: &Limits,
        observer: &mut dyn Observer,
    ) -> Result<Self> {
        if settings.data.is_empty() {
            return Err(missing("--data FILE"));
        }
        let files = settings.data.iter().map(|file| file.path().to_path_buf()).collect();
        let mut streams = vec![files];
        if !settings.eval_data.is_empty() {
            streams.push(settings.eval_data.clone());
        }
        let max_length = model.max_length(settings) as usize;
        let request = Request {
            tokenizer: model.dir.clone(),
            cache_dir: tokenize::cache_dir(env),
            streams,
            rows: RowRequest::of(settings, max_length as u64).within(&model.dir, limits),
            prompt: Some(settings.sample_prompt.clone()),
            n_threads: tokenize::n_threads(&model.dir, limits),
        };
        let answer = tokenize::ask(env, &request, observer)?;
        for note in &answer.notes {
            observer.note(note);
        }
        tokenize::check_vocab(&model.dir, &answer, model.config.vocab_size())?;
        let cache = TokenCache::open(&answer.token_files[0])?;
        let eval = answer
            .token_files
            .get(1)
            .map(|path| EvalData::open(path, max_length, settings.packing, settings.seed));
        Ok(Self {
            train: TrainRows::of(cache, settings, max_length)?,
            eval: eval.transpose()?,
            table: TextTable::read(&answer.text_table)?,
            prompt_ids: answer.prompt_ids,
            stop_ids: answer.stop_ids,
        })
    }
}

impl TrainRows {
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
    pub(crate) fn n_per_epoch(&self) -> u64 {
        match self {
            Self::Blocks(blocks) => blocks.n_blocks(),
            Self::Samples(samples) => samples.n_rows(),
        }
    }

    /// Steps that pass over the data `n_epochs` times, rounded up to whole steps.
    pub(crate) fn n_steps(&self, n_epochs: f64, rows_per_step: u64) -> u64 {
        (n_epochs * self.n_per_epoch() as f64 / rows_per_step as f64).ceil() as u64
    }

    /// The number of a step's row in the data.
    fn number(&self, step: u64, n_rows: u64, row: u64) -> u64 {
        match self {
            Self::Blocks(blocks) => blocks.block(step - 1, n_rows as usize, row as usize),
            Self::Samples(samples) => samples.row(step - 1, n_rows as usize, row as usize),
        }
    }
}

impl Rows for TrainRows {
    fn read(&self, step: u64, n_rows: u64, row: u64, to: &mut Row) -> Result<()> {
        match self {
            Self::Blocks(blocks) => {
                let (n, row) = (blocks.max_length(), row as usize);
                blocks.fill_row_range(step - 1, n_rows as usize, row..row + 1, &mut to.ids[..n])?;
                to.is_text(n);
            }
            Self::Samples(samples) => {
                let number = self.number(step, n_rows, row);
                samples.read(number, &mut to.ids, &mut to.supervised, &mut to.lengths)?;
            }
        }
        Ok(())
    }

    fn name(&self, step: u64, n_rows: u64) -> String {
        // Enough to find the text; a large batch is not listed whole.
        let listed = n_rows.min(16);
        let numbers: Vec<String> =
            (0..listed).map(|row| self.number(step, n_rows, row).to_string()).collect();
        let more = if listed < n_rows { ", ..." } else { "" };
        let what = match self {
            Self::Blocks(_) => "blocks",
            Self::Samples(_) => "rows",
        };
        format!("{what} {}{more} of the data", numbers.join(", "))
    }
}
