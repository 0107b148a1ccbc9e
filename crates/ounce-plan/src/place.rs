//! Placing buffers: offsets such that no two live buffers overlap, as low as possible.
//!
//! Idea: take buffers in some order, put each at the lowest offset that is free during its whole
//! life. Three orders are tried (size, size times lifetime, birth) and the lowest result wins; it is
//! done as soon as one reaches the largest sum of live bytes, which no placement can beat.
//!
//! Complexity: a buffer is compared with those that live in the same stretches of instructions (1/1024
//! of the step each): near O(n) for short lives, O(n^2) at worst, n buffers. Source: `[Pisarchyk20]`
//! (greedy by size); on transformer schedules it reaches the lower bound.

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

/// A placed buffer: bytes `[start, end)`, instructions `first..=last`.
type Placed = (u64, u64, u32, u32);

/// Placed buffers by the stretches of instructions that they live in, so that a short-lived buffer
/// looks at its neighbours in time only, and a long-lived one at each buffer once.
struct Stretches {
    /// Length of a stretch.
    n_instrs: usize,
    /// Those whose lives begin in the stretch.
    begun: Vec<Vec<Placed>>,
    /// Those that live in it since an earlier one.
    going_on: Vec<Vec<Placed>>,
}

impl Stretches {
    fn new(drafts: &[Draft]) -> Self {
        let n_instrs = drafts.iter().map(|d| d.last as usize + 1).max().unwrap_or(1);
        let stretch = n_instrs.div_ceil(1024).max(64);
        let empty = || vec![Vec::new(); n_instrs.div_ceil(stretch)];
        Self { n_instrs: stretch, begun: empty(), going_on: empty() }
    }

    /// The first and the last stretch of a life.
    fn of(&self, first: u32, last: u32) -> (usize, usize) {
        (first as usize / self.n_instrs, last as usize / self.n_instrs)
    }

    fn insert(&mut self, p: Placed) {
        let (first, last) = self.of(p.2, p.3);
        self.begun[first].push(p);
        self.going_on[first + 1..=last].iter_mut().for_each(|placed| placed.push(p));
    }

    /// What lives at the same time as `d`, by ascending offset.
    fn beside(&self, d: &Draft, found: &mut Vec<Placed>) {
        let (first, last) = self.of(d.first, d.last);
        let meets = |p: &&Placed| p.2 <= d.last && d.first <= p.3;
        found.clear();
        let begun = self.begun[first..=last].iter().flatten();
        found.extend(self.going_on[first].iter().chain(begun).filter(meets));
        found.sort_unstable();
    }
}

fn first_fit(drafts: &[Draft], fixed: &[u64], base: u64, order: &[usize]) -> Placement {
    let mut offsets = fixed.to_vec();
    let mut height = base;
    let mut stretches = Stretches::new(drafts);
    let mut beside = Vec::new();
    for &i in order {
        let d = &drafts[i];
        stretches.beside(d, &mut beside);
        let mut at = base;
        for &(start, end, _, _) in &beside {
            if start >= at + d.bytes {
                break;
            }
            at = at.max(end);
        }
        offsets[i] = at;
        height = height.max(at + d.bytes);
        stretches.insert((at, at + d.bytes, d.first, d.last));
    }
    Placement { offsets, height }
}
