//! From a forward graph to forward and backward: reverse-mode differentiation, one rule per op.
//!
//! Idea. Walk the forward ops backwards. When an op is reached, every op that reads its output has
//! been passed, so the gradient of the output is known; the op's rule appends backward ops that
//! write the gradients of its inputs and add to the sums of its parameters.
//!
//! ```text
//! forward    x ──┬── norm ── linear ── y ── add ── out          d_x = add(d_out, d_branch)
//!                └──────────────────────────┘
//! backward   d_out ──┬── linear_grad_weight, linear_grad_input ── norm_grad ── d_branch ── add ── d_x
//!                    └──────────────────────────────────────────────────────────────────────┘
//! ```
//!
//! Invariants
//! - Forward ops and values keep their ids. The loss, the last forward op, becomes
//!   `cross_entropy_train`, the first backward op, because it never stores logits.
//! - Gradients of one value meet pairwise, in reverse program order of its readers, in the stage of
//!   the reader whose gradient came last. Hence the backward of a stage reads its own forward
//!   values, its input and the gradient of its output, and writes the gradient of its input.
//! - What no trained parameter stands behind gets no gradient: frozen parameters, data.
//! - Every trained parameter has one dense sum. The gradient of an embedding is first kept as rows
//!   `[N, C]` and scattered once per step, after the head's part if the parameter is tied.
//!
//! Complexity: linear in the number of ops. Source: reverse accumulation, `[Linnainmaa70]`;
//! the formulas themselves stand with the definition of each op in the oracle.

use ounce_ir::{
    AttentionSpec, DType, EntityId, Graph, Op, OpId, OpKind, ParamId, Phase, Shape, StageId, UseId,
    Value, ValueId, ValueKind, WeightLayout,
};

use crate::PassError;

/// Adds the backward of `graph`, a forward graph whose last op is `cross_entropy`.
///
/// Backward ops follow in the order in which they run: stages descending, and within a stage the
/// forward ops reversed. `embed_scatter` ops of phase `Update` come last, by parameter.
///
/// # Errors
/// [`PassError`] if there is no single loss at the end, an op on the way has no gradient rule, or
/// a trained parameter has two uses other than embeddings.
pub fn differentiate(graph: &Graph) -> Result<Graph, PassError> {
    let loss = find_loss(graph)?;
    let mut backward = Backward {
        graph: graph.clone(),
        wanted: values_behind_trained(graph),
        gradients: vec![None; graph.values.len()],
        dense_sums: vec![None; graph.params.len()],
        rows: Vec::new(),
        stage: graph.ops[loss].stage,
    };
    backward.replace_loss(loss)?;
    for op in graph.ops.ids().take(loss.index()).rev() {
        backward.differentiate_op(&graph.ops[op])?;
    }
    backward.scatter_rows()?;
    backward.mark_stages();
    Ok(backward.graph)
}

/// The one `cross_entropy`, which must come last, after forward ops only.
fn find_loss(graph: &Graph) -> Result<OpId, PassError> {
    if let Some((op, o)) = graph.ops.iter().find(|(_, o)| o.phase != Phase::Forward) {
        return Err(PassError::NotForward { op, op_name: o.kind.name() });
    }
    let mut from_loss =
        graph.ops.iter().skip_while(|(_, o)| !matches!(o.kind, OpKind::CrossEntropy { .. }));
    let (loss, _) = from_loss.next().ok_or(PassError::NoLoss)?;
    match from_loss.next() {
        None => Ok(loss),
        Some((next, o)) => Err(PassError::LossNotLast { loss, next, next_name: o.kind.name() }),
    }
}

/// For every value whether it depends on a trained parameter, so that its gradient is wanted.
fn values_behind_trained(graph: &Graph) -> Vec<bool> {
    let mut wanted = vec![false; graph.values.len()];
    for op in graph.ops.values() {
        let trained = op.uses.iter().any(|&u| graph.params[graph.param_of(u)].trainable);
        if trained || op.inputs.iter().any(|v| wanted[v.index()]) {
            for v in &op.outputs {
                wanted[v.index()] = true;
            }
        }
    }
    wanted
}

