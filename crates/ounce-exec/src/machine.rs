//! Costs measured on this machine, and the kernels' own scratch sizes, for a planner.
//!
//! Idea: the time of an op is close to linear in its tokens, so it is measured at two numbers of
//! tokens and drawn through both. That of a product with weights is not where tokens are few (it waits
//! for the weights, whatever it computes meanwhile), so it has two more points. A large problem is
//! measured in part (fewer vocabulary rows, output columns, elements, shorter rows) and scaled by its
//! work. What was measured once is kept in memory
//! and in a file that belongs to this machine. Measuring uses the executor's own dispatch.
//!
//! In a step an op finds its weights and saved values where they were left long ago: in memory, not in
//! a cache. What flows (the activation or gradient that the op before has just written) it finds in
//! the caches as far as it fits. Timed over and over on the same operands, ops bound by memory would
//! look up to twice as fast: on a Xeon with 2 MiB of L2 per core an addition of 4.5 MiB ran at 29 GB/s
//! on the operands of the run before, and at 15 GB/s on others, whether these were 64 MiB or 1.2 GiB
//! ago. So every run has operands of its own, one set after another through the arena; before the
//! first run all of the arena is written, and before a product on operands of which only a few sets
//! fit the rest of it is read. Before each run what flows is written as a product leaves it: every thread some
//! columns of all rows, of which other threads read a part (a GELU of 128 tokens by 3,072 took 0.24 ms
//! in the steps of a Zen 5, and 0.11 ms where every thread found its own rows in its own cache). Where
//! the budget allows less than that, the steps of such a budget live in the caches as well.
//!
//! Invariants: `scratch_bytes` is exactly what dispatch slices. Costs are positive and do not fall
//! with the number of tokens. Measuring touches at most the given bytes, and at most 64 MiB.
//!
//! Disturbances only ever add time, so the lower quartile of the runs counts.
//!
//! Complexity: two to four measurements per distinct op, each a few runs of at most about
//! 6 GFLOP (the head 24) and a pass or more over the arena.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use half::{bf16, f16};
use ounce_ir::{DType, Gate, GeluKind, Graph, Lead, OpId, OpKind, RopeTable, WeightLayout};
use ounce_kernels::attention::RowSpan;
use ounce_kernels::elementwise;
use ounce_kernels::pool::{Pool, split};
use ounce_kernels::tier::tier;
use ounce_kernels::view::ViewMut;
use ounce_program::machine::flop;
use ounce_program::{FixedMachine, GRANULE_TOKENS, Machine, StepShape};

use crate::arena::{Operands, UNIT_BYTES};
use crate::cost_file::{self, Costs};
use crate::dispatch::{Context, dispatch};
use crate::scratch::scratch_bytes;
use crate::spec::{Extent, OpSpec};
use crate::{Arena, OptimizerHyper, StepInputs, TimeClass};

/// Memory that measuring touches at most.
const MAX_TOUCHED_BYTES: u64 = 64 << 20;
/// Work of one measured run at most.
const MAX_FLOP: f64 = 6e9;
/// Tokens of the largest of the points, unless the step is shorter.
const MAX_TOKENS: u64 = 512;
/// The same for the head, which reads and writes as many bytes for a chunk of few tokens as of many,
/// and has only a few runs per step.
const MAX_HEAD_FLOP: f64 = 24e9;
const MAX_HEAD_TOKENS: u64 = 1024;
/// Rows of a table, vocabulary tiles and elements beyond which time only scales.
const MAX_TABLE_ROWS: u64 = 4096;
const MAX_VOCAB: u64 = 8192;
const MAX_WEIGHT_ELEMS: u64 = 8 << 20;
const MAX_UPDATED_ELEMS: u64 = 2 << 20;
/// Time that the runs of one measurement should take together, and a run that is not repeated often.
const TARGET: Duration = Duration::from_millis(16);
const LONG_RUN: Duration = Duration::from_millis(150);
/// So many sets of operands one after another do not meet their own traces in the caches.
const SETS_BEYOND_CACHES: u64 = 8;
/// Runs of one measurement at most, the one that warms up not counted.
const MAX_RUNS: usize = 15;

