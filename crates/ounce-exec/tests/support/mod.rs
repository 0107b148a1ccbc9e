//! Small models, data, and a planner that keeps everything: what the executor's tests share.

#![allow(dead_code, reason = "every test file uses its own part of this module")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ounce_exec::{Arena, Buffers, Executor, MeasuredMachine, OptimizerHyper, RowSpan, StepInputs};
use ounce_ir::{
    AttentionSpec, DType, GeluKind, Graph, GraphBuilder, Init, InputKind, Lead, OpId, OpKind,
    OptimizerKind, ParamId, Phase, Shape, Table, ValueId, ValueKind, WeightLayout,
};
use ounce_kernels::pool::Pool;
use ounce_oracle::{Hyper, Row};
use ounce_passes::{Precision, PrecisionPolicy};
use ounce_program::{
    Buffer, BufferId, BufferRef, BufferRole, Category, Certificate, Choice, GRANULE_TOKENS, Instr,
    LoopOrder, Machine, Plan, StepShape, Tier,
};

pub(crate) const VOCAB: u64 = 37;
pub(crate) const ROW_TOKENS: u64 = 70;

/// Two layers with learned positions, packed attention, tanh GELU, a tied head and dropout.
pub(crate) fn gpt2_like(dropout: f32) -> Graph {
    let (c, h, d) = (32, 4, 8);
    let mut b = GraphBuilder::new();
    let (ids, positions) = (b.input(InputKind::TokenIds), b.input(InputKind::Positions));
    let wte = b.param("wte.weight", Shape::fixed(&[VOCAB, c]), true);
    let wpe = b.param("wpe.weight", Shape::fixed(&[ROW_TOKENS, c]), true);
    b.stage("embed", "embed");
    let (tokens, places) = (b.embed(ids, wte), b.embed(positions, wpe));
    let mut x = b.add(tokens, places);
    x = b.dropout(x, dropout);
    let linear = |b: &mut GraphBuilder, x, name: String, k, m| {
        let w = b.param(&format!("{name}.weight"), Shape::fixed(&[k, m]), true);
        let bias = b.param_init(&format!("{name}.bias"), Shape::fixed(&[m]), false, Init::Zeros);
        b.linear(x, w, Some(bias), WeightLayout::InOut)
    };
    let norm = |b: &mut GraphBuilder, x, name: String| {
        let w = b.param_init(&format!("{name}.weight"), Shape::fixed(&[c]), false, Init::Ones);
        let bias = b.param_init(&format!("{name}.bias"), Shape::fixed(&[c]), false, Init::Zeros);
        b.layer_norm(x, w, Some(bias), 1e-5)
    };
    let spec = AttentionSpec {
        n_heads: h,
        n_kv_heads: h,
        head_dim: d,
        scale: 1.0 / (d as f32).sqrt(),
        packed: true,
        window: None,
        soft_cap: None,
    };
    for i in 0..2 {
        b.stage(&format!("attn.{i}"), "attn");
        let mut y = norm(&mut b, x, format!("h.{i}.ln_1"));
        y = linear(&mut b, y, format!("h.{i}.attn.c_attn"), c, 3 * c);
        y = b.attention(&[y], spec);
        y = linear(&mut b, y, format!("h.{i}.attn.c_proj"), c, c);
        y = b.dropout(y, dropout);
        x = b.add(x, y);
        b.stage(&format!("mlp.{i}"), "mlp");
        y = norm(&mut b, x, format!("h.{i}.ln_2"));
        y = linear(&mut b, y, format!("h.{i}.mlp.c_fc"), c, 4 * c);
        y = b.gelu(y, GeluKind::Tanh);
        y = linear(&mut b, y, format!("h.{i}.mlp.c_proj"), 4 * c, c);
        y = b.dropout(y, dropout);
        x = b.add(x, y);
    }
    b.stage("head", "head");
    x = norm(&mut b, x, "ln_f".to_owned());
    b.cross_entropy(x, wte);
    b.finish().expect("a well-formed graph")
}

/// Two layers with RMS norm, rope, grouped heads, SwiGLU and an untied head.
pub(crate) fn llama_like() -> Graph {
    let mut b = GraphBuilder::new();
    let x = llama_body(&mut b);
    let head = b.param("lm_head.weight", Shape::fixed(&[VOCAB, 24]), true);
    b.cross_entropy(x, head);
    b.finish().expect("a well-formed graph")
}

