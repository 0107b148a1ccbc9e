//! Evaluation: the mean loss over every prediction of a text, or over every supervised token of samples.
//!
//! A text is cut into consecutive blocks of `max_length` ids, the last one shorter; samples are taken
//! in their order, or packed. Losses are added in f64 in the order of the rows, so the result does not
//! depend on how many rows run at once.

use std::path::{Path, PathBuf};

use ounce_exec::{Arena, StepInputs};
use ounce_io::{EvalBlocks, RowNotes, RowSampler, TokenCache};
use ounce_program::StepShape;

use crate::batch::{Batch, Row};
use crate::compile::{check_tokenizing, compile_and_load};
use crate::graphs::Wanted;
use crate::limits::Limits;
use crate::model::{Model, missing};
use crate::precision::policy_for;
use crate::program::Program;
use crate::tokenize::{self, Request, RowRequest};
use crate::{Environment, Error, EvalRecord, Observer, Result, Settings};

/// What to evaluate on.
pub(crate) enum EvalData {
    /// Blocks of a text.
    Text {
        /// Its tokens.
        cache: TokenCache,
        /// Where they are cut.
        blocks: EvalBlocks,
    },
    /// Samples, one in a row or several.
    Samples(RowSampler),
}

impl EvalData {
    /// Opens a token file.
    pub(crate) fn open(path: &Path, max_length: usize, packing: bool, seed: u64) -> Result<Self> {
        let cache = TokenCache::open(path)?;
        if cache.n_rows() > 0 {
            let notes: RowNotes = cache.notes()?;
            let weights = vec![1.0; notes.files.len()];
            return Ok(Self::Samples(if packing {
                RowSampler::packed(cache, &weights, max_length, seed)?
            } else {
                RowSampler::new(cache, &weights, seed)?
            }));
        }
        let blocks = EvalBlocks::new(&cache, max_length)?;
        Ok(Self::Text { cache, blocks })
    }

    /// Rows, in their order.
    fn n_rows(&self) -> u64 {
        match self {
            Self::Text { blocks, .. } => blocks.clone().count() as u64,
            Self::Samples(samples) => samples.n_rows(),
        }
    }

    /// Reads a row: of a text the block, of samples the one of that number.
    fn read(&self, block: Option<(u64, usize)>, number: u64, to: &mut Row) -> Result<()> {
        match (self, block) {
            (Self::Text { cache, .. }, Some((start, len))) => {
                cache.read(start, &mut to.ids[..len])?;
                to.is_text(len);
            }
            (Self::Samples(samples), _) => {
                samples.read(number, &mut to.ids, &mut to.supervised, &mut to.lengths)?;
            }
            (Self::Text { .. }, None) => unreachable!("a text has a block for each row"),
        }
        Ok(())
    }
}

/// The command: loss and perplexity of the model on `eval_data`, or on `data` where there is none.
///
/// # Errors
/// Wrong settings, model or data; a budget that does not fit; a request to stop.
pub fn evaluate(
    settings: &Settings,
    env: &Environment,
    observer: &mut dyn Observer,
) -> Result<EvalRecord> {
    let model = Model::open(settings, env)?;
    let files: Vec<PathBuf> = if settings.eval_data.is_empty() {
        settings.data.iter().map(|file| file.path().to_path_buf()).collect()
    } else {
        settings.eval_data.clone()
    };
    if files.is_empty() {
        return Err(missing("--data FILE"));
    }
    let (limits, max_length) = (Limits::of(settings), model.max_length(settings));
    let wanted = Wanted {
        tokenizes: true,
        eval: Some(StepShape::new(settings.per_device_train_batch_size, max_length)),
        max_length,
        policy: policy_for(settings, &model.dir),
        ..Wanted::default()
    };
    let request = Request {
        tokenizer: model.dir.clone(),
        cache_dir: tokenize::cache_dir(env),
        streams: vec![files],
        rows: RowRequest::of(settings, max_length).within(&model.dir, &limits),
        prompt: None,
        n_threads: tokenize::n_threads(&model.dir, &limits),
        now_s: tokenize::today_s(),
    };
    check_tokenizing(&model, &wanted, &limits, env)?;
    let answer = tokenize::ask(env, &request, observer)?;
    for note in &answer.notes {
        observer.note(note);
    }
    tokenize::check_vocab(&model.dir, &answer, model.config.vocab_size())?;
    let (path, packing) = (&answer.token_files[0], settings.packing);
    let data = EvalData::open(path, max_length as usize, packing, settings.seed)?;
    let mut session = compile_and_load(&model, &wanted, &limits, env, observer)?;
    let program = session.eval.as_ref().expect("an evaluation has a plan");
    let record = evaluate_in(program, &mut session.arena, &data, observer)?;
    if record.loss.is_finite() { Ok(record) } else { Err(Error::BrokenModel { loss: record.loss }) }
}

/// Evaluates with the parameters that are in the arena.
pub(crate) fn evaluate_in(
    program: &Program,
    arena: &mut Arena,
    data: &EvalData,
    observer: &mut dyn Observer,
) -> Result<EvalRecord> {
    let mut batch = Batch::new(program.shape, program.vocab_size);
    let mut blocks = match data {
        EvalData::Text { blocks, .. } => Some(blocks.clone()),
        EvalData::Samples(_) => None,
    };
    let n_rows = data.n_rows();
    let (mut first, mut tokens, mut sum) = (0, 0, 0.0);
    while first < n_rows {
        if observer.stop_requested() {
            return Err(Error::Interrupted { step: 0, checkpoint: None });
        }
        let n = program.shape.n_rows.min(n_rows - first);
        let mut buffers = program.executor.buffers(arena);
        batch.fill(&mut buffers, program.inputs, n, |row, to| {
            let block = blocks.as_mut().and_then(Iterator::next);
            data.read(block, first + row, to)
        })?;
        first += n;
        tokens += batch.n_predictions();
        let done = program.executor.run(arena, &StepInputs::forward(batch.spans()));
        done.expect("a plan without updates is never stopped");
        let mut buffers = program.executor.buffers(arena);
        let losses = buffers.session_f32(program.output);
        // One sum in the order of the rows: the same however many of them run at once.
        for x in losses.iter() {
            sum += f64::from(*x);
        }
    }
    let loss = sum / tokens as f64;
    Ok(EvalRecord { loss, tokens, perplexity: loss.exp() })
}
