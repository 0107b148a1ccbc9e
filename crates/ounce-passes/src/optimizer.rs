//! From forward and backward to a whole step: the update, as ops.
//!
//! Idea. Per trained parameter, in order of [`ParamId`]: scatter what an embedding left as rows,
//! add up the squares of its gradient (for the global norm), update. With clipping, every update
//! needs the norm of all gradients, so all norms come first:
//!
//! ```text
//! clip off   scatter p0, norm p0, update p0, scatter p1, norm p1, update p1, ...
//! clip on    scatter p0, norm p0, scatter p1, norm p1, ..., scale, update p0, update p1, ...
//! ```
//!
//! Invariant: parts of the norm are added in the order of parameters, whatever order a plan
//! releases gradients in.

use ounce_ir::{
    DType, EntityId, Graph, Lead, Op, OpKind, OptimizerKind, ParamId, Phase, Value, ValueId,
    ValueKind,
};

use crate::PassError;

/// Appends the update to a differentiated graph: optimizer state per trained parameter (with the
/// lower halves of the masters, if parameters are bf16), norms, the clip scale if `clip`, and one
/// update op per trained parameter.
///
/// # Errors
/// [`PassError`] if the graph has no gradients, has an update already, or trains a parameter that
/// the loss does not depend on.
pub fn attach_optimizer(
    graph: &Graph,
    kind: OptimizerKind,
    clip: bool,
) -> Result<Graph, PassError> {
    let dense_sums = dense_sums(graph)?;
    let mut update = Update { graph: graph.clone(), rule: kind, scatters: Vec::new() };
    update.take_scatters()?;
    update.graph.states = kind.states(graph.trained_dtype());
    if clip {
        let mut parts = Vec::new();
        for &(param, sum) in &dense_sums {
            parts.push(update.norm(param, sum)?);
        }
        let scale = update.scale(parts)?;
        for &(param, sum) in &dense_sums {
            update.update(param, vec![sum, scale])?;
        }
    } else {
        for &(param, sum) in &dense_sums {
            update.norm(param, sum)?;
            update.update(param, vec![sum])?;
        }
    }
    Ok(update.graph)
}

/// Every trained parameter with its dense sum, in order of parameters.
fn dense_sums(graph: &Graph) -> Result<Vec<(ParamId, ValueId)>, PassError> {
    let mut sum_of = vec![None; graph.params.len()];
    for (v, value) in graph.values.iter() {
        if let ValueKind::Sum(u) = value.kind
            && value.shape.lead == Lead::Fixed
        {
            sum_of[graph.param_of(u).index()] = Some(v);
        }
    }
    if sum_of.iter().all(Option::is_none) {
        return Err(PassError::NoGradients);
    }
    let trained = graph.params.iter().filter(|(_, p)| p.trainable);
    trained
        .map(|(param, p)| match sum_of[param.index()] {
            Some(sum) => Ok((param, sum)),
            None => Err(PassError::NoGradient { param: p.name.clone() }),
        })
        .collect()
}

/// The graph under construction.
struct Update {
    graph: Graph,
    rule: OptimizerKind,
    /// Scatters taken out of the graph; each goes back before the norm of its parameter.
    scatters: Vec<Op>,
}

impl Update {
    /// Takes the scatters that `differentiate` left at the end out of the graph.
    fn take_scatters(&mut self) -> Result<(), PassError> {
        let ops = std::mem::take(&mut self.graph.ops);
        for (id, op) in ops.iter() {
            match (op.phase, op.kind) {
                (Phase::Forward | Phase::Backward, _) => {
                    self.graph.ops.push(op.clone());
                }
                (Phase::Update, OpKind::EmbedScatter) => self.scatters.push(op.clone()),
                (Phase::Update, kind) => {
                    return Err(PassError::AlreadyAttached { op: id, op_name: kind.name() });
                }
            }
        }
        Ok(())
    }

    /// Completes the gradient of `param` and adds up its squares: `[1]` f64.
    fn norm(&mut self, param: ParamId, sum: ValueId) -> Result<ValueId, PassError> {
        for scatter in self.scatters.extract_if(.., |op| op.sums == [sum]) {
            self.graph.ops.push(scatter);
        }
        let name = format!("norm.{}", self.graph.params[param].name);
        self.scalar(OpKind::SumSquares, vec![sum], name)
    }

    /// What clipped gradients are multiplied with: `[1]` f32.
    fn scale(&mut self, parts: Vec<ValueId>) -> Result<ValueId, PassError> {
        self.scalar(OpKind::ClipScale, parts, "clip_scale".to_owned())
    }

    fn scalar(
        &mut self,
        kind: OpKind,
        inputs: Vec<ValueId>,
        name: String,
    ) -> Result<ValueId, PassError> {
        let mut op = update_op(kind, inputs);
        let outputs = ounce_ir::infer_outputs(&self.graph, &op)?;
        let (shape, dtype): (_, DType) =
            outputs.into_iter().next().expect("a scalar op has one output");
        let value = self.graph.values.push(Value { name, shape, dtype, kind: ValueKind::Scalar });
        op.outputs.push(value);
        self.graph.ops.push(op);
        Ok(value)
    }

    fn update(&mut self, param: ParamId, inputs: Vec<ValueId>) -> Result<(), PassError> {
        let kind = match self.rule {
            OptimizerKind::AdamW => OpKind::AdamW,
            OptimizerKind::Sgd => OpKind::Sgd,
        };
        let op = Op { updates: Some(param), ..update_op(kind, inputs) };
        ounce_ir::infer_outputs(&self.graph, &op)?;
        self.graph.ops.push(op);
        Ok(())
    }
}

fn update_op(kind: OpKind, inputs: Vec<ValueId>) -> Op {
    Op {
        kind,
        phase: Phase::Update,
        stage: None,
        inputs,
        uses: Vec::new(),
        sums: Vec::new(),
        outputs: Vec::new(),
        updates: None,
    }
}
