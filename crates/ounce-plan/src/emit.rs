//! From decisions to instructions: the one place where buffers are made.
//!
//! Idea: an [`Emitter`] walks a schedule (run this stage forward, run that stage backward) and
//! writes instructions whose operands are virtual buffers; a buffer lives from its first to its
//! last mention. The same code measures an option of one stage in isolation and unrolls the final
//! plan, so the bytes that the chain DP reasons with are the bytes of the plan.
//!
//! Invariants:
//! 1. `place[v]` is where the current copy of a value is; recomputation makes a new copy.
//! 2. A stage runs in chunks of tokens, ascending; kept values, outputs and gradients of cut values
//!    span the micro-batch, everything else spans its chunk.
//! 3. Backward is lazy: a forward value that was not kept is recomputed just before its first reader.
//! 4. An output takes over the bytes of an input (in-place) only if no later instruction reads that
//!    input and every row of the output lands on the same row of the input.
//! 5. An update op runs as soon as its sums are complete and nothing left in the stage reads the
//!    parameter. With one micro-batch and no clipping this is gradient release.
//!
//! Complexity: linear in the instructions. Source: lazy recomputation as in `[Zhao23]`; the
//! release of gradients into the update as in `[Lv23]` (LOMO), here only where exact.

use std::ops::Range;

use ounce_ir::{EntityId, Lead, OpId, OpKind, ParamId, Phase, ValueId};
use ounce_program::{BufferId, BufferRef, BufferRole, Category, Instr};

use crate::context::{Context, align};

/// A buffer before placement.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    pub(crate) role: BufferRole,
    pub(crate) category: Category,
    pub(crate) bytes: u64,
    /// Lives through the whole step.
    pub(crate) resident: bool,
    /// Was there before the emission began and is accounted for elsewhere.
    pub(crate) external: bool,
    /// First and last instruction that mentions it.
    pub(crate) first: u32,
    pub(crate) last: u32,
}

/// Where the rows of a value are: row `t` at `at + (t - base) * row_bytes` of the buffer.
#[derive(Debug, Clone, Copy)]
struct Location {
    buffer: BufferId,
    at: u64,
    base_token: u64,
}

/// One pass over one stage: which tokens, in chunks of how many, keeping what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pass {
    pub(crate) stage: usize,
    pub(crate) chunk_tokens: u64,
    /// Bit `i` keeps the `i`-th keepable group of the stage.
    pub(crate) keep: u32,
    /// Forward only: whether the stage's input is read again later.
    pub(crate) retain_input: bool,
}

/// Writes instructions over virtual buffers.
pub(crate) struct Emitter<'a> {
    cx: &'a Context<'a>,
    pub(crate) drafts: Vec<Draft>,
    pub(crate) instrs: Vec<Instr>,
    place: Vec<Option<Location>>,
    params: Vec<Option<BufferId>>,
    states: Vec<Vec<BufferId>>,
    /// Contributions still to come, per sum.
    left: Vec<u64>,
    pending_updates: Vec<OpId>,
    /// Whether a sum was completed, or an update held back, since updates were last looked at.
    maybe_due: bool,
    pub(crate) n_recomputed: u64,
    micro: Range<u64>,
    /// Emits only the first two and the last chunk of a pass: enough to measure its peak.
    sampled: bool,
}

impl<'a> Emitter<'a> {
    /// An emitter for a stage in isolation: resident buffers appear when they are mentioned.
    pub(crate) fn isolated(cx: &'a Context<'a>, stage: usize) -> Self {
        Self { sampled: true, ..Self::empty(cx, cx.stage_updates[stage].clone()) }
    }

    fn empty(cx: &'a Context<'a>, pending_updates: Vec<OpId>) -> Self {
        let n_params = cx.graph.params.len();
        Self {
            cx,
            drafts: Vec::new(),
            instrs: Vec::new(),
            place: vec![None; cx.graph.values.len()],
            params: vec![None; n_params],
            states: vec![Vec::new(); n_params],
            left: cx.contributions.clone(),
            pending_updates,
            maybe_due: false,
            n_recomputed: 0,
            micro: cx.micro_range(0),
            sampled: false,
        }
    }

