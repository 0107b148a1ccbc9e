//! The frontier: every non-dominated plan of a graph, over all micro-batch counts and loop orders.
//!
//! Idea: for each number of micro-batches the chain DP gives a list of (bytes, seconds); adding what
//! is resident (parameters, state, data) and held (gradient sums that outlive a stage) and merging
//! the lists gives one frontier that does not depend on the budget. A budget picks a point: the
//! least-peak plan within 2 % of the fastest if that fits (the *unconstrained* plan), else the
//! fastest that fits. A point fits if both its modelled peak and the height that its placed buffers
//! really reach are within the budget.
//!
//! Because the points do not depend on the budget, the step time never grows with the budget, and the
//! smallest feasible budget is the least need among the lowest of them: that very figure works, less is
//! refused.
//!
//! The two loop orders: *token-major* runs `n` micro-batches through all stages, holding gradient
//! sums; *layer-major* is one micro-batch whose stages run in chunks of tokens, so that weights are
//! streamed once per step and gradients are released exactly even when the chunks are micro-batches.
//!
//! Complexity: one chain DP per divisor of the rows.

use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;

use ounce_ir::{Graph, OpId};
use ounce_program::{BufferRole, Certificate, Choice, LoopOrder, Machine, Plan, StepShape};

use crate::bound::time_bound_s;
use crate::chain::{Action, Chain, Point};
use crate::context::{Context, align};
use crate::emit::{Emitter, peak_load};
use crate::error::PlanError;
use crate::options::{Limits, StageOptions, enumerate, signature};
use crate::place::place;
use crate::report::category_bytes_at_peak;

/// What may be chosen, and how finely.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanOptions {
    /// Forces the number of micro-batches (a divisor of the rows).
    pub micro_batches: Option<u64>,
    /// Forces the loop order.
    pub loop_order: Option<LoopOrder>,
    /// Bytes right after the parameters that the plan must leave alone.
    pub reserved_bytes: u64,
    /// Longest list of the chain DP; fewer plan faster, more plan finer.
    pub max_points: usize,
    /// How often a micro-batch may be halved into chunks.
    pub n_halvings: u32,
    /// What instructions take outside the arena.
    pub instr_bytes: InstrBytes,
    /// How much slower than the fastest plan the unconstrained one may be, in thousandths. Predicted
    /// times are no finer than that, and the last per cent costs a tenth of the memory.
    pub unconstrained_permille: u32,
}

/// What instructions take outside the arena. A plan is unrolled, so that many small micro-batches are many of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InstrBytes {
    /// Most bytes of heap per instruction while a plan is made, before the arena is touched.
    pub planning: u64,
    /// Bytes per instruction of a plan that runs, in its peak.
    pub running: u64,
    /// Instructions that the machine's baseline has room for already, per op of the graph.
    pub n_declared_per_op: u64,
}

impl InstrBytes {
    /// Bytes that a plan of so many instructions takes beside the baseline while it runs.
    pub fn beside_baseline(&self, graph: &Graph, n_instrs: u64) -> u64 {
        let n_declared = self.n_declared_per_op * graph.ops.len() as u64;
        align(self.running * n_instrs.saturating_sub(n_declared))
    }
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            micro_batches: None,
            loop_order: None,
            reserved_bytes: 0,
            max_points: 1024,
            n_halvings: 8,
            instr_bytes: InstrBytes::default(),
            unconstrained_permille: 20,
        }
    }
}

impl PlanOptions {
    /// Coarse and quick, for judging thousands of candidate models: no unrolling, few chunk lengths.
    pub fn coarse() -> Self {
        Self { max_points: 64, n_halvings: 3, micro_batches: Some(1), ..Self::default() }
    }
}

/// One number of micro-batches.
struct Candidate<'a> {
    cx: Context<'a>,
    kinds: Vec<usize>,
    chain: Chain,
    /// Everything that a point's bytes come on top of.
    fixed_bytes: u64,
}

/// A non-dominated plan.
#[derive(Debug, Clone, Copy)]
struct Entry {
    bytes: u64,
    time_s: f64,
    candidate: usize,
    point: usize,
}

/// Every non-dominated plan of a graph for one step shape.
pub struct Frontier<'a> {
    candidates: Vec<Candidate<'a>>,
    /// Ascending bytes, descending seconds.
    entries: Vec<Entry>,
    options: PlanOptions,
    machine: &'a dyn Machine,
    /// Found when it is first asked for.
    smallest: OnceCell<Plan>,
    /// Seconds that no schedule within a budget can beat, by the budget.
    bounds: RefCell<BTreeMap<u64, f64>>,
}

