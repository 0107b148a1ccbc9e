//! One training step: rows onto the axis, the plan run, loss and gradient norm read.

use std::fmt::Write;
use std::time::Instant;

use ounce_exec::{NonFinite, OptimizerHyper, StepInputs};
use ounce_io::checkpoint::TrainerState;
use ounce_ir::{ValueId, ValueKind};
use ounce_passes::Precision;

use crate::batch::{Batch, Row};
use crate::budget::peak_resident_bytes;
use crate::precision::{Scaler, Strike};
use crate::program::Overflow;
use crate::schedule::Schedule;
use crate::session::Session;
use crate::settings::OnNonfinite;
use crate::{Error, Observer, Result, Settings, StepRecord};

/// Where a step's rows come from.
pub(crate) trait Rows {
    /// Writes row `row` of step `step` (counted from 1). Rows are asked for in their order.
    fn read(
        &mut self,
        step: u64,
        n_rows: u64,
        row: u64,
        to: &mut Row,
        observer: &mut dyn Observer,
    ) -> Result<()>;

    /// Which rows a step has, in words.
    fn name(&self, step: u64, n_rows: u64) -> String;
}

/// Runs training steps.
pub(crate) struct Trainer {
    batch: Batch,
    schedule: Schedule,
    seed: u64,
    hyper: OptimizerHyper,
    /// Infinite in a graph that clips only to see all of the gradient before it is used.
    max_grad_norm: f32,
    /// Parts of the squared gradient norm, by `ParamId`.
    norm_parts: Vec<ValueId>,
    scaler: Scaler,
    /// Steps, those that were skipped not counted, that updated states which are no longer there.
    n_updates_before: u64,
    demotes: bool,
    skips: bool,
}

impl Trainer {
    /// For a run of `n_steps` steps that begins behind the state of a checkpoint; `keeps_states` says whether the
    /// optimizer goes on with the checkpoint's.
    pub(crate) fn new(
        settings: &Settings,
        session: &mut Session,
        n_steps: u64,
        from: Option<&TrainerState>,
        keeps_states: bool,
    ) -> Self {
        // A scale that scaled nothing says nothing.
        let begun = from.and_then(|state| state.settings.get("precision")?.as_str());
        let scaled = begun == Some(Precision::F16.name());
        let kept = from.and_then(|state| state.scaler.clone());
        let kept = kept.filter(|_| scaled || !settings.policy().precision.scales_loss());
        let scaler = Scaler::new(settings, kept);
        let done = from.map_or(0, |state| state.step) - scaler.n_skipped();
        let n_updates = from.filter(|_| keeps_states).map_or(0, |state| state.n_updates);
        session.demote(&scaler.demoted());
        let program = session.train.as_ref().expect("a training run has a training plan");
        let is_part = |id: &ValueId| {
            let v = &program.graph.values[*id];
            v.kind == ValueKind::Scalar && v.dtype == ounce_ir::DType::F64
        };
        Self {
            batch: Batch::new(program.shape, program.vocab_size),
            schedule: Schedule::of(settings, n_steps),
            seed: settings.seed,
            hyper: OptimizerHyper {
                beta1: settings.adam_beta1 as f32,
                beta2: settings.adam_beta2 as f32,
                eps: settings.adam_epsilon as f32,
                weight_decay: settings.weight_decay as f32,
            },
            max_grad_norm: match settings.max_grad_norm {
                0.0 => f32::INFINITY,
                norm => norm as f32,
            },
            norm_parts: program.graph.values.ids().filter(is_part).collect(),
            n_updates_before: done - n_updates,
            scaler,
            demotes: settings.f16_demote,
            skips: settings.on_nonfinite == OnNonfinite::Skip,
        }
    }

    /// Updates of the optimizer's states up to `step`, that one counted unless it is skipped.
    pub(crate) fn n_updates(&self, step: u64) -> u64 {
        step - self.scaler.n_skipped() - self.n_updates_before
    }

    /// The learning rate of a step.
    pub(crate) fn learning_rate(&self, step: u64) -> f64 {
        self.schedule.learning_rate(step)
    }

    /// Where the loss scale stands.
    pub(crate) fn scaler(&self) -> &Scaler {
        &self.scaler
    }

