//! Exact Pareto options of each stage type: what to keep, in chunks of how many tokens.
//!
//! Idea: a stage has few keepable values (at most a handful of groups), so every subset is tried.
//! For each subset the recomputation that its lazy backward needs is known op by op; subsets that
//! keep more bytes for no less recomputation are dropped. The survivors are emitted in isolation at
//! every chunk length (powers of two of the micro-batch, on the stage's cuts), which gives exact
//! peaks; dominated (saved, peaks, time) are dropped.
//!
//! Stages with the same ops over the same shapes share one type and are enumerated once.
//!
//! Complexity: 2^k subsets (k is at most `MAX_KEEPABLE_GROUPS`, 12, mostly 3 to 8) for the first filter,
//! then one emission per survivor and chunk length. Source: `[Zhao23]`, with exact enumeration instead of an ILP.

use std::collections::BTreeMap;

use ounce_ir::{EntityId, OpId, ValueId};

use crate::context::Context;
use crate::emit::{Emitter, Pass, backward_sequence, peak_load};

/// A forward pass that keeps `keep`, and the backward pass that goes with it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct KeepOption {
    pub(crate) keep: u32,
    pub(crate) chunk_tokens: u64,
    /// Bytes that stay between the two passes, without input and output.
    pub(crate) saved_bytes: u64,
    /// Peak of the forward pass beyond the stage's input.
    pub(crate) forward_bytes: u64,
    /// Peak of the backward pass beyond the stage's input, with the incoming gradient and the sums
    /// that it starts.
    pub(crate) backward_bytes: u64,
    /// Both passes.
    pub(crate) time_s: f64,
}

/// A forward pass that keeps nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ForwardOption {
    pub(crate) chunk_tokens: u64,
    /// Peak beyond the stage's input, which is read again later.
    pub(crate) retain_bytes: u64,
    /// Peak with the stage's input, which is dropped on the way.
    pub(crate) drop_bytes: u64,
    pub(crate) time_s: f64,
}

/// A backward pass that recomputes everything it needs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct BackwardOption {
    pub(crate) chunk_tokens: u64,
    /// Peak beyond the stage's input, incoming gradient included.
    pub(crate) bytes: u64,
    pub(crate) time_s: f64,
}

/// What is known of a stage type for one micro-batch size.
#[derive(Debug, Clone, Default)]
pub(crate) struct StageOptions {
    /// Forward with keeping, then backward.
    pub(crate) keep: Vec<KeepOption>,
    /// Forward without keeping, by ascending bytes.
    pub(crate) forward: Vec<ForwardOption>,
    /// The forward option of runs that are recomputed later: chunks as short as is still efficient.
    /// Chosen without looking at costs, so that the smallest feasible budget is the same figure
    /// however the costs were measured.
    pub(crate) thrifty: Option<ForwardOption>,
    /// Backward from the stage's input alone, by ascending bytes.
    pub(crate) backward: Vec<BackwardOption>,
    /// (kept bytes, recomputed seconds) of every undominated subset, each op at its best chunk length, for the time
    /// bound.
    pub(crate) recompute: Vec<(u64, f64)>,
    /// The chunk lengths that were tried.
    pub(crate) lengths: Vec<u64>,
    /// Seconds of the forward and backward ops, each once, at their best chunk length.
    pub(crate) least_s: f64,
}

/// Limits of the enumeration, set by the caller's wishes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Longest chunk in tokens (`u64::MAX`: the micro-batch).
    pub(crate) chunk_tokens_max: u64,
    /// How many halvings of the micro-batch are tried.
    pub(crate) n_halvings: u32,
}

/// Chunks of at least this many tokens run products at nearly full speed.
const EFFICIENT_TOKENS: u64 = 256;

