//! Text to token files, and back.

use ounce_io::{BlockSampler, TokenCache};

use crate::evaluate::EvalText;
use crate::model::{Model, missing};
use crate::session::Limits;
use crate::text_table::TextTable;
use crate::tokenize::{self, Request};
use crate::{Environment, Observer, Result, Settings};

/// The tokens of a run, and what turns ids into text.
pub(crate) struct Data {
    pub(crate) train: BlockSampler,
    pub(crate) eval: Option<EvalText>,
    pub(crate) table: TextTable,
    pub(crate) prompt_ids: Vec<u32>,
    pub(crate) stop_ids: Vec<u32>,
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
        observer: &dyn Observer,
    ) -> Result<Self> {
        if settings.data.is_empty() {
            return Err(missing("--data FILE"));
        }
        let mut streams = vec![settings.data.clone()];
        if !settings.eval_data.is_empty() {
            streams.push(settings.eval_data.clone());
        }
        let request = Request {
            tokenizer: model.dir.clone(),
            cache_dir: tokenize::cache_dir(env),
            streams,
            prompt: Some(settings.sample_prompt.clone()),
            n_threads: tokenize::n_threads(&model.dir, limits),
        };
        let answer = tokenize::ask(env, &request, observer)?;
        tokenize::check_vocab(&model.dir, &answer, model.config.vocab_size())?;
        let max_length = model.max_length(settings) as usize;
        let cache = TokenCache::open(&answer.token_files[0])?;
        let eval = answer.token_files.get(1).map(|path| EvalText::open(path, max_length));
        Ok(Self {
            train: BlockSampler::new(cache, max_length, settings.seed)?,
            eval: eval.transpose()?,
            table: TextTable::read(&answer.text_table)?,
            prompt_ids: answer.prompt_ids,
            stop_ids: answer.stop_ids,
        })
    }
}