/// The same body, with the logits of selected tokens as its result.
pub(crate) fn llama_like_decode() -> Graph {
    let mut b = GraphBuilder::new();
    let x = llama_body(&mut b);
    let head = b.param("lm_head.weight", Shape::fixed(&[VOCAB, 24]), true);
    let last = b.take_rows(x);
    let logits = b.linear(last, head, None, WeightLayout::OutIn);
    b.result(logits);
    b.finish().expect("a well-formed graph")
}

fn llama_body(b: &mut GraphBuilder) -> ValueId {
    let (c, h, kv, d, f) = (24, 4, 2, 6, 40);
    let ids = b.input(InputKind::TokenIds);
    let table = b.rope_table(vec![1.0, 0.1], 1.0);
    let embed = b.param("embed_tokens.weight", Shape::fixed(&[VOCAB, c]), true);
    let linear = |b: &mut GraphBuilder, x, name: String, k, m| {
        let w = b.param(&format!("{name}.weight"), Shape::fixed(&[m, k]), true);
        b.linear(x, w, None, WeightLayout::OutIn)
    };
    let norm = |b: &mut GraphBuilder, x, name: String| {
        let w = b.param_init(&format!("{name}.weight"), Shape::fixed(&[c]), false, Init::Ones);
        b.rms_norm(x, w, 1e-5)
    };
    let spec = AttentionSpec {
        n_heads: h,
        n_kv_heads: kv,
        head_dim: d,
        scale: 1.0 / (d as f32).sqrt(),
        packed: false,
        window: None,
        soft_cap: None,
    };
    b.stage("embed", "embed");
    let mut x = b.embed(ids, embed);
    for i in 0..2 {
        b.stage(&format!("attn.{i}"), "attn");
        let y = norm(b, x, format!("layers.{i}.input_layernorm"));
        let (q_width, kv_width) = (u64::from(h * d), u64::from(kv * d));
        let q = linear(b, y, format!("layers.{i}.q_proj"), c, q_width);
        let k = linear(b, y, format!("layers.{i}.k_proj"), c, kv_width);
        let v = linear(b, y, format!("layers.{i}.v_proj"), c, kv_width);
        let (q, k) = (b.rope(q, table, h, d), b.rope(k, table, kv, d));
        let o = b.attention(&[q, k, v], spec);
        let y = linear(b, o, format!("layers.{i}.o_proj"), q_width, c);
        x = b.add(x, y);
        b.stage(&format!("mlp.{i}"), "mlp");
        let y = norm(b, x, format!("layers.{i}.post_attention_layernorm"));
        let gate = linear(b, y, format!("layers.{i}.gate_proj"), c, f);
        let up = linear(b, y, format!("layers.{i}.up_proj"), c, f);
        let y = b.swiglu(gate, up);
        let y = linear(b, y, format!("layers.{i}.down_proj"), f, c);
        x = b.add(x, y);
    }
    b.stage("head", "head");
    norm(b, x, "norm".to_owned())
}

/// The whole training step of a forward graph.
pub(crate) fn training(forward: &Graph, kind: OptimizerKind, clip: bool) -> Graph {
    training_in(Precision::F32, forward, kind, clip)
}

/// The same with values in a precision.
pub(crate) fn training_in(
    precision: Precision,
    forward: &Graph,
    kind: OptimizerKind,
    clip: bool,
) -> Graph {
    let graph = ounce_passes::differentiate(forward).expect("differentiable");
    let graph = ounce_passes::lower_precision(&graph, &PrecisionPolicy::new(precision));
    ounce_passes::attach_optimizer(&graph, kind, clip).expect("trainable")
}

/// Numbers in [-1, 1) from a fixed generator.
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..n)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

/// Starting values of a parameter: ones (of norms) and zeros slightly off, so that nothing cancels.
pub(crate) fn start_values(graph: &Graph, p: ParamId) -> Vec<f32> {
    let param = &graph.params[p];
    let center = if param.init == Init::Ones { 1.0 } else { 0.0 };
    let values = noise(param.shape.row_elems() as usize, u64::from(p.0) + 1);
    values.into_iter().map(|x| center + 0.2 * x).collect()
}