/// The options of stage `s`.
pub(crate) fn enumerate(cx: &Context, s: usize, limits: Limits) -> StageOptions {
    let lengths = chunk_lengths(cx, s, limits);
    let mut options = StageOptions::default();
    for &chunk in &lengths {
        options.forward.push(forward_option(cx, s, chunk));
    }
    let efficient = |o: &&ForwardOption| o.chunk_tokens >= EFFICIENT_TOKENS;
    options.thrifty = options.forward.iter().rfind(efficient).or(options.forward.first()).copied();
    prune(&mut options.forward, |o| ([o.retain_bytes.max(o.drop_bytes), 0, 0], o.time_s));
    if !cx.trains() {
        return options;
    }
    let least = |op| least_cost_s(cx, op, &lengths);
    options.least_s = cx.forward[s].iter().chain(&cx.backward[s]).map(|&op| least(op)).sum();
    for &chunk in &lengths {
        let seq = backward_sequence(cx, s, &[]);
        let time_s = seq.iter().map(|&op| cx.chunked_cost_s(op, chunk)).sum();
        let bytes = backward_peak(cx, s, 0, chunk);
        options.backward.push(BackwardOption { chunk_tokens: chunk, bytes, time_s });
    }
    prune(&mut options.backward, |o| ([o.bytes, 0, 0], o.time_s));
    let bound = undominated_subsets(cx, s, least);
    options.recompute = bound.iter().map(|&(_, bytes, time_s)| (bytes, time_s)).collect();
    let subsets = undominated_subsets(cx, s, |op| cx.chunked_cost_s(op, lengths[0]));
    for &(keep, saved_bytes, _) in &subsets {
        for &chunk in &lengths {
            options.keep.push(keep_option(cx, s, keep, saved_bytes, chunk));
        }
    }
    prune(&mut options.keep, |o| ([o.saved_bytes, o.forward_bytes, o.backward_bytes], o.time_s));
    options.lengths = lengths;
    options
}

/// Seconds of one micro-batch of `op` at the best of the chunk lengths.
pub(crate) fn least_cost_s(cx: &Context, op: OpId, lengths: &[u64]) -> f64 {
    lengths.iter().map(|&c| cx.chunked_cost_s(op, c)).fold(f64::INFINITY, f64::min)
}

/// Powers of two of the micro-batch, on the stage's cuts, longest first.
fn chunk_lengths(cx: &Context, s: usize, limits: Limits) -> Vec<u64> {
    let n = cx.micro_tokens();
    if cx.whole(s) {
        return vec![n];
    }
    let cut = cx.cut_tokens(s);
    let longest = limits.chunk_tokens_max.clamp(cut, n.max(cut)).min(n);
    let mut lengths: Vec<u64> = Vec::new();
    for halving in 0..=limits.n_halvings {
        let length = longest.div_ceil(1 << halving).next_multiple_of(cut).min(n);
        if lengths.last() != Some(&length) {
            lengths.push(length);
        }
    }
    lengths
}

fn forward_option(cx: &Context, s: usize, chunk: u64) -> ForwardOption {
    let time_s = cx.forward[s].iter().map(|&op| cx.chunked_cost_s(op, chunk)).sum();
    let retain_bytes = forward_peak(cx, s, 0, chunk, true);
    let drop_bytes = forward_peak(cx, s, 0, chunk, false);
    ForwardOption { chunk_tokens: chunk, retain_bytes, drop_bytes, time_s }
}

fn keep_option(cx: &Context, s: usize, keep: u32, saved_bytes: u64, chunk: u64) -> KeepOption {
    let kept = cx.kept(s, keep);
    let seq = backward_sequence(cx, s, &kept);
    let ops = cx.forward[s].iter().chain(&seq);
    KeepOption {
        keep,
        chunk_tokens: chunk,
        saved_bytes,
        forward_bytes: forward_peak(cx, s, keep, chunk, true),
        backward_bytes: backward_peak(cx, s, keep, chunk),
        time_s: ops.map(|&op| cx.chunked_cost_s(op, chunk)).sum(),
    }
}

