//! One training step: rows onto the axis, the plan run, loss and gradient norm read.

use std::time::Instant;

use ounce_exec::{NonFinite, OptimizerHyper, StepInputs};
use ounce_io::BlockSampler;
use ounce_ir::{ValueId, ValueKind};

use crate::batch::Batch;
use crate::budget::peak_resident_bytes;
use crate::schedule::Schedule;
use crate::session::Session;
use crate::{Error, Result, Settings, StepRecord};

/// Where a step's rows come from.
pub(crate) trait Rows {
    /// Writes row `row` of step `step` (counted from 1) and returns its length.
    fn read(&self, step: u64, n_rows: u64, row: u64, ids: &mut [i32]) -> Result<usize>;

    /// Which rows a step has, in words.
    fn name(&self, step: u64, n_rows: u64) -> String;
}

impl Rows for BlockSampler {
    fn read(&self, step: u64, n_rows: u64, row: u64, ids: &mut [i32]) -> Result<usize> {
        let row = row as usize;
        self.fill_row_range(step - 1, n_rows as usize, row..row + 1, ids)?;
        Ok(ids.len())
    }

    fn name(&self, step: u64, n_rows: u64) -> String {
        // Enough to find the text; a large batch is not listed whole.
        let listed = n_rows.min(16);
        let blocks = (0..listed).map(|r| self.block(step - 1, n_rows as usize, r as usize));
        let blocks: Vec<String> = blocks.map(|b| b.to_string()).collect();
        let more = if listed < n_rows { ", ..." } else { "" };
        format!("blocks {}{more} of the data", blocks.join(", "))
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
    /// For a run of `n_steps` steps.
    pub(crate) fn new(settings: &Settings, session: &Session, n_steps: u64) -> Self {
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
            max_grad_norm: settings.max_grad_norm as f32,
            norm_parts: program.graph.values.ids().filter(is_part).collect(),
        }
    }

    /// One step: data, run, loss and norm.
    ///
    /// # Errors
    /// Reading the data; [`Error::NonFinite`], in which case parameters and states are those before
    /// the step, unless the gradient is not finite while the loss is and nothing is clipped.
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
        let non_finite = |what: String, kept| Error::NonFinite {
            step,
            what,
            learning_rate,
            rows: rows.name(step, n_rows),
            kept,
        };
        let done = program.executor.run(
            arena,
            &StepInputs {
                seed: self.seed,
                step,
                grad_scale: (1.0 / n_predictions) as f32,
                loss_scale: 1.0,
                lr: learning_rate as f32,
                hyper: self.hyper,
                max_grad_norm: self.max_grad_norm,
                rows: self.batch.spans(),
            },
        );
        done.map_err(|e| match e {
            NonFinite::Loss(sum) => format!("the loss is {}", sum / n_predictions),
            NonFinite::GradNorm(norm) => format!("the gradient norm is {norm}"),
        })
        .map_err(|what| non_finite(what, "the weights are those before the step"))?;
        let mut buffers = program.executor.buffers(arena);
        // In token order; gaps and unsupervised tokens hold exact zeros.
        let losses = buffers.session_f32(program.output).iter();
        let loss = losses.map(|&x| f64::from(x)).sum::<f64>() / n_predictions;
        let parts = self.norm_parts.iter().map(|&v| buffers.session_f64(v)[0]);
        let grad_norm = parts.sum::<f64>().sqrt();
        if !grad_norm.is_finite() {
            let what = format!("the loss is {loss}, the gradient norm {grad_norm}");
            return Err(non_finite(what, "nothing of the step is saved"));
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
