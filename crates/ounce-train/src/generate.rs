//! Decoding: one token at a time, recomputing the whole prefix for each.
//!
//! One row holds the text so far, cut on the left to the row's length. Temperature 0 takes the first
//! of the likeliest ids; above 0, an id is drawn by a random number that is a pure function of (seed,
//! position). Ids that the tokenizer does not have are never taken.

use std::ops::ControlFlow;

use ounce_exec::{Arena, StepInputs};
use ounce_kernels::philox::philox4x32_10;
use serde::Serialize;

use crate::batch::Batch;
use crate::compile::{check_tokenizing, compile_and_load};
use crate::graphs::Wanted;
use crate::limits::Limits;
use crate::model::Model;
use crate::precision::policy_for;
use crate::program::Program;
use crate::text_table::{TextStream, TextTable};
use crate::tokenize::{self, Prompt, Request, RowRequest};
use crate::{Environment, Error, Observer, Result, Settings};

/// What `generate` adds to the common settings.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateSettings {
    /// Text to continue.
    pub prompt: String,
    /// 0 takes the likeliest token.
    pub temperature: f64,
    /// Tokens to add at most.
    pub max_new_tokens: u64,
}

/// A continuation.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerateRecord {
    /// The continuation alone.
    pub text: String,
    /// Its ids.
    pub token_ids: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
}

/// How to draw.
pub(crate) struct Sampler<'a> {
    pub(crate) temperature: f64,
    pub(crate) seed: u64,
    pub(crate) n_tokens: u64,
    pub(crate) stop_ids: &'a [u32],
}

