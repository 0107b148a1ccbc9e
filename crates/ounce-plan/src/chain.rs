//! The chain DP: for every budget at once, the fastest way to run a chain forward and backward.
//!
//! Idea (rotor, Rockmate): a run of stages whose input is held elsewhere either
//! * *now*: runs its first stage forward keeping some values, then the rest of the run, then that
//!   stage backward; or
//! * *later*: runs its first `j` stages forward keeping nothing, then the rest, then the first `j`
//!   stages again as a run of their own; or
//! * (one stage) runs it backward, recomputing lazily what it needs.
//!
//! The first stage, which reads data only, may also run *again*: it runs forward keeping nothing, the
//! second stage runs keeping some values but not its input, then the rest of the chain, and the
//! first stage makes that input again for the second one's backward. An embedding is cheap to repeat.
//!
//! Instead of a table over a memory grid, each run has the list of its non-dominated
//! (bytes, seconds) points, bytes exact. Lists of equal runs are shared: `C(i, n)`, the run of `n`
//! interior stages from `i`, depends only on the types of its stages, so a model of alike layers
//! has about two runs per length, while pruned or searched models with layers of their own still
//! work. `T(i)` is the run from stage `i` through the head.
//!
//! Bytes of a point are the peak beyond the run's input. For `C` they include the gradient that
//! comes in at its end, which exists during all of the run, and the gradient sums that its stages
//! start and that outlive them (clipping needs all of them before the update).
//!
//! Invariants: lists ascend in bytes and strictly descend in seconds; every point can be walked back
//! to a schedule whose peak is at most its bytes.
//!
//! Complexity: O(runs * (options + length) * points). Lists are thinned to `max_points`, keeping
//! both ends; a thinned list loses a little speed at some budgets, never correctness.
//! Source: `[Beaumont21]` (rotor), `[Zhao23]` (Rockmate); exact byte lists instead of a grid are ours.

use std::collections::BTreeMap;

use crate::context::Context;
use crate::emit::Pass;
use crate::options::{ForwardOption, StageOptions};

/// Interior runs are many, and a point of theirs matters less than one of the whole chain: their
/// lists are this much shorter.
const INTERIOR_COARSER: usize = 8;

/// How a point of a run is achieved.
#[derive(Debug, Clone, Copy, PartialEq)]
enum How {
    /// Backward alone; index of the option.
    Backward(u32),
    /// Keep option of the first stage, and the point of the rest.
    Now { option: u32, tail: u32 },
    /// Forward without keeping through `n_forward` stages; points of the rest and of their rerun.
    Later { n_forward: u32, tail: u32, inner: u32 },
    /// The first stage without keeping, the second keeping; the first again, both backward.
    Again { option: u32, backward: u32, tail: u32 },
    /// Forward only: option of the first stage, and the point of the rest.
    Forward { option: u32, tail: u32 },
    /// The empty run.
    End,
}

/// A non-dominated way to run a run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Point {
    pub(crate) bytes: u64,
    pub(crate) time_s: f64,
    how: How,
}

/// One step of a schedule.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Action {
    Forward(Pass),
    Backward(Pass),
}

/// All lists of one chain.
pub(crate) struct Chain {
    stages: Vec<ChainStage>,
    /// Options by stage type.
    pub(crate) options: Vec<StageOptions>,
    max_points: usize,
    /// `class[i][n - 1]`: which interior list the run of `n` stages from `i` has.
    class: Vec<Vec<u32>>,
    interior: Vec<Vec<Point>>,
    /// `T(i)`.
    suffix: Vec<Vec<Point>>,
}

struct ChainStage {
    /// Which stage type.
    kind: usize,
    output_bytes: u64,
    d_output_bytes: u64,
    /// Bytes of gradient sums that its backward starts and that outlive it.
    grown_bytes: u64,
}

impl Chain {
    /// Bytes that the lists take.
    pub(crate) fn list_bytes(&self) -> u64 {
        let lists = self.interior.iter().chain(&self.suffix);
        lists.map(|list| (list.capacity() * size_of::<Point>()) as u64).sum()
    }

