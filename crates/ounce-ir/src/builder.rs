//! The public way to build a forward graph, one method per op; shapes are inferred and checked.
//!
//! The builder stops at the first mistake and reports it from [`GraphBuilder::finish`], so that a
//! model reads as a straight list of layers. Stages are opened by [`GraphBuilder::stage`]; the value
//! that a later stage reads from the one before becomes its cut value.

use crate::{
    AttentionSpec, DType, Gate, GeluKind, Graph, InferError, Init, InputKind, Op, OpKind, Param,
    ParamId, Phase, RandomSite, RopeTable, RopeTableId, Shape, Stage, Use, Value, ValueId,
    ValueKind, WeightLayout, infer_outputs,
};

/// Builds a forward graph.
#[derive(Debug, Default)]
pub struct GraphBuilder {
    graph: Graph,
    prefix: String,
    error: Option<InferError>,
}

impl GraphBuilder {
    /// An empty builder.
    pub fn new() -> Self {
        Self::default()
    }

    /// The data input of that kind (created at its first mention).
    pub fn input(&mut self, kind: InputKind) -> ValueId {
        let value = ValueKind::Input(kind);
        self.graph.find_value(value).unwrap_or_else(|| {
            let shape = match kind {
                InputKind::SelectedRows => Shape::selected(&[]),
                InputKind::TokenIds | InputKind::Positions | InputKind::Targets => {
                    Shape::tokens(&[])
                }
            };
            let name = kind.name().to_owned();
            self.graph.values.push(Value { name, shape, dtype: DType::I32, kind: value })
        })
    }

    /// The parameter of that name (created at its first mention; normal(0.02), trained).
    pub fn param(&mut self, name: &str, shape: Shape, decay: bool) -> ParamId {
        self.param_init(name, shape, decay, Init::Normal(0.02))
    }

    /// As [`GraphBuilder::param`], with another initialisation.
    pub fn param_init(&mut self, name: &str, shape: Shape, decay: bool, init: Init) -> ParamId {
        if let Some((id, _)) = self.graph.params.iter().find(|(_, p)| p.name == name) {
            return id;
        }
        let name = name.to_owned();
        let dtype = DType::F32;
        self.graph.params.push(Param { name, shape, dtype, decay, trainable: true, init })
    }

    /// Adds a table of rotary frequencies.
    pub fn rope_table(&mut self, inv_freq: Vec<f32>, scale: f32) -> RopeTableId {
        self.graph.rope_tables.push(RopeTable { inv_freq, scale })
    }

    /// Opens the next stage of the chain; the ops that follow belong to it.
    pub fn stage(&mut self, name: &str, kind: &str) {
        name.clone_into(&mut self.prefix);
        self.graph.stages.push(Stage {
            name: name.to_owned(),
            kind: kind.to_owned(),
            input: None,
            output: None,
            d_output: None,
            d_input: None,
        });
    }

    /// `table[idx]`, a zero row for a negative index.
    pub fn embed(&mut self, idx: ValueId, table: ParamId) -> ValueId {
        self.push(OpKind::Embed, &[idx], &[table])
    }

    /// `x W^T + b` (or `x W + b` for [`WeightLayout::InOut`]).
    pub fn linear(
        &mut self,
        x: ValueId,
        w: ParamId,
        b: Option<ParamId>,
        layout: WeightLayout,
    ) -> ValueId {
        let kind = OpKind::Linear { layout, bias: b.is_some() };
        self.push(kind, &[x], &[Some(w), b].into_iter().flatten().collect::<Vec<_>>())
    }

    /// Layer normalization over the last dimension.
    pub fn layer_norm(&mut self, x: ValueId, w: ParamId, b: Option<ParamId>, eps: f32) -> ValueId {
        let kind = OpKind::LayerNorm { eps, bias: b.is_some() };
        self.push(kind, &[x], &[Some(w), b].into_iter().flatten().collect::<Vec<_>>())
    }

    /// RMS normalization of every group of channels as wide as `w`.
    pub fn rms_norm(&mut self, x: ValueId, w: ParamId, eps: f32) -> ValueId {
        self.push(OpKind::RmsNorm { eps, unit_offset: false }, &[x], &[w])
    }

    /// As [`GraphBuilder::rms_norm`], multiplied with `1 + w` instead of `w`.
    pub fn rms_norm_unit_offset(&mut self, x: ValueId, w: ParamId, eps: f32) -> ValueId {
        self.push(OpKind::RmsNorm { eps, unit_offset: true }, &[x], &[w])
    }

    /// Rotary position embedding of the first `n_heads` of the heads side by side in `x`.
    pub fn rope(&mut self, x: ValueId, table: RopeTableId, n_heads: u32, head_dim: u32) -> ValueId {
        let positions = self.input(InputKind::Positions);
        let kind = OpKind::Rope { table, n_heads, head_dim, inverse: false };
        self.push(kind, &[x, positions], &[])
    }

    /// Causal attention of q, k and v, separate or packed.
    pub fn attention(&mut self, qkv: &[ValueId], spec: AttentionSpec) -> ValueId {
        self.push(OpKind::Attention(spec), qkv, &[])
    }

    /// GELU.
    pub fn gelu(&mut self, x: ValueId, kind: GeluKind) -> ValueId {
        self.push(OpKind::Gelu(kind), &[x], &[])
    }

    /// `silu(gate) * up`.
    pub fn swiglu(&mut self, gate: ValueId, up: ValueId) -> ValueId {
        self.glu(&[gate, up], Gate::Silu)
    }

