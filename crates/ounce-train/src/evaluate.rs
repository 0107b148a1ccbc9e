//! Evaluation: the mean loss over every prediction of a text.
//!
//! The text is cut into consecutive blocks of `max_length` ids, the last one shorter. Losses are added
//! in f64 in the order of the text, so the result does not depend on how many rows run at once.

use std::path::Path;

use ounce_exec::{Arena, StepInputs};
use ounce_io::{EvalBlocks, TokenCache};
use ounce_program::StepShape;

use crate::batch::Batch;
use crate::graphs::Wanted;
use crate::model::{Model, missing};
use crate::precision::policy_for;
use crate::session::{Program, check_tokenizing, compile};
use crate::tokenize::{self, Request};
use crate::train_loop::limits;
use crate::{Environment, Error, EvalRecord, Observer, Result, Settings};

/// A text to evaluate on.
pub(crate) struct EvalText {
    cache: TokenCache,
    blocks: EvalBlocks,
}

impl EvalText {
    /// Opens a token file.
    pub(crate) fn open(path: &Path, max_length: usize) -> Result<Self> {
        let cache = TokenCache::open(path)?;
        let blocks = EvalBlocks::new(&cache, max_length)?;
        Ok(Self { cache, blocks })
    }
}

/// The command: loss and perplexity of the model on `data` (or `eval_data`).
///
/// # Errors
/// Wrong settings, model or data; a budget that does not fit; a request to stop.
pub fn evaluate(
    settings: &Settings,
    env: &Environment,
    observer: &mut dyn Observer,
) -> Result<EvalRecord> {
    let model = Model::open(settings, env)?;
    let files = if settings.data.is_empty() { &settings.eval_data } else { &settings.data };
    if files.is_empty() {
        return Err(missing("--data FILE"));
    }
    let (limits, max_length) = (limits(settings), model.max_length(settings));
    let wanted = Wanted {
        train: None,
        eval: Some(StepShape::new(settings.per_device_train_batch_size, max_length)),
        sample_tokens: None,
        max_length,
        policy: policy_for(settings, &model.dir),
    };
    let request = Request {
        tokenizer: model.dir.clone(),
        cache_dir: tokenize::cache_dir(env),
        streams: vec![files.clone()],
        prompt: None,
        n_threads: tokenize::n_threads(&model.dir, &limits),
    };
    check_tokenizing(&model, &wanted, &limits, env)?;
    let answer = tokenize::ask(env, &request, observer)?;
    tokenize::check_vocab(&model.dir, &answer, model.config.vocab_size())?;
    let text = EvalText::open(&answer.token_files[0], max_length as usize)?;
    let mut session = compile(&model, &wanted, &limits, env)?;
    let weights = session.open_weights(&model)?;
    session.check_baseline()?;
    session.load(&weights)?;
    drop(weights);
    let program = session.eval.as_ref().expect("an evaluation has a plan");
    evaluate_in(program, &mut session.arena, &text, observer)
}

/// Evaluates with the parameters that are in the arena.
pub(crate) fn evaluate_in(
    program: &Program,
    arena: &mut Arena,
    text: &EvalText,
    observer: &mut dyn Observer,
) -> Result<EvalRecord> {
    let mut batch = Batch::new(program.shape, program.vocab_size);
    let mut blocks = text.blocks.clone();
    let tokens = blocks.n_predictions();
    let mut group = Vec::with_capacity(program.shape.n_rows as usize);
    let mut sum = 0.0;
    loop {
        group.clear();
        group.extend(blocks.by_ref().take(program.shape.n_rows as usize));
        if group.is_empty() {
            let loss = sum / tokens as f64;
            return Ok(EvalRecord { loss, tokens, perplexity: loss.exp() });
        }
        if observer.stop_requested() {
            return Err(Error::Interrupted { step: 0, checkpoint: None });
        }
        let mut buffers = program.executor.buffers(arena);
        batch.fill(&mut buffers, program.inputs, group.len() as u64, |row, ids| {
            let (start, len) = group[row as usize];
            text.cache.read(start, &mut ids[..len])?;
            Ok(len)
        })?;
        let done = program.executor.run(arena, &StepInputs::forward(batch.spans()));
        done.expect("a plan without updates is never stopped");
        let mut buffers = program.executor.buffers(arena);
        let losses = buffers.session_f32(program.output);
        // One sum in the order of the text: the same whatever the number of rows.
        for x in losses.iter() {
            sum += f64::from(*x);
        }
    }
}
