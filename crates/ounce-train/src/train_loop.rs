//! Training: settings to plans, plans to steps, steps to a model directory.

use std::fs::File;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use ounce_io::checkpoint::Checkpoint;
use ounce_io::dataset::check_file;
use ounce_program::StepShape;

use crate::budget::peak_resident_bytes;
use crate::checkpoint::{self, Saver};
use crate::compile::{check_tokenizing, compile};
use crate::data::Data;
use crate::evaluate::evaluate_in;
use crate::generate::{Sampler, sample_text};
use crate::graphs::{TrainWanted, Wanted};
use crate::limits::Limits;
use crate::model::{Model, missing};
use crate::output::{self, Output, Staged};
use crate::session::Session;
use crate::step::{Rows, Trainer};
use crate::stream::StreamWanted;
use crate::watch::{Health, StepNumbers};
use crate::weights;
use crate::{DoneRecord, Environment, Error, Observer, PlanRecord, Result, Settings, StepRecord};

/// What `ounce plan` shows: the plan of the run that `train` would do.
///
/// # Errors
/// As [`train`] before its first step.
pub fn plan(settings: &Settings, env: &Environment) -> Result<PlanRecord> {
    settings.check_company()?;
    let model = Model::open(settings, env)?;
    check_files(settings)?;
    let session = compile(&model, &wanted(settings, &model), &Limits::of_training(settings), env)?;
    Ok(session.record())
}

/// Refuses data files that are not there or not read, before anything else is said of them.
fn check_files(settings: &Settings) -> Result<()> {
    let files = settings.data.iter().map(crate::settings::DataFile::path);
    for path in files.chain(settings.eval_data.iter().map(PathBuf::as_path)) {
        check_file(path)?;
    }
    Ok(())
}

/// Trains a model and writes the result to the output directory.
///
/// # Errors
/// Anything that is wrong with settings, model, data or budget, before step 1; a non-finite loss, a
/// request to stop, or a failed write after it. A model that was in the output directory before is
/// then as it was; a run that was asked to stop leaves a checkpoint there.
pub fn train(
    settings: &Settings,
    env: &Environment,
    observer: &mut dyn Observer,
) -> Result<DoneRecord> {
    settings.check_company()?;
    let output_dir = settings.output_dir.as_deref().ok_or_else(|| missing("--output-dir DIR"))?;
    let lock = output::lock(output_dir, observer)?;
    let from = checkpoint::find(settings, output_dir, observer)?;
    let begun = from.as_ref().map(|c| (c.state().step, c.path().to_path_buf()));
    train_from(settings, env, (output_dir, lock), from, observer).map_err(|e| match (e, begun) {
        // Stopped before its first step: it stands where it stood.
        (Error::Interrupted { checkpoint: None, .. }, Some((step, path))) => {
            Error::Interrupted { step, checkpoint: Some(path) }
        }
        (e, _) => e,
    })
}

