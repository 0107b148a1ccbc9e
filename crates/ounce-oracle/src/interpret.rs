//! Runs a graph on a whole step in f64: every op once, on all tokens, every value kept.
//!
//! Idea. What a plan cuts, repeats and overwrites must come out as if nothing had been cut. This is
//! that "as if": one pass over the ops in program order, each by its definition in [`ops`], with a
//! buffer per value. Complexity: the arithmetic of the step, in plain loops.
//!
//! Precision. Arithmetic is f64 in all dtypes; what a value stored in 16 bits keeps is rounded once,
//! where it is written ([`round_to`]). Ops read the rounded half of a bf16 parameter, its update the
//! whole master ([`split`]).
//!
//! Misuse (a length that does not fit, a value that was not computed) panics: it is a mistake in the
//! test that asks.

use std::ops::Range;

use ounce_ir::{
    AttentionSpec, DType, EntityId, Gate, Graph, InputKind, Lead, MASTER_LO, Op, OpId, OpKind,
    ParamId, Phase, ValueId, ValueKind, WeightLayout,
};
use ounce_program::StepShape;

pub use crate::ops::Hyper;
use crate::ops::{self, Qkv, Rotation, Weight};
use crate::philox;
use crate::round::{round_to, split};

/// One sequence of a step: what it reads and what it should predict.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Token ids.
    pub token_ids: Vec<i32>,
    /// The id that each token should predict; negative where there is no supervision.
    pub targets: Vec<i32>,
}

/// A graph, its parameters and the data of a step.
#[derive(Debug, Clone)]
pub struct Interpreter<'g> {
    graph: &'g Graph,
    shape: StepShape,
    /// Seed of the random ops.
    pub seed: u64,
    /// The step that runs next, counted from 1; random ops and AdamW read it.
    pub step: u64,
    /// What the gradients of the step are multiplied with, a power of two: 1 but for f16. Norms and
    /// updates divide by it again.
    pub loss_scale: f64,
    /// Rows as spans of the token axis.
    spans: Vec<Range<usize>>,
    /// Per [`InputKind`], in declaration order.
    inputs: [Vec<i32>; 4],
    /// Per value; empty until it is computed.
    values: Vec<Vec<f64>>,
    /// Per parameter: what ops read.
    params: Vec<Vec<f64>>,
    /// Per parameter: what the update reads and writes.
    masters: Vec<Vec<f64>>,
    /// Per parameter and optimizer state.
    states: Vec<Vec<Vec<f64>>>,
}

impl<'g> Interpreter<'g> {
    /// A step over full rows without data (ids and positions 0, nothing supervised); parameters and
    /// optimizer state are zero.
    pub fn new(graph: &'g Graph, shape: StepShape) -> Self {
        let n = shape.n_tokens() as usize;
        let params: Vec<Vec<f64>> =
            graph.params.values().map(|p| vec![0.0; p.shape.row_elems() as usize]).collect();
        let states = params.iter().map(|p| vec![p.clone(); graph.states.len()]).collect();
        let row = |r| shape.tokens_of_rows(r..r + 1).start as usize;
        Self {
            graph,
            shape,
            seed: 0,
            step: 1,
            loss_scale: 1.0,
            spans: (0..shape.n_rows).map(|r| row(r)..row(r) + shape.row_tokens as usize).collect(),
            inputs: InputKind::ALL.map(|kind| match kind {
                InputKind::TokenIds | InputKind::Positions => vec![0; n],
                InputKind::Targets => vec![-1; n],
                InputKind::SelectedRows => vec![0; shape.n_selected as usize],
            }),
            values: vec![Vec::new(); graph.values.len()],
            masters: params.clone(),
            params,
            states,
        }
    }