/// Rows of different lengths; part of every row is not supervised.
pub(crate) fn rows(n_rows: u64, seed: u64) -> Vec<Row> {
    (0..n_rows)
        .map(|r| {
            let len = [ROW_TOKENS, 7, 64, 1, 33][(r % 5) as usize] as usize;
            let draw = noise(2 * len, seed * 100 + r);
            let id = |x: f32| (f32::midpoint(x, 1.0) * VOCAB as f32) as i32;
            let targets = draw[len..].iter().enumerate();
            Row {
                token_ids: draw[..len].iter().map(|&x| id(x)).collect(),
                targets: targets.map(|(i, &x)| if i % 4 == 2 { -1 } else { id(x) }).collect(),
            }
        })
        .collect()
}

/// Where the rows lie on the token axis.
pub(crate) fn spans(shape: StepShape, rows: &[Row]) -> Vec<RowSpan> {
    (0..)
        .zip(rows)
        .map(|(r, row)| RowSpan {
            start: shape.tokens_of_rows(r..r + 1).start as usize,
            len: row.token_ids.len(),
        })
        .collect()
}

/// How the naive planner cuts a step.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    /// Rows per micro-batch.
    pub(crate) micro_batch_rows: u64,
    /// Tokens per run of ops that may be cut anywhere; 0: the whole micro-batch.
    pub(crate) run_tokens: u64,
    /// Whether outputs take the place of inputs wherever ops and lifetimes allow it.
    pub(crate) in_place: bool,
    /// Whether forward ops that may run again do so before the backward.
    pub(crate) recompute: bool,
}

impl Cut {
    /// Everything at once.
    pub(crate) const NONE: Self =
        Self { micro_batch_rows: u64::MAX, run_tokens: 0, in_place: false, recompute: false };
}

/// A plan that keeps every value of every micro-batch in bytes of its own.
pub(crate) struct Naive<'a> {
    graph: &'a Graph,
    machine: &'a dyn Machine,
    shape: StepShape,
    cut: Cut,
    plan: Plan,
    /// Buffers of the current micro-batch.
    values: BTreeMap<ValueId, BufferId>,
    sums: BTreeMap<ValueId, BufferId>,
    last_reader: BTreeMap<ValueId, OpId>,
}

/// Plans a step with sums and every value for the session to look at.
pub(crate) fn naive_plan(graph: &Graph, machine: &dyn Machine, shape: StepShape, cut: Cut) -> Plan {
    let choice = Choice {
        loop_order: LoopOrder::TokenMajor,
        n_micro_batches: shape.n_rows.div_ceil(cut.micro_batch_rows),
        head_chunk_tokens: cut.run_tokens,
        release_gradients: false,
        n_kept: 0,
        n_recomputed: 0,
    };
    let certificate = Certificate {
        budget_bytes: 0,
        peak_bytes: 0,
        max_load_bytes: 0,
        step_s: 0.0,
        step_bound_s: 0.0,
        unconstrained_step_s: 0.0,
    };
    let plan = Plan {
        shape,
        n_threads: machine.n_threads(),
        buffers: Table::default(),
        instrs: Vec::new(),
        arena_bytes: 0,
        baseline_bytes: 0,
        choice,
        certificate,
    };
    let (values, sums, last_reader) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut naive = Naive { graph, machine, shape, cut, plan, values, sums, last_reader };
    naive.build();
    naive.plan
}