    /// An emitter with all resident buffers in place: parameters, then states, then session data.
    pub(crate) fn whole(cx: &'a Context<'a>) -> Self {
        let mut e = Self::empty(cx, cx.update.clone());
        for p in cx.graph.params.ids() {
            e.param_buffer(p);
        }
        for p in cx.trained() {
            e.state_buffers(p);
        }
        for v in cx.graph.values.ids().filter(|&v| cx.is_session(v)) {
            e.session_location(v);
        }
        e
    }

    fn param_buffer(&mut self, p: ParamId) -> BufferId {
        if let Some(b) = self.params[p.index()] {
            return b;
        }
        let bytes = align(self.cx.graph.params[p].bytes());
        let b = self.push_draft(BufferRole::Param(p), Category::Weights, bytes, true);
        self.params[p.index()] = Some(b);
        b
    }

    fn state_buffers(&mut self, p: ParamId) -> &[BufferId] {
        if self.states[p.index()].is_empty() {
            for (k, state) in self.cx.graph.states.iter().enumerate() {
                let bytes = align(state.dtype.bytes(self.cx.graph.params[p].shape.row_elems()));
                let role = BufferRole::State(p, k as u32);
                let b = self.push_draft(role, Category::OptimizerState, bytes, true);
                self.states[p.index()].push(b);
            }
        }
        &self.states[p.index()]
    }

    fn session_location(&mut self, v: ValueId) -> Location {
        if let Some(at) = self.place[v.index()] {
            return at;
        }
        let bytes = self.cx.value_bytes(v, self.cx.shape.n_tokens());
        let buffer = self.push_draft(BufferRole::Session(v), Category::Data, bytes, true);
        let at = Location { buffer, at: 0, base_token: 0 };
        self.place[v.index()] = Some(at);
        at
    }

    fn push_draft(
        &mut self,
        role: BufferRole,
        category: Category,
        bytes: u64,
        resident: bool,
    ) -> BufferId {
        let first = self.instrs.len() as u32;
        let external = resident;
        let draft = Draft { role, category, bytes, resident, external, first, last: first };
        self.drafts.push(draft);
        BufferId::from_index(self.drafts.len() - 1)
    }

    /// Puts a value in place that was made before: a stage's input or incoming gradient, a held sum.
    pub(crate) fn assume(&mut self, v: ValueId, external: bool) {
        let rows =
            if self.cx.is_sum(v) { self.cx.shape.n_tokens() } else { self.cx.micro_tokens() };
        let base = if self.cx.is_sum(v) { 0 } else { self.micro.start };
        let bytes = self.cx.value_bytes(v, rows);
        let buffer = self.push_draft(BufferRole::Value(v), Category::Working, bytes, false);
        self.drafts[buffer.index()].external = external;
        self.place[v.index()] = Some(Location { buffer, at: 0, base_token: base });
    }

    /// Assumes every held sum that was there before stage `s` ran backward, and that none of them
    /// is ever complete.
    pub(crate) fn assume_held_sums(&mut self, s: usize) {
        for v in self.cx.held_sums() {
            if self.cx.held_throughout(v) || self.cx.starts[v.index()] != Some(s) {
                self.assume(v, true);
                self.left[v.index()] = u64::MAX;
            }
        }
    }

    /// Moves on to the next micro-batch.
    pub(crate) fn start_micro(&mut self, i: u64) {
        self.micro = self.cx.micro_range(i);
    }

    /// Runs a stage forward: its output and what is kept span the micro-batch.
    pub(crate) fn forward(&mut self, pass: Pass) {
        let keep = self.cx.kept(pass.stage, pass.keep);
        let seq = &self.cx.forward[pass.stage];
        let (input, output) = (self.cx.stage(pass.stage).input, self.cx.stage(pass.stage).output);
        for tokens in chunks(&self.micro, pass.chunk_tokens) {
            if self.skips(&tokens) {
                continue;
            }
            for (k, &op) in seq.iter().enumerate() {
                let later = &seq[k + 1..];
                let dies = |cx: &Context, v: ValueId| {
                    let retained = keep.contains(&v)
                        || Some(v) == output
                        || (Some(v) == input && pass.retain_input);
                    !retained && !read_later(cx, later, v)
                };
                let spans = |v: ValueId| keep.contains(&v) || Some(v) == output;
                self.run(op, &tokens, &dies, &spans, Category::Saved);
            }
        }
    }

