//! What a run tells its caller: records with the names of the JSON lines, and who receives them.

use serde::Serialize;

/// One training step.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepRecord {
    /// Counted from 1.
    pub step: u64,
    /// Mean over the supervised tokens of the step, before the update.
    pub loss: f64,
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of the whole gradient, before clipping.
    pub grad_norm: f64,
    /// Tokens of the step, gaps not counted.
    pub tokens: u64,
    /// Seconds.
    pub step_s: f64,
    /// `tokens / step_s`.
    pub tokens_per_s: f64,
    /// Highest resident memory of the process so far.
    pub rss_peak_bytes: u64,
    /// What the gradient was multiplied with on its way, in f16.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<f32>,
    /// Whether the step updated nothing.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// The end of a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DoneRecord {
    /// Always true: tells the last line from the others.
    pub done: bool,
    /// Steps of the run.
    pub steps: u64,
    /// Tokens of all steps over their time.
    pub tokens_per_s: f64,
    /// Peak that was promised of all phases, process baseline included; timing kernels may be the largest of them.
    pub plan_peak_bytes: u64,
    /// The budget.
    pub budget_bytes: u64,
    /// Highest resident memory of the process.
    pub rss_peak_bytes: u64,
    /// Mean loss on the held-out text, if there is one.
    pub eval_loss: Option<f64>,
    /// Steps of the run that updated nothing, because a number was not finite.
    pub skipped_steps: u64,
}

/// An evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EvalRecord {
    /// Mean over the predictions.
    pub loss: f64,
    /// Predictions.
    pub tokens: u64,
    /// `exp(loss)`.
    pub perplexity: f64,
}

/// A plan in numbers.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PlanRecord {
    /// The budget of the whole process.
    pub budget_bytes: u64,
    /// Peak of the whole process, over training, evaluation and sampling.
    pub peak_bytes: u64,
    /// Peak of the training step alone.
    pub step_peak_bytes: u64,
    /// Planned bytes of the arena.
    pub arena_bytes: u64,
    /// Declared bytes of the process outside the arena.
    pub baseline_bytes: u64,
    /// Bytes of the baseline that are for tokenizing streamed data beside the steps.
    pub streaming_bytes: u64,
    /// No placement of this schedule can need less.
    pub max_load_bytes: u64,
    /// Predicted time of a step.
    pub step_s: f64,
    /// No schedule within the budget is faster, by the same costs.
    pub step_bound_s: f64,
    /// Predicted time of the fastest plan of any size.
    pub unconstrained_step_s: f64,
    /// Parameters, tied ones once.
    pub n_params: u64,
    /// Rows per step.
    pub rows: u64,
    /// Tokens per row.
    pub max_length: u64,
    /// Micro-batches that the planner cut the step into.
    pub micro_batches: u64,
    /// `token-major` or `layer-major`.
    pub loop_order: String,
    /// Tokens that the head takes at once.
    pub head_chunk_tokens: u64,
    /// Whether gradients go into the update as soon as they are complete.
    pub release_gradients: bool,
    /// Forward values that are kept for the backward.
    pub kept_values: u64,
    /// Runs of forward ops that are repeated.
    pub recomputed_ops: u64,
    /// What each phase of the run takes, in the order of their first time.
    pub phases: Vec<PhaseRecord>,
    /// What the machine does not have for this run, in words.
    pub warnings: Vec<String>,
    /// The table for people; not a JSON field.
    #[serde(skip)]
    pub table: String,
}

/// What one phase of a run takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PhaseRecord {
    /// Its name.
    pub phase: &'static str,
    /// Most bytes of the process and its child.
    pub peak_bytes: u64,
}

/// Who receives what a run tells, and may ask it to stop. Every method has a silent default.
pub trait Observer {
    /// Something worth a line: what is being done, what was decided.
    fn note(&mut self, _text: &str) {}
    /// The plan, before step 1. `n_steps` is the length of the run.
    fn planned(&mut self, _plan: &PlanRecord, _n_steps: u64) {}
    /// A step is done.
    fn step(&mut self, _record: &StepRecord) {}
    /// An evaluation after `step` steps.
    fn evaluated(&mut self, _step: u64, _record: &EvalRecord) {}
    /// A sample text after `step` steps.
    fn sample(&mut self, _step: u64, _text: &str) {}
    /// Whether to stop; asked between steps, batches and tokens.
    fn stop_requested(&self) -> bool {
        false
    }
}

/// An observer that listens to nothing.
#[derive(Debug, Default, Clone, Copy)]
pub struct Silent;

impl Observer for Silent {}