/// What one measurement measured: attributes, row length, selected tokens, widths, element types,
/// tokens.
type Key = (&'static str, [u64; 17]);

/// A machine whose costs are measured when they are first asked for.
pub struct MeasuredMachine {
    pool: Arc<Pool>,
    arena_limit_bytes: u64,
    baseline_bytes: u64,
    cache_path: Option<PathBuf>,
    state: RefCell<State>,
}

struct State {
    /// Found in this run.
    memo: BTreeMap<Key, f64>,
    /// Found in this run and before, as in the file.
    costs: Costs,
    n_measured: usize,
    arena: Option<Arena>,
}

impl std::fmt::Debug for MeasuredMachine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MeasuredMachine")
            .field("n_threads", &self.pool.n_threads())
            .field("n_measured", &self.n_measured())
            .field("cache_path", &self.cache_path)
            .finish_non_exhaustive()
    }
}

/// What costs depend on besides the op: processor, instruction set, threads, version and build.
pub fn machine_fingerprint(n_threads: usize) -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    // A name such as "AMD EPYC" may be that of several generations, which family and model tell apart.
    let field = |name: &str| {
        let of = |line: &'_ str| {
            Some(line.strip_prefix(name)?.trim_start().strip_prefix(':')?.trim().to_owned())
        };
        cpuinfo.lines().find_map(of)
    };
    let name = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let generation = [field("cpu family"), field("model")].map(Option::unwrap_or_default).join(".");
    let build = if cfg!(debug_assertions) { "checked" } else { "optimised" };
    let version = env!("CARGO_PKG_VERSION");
    format!("{name} {generation}, {}, {n_threads} threads, {version}, {build}", tier())
}

impl MeasuredMachine {
    /// A machine that runs kernels on `pool`.
    ///
    /// `arena_limit_bytes`: what measuring may touch; released by [`MeasuredMachine::release_memory`]
    /// or with the machine. `baseline_bytes`: declared bytes of the process outside the arena.
    /// `cache_path`: the file of earlier measurements; written by [`MeasuredMachine::save`].
    pub fn new(
        pool: Arc<Pool>,
        arena_limit_bytes: u64,
        baseline_bytes: u64,
        cache_path: Option<PathBuf>,
    ) -> Self {
        let fingerprint = machine_fingerprint(pool.n_threads());
        let costs = cache_path.as_deref().map(|p| cost_file::load(p, &fingerprint));
        let costs = costs.unwrap_or_default();
        let state = State { memo: BTreeMap::new(), costs, n_measured: 0, arena: None };
        let state = RefCell::new(state);
        Self { pool, arena_limit_bytes, baseline_bytes, cache_path, state }
    }

    /// Measurements taken so far, those from the file not counted.
    pub fn n_measured(&self) -> usize {
        self.state.borrow().n_measured
    }

    /// Writes the file, if there is one and something new was measured.
    ///
    /// # Errors
    /// What the file system said. Losing the file only costs measuring again.
    pub fn save(&self) -> std::io::Result<()> {
        let state = self.state.borrow();
        match &self.cache_path {
            Some(path) if state.n_measured > 0 => {
                let fingerprint = machine_fingerprint(self.pool.n_threads());
                cost_file::save(path, &fingerprint, &state.costs)
            }
            _ => Ok(()),
        }
    }

    /// Gives back the memory that measuring touched.
    pub fn release_memory(&self) {
        self.state.borrow_mut().arena = None;
    }

    /// Seconds of one run of the problem on `n_tokens` tokens; `None` if it does not fit.
    fn point(&self, problem: &Problem, tables: &[RopeTable], n_tokens: u64) -> Option<f64> {
        let key = problem.key(tables, n_tokens);
        let mut state = self.state.borrow_mut();
        if let Some(&seconds) = state.memo.get(&key) {
            return Some(seconds);
        }
        let text = key_text(&key);
        let seconds = if let Some(&seconds) = state.costs.get(&text) {
            seconds
        } else {
            let bytes = problem.bytes(n_tokens, self.pool.n_threads());
            if bytes > self.limit_bytes() {
                return None;
            }
            if state.arena.is_none() {
                state.arena = Arena::reserve(self.limit_bytes()).ok();
            }
            let seconds = measure(state.arena.as_mut()?, &self.pool, problem, tables, n_tokens);
            state.n_measured += 1;
            state.costs.insert(text, seconds);
            seconds
        };
        state.memo.insert(key, seconds);
        Some(seconds)
    }