/// Placed buffers reach a little higher than modelled, by how much is known only once they are placed:
/// so many of the plans with the least modelled peaks compete for the smallest budget.
const N_LOWEST: usize = 8;

/// Bytes per op and value of a graph that a number of micro-batches takes beside its lists (measured: 9 MiB for 20
/// numbers of a graph of 24 layers).
const TABLE_BYTES: u64 = 256;

impl<'a> Frontier<'a> {
    /// Solves for all budgets.
    pub fn solve(
        graph: &'a Graph,
        shape: &StepShape,
        machine: &'a dyn Machine,
        options: &PlanOptions,
    ) -> Self {
        let mut candidates = Vec::new();
        for n_micro in micro_batch_counts(graph, shape, options) {
            candidates.push(Candidate::solve(graph, *shape, machine, n_micro, options));
        }
        let planning = options.instr_bytes.planning;
        let entries = merge_candidates(&candidates, machine.baseline_bytes(), planning);
        let (smallest, bounds) = (OnceCell::new(), RefCell::default());
        Self { candidates, entries, options: *options, machine, smallest, bounds }
    }

    /// Lists of points that solving makes: one for each stage of each number of micro-batches, and shorter ones.
    pub fn n_lists(graph: &Graph, shape: &StepShape, options: &PlanOptions) -> u64 {
        let n_candidates = micro_batch_counts(graph, shape, options).len();
        (n_candidates * (graph.stages.len() + 1)) as u64
    }

    /// Bytes of a point of a list.
    pub const POINT_BYTES: u64 = size_of::<Point>() as u64;

    /// Modelled (peak bytes, step seconds) of the plan for a budget, without unrolling it.
    pub fn peak_and_time(&self, budget_bytes: u64) -> Option<(u64, f64)> {
        let entry = self.entries[..self.n_modelled(budget_bytes)].last()?;
        let entry = self.unconstrained().filter(|u| u.bytes <= budget_bytes).unwrap_or(entry);
        Some((entry.bytes, entry.time_s))
    }

