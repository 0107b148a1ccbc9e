//! What a run computes: its graphs, built, differentiated, with their update.

use ounce_ir::{Graph, Lead, OptimizerKind};
use ounce_models::{Purpose, build_for_length};
use ounce_program::StepShape;

use crate::Result;
use crate::model::{Model, model_error};

/// What a run needs plans for.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// The training step and its update.
    pub(crate) train: Option<TrainWanted>,
    /// Evaluation batches.
    pub(crate) eval: Option<StepShape>,
    /// Sample texts of up to this many tokens.
    pub(crate) sample_tokens: Option<u64>,
    /// Longest row that rotary frequencies are made for.
    pub(crate) max_length: u64,
}

/// What a training step is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TrainWanted {
    pub(crate) shape: StepShape,
    pub(crate) optimizer: OptimizerKind,
    pub(crate) clip: bool,
    pub(crate) dropout: f32,
}

/// The graphs of a run.
pub(crate) struct Graphs {
    pub(crate) train: Option<Graph>,
    pub(crate) eval: Option<Graph>,
    pub(crate) sample: Option<Graph>,
}

/// The forward graphs, and from the first of them the training step.
pub(crate) fn build(model: &Model, wanted: &Wanted) -> Result<Graphs> {
    let forward = |purpose, dropout| {
        build_for_length(&model.config, purpose, dropout, wanted.max_length)
            .map_err(|e| model_error(&model.dir, &e))
    };
    let train = match &wanted.train {
        Some(t) => {
            let loss = forward(Purpose::Loss, t.dropout)?;
            let gradients = ounce_passes::differentiate(&loss)?;
            Some(ounce_passes::attach_optimizer(&gradients, t.optimizer, t.clip)?)
        }
        None => None,
    };
    let eval = wanted.eval.map(|_| forward(Purpose::Loss, 0.0)).transpose()?;
    let sample = wanted.sample_tokens.map(|_| forward(Purpose::Decode, 0.0)).transpose()?;
    Ok(Graphs { train, eval, sample })
}

impl Graphs {
    /// Those that there are.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Graph> {
        [&self.train, &self.eval, &self.sample].into_iter().flatten()
    }

    /// Each graph with the shape it is planned for and the bytes after the parameters that it must
    /// leave alone: the optimizer's states outlive evaluation and sampling.
    pub(crate) fn jobs(&self, wanted: &Wanted) -> Vec<(&Graph, StepShape, u64)> {
        let state_bytes = self.train.as_ref().map_or(0, state_bytes);
        let sample = |row_tokens| StepShape { n_rows: 1, row_tokens, n_selected: 1 };
        let train = self.train.as_ref().zip(wanted.train).map(|(g, t)| (g, t.shape, 0));
        let eval = self.eval.as_ref().zip(wanted.eval).map(|(g, s)| (g, s, state_bytes));
        let sample = self
            .sample
            .as_ref()
            .zip(wanted.sample_tokens)
            .map(|(g, n)| (g, sample(n), state_bytes));
        [train, eval, sample].into_iter().flatten().collect()
    }
}

/// Every parameter, state and value of a graph at once, and half as much again for scratch.
pub(crate) fn everything_bytes(graph: &Graph, shape: StepShape) -> u64 {
    let lead = |s: &ounce_ir::Shape| match s.lead {
        Lead::Fixed => 1,
        Lead::Tokens => shape.n_tokens(),
        Lead::Selected => shape.n_selected,
    };
    let values: u64 = graph.values.values().map(|v| v.bytes(lead(&v.shape))).sum();
    let params: u64 = graph.params.values().map(ounce_ir::Param::bytes).sum();
    (values + params + state_bytes(graph)) / 2 * 3
}

/// Bytes of all optimizer states, each at a multiple of 64.
fn state_bytes(graph: &Graph) -> u64 {
    let of = |p: &ounce_ir::Param| -> u64 {
        let bytes = |s: &ounce_ir::StateSpec| p.shape.bytes(s.dtype, 0).next_multiple_of(64);
        graph.states.iter().map(bytes).sum()
    };
    graph.params.values().filter(|p| p.trainable).map(of).sum()
}