    /// A power of two, so that budgets which differ a little share their measurements.
    fn limit_bytes(&self) -> u64 {
        let limit = self.arena_limit_bytes.min(MAX_TOUCHED_BYTES);
        if limit == 0 { 0 } else { 1 << limit.ilog2() }
    }

    /// The largest of the points: as large as tokens, memory and patience allow.
    fn last_point(&self, problem: &Problem, flop_per_token: f64) -> u64 {
        let unit = problem.unit_tokens;
        let is_head = TimeClass::of(&problem.spec.kind) == TimeClass::Head;
        let (most_flop, most_tokens) =
            if is_head { (MAX_HEAD_FLOP, MAX_HEAD_TOKENS) } else { (MAX_FLOP, MAX_TOKENS) };
        let fits = |n: u64| {
            n as f64 * flop_per_token <= most_flop
                && problem.bytes(n, self.pool.n_threads()) <= self.limit_bytes()
        };
        let n_most = problem.n_tokens_max.min(most_tokens.max(unit)) / unit;
        (2..=n_most).rev().map(|n| n * unit).find(|&n| fits(n)).unwrap_or(unit)
    }
}

impl Machine for MeasuredMachine {
    fn n_threads(&self) -> u32 {
        self.pool.n_threads() as u32
    }

    fn scratch_bytes(&self, graph: &Graph, op: OpId, n_tokens: u64) -> u64 {
        scratch_bytes(&OpSpec::new(graph, &graph.ops[op]), n_tokens, self.pool.n_threads())
    }

    fn cost_s(&self, graph: &Graph, op: OpId, shape: &StepShape, n_tokens: u64) -> f64 {
        let problem = Problem::new(graph, op, shape, self.limit_bytes(), self.pool.n_threads());
        let tables: Vec<RopeTable> = match problem.spec.kind {
            OpKind::Rope { .. } => graph.rope_tables.values().cloned().collect(),
            _ => Vec::new(),
        };
        let n = n_tokens as f64 * problem.tokens_ratio;
        let unit = problem.unit_tokens;
        let Some(first_s) = self.point(&problem, &tables, unit) else {
            // Too large to be measured here at all: the work at a nominal speed.
            return FixedMachine::default().cost_s(graph, op, shape, n_tokens);
        };
        if problem.is_constant {
            return first_s * problem.factor;
        }
        let flop_per_token = problem.flop_per_token(graph, op, shape);
        let last = self.last_point(&problem, flop_per_token);
        let between = [2 * unit, 4 * unit];
        let n_between = if problem.waits_for_weights() { between.len() } else { 0 };
        let mut points = [(unit as f64, first_s); 4];
        let mut n_points = 1;
        for n_tokens in between[..n_between].iter().copied().filter(|&n| n < last).chain([last]) {
            if let Some(seconds) = self.point(&problem, &tables, n_tokens) {
                points[n_points] = (n_tokens as f64, seconds);
                n_points += 1;
            }
        }
        problem.factor * curve(&mut points[..n_points], n)
    }

    fn baseline_bytes(&self) -> u64 {
        self.baseline_bytes
    }
}

/// Seconds at `n` tokens on the lines through measured points, ascending in tokens.
///
/// A disturbed measurement may make a point too slow. It then counts as the one after it, and beyond
/// the last at least half of its time is taken to grow with the tokens.
fn curve(points: &mut [(f64, f64)], n: f64) -> f64 {
    for i in (1..points.len()).rev() {
        points[i - 1].1 = points[i - 1].1.min(points[i].1);
    }
    let (first, last) = (points[0], points[points.len() - 1]);
    if n <= first.0 {
        return first.1 * (n / first.0).max(1e-3);
    }
    let slope = |a: (f64, f64), b: (f64, f64)| (b.1 - a.1) / (b.0 - a.0).max(1.0);
    if let Some(pair) = points.windows(2).find(|pair| n <= pair[1].0) {
        return pair[0].1 + slope(pair[0], pair[1]) * (n - pair[0].0);
    }
    let measured = points.windows(2).last().map_or(0.0, |pair| slope(pair[0], pair[1]));
    let beyond = if last.0 > first.0 { 0.5 } else { 1.0 };
    last.1 + measured.max(beyond * last.1 / last.0) * (n - last.0)
}