/// The command: continues a prompt, handing out text as it comes, until `on_text` breaks off.
///
/// # Errors
/// Wrong settings or model; a budget that does not fit; a request to stop.
pub fn generate(
    settings: &Settings,
    wanted: &GenerateSettings,
    env: &Environment,
    observer: &mut dyn Observer,
    on_text: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<GenerateRecord> {
    if !(wanted.temperature.is_finite() && wanted.temperature >= 0.0) {
        return Err(Error::Usage {
            message: "`temperature` is out of range".to_owned(),
            hint: "it may be 0 (the likeliest token) or above".to_owned(),
        });
    }
    let model = Model::open(settings, env)?;
    model.check_length(settings)?;
    let limits = Limits::of(settings);
    let request = Request {
        tokenizer: model.dir.clone(),
        cache_dir: tokenize::cache_dir(env),
        streams: Vec::new(),
        rows: RowRequest::of(settings, 0),
        prompt: Some(Prompt {
            flag: "--prompt".to_owned(),
            text: wanted.prompt.clone(),
            is_default: false,
        }),
        now_s: tokenize::today_s(),
        n_threads: tokenize::n_threads(&model.dir, &limits),
    };
    let most = settings.max_length.unwrap_or(model.config.max_positions());
    let plans = |n_prompt: u64| {
        let row_tokens = n_prompt.saturating_add(wanted.max_new_tokens).clamp(1, most);
        Wanted {
            tokenizes: true,
            sample_tokens: Some(row_tokens),
            max_length: row_tokens,
            policy: policy_for(settings, &model.dir),
            ..Wanted::default()
        }
    };
    // A token of the prompt is at least a byte, and one more may begin it.
    check_tokenizing(&model, &plans(wanted.prompt.len() as u64 + 1), &limits, env)?;
    let answer = tokenize::ask(env, &request, observer)?;
    tokenize::check_vocab(&model.dir, &answer, model.config.vocab_size())?;
    let table = TextTable::read(&answer.text_table)?;
    let n_prompt = answer.prompt_ids.len() as u64;
    if n_prompt > most {
        observer.note(&format!(
            "warning: of the {n_prompt} tokens of the prompt the model sees the last {most}"
        ));
    }
    let plans = plans(n_prompt);
    let mut session = compile_and_load(&model, &plans, &limits, env, observer)?;
    let sampler = Sampler {
        temperature: wanted.temperature,
        seed: settings.seed,
        n_tokens: wanted.max_new_tokens,
        stop_ids: &answer.stop_ids,
    };
    let mut text = String::new();
    let mut emit = |piece: &str| {
        text.push_str(piece);
        on_text(piece)
    };
    let program = session.sample.as_ref().expect("decoding has a plan");
    let prompt = &answer.prompt_ids;
    let token_ids =
        sample_text(program, &mut session.arena, &table, prompt, &sampler, observer, &mut emit)?;
    Ok(GenerateRecord { text, token_ids, prompt_tokens: prompt.len() as u64 })
}

/// Continues a prompt with the parameters that are in the arena, until `emit` breaks off; returns the new ids.
pub(crate) fn sample_text(
    program: &Program,
    arena: &mut Arena,
    table: &TextTable,
    prompt: &[u32],
    sampler: &Sampler<'_>,
    observer: &mut dyn Observer,
    emit: &mut dyn FnMut(&str) -> ControlFlow<()>,
) -> Result<Vec<u32>> {
    let mut batch = Batch::new(program.shape, program.vocab_size);
    let mut stream = TextStream::default();
    let mut ids = prompt.to_vec();
    // Without a prompt and a token that begins a text, something must be there to continue.
    if ids.is_empty() {
        ids.push(sampler.stop_ids.first().copied().unwrap_or(0));
    }
    let n_prompt = ids.len();
    let mut weights = vec![0.0; program.vocab_size as usize];
    for position in 0..sampler.n_tokens {
        if observer.stop_requested() {
            return Err(Error::Interrupted { step: 0, checkpoint: None });
        }
        let context = &ids[ids.len().saturating_sub(program.shape.row_tokens as usize)..];
        let mut buffers = program.executor.buffers(arena);
        batch.fill(&mut buffers, program.inputs, 1, |_, row| {
            for (x, &id) in row.ids.iter_mut().zip(context) {
                *x = id as i32;
            }
            row.is_text(context.len());
            Ok(())
        })?;
        let done = program.executor.run(arena, &StepInputs::forward(batch.spans()));
        done.expect("a plan without updates is never stopped");
        let mut buffers = program.executor.buffers(arena);
        let logits = buffers.session_f32(program.output);
        let known = &logits[..table.vocab_size().clamp(1, logits.len())];
        if !known.iter().any(|x| x.is_finite()) {
            return Err(Error::BrokenModel { loss: f64::NAN });
        }
        let id = choose(known, sampler, position, &mut weights);
        if sampler.stop_ids.contains(&id) {
            break;
        }
        ids.push(id);
        if emit(&stream.push(table, id)).is_break() {
            return Ok(ids.split_off(n_prompt));
        }
    }
    let _ = emit(&stream.finish());
    Ok(ids.split_off(n_prompt))
}

/// The next id: the first of the likeliest, or drawn from `softmax(logits / temperature)`.
fn choose(logits: &[f32], sampler: &Sampler<'_>, position: u64, weights: &mut [f64]) -> u32 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let first_of_the_likeliest = || logits.iter().position(|&x| x == most).unwrap_or(0);
    if sampler.temperature == 0.0 {
        return first_of_the_likeliest() as u32;
    }
    let mut total = 0.0;
    for (w, &x) in weights.iter_mut().zip(logits) {
        *w = libm::exp(f64::from(x - most) / sampler.temperature);
        total += *w;
    }
    let key = [sampler.seed as u32, (sampler.seed >> 32) as u32];
    let words = philox4x32_10([position as u32, (position >> 32) as u32, SAMPLING, 0], key);
    let mut left = total * f64::from(words[0]) / 4294967296.0;
    for (id, &w) in weights[..logits.len()].iter().enumerate() {
        left -= w;
        if left < 0.0 {
            return id as u32;
        }
    }
    first_of_the_likeliest() as u32
}

/// Tells sampling's random numbers from those of dropout and initialisation.
const SAMPLING: u32 = 0x5341_4d50;

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f64) -> Sampler<'static> {
        Sampler { temperature, seed: 1, n_tokens: 1, stop_ids: &[] }
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_likeliest() {
        assert_eq!(choose(&[0.0, 3.0, -1.0, 3.0], &sampler(0.0), 0, &mut [0.0; 4]), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let logits = [0.0, (3.0_f32).ln(), f32::NEG_INFINITY];
        let mut counts = [0; 3];
        for position in 0..4000 {
            counts[choose(&logits, &sampler(1.0), position, &mut [0.0; 3]) as usize] += 1;
        }
        // 3000 expected with a standard deviation of 27.
        assert!((2860..3140).contains(&counts[1]) && counts[2] == 0, "{counts:?}");
    }
}
