//! Where a step stops before it changes anything: losses and gradient norm are looked at in time.
//!
//! Idea: the head runs first in the backward, and updates belong to the last micro-batch, so that all
//! losses of a step are known before its first update task. In graphs that clip, so is the norm when
//! the clip scale is due. Without clipping a parameter may be updated before the gradients of others
//! are known; there the losses alone decide.
//!
//! Complexity: one pass over the losses per step.

use ounce_ir::{DType, Graph, OpId, OpKind, Phase, ValueKind};

use crate::arena::Arena;
use crate::error::NonFinite;
use crate::resolve::{Place, Resolved, Task};

/// Tasks before which a step is looked at.
#[derive(Debug, Default)]
pub(crate) struct Gates {
    /// The first task of the update, and the losses of the step.
    losses: Option<(usize, Place)>,
    /// The task of the clip scale.
    clip: Option<usize>,
    /// Parts of the squared gradient norm, by `ParamId`.
    norm_parts: Vec<Place>,
}

impl Gates {
    /// Finds the gates of a plan whose tasks and places are known.
    pub(crate) fn of(graph: &Graph, resolved: &Resolved) -> Self {
        let first = |found: &dyn Fn(OpId) -> bool| {
            resolved.tasks.iter().position(|task| match *task {
                Task::Run { op, .. } => found(OpId(op)),
                Task::Zero { .. } => false,
            })
        };
        let update = first(&|op| graph.ops[op].phase == Phase::Update);
        let losses = graph.find_value(ValueKind::Loss).and_then(|v| resolved.session(v));
        let parts = graph
            .values
            .iter()
            .filter(|(_, v)| v.kind == ValueKind::Scalar && v.dtype == DType::F64);
        Self {
            losses: update.zip(losses),
            clip: first(&|op| graph.ops[op].kind == OpKind::ClipScale),
            norm_parts: parts.filter_map(|(id, _)| resolved.session(id)).collect(),
        }
    }

    /// Looks at what is known before task `task`.
    pub(crate) fn check(&self, arena: &mut Arena, task: usize) -> Result<(), NonFinite> {
        if let Some((at, place)) = self.losses
            && at == task
        {
            let losses = arena.slice_mut::<f32>(place.at, place.n_elems).iter();
            let sum = losses.map(|&x| f64::from(x)).sum::<f64>();
            if !sum.is_finite() {
                return Err(NonFinite::Loss(sum));
            }
        }
        if self.clip == Some(task) {
            let parts = self.norm_parts.iter();
            let sum = parts.map(|p| arena.slice_mut::<f64>(p.at, p.n_elems)[0]).sum::<f64>();
            if !sum.is_finite() {
                return Err(NonFinite::GradNorm(sum.sqrt()));
            }
        }
        Ok(())
    }
}