    /// (bytes, seconds) of every non-dominated plan, ascending in bytes.
    pub fn points(&self) -> impl Iterator<Item = (u64, f64)> + '_ {
        self.entries.iter().map(|e| (e.bytes, e.time_s))
    }

    /// Seconds that no schedule in any memory can beat, and those of the fastest plan.
    pub fn fastest_s(&self) -> (f64, f64) {
        let fastest_s = self.entries.last().map_or(0.0, |e| e.time_s);
        (up_to_rounding(self.step_bound_s(u64::MAX), fastest_s), fastest_s)
    }

    /// What the smallest budget that works cannot be below, without unrolling a plan.
    pub fn least_modelled_bytes(&self) -> u64 {
        self.entries.first().map_or(0, |entry| entry.bytes)
    }

    /// The smallest budget that works; less is refused.
    pub fn smallest_bytes(&self) -> u64 {
        self.smallest().certificate.peak_bytes
    }

    /// The plan for a budget.
    ///
    /// # Errors
    /// [`PlanError::DoesNotFit`] if the budget is less than the smallest feasible one.
    pub fn plan(&self, budget_bytes: u64) -> Result<Plan, PlanError> {
        // One that cannot fit is not unrolled: its instructions alone may take more than the budget.
        if let Some(entry) = self.unconstrained().filter(|e| e.bytes <= budget_bytes) {
            let plan = self.realize(entry, budget_bytes);
            if need(entry, &plan) <= budget_bytes {
                return Ok(plan);
            }
        }
        let smallest = self.smallest();
        let smallest_bytes = smallest.certificate.peak_bytes;
        if budget_bytes < smallest_bytes {
            let mut dominating = category_bytes_at_peak(smallest);
            dominating.sort_by_key(|&(_, bytes)| std::cmp::Reverse(bytes));
            return Err(PlanError::DoesNotFit { budget_bytes, smallest_bytes, dominating });
        }
        let fits = |entry: &Entry| {
            let plan = self.realize(entry, budget_bytes);
            (need(entry, &plan) <= budget_bytes).then_some(plan)
        };
        let mut modelled = self.entries[..self.n_modelled(budget_bytes)].iter().rev();
        Ok(modelled.find_map(fits).expect("the smallest plan is among them"))
    }

    /// The plan with the least need among the lowest few; its peak is stated as that need.
    fn smallest(&self) -> &Plan {
        self.smallest.get_or_init(|| {
            let mut least: Option<Plan> = None;
            let known = |least: &Option<Plan>| least.as_ref().map(|p| p.certificate.peak_bytes);
            for entry in self.entries.iter().take(N_LOWEST) {
                if known(&least).is_some_and(|bytes| bytes <= entry.bytes) {
                    break;
                }
                let mut plan = self.realize(entry, u64::MAX);
                plan.certificate.peak_bytes = need(entry, &plan);
                if known(&least).is_none_or(|bytes| plan.certificate.peak_bytes < bytes) {
                    least = Some(plan);
                }
            }
            least.expect("a chain has at least one plan")
        })
    }

    /// The entry with the least peak that is as good as the fastest (by default within 2 %).
    fn unconstrained(&self) -> Option<&Entry> {
        let slack = 1.0 + f64::from(self.options.unconstrained_permille) / 1000.0;
        let most_s = self.entries.last()?.time_s * slack;
        self.entries.iter().find(|e| e.time_s <= most_s)
    }

    /// How many entries the model lets into a budget.
    fn n_modelled(&self, budget_bytes: u64) -> usize {
        self.entries.partition_point(|e| e.bytes <= budget_bytes)
    }

    /// Seconds that no schedule of any number of micro-batches can beat within the budget.
    fn step_bound_s(&self, budget_bytes: u64) -> f64 {
        let arena_bytes = budget_bytes.saturating_sub(self.machine.baseline_bytes());
        let of_all = || self.candidates.iter().map(|c| c.step_bound_s(arena_bytes));
        let mut bounds = self.bounds.borrow_mut();
        *bounds.entry(budget_bytes).or_insert_with(|| of_all().fold(f64::INFINITY, f64::min))
    }

    /// Unrolls and places an entry.
    fn realize(&self, entry: &Entry, budget_bytes: u64) -> Plan {
        let candidate = &self.candidates[entry.candidate];
        let cx = &candidate.cx;
        let actions = candidate.chain.actions(entry.point);
        let mut e = Emitter::whole(cx);
        for i in 0..cx.n_micro {
            e.start_micro(i);
            for action in &actions {
                match *action {
                    Action::Forward(pass) => e.forward(pass),
                    Action::Backward(pass) => e.backward(pass),
                }
            }
        }
        e.run_due_updates(&[]);
        assert_eq!(e.n_pending_updates(), 0, "every update op becomes due by the end of the step");
        self.assemble(entry, candidate, e, &actions, budget_bytes)
    }

    fn assemble(
        &self,
        entry: &Entry,
        candidate: &Candidate,
        e: Emitter,
        actions: &[Action],
        budget_bytes: u64,
    ) -> Plan {
        let cx = &candidate.cx;
        let n_instrs = e.instrs.len();
        let (fixed, base) = resident_offsets(&e, self.options.reserved_bytes);
        let load = peak_load(&e.drafts, n_instrs, |d| !d.resident);
        let placement = place(&e.drafts, &fixed, base, load);
        let tables = self.options.instr_bytes.beside_baseline(cx.graph, n_instrs as u64);
        let baseline_bytes = self.machine.baseline_bytes() + tables;
        let certificate = Certificate {
            budget_bytes,
            peak_bytes: baseline_bytes + placement.height,
            max_load_bytes: baseline_bytes + base - align(self.options.reserved_bytes) + load,
            step_s: entry.time_s,
            step_bound_s: up_to_rounding(self.step_bound_s(budget_bytes), entry.time_s),
            unconstrained_step_s: self.entries.last().map_or(entry.time_s, |e| e.time_s),
        };
        let mut plan = Plan {
            shape: cx.shape,
            n_threads: self.machine.n_threads(),
            buffers: ounce_ir::Table::default(),
            choice: choice(cx, actions, e.n_recomputed),
            arena_bytes: placement.height,
            baseline_bytes,
            certificate,
            instrs: e.instrs,
        };
        for (d, offset) in e.drafts.into_iter().zip(placement.offsets) {
            let n = n_instrs as u32;
            let live = if d.resident { 0..n } else { d.first..d.last + 1 };
            let tier = ounce_program::Tier::Host;
            let (role, category, bytes) = (d.role, d.category, d.bytes);
            plan.buffers.push(ounce_program::Buffer { role, category, tier, offset, bytes, live });
        }
        plan
    }
}