/// Trains from a checkpoint, if there is one, into a directory that is locked if it is there.
fn train_from(
    settings: &Settings,
    env: &Environment,
    (output_dir, lock): (&Path, Option<File>),
    from: Option<Checkpoint>,
    observer: &mut dyn Observer,
) -> Result<DoneRecord> {
    let model = match &from {
        Some(checkpoint) => Model::at(checkpoint.path())?,
        None => Model::open(settings, env)?,
    };
    // Settings that are kept name the model that the run began from, and the length, given or the model's.
    let begun_from = from.as_ref().and_then(checkpoint::model_begun_from);
    let settings = &Settings {
        model: begun_from.or_else(|| settings.model.clone()),
        max_length: Some(model.max_length(settings)),
        ..settings.clone()
    };
    let (plans, limits) = (wanted(settings, &model), Limits::of_training(settings));
    check_tokenizing(&model, &plans, &limits, env)?;
    check_files(settings)?;
    note_settings(settings, &model, observer);
    if let (Some(checkpoint), Some(n_steps)) = (&from, settings.max_steps) {
        checkpoint::check_settings(checkpoint, settings, n_steps, observer)?;
    }
    let data = Data::open(settings, env, &model, &limits, from.as_ref(), observer)?;
    let n_steps = settings
        .max_steps
        .unwrap_or_else(|| data.train.n_steps(settings.num_train_epochs, settings.n_rows()));
    if let (Some(checkpoint), None) = (&from, settings.max_steps) {
        checkpoint::check_settings(checkpoint, settings, n_steps, observer)?;
    }
    if let Some(checkpoint) = &from {
        checkpoint::check_end(checkpoint, n_steps)?;
        checkpoint::check_data(checkpoint, settings, &data.train, observer)?;
    }
    let mut session = compile(&model, &plans, &limits, env)?;
    let weights = session.open_weights(&model)?;
    let plan_html = session.take_picture();
    let stored = settings.policy().precision.param_dtype();
    let staged = Staged::create(env, output_dir, &model, (stored, &plan_html), lock, observer)?;
    drop(plan_html);
    let saver = Saver::new(settings, env, staged.side_files(), &session, from.as_ref())?;
    saver.check_room(settings)?;
    session.check_baseline()?;
    observer.planned(&session.record(), n_steps);
    session.load(&weights)?;
    let is_fresh = weights.is_fresh() && from.is_none();
    drop(weights);
    let tokens_seen = from.as_ref().map_or(0, |c| c.state().tokens_seen);
    if let Some(checkpoint) = &from {
        let has_states = checkpoint::has_states_of(checkpoint, settings);
        session.load_states(checkpoint, has_states)?;
        if !has_states {
            observer.note("warning: the optimizer is another one: its states begin at zero");
        }
    }
    let state = from.as_ref().map(Checkpoint::state);
    let keeps_states = from.as_ref().is_some_and(|c| checkpoint::has_states_of(c, settings));
    let trainer = Trainer::new(settings, &mut session, n_steps, state, keeps_states);
    let output = staged.begin(settings, from.as_ref(), observer)?;
    let vocab_size = model.config.vocab_size();
    let health = Health::new(vocab_size, is_fresh);
    let step = state.map_or(0, |state| state.step);
    let checkpoint = from.map(|c| c.path().to_path_buf());
    let place =
        Place { step, tokens_seen, eval_loss: None, checkpoint, saved_step: step, good: None };
    Run { settings, session, trainer, data, output, saver, health, n_steps, place }.go(observer)
}

/// Says what a user may expect of the settings and will not get.
fn note_settings(settings: &Settings, model: &Model, observer: &mut dyn Observer) {
    let dropout = model.config.dropout();
    if dropout > 0.0 && settings.dropout == 0.0 {
        observer.note(&format!(
            "config.json names a dropout of {dropout}; a run has its own: `--dropout {dropout}` trains with it"
        ));
    }
    if settings.eval_steps.is_some() && settings.eval_data.is_empty() {
        observer.note("warning: `--eval-steps` without `--eval-data` evaluates nothing");
    }
}

/// The plans that a training run needs.
fn wanted(settings: &Settings, model: &Model) -> Wanted {
    let max_length = model.max_length(settings);
    let shape = StepShape::new(settings.n_rows(), max_length);
    // A token of the prompt is at least a byte, and one more may begin it.
    let sample_tokens =
        settings.sample_tokens.saturating_add(settings.sample_prompt.len() as u64 + 1);
    Wanted {
        tokenizes: true,
        train: Some(TrainWanted::of(settings, shape)),
        eval: (!settings.eval_data.is_empty()).then_some(shape),
        sample_tokens: settings.samples().then_some(sample_tokens.min(max_length)),
        stream: StreamWanted::of(settings, max_length),
        max_length,
        policy: settings.policy(),
    }
}

/// A run whose plans are made and whose weights are loaded.
struct Run<'a> {
    settings: &'a Settings,
    session: Session,
    trainer: Trainer,
    data: Data,
    output: Output,
    saver: Saver,
    health: Health,
    n_steps: u64,
    place: Place,
}

/// Where a run stands.
struct Place {
    /// Steps done.
    step: u64,
    tokens_seen: u64,
    /// The last evaluation.
    eval_loss: Option<f64>,
    /// The last checkpoint.
    checkpoint: Option<PathBuf>,
    /// Steps done when it was saved.
    saved_step: u64,
    /// The last checkpoint whose weights gave a finite loss, in a step or an evaluation.
    good: Option<PathBuf>,
}