/// An op as it is measured: cut to a size where time only scales.
struct Problem {
    spec: OpSpec,
    /// Tokens of a row as measured, for ops that mix them; 0 otherwise.
    row_tokens: u64,
    n_selected: u64,
    /// Tokens of the smaller point, and what the larger is a multiple of.
    unit_tokens: u64,
    /// Tokens of the step, as measured.
    n_tokens_max: u64,
    /// Measured tokens per token of the step.
    tokens_ratio: f64,
    /// What a measured time is multiplied with.
    factor: f64,
    /// Whether the time does not depend on the number of tokens.
    is_constant: bool,
}

impl Problem {
    /// The op cut so far that its smaller point fits into `limit_bytes`, if cutting can do that.
    fn new(graph: &Graph, op: OpId, shape: &StepShape, limit_bytes: u64, n_threads: usize) -> Self {
        let mut part_bytes = limit_bytes;
        loop {
            let problem = Self::cut(graph, op, shape, part_bytes);
            let fits = problem.bytes(problem.unit_tokens, n_threads) <= limit_bytes;
            if fits || part_bytes < 1 << 20 {
                return problem;
            }
            // The scratch of products does not shrink with them: what is left is less.
            part_bytes /= 2;
        }
    }

    /// The op with weights, sums and states of at most half of `limit_bytes`.
    fn cut(graph: &Graph, op: OpId, shape: &StepShape, limit_bytes: u64) -> Self {
        let mut spec = OpSpec::new(graph, &graph.ops[op]);
        let factor = shrink(&mut spec, limit_bytes);
        let is_constant = spec.is_selected() || spec.operands.iter().all(|o| o.lead == Lead::Fixed);
        let n_selected = if spec.is_selected() { shape.n_selected.max(1) } else { 0 };
        let mut problem = Self {
            spec,
            row_tokens: 0,
            n_selected,
            unit_tokens: GRANULE_TOKENS.max(n_selected),
            n_tokens_max: shape.n_tokens(),
            tokens_ratio: 1.0,
            factor,
            is_constant,
        };
        if let OpKind::Attention(a) | OpKind::AttentionGrad(a) = problem.spec.kind {
            // Work grows with the square of the row: a long one is measured shorter.
            let longest = (MAX_FLOP / (5.0 * a.q_width() as f64)).sqrt() as u64;
            let row_tokens = shape.row_tokens.min(longest.next_multiple_of(GRANULE_TOKENS));
            let measured = StepShape { row_tokens, ..*shape };
            problem.row_tokens = row_tokens;
            problem.unit_tokens = measured.row_stride();
            problem.n_tokens_max = measured.n_tokens();
            problem.tokens_ratio = measured.row_stride() as f64 / shape.row_stride() as f64;
            let of_row = |shape: &StepShape| flop(graph, op, shape, shape.row_tokens);
            problem.factor = of_row(shape) / of_row(&measured);
        }
        problem
    }

    /// Work per measured token.
    fn flop_per_token(&self, graph: &Graph, op: OpId, shape: &StepShape) -> f64 {
        let measured = if self.row_tokens > 0 {
            StepShape { row_tokens: self.row_tokens, ..*shape }
        } else {
            *shape
        };
        let whole = flop(graph, op, &measured, self.unit_tokens) / self.unit_tokens as f64;
        if self.row_tokens > 0 { whole } else { whole / self.factor }
    }

    /// Whether the op is a product whose weights take as long to fetch as a few tokens to compute.
    fn waits_for_weights(&self) -> bool {
        matches!(TimeClass::of(&self.spec.kind), TimeClass::Linear | TimeClass::Head)
    }

    fn extent(&self, n_tokens: u64) -> Extent {
        Extent { n_tokens, n_selected: self.n_selected }
    }