    /// Runs a stage backward, recomputing what was not kept; then the updates that became due.
    pub(crate) fn backward(&mut self, pass: Pass) {
        let cx = self.cx;
        let keep = cx.kept(pass.stage, pass.keep);
        let seq = backward_sequence(cx, pass.stage, &keep);
        let stage = cx.stage(pass.stage);
        let (input, d_input) = (stage.input, stage.d_input);
        let last_end = self.micro.end;
        for tokens in chunks(&self.micro, pass.chunk_tokens) {
            if self.skips(&tokens) {
                for &v in seq.iter().flat_map(|&op| &cx.graph.ops[op].sums) {
                    self.left[v.index()] -= tokens.end - tokens.start;
                }
                continue;
            }
            for (k, &op) in seq.iter().enumerate() {
                let later = &seq[k + 1..];
                let dies = |cx: &Context, v: ValueId| {
                    Some(v) != input && Some(v) != d_input && !read_later(cx, later, v)
                };
                let spans = |v: ValueId| Some(v) == d_input;
                self.run(op, &tokens, &dies, &spans, Category::Working);
                self.n_recomputed += u64::from(cx.graph.ops[op].phase == Phase::Forward);
                let last = tokens.end == last_end;
                self.run_due_updates(if last { later } else { &seq });
            }
        }
    }

    /// Whether a sampled emission leaves this chunk out.
    fn skips(&self, tokens: &Range<u64>) -> bool {
        let length = tokens.end - tokens.start;
        self.sampled
            && tokens.start >= self.micro.start + 2 * length
            && tokens.end != self.micro.end
    }

    /// Writes one `Run`, with the buffers of its outputs, sums and scratch.
    fn run(
        &mut self,
        id: OpId,
        tokens: &Range<u64>,
        dies: &dyn Fn(&Context, ValueId) -> bool,
        spans: &dyn Fn(ValueId) -> bool,
        span_category: Category,
    ) {
        let cx = self.cx;
        let op = &cx.graph.ops[id];
        let mut operands = Vec::with_capacity(op.inputs.len() + op.outputs.len() + 4);
        for &v in &op.inputs {
            operands.push(self.operand(v, tokens));
        }
        for &u in &op.uses {
            operands.push(self.whole_param(cx.graph.param_of(u)));
        }
        for &v in &op.sums {
            self.begin_sum(v, id);
            operands.push(self.operand(v, tokens));
        }
        for (o, &v) in op.outputs.iter().enumerate() {
            if !cx.is_session(v) {
                self.place_output(id, o, v, tokens, dies, spans(v), span_category);
            }
            operands.push(self.operand(v, tokens));
        }
        self.finish_run(id, tokens.clone(), operands);
        for &v in &op.sums {
            let n = if op.phase == Phase::Update { 1 } else { tokens.end - tokens.start };
            self.left[v.index()] -= n;
            self.maybe_due |= self.left[v.index()] == 0;
        }
        self.maybe_due |= op.phase == Phase::Update;
    }

    /// Appends the updated parameter, its states and scratch, then the instruction itself.
    fn finish_run(&mut self, id: OpId, tokens: Range<u64>, mut operands: Vec<BufferRef>) {
        let cx = self.cx;
        if let Some(p) = cx.graph.ops[id].updates {
            operands.push(self.whole_param(p));
            let n = cx.graph.params[p].shape.row_elems();
            let states = self.state_buffers(p).iter().zip(&cx.graph.states);
            operands.extend(states.map(|(&buffer, state)| BufferRef {
                buffer,
                at: 0,
                bytes: state.dtype.bytes(n),
            }));
        }
        let scratch = cx.machine.scratch_bytes(cx.graph, id, tokens.end - tokens.start);
        if scratch > 0 {
            let role = BufferRole::Scratch(id);
            let buffer = self.push_draft(role, Category::Scratch, align(scratch), false);
            operands.push(BufferRef { buffer, at: 0, bytes: scratch });
        }
        let now = self.instrs.len() as u32;
        for o in &operands {
            self.drafts[o.buffer.index()].last = now;
        }
        self.instrs.push(Instr::Run { op: id, tokens, operands });
    }