impl Place {
    /// Tells a step that ended the run where the last good weights are.
    fn name_checkpoint(&self, mut e: Error) -> Error {
        if let Error::NonFinite { checkpoint, .. } = &mut e {
            checkpoint.clone_from(&self.good);
        }
        e
    }
}

impl Run<'_> {
    /// All steps that are left, then the result.
    fn go(mut self, observer: &mut dyn Observer) -> Result<DoneRecord> {
        let (tokens, seconds) = match self.steps(observer) {
            // Whatever phase was interrupted, the parameters are those after the last whole step.
            Err(Error::Interrupted { .. }) if self.place.step > 0 => {
                let step = self.place.step;
                // A checkpoint that stands here already is not written once more.
                let saved = self.place.checkpoint.clone().filter(|_| self.place.saved_step == step);
                let path = saved.map_or_else(|| self.save(), Ok)?;
                return Err(Error::Interrupted { step, checkpoint: Some(path) });
            }
            other => other?,
        };
        // No step comes that could prove the last one: its weights are finite, as those that are published must be.
        self.prove_checkpoint()?;
        let program = self.session.train.as_ref().expect("a training run has a training plan");
        self.saver.check_room_for_model()?;
        let mut buffers = program.executor.buffers(&mut self.session.arena);
        if let Some(name) = weights::first_non_finite(&program.graph, &mut buffers) {
            return Err(self.broken(&format!("{name} holds numbers that are not finite")));
        }
        self.output.publish(program, &mut self.session.arena)?;
        Ok(DoneRecord {
            done: true,
            steps: self.n_steps,
            tokens_per_s: if tokens == 0 { 0.0 } else { tokens as f64 / seconds },
            plan_peak_bytes: self.session.whole_peak_bytes(),
            budget_bytes: self.session.budget_bytes,
            rss_peak_bytes: peak_resident_bytes(),
            eval_loss: self.place.eval_loss,
            skipped_steps: self.trainer.scaler().n_skipped(),
        })
    }

    /// The weights are broken by the update of the last step.
    fn broken(&self, what: &str) -> Error {
        let step = self.place.step;
        self.place.name_checkpoint(Error::NonFinite {
            step,
            what: format!("after its update {what}"),
            learning_rate: self.trainer.learning_rate(step),
            rows: self.data.train.name(step.max(1), self.settings.n_rows()),
            kept: "no model is written",
            checkpoint: None,
        })
    }

    /// The steps that are left, with all that happens between them; tokens and seconds they took.
    fn steps(&mut self, observer: &mut dyn Observer) -> Result<(u64, f64)> {
        let (mut tokens, mut seconds) = (0, 0.0);
        // A run that was stopped while it evaluated, or before, has that still before it.
        let (first, settings) = (self.place.step, self.settings);
        let is_due = self.session.eval.is_some() && every(settings.eval_steps, first);
        if is_due && !self.output.is_evaluated(first) {
            self.look(observer)?;
        }
        for step in self.place.step + 1..=self.n_steps {
            if observer.stop_requested() {
                return Err(Error::Interrupted { step: step - 1, checkpoint: None });
            }
            let Self { trainer, session, data, .. } = self;
            let record = trainer.step(session, &mut data.train, step, observer);
            let record = match record {
                // Its rows: of a stream one that cannot be read, or the process that reads them is gone.
                Err(e @ (Error::Input { .. } | Error::Files { .. })) => {
                    self.keep(observer);
                    return Err(e);
                }
                other => other.map_err(|e| self.place.name_checkpoint(e))?,
            };
            (tokens, seconds) = (tokens + record.tokens, seconds + record.step_s);
            self.place.step = step;
            self.place.tokens_seen += record.tokens;
            self.output.step(&record)?;
            observer.step(&record);
            if !record.skipped {
                self.prove_checkpoint()?;
                for warning in self.health.observe(numbers(&record)) {
                    observer.note(&format!("warning: {warning}"));
                }
            }
            if every(settings.save_steps, step) {
                self.save()?;
            }
            self.look(observer)?;
        }
        self.evaluate(observer)?;
        self.sample(observer)?;
        Ok((tokens, seconds))
    }

    /// Saves the steps that were done before an error, for when its cause is gone.
    fn keep(&mut self, observer: &mut dyn Observer) {
        if self.place.step == self.place.saved_step {
            return;
        }
        observer.note(&match self.save() {
            Ok(path) => format!("the steps that were done are in {}", path.display()),
            Err(e) => format!("the steps that were done cannot be saved: {e}"),
        });
    }

    /// Evaluates and samples, if it is time for it before the last step.
    fn look(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let (settings, step) = (self.settings, self.place.step);
        if every(settings.eval_steps, step) && step < self.n_steps {
            self.evaluate(observer)?;
        }
        if every(settings.sample_steps, step) && step < self.n_steps {
            self.sample(observer)?;
        }
        Ok(())
    }

    /// Writes a checkpoint of the place where the run stands.
    fn save(&mut self) -> Result<PathBuf> {
        let program = self.session.train.as_ref().expect("a training run has a training plan");
        let mut buffers = program.executor.buffers(&mut self.session.arena);
        if let Some(name) = weights::first_non_finite(&program.graph, &mut buffers) {
            return Err(self.broken(&format!("{name} holds numbers that are not finite")));
        }
        let Place { step, tokens_seen, .. } = self.place;
        let scaler = self.trainer.scaler().state().clone();
        let (n_steps, n_updates) = (self.n_steps, self.trainer.n_updates(step));
        let state = checkpoint::state(
            self.settings,
            (step, n_steps),
            n_updates,
            tokens_seen,
            &self.data,
            scaler,
            self.saver.course(),
        );
        let path = self.saver.save(&mut self.session, &state, self.output.metrics())?;
        (self.place.checkpoint, self.place.saved_step) = (Some(path.clone()), step);
        self.output.keep_events()?;
        Ok(path)
    }

    /// The weights of the last checkpoint gave a finite loss: older ones may go, which until now were all that was
    /// known to be good.
    fn prove_checkpoint(&mut self) -> Result<()> {
        let place = &mut self.place;
        if let Some(last) =
            place.checkpoint.as_ref().filter(|last| place.good.as_ref() != Some(last))
        {
            self.saver.rotate(place.step, last)?;
            place.good = Some(last.clone());
        }
        Ok(())
    }

    fn evaluate(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let (Some(text), Some(program)) = (&self.data.eval, &self.session.eval) else {
            return Ok(());
        };
        let record = evaluate_in(program, &mut self.session.arena, text, observer)?;
        if !record.loss.is_finite() {
            return Err(self.broken(&format!("the loss of the evaluation is {}", record.loss)));
        }
        self.prove_checkpoint()?;
        // A run that goes on at its end was evaluated before.
        if !self.output.is_evaluated(self.place.step) {
            self.output.evaluated(self.place.step, &record)?;
        }
        observer.evaluated(self.place.step, &record);
        self.place.eval_loss = Some(record.loss);
        Ok(())
    }

    fn sample(&mut self, observer: &mut dyn Observer) -> Result<()> {
        let Some(program) = &self.session.sample else { return Ok(()) };
        let sampler = Sampler {
            temperature: 0.8,
            seed: self.settings.seed,
            n_tokens: self.settings.sample_tokens,
            stop_ids: &self.data.stop_ids,
        };
        let mut text = self.settings.sample_prompt.clone();
        let mut append = |piece: &str| {
            text.push_str(piece);
            ControlFlow::Continue(())
        };
        let (table, prompt) = (&self.data.table, &self.data.prompt_ids);
        let sampled = sample_text(
            program,
            &mut self.session.arena,
            table,
            prompt,
            &sampler,
            observer,
            &mut append,
        );
        match sampled {
            Err(Error::BrokenModel { .. }) => Err(self.broken("no logit of a sample is finite"))?,
            other => other?,
        };
        observer.sample(self.place.step, &text);
        Ok(())
    }
}

/// Whether something that is done every `n` steps is due after this one.
fn every(n: Option<u64>, step: u64) -> bool {
    n.is_some_and(|n| n > 0 && step > 0 && step.is_multiple_of(n))
}

/// What a step's health is judged by.
fn numbers(r: &StepRecord) -> StepNumbers {
    let StepRecord { step, loss, grad_norm, learning_rate, .. } = *r;
    StepNumbers { step, loss, grad_norm, learning_rate }
}