    /// Offsets of operands and scratch one after another, and the bytes of all. What may be written in
    /// the place of what flows is, as in plans.
    fn layout(&self, n_tokens: u64, n_threads: usize) -> (Vec<u32>, u64) {
        let spec = &self.spec;
        let scratch = scratch_bytes(spec, n_tokens, n_threads);
        let sizes = spec.operands.iter().map(|o| o.bytes(self.extent(n_tokens)));
        let mut end = 0;
        let mut offsets: Vec<u32> = Vec::new();
        for (i, bytes) in sizes.chain((scratch > 0).then_some(scratch)).enumerate() {
            if let Some(input) = self.handed_on(i) {
                offsets.push(offsets[input]);
                continue;
            }
            offsets.push((end / UNIT_BYTES) as u32);
            end += bytes.next_multiple_of(UNIT_BYTES);
        }
        (offsets, end)
    }

    /// The input whose place operand `i` takes.
    fn handed_on(&self, i: usize) -> Option<usize> {
        let spec = &self.spec;
        let (input, output) = (spec.flowing_input()?, i.checked_sub(spec.first_output())?);
        let alike = || spec.operands.get(i).is_some_and(|o| *o == spec.operands[input]);
        (spec.kind.in_place().contains(&(input, output)) && alike()).then_some(input)
    }

    fn bytes(&self, n_tokens: u64, n_threads: usize) -> u64 {
        self.layout(n_tokens, n_threads).1
    }

    fn key(&self, tables: &[RopeTable], n_tokens: u64) -> Key {
        let mut numbers = [0; 17];
        numbers[..4].copy_from_slice(&attributes(&self.spec.kind, tables));
        numbers[4] = self.row_tokens;
        numbers[5] = self.n_selected;
        for (number, operand) in numbers[6..15].iter_mut().zip(&self.spec.operands) {
            *number = operand.row_elems;
        }
        for (i, operand) in self.spec.operands.iter().take(15).enumerate() {
            numbers[15] |= (operand.dtype as u64) << (4 * i);
        }
        numbers[16] = n_tokens;
        (self.spec.kind.name(), numbers)
    }

    /// The number that ids, targets and selected rows stay below.
    fn n_ids(&self) -> u64 {
        let width = |i: usize| self.spec.operands[i].row_elems;
        match self.spec.kind {
            OpKind::Embed => width(1) / width(2),
            OpKind::EmbedScatter => width(2) / width(1),
            OpKind::CrossEntropy { .. } | OpKind::CrossEntropyTrain { .. } => width(2) / width(0),
            _ => GRANULE_TOKENS,
        }
    }
}