/// Rows of an embedding's gradient that wait for the end of the step.
struct Rows {
    param: ParamId,
    of_use: UseId,
    /// Token ids or positions.
    idx: ValueId,
    /// The sum `[N, C]`.
    sum: ValueId,
}

/// The graph under construction. Tables are indexed by the ids of the forward graph.
struct Backward {
    graph: Graph,
    /// Per value: whether its gradient is wanted.
    wanted: Vec<bool>,
    /// Per value: its gradient so far.
    gradients: Vec<Option<ValueId>>,
    /// Per parameter: the sum of the parameter's shape.
    dense_sums: Vec<Option<ValueId>>,
    rows: Vec<Rows>,
    /// The stage whose backward is being written.
    stage: Option<StageId>,
}

impl Backward {
    /// The loss keeps its id and its output, and gains the gradient of its input.
    fn replace_loss(&mut self, loss: OpId) -> Result<(), PassError> {
        let mut op = self.graph.ops[loss].clone();
        let OpKind::CrossEntropy { soft_cap } = op.kind else {
            unreachable!("find_loss finds a cross entropy")
        };
        op.kind = OpKind::CrossEntropyTrain { soft_cap };
        op.phase = Phase::Backward;
        op.sums = self.sum_if_trained(op.uses[0])?.into_iter().collect();
        let x = op.inputs[0];
        let d_x = self.gradient_value(x, self.graph.values[x].shape.clone());
        op.outputs.push(d_x);
        ounce_ir::infer_outputs(&self.graph, &op)?;
        self.graph.ops[loss] = op;
        self.meet(x, d_x)
    }

    /// Appends the backward of one forward op, if the loss depends on it and a gradient is wanted.
    fn differentiate_op(&mut self, op: &Op) -> Result<(), PassError> {
        self.stage = op.stage;
        for &v in &op.outputs[1..] {
            if self.gradients[v.index()].is_some() {
                return Err(PassError::SecondOutput { value: self.graph.values[v].name.clone() });
            }
        }
        match self.gradients[op.outputs[0].index()] {
            Some(dy) => self.rule(op, dy),
            None => Ok(()),
        }
    }

    /// The gradient rule of every op: `dy` is the gradient of its first output.
    fn rule(&mut self, op: &Op, dy: ValueId) -> Result<(), PassError> {
        match op.kind {
            OpKind::Embed => self.embed(op, dy),
            OpKind::Linear { layout, .. } => self.linear(op, dy, layout),
            OpKind::LayerNorm { eps, bias } => {
                self.norm(op, dy, OpKind::LayerNormGrad { eps, bias })
            }
            OpKind::RmsNorm { eps, unit_offset } => {
                self.norm(op, dy, OpKind::RmsNormGrad { eps, unit_offset })
            }
            // A rotation's transpose is its inverse.
            OpKind::Rope { table, n_heads, head_dim, inverse } => {
                let back = OpKind::Rope { table, n_heads, head_dim, inverse: !inverse };
                self.pull(back, &[dy, op.inputs[1]], &op.inputs[..1])
            }
            OpKind::Attention(spec) => self.attention(op, dy, spec),
            OpKind::Gelu(kind) => {
                self.pull(OpKind::GeluGrad(kind), &[op.inputs[0], dy], &op.inputs)
            }
            OpKind::Glu { gate, packed } => {
                let inputs: Vec<ValueId> = op.inputs.iter().copied().chain([dy]).collect();
                self.pull(OpKind::GluGrad { gate, packed }, &inputs, &op.inputs)
            }
            OpKind::SoftCap { cap } => {
                self.pull(OpKind::SoftCapGrad { cap }, &[op.inputs[0], dy], &op.inputs)
            }
            // Both summands have the gradient of the sum: the same value, not a copy.
            OpKind::Add => {
                self.meet(op.inputs[1], dy)?;
                self.meet(op.inputs[0], dy)
            }
            // The same factor, or the same random site and so the same mask.
            OpKind::Scale { .. } | OpKind::Dropout { .. } => self.pull(op.kind, &[dy], &op.inputs),
            OpKind::TakeRows => Err(PassError::NoRule {
                op_name: op.kind.name(),
                value: self.graph.values[op.outputs[0]].name.clone(),
            }),
            OpKind::CrossEntropy { .. }
            | OpKind::CrossEntropyTrain { .. }
            | OpKind::LinearGradInput { .. }
            | OpKind::LinearGradWeight { .. }
            | OpKind::BiasGrad
            | OpKind::LayerNormGrad { .. }
            | OpKind::RmsNormGrad { .. }
            | OpKind::AttentionGrad(_)
            | OpKind::GeluGrad(_)
            | OpKind::GluGrad { .. }
            | OpKind::SoftCapGrad { .. }
            | OpKind::EmbedGradRows
            | OpKind::EmbedScatter
            | OpKind::SumSquares
            | OpKind::ClipScale
            | OpKind::AdamW
            | OpKind::Sgd => unreachable!("find_loss admits forward ops before one loss only"),
        }
    }