    fn whole_param(&mut self, p: ParamId) -> BufferRef {
        let buffer = self.param_buffer(p);
        BufferRef { buffer, at: 0, bytes: self.cx.graph.params[p].bytes() }
    }

    /// The bytes of `v` for `tokens` (all of a fixed or selected one).
    fn operand(&mut self, v: ValueId, tokens: &Range<u64>) -> BufferRef {
        let at = if self.cx.is_session(v) {
            self.session_location(v)
        } else {
            self.place[v.index()].expect("a value is placed before it is read")
        };
        let value = &self.cx.graph.values[v];
        let row = self.cx.row_bytes(v);
        let (skip, n) = match value.shape.lead {
            Lead::Tokens => (tokens.start - at.base_token, tokens.end - tokens.start),
            Lead::Fixed | Lead::Selected => (0, self.cx.shape.n_selected),
        };
        BufferRef { buffer: at.buffer, at: at.at + skip * row, bytes: value.bytes(n) }
    }

    /// Gives an output its bytes: an input's (in-place), the micro-batch's, or the chunk's.
    fn place_output(
        &mut self,
        id: OpId,
        o: usize,
        v: ValueId,
        tokens: &Range<u64>,
        dies: &dyn Fn(&Context, ValueId) -> bool,
        spans: bool,
        span_category: Category,
    ) {
        if spans && tokens.start > self.micro.start {
            return; // Placed at the first chunk.
        }
        let cx = self.cx;
        let op = &cx.graph.ops[id];
        let row = cx.row_bytes(v);
        for (i, out) in cx.graph.in_place(op) {
            let from = op.inputs[i];
            let twice = op.inputs.iter().filter(|&&x| x == from).count() > 1;
            if out != o || twice || cx.is_session(from) || cx.row_bytes(from) != row {
                continue;
            }
            let at = self.place[from.index()].expect("an input is placed");
            let whole = self.drafts[at.buffer.index()].bytes >= align(row * cx.micro_tokens());
            if dies(cx, from) && (!spans || (at.base_token == self.micro.start && whole)) {
                self.place[v.index()] = Some(at);
                if spans {
                    self.drafts[at.buffer.index()].category = span_category;
                }
                return;
            }
        }
        let n = if spans { cx.micro_tokens() } else { tokens.end - tokens.start };
        let base_token = if spans { self.micro.start } else { tokens.start };
        let category = if spans { span_category } else { Category::Working };
        let bytes = cx.value_bytes(v, n);
        let buffer = self.push_draft(BufferRole::Value(v), category, bytes, false);
        self.place[v.index()] = Some(Location { buffer, at: 0, base_token });
    }

    /// Places a sum at its first contribution; a dense one starts from zero.
    fn begin_sum(&mut self, v: ValueId, adder: OpId) {
        if self.place[v.index()].is_some() {
            return;
        }
        let bytes = self.cx.value_bytes(v, self.cx.shape.n_tokens());
        let buffer = self.push_draft(BufferRole::Sum(v), Category::Gradients, bytes, false);
        self.place[v.index()] = Some(Location { buffer, at: 0, base_token: 0 });
        if self.cx.graph.ops[adder].kind != OpKind::EmbedGradRows {
            let bytes = self.cx.graph.values[v].bytes(0);
            self.instrs.push(Instr::Zero { value: v, dst: BufferRef { buffer, at: 0, bytes } });
        }
    }

    /// Runs every update op whose sums are complete and whose parameter nobody in `rest` reads.
    pub(crate) fn run_due_updates(&mut self, rest: &[OpId]) {
        let mut blocked = false;
        let mut i = 0;
        while self.maybe_due && i < self.pending_updates.len() {
            let op = self.pending_updates[i];
            if !self.complete(op) {
                i += 1;
            } else if self.read_by(op, rest) {
                blocked = true;
                i += 1;
            } else {
                self.pending_updates.remove(i);
                let n = self.cx.shape.n_tokens();
                self.run(op, &(0..n), &|_, _| false, &|_| false, Category::Working);
                // What it completes may make an earlier one due.
                i = 0;
                blocked = false;
            }
        }
        self.maybe_due = blocked;
    }