impl Naive<'_> {
    fn build(&mut self) {
        let graph = self.graph;
        for (id, op) in graph.ops.iter() {
            op.inputs.iter().for_each(|&v| {
                self.last_reader.insert(v, id);
            });
        }
        for (p, param) in graph.params.iter() {
            self.buffer(BufferRole::Param(p), param.bytes());
            for k in 0..graph.states.len() as u32 {
                let state = self.graph.states[k as usize].dtype;
                self.buffer(BufferRole::State(p, k), state.bytes(param.shape.row_elems()));
            }
        }
        for (v, value) in graph.values.iter() {
            match value.kind {
                ValueKind::Activation | ValueKind::Gradient => {}
                _ => {
                    let id = self.buffer(BufferRole::Session(v), value.bytes(self.n_of(v)));
                    self.sums.insert(v, id);
                    if matches!(value.kind, ValueKind::Sum(_)) && value.shape.lead == Lead::Fixed {
                        let dst = BufferRef { buffer: id, at: 0, bytes: value.bytes(0) };
                        self.plan.instrs.push(Instr::Zero { value: v, dst });
                    }
                }
            }
        }
        let mut start = 0;
        while start < self.shape.n_rows {
            let end = self.shape.n_rows.min(start.saturating_add(self.cut.micro_batch_rows));
            self.micro_batch(&self.shape.tokens_of_rows(start..end));
            start = end;
        }
        let all = 0..self.shape.n_tokens();
        for (id, op) in graph.ops.iter().filter(|(_, op)| op.phase == Phase::Update) {
            assert!(op.stage.is_none(), "the update belongs to no stage");
            self.run(id, &all, &all);
        }
        let end = self.plan.instrs.len() as u32;
        let ids: Vec<BufferId> = self.plan.buffers.ids().collect();
        for id in ids {
            self.plan.buffers[id].live = 0..end;
        }
    }

    fn micro_batch(&mut self, tokens: &Range<u64>) {
        self.values.clear();
        for (id, op) in self.graph.ops.iter() {
            if op.phase == Phase::Update {
                continue;
            }
            self.outputs(id, tokens);
            self.runs(id, tokens);
        }
    }

    /// Runs an op over a micro-batch, in pieces if it may be cut; pure forward ops twice if asked.
    fn runs(&mut self, id: OpId, tokens: &Range<u64>) {
        let op = &self.graph.ops[id];
        let whole = op.kind.needs_whole_rows() || self.cut.run_tokens == 0;
        let step = if whole || self.is_selected(id) { u64::MAX } else { self.cut.run_tokens };
        let in_place = op.outputs.iter().any(|v| op.inputs.iter().any(|i| self.same(*v, *i)));
        let again = self.cut.recompute && op.phase == Phase::Forward && !in_place;
        for _ in 0..=u32::from(again) {
            let mut start = tokens.start;
            while start < tokens.end {
                let end = tokens.end.min(start.saturating_add(step));
                self.run(id, &(start..end), tokens);
                start = end;
            }
        }
    }

    fn is_selected(&self, id: OpId) -> bool {
        let op = &self.graph.ops[id];
        let mut values = op.inputs.iter().chain(&op.outputs);
        values.any(|&v| self.graph.values[v].shape.lead == Lead::Selected)
    }

    fn same(&self, a: ValueId, b: ValueId) -> bool {
        matches!((self.values.get(&a), self.values.get(&b)), (Some(a), Some(b)) if a == b)
    }

    /// Gives the op's outputs their buffers for this micro-batch.
    fn outputs(&mut self, id: OpId, tokens: &Range<u64>) {
        let op = &self.graph.ops[id];
        for (o, &v) in op.outputs.iter().enumerate() {
            if self.sums.contains_key(&v) {
                continue;
            }
            let taken = self.graph.in_place(op).find(|&(i, out)| {
                let input = op.inputs[i];
                self.cut.in_place
                    && out == o
                    && self.last_reader[&input] == id
                    && !op.inputs.iter().enumerate().any(|(j, &x)| j != i && self.same(x, input))
            });
            let handed_on = taken.and_then(|(i, _)| self.values.get(&op.inputs[i]).copied());
            let buffer = handed_on.unwrap_or_else(|| {
                let n = match self.graph.values[v].shape.lead {
                    Lead::Selected => self.shape.n_selected,
                    _ => tokens.end - tokens.start,
                };
                self.buffer(BufferRole::Value(v), self.graph.values[v].bytes(n))
            });
            self.values.insert(v, buffer);
        }
    }

    /// Appends one run over `tokens` of the micro-batch `all`.
    fn run(&mut self, id: OpId, tokens: &Range<u64>, all: &Range<u64>) {
        let op = &self.graph.ops[id];
        let mut operands: Vec<BufferRef> = Vec::new();
        operands.extend(op.inputs.iter().map(|&v| self.value(v, tokens, all)));
        for &u in &op.uses {
            operands.push(self.whole(BufferRole::Param(self.graph.param_of(u))));
        }
        operands.extend(op.sums.iter().map(|&v| self.value(v, tokens, all)));
        operands.extend(op.outputs.iter().map(|&v| self.value(v, tokens, all)));
        if let Some(p) = op.updates {
            operands.push(self.whole(BufferRole::Param(p)));
            for k in 0..self.graph.states.len() as u32 {
                operands.push(self.whole(BufferRole::State(p, k)));
            }
        }
        let n = tokens.end - tokens.start;
        let scratch = self.machine.scratch_bytes(self.graph, id, n);
        if scratch > 0 {
            let buffer = self.buffer(BufferRole::Scratch(id), scratch);
            operands.push(BufferRef { buffer, at: 0, bytes: scratch });
        }
        self.plan.instrs.push(Instr::Run { op: id, tokens: tokens.clone(), operands });
    }

    fn value(&self, v: ValueId, tokens: &Range<u64>, all: &Range<u64>) -> BufferRef {
        let value = &self.graph.values[v];
        let resident = self.sums.get(&v).copied();
        let buffer = resident.unwrap_or_else(|| self.values[&v]);
        match value.shape.lead {
            Lead::Fixed => BufferRef { buffer, at: 0, bytes: value.bytes(0) },
            Lead::Selected => {
                BufferRef { buffer, at: 0, bytes: value.bytes(self.shape.n_selected) }
            }
            Lead::Tokens => {
                let first = if resident.is_some() { 0 } else { all.start };
                let at = value.bytes(tokens.start - first);
                BufferRef { buffer, at, bytes: value.bytes(tokens.end - tokens.start) }
            }
        }
    }

    fn whole(&self, role: BufferRole) -> BufferRef {
        let buffer = self.plan.find_buffer(role).expect("a resident buffer");
        let bytes = match role {
            BufferRole::Param(p) => self.graph.params[p].bytes(),
            BufferRole::State(p, k) => {
                let n_elems = self.graph.params[p].shape.row_elems();
                self.graph.states[k as usize].dtype.bytes(n_elems)
            }
            _ => unreachable!("only parameters and states are asked for"),
        };
        BufferRef { buffer, at: 0, bytes }
    }

    fn n_of(&self, v: ValueId) -> u64 {
        match self.graph.values[v].shape.lead {
            Lead::Selected => self.shape.n_selected,
            _ => self.shape.n_tokens(),
        }
    }

    fn buffer(&mut self, role: BufferRole, bytes: u64) -> BufferId {
        let bytes = bytes.next_multiple_of(GRANULE_TOKENS).max(64);
        let offset = self.plan.arena_bytes;
        self.plan.arena_bytes += bytes;
        let (category, tier) = (Category::Working, Tier::Host);
        self.plan.buffers.push(Buffer { role, category, tier, offset, bytes, live: 0..0 })
    }
}

