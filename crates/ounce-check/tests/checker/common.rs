//! Small random graphs, and a naive planner that keeps everything.

use std::collections::BTreeMap;

use ounce_ir::{
    AttentionSpec, GeluKind, Graph, GraphBuilder, Lead, OpId, OpKind, OptimizerKind, ParamId,
    Phase, Shape, ValueId, ValueKind, WeightLayout,
};
use ounce_program::{
    Buffer, BufferId, BufferRef, BufferRole, Category, Certificate, Choice, FixedMachine, Instr,
    LoopOrder, Machine, Plan, StepShape, Tag, Tier,
};

/// The machine that all plans of these tests are made for.
pub(crate) fn machine() -> FixedMachine {
    FixedMachine { baseline_bytes: 1 << 20, ..FixedMachine::default() }
}

/// A small generator of choices (SplitMix64, `[Steele14]`), so that every seed is one test case.
pub(crate) struct Choices(pub(crate) u64);

impl Choices {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    pub(crate) fn coin(&mut self) -> bool {
        self.below(2) == 1
    }
    pub(crate) fn one_of<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
}

/// What a model of these tests is like.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "independent choices of a test case")]
pub(crate) struct Model {
    /// Learned positions, layer norm, packed attention, GELU; else RoPE, RMS norm, SwiGLU.
    pub(crate) gpt2: bool,
    pub(crate) n_blocks: u64,
    pub(crate) tied: bool,
    pub(crate) biases: bool,
    pub(crate) dropout: f32,
    /// The embedding is not trained.
    pub(crate) frozen: bool,
}

impl Model {
    pub(crate) fn gpt2() -> Self {
        Self { gpt2: true, n_blocks: 2, tied: true, biases: true, dropout: 0.1, frozen: false }
    }
    pub(crate) fn llama() -> Self {
        let (gpt2, tied, biases, dropout) = (false, false, false, 0.0);
        Self { gpt2, n_blocks: 2, tied, biases, dropout, frozen: false }
    }
    pub(crate) fn random(c: &mut Choices) -> Self {
        let (gpt2, tied, biases, frozen) = (c.coin(), c.coin(), c.coin(), c.below(4) == 0);
        let dropout = c.one_of(&[0.0, 0.1]);
        Self { gpt2, n_blocks: c.below(3), tied, biases, dropout, frozen }
    }

    /// Loss of every token.
    pub(crate) fn evaluation(self) -> Graph {
        Body::new(self).finish(|body, x| {
            let name = if body.model.tied { "wte.weight" } else { "lm_head.weight" };
            let head = body.b.param(name, Shape::fixed(&[V, C]), true);
            body.b.cross_entropy(x, head);
        })
    }

    /// Logits of the selected tokens.
    pub(crate) fn decoding(self) -> Graph {
        Body::new(self).finish(|body, x| {
            let name = if body.model.tied { "wte.weight" } else { "lm_head.weight" };
            let head = body.b.param(name, Shape::fixed(&[V, C]), true);
            let last = body.b.take_rows(x);
            let logits = body.b.linear(last, head, None, WeightLayout::OutIn);
            body.b.result(logits);
        })
    }

    /// A whole step.
    pub(crate) fn training(self, optimizer: OptimizerKind, clip: bool) -> Graph {
        let mut forward = self.evaluation();
        if self.frozen {
            forward.params[ParamId(0)].trainable = false;
        }
        let graph = ounce_passes::differentiate(&forward).expect("the model is differentiable");
        ounce_passes::attach_optimizer(&graph, optimizer, clip).expect("the graph has gradients")
    }
}

const C: u64 = 16;
const V: u64 = 24;

struct Body {
    model: Model,
    b: GraphBuilder,
}

impl Body {
    fn new(model: Model) -> Self {
        Self { model, b: GraphBuilder::new() }
    }