/// A bound that is above a time by no more than sums of estimates are rounded counts as that time.
fn up_to_rounding(bound_s: f64, time_s: f64) -> f64 {
    if bound_s <= time_s * (1.0 + 1e-9) { bound_s.min(time_s) } else { bound_s }
}

/// What a budget must hold for this plan: the modelled peak and the real one.
fn need(entry: &Entry, plan: &Plan) -> u64 {
    entry.bytes.max(plan.certificate.peak_bytes)
}

/// Resident buffers one after another: parameters, what is reserved, the rest.
fn resident_offsets(e: &Emitter, reserved_bytes: u64) -> (Vec<u64>, u64) {
    let mut offsets = vec![0; e.drafts.len()];
    let mut end = 0;
    let is_param = |role| matches!(role, BufferRole::Param(_));
    for params in [true, false] {
        for (i, d) in e.drafts.iter().enumerate() {
            if d.resident && is_param(d.role) == params {
                offsets[i] = end;
                end += d.bytes;
            }
        }
        if params {
            end += align(reserved_bytes);
        }
    }
    (offsets, end)
}

impl<'a> Candidate<'a> {
    fn solve(
        graph: &'a Graph,
        shape: StepShape,
        machine: &'a dyn Machine,
        n_micro: u64,
        options: &PlanOptions,
    ) -> Self {
        let cx = Context::new(graph, shape, machine, n_micro);
        let layer_major = options.loop_order == Some(LoopOrder::LayerMajor);
        let chunk_tokens_max = if layer_major { shape.row_stride() } else { u64::MAX };
        let limits = Limits { chunk_tokens_max, n_halvings: options.n_halvings };
        let mut known: BTreeMap<String, usize> = BTreeMap::new();
        let mut by_kind: Vec<StageOptions> = Vec::new();
        let mut kinds = Vec::new();
        for s in 0..cx.n_stages() {
            let kind = *known.entry(signature(&cx, s)).or_insert_with(|| {
                by_kind.push(enumerate(&cx, s, limits));
                by_kind.len() - 1
            });
            kinds.push(kind);
        }
        let chain = Chain::solve(&cx, &kinds, by_kind, options.max_points);
        let fixed_bytes = resident_bytes(&cx, options.reserved_bytes);
        Self { cx, kinds, chain, fixed_bytes }
    }

    /// Bytes of heap that it takes: lists, options, and tables over the graph.
    fn heap_bytes(&self) -> u64 {
        let graph = self.cx.graph;
        self.chain.list_bytes() + TABLE_BYTES * (graph.ops.len() + graph.values.len()) as u64
    }

    /// Bytes and seconds of the step for a point of the chain.
    fn total(&self, bytes: u64, time_s: f64) -> (u64, f64) {
        let cx = &self.cx;
        let (mut held, mut at_end) = (0, 0);
        for v in cx.held_sums() {
            let sum_bytes = cx.value_bytes(v, cx.shape.n_tokens());
            at_end += sum_bytes;
            if cx.held_throughout(v) {
                held += sum_bytes;
            }
        }
        let n = cx.shape.n_tokens();
        let scratch = |&op: &OpId| align(cx.machine.scratch_bytes(cx.graph, op, n));
        at_end += cx.update.iter().map(scratch).max().unwrap_or(0);
        let peak = self.fixed_bytes + (held + bytes).max(at_end);
        (peak, cx.n_micro as f64 * time_s + cx.update_s())
    }

    /// Instructions of a point's plan, at most.
    fn n_instrs_most(&self, point: usize) -> u64 {
        let cx = &self.cx;
        let of_action = |action: &Action| {
            let (Action::Forward(pass) | Action::Backward(pass)) = action;
            let n_ops = match action {
                Action::Forward(_) => cx.forward[pass.stage].len(),
                Action::Backward(_) => cx.forward[pass.stage].len() + cx.backward[pass.stage].len(),
            };
            cx.micro_tokens().div_ceil(pass.chunk_tokens) * n_ops as u64
        };
        let of_micro: u64 = self.chain.actions(point).iter().map(of_action).sum();
        // Beside the ops each gradient sum is set to zero once.
        cx.n_micro * of_micro + (cx.update.len() + cx.graph.values.len()) as u64
    }

    fn step_bound_s(&self, arena_bytes: u64) -> f64 {
        let cx = &self.cx;
        if !cx.trains() {
            return self.chain.points().last().map_or(0.0, |p| p.time_s * cx.n_micro as f64);
        }
        let free = arena_bytes.saturating_sub(self.fixed_bytes);
        let micro_s = time_bound_s(cx, &self.kinds, &self.chain.options, free);
        cx.n_micro as f64 * micro_s + cx.update_s()
    }
}

