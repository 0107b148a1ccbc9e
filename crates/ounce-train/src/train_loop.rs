//! Training: settings to plans, plans to steps, steps to a model directory.

use std::time::Instant;

use ounce_exec::{OptimizerHyper, StepInputs};
use ounce_io::{BlockSampler, TokenCache};
use ounce_ir::{OptimizerKind, ValueId, ValueKind};
use ounce_program::StepShape;

use crate::batch::Batch;
use crate::budget::peak_resident_bytes;
use crate::evaluate::{EvalText, evaluate_in};
use crate::generate::{Sampler, sample_text};
use crate::model::{Model, missing};
use crate::output::Output;
use crate::schedule::Schedule;
use crate::session::{Limits, Session, TrainWanted, Wanted, compile};
use crate::settings::Optimizer;
use crate::text_table::TextTable;
use crate::tokenize::{self, Request};
use crate::watch::{Health, StepNumbers};
use crate::{DoneRecord, Environment, Error, Observer, PlanRecord, Result, Settings, StepRecord};

/// What `ounce plan` shows: the plan of the run that `train` would do.
///
/// # Errors
/// As [`train`] before its first step.
pub fn plan(settings: &Settings, env: &Environment) -> Result<PlanRecord> {
    let model = Model::open(settings)?;
    let session = compile(&model, &wanted(settings, &model), &limits(settings), env)?;
    Ok(session.record())
}

/// Trains a model and writes the result to the output directory.
///
/// # Errors
/// Anything that is wrong with settings, model, data or budget, before step 1; a non-finite loss, a
/// request to stop, or a failed write after it. The output directory then is as it was.
pub fn train(
    settings: &Settings,
    env: &Environment,
    observer: &mut dyn Observer,
) -> Result<DoneRecord> {
    let model = Model::open(settings)?;
    let output_dir = settings.output_dir.as_deref().ok_or_else(|| missing("--output-dir DIR"))?;
    let data = Data::open(settings, env, &model)?;
    let n_steps = settings.max_steps.unwrap_or_else(|| {
        data.train.n_steps(settings.num_train_epochs, settings.n_rows() as usize)
    });
    let mut session = compile(&model, &wanted(settings, &model), &limits(settings), env)?;
    let weights = session.open_weights(&model)?;
    let plan_html = session.take_picture();
    let output = Output::create(output_dir, &model, settings, &plan_html)?;
    drop(plan_html);
    session.check_baseline()?;
    observer.planned(&session.record(), n_steps);
    session.load(&weights)?;
    let is_fresh = weights.is_fresh();
    drop(weights);
    Run { settings, session, data, output, n_steps, is_fresh }.go(observer)
}

/// The plans that a training run needs.
fn wanted(settings: &Settings, model: &Model) -> Wanted {
    let max_length = model.max_length(settings);
    let shape = StepShape::new(settings.n_rows(), max_length);
    let train = TrainWanted {
        shape,
        optimizer: match settings.optimizer {
            Optimizer::Adamw => OptimizerKind::AdamW,
            Optimizer::Sgd => OptimizerKind::Sgd,
        },
        clip: settings.max_grad_norm > 0.0,
        dropout: settings.dropout as f32,
    };
    // A token of the prompt is at least a byte, and one more may begin it.
    let sample_tokens = settings.sample_tokens + settings.sample_prompt.len() as u64 + 1;
    let samples = settings.sample_steps != Some(0) && settings.sample_tokens > 0;
    Wanted {
        train: Some(train),
        eval: (!settings.eval_data.is_empty()).then_some(shape),
        sample_tokens: samples.then_some(sample_tokens.min(max_length)),
        max_length,
    }
}

/// The budget and the threads of a run.
pub(crate) fn limits(settings: &Settings) -> Limits {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Limits {
        budget_bytes: settings.memory.resolve(),
        n_threads: settings.threads.map_or(cores, |n| n as usize),
    }
}

