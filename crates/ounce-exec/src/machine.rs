//! Costs measured on this machine, and the kernels' own scratch sizes, for a planner.
//!
//! Idea: the time of an op is close to linear in its tokens, so it is measured at two numbers of
//! tokens and drawn through both. That of a product with weights is not where tokens are few (it waits
//! for the weights, whatever it computes meanwhile), so it has two more points. A large problem is
//! measured in part and scaled by its work (`problem.rs`), on operands as a step finds them
//! (`measure.rs`). What was measured once is kept in memory and in a file that belongs to this machine.
//!
//! Invariants: `scratch_bytes` is exactly what dispatch slices. Costs are positive and do not fall
//! with the number of tokens. Measuring touches at most the given bytes, and at most 64 MiB.
//!
//! Complexity: two to four measurements per distinct op, each a few runs of at most about
//! 6 GFLOP (the head 24) and a pass or more over the arena.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ounce_ir::{Graph, OpId, OpKind, RopeTable};
use ounce_kernels::pool::Pool;
use ounce_kernels::tier::tier;
use ounce_program::{FixedMachine, Machine, StepShape};

use crate::contention::{Moment, UNDISTURBED_CORES, is_quiet};
use crate::cost_file::{self, Kept};
use crate::measure::measure;
use crate::problem::{Key, MAX_FLOP, Problem, key_text};
use crate::scratch::scratch_bytes;
use crate::spec::OpSpec;
use crate::{Arena, TimeClass};

/// Memory that measuring touches at most.
const MAX_TOUCHED_BYTES: u64 = 64 << 20;
/// Tokens of the largest of the points, unless the step is shorter.
const MAX_TOKENS: u64 = 512;
/// The same for the head, which reads and writes as many bytes for a chunk of few tokens as of many,
/// and has only a few runs per step.
const MAX_HEAD_FLOP: f64 = 24e9;
const MAX_HEAD_TOKENS: u64 = 1024;
/// How long disturbed costs are kept at least, so that a program that runs on and off has not all of them measured
/// again and again.
const DISTURBED_LIFE: Duration = Duration::from_secs(600);

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
    kept: Kept,
    n_measured: usize,
    /// When the first measurement of this run began.
    began: Option<Moment>,
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
        let kept = cache_path.as_deref().map(|path| kept_costs(path, pool.n_threads()));
        let kept = kept.unwrap_or_default();
        let state = State { memo: BTreeMap::new(), kept, n_measured: 0, began: None, arena: None };
        let state = RefCell::new(state);
        Self { pool, arena_limit_bytes, baseline_bytes, cache_path, state }
    }

    /// Measurements taken so far, those from the file not counted.
    pub fn n_measured(&self) -> usize {
        self.state.borrow().n_measured
    }

    /// Cores that other programs took while this run measured, if so many that times are disturbed.
    pub fn cores_taken(&self) -> Option<f64> {
        let state = self.state.borrow();
        let taken = state.began.as_ref()?.cores_taken_since(self.pool.n_threads());
        (taken > UNDISTURBED_CORES).then_some(taken)
    }

    /// Bytes of memory that measuring has touched so far.
    pub fn touched_bytes(&self) -> u64 {
        if self.n_measured() > 0 { self.limit_bytes() } else { 0 }
    }

    /// Writes the file, if there is one and something new was measured.
    ///
    /// # Errors
    /// What the file system said. Losing the file only costs measuring again.
    pub fn save(&self) -> std::io::Result<()> {
        let taken = self.cores_taken().unwrap_or(0.0);
        let mut state = self.state.borrow_mut();
        state.kept.cores_taken = state.kept.cores_taken.max(taken);
        match &self.cache_path {
            Some(path) if state.n_measured > 0 => {
                let fingerprint = machine_fingerprint(self.pool.n_threads());
                cost_file::save(path, &fingerprint, &state.kept)
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
        let seconds = if let Some(&seconds) = state.kept.costs.get(&text) {
            seconds
        } else {
            let bytes = problem.bytes(n_tokens, self.pool.n_threads());
            if bytes > self.limit_bytes() {
                return None;
            }
            if state.arena.is_none() {
                state.arena = Arena::reserve(self.limit_bytes()).ok();
            }
            if state.began.is_none() {
                state.began = Moment::now();
            }
            let seconds = measure(state.arena.as_mut()?, &self.pool, problem, tables, n_tokens);
            state.n_measured += 1;
            state.kept.costs.insert(text, seconds);
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

/// The costs of the file. Those that were measured beside other programs count for a while, and until the machine is
/// quiet.
fn kept_costs(path: &Path, n_threads: usize) -> Kept {
    let kept = cost_file::load(path, &machine_fingerprint(n_threads));
    let still_count = still_count(kept.cores_taken, cost_file::age(path), || is_quiet(n_threads));
    if still_count { kept } else { Kept::default() }
}

fn still_count(cores_taken: f64, age: Duration, is_quiet: impl FnOnce() -> bool) -> bool {
    cores_taken <= UNDISTURBED_CORES || age < DISTURBED_LIFE || !is_quiet()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disturbed_costs_count_until_they_are_old_and_the_machine_is_quiet() {
        let old = DISTURBED_LIFE;
        let new = old / 2;
        assert!(still_count(0.1, old, || panic!("there is nothing to wait for")));
        assert!(still_count(1.0, new, || panic!("there is nothing to wait for")));
        assert!(still_count(1.0, old, || false));
        assert!(!still_count(1.0, old, || true));
    }

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