/// Subsets (mask, kept bytes, recomputed seconds) that no other beats in both, fewest bytes first.
fn undominated_subsets(
    cx: &Context,
    s: usize,
    cost_s: impl Fn(OpId) -> f64,
) -> Vec<(u32, u64, f64)> {
    let groups = &cx.keepable[s];
    let bytes: Vec<u64> = groups
        .iter()
        .map(|g| g.iter().map(|&v| cx.value_bytes(v, cx.micro_tokens())).sum())
        .collect();
    // Priced once: subsets are many.
    let prices: BTreeMap<OpId, f64> = cx.forward[s].iter().map(|&op| (op, cost_s(op))).collect();
    let n_forward = |seq: &[OpId]| -> f64 { seq.iter().filter_map(|op| prices.get(op)).sum() };
    let mut subsets: Vec<(u32, u64, f64)> = (0..1_u32 << groups.len())
        .map(|mask| {
            let saved = (0..groups.len()).filter(|i| mask & (1 << i) != 0).map(|i| bytes[i]).sum();
            (mask, saved, n_forward(&backward_sequence(cx, s, &cx.kept(s, mask))))
        })
        .collect();
    prune(&mut subsets, |&(_, saved, time_s)| ([saved, 0, 0], time_s));
    subsets
}

fn forward_peak(cx: &Context, s: usize, keep: u32, chunk: u64, retain_input: bool) -> u64 {
    let mut e = Emitter::isolated(cx, s);
    if let Some(v) = cx.stage(s).input {
        e.assume(v, retain_input);
    }
    e.forward(Pass { stage: s, chunk_tokens: chunk, keep, retain_input });
    // What is handed on lives to the end of the pass.
    let end = e.instrs.len() as u32;
    let mut spanning = cx.kept(s, keep);
    spanning.extend(cx.stage(s).output);
    e.extend_lives(&spanning, end);
    peak_load(&e.drafts, e.instrs.len(), |d| !d.external)
}

fn backward_peak(cx: &Context, s: usize, keep: u32, chunk: u64) -> u64 {
    let stage = cx.stage(s);
    let mut e = Emitter::isolated(cx, s);
    e.assume_held_sums(s);
    for (v, external) in [(stage.input, true), (stage.d_output, false)] {
        if let Some(v) = v {
            e.assume(v, external);
        }
    }
    for v in cx.kept(s, keep) {
        e.assume(v, false);
    }
    e.backward(Pass { stage: s, chunk_tokens: chunk, keep, retain_input: true });
    let end = e.instrs.len() as u32;
    let mut handed_on: Vec<ValueId> = stage.d_input.into_iter().collect();
    handed_on.extend(cx.held_sums().filter(|v| cx.starts[v.index()] == Some(s)));
    e.extend_lives(&handed_on, end);
    peak_load(&e.drafts, e.instrs.len(), |d| !d.external)
}

/// Drops items that another beats or equals in all three byte figures and in time; the rest is
/// sorted by the first figure, then the others, then time.
fn prune<T: Copy>(items: &mut Vec<T>, figures: impl Fn(&T) -> ([u64; 3], f64)) {
    items.sort_by(|a, b| {
        let ((ba, ta), (bb, tb)) = (figures(a), figures(b));
        ba.cmp(&bb).then(ta.total_cmp(&tb))
    });
    let mut kept: Vec<T> = Vec::new();
    for &item in items.iter() {
        let (bytes, time_s) = figures(&item);
        let beaten = kept.iter().any(|k| {
            let (b, t) = figures(k);
            t <= time_s && b.iter().zip(&bytes).all(|(x, y)| x <= y)
        });
        if !beaten {
            kept.push(item);
        }
    }
    *items = kept;
}

/// A text that is equal for stages of one type: same ops over same shapes, sums held alike.
pub(crate) fn signature(cx: &Context, s: usize) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    for &op in cx.forward[s].iter().chain(&cx.backward[s]) {
        let op = &cx.graph.ops[op];
        // The site of a random op changes its numbers, not its bytes or its time.
        match op.kind {
            ounce_ir::OpKind::Dropout { p, .. } => write!(text, "dropout({p})"),
            kind => write!(text, "{kind:?}"),
        }
        .expect("writing to a string cannot fail");
        for &v in op.inputs.iter().chain(&op.sums).chain(&op.outputs) {
            let value = &cx.graph.values[v];
            let held = (cx.held[v.index()], cx.starts[v.index()] == Some(s));
            write!(text, " {}{}{held:?}", value.dtype, value.shape)
                .expect("writing to a string cannot fail");
        }
        for &u in &op.uses {
            write!(text, " {}", cx.graph.params[cx.graph.param_of(u)].shape)
                .expect("writing to a string cannot fail");
        }
        text.push(';');
    }
    text
}