    /// Solves the chain for every budget.
    pub(crate) fn solve(
        cx: &Context,
        kinds: &[usize],
        options: Vec<StageOptions>,
        max_points: usize,
    ) -> Self {
        let stages = cx.graph.stages.values().zip(kinds).enumerate();
        let stages = stages.map(|(s, (stage, &kind))| ChainStage {
            kind,
            grown_bytes: cx.grown_bytes(s),
            output_bytes: cx.cut_bytes(stage.output),
            d_output_bytes: cx.cut_bytes(stage.d_output),
        });
        let mut chain = Self {
            stages: stages.collect(),
            options,
            max_points,
            class: vec![Vec::new(); kinds.len()],
            interior: Vec::new(),
            suffix: vec![Vec::new(); kinds.len() + 1],
        };
        if cx.trains() {
            chain.solve_interior();
            chain.solve_suffixes();
        } else {
            chain.solve_forward();
        }
        chain
    }

    fn options(&self, i: usize) -> &StageOptions {
        &self.options[self.stages[i].kind]
    }

    /// The forward option of stage `i` in runs that are recomputed later.
    fn thrifty(&self, i: usize) -> &ForwardOption {
        self.options(i).thrifty.as_ref().expect("every stage can run forward")
    }

    /// The points of the whole chain.
    pub(crate) fn points(&self) -> &[Point] {
        &self.suffix[0]
    }

    fn solve_interior(&mut self) {
        let last = self.stages.len() - 1;
        // Runs of one type sequence share a list: (type of the first, list of the rest).
        let mut known: BTreeMap<(usize, Option<u32>), u32> = BTreeMap::new();
        for n in 1..=last {
            for i in 0..=last - n {
                let rest = (n > 1).then(|| self.class[i + 1][n - 2]);
                let key = (self.stages[i].kind, rest);
                let class = if let Some(&class) = known.get(&key) {
                    class
                } else {
                    let list = self.interior_list(i, n);
                    self.interior.push(list);
                    let class = self.interior.len() as u32 - 1;
                    known.insert(key, class);
                    class
                };
                self.class[i].push(class);
            }
        }
    }

    /// Bytes of held sums that exist once stages `i .. i + n` have run backward.
    fn grown(&self, i: usize, n: usize) -> u64 {
        self.stages[i..i + n].iter().map(|s| s.grown_bytes).sum()
    }

    fn run(&self, i: usize, n: usize) -> &[Point] {
        &self.interior[self.class[i][n - 1] as usize]
    }

    fn interior_list(&self, i: usize, n: usize) -> Vec<Point> {
        if n == 1 {
            return self.backward_list(i);
        }
        let gradient = self.stages[i + n - 1].d_output_bytes;
        let mut best = Vec::new();
        let grown = self.grown(i + 1, n - 1);
        self.now(i, [gradient, grown], self.run(i + 1, n - 1), &mut best);
        let mut forward = ForwardRun::default();
        for j in 1..n {
            forward.extend(self.thrifty(i + j - 1), j == 1);
            let tail = self.run(i + j, n - j);
            let grown = self.grown(i + j, n - j);
            self.later(i, j, [gradient, grown], &forward, tail, &mut best);
        }
        thin(best, self.max_points.div_ceil(INTERIOR_COARSER))
    }

    fn solve_suffixes(&mut self) {
        let last = self.stages.len() - 1;
        self.suffix[last] = self.backward_list(last);
        for i in (0..last).rev() {
            let mut best = Vec::new();
            let grown = |from: usize| self.grown(from, last + 1 - from);
            self.now(i, [0, grown(i + 1)], &self.suffix[i + 1], &mut best);
            let mut forward = ForwardRun::default();
            for j in 1..=last - i {
                forward.extend(self.thrifty(i + j - 1), j == 1);
                let around = [0, grown(i + j)];
                self.later(i, j, around, &forward, &self.suffix[i + j], &mut best);
            }
            if i == 0 && last > 1 {
                self.again(&mut best);
            }
            self.suffix[i] = thin(best, self.max_points);
        }
    }

    /// Stages forward only: the peak is the largest stage's, the time the sum.
    fn solve_forward(&mut self) {
        let n = self.stages.len();
        self.suffix[n] = vec![Point { bytes: 0, time_s: 0.0, how: How::End }];
        for i in (0..n).rev() {
            let mut best = Vec::new();
            for (o, option) in self.options(i).forward.iter().enumerate() {
                let tail = self.suffix[i + 1].iter().enumerate().map(|(t, x)| Point {
                    bytes: option.drop_bytes.max(x.bytes),
                    time_s: option.time_s + x.time_s,
                    how: How::Forward { option: o as u32, tail: t as u32 },
                });
                merge(&mut best, tail);
            }
            self.suffix[i] = thin(best, self.max_points);
        }
    }