/// Cuts the dimensions along which time only scales, also so that weights, sums and states take at
/// most half of `limit_bytes`; returns what to multiply times with.
fn shrink(spec: &mut OpSpec, limit_bytes: u64) -> f64 {
    let (n_reads, first_output) = (spec.n_reads(), spec.first_output());
    // Elements that each of `n` large f32 operands may have.
    let share = |n: usize| limit_bytes / 2 / 4 / n as u64;
    let columns_max = |k: u64| (share(1).min(MAX_WEIGHT_ELEMS) / k.max(1)).max(64) / 64 * 64;
    let operands = &mut spec.operands;
    let cut = |whole: u64, most: u64| (whole.min(most), whole as f64 / whole.min(most) as f64);
    match spec.kind {
        OpKind::Embed | OpKind::EmbedScatter => {
            let (rows, table) = if spec.kind == OpKind::Embed { (2, 1) } else { (1, 2) };
            let n_channels = operands[rows].row_elems;
            let most_rows = (share(1) / n_channels).max(GRANULE_TOKENS);
            let (n_rows, _) =
                cut(operands[table].row_elems / n_channels, MAX_TABLE_ROWS.min(most_rows));
            operands[table].row_elems = n_rows * n_channels;
            1.0
        }
        OpKind::CrossEntropy { .. } | OpKind::CrossEntropyTrain { .. } => {
            let n_channels = operands[0].row_elems;
            // The weight, its sum if there is one, and the logits.
            let most = share(first_output - 2) / (n_channels + GRANULE_TOKENS);
            let n_vocab = operands[2].row_elems / n_channels;
            let (n_vocab, factor) = cut(n_vocab, MAX_VOCAB.min(most).max(GRANULE_TOKENS));
            for operand in &mut operands[2..first_output] {
                operand.row_elems = n_vocab * n_channels;
            }
            factor
        }
        OpKind::SumSquares | OpKind::AdamW | OpKind::Sgd => {
            let most = MAX_UPDATED_ELEMS.min(share(operands.len())).max(GRANULE_TOKENS);
            let (n_elems, factor) = cut(operands[0].row_elems, most);
            operands[0].row_elems = n_elems;
            if spec.kind != OpKind::SumSquares {
                for operand in &mut operands[n_reads..] {
                    operand.row_elems = n_elems;
                }
            }
            factor
        }
        OpKind::Linear { bias, .. } => {
            let last = operands.len() - 1;
            let (k, m) = (operands[0].row_elems, operands[last].row_elems);
            let (m, factor) = cut(m, columns_max(k));
            operands[1].row_elems = k * m;
            operands[last].row_elems = m;
            if bias {
                operands[2].row_elems = m;
            }
            factor
        }
        OpKind::LinearGradInput { .. } => {
            let (m, k) = (operands[0].row_elems, operands[2].row_elems);
            let (m, factor) = cut(m, columns_max(k));
            operands[0].row_elems = m;
            operands[1].row_elems = k * m;
            factor
        }
        OpKind::LinearGradWeight { .. } => {
            let (k, m) = (operands[0].row_elems, operands[1].row_elems);
            let (m, factor) = cut(m, columns_max(k));
            operands[1].row_elems = m;
            operands[2].row_elems = k * m;
            factor
        }
        OpKind::LayerNorm { .. }
        | OpKind::RmsNorm { .. }
        | OpKind::Rope { .. }
        | OpKind::Attention(_)
        | OpKind::Gelu(_)
        | OpKind::Glu { .. }
        | OpKind::Add
        | OpKind::Scale { .. }
        | OpKind::SoftCap { .. }
        | OpKind::Dropout { .. }
        | OpKind::TakeRows
        | OpKind::BiasGrad
        | OpKind::LayerNormGrad { .. }
        | OpKind::RmsNormGrad { .. }
        | OpKind::AttentionGrad(_)
        | OpKind::GeluGrad(_)
        | OpKind::GluGrad { .. }
        | OpKind::SoftCapGrad { .. }
        | OpKind::EmbedGradRows
        | OpKind::ClipScale => 1.0,
    }
}

/// Attributes on which time depends.
fn attributes(kind: &OpKind, tables: &[RopeTable]) -> [u64; 4] {
    let layout = |l: WeightLayout| u64::from(l == WeightLayout::InOut);
    match *kind {
        OpKind::Linear { layout: l, bias } => [layout(l), u64::from(bias), 0, 0],
        OpKind::LinearGradInput { layout: l } | OpKind::LinearGradWeight { layout: l } => {
            [layout(l), 0, 0, 0]
        }
        OpKind::Rope { table, n_heads, head_dim, inverse } => {
            let n_pairs = tables[table.0 as usize].inv_freq.len() as u64;
            [n_pairs, u64::from(n_heads), u64::from(head_dim), u64::from(inverse)]
        }
        OpKind::Attention(a) | OpKind::AttentionGrad(a) => {
            let (h, k, d) = (a.n_heads, a.n_kv_heads, a.head_dim);
            // Three facts in one number: packed or not, capped or not, and the window.
            let layout = u64::from(a.packed) + 2 * u64::from(a.soft_cap.is_some());
            let window = a.window.map_or(0, u64::from);
            [u64::from(h), u64::from(k), u64::from(d), layout + 4 * window]
        }
        OpKind::Gelu(g) | OpKind::GeluGrad(g) => [u64::from(g == GeluKind::Erf), 0, 0, 0],
        OpKind::Glu { gate, packed } | OpKind::GluGrad { gate, packed } => {
            let gate = match gate {
                Gate::Silu => 0,
                Gate::Gelu(GeluKind::Tanh) => 1,
                Gate::Gelu(GeluKind::Erf) => 2,
            };
            [gate, u64::from(packed), 0, 0]
        }
        OpKind::CrossEntropy { soft_cap } | OpKind::CrossEntropyTrain { soft_cap } => {
            [u64::from(soft_cap.is_some()), 0, 0, 0]
        }
        _ => [0; 4],
    }
}