    /// Whether an update op's operands are final.
    fn complete(&self, id: OpId) -> bool {
        let cx = self.cx;
        let op = &cx.graph.ops[id];
        let pending = |v: ValueId| {
            self.pending_updates.iter().any(|&p| p != id && cx.graph.ops[p].outputs.contains(&v))
        };
        let ready = |&v: &ValueId| {
            if cx.is_sum(v) {
                self.left[v.index()] == 0
            } else {
                cx.producer[v.index()].is_none() || !pending(v)
            }
        };
        // A scatter comes after everything else that adds to the sum: only scatters are left.
        let scatters_left = |&v: &ValueId| {
            let mut scatters =
                self.pending_updates.iter().filter(|&&p| cx.graph.ops[p].sums.contains(&v));
            scatters.next() == Some(&id) && self.left[v.index()] == 1 + scatters.count() as u64
        };
        // The norm is taken of the sum that the update reads: in program order.
        let norm_is_taken = || {
            op.updates.is_none()
                || !self
                    .pending_updates
                    .iter()
                    .any(|&p| p < id && cx.graph.ops[p].inputs.first() == op.inputs.first())
        };
        op.inputs.iter().all(ready) && op.sums.iter().all(scatters_left) && norm_is_taken()
    }

    fn read_by(&self, id: OpId, rest: &[OpId]) -> bool {
        let graph = self.cx.graph;
        graph.ops[id].updates.is_some_and(|p| {
            rest.iter().any(|&o| graph.ops[o].uses.iter().any(|&u| graph.param_of(u) == p))
        })
    }

    /// Lets the current copies of these values live through instruction `end`.
    pub(crate) fn extend_lives(&mut self, values: &[ValueId], end: u32) {
        for v in values {
            if let Some(at) = self.place[v.index()] {
                let last = &mut self.drafts[at.buffer.index()].last;
                *last = (*last).max(end);
            }
        }
    }

    /// Update ops that never became due: a bug of the planner.
    pub(crate) fn n_pending_updates(&self) -> usize {
        self.pending_updates.len()
    }
}

/// The token ranges of a micro-batch, cut into chunks.
fn chunks(micro: &Range<u64>, chunk_tokens: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    let (start, end) = (micro.start, micro.end);
    (start..end).step_by(chunk_tokens as usize).map(move |t| t..(t + chunk_tokens).min(end))
}

fn read_later(cx: &Context, later: &[OpId], v: ValueId) -> bool {
    later.iter().any(|&op| cx.graph.ops[op].inputs.contains(&v))
}

/// Backward ops of a stage, each preceded by the forward ops that it makes necessary.
pub(crate) fn backward_sequence(cx: &Context, stage: usize, keep: &[ValueId]) -> Vec<OpId> {
    let mut seq = Vec::new();
    for &op in &cx.backward[stage] {
        for &v in &cx.graph.ops[op].inputs {
            require(cx, stage, keep, v, &mut seq);
        }
        seq.push(op);
    }
    seq
}

/// Appends what must run again so that `v` is there.
fn require(cx: &Context, stage: usize, keep: &[ValueId], v: ValueId, seq: &mut Vec<OpId>) {
    let Some(op) = cx.producer[v.index()] else { return };
    let node = &cx.graph.ops[op];
    let own = node.phase == Phase::Forward && node.stage.map(EntityId::index) == Some(stage);
    if !own || keep.contains(&v) || seq.contains(&op) {
        return;
    }
    for &input in &node.inputs {
        require(cx, stage, keep, input, seq);
    }
    seq.push(op);
}

/// Largest sum of live bytes over the drafts that `counted` selects.
pub(crate) fn peak_load(
    drafts: &[Draft],
    n_instrs: usize,
    counted: impl Fn(&Draft) -> bool,
) -> u64 {
    let mut delta = vec![0_i64; n_instrs + 2];
    for d in drafts.iter().filter(|d| counted(d)) {
        delta[d.first as usize] += d.bytes as i64;
        delta[(d.last as usize + 1).min(n_instrs + 1)] -= d.bytes as i64;
    }
    let mut live = 0;
    let mut peak = 0;
    for d in delta {
        live += d;
        peak = peak.max(live);
    }
    peak as u64
}