    fn backward_list(&self, i: usize) -> Vec<Point> {
        let mut best = Vec::new();
        for (o, option) in self.options(i).backward.iter().enumerate() {
            let how = How::Backward(o as u32);
            let point = Point { bytes: option.bytes, time_s: option.time_s, how };
            merge(&mut best, std::iter::once(point));
        }
        best
    }

    /// `around`: bytes of the gradient that comes in, and of sums that the tail leaves behind.
    fn now(&self, i: usize, around: [u64; 2], tail: &[Point], best: &mut Vec<Point>) {
        let [gradient, grown] = around;
        let stage = &self.stages[i];
        for (o, option) in self.options(i).keep.iter().enumerate() {
            let peak = (gradient + option.forward_bytes).max(grown + option.backward_bytes);
            let held = option.saved_bytes + stage.output_bytes;
            let points = tail.iter().enumerate().map(|(t, x)| Point {
                bytes: peak.max(held + x.bytes),
                time_s: option.time_s + x.time_s,
                how: How::Now { option: o as u32, tail: t as u32 },
            });
            merge(best, points);
        }
    }

    fn later(
        &self,
        i: usize,
        j: usize,
        around: [u64; 2],
        forward: &ForwardRun,
        tail: &[Point],
        best: &mut Vec<Point>,
    ) {
        let [gradient, grown] = around;
        let inner = self.run(i, j);
        let cut = self.stages[i + j - 1].output_bytes;
        let floor = gradient + forward.bytes;
        let (mut t, mut n) = (0, 0);
        let mut bytes = (cut + tail[0].bytes).max(grown + inner[0].bytes);
        let points = std::iter::from_fn(|| {
            // The best pair for `bytes`, then on to the next size at which either improves.
            if bytes == u64::MAX {
                return None;
            }
            while t + 1 < tail.len() && cut + tail[t + 1].bytes <= bytes {
                t += 1;
            }
            while n + 1 < inner.len() && grown + inner[n + 1].bytes <= bytes {
                n += 1;
            }
            let how = How::Later { n_forward: j as u32, tail: t as u32, inner: n as u32 };
            let time_s = forward.time_s + tail[t].time_s + inner[n].time_s;
            let point = Point { bytes: bytes.max(floor), time_s, how };
            let next_tail = tail.get(t + 1).map_or(u64::MAX, |x| cut + x.bytes);
            let next_inner = inner.get(n + 1).map_or(u64::MAX, |x| grown + x.bytes);
            bytes = next_tail.min(next_inner);
            Some(point)
        });
        merge(best, points);
    }

    /// The first stage runs twice, so that its output need not wait for the second one's backward.
    fn again(&self, best: &mut Vec<Point>) {
        let first = self.thrifty(0);
        let (input, second) = (self.stages[0].output_bytes, &self.stages[1]);
        let n_stages = self.stages.len();
        let (after_second, after_third) =
            (self.grown(1, n_stages - 1), self.grown(2, n_stages - 2));
        for (b, backward) in self.options(0).backward.iter().enumerate() {
            let ends = after_second + backward.bytes;
            for (o, option) in self.options(1).keep.iter().enumerate() {
                let forward = first.retain_bytes.max(input + option.forward_bytes);
                let again = option.saved_bytes + second.d_output_bytes + first.retain_bytes;
                let returns = after_third + again.max(input + option.backward_bytes);
                let peak = forward.max(returns).max(ends);
                let held = option.saved_bytes + second.output_bytes;
                let time_s = 2.0 * first.time_s + option.time_s + backward.time_s;
                let tail = self.suffix[2].iter().enumerate().map(|(t, x)| Point {
                    bytes: peak.max(held + x.bytes),
                    time_s: time_s + x.time_s,
                    how: How::Again { option: o as u32, backward: b as u32, tail: t as u32 },
                });
                merge(best, tail);
            }
        }
    }

    /// The schedule of a point of the whole chain.
    pub(crate) fn actions(&self, point: usize) -> Vec<Action> {
        let mut actions = Vec::new();
        self.walk_suffix(0, point, &mut actions);
        actions
    }