    fn finish(mut self, head: impl FnOnce(&mut Self, ValueId)) -> Graph {
        let mut x = self.embed();
        for i in 0..self.model.n_blocks {
            x = self.attention(i, x);
            x = self.mlp(i, x);
        }
        self.b.stage("head", "head");
        let x = self.norm("ln_f", x);
        head(&mut self, x);
        self.b.finish().expect("the model is well formed")
    }

    fn embed(&mut self) -> ValueId {
        let ids = self.b.input(ounce_ir::InputKind::TokenIds);
        self.b.stage("embed", "embed");
        let wte = self.b.param("wte.weight", Shape::fixed(&[V, C]), true);
        let x = self.b.embed(ids, wte);
        if !self.model.gpt2 {
            return x;
        }
        let positions = self.b.input(ounce_ir::InputKind::Positions);
        let wpe = self.b.param("wpe.weight", Shape::fixed(&[256, C]), true);
        let p = self.b.embed(positions, wpe);
        let x = self.b.add(x, p);
        self.b.dropout(x, self.model.dropout)
    }

    fn norm(&mut self, name: &str, x: ValueId) -> ValueId {
        let w = self.b.param(&format!("{name}.weight"), Shape::fixed(&[C]), false);
        if !self.model.gpt2 {
            return self.b.rms_norm(x, w, 1e-6);
        }
        let bias = self.model.biases;
        let bias = bias.then(|| self.b.param(&format!("{name}.bias"), Shape::fixed(&[C]), false));
        self.b.layer_norm(x, w, bias, 1e-5)
    }

    fn linear(&mut self, name: &str, x: ValueId, k: u64, m: u64) -> ValueId {
        let (layout, dims) = if self.model.gpt2 {
            (WeightLayout::InOut, [k, m])
        } else {
            (WeightLayout::OutIn, [m, k])
        };
        let w = self.b.param(&format!("{name}.weight"), Shape::fixed(&dims), true);
        let bias = self.model.biases;
        let bias = bias.then(|| self.b.param(&format!("{name}.bias"), Shape::fixed(&[m]), false));
        self.b.linear(x, w, bias, layout)
    }

    fn attention(&mut self, i: u64, x: ValueId) -> ValueId {
        self.b.stage(&format!("attn.{i}"), "attn");
        let h = self.norm(&format!("h.{i}.ln_1"), x);
        let n_kv_heads = if self.model.gpt2 { 2 } else { 1 };
        let packed = self.model.gpt2;
        let spec = AttentionSpec {
            n_heads: 2,
            n_kv_heads,
            head_dim: 8,
            scale: 0.35,
            packed,
            window: None,
            soft_cap: None,
        };
        let o = if packed {
            let qkv = self.linear(&format!("h.{i}.c_attn"), h, C, 3 * C);
            self.b.attention(&[qkv], spec)
        } else {
            let table = self.b.rope_table(vec![1.0, 0.1, 0.01, 0.001], 1.0);
            let q = self.linear(&format!("h.{i}.q_proj"), h, C, C);
            let k = self.linear(&format!("h.{i}.k_proj"), h, C, 8);
            let v = self.linear(&format!("h.{i}.v_proj"), h, C, 8);
            let q = self.b.rope(q, table, 2, 8);
            let k = self.b.rope(k, table, 1, 8);
            self.b.attention(&[q, k, v], spec)
        };
        let y = self.linear(&format!("h.{i}.c_proj"), o, C, C);
        let y = self.b.dropout(y, self.model.dropout);
        self.b.add(x, y)
    }

    fn mlp(&mut self, i: u64, x: ValueId) -> ValueId {
        self.b.stage(&format!("mlp.{i}"), "mlp");
        let h = self.norm(&format!("h.{i}.ln_2"), x);
        let h = if self.model.gpt2 {
            let h = self.linear(&format!("h.{i}.c_fc"), h, C, 4 * C);
            self.b.gelu(h, GeluKind::Tanh)
        } else {
            let gate = self.linear(&format!("h.{i}.gate_proj"), h, C, 4 * C);
            let up = self.linear(&format!("h.{i}.up_proj"), h, C, 4 * C);
            self.b.swiglu(gate, up)
        };
        let y = self.linear(&format!("h.{i}.down_proj"), h, 4 * C, C);
        let y = self.b.dropout(y, self.model.dropout);
        self.b.add(x, y)
    }
}