/// An executor with its arena, its parameters set.
pub(crate) struct Session {
    pub(crate) exec: Executor,
    pub(crate) arena: Arena,
}

impl Session {
    pub(crate) fn new(graph: &Graph, shape: StepShape, cut: Cut, n_threads: usize) -> Self {
        let pool = Arc::new(Pool::new(n_threads));
        let machine = MeasuredMachine::new(Arc::clone(&pool), 0, 0, None);
        let plan = naive_plan(graph, &machine, shape, cut);
        Self::of_plan(graph, &plan, pool)
    }

    pub(crate) fn of_plan(graph: &Graph, plan: &Plan, pool: Arc<Pool>) -> Self {
        let exec = Executor::new(graph, plan, pool).expect("an executable plan");
        let mut arena = Arena::reserve(plan.arena_bytes).expect("memory");
        let mut buffers = exec.buffers(&mut arena);
        for p in graph.params.ids() {
            buffers.write_master(p, 0, &start_values(graph, p));
        }
        Self { exec, arena }
    }

    /// Lays rows out on the token axis.
    pub(crate) fn set_rows(&mut self, graph: &Graph, shape: StepShape, rows: &[Row]) {
        self.set_samples(graph, &spans(shape, rows), rows);
    }

    /// Lays samples out on the token axis.
    pub(crate) fn set_samples(&mut self, graph: &Graph, spans: &[RowSpan], samples: &[Row]) {
        let mut buffers = self.exec.buffers(&mut self.arena);
        let mut fill = |kind, gap: i32, data: &dyn Fn(&Row) -> Vec<i32>| {
            if let Some(v) = graph.find_value(ValueKind::Input(kind)) {
                let place = buffers.session_i32(v);
                place.fill(gap);
                for (span, row) in spans.iter().zip(samples) {
                    place[span.start..span.start + span.len].copy_from_slice(&data(row));
                }
            }
        };
        fill(InputKind::TokenIds, -1, &|row| row.token_ids.clone());
        fill(InputKind::Targets, -1, &|row| row.targets.clone());
        fill(InputKind::Positions, 0, &|row| (0..row.token_ids.len() as i32).collect());
    }

