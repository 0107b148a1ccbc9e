//! Placing buffers: offsets such that no two live buffers overlap, as low as possible.
//!
//! Idea: take buffers in some order, put each at the lowest offset that is free during its whole
//! life. Three orders are tried (size, size times lifetime, birth) and the lowest result wins; it is
//! done as soon as one reaches the largest sum of live bytes, which no placement can beat.
//!
//! Complexity: O(n^2) comparisons per order, n buffers. Source: [Pisarchyk20],
//! arXiv:2001.03288 (greedy by size); on transformer schedules it reaches the lower bound.

use crate::emit::Draft;

/// Offsets of all drafts (resident ones included) and the height of the arena.
pub(crate) struct Placement {
    pub(crate) offsets: Vec<u64>,
    pub(crate) height: u64,
}

/// Places all drafts that are not resident at or above `base`; resident ones keep `fixed`.
pub(crate) fn place(drafts: &[Draft], fixed: &[u64], base: u64, max_load: u64) -> Placement {
    let movable: Vec<usize> = (0..drafts.len()).filter(|&i| !drafts[i].resident).collect();
    let life = |i: usize| u64::from(drafts[i].last - drafts[i].first) + 1;
    let by_size = |i: usize| (drafts[i].bytes, life(i));
    let by_area = |i: usize| (drafts[i].bytes * life(i), drafts[i].bytes);
    let by_birth = |i: usize| (u64::from(u32::MAX - drafts[i].first), drafts[i].bytes);
    let orders: [&dyn Fn(usize) -> (u64, u64); 3] = [&by_size, &by_area, &by_birth];
    let mut best: Option<Placement> = None;
    for order in orders {
        let mut sorted = movable.clone();
        // Largest key first; ties in order of creation, so that the result is one.
        sorted.sort_by_key(|&i| std::cmp::Reverse(order(i)));
        let placement = first_fit(drafts, fixed, base, &sorted);
        if best.as_ref().is_none_or(|b| placement.height < b.height) {
            best = Some(placement);
        }
        if best.as_ref().is_some_and(|b| b.height <= base + max_load) {
            break;
        }
    }
    best.expect("there is at least one order")
}

fn first_fit(drafts: &[Draft], fixed: &[u64], base: u64, order: &[usize]) -> Placement {
    let mut offsets = fixed.to_vec();
    let mut height = base;
    // Placed buffers by ascending offset.
    let mut placed: Vec<(u64, u64, u32, u32)> = Vec::with_capacity(order.len());
    for &i in order {
        let d = &drafts[i];
        let mut at = base;
        for &(start, end, first, last) in &placed {
            if start >= at + d.bytes {
                break;
            }
            if end > at && first <= d.last && d.first <= last {
                at = end;
            }
        }
        offsets[i] = at;
        height = height.max(at + d.bytes);
        let k = placed.partition_point(|p| p.0 <= at);
        placed.insert(k, (at, at + d.bytes, d.first, d.last));
    }
    Placement { offsets, height }
}