/// The tokens of a run, and what turns ids into text.
struct Data {
    train: BlockSampler,
    eval: Option<EvalText>,
    table: TextTable,
    prompt_ids: Vec<u32>,
    stop_ids: Vec<u32>,
}

impl Data {
    fn open(settings: &Settings, env: &Environment, model: &Model) -> Result<Self> {
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
        };
        let answer = tokenize::ask(env, &request)?;
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

/// A run whose plans are made and whose weights are loaded.
struct Run<'a> {
    settings: &'a Settings,
    session: Session,
    data: Data,
    output: Output,
    n_steps: u64,
    /// Whether the weights are random.
    is_fresh: bool,
}

impl Run<'_> {
    fn go(mut self, observer: &mut dyn Observer) -> Result<DoneRecord> {
        let mut trainer = Trainer::new(self.settings, &self.session, self.n_steps);
        let vocab_size = trainer.batch.vocab_size();
        let mut health = Health::new(vocab_size, self.is_fresh);
        let (mut tokens, mut seconds) = (0, 0.0);
        let mut eval_loss = None;
        for step in 1..=self.n_steps {
            if observer.stop_requested() {
                return Err(Error::Interrupted { step: step - 1 });
            }
            let record = trainer.step(&mut self.session, &self.data.train, step)?;
            (tokens, seconds) = (tokens + record.tokens, seconds + record.step_s);
            self.output.step(&record)?;
            observer.step(&record);
            for warning in health.observe(numbers(&record)) {
                observer.note(&format!("warning: {warning}"));
            }
            let is_last = step == self.n_steps;
            if is_last || self.settings.eval_steps.is_some_and(|n| step.is_multiple_of(n)) {
                eval_loss = self.evaluate(step, observer)?;
            }
            if is_last
                || self.settings.sample_steps.is_some_and(|n| n > 0 && step.is_multiple_of(n))
            {
                self.sample(step, observer)?;
            }
        }
        let program = self.session.train.as_ref().expect("a training run has a training plan");
        self.output.publish(program, &mut self.session.arena)?;
        Ok(DoneRecord {
            done: true,
            steps: self.n_steps,
            tokens_per_s: tokens as f64 / seconds,
            plan_peak_bytes: self.session.peak_bytes,
            budget_bytes: self.session.budget_bytes,
            rss_peak_bytes: peak_resident_bytes(),
            eval_loss,
        })
    }

    fn evaluate(&mut self, step: u64, observer: &mut dyn Observer) -> Result<Option<f64>> {
        let (Some(text), Some(program)) = (&self.data.eval, &self.session.eval) else {
            return Ok(None);
        };
        let record = evaluate_in(program, &mut self.session.arena, text, observer)?;
        self.output.evaluated(step, &record)?;
        observer.evaluated(step, &record);
        Ok(Some(record.loss))
    }

    fn sample(&mut self, step: u64, observer: &mut dyn Observer) -> Result<()> {
        let Some(program) = &self.session.sample else { return Ok(()) };
        let sampler = Sampler {
            temperature: 0.8,
            seed: self.settings.seed,
            n_tokens: self.settings.sample_tokens,
            stop_ids: &self.data.stop_ids,
        };
        let mut text = self.settings.sample_prompt.clone();
        let mut append = |piece: &str| text.push_str(piece);
        let (table, prompt) = (&self.data.table, &self.data.prompt_ids);
        sample_text(
            program,
            &mut self.session.arena,
            table,
            prompt,
            &sampler,
            observer,
            &mut append,
        )?;
        observer.sample(step, &text);
        Ok(())
    }
}

/// What a step's health is judged by.
fn numbers(r: &StepRecord) -> StepNumbers {
    let StepRecord { step, loss, grad_norm, learning_rate, .. } = *r;
    StepNumbers { step, loss, grad_norm, learning_rate }
}