    /// Lays rows out on the token axis: ids, positions, targets and spans; gaps between them.
    pub fn set_rows(&mut self, rows: &[Row]) {
        assert_eq!(rows.len() as u64, self.shape.n_rows, "rows of the step");
        let n = self.shape.n_tokens() as usize;
        let (mut ids, mut positions, mut targets) = (vec![-1; n], vec![0; n], vec![-1; n]);
        self.spans.clear();
        for (r, row) in (0..).zip(rows) {
            let len = row.token_ids.len();
            assert!(len as u64 <= self.shape.row_tokens, "row {r} has {len} tokens");
            let start = self.shape.tokens_of_rows(r..r + 1).start as usize;
            let span = start..start + len;
            ids[span.clone()].copy_from_slice(&row.token_ids);
            targets[span.clone()].copy_from_slice(&row.targets);
            for (place, position) in positions[span.clone()].iter_mut().zip(0..) {
                *place = position;
            }
            self.spans.push(span);
        }
        self.set_input(InputKind::TokenIds, &ids);
        self.set_input(InputKind::Positions, &positions);
        self.set_input(InputKind::Targets, &targets);
    }

    /// Replaces one input.
    pub fn set_input(&mut self, kind: InputKind, data: &[i32]) {
        let input = &mut self.inputs[kind as usize];
        assert_eq!(input.len(), data.len(), "elements of {}", kind.name());
        input.copy_from_slice(data);
    }