    /// Everything that a step leaves: losses, scalars, results, exact parameters, states; and sums in
    /// f32, where the plan hands them to the session, as the naive one does.
    pub(crate) fn everything(&mut self, graph: &Graph) -> Vec<(String, Vec<f32>)> {
        let mut buffers = self.exec.buffers(&mut self.arena);
        let mut all = Vec::new();
        for (v, value) in graph.values.iter() {
            let keep = match value.kind {
                ValueKind::Sum(_) | ValueKind::Loss | ValueKind::Result | ValueKind::Scalar => {
                    value.dtype == DType::F32
                }
                ValueKind::Input(_) | ValueKind::Activation | ValueKind::Gradient => false,
            };
            if keep && buffers.has_session(v) {
                all.push((value.name.clone(), buffers.session_f32(v).to_vec()));
            }
        }
        for (p, param) in graph.params.iter() {
            all.push((param.name.clone(), master(&mut buffers, graph, p)));
            for k in f32_states(graph) {
                all.push((format!("state {k} of {}", param.name), buffers.state(p, k).to_vec()));
            }
        }
        all
    }
}

/// The exact values of a parameter.
pub(crate) fn master(buffers: &mut Buffers<'_>, graph: &Graph, p: ParamId) -> Vec<f32> {
    let mut values = vec![0.0; graph.params[p].shape.row_elems() as usize];
    buffers.read_master(p, 0, &mut values);
    values
}

/// The optimizer's states in f32; those in 16 bits belong to the exact values of parameters.
pub(crate) fn f32_states(graph: &Graph) -> impl Iterator<Item = u32> {
    (0..).zip(&graph.states).filter(|(_, s)| s.dtype == DType::F32).map(|(k, _)| k)
}

/// Supervised tokens.
pub(crate) fn n_supervised(rows: &[Row]) -> usize {
    rows.iter().flat_map(|row| &row.targets).filter(|&&t| t >= 0).count()
}

/// Whether an op of that name is in the graph: tests name what they mean to cover.
pub(crate) fn has_op(graph: &Graph, test: impl Fn(&OpKind) -> bool) -> bool {
    graph.ops.values().any(|op| test(&op.kind))
}

/// Steps that a comparison runs.
pub(crate) const N_STEPS: u64 = 3;
pub(crate) const SEED: u64 = 0x1234_5678_9abc;

/// With an epsilon far above rounding, a gradient that is zero but for rounding moves nothing.
pub(crate) const HYPER: Hyper =
    Hyper { lr: 1e-2, beta1: 0.9, beta2: 0.95, eps: 1e-3, weight_decay: 0.1, max_grad_norm: 0.5 };

pub(crate) fn step_inputs(step: u64, grad_scale: f32, rows: &[RowSpan]) -> StepInputs<'_> {
    StepInputs {
        seed: SEED,
        step,
        update: step,
        grad_scale,
        loss_scale: 1.0,
        lr: HYPER.lr as f32,
        hyper: OptimizerHyper {
            beta1: HYPER.beta1 as f32,
            beta2: HYPER.beta2 as f32,
            eps: HYPER.eps as f32,
            weight_decay: HYPER.weight_decay as f32,
        },
        max_grad_norm: HYPER.max_grad_norm as f32,
        rows,
    }
}

/// Tensors by name.
pub(crate) type Tensors = Vec<(String, Vec<f32>)>;

/// Runs a few steps and returns what they leave.
pub(crate) fn run(graph: &Graph, shape: StepShape, mut session: Session) -> Tensors {
    for step in 1..=N_STEPS {
        let rows = rows(shape.n_rows, step);
        let spans = spans(shape, &rows);
        session.set_rows(graph, shape, &rows);
        let grad_scale = 1.0 / n_supervised(&rows) as f32;
        session
            .exec
            .run(&mut session.arena, &step_inputs(step, grad_scale, &spans))
            .expect("finite numbers");
    }
    session.everything(graph)
}

/// Whether two runs left the same bits in every tensor of `a`, with the name of the first difference.
pub(crate) fn assert_same_bits(a: &Tensors, b: &Tensors, what: &str) {
    for (name, a) in a {
        let (_, b) = b.iter().find(|(n, _)| n == name).expect("both runs have it");
        let differs = a.iter().zip(b).position(|(a, b)| a.to_bits() != b.to_bits());
        assert_eq!(differs, None, "{name} under {what}");
    }
}