/// Where a step's rows come from.
pub(crate) trait Rows {
    /// Writes row `row` of step `step` (counted from 1) and returns its length.
    fn read(&self, step: u64, n_rows: u64, row: u64, ids: &mut [i32]) -> Result<usize>;
}

impl Rows for BlockSampler {
    fn read(&self, step: u64, n_rows: u64, row: u64, ids: &mut [i32]) -> Result<usize> {
        let row = row as usize;
        self.fill_row_range(step - 1, n_rows as usize, row..row + 1, ids)?;
        Ok(ids.len())
    }
}

/// Runs training steps.
pub(crate) struct Trainer {
    batch: Batch,
    schedule: Schedule,
    seed: u64,
    hyper: OptimizerHyper,
    max_grad_norm: f32,
    /// Parts of the squared gradient norm, by `ParamId`.
    norm_parts: Vec<ValueId>,
}

impl Trainer {
    pub(crate) fn new(settings: &Settings, session: &Session, n_steps: u64) -> Self {
        let program = session.train.as_ref().expect("a training run has a training plan");
        let is_part = |id: &ValueId| {
            let v = &program.graph.values[*id];
            v.kind == ValueKind::Scalar && v.dtype == ounce_ir::DType::F64
        };
        Self {
            batch: Batch::new(program.shape, program.vocab_size),
            schedule: Schedule::new(
                settings.lr_scheduler_type,
                settings.learning_rate,
                settings.min_lr_ratio,
                settings.warmup_steps,
                n_steps,
            ),
            seed: settings.seed,
            hyper: OptimizerHyper {
                beta1: settings.adam_beta1 as f32,
                beta2: settings.adam_beta2 as f32,
                eps: settings.adam_epsilon as f32,
                weight_decay: settings.weight_decay as f32,
            },
            max_grad_norm: settings.max_grad_norm as f32,
            norm_parts: program.graph.values.ids().filter(is_part).collect(),
        }
    }

    /// One step: data, run, loss and norm.
    ///
    /// # Errors
    /// Reading the data, or [`Error::NonFinite`].
    pub(crate) fn step(
        &mut self,
        session: &mut Session,
        rows: &dyn Rows,
        step: u64,
    ) -> Result<StepRecord> {
        let start = Instant::now();
        let Session { train, arena, .. } = session;
        let program = train.as_ref().expect("a training run has a training plan");
        let n_rows = program.shape.n_rows;
        let mut buffers = program.executor.buffers(arena);
        let read = |row, ids: &mut [i32]| rows.read(step, n_rows, row, ids);
        self.batch.fill(&mut buffers, program.inputs, n_rows, read)?;
        let n_predictions = self.batch.n_predictions() as f64;
        let learning_rate = self.schedule.learning_rate(step);
        program.executor.run(
            arena,
            &StepInputs {
                seed: self.seed,
                step,
                grad_scale: (1.0 / n_predictions) as f32,
                lr: learning_rate as f32,
                hyper: self.hyper,
                max_grad_norm: self.max_grad_norm,
                rows: self.batch.spans(),
            },
        );
        let mut buffers = program.executor.buffers(arena);
        // In token order; gaps and unsupervised tokens hold exact zeros.
        let losses = buffers.session_f32(program.output).iter();
        let loss = losses.map(|&x| f64::from(x)).sum::<f64>() / n_predictions;
        let parts = self.norm_parts.iter().map(|&v| buffers.session_f64(v)[0]);
        let grad_norm = parts.sum::<f64>().sqrt();
        if !(loss.is_finite() && grad_norm.is_finite()) {
            return Err(Error::NonFinite { step, loss, grad_norm });
        }
        let (tokens, step_s) = (self.batch.n_tokens(), start.elapsed().as_secs_f64());
        Ok(StepRecord {
            step,
            loss,
            learning_rate,
            grad_norm,
            tokens,
            step_s,
            tokens_per_s: tokens as f64 / step_s,
            rss_peak_bytes: peak_resident_bytes(),
        })
    }
}