    /// The graph that runs.
    pub fn graph(&self) -> &'g Graph {
        self.graph
    }

    /// The parameter of that name.
    pub fn param_id(&self, name: &str) -> ParamId {
        let found = self.graph.params.iter().find(|(_, p)| p.name == name);
        found.unwrap_or_else(|| panic!("the graph has no parameter {name}")).0
    }

    /// A parameter's elements as ops read them.
    pub fn param(&self, param: ParamId) -> &[f64] {
        &self.params[param.index()]
    }

    /// A parameter's elements as the update reads them.
    pub fn master(&self, param: ParamId) -> &[f64] {
        &self.masters[param.index()]
    }

    /// Sets a parameter; one that is stored in bf16 is split.
    pub fn set_param(&mut self, param: ParamId, data: &[f64]) {
        let place = &mut self.masters[param.index()];
        assert_eq!(place.len(), data.len(), "elements of {}", self.graph.params[param].name);
        place.copy_from_slice(data);
        self.store(param);
    }

    /// Writes what is stored of a master: all of it, or the rounded half and the rest.
    fn store(&mut self, param: ParamId) {
        let i = param.index();
        if self.graph.params[param].dtype != DType::Bf16 {
            self.params[i].clone_from(&self.masters[i]);
            return;
        }
        let rest = self.graph.states.iter().position(|s| s.name == MASTER_LO);
        for (j, &master) in self.masters[i].iter().enumerate() {
            let (hi, lo) = split(master as f32);
            self.params[i][j] = hi.into();
            if let Some(rest) = rest {
                self.states[i][rest][j] = lo.into();
            }
        }
    }

    /// An optimizer state of a parameter.
    pub fn state(&self, param: ParamId, state: usize) -> &[f64] {
        &self.states[param.index()][state]
    }

    /// A value of the last run.
    pub fn value(&self, value: ValueId) -> &[f64] {
        let data = &self.values[value.index()];
        assert!(!data.is_empty(), "{} was not computed", self.graph.values[value].name);
        data
    }

    /// The gradient of the mean loss by a trained parameter, as of the last run, times
    /// [`Interpreter::loss_scale`].
    pub fn gradient(&self, param: ParamId) -> &[f64] {
        let sum = self.graph.values.iter().find(|(_, v)| {
            matches!(v.kind, ValueKind::Sum(u) if self.graph.param_of(u) == param)
                && v.shape.lead == Lead::Fixed
        });
        self.value(sum.unwrap_or_else(|| panic!("{param} has no gradient")).0)
    }

    /// Every token's loss, gaps included (0).
    pub fn losses(&self) -> &[f64] {
        self.value(self.graph.find_value(ValueKind::Loss).expect("a graph with a loss"))
    }

    /// The mean loss over supervised tokens.
    pub fn loss(&self) -> f64 {
        self.losses().iter().sum::<f64>() * self.grad_scale()
    }

    /// The global norm of the gradients before clipping, without the loss scale.
    pub fn grad_norm(&self) -> f64 {
        let ops = self.graph.ops.values().filter(|op| op.kind == OpKind::SumSquares);
        ops.map(|op| self.value(op.outputs[0])[0]).sum::<f64>().sqrt() / self.loss_scale
    }

    /// 1 / supervised tokens: what every token's loss is weighed with.
    pub fn grad_scale(&self) -> f64 {
        let targets = &self.inputs[InputKind::Targets as usize];
        1.0 / targets.iter().filter(|&&t| t >= 0).count().max(1) as f64
    }

    /// Runs the forward ops and the loss; of a differentiated graph too.
    pub fn run_forward(&mut self) {
        self.run(|op| match (op.phase, op.kind) {
            (Phase::Forward, kind) => Some(kind),
            (_, OpKind::CrossEntropyTrain { soft_cap }) => Some(OpKind::CrossEntropy { soft_cap }),
            _ => None,
        });
    }

    /// Runs forward and backward and completes the gradients of all parameters.
    pub fn run_backward(&mut self) {
        self.run(|op| match (op.phase, op.kind) {
            (Phase::Update, OpKind::EmbedScatter) => Some(op.kind),
            (Phase::Update, _) => None,
            (Phase::Forward | Phase::Backward, kind) => Some(kind),
        });
    }

    /// Runs the whole step: forward, backward, update; then counts `step` up.
    pub fn run_step(&mut self, hyper: &Hyper) {
        self.run_backward();
        let graph = self.graph;
        for op in graph.ops.values() {
            if op.phase == Phase::Update && op.kind != OpKind::EmbedScatter {
                self.update(op, hyper);
            }
        }
        self.step += 1;
    }

    /// Starts sums at zero, then runs what `select` gives of each op.
    fn run(&mut self, select: impl Fn(&Op) -> Option<OpKind>) {
        let graph = self.graph;
        for (v, value) in graph.values.iter() {
            self.values[v.index()].clear();
            if let ValueKind::Sum(_) = value.kind {
                let n_elems = value.shape.elems(self.shape.n_tokens());
                self.values[v.index()].resize(n_elems as usize, 0.0);
            }
        }
        for (id, op) in graph.ops.iter() {
            if let Some(kind) = select(op) {
                self.execute(id, kind);
            }
        }
    }

    /// Runs one op by its definition.
    fn execute(&mut self, id: OpId, kind: OpKind) {
        let op = &self.graph.ops[id];
        // Sums are taken out while the op reads other values, and put back behind it.
        let mut sums: Vec<Vec<f64>> =
            op.sums.iter().map(|s| std::mem::take(&mut self.values[s.index()])).collect();
        let outputs = self.outputs(op, kind, &mut sums);
        for (sum, data) in op.sums.iter().zip(sums) {
            self.values[sum.index()] = data;
        }
        for (v, data) in op.outputs.iter().zip(outputs) {
            let value = &self.graph.values[*v];
            let n = match value.shape.lead {
                Lead::Fixed | Lead::Tokens => self.shape.n_tokens(),
                Lead::Selected => self.shape.n_selected,
            };
            assert_eq!(data.len() as u64, value.shape.elems(n), "{id} made {}", value.name);
            self.values[v.index()] = data.into_iter().map(|x| round_to(value.dtype, x)).collect();
        }
    }

    /// Every op of the forward and the backward, by its definition; adds to `sums`.
    fn outputs(&self, op: &Op, kind: OpKind, sums: &mut [Vec<f64>]) -> Vec<Vec<f64>> {
        let x = |i: usize| self.value(op.inputs[i]);
        let ints = |i: usize| self.ints(op.inputs[i]);
        let width = |i: usize| self.graph.values[op.inputs[i]].shape.last() as usize;
        let used = |i: usize| self.param(self.graph.param_of(op.uses[i]));
        let biased = |bias: bool| bias.then(|| used(1));
        match kind {
            OpKind::Embed => vec![ops::embed(ints(0), used(0), self.last_dim(op))],
            OpKind::Linear { layout, bias } => {
                vec![ops::linear(x(0), self.weight(op, layout), biased(bias))]
            }
            OpKind::LayerNorm { eps, bias } => {
                vec![ops::layer_norm(x(0), used(0), biased(bias), eps.into())]
            }
            OpKind::RmsNorm { eps, unit_offset } => {
                vec![ops::rms_norm(x(0), used(0), eps.into(), f64::from(unit_offset))]
            }
            OpKind::Rope { table, n_heads, head_dim, inverse } => {
                let table = &self.graph.rope_tables[table];
                let (inv_freq, scale) = (&table.inv_freq[..], table.scale.into());
                let (n_heads, head_dim) = (n_heads as usize, head_dim as usize);
                let rotation = Rotation { inv_freq, scale, n_heads, head_dim, inverse };
                vec![ops::rope(x(0), ints(1), rotation)]
            }
            OpKind::Attention(spec) => {
                let (o, lse) = ops::attention(&self.qkv(op, &spec).0, &self.spans, &spec);
                vec![o, lse]
            }
            OpKind::Gelu(kind) => vec![ops::gelu(x(0), kind)],
            OpKind::Glu { gate: kind, packed } => {
                let (gate, up, _) = self.glu(op, packed);
                vec![ops::glu(&gate, &up, kind)]
            }
            OpKind::Scale { factor } => vec![ops::scale(x(0), factor.into())],
            OpKind::SoftCap { cap } => vec![ops::soft_caps(x(0), cap.into())],
            OpKind::Add => vec![ops::add(x(0), x(1))],
            OpKind::Dropout { p, site } => {
                let word =
                    |token, channel| philox::word(self.seed, self.step, site.0, token, channel);
                vec![ops::dropout(x(0), width(0), p.into(), word)]
            }
            OpKind::TakeRows => vec![ops::take_rows(x(0), ints(1), width(0))],
            OpKind::CrossEntropy { soft_cap } => {
                let w = self.weight(op, WeightLayout::OutIn);
                vec![ops::cross_entropy(x(0), ints(1), w, soft_cap.map(f64::from))]
            }
            OpKind::CrossEntropyTrain { soft_cap } => {
                self.head(op, soft_cap, sums.first_mut().map(Vec::as_mut_slice))
            }
            OpKind::LinearGradInput { layout } => {
                vec![ops::linear_grad_input(x(0), self.weight(op, layout))]
            }
            OpKind::LinearGradWeight { layout } => {
                ops::linear_grad_weight(&mut sums[0], x(0), x(1), width(0), width(1), layout);
                Vec::new()
            }
            OpKind::BiasGrad => {
                ops::bias_grad(&mut sums[0], x(0));
                Vec::new()
            }
            OpKind::LayerNormGrad { eps, .. } => {
                let mut sums = sums.iter_mut().map(Vec::as_mut_slice);
                let (dw, db) = (sums.next(), sums.next());
                vec![ops::layer_norm_grad(x(0), x(1), used(0), eps.into(), dw, db)]
            }
            OpKind::RmsNormGrad { eps, unit_offset } => {
                let dw = sums.first_mut().map(Vec::as_mut_slice);
                let offset = f64::from(unit_offset);
                vec![ops::rms_norm_grad(x(0), x(1), used(0), eps.into(), offset, dw)]
            }
            OpKind::AttentionGrad(spec) => {
                let (qkv, n) = self.qkv(op, &spec);
                let d = ops::attention_grad(&qkv, x(n), x(n + 1), x(n + 2), &self.spans, &spec);
                if spec.packed { vec![d.pack(&spec)] } else { vec![d.q, d.k, d.v] }
            }
            OpKind::GeluGrad(kind) => vec![ops::gelu_grad(x(0), x(1), kind)],
            OpKind::GluGrad { gate: kind, packed } => self.glu_grad(op, kind, packed),
            OpKind::SoftCapGrad { cap } => vec![ops::soft_caps_grad(x(0), x(1), cap.into())],
            OpKind::EmbedGradRows => {
                sums[0].copy_from_slice(x(0));
                Vec::new()
            }
            OpKind::EmbedScatter => {
                ops::embed_scatter(&mut sums[0], ints(0), x(1), width(1));
                Vec::new()
            }
            OpKind::SumSquares | OpKind::ClipScale | OpKind::AdamW | OpKind::Sgd => {
                unreachable!("{} belongs to the update", kind.name())
            }
        }
    }

    /// The ops of the update that need its settings.
    fn update(&mut self, op: &Op, hyper: &Hyper) {
        let scale = op.inputs.get(1).filter(|_| op.updates.is_some());
        let scale = scale.map_or(1.0 / self.loss_scale, |&v| self.value(v)[0]);
        let scalar = match op.kind {
            OpKind::SumSquares => ops::sum_squares(self.value(op.inputs[0])),
            OpKind::ClipScale => {
                let squared = self.loss_scale * self.loss_scale;
                let parts: Vec<f64> =
                    op.inputs.iter().map(|&v| self.value(v)[0] / squared).collect();
                ops::clip_scale(&parts, hyper.max_grad_norm) / self.loss_scale
            }
            OpKind::AdamW | OpKind::Sgd => {
                let param = op.updates.expect("an update names its parameter");
                let decay = self.graph.params[param].decay;
                let weight_decay = if decay { hyper.weight_decay } else { 0.0 };
                let hyper = Hyper { weight_decay, ..*hyper };
                let (w, g) = (&mut self.masters[param.index()], &self.values[op.inputs[0].index()]);
                match &mut self.states[param.index()][..] {
                    [m, v, ..] => ops::adamw(w, m, v, g, scale, self.step, &hyper),
                    _ => ops::sgd(w, g, scale, &hyper),
                }
                self.store(param);
                return;
            }
            kind => unreachable!("{} has run before the update", kind.name()),
        };
        self.values[op.outputs[0].index()] = vec![scalar];
    }

    /// Loss and scaled gradient of the head.
    fn head(&self, op: &Op, soft_cap: Option<f32>, dw: Option<&mut [f64]>) -> Vec<Vec<f64>> {
        let (x, targets) = (self.value(op.inputs[0]), self.ints(op.inputs[1]));
        let w = self.weight(op, WeightLayout::OutIn);
        let (cap, scale) = (soft_cap.map(f64::from), self.grad_scale() * self.loss_scale);
        let (loss, dx) = ops::cross_entropy_train(x, targets, w, scale, cap, dw);
        vec![loss, dx]
    }

    fn ints(&self, value: ValueId) -> &[i32] {
        match self.graph.values[value].kind {
            ValueKind::Input(kind) => &self.inputs[kind as usize],
            kind => panic!("{value} is {kind:?}, not data"),
        }
    }

    /// Queries, keys and values of an attention, and how many inputs they take.
    fn qkv(&self, op: &Op, spec: &AttentionSpec) -> (Qkv, usize) {
        let x = |i: usize| self.value(op.inputs[i]);
        if spec.packed {
            (Qkv::unpack(x(0), spec), 1)
        } else {
            (Qkv { q: x(0).to_vec(), k: x(1).to_vec(), v: x(2).to_vec() }, 3)
        }
    }

    /// Gate and up of a gated linear unit, and how many inputs they take.
    fn glu(&self, op: &Op, packed: bool) -> (Vec<f64>, Vec<f64>, usize) {
        let x = |i: usize| self.value(op.inputs[i]);
        if packed {
            let width = self.graph.values[op.inputs[0]].shape.last() as usize / 2;
            let (gate, up) = ops::split_glu(x(0), width);
            (gate, up, 1)
        } else {
            (x(0).to_vec(), x(1).to_vec(), 2)
        }
    }

    /// Gradients of gate and up, side by side if they came so.
    fn glu_grad(&self, op: &Op, kind: Gate, packed: bool) -> Vec<Vec<f64>> {
        let (gate, up, n) = self.glu(op, packed);
        let (d_gate, d_up) = ops::glu_grad(&gate, &up, self.value(op.inputs[n]), kind);
        if packed {
            let width = self.graph.values[op.inputs[0]].shape.last() as usize / 2;
            vec![ops::join_glu(&d_gate, &d_up, width)]
        } else {
            vec![d_gate, d_up]
        }
    }

    /// The first use of a linear layer or head.
    fn weight(&self, op: &Op, layout: WeightLayout) -> Weight<'_> {
        let param = self.graph.param_of(op.uses[0]);
        let dims = &self.graph.params[param].shape.dims;
        let (n_out, n_in) = match layout {
            WeightLayout::OutIn => (dims[0], dims[1]),
            WeightLayout::InOut => (dims[1], dims[0]),
        };
        let (n_out, n_in) = (n_out as usize, n_in as usize);
        Weight { data: self.param(param), n_in, n_out, layout }
    }

    fn last_dim(&self, op: &Op) -> usize {
        self.graph.params[self.graph.param_of(op.uses[0])].shape.last() as usize
    }
}