    /// One step: data, run, loss and norm. A step whose numbers are not finite is skipped where the
    /// loss scale is to blame or the settings say so; parameters and states are then those before it.
    ///
    /// # Errors
    /// Reading the data; [`Error::NonFinite`], in which case parameters and states are those before
    /// the step, unless the gradient is not finite while the loss is and nothing is clipped.
    pub(crate) fn step(
        &mut self,
        session: &mut Session,
        rows: &mut dyn Rows,
        step: u64,
        observer: &mut dyn Observer,
    ) -> Result<StepRecord> {
        let start = Instant::now();
        let Session { train, arena, .. } = session;
        let program = train.as_ref().expect("a training run has a training plan");
        let n_rows = program.shape.n_rows;
        let mut buffers = program.executor.buffers(arena);
        let read = |row, to: &mut Row| rows.read(step, n_rows, row, to, observer);
        self.batch.fill(&mut buffers, program.inputs, n_rows, read)?;
        let n_predictions = self.batch.n_predictions() as f64;
        let learning_rate = self.learning_rate(step);
        let loss_scale = self.scaler.scale();
        let inputs = StepInputs {
            seed: self.seed,
            step,
            update: self.n_updates(step),
            grad_scale: (1.0 / n_predictions) as f32,
            loss_scale,
            lr: learning_rate as f32,
            hyper: self.hyper,
            max_grad_norm: self.max_grad_norm,
            rows: self.batch.spans(),
        };
        let done = program.executor.run(arena, &inputs);
        let mut buffers = program.executor.buffers(arena);
        // In token order; gaps and unsupervised tokens hold exact zeros.
        let losses = buffers.session_f32(program.output).iter();
        let loss = losses.map(|&x| f64::from(x)).sum::<f64>() / n_predictions;
        let parts = self.norm_parts.iter().map(|&v| buffers.session_f64(v)[0]);
        let norm = parts.sum::<f64>().sqrt() / f64::from(loss_scale);
        let non_finite = |what: String, kept| Error::NonFinite {
            step,
            what,
            learning_rate,
            rows: rows.name(step, n_rows),
            kept,
            checkpoint: None,
        };
        let mut grad_norm = norm;
        if let Err(e) = done {
            let first = if self.scaler.scales() {
                program.executor.first_overflow(arena, &inputs).map(|at| program.overflow(at))
            } else {
                None
            };
            let what = match e {
                NonFinite::Loss(_) => format!("the loss is {loss}"),
                NonFinite::GradNorm(_) => format!("the gradient norm is {norm}"),
            };
            // The norm of a gradient that was not run to its end is no number.
            grad_norm = f64::NAN;
            let Some(reaction) = self.react(&e, first.as_ref(), session) else {
                let what = what + &first.as_ref().map_or_else(String::new, left_range);
                return Err(non_finite(what, "the weights are those before the step"));
            };
            observer.note(&format!("step {step} is skipped: {what}{reaction}"));
        } else if !norm.is_finite() {
            let what = format!("the loss is {loss}, the gradient norm {norm}");
            return Err(non_finite(what, "nothing of the step is saved"));
        } else {
            self.scaler.good_step();
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
            loss_scale: self.scaler.scales().then_some(loss_scale),
            skipped: done.is_err(),
        })
    }

    /// What is done about a step that is not finite, in words; `None` if the run must end. `first` is
    /// the op that overflowed first.
    fn react(
        &mut self,
        e: &NonFinite,
        first: Option<&Overflow>,
        session: &mut Session,
    ) -> Option<String> {
        let mut reaction =
            first.map_or_else(String::new, |first| format!("; {} overflowed first", first.name));
        let before = self.scaler.scale();
        // A loss that is not finite was so before anything was scaled.
        let is_scaled_down = matches!(e, NonFinite::GradNorm(_)) && self.scaler.back_off();
        let strikes = first.filter(|_| self.demotes).map(|first| {
            let is_in_f32 = self.scaler.demoted().contains(&first.class);
            (first.class, is_in_f32, self.scaler.strike(first.class))
        });
        let may_help = strikes.is_some_and(|(_, is_in_f32, _)| !is_in_f32);
        if is_scaled_down {
            write!(reaction, "; loss scale {before:?} -> {:?}", self.scaler.scale()).ok()?;
        } else if self.skips || may_help {
            self.scaler.skip();
        } else {
            return None;
        }
        if let Some((class, _, Strike::Out)) = strikes {
            session.demote(&self.scaler.demoted());
            write!(reaction, "; class {class} is f32 from here on").ok()?;
        }
        Some(reaction)
    }
}

/// Why a step of f16 is not finite.
fn left_range(first: &Overflow) -> String {
    let ways = "`--f16-demote` takes it out, `--precision bf16` has more";
    format!(", since {} left the range of f16 ({ways})", first.name)
}
