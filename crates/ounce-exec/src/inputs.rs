//! What a step is given besides its data: counters, scales, constants of the update rule, rows.

use ounce_kernels::attention::RowSpan;

/// Constants of the update rule, as in `torch.optim.AdamW` and `torch.optim.SGD`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OptimizerHyper {
    /// Decay of AdamW's first moment.
    pub beta1: f32,
    /// Decay of AdamW's second moment.
    pub beta2: f32,
    /// Added to AdamW's denominator.
    pub eps: f32,
    /// Weight decay of the parameters to which it applies.
    pub weight_decay: f32,
}

impl Default for OptimizerHyper {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// What changes from step to step besides the data.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepInputs<'a> {
    /// Seed of the run's random ops.
    pub seed: u64,
    /// Step of the run, counted from 1: part of the key of random numbers.
    pub step: u64,
    /// Update of the run, counted from 1: fewer than steps where some were skipped. AdamW corrects
    /// its bias by it.
    pub update: u64,
    /// Multiplies every token's loss before it is differentiated: 1 / supervised tokens of the step.
    pub grad_scale: f32,
    /// What gradients are multiplied with on the way back, a power of two: 1 but for f16. The clip
    /// scale divides by it, so graphs without one take 1.
    pub loss_scale: f32,
    /// Learning rate.
    pub lr: f32,
    /// Constants of the update rule.
    pub hyper: OptimizerHyper,
    /// Norm to which gradients are clipped, in graphs that clip.
    pub max_grad_norm: f32,
    /// Rows of the step on its token axis, ascending.
    pub rows: &'a [RowSpan],
}

impl<'a> StepInputs<'a> {
    /// Inputs of a graph without update and random ops: evaluation and decoding.
    pub fn forward(rows: &'a [RowSpan]) -> Self {
        Self {
            seed: 0,
            step: 1,
            update: 1,
            grad_scale: 1.0,
            loss_scale: 1.0,
            lr: 0.0,
            hyper: OptimizerHyper::default(),
            max_grad_norm: f32::INFINITY,
            rows,
        }
    }
}