/// How the naive planner plans.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "independent choices of a test case")]
pub(crate) struct Style {
    pub(crate) loop_order: LoopOrder,
    /// Rows per micro-batch.
    pub(crate) rows: u64,
    /// Tokens per run of ops that may be cut inside rows; 0: those of the micro-batch.
    pub(crate) chunk_tokens: u64,
    /// Runs all forward ops of a micro-batch a second time before its backward.
    pub(crate) recompute: bool,
    /// Hands buffers on where an op may work in place and nobody else reads its input.
    pub(crate) in_place: bool,
    /// Sends a forward value to disk and fetches it into another buffer for the backward.
    pub(crate) page: bool,
    /// Lifetimes from first to last use, bytes used again; else all buffers live side by side.
    pub(crate) reuse: bool,
}

impl Style {
    pub(crate) fn plain() -> Self {
        let loop_order = LoopOrder::TokenMajor;
        let (recompute, in_place, page, reuse) = (false, false, false, false);
        Self { loop_order, rows: 1000, chunk_tokens: 0, recompute, in_place, page, reuse }
    }
    pub(crate) fn random(c: &mut Choices) -> Self {
        let loop_order = c.one_of(&[LoopOrder::TokenMajor, LoopOrder::LayerMajor]);
        let (rows, chunk_tokens) = (1 + c.below(3), c.one_of(&[0, 64, 128]));
        let (recompute, in_place, page, reuse) = (c.coin(), c.coin(), c.coin(), c.coin());
        Self { loop_order, rows, chunk_tokens, recompute, in_place, page, reuse }
    }
}

/// A plan that keeps every value of the whole step.
pub(crate) fn plan(graph: &Graph, shape: StepShape, machine: &dyn Machine, style: Style) -> Plan {
    let mut naive = Naive {
        graph,
        shape,
        machine,
        style,
        plan: Plan {
            shape,
            n_threads: machine.n_threads(),
            buffers: ounce_ir::Table::default(),
            instrs: Vec::new(),
            arena_bytes: 0,
            baseline_bytes: machine.baseline_bytes(),
            choice: Choice {
                loop_order: style.loop_order,
                n_micro_batches: 1,
                head_chunk_tokens: 0,
                release_gradients: false,
                n_kept: 0,
                n_recomputed: 0,
            },
            certificate: Certificate {
                budget_bytes: 0,
                peak_bytes: 0,
                max_load_bytes: 0,
                step_s: 1.0,
                step_bound_s: 0.5,
                unconstrained_step_s: 1.0,
            },
        },
        values: BTreeMap::new(),
        paged: None,
        params: Vec::new(),
        states: Vec::new(),
        zeroed: Vec::new(),
        n_tags: 0,
    };
    naive.make_buffers();
    naive.make_instrs();
    naive.place();
    naive.plan
}

struct Naive<'a> {
    graph: &'a Graph,
    shape: StepShape,
    machine: &'a dyn Machine,
    style: Style,
    plan: Plan,
    values: BTreeMap<ValueId, BufferId>,
    /// The value that is paged, its buffer on disk and the one that its backward reads.
    paged: Option<(ValueId, BufferId, BufferId)>,
    params: Vec<BufferId>,
    states: Vec<Vec<BufferId>>,
    zeroed: Vec<ValueId>,
    n_tags: u32,
}

