//! Which item comes next, out of several parts with weights, without keeping anything.
//!
//! Idea: part `k` of `n_k` items gives `m_k = round(weight_k * n_k)` of them to each epoch, one at least if it has a
//! weight, so a weight counts passes per epoch. The items of an epoch are numbered part by part and shuffled by one
//! permutation. A part goes through its items again and again, over the epochs: with a whole weight in its own order
//! (the shuffle above is enough), else in an order of its own for each pass, so that every item has its turn.
//!
//! Invariants: over many epochs every item of a part comes equally often, up to one; with weights of 1 an epoch is a
//! permutation of all items. Any position is found in O(parts), so a resumed run needs nothing but its number.

use crate::shuffle::Permutation;

/// The parts of a data set with their weights.
#[derive(Debug, Clone)]
pub struct Mixture {
    parts: Vec<Part>,
    n_per_epoch: u64,
    seed: u64,
}

#[derive(Debug, Clone, Copy)]
struct Part {
    /// Number of its first item.
    first: u64,
    n_items: u64,
    /// Items that it gives to each epoch.
    n_taken: u64,
}

impl Mixture {
    /// Parts of so many items, each with its weight; items are numbered part by part.
    pub fn new(parts: &[(u64, f64)], seed: u64) -> Self {
        let mut first = 0;
        let parts: Vec<Part> = parts
            .iter()
            .map(|&(n_items, weight)| {
                let least = u64::from(n_items > 0 && weight > 0.0);
                let n_taken = ((n_items as f64 * weight).round() as u64).max(least);
                let part = Part { first, n_items, n_taken };
                first += n_items;
                part
            })
            .collect();
        Self { n_per_epoch: parts.iter().map(|p| p.n_taken).sum(), parts, seed }
    }

    /// Items of one epoch.
    pub fn n_per_epoch(&self) -> u64 {
        self.n_per_epoch
    }

    /// The item at position `number` of the run.
    ///
    /// # Panics
    /// If an epoch has no items.
    pub fn at(&self, number: u64) -> u64 {
        let epoch = number / self.n_per_epoch;
        let order = Permutation::new(self.n_per_epoch, self.seed, epoch);
        let mut place = order.at(number % self.n_per_epoch);
        for (k, part) in self.parts.iter().enumerate() {
            if place < part.n_taken {
                return part.first + self.within(k, part, epoch, place);
            }
            place -= part.n_taken;
        }
        unreachable!("a place below the items of an epoch lies in a part")
    }

    /// Which of its items part `k` gives to place `place` of its share of an epoch.
    fn within(&self, k: usize, part: &Part, epoch: u64, place: u64) -> u64 {
        if part.n_taken.is_multiple_of(part.n_items) {
            return place % part.n_items;
        }
        let turn = u128::from(epoch) * u128::from(part.n_taken) + u128::from(place);
        let pass = (turn / u128::from(part.n_items)) as u64;
        let at = (turn % u128::from(part.n_items)) as u64;
        Permutation::new(part.n_items, self.seed ^ ((k as u64 + 1) << 48), pass).at(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_weight_gives_an_item_and_none_gives_nothing() {
        let mixture = Mixture::new(&[(81, 0.006), (3, 0.1), (5, 0.0), (0, 1.0)], 3);
        assert_eq!(mixture.n_per_epoch(), 2);
        // Over the epochs every item has its turn.
        let mut items: Vec<u64> =
            (0..6).map(|number| mixture.at(number)).filter(|&i| i >= 81).collect();
        items.sort_unstable();
        assert_eq!(items, [81, 82, 83]);
    }

    #[test]
    fn with_weights_of_one_an_epoch_is_the_plain_permutation() {
        let mixture = Mixture::new(&[(7, 1.0), (5, 1.0)], 3);
        for number in 0..36 {
            let plain = Permutation::new(12, 3, number / 12).at(number % 12);
            assert_eq!(mixture.at(number), plain);
        }
    }

    #[test]
    fn every_item_comes_as_often_as_its_weight_says() {
        let mixture = Mixture::new(&[(10, 0.5), (4, 2.0), (3, 1.0), (6, 0.0)], 1);
        assert_eq!(mixture.n_per_epoch(), 5 + 8 + 3);
        let mut counts = [0; 23];
        for number in 0..16 * 20 {
            counts[mixture.at(number) as usize] += 1;
        }
        // Twenty epochs of half of ten items are ten passes.
        assert_eq!(counts[..10], [10; 10]);
        assert_eq!(counts[10..14], [40; 4]);
        assert_eq!(counts[14..17], [20; 3]);
        assert_eq!(counts[17..], [0; 6]);
    }
}