fn resident_bytes(cx: &Context, reserved_bytes: u64) -> u64 {
    let graph = cx.graph;
    let params: u64 = graph.params.values().map(|p| align(p.bytes())).sum();
    let state = |p| {
        let n = graph.params[p].shape.row_elems();
        graph.states.iter().map(|s| align(s.dtype.bytes(n))).sum::<u64>()
    };
    let states: u64 = cx.trained().map(state).sum();
    let session = graph.values.ids().filter(|&v| cx.is_session(v));
    let session: u64 = session.map(|v| cx.value_bytes(v, cx.shape.n_tokens())).sum();
    params + states + session + align(reserved_bytes)
}

/// Divisors of the rows that the options allow, ascending.
fn micro_batch_counts(graph: &Graph, shape: &StepShape, options: &PlanOptions) -> Vec<u64> {
    let whole = graph.values.values().any(|v| v.shape.lead == ounce_ir::Lead::Selected);
    if whole || options.loop_order == Some(LoopOrder::LayerMajor) {
        return vec![1];
    }
    let rows = shape.n_rows.max(1);
    if let Some(n) = options.micro_batches {
        assert!(n > 0 && rows.is_multiple_of(n), "{n} micro-batches do not divide {rows} rows");
        return vec![n];
    }
    let token_major = options.loop_order == Some(LoopOrder::TokenMajor);
    (1..=rows).filter(|&n| rows.is_multiple_of(n) && !(token_major && n == 1 && rows > 1)).collect()
}

/// One list of non-dominated entries, bytes of the whole process: its peak in the step, or while the plan is made.
fn merge_candidates(
    candidates: &[Candidate],
    baseline_bytes: u64,
    planning_bytes: u64,
) -> Vec<Entry> {
    let lists_bytes: u64 = candidates.iter().map(Candidate::heap_bytes).sum();
    let mut all = Vec::new();
    for (c, candidate) in candidates.iter().enumerate() {
        for (p, point) in candidate.chain.points().iter().enumerate() {
            let (mut bytes, time_s) = candidate.total(point.bytes, point.time_s);
            if planning_bytes > 0 {
                // A plan is unrolled beside the lists that it is chosen from.
                bytes = bytes.max(lists_bytes + planning_bytes * candidate.n_instrs_most(p));
            }
            all.push(Entry { bytes: baseline_bytes + bytes, time_s, candidate: c, point: p });
        }
    }
    all.sort_by(|a, b| a.bytes.cmp(&b.bytes).then(a.time_s.total_cmp(&b.time_s)));
    let mut entries: Vec<Entry> = Vec::new();
    for e in all {
        if entries.last().is_none_or(|l| e.time_s < l.time_s) {
            entries.push(e);
        }
    }
    entries
}

fn choice(cx: &Context, actions: &[Action], n_recomputed: u64) -> Choice {
    let mut n_kept = 0;
    let mut chunked = false;
    let mut head_chunk_tokens = cx.micro_tokens();
    for action in actions {
        let (Action::Forward(pass) | Action::Backward(pass)) = action;
        match action {
            Action::Forward(_) => n_kept += u64::from(pass.keep.count_ones()),
            Action::Backward(_) => chunked |= pass.chunk_tokens < cx.micro_tokens(),
        }
        if pass.stage + 1 == cx.n_stages() {
            head_chunk_tokens = pass.chunk_tokens;
        }
    }
    // The head runs its forward ops once, just before its backward: those are no repetition.
    let head = cx.forward.last().map_or(0, |ops| ops.len() as u64);
    let head_chunks = cx.micro_tokens().div_ceil(head_chunk_tokens) * cx.n_micro;
    let order =
        if cx.n_micro == 1 && chunked { LoopOrder::LayerMajor } else { LoopOrder::TokenMajor };
    Choice {
        loop_order: order,
        n_micro_batches: cx.n_micro,
        head_chunk_tokens,
        release_gradients: cx.trains()
            && cx.n_micro == 1
            && !cx.update.iter().any(|&op| cx.graph.ops[op].kind == ounce_ir::OpKind::ClipScale),
        n_kept: n_kept * cx.n_micro,
        n_recomputed: n_recomputed.saturating_sub(head * head_chunks),
    }
}