    fn embed(&mut self, op: &Op, dy: ValueId) -> Result<(), PassError> {
        let (of_use, idx) = (op.uses[0], op.inputs[0]);
        let param = self.graph.param_of(of_use);
        if !self.graph.params[param].trainable {
            return Ok(());
        }
        let name = format!("d.{}.rows", self.graph.params[param].name);
        let rows = self.sum_value(of_use, name, self.graph.values[dy].shape.clone());
        self.emit(OpKind::EmbedGradRows, &[dy], &[], &[rows], &[])?;
        self.rows.push(Rows { param, of_use, idx, sum: rows });
        Ok(())
    }

    fn linear(&mut self, op: &Op, dy: ValueId, layout: WeightLayout) -> Result<(), PassError> {
        let x = op.inputs[0];
        if let Some(dw) = self.sum_if_trained(op.uses[0])? {
            self.emit(OpKind::LinearGradWeight { layout }, &[x, dy], &[], &[dw], &[])?;
        }
        if let Some(&b) = op.uses.get(1)
            && let Some(db) = self.sum_if_trained(b)?
        {
            self.emit(OpKind::BiasGrad, &[dy], &[], &[db], &[])?;
        }
        if self.wanted[x.index()] {
            let kind = OpKind::LinearGradInput { layout };
            let d_x = self.emit(kind, &[dy], &op.uses[..1], &[], &[x])?;
            self.meet(x, d_x[0])?;
        }
        Ok(())
    }

    /// Layer norm and RMS norm: one op for the gradients of the input and of the parameters.
    fn norm(&mut self, op: &Op, dy: ValueId, kind: OpKind) -> Result<(), PassError> {
        let mut sums = Vec::new();
        for &u in &op.uses {
            sums.extend(self.sum_if_trained(u)?);
        }
        if !sums.is_empty() && sums.len() < op.uses.len() {
            let name = |u: UseId| self.graph.params[self.graph.param_of(u)].name.clone();
            return Err(PassError::HalfFrozen { weight: name(op.uses[0]), bias: name(op.uses[1]) });
        }
        let x = op.inputs[0];
        let d_x = self.emit(kind, &[x, dy], &op.uses[..1], &sums, &[x])?;
        self.meet(x, d_x[0])
    }

    fn attention(&mut self, op: &Op, d_o: ValueId, spec: AttentionSpec) -> Result<(), PassError> {
        let inputs: Vec<ValueId> =
            op.inputs.iter().chain(&op.outputs).copied().chain([d_o]).collect();
        self.pull(OpKind::AttentionGrad(spec), &inputs, &op.inputs)
    }

    /// A backward op without parameters, whose outputs are the gradients of `of`.
    fn pull(&mut self, kind: OpKind, inputs: &[ValueId], of: &[ValueId]) -> Result<(), PassError> {
        let gradients = self.emit(kind, inputs, &[], &[], of)?;
        // Last first: as if the op were one op per input, in reverse.
        of.iter().zip(gradients).rev().try_for_each(|(&v, d)| self.meet(v, d))
    }