impl Naive<'_> {
    fn buffer(&mut self, role: BufferRole, tier: Tier, bytes: u64) -> BufferId {
        let (category, bytes) = (Category::Working, bytes.next_multiple_of(64));
        self.plan.buffers.push(Buffer { role, category, tier, offset: 0, bytes, live: 0..0 })
    }

    fn value_bytes(&self, v: ValueId) -> u64 {
        let value = &self.graph.values[v];
        let selected = value.shape.lead == Lead::Selected;
        value.bytes(if selected { self.shape.n_selected } else { self.shape.n_tokens() })
    }

    fn make_buffers(&mut self) {
        let graph = self.graph;
        for (p, param) in graph.params.iter() {
            let buffer = self.buffer(BufferRole::Param(p), Tier::Host, param.bytes());
            self.params.push(buffer);
            let trained = graph.ops.values().any(|op| op.updates == Some(p));
            let n_states = if trained { graph.states.len() as u32 } else { 0 };
            let states = (0..n_states)
                .map(|k| self.buffer(BufferRole::State(p, k), Tier::Host, param.bytes()))
                .collect();
            self.states.push(states);
        }
        for op in graph.ops.values() {
            for &v in op.inputs.iter().chain(&op.sums) {
                self.value_buffer(v);
            }
            for (i, &v) in op.outputs.iter().enumerate() {
                self.output_buffer(op.kind, &op.inputs, i, v);
            }
        }
        if self.style.page {
            self.paged = self.choose_paged();
        }
    }

    fn value_buffer(&mut self, v: ValueId) -> BufferId {
        if let Some(&b) = self.values.get(&v) {
            return b;
        }
        let role = match self.graph.values[v].kind {
            ValueKind::Input(_) | ValueKind::Scalar | ValueKind::Loss | ValueKind::Result => {
                BufferRole::Session(v)
            }
            ValueKind::Sum(_) => BufferRole::Sum(v),
            ValueKind::Activation | ValueKind::Gradient => BufferRole::Value(v),
        };
        let b = self.buffer(role, Tier::Host, self.value_bytes(v));
        self.values.insert(v, b);
        b
    }

    fn output_buffer(&mut self, kind: OpKind, inputs: &[ValueId], output: usize, v: ValueId) {
        let transient = |v: ValueId| {
            matches!(self.graph.values[v].kind, ValueKind::Activation | ValueKind::Gradient)
        };
        let n_readers = |v: ValueId| {
            self.graph.ops.values().flat_map(|op| &op.inputs).filter(|&&i| i == v).count()
        };
        let pair = kind.in_place().iter().find(|&&(i, o)| {
            self.graph.values[inputs[i]].dtype == self.graph.values[v].dtype
                && o == output
                && transient(inputs[i])
                && transient(v)
                && n_readers(inputs[i]) == 1
        });
        match pair {
            Some(&(i, _)) if self.style.in_place => {
                let b = self.values[&inputs[i]];
                self.values.insert(v, b);
            }
            _ => {
                self.value_buffer(v);
            }
        }
    }

    /// A forward value with a buffer of its own that a backward op reads.
    fn choose_paged(&mut self) -> Option<(ValueId, BufferId, BufferId)> {
        let backward = self.graph.ops.values().filter(|op| op.phase == Phase::Backward);
        let v = backward.flat_map(|op| &op.inputs).copied().find(|v| {
            let b = self.values[v];
            self.graph.values[*v].kind == ValueKind::Activation
                && self.values.values().filter(|&&other| other == b).count() == 1
        })?;
        let bytes = self.value_bytes(v);
        let disk = self.buffer(BufferRole::Value(v), Tier::Disk, bytes);
        Some((v, disk, self.buffer(BufferRole::Value(v), Tier::Host, bytes)))
    }

    fn make_instrs(&mut self) {
        let selected = |op: OpId| {
            let op = &self.graph.ops[op];
            let lead = |&v: &ValueId| self.graph.values[v].shape.lead == Lead::Selected;
            op.inputs.iter().chain(&op.outputs).any(lead)
        };
        let of = |phase: Phase, rows: bool| -> Vec<OpId> {
            let ops = self.graph.ops.iter().filter(|(_, op)| op.phase == phase);
            ops.map(|(id, _)| id).filter(|&id| selected(id) == rows).collect()
        };
        let (forward, backward) = (of(Phase::Forward, false), of(Phase::Backward, false));
        let (last, update) = (of(Phase::Forward, true), of(Phase::Update, false));
        let n = self.shape.n_tokens();
        let step = (self.style.rows * self.shape.row_stride()).min(n);
        let micro_batches: Vec<_> =
            (0..n).step_by(step as usize).map(|s| s..(s + step).min(n)).collect();
        let forward = if self.style.recompute { [&forward[..]; 2].concat() } else { forward };
        let ops = |ops: &[OpId], naive: &mut Self, tokens: &std::ops::Range<u64>| {
            for &op in ops {
                naive.run(op, tokens.clone());
            }
        };
        if self.style.loop_order == LoopOrder::TokenMajor {
            for tokens in &micro_batches {
                ops(&forward, self, tokens);
                self.page(tokens.clone());
                ops(&backward, self, tokens);
            }
        } else {
            let all_chunks = |some: Vec<OpId>, naive: &mut Self| {
                for op in some {
                    for tokens in &micro_batches {
                        ops(&[op], naive, tokens);
                    }
                }
            };
            all_chunks(forward, self);
            self.page(0..n);
            all_chunks(backward, self);
        }
        for op in last.into_iter().chain(update) {
            self.run_once(op, 0..n);
        }
    }

    fn run(&mut self, id: OpId, tokens: std::ops::Range<u64>) {
        let chunk = self.style.chunk_tokens;
        if chunk == 0 || self.graph.ops[id].kind.needs_whole_rows() {
            return self.run_once(id, tokens);
        }
        for start in tokens.clone().step_by(chunk as usize) {
            self.run_once(id, start..(start + chunk).min(tokens.end));
        }
    }

    fn value_ref(&self, v: ValueId, phase: Phase, tokens: &std::ops::Range<u64>) -> BufferRef {
        let value = &self.graph.values[v];
        let buffer = match self.paged {
            Some((paged, _, back)) if paged == v && phase == Phase::Backward => back,
            _ => self.values[&v],
        };
        if value.shape.lead != Lead::Tokens {
            return BufferRef { buffer, at: 0, bytes: self.value_bytes(v) };
        }
        let bytes = value.bytes(tokens.end - tokens.start);
        BufferRef { buffer, at: value.bytes(tokens.start), bytes }
    }

    fn run_once(&mut self, id: OpId, tokens: std::ops::Range<u64>) {
        let op = &self.graph.ops[id];
        for &v in &op.sums {
            if self.graph.values[v].shape.lead == Lead::Fixed && !self.zeroed.contains(&v) {
                let dst = self.value_ref(v, op.phase, &tokens);
                self.plan.instrs.push(Instr::Zero { value: v, dst });
                self.zeroed.push(v);
            }
        }
        let value = |&v: &ValueId| self.value_ref(v, op.phase, &tokens);
        let param =
            |p: ParamId, buffer| BufferRef { buffer, at: 0, bytes: self.graph.params[p].bytes() };
        let mut operands: Vec<BufferRef> = op.inputs.iter().map(value).collect();
        operands.extend(op.uses.iter().map(|&u| {
            let p = self.graph.param_of(u);
            param(p, self.params[p.0 as usize])
        }));
        operands.extend(op.sums.iter().chain(&op.outputs).map(value));
        if let Some(p) = op.updates {
            operands.push(param(p, self.params[p.0 as usize]));
            operands.extend(self.states[p.0 as usize].iter().map(|&b| param(p, b)));
        }
        let bytes = self.machine.scratch_bytes(self.graph, id, tokens.end - tokens.start);
        if bytes > 0 {
            let buffer = self.buffer(BufferRole::Scratch(id), Tier::Host, bytes);
            operands.push(BufferRef { buffer, at: 0, bytes });
        }
        self.plan.instrs.push(Instr::Run { op: id, tokens, operands });
    }

    /// Sends the chosen value to disk and fetches it again, both for `tokens`.
    fn page(&mut self, tokens: std::ops::Range<u64>) {
        let Some((v, disk, back)) = self.paged else { return };
        let from = self.value_ref(v, Phase::Forward, &tokens);
        let refs = [from, BufferRef { buffer: disk, ..from }, BufferRef { buffer: back, ..from }];
        for pair in refs.windows(2) {
            let tag = Tag(self.n_tags);
            self.n_tags += 1;
            self.plan.instrs.push(Instr::Copy { src: pair[0], dst: pair[1], tag });
            self.plan.instrs.push(Instr::Wait { tag });
        }
    }

    fn place(&mut self) {
        let n = self.plan.instrs.len() as u32;
        let mut used: BTreeMap<BufferId, std::ops::Range<u32>> = BTreeMap::new();
        for (i, instr) in (0..n).zip(&self.plan.instrs) {
            let refs = match instr {
                Instr::Run { operands, .. } => operands.clone(),
                Instr::Zero { dst, .. } => vec![*dst],
                // In flight until the wait, which is the next instruction.
                Instr::Copy { src, dst, .. } => vec![*src, *dst],
                Instr::Wait { .. } => Vec::new(),
            };
            let end = if matches!(instr, Instr::Copy { .. }) { i + 2 } else { i + 1 };
            for r in refs {
                used.entry(r.buffer).or_insert(i..end).end = end;
            }
        }
        let mut change = vec![0_i64; n as usize + 1];
        for id in self.plan.buffers.ids() {
            let b = &self.plan.buffers[id];
            let resident = matches!(
                b.role,
                BufferRole::Param(_) | BufferRole::State(..) | BufferRole::Session(_)
            );
            let whole = resident || !self.style.reuse || !used.contains_key(&id);
            let live = if whole { 0..n } else { used[&id].clone() };
            let offset = if self.style.reuse {
                self.lowest_offset(id, &live)
            } else if b.tier == Tier::Host {
                self.plan.arena_bytes
            } else {
                0
            };
            let b = &mut self.plan.buffers[id];
            (b.offset, b.live) = (offset, live.clone());
            if b.tier == Tier::Host {
                self.plan.arena_bytes = self.plan.arena_bytes.max(offset + b.bytes);
                change[live.start as usize] += b.bytes as i64;
                change[live.end as usize] -= b.bytes as i64;
            }
        }
        let load = change.iter().scan(0, |load, by| {
            *load += by;
            Some(*load as u64)
        });
        let max_load_bytes = load.max().unwrap_or(0) + self.plan.baseline_bytes;
        let peak_bytes = self.plan.arena_bytes + self.plan.baseline_bytes;
        let c = &mut self.plan.certificate;
        c.peak_bytes = peak_bytes;
        c.budget_bytes = peak_bytes + 1000;
        c.max_load_bytes = max_load_bytes;
    }

    /// The lowest place that is free of all earlier buffers during `live`.
    fn lowest_offset(&self, id: BufferId, live: &std::ops::Range<u32>) -> u64 {
        let b = &self.plan.buffers[id];
        let earlier = self.plan.buffers.iter().take(id.0 as usize).filter(|(_, other)| {
            other.tier == b.tier && other.live.start < live.end && live.start < other.live.end
        });
        let mut taken: Vec<_> = earlier.map(|(_, o)| (o.offset, o.offset + o.bytes)).collect();
        taken.sort_unstable();
        let mut offset = 0;
        for (start, end) in taken {
            if start >= offset + b.bytes {
                break;
            }
            offset = offset.max(end);
        }
        offset
    }
}