fn key_text((name, numbers): &Key) -> String {
    let mut text = (*name).to_owned();
    for number in numbers {
        write!(text, " {number}").expect("writing to a string succeeds");
    }
    text
}

/// Seconds of one run: the lower quartile of a few, each on operands of its own.
fn measure(
    arena: &mut Arena,
    pool: &Pool,
    problem: &Problem,
    tables: &[RopeTable],
    n_tokens: u64,
) -> f64 {
    let spec = &problem.spec;
    let (offsets, set_bytes) = problem.layout(n_tokens, pool.n_threads());
    let set_bytes = set_bytes.max(UNIT_BYTES);
    let n_sets = (arena.bytes() / set_bytes).clamp(1, MAX_RUNS as u64 + 1);
    fill(arena, problem, &offsets, n_tokens);
    // The other sets are copies; what is left is written to, so that nothing of them stays cached.
    let words = arena.slice_mut::<u64>(0, arena.bytes() / 8);
    let (sets, rest) = words.split_at_mut((n_sets * set_bytes / 8) as usize);
    for set in 1..n_sets {
        sets.copy_within(..(set_bytes / 8) as usize, (set * set_bytes / 8) as usize);
    }
    rest.fill(0);
    let n_rows = n_tokens / problem.unit_tokens;
    let rows: Vec<RowSpan> = (0..n_rows)
        .map(|i| (i * problem.unit_tokens) as usize)
        .map(|start| RowSpan { start, len: problem.row_tokens as usize })
        .collect();
    let hyper = OptimizerHyper::default();
    let inputs = StepInputs {
        grad_scale: 1e-3,
        lr: 1e-6,
        hyper,
        max_grad_norm: 1.0,
        ..StepInputs::forward(&rows)
    };
    let cx = Context {
        pool,
        rope_tables: tables,
        inputs: &inputs,
        first_token: 0,
        n_tokens: n_tokens as u32,
        rows: &rows,
    };
    let extent = problem.extent(n_tokens);
    let scratch = scratch_bytes(spec, n_tokens, pool.n_threads());
    let mut run = |i: u64| {
        let first = i % n_sets * set_bytes / UNIT_BYTES;
        let offsets: Vec<u32> = offsets.iter().map(|at| at + first as u32).collect();
        if problem.waits_for_weights() && n_sets < SETS_BEYOND_CACHES {
            let own = (i % n_sets * set_bytes / 8) as usize..;
            let own = own.start..own.start + (set_bytes / 8) as usize;
            sweep(pool, arena.slice_mut(0, arena.bytes() / 8), own);
        }
        if let Some(operand) = spec.flowing_input() {
            let flows = &spec.operands[operand];
            let n_words = flows.bytes(extent) / 8;
            let row_words = spec.operands[operand].dtype.bytes(flows.row_elems) / 8;
            hand_over(pool, arena.slice_mut(offsets[operand], n_words), row_words as usize);
        }
        let start = Instant::now();
        let operands = Operands::new(arena, spec, &offsets, extent, scratch);
        dispatch(spec, operands, &cx);
        if spec.is_update() {
            // The next step sets the sum to zero; no other op's cost could say so.
            let dw = &spec.operands[0];
            let dw = arena.slice_mut::<f32>(offsets[0], dw.elems(extent));
            elementwise::zero(pool, ViewMut::F32(dw));
        }
        start.elapsed()
    };
    let warm_up = run(0);
    let n_runs = match TARGET.as_nanos() / warm_up.as_nanos().max(1) {
        _ if warm_up > LONG_RUN => 1,
        n => n.clamp(6, MAX_RUNS as u128) as u64,
    };
    let mut times: Vec<Duration> = (1..=n_runs).map(&mut run).collect();
    times.sort_unstable();
    // A clock of coarse steps may show none; costs are positive.
    times[times.len() / 4].as_secs_f64().max(1e-9)
}