    /// Adds `gradient` to what has arrived at `value` so far.
    fn meet(&mut self, value: ValueId, gradient: ValueId) -> Result<(), PassError> {
        if !self.wanted[value.index()] {
            return Ok(());
        }
        let sum = match self.gradients[value.index()] {
            None => gradient,
            Some(earlier) => self.emit(OpKind::Add, &[earlier, gradient], &[], &[], &[value])?[0],
        };
        self.gradients[value.index()] = Some(sum);
        Ok(())
    }

    /// Appends a backward op of the current stage; its outputs are the gradients of `of`.
    fn emit(
        &mut self,
        kind: OpKind,
        inputs: &[ValueId],
        uses: &[UseId],
        sums: &[ValueId],
        of: &[ValueId],
    ) -> Result<Vec<ValueId>, PassError> {
        let mut op = Op {
            kind,
            phase: Phase::Backward,
            stage: self.stage,
            inputs: inputs.to_vec(),
            uses: uses.to_vec(),
            sums: sums.to_vec(),
            outputs: Vec::new(),
            updates: None,
        };
        for (&v, (shape, _)) in of.iter().zip(ounce_ir::infer_outputs(&self.graph, &op)?) {
            op.outputs.push(self.gradient_value(v, shape));
        }
        let outputs = op.outputs.clone();
        self.graph.ops.push(op);
        Ok(outputs)
    }

    fn gradient_value(&mut self, of: ValueId, shape: Shape) -> ValueId {
        let name = format!("d.{}", self.graph.values[of].name);
        self.graph.values.push(Value { name, shape, dtype: DType::F32, kind: ValueKind::Gradient })
    }

    fn sum_value(&mut self, of_use: UseId, name: String, shape: Shape) -> ValueId {
        let kind = ValueKind::Sum(of_use);
        self.graph.values.push(Value { name, shape, dtype: DType::F32, kind })
    }

    /// A new dense sum for a use of a trained parameter; `None` if the parameter is frozen.
    fn sum_if_trained(&mut self, of_use: UseId) -> Result<Option<ValueId>, PassError> {
        let param = self.graph.param_of(of_use);
        let p = &self.graph.params[param];
        if !p.trainable {
            return Ok(None);
        }
        if self.dense_sums[param.index()].is_some() {
            return Err(PassError::SharedParameter { param: p.name.clone() });
        }
        let sum = self.sum_value(of_use, format!("d.{}", p.name), p.shape.clone());
        self.dense_sums[param.index()] = Some(sum);
        Ok(Some(sum))
    }

    /// Appends the scatters: by parameter, then by use, each into the parameter's dense sum.
    fn scatter_rows(&mut self) -> Result<(), PassError> {
        let mut rows = std::mem::take(&mut self.rows);
        rows.sort_by_key(|r| (r.param, r.of_use));
        for Rows { param, of_use, idx, sum } in rows {
            let dense = match self.dense_sums[param.index()] {
                Some(dense) => dense,
                None => self.sum_if_trained(of_use)?.expect("rows exist for trained tables only"),
            };
            let op = Op {
                kind: OpKind::EmbedScatter,
                phase: Phase::Update,
                stage: None,
                inputs: vec![idx, sum],
                uses: Vec::new(),
                sums: vec![dense],
                outputs: Vec::new(),
                updates: None,
            };
            ounce_ir::infer_outputs(&self.graph, &op)?;
            self.graph.ops.push(op);
        }
        Ok(())
    }

    /// Tells every stage the gradients of its input and output.
    fn mark_stages(&mut self) {
        for s in self.graph.stages.ids() {
            let gradient = |v: ValueId| self.gradients[v.index()];
            let stage = &mut self.graph.stages[s];
            stage.d_output = stage.output.and_then(gradient);
            stage.d_input = stage.input.and_then(gradient);
        }
    }
}