    /// `act(gate) * up` of two values, or of one that holds both side by side.
    pub fn glu(&mut self, gate_and_up: &[ValueId], gate: Gate) -> ValueId {
        self.push(OpKind::Glu { gate, packed: gate_and_up.len() == 1 }, gate_and_up, &[])
    }

    /// `factor * x`; `x` itself if the factor is 1.
    pub fn scale(&mut self, x: ValueId, factor: f32) -> ValueId {
        if factor == 1.0 {
            return x;
        }
        self.push(OpKind::Scale { factor }, &[x], &[])
    }

    /// `cap * tanh(x / cap)`; `x` itself without a cap.
    pub fn soft_cap(&mut self, x: ValueId, cap: Option<f32>) -> ValueId {
        match cap {
            Some(cap) => self.push(OpKind::SoftCap { cap }, &[x], &[]),
            None => x,
        }
    }

    /// `a + b`.
    pub fn add(&mut self, a: ValueId, b: ValueId) -> ValueId {
        self.push(OpKind::Add, &[a, b], &[])
    }

    /// Inverted dropout with probability `p`; `x` itself if `p` is 0.
    pub fn dropout(&mut self, x: ValueId, p: f32) -> ValueId {
        if p == 0.0 {
            return x;
        }
        let site = RandomSite(self.graph.n_random_sites);
        self.graph.n_random_sites += 1;
        self.push(OpKind::Dropout { p, site }, &[x], &[])
    }

    /// The selected rows of `x`, for decoding.
    pub fn take_rows(&mut self, x: ValueId) -> ValueId {
        let idx = self.input(InputKind::SelectedRows);
        self.push(OpKind::TakeRows, &[x, idx], &[])
    }

    /// The fused head: loss of every token, never all logits. `w` is `[V, C]`.
    pub fn cross_entropy(&mut self, x: ValueId, w: ParamId) -> ValueId {
        self.cross_entropy_capped(x, w, None)
    }

    /// As [`GraphBuilder::cross_entropy`], of logits `l` that become `cap * tanh(l / cap)` first.
    pub fn cross_entropy_capped(
        &mut self,
        x: ValueId,
        w: ParamId,
        soft_cap: Option<f32>,
    ) -> ValueId {
        let targets = self.input(InputKind::Targets);
        let loss = self.push(OpKind::CrossEntropy { soft_cap }, &[x, targets], &[w]);
        self.graph.values[loss].kind = ValueKind::Loss;
        loss
    }

    /// Marks a value as a result that the session reads.
    pub fn result(&mut self, x: ValueId) {
        self.graph.values[x].kind = ValueKind::Result;
    }

    /// The finished graph.
    ///
    /// # Errors
    /// The first op whose operands did not fit.
    pub fn finish(mut self) -> Result<Graph, InferError> {
        if let Some(e) = self.error {
            return Err(e);
        }
        cut_stages(&mut self.graph);
        Ok(self.graph)
    }

    /// Appends an op to the open stage and returns its first output.
    fn push(&mut self, kind: OpKind, inputs: &[ValueId], params: &[ParamId]) -> ValueId {
        let uses = params.iter().map(|&param| self.graph.uses.push(Use { param })).collect();
        let stage = self.graph.stages.ids().next_back();
        let mut op = Op {
            kind,
            phase: Phase::Forward,
            stage,
            inputs: inputs.to_vec(),
            uses,
            sums: Vec::new(),
            outputs: Vec::new(),
            updates: None,
        };
        let outputs = match infer_outputs(&self.graph, &op) {
            Ok(outputs) => outputs,
            Err(e) => {
                self.error.get_or_insert(e);
                // Any value will do: `finish` reports the error and drops the graph.
                return inputs[0];
            }
        };
        for (i, (shape, dtype)) in outputs.into_iter().enumerate() {
            let name = self.value_name(&op, i);
            let kind = ValueKind::Activation;
            op.outputs.push(self.graph.values.push(Value { name, shape, dtype, kind }));
        }
        let first = op.outputs[0];
        self.graph.ops.push(op);
        first
    }

    /// `stage.parameter` where an op has a parameter, else `stage.op`; `.lse` for the second output.
    fn value_name(&self, op: &Op, output: usize) -> String {
        let suffix = if output == 0 { "" } else { ".lse" };
        let own = op.uses.first().map(|&u| {
            let name = &self.graph.params[self.graph.param_of(u)].name;
            let name = name.trim_end_matches(".weight");
            name.rsplit('.').next().unwrap_or(name).to_owned()
        });
        let own = own.unwrap_or_else(|| op.kind.name().to_owned());
        format!("{}.{own}{suffix}", self.prefix)
    }
}

/// Finds the cut values: what a stage reads of the one before it.
fn cut_stages(graph: &mut Graph) {
    let mut producer = vec![None; graph.values.len()];
    for op in graph.ops.values() {
        for &v in &op.outputs {
            producer[v.0 as usize] = op.stage;
        }
    }
    let mut cuts = Vec::new();
    for op in graph.ops.values() {
        for &v in &op.inputs {
            if let (Some(from), Some(to)) = (producer[v.0 as usize], op.stage)
                && from != to
            {
                cuts.push((from, to, v));
            }
        }
    }
    for (from, to, v) in cuts {
        graph.stages[from].output = Some(v);
        graph.stages[to].input = Some(v);
    }
}