/// Reads every cache line of `words` outside `own`, so that what caches hold is of that.
fn sweep(pool: &Pool, words: &mut [u64], own: Range<usize>) {
    let words = &*words;
    pool.run(&|thread_idx| {
        for part in [&words[..own.start], &words[own.end..]] {
            let range = split(part.len(), pool.n_threads(), thread_idx);
            let lines = part[range].iter().step_by(UNIT_BYTES as usize / 8);
            std::hint::black_box(lines.fold(0, |sum: u64, &word| sum.wrapping_add(word)));
        }
    });
}

/// Writes what is there, as the threads of a product do: each its columns of all rows.
fn hand_over(pool: &Pool, words: &mut [u64], row_words: usize) {
    // SAFETY: an atomic word has the size and alignment of a word, and the words are exclusively ours.
    let words = unsafe { &*(std::ptr::from_mut(words) as *const [AtomicU64]) };
    pool.run(&|thread_idx| {
        let own = split(row_words, pool.n_threads(), thread_idx);
        for row in words.chunks_exact(row_words.max(1)) {
            for word in &row[own.clone()] {
                word.store(word.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
    });
}

/// Fills the operands with ordinary numbers: no denormals, ids in range.
fn fill(arena: &mut Arena, problem: &Problem, offsets: &[u32], n_tokens: u64) {
    let n_ids = problem.n_ids().max(1);
    for (operand, &at) in problem.spec.operands.iter().zip(offsets) {
        let bytes = operand.bytes(problem.extent(n_tokens));
        match operand.dtype {
            DType::F64 => arena.slice_mut::<f64>(at, bytes / 8).fill(1.0),
            DType::I32 => {
                for (i, x) in arena.slice_mut::<i32>(at, bytes / 4).iter_mut().enumerate() {
                    *x = (i as u64 * 7919 % n_ids) as i32;
                }
            }
            DType::I16 => fill_with(arena.slice_mut(at, bytes / 2), |x| (x * 65536.0) as i16),
            DType::Bf16 => fill_with(arena.slice_mut(at, bytes / 2), bf16::from_f32_const),
            DType::F16 => fill_with(arena.slice_mut(at, bytes / 2), f16::from_f32_const),
            // Quantized types have no kernels and so never get here.
            _ => fill_with(arena.slice_mut(at, bytes / 4), |x| x),
        }
    }
}

/// Numbers between 0.25 and 0.75, unlike their neighbours.
fn fill_with<T>(dst: &mut [T], convert: impl Fn(f32) -> T) {
    for (i, x) in dst.iter_mut().enumerate() {
        let noise = (i as u32).wrapping_mul(0x9E37_79B9) >> 9;
        *x = convert(f32::from_bits(0x3F00_0000 | noise) - 0.25);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_follow_the_line_through_both_points() {
        let at = |n| curve(&mut [(64.0, 2.0), (512.0, 9.0)], n);
        assert_eq!([at(64.0), at(288.0), at(512.0)], [2.0, 5.5, 9.0]);
        assert_eq!(at(960.0), 16.0);
        assert_eq!(at(32.0), 1.0);
    }

    #[test]
    fn a_third_point_bends_the_line() {
        let at = |n| curve(&mut [(64.0, 4.0), (128.0, 5.0), (512.0, 17.0)], n);
        assert_eq!(
            [at(64.0), at(96.0), at(128.0), at(320.0), at(512.0)],
            [4.0, 4.5, 5.0, 11.0, 17.0]
        );
        assert_eq!(at(1024.0), 33.0, "beyond the last point by the slope before it");
    }

    #[test]
    fn a_disturbed_first_point_does_not_make_more_tokens_free() {
        let at = |n| curve(&mut [(64.0, 8.0), (512.0, 4.0)], n);
        assert_eq!([at(64.0), at(512.0)], [4.0, 4.0]);
        assert_eq!(at(1024.0), 6.0);
    }

    #[test]
    fn one_point_scales_with_tokens() {
        let at = |n| curve(&mut [(1024.0, 3.0), (1024.0, 3.0)], n);
        assert_eq!([at(512.0), at(1024.0), at(4096.0)], [1.5, 3.0, 12.0]);
    }
}
