//! What a run computes: its graphs, built, differentiated, in their precision, with their update.

use ounce_ir::{Graph, Lead, OptimizerKind, Param, ParamId};
use ounce_models::{Purpose, build_for_length};
use ounce_passes::{OpClass, PrecisionPolicy};
use ounce_program::StepShape;

use crate::model::{Model, model_error};
use crate::precision::all_demoted;
use crate::precision::classes;
use crate::settings::{OnNonfinite, Optimizer};
use crate::stream::StreamWanted;
use crate::{Error, Result, Settings};

/// What a run needs plans for.
#[derive(Debug, Clone, Default)]
pub(crate) struct Wanted {
    /// Whether text is tokenized before the first step.
    pub(crate) tokenizes: bool,
    /// The training step and its update.
    pub(crate) train: Option<TrainWanted>,
    /// Evaluation batches.
    pub(crate) eval: Option<StepShape>,
    /// Sample texts of up to this many tokens.
    pub(crate) sample_tokens: Option<u64>,
    /// Data that is tokenized beside the steps.
    pub(crate) stream: Option<StreamWanted>,
    /// Longest row that rotary frequencies are made for.
    pub(crate) max_length: u64,
    /// What values are stored in.
    pub(crate) policy: PrecisionPolicy,
}

/// What a training step is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TrainWanted {
    pub(crate) shape: StepShape,
    pub(crate) optimizer: OptimizerKind,
    pub(crate) clip: bool,
    pub(crate) dropout: f32,
    /// Whether classes of ops may be taken out of f16 while the run goes on.
    pub(crate) demote: bool,
    /// Whether the fastest plan that fits is wanted, whatever the last per cent of speed takes.
    pub(crate) fastest: bool,
}

impl TrainWanted {
    /// What the settings say, for rows of that shape.
    pub(crate) fn of(settings: &Settings, shape: StepShape) -> Self {
        // Skipping a step for its gradient needs all of the gradient before the first update.
        let skips =
            settings.policy().precision.scales_loss() || settings.on_nonfinite == OnNonfinite::Skip;
        Self {
            shape,
            optimizer: match settings.optimizer {
                Optimizer::Adamw => OptimizerKind::AdamW,
                Optimizer::Sgd => OptimizerKind::Sgd,
            },
            clip: settings.max_grad_norm > 0.0 || skips,
            dropout: settings.dropout as f32,
            demote: settings.f16_demote,
            fastest: false,
        }
    }
}

/// One of something for each purpose that a run has.
pub(crate) struct PerPurpose<T> {
    pub(crate) train: Option<T>,
    /// The same step with classes of ops in f32: each alone, then all.
    pub(crate) variants: Vec<(Vec<OpClass>, T)>,
    pub(crate) eval: Option<T>,
    pub(crate) sample: Option<T>,
}

impl<T> PerPurpose<T> {
    /// Those that there are, the training step first.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        let variants = self.variants.iter().map(|(_, x)| x);
        self.train.iter().chain(variants).chain(&self.eval).chain(&self.sample)
    }

    /// What `f` makes of each, in that order.
    pub(crate) fn map<U>(&self, mut f: impl FnMut(&T) -> U) -> PerPurpose<U> {
        PerPurpose {
            train: self.train.as_ref().map(&mut f),
            variants: self.variants.iter().map(|(demoted, x)| (demoted.clone(), f(x))).collect(),
            eval: self.eval.as_ref().map(&mut f),
            sample: self.sample.as_ref().map(&mut f),
        }
    }
}

/// A graph with what its plan must heed.
pub(crate) struct Job {
    pub(crate) graph: Graph,
    /// The shape that it is planned for.
    pub(crate) shape: StepShape,
    /// Bytes after the parameters to be left alone: the optimizer's states outlive evaluation and sampling.
    pub(crate) reserved_bytes: u64,
}

/// The graphs of a run.
pub(crate) type Graphs = PerPurpose<Job>;

/// The forward graphs, and from the first of them the training step.
pub(crate) fn build(model: &Model, wanted: &Wanted) -> Result<Graphs> {
    let forward = |purpose, dropout| {
        build_for_length(&model.config, purpose, dropout, wanted.max_length)
            .map_err(|e| model_error(&model.path, &e))
    };
    let (mut train, mut variants) = (None, Vec::new());
    if let Some(t) = &wanted.train {
        let gradients = ounce_passes::differentiate(&forward(Purpose::Loss, t.dropout)?)?;
        let step = |policy: &PrecisionPolicy| {
            let lowered = ounce_passes::lower_precision(&gradients, policy);
            let graph = ounce_passes::attach_optimizer(&lowered, t.optimizer, t.clip)?;
            Ok::<_, Error>(Job { graph, shape: t.shape, reserved_bytes: 0 })
        };
        train = Some(step(&wanted.policy)?);
        if t.demote {
            for demoted in demotions(&gradients, &wanted.policy) {
                let mut policy = wanted.policy.clone();
                policy.keep_f32.extend(&demoted);
                variants.push((demoted, step(&policy)?));
            }
        }
    }
    let reserved_bytes = train.as_ref().map_or(0, |job| state_bytes(&job.graph));
    // What has overflowed in training would overflow here.
    let demotes = wanted.train.as_ref().is_some_and(|t| t.demote);
    let policy = if demotes { all_demoted(&wanted.policy) } else { wanted.policy.clone() };
    let lowered = |purpose, shape| {
        let graph = ounce_passes::lower_precision(&forward(purpose, 0.0)?, &policy);
        Ok::<_, Error>(Job { graph, shape, reserved_bytes })
    };
    let eval = wanted.eval.map(|shape| lowered(Purpose::Loss, shape)).transpose()?;
    let one_row = |row_tokens| StepShape { n_rows: 1, row_tokens, n_selected: 1 };
    let sample = wanted.sample_tokens.map(|n| lowered(Purpose::Decode, one_row(n))).transpose()?;
    Ok(Graphs { train, variants, eval, sample })
}

/// Which classes of ops a run may take out of f16: each that is in it alone, then all of them.
fn demotions(graph: &Graph, policy: &PrecisionPolicy) -> Vec<Vec<OpClass>> {
    let mut all = classes(graph);
    all.retain(|class| !policy.keep_f32.contains(class));
    let mut sets: Vec<Vec<OpClass>> = all.iter().map(|&class| vec![class]).collect();
    if all.len() > 1 {
        sets.push(all);
    }
    sets
}

/// Every parameter, state and value of a graph at once, and half as much again for scratch.
pub(crate) fn everything_bytes(Job { graph, shape, .. }: &Job) -> u64 {
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

/// Every state of every trained parameter: (parameter, number of the state), in `ParamId` order.
pub(crate) fn states(graph: &Graph) -> impl Iterator<Item = (ParamId, &Param, usize)> {
    let trained = graph.params.iter().filter(|(_, p)| p.trainable);
    trained.flat_map(|(id, p)| (0..graph.states.len()).map(move |k| (id, p, k)))
}
