//! A lower bound on the time of a step: the kept-set envelope.
//!
//! At the instant the loss runs, what is resident fits in the budget beside parameters and state.
//! Every forward op whose value the backward needs and that is not among them runs again. For each
//! stage and each subset of kept values the recomputation is known; a stage whose input is not kept
//! either must at least run the op that wrote that input again. The least total over all stages for
//! the bytes there are is a multiple-choice knapsack; its linear relaxation, greedy over the convex
//! envelopes of the stages' trade-offs, is a lower bound for every recompute schedule, persistent or
//! not. It holds for the given number of micro-batches, and for stages of at most `MAX_KEEPABLE_GROUPS` values.
//!
//! Complexity: O(stages * options log). Source: the knapsack bound for `[Jain20]`-style schedules, ours.

use ounce_ir::EntityId;

use crate::context::Context;
use crate::options::{StageOptions, least_cost_s};

/// Least seconds of one micro-batch's forward and backward if `bytes` are free when the loss runs.
pub(crate) fn time_bound_s(cx: &Context, kinds: &[usize], all: &[StageOptions], bytes: u64) -> f64 {
    let mut total_s = 0.0;
    // (saved seconds per byte, bytes, seconds): steps along the envelopes.
    let mut steps: Vec<(f64, u64, f64)> = Vec::new();
    for (s, stage) in cx.graph.stages.values().enumerate() {
        let options = &all[kinds[s]];
        total_s += options.least_s;
        let input = cx.cut_bytes(stage.input);
        let again = stage.input.and_then(|v| cx.producer[v.index()]);
        // The stage before wrote it, in chunks of one of its lengths.
        let before = s.checked_sub(1).map_or(&[][..], |before| &all[kinds[before]].lengths);
        let again_s = again.map_or(0.0, |op| least_cost_s(cx, op, before));
        let mut points: Vec<(u64, f64)> = Vec::new();
        // The head runs forward just before its backward: its own values cost nothing extra.
        let last = s + 1 == cx.n_stages();
        for &(saved, recompute_s) in &options.recompute {
            let recompute_s = if last { 0.0 } else { recompute_s };
            points.push((saved + input, recompute_s));
            points.push((saved, recompute_s + if last { 0.0 } else { again_s }));
        }
        let envelope = lower_envelope(points);
        total_s += envelope.first().map_or(0.0, |p| p.1);
        for pair in envelope.windows(2) {
            let (more, less_s) = (pair[1].0 - pair[0].0, pair[0].1 - pair[1].1);
            steps.push((less_s / more as f64, more, less_s));
        }
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut free = bytes;
    for (rate, more, less_s) in steps {
        if more <= free {
            free -= more;
            total_s -= less_s;
        } else {
            total_s -= rate * free as f64;
            break;
        }
    }
    total_s
}

/// The lower convex envelope of (bytes, seconds) points, ascending in bytes, from zero bytes on.
fn lower_envelope(mut points: Vec<(u64, f64)>) -> Vec<(u64, f64)> {
    points.sort_by(|a, b| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    let mut hull: Vec<(u64, f64)> = Vec::new();
    for p in points {
        if hull.last().is_some_and(|l| p.1 >= l.1) {
            continue;
        }
        while let [.., a, b] = hull[..] {
            let slope = |x: (u64, f64), y: (u64, f64)| (x.1 - y.1) / (y.0 - x.0) as f64;
            if slope(a, b) > slope(b, p) {
                break;
            }
            hull.pop();
        }
        hull.push(p);
    }
    hull
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_envelope_is_convex_and_starts_at_the_least_bytes() {
        let hull =
            lower_envelope(vec![(0, 10.0), (1, 9.0), (2, 2.0), (4, 1.5), (3, 3.0), (8, 0.0)]);
        assert_eq!(hull, vec![(0, 10.0), (2, 2.0), (8, 0.0)]);
    }
}
