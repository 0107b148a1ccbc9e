//! Packing: which samples share a row, found once by best fit and kept on disk.
//!
//! Idea: a row has room for so many granules of 64 tokens, and a sample takes whole granules. Samples are taken in a
//! shuffled order, a window at a time; in a window the longest come first, each into the fullest row that still has
//! room for it (best fit decreasing). Epochs then shuffle rows, not samples.
//!
//! Invariants: every sample is in exactly one row; a row never holds more granules than it has; the same cache, length
//! and seed give the same rows. Any row is found in O(1), so that a resumed run needs nothing but its step.
//! Complexity: O(n log n) time, memory of one window ([`WINDOW`] samples).
//! Source: best fit decreasing as in `[Johnson73]`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::IoError;
use crate::hash::{SourceHash, Xxh64, hash_file};
use crate::shuffle::Permutation;
use crate::token_cache::{CacheWriter, TokenCache};

/// Samples that are packed at a time.
const WINDOW: u64 = 1 << 16;
/// Samples start at multiples of this many tokens.
pub(crate) const GRANULE_TOKENS: usize = 64;

/// Notes of packed rows.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackNotes {
    /// Rows of each part of the data.
    pub part_rows: Vec<u64>,
}

/// Where the rows of samples packed for `max_length` lie.
fn packs_path(cache: &TokenCache, max_length: usize, seed: u64) -> PathBuf {
    let name = cache.path().file_stem().and_then(|s| s.to_str()).unwrap_or("tokens").to_owned();
    cache.path().with_file_name(format!("{name}-packed-{max_length}-{seed}.bin"))
}

/// Packs the samples of `cache`, part by part (`part_samples` each), into rows of `max_length` tokens, unless that was
/// done before.
///
/// # Errors
/// `Read`, `Write`.
pub fn pack_samples(
    cache: &TokenCache,
    part_samples: &[u64],
    max_length: usize,
    seed: u64,
) -> Result<TokenCache, IoError> {
    let path = packs_path(cache, max_length, seed);
    let sources = [cache.path().to_path_buf()];
    let mut hash = Xxh64::new();
    for n in [cache.fingerprint(), max_length as u64, seed].iter().chain(part_samples) {
        hash.update(&n.to_le_bytes());
    }
    let fingerprint = hash.digest();
    if let Some(packs) = TokenCache::open_fresh(&path, &sources, fingerprint)? {
        return Ok(packs);
    }
    write_packs(cache, part_samples, max_length, seed, fingerprint, &path)?;
    TokenCache::open(&path)
}

fn write_packs(
    cache: &TokenCache,
    part_samples: &[u64],
    max_length: usize,
    seed: u64,
    fingerprint: u64,
    path: &Path,
) -> Result<(), IoError> {
    let mut writer = CacheWriter::create(path, 4, fingerprint, &[cache.path().to_path_buf()])?;
    let capacity = max_length.div_ceil(GRANULE_TOKENS);
    let mut notes = PackNotes::default();
    let mut first = 0;
    for (part, &n) in part_samples.iter().enumerate() {
        let order = Permutation::new(n, seed, part as u64);
        let mut n_rows = 0;
        for start in (0..n).step_by(WINDOW as usize) {
            let mut samples = Vec::with_capacity(WINDOW.min(n - start) as usize);
            for i in start..n.min(start + WINDOW) {
                let sample = first + order.at(i);
                let granules = cache.row(sample)?.1.div_ceil(GRANULE_TOKENS);
                samples.push((granules, sample as u32));
            }
            for row in best_fit_decreasing(&samples, capacity) {
                writer.append_row(&row)?;
                n_rows += 1;
            }
        }
        notes.part_rows.push(n_rows);
        first += n;
    }
    let (n_bytes, hash) = hash_file(cache.path())?;
    writer.finish(&[SourceHash { n_bytes, hash }], &notes)
}

/// Rows of samples, given as (size, number); no row holds more than `capacity`.
fn best_fit_decreasing(samples: &[(usize, u32)], capacity: usize) -> Vec<Vec<u32>> {
    let mut by_size: Vec<(usize, u32)> = samples.to_vec();
    // Stable: samples of one size stay in their shuffled order.
    by_size.sort_by_key(|&(size, _)| std::cmp::Reverse(size));
    let mut rows: Vec<Vec<u32>> = Vec::new();
    // Rows by the room they have left, those that were opened last taken first.
    let mut open: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (size, sample) in by_size {
        assert!(size <= capacity, "a sample of {size} granules in a row of {capacity}");
        let fullest = open.range(size..).next().map(|(&room, _)| room);
        let (row, room) = if let Some(room) = fullest {
            let places = open.get_mut(&room).expect("just found");
            let row = places.pop().expect("no list is left empty");
            if places.is_empty() {
                open.remove(&room);
            }
            (row, room)
        } else {
            rows.push(Vec::new());
            (rows.len() - 1, capacity)
        };
        rows[row].push(sample);
        if room > size {
            open.entry(room - size).or_default().push(row);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_is_in_one_row_and_no_row_is_over_full() {
        arbtest::arbtest(|u| {
            let capacity = u.int_in_range(1..=16)?;
            let n = u.int_in_range(0..=200u32)?;
            let sizes: Vec<usize> =
                (0..n).map(|_| u.int_in_range(1..=capacity)).collect::<Result<_, _>>()?;
            let samples: Vec<(usize, u32)> = sizes.iter().copied().zip(0..).collect();
            let rows = best_fit_decreasing(&samples, capacity);
            let mut seen: Vec<u32> = rows.iter().flatten().copied().collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..n).collect::<Vec<_>>());
            let filled: Vec<usize> =
                rows.iter().map(|row| row.iter().map(|&s| sizes[s as usize]).sum()).collect();
            assert!(filled.iter().all(|&f| f <= capacity), "{filled:?} of {capacity}");
            // Best fit leaves at most one row that is at most half full.
            let half = filled.iter().filter(|&&f| 2 * f <= capacity).count();
            assert!(half <= 1, "{filled:?} of {capacity}");
            Ok(())
        });
    }

    #[test]
    fn a_row_is_filled_by_what_fits_best() {
        let samples = [(3, 0), (5, 1), (2, 2), (6, 3), (2, 4)];
        assert_eq!(best_fit_decreasing(&samples, 8), [vec![3, 2], vec![1, 0], vec![4]]);
    }
}
