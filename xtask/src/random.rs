//! Random numbers for demonstrations, by Marsaglia's xorshift64 (2003).

use std::time::{SystemTime, UNIX_EPOCH};

/// A generator. Its seed is printed, so that a run can be repeated.
pub(crate) struct Random(u64);

impl Random {
    /// From a seed; without one, from the clock.
    pub(crate) fn new(seed: Option<u64>) -> Self {
        let clock = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seed = seed.unwrap_or(clock.as_nanos() as u64) | 1;
        println!("seed {seed}");
        Self(seed)
    }

    /// The next number from 0 to 1.
    pub(crate) fn share(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// One of several.
    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.share() * from.len() as f64) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_fill_the_range_and_repeat_by_seed() {
        let draw = |seed| {
            let mut random = Random::new(Some(seed));
            (0..1000).map(|_| random.share()).collect::<Vec<_>>()
        };
        let mean = draw(7).iter().sum::<f64>() / 1000.0;
        assert!((mean - 0.5).abs() < 0.05, "{mean}");
        assert_eq!(draw(7), draw(7));
        assert!(draw(9).iter().all(|x| (0.0..1.0).contains(x)));
    }
}