    fn walk_suffix(&self, i: usize, point: usize, out: &mut Vec<Action>) {
        let how = self.suffix[i][point].how;
        match how {
            How::Now { option, tail } => {
                let pass = self.keep_pass(i, option);
                out.push(Action::Forward(pass));
                self.walk_suffix(i + 1, tail as usize, out);
                out.push(Action::Backward(pass));
            }
            How::Later { n_forward, tail, inner } => {
                self.walk_forward(i, n_forward as usize, out);
                self.walk_suffix(i + n_forward as usize, tail as usize, out);
                self.walk_interior(i, n_forward as usize, inner as usize, out);
            }
            How::Backward(option) => out.push(self.backward_pass(i, option)),
            How::Again { option, backward, tail } => {
                let chunk_tokens = self.thrifty(0).chunk_tokens;
                let first = Pass { stage: 0, chunk_tokens, keep: 0, retain_input: false };
                let second = Pass { retain_input: false, ..self.keep_pass(1, option) };
                out.extend([Action::Forward(first), Action::Forward(second)]);
                self.walk_suffix(2, tail as usize, out);
                out.extend([Action::Forward(first), Action::Backward(second)]);
                out.push(self.backward_pass(0, backward));
            }
            How::Forward { option, tail } => {
                let chunk_tokens = self.options(i).forward[option as usize].chunk_tokens;
                let pass = Pass { stage: i, chunk_tokens, keep: 0, retain_input: false };
                out.push(Action::Forward(pass));
                self.walk_suffix(i + 1, tail as usize, out);
            }
            How::End => {}
        }
    }

    fn walk_interior(&self, i: usize, n: usize, point: usize, out: &mut Vec<Action>) {
        match self.run(i, n)[point].how {
            How::Now { option, tail } => {
                let pass = self.keep_pass(i, option);
                out.push(Action::Forward(pass));
                self.walk_interior(i + 1, n - 1, tail as usize, out);
                out.push(Action::Backward(pass));
            }
            How::Later { n_forward, tail, inner } => {
                let j = n_forward as usize;
                self.walk_forward(i, j, out);
                self.walk_interior(i + j, n - j, tail as usize, out);
                self.walk_interior(i, j, inner as usize, out);
            }
            How::Backward(option) => out.push(self.backward_pass(i, option)),
            How::Again { .. } | How::Forward { .. } | How::End => {
                unreachable!("interior runs go backward and start behind the first stage")
            }
        }
    }

    fn walk_forward(&self, i: usize, n: usize, out: &mut Vec<Action>) {
        for s in i..i + n {
            let chunk_tokens = self.thrifty(s).chunk_tokens;
            let pass = Pass { stage: s, chunk_tokens, keep: 0, retain_input: s == i };
            out.push(Action::Forward(pass));
        }
    }

    fn keep_pass(&self, i: usize, option: u32) -> Pass {
        let option = self.options(i).keep[option as usize];
        let (keep, chunk_tokens) = (option.keep, option.chunk_tokens);
        Pass { stage: i, chunk_tokens, keep, retain_input: true }
    }

    fn backward_pass(&self, i: usize, option: u32) -> Action {
        let chunk_tokens = self.options(i).backward[option as usize].chunk_tokens;
        Action::Backward(Pass { stage: i, chunk_tokens, keep: 0, retain_input: true })
    }
}

/// Peak and time of running stages forward without keeping anything but the first one's input.
#[derive(Default)]
struct ForwardRun {
    bytes: u64,
    time_s: f64,
}

impl ForwardRun {
    fn extend(&mut self, option: &ForwardOption, first: bool) {
        let bytes = if first { option.retain_bytes } else { option.drop_bytes };
        self.bytes = self.bytes.max(bytes);
        self.time_s += option.time_s;
    }
}

/// Merges points that ascend in bytes into a list of non-dominated points.
fn merge(best: &mut Vec<Point>, points: impl Iterator<Item = Point>) {
    let old = std::mem::take(best);
    let mut old = old.into_iter().peekable();
    let mut push = |p: Point| match best.last_mut() {
        Some(last) if p.time_s >= last.time_s => {}
        Some(last) if p.bytes == last.bytes => *last = p,
        _ => best.push(p),
    };
    for p in points {
        while let Some(o) = old.next_if(|o| o.bytes <= p.bytes) {
            push(o);
        }
        push(p);
    }
    old.for_each(push);
}

/// At most `max_points` of a list, both ends among them.
fn thin(mut list: Vec<Point>, max_points: usize) -> Vec<Point> {
    let n = list.len();
    if n <= max_points {
        list.shrink_to_fit();
        return list;
    }
    (0..max_points).map(|k| list[k * (n - 1) / (max_points - 1)]).collect()
}
