//! XXH64: a 64-bit content hash for caches and fingerprints. It detects damage and change; it is no defence against
//! someone who forges files.
//!
//! Idea: four lanes of multiply-rotate over 32-byte stripes, then a final mix. One pass, 72 bytes of state.
//! Source: the xxHash fast digest algorithm's specification, version 0.1.1 (Collet).

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::error::IoError;
use crate::json::open_regular;

/// Bytes of the buffer through which files are read.
const CHUNK_BYTES: usize = 64 << 10;

const P1: u64 = 0x9E37_79B1_85EB_CA87;
const P2: u64 = 0xC2B2_AE3D_27D4_EB4F;
const P3: u64 = 0x1656_67B1_9E37_79F9;
const P4: u64 = 0x85EB_CA77_C2B2_AE63;
const P5: u64 = 0x27D4_EB2F_1656_67C5;

/// Fingerprint of a data file as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceHash {
    /// Bytes read.
    pub n_bytes: u64,
    /// XXH64 of the bytes.
    pub hash: u64,
}

/// A running hash with seed 0.
#[derive(Debug, Clone)]
pub(crate) struct Xxh64 {
    lanes: [u64; 4],
    pending: [u8; 32],
    n_pending: usize,
    n_bytes: u64,
}

impl Xxh64 {
    pub(crate) fn new() -> Self {
        let lanes = [P1.wrapping_add(P2), P2, 0, 0u64.wrapping_sub(P1)];
        Self { lanes, pending: [0; 32], n_pending: 0, n_bytes: 0 }
    }

    pub(crate) fn update(&mut self, mut bytes: &[u8]) {
        self.n_bytes += bytes.len() as u64;
        if self.n_pending > 0 {
            let n = bytes.len().min(32 - self.n_pending);
            self.pending[self.n_pending..self.n_pending + n].copy_from_slice(&bytes[..n]);
            self.n_pending += n;
            bytes = &bytes[n..];
            if self.n_pending < 32 {
                return;
            }
            let stripe = self.pending;
            self.stripe(&stripe);
        }
        let (stripes, rest) = bytes.as_chunks::<32>();
        for stripe in stripes {
            self.stripe(stripe);
        }
        self.pending[..rest.len()].copy_from_slice(rest);
        self.n_pending = rest.len();
    }

    /// The hash of everything so far.
    pub(crate) fn digest(&self) -> u64 {
        let [a, b, c, d] = self.lanes;
        let mut hash = if self.n_bytes < 32 {
            P5
        } else {
            let mut hash = a.rotate_left(1);
            for (lane, by) in [(b, 7), (c, 12), (d, 18)] {
                hash = hash.wrapping_add(lane.rotate_left(by));
            }
            for lane in self.lanes {
                hash = (hash ^ round(0, lane)).wrapping_mul(P1).wrapping_add(P4);
            }
            hash
        };
        hash = hash.wrapping_add(self.n_bytes);
        let (words, rest) = self.pending[..self.n_pending].as_chunks::<8>();
        for &word in words {
            hash ^= round(0, u64::from_le_bytes(word));
            hash = hash.rotate_left(27).wrapping_mul(P1).wrapping_add(P4);
        }
        let (halves, rest) = rest.as_chunks::<4>();
        for &half in halves {
            hash ^= u64::from(u32::from_le_bytes(half)).wrapping_mul(P1);
            hash = hash.rotate_left(23).wrapping_mul(P2).wrapping_add(P3);
        }
        for &byte in rest {
            hash ^= u64::from(byte).wrapping_mul(P5);
            hash = hash.rotate_left(11).wrapping_mul(P1);
        }
        hash = (hash ^ (hash >> 33)).wrapping_mul(P2);
        hash = (hash ^ (hash >> 29)).wrapping_mul(P3);
        hash ^ (hash >> 32)
    }

    fn stripe(&mut self, stripe: &[u8; 32]) {
        let (words, _) = stripe.as_chunks::<8>();
        for (lane, &word) in self.lanes.iter_mut().zip(words) {
            *lane = round(*lane, u64::from_le_bytes(word));
        }
    }
}

/// Length and hash of a file, read through a small buffer.
pub(crate) fn hash_file(path: &Path) -> Result<(u64, u64), IoError> {
    let file = open_regular(path)?;
    let mut hash = Xxh64::new();
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut n_bytes = 0;
    loop {
        let n = file.read_at(&mut buffer, n_bytes).map_err(|e| IoError::reading(path, e))?;
        if n == 0 {
            return Ok((n_bytes, hash.digest()));
        }
        hash.update(&buffer[..n]);
        n_bytes += n as u64;
    }
}

fn round(lane: u64, word: u64) -> u64 {
    lane.wrapping_add(word.wrapping_mul(P2)).rotate_left(31).wrapping_mul(P1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(bytes: &[u8]) -> u64 {
        let mut hash = Xxh64::new();
        hash.update(bytes);
        hash.digest()
    }

    #[test]
    fn the_published_test_vectors_come_out() {
        assert_eq!(hash(b""), 0xEF46_DB37_51D8_E999);
        assert_eq!(hash(b"a"), 0xD24E_C4F1_A98C_6E5B);
        assert_eq!(hash(b"abc"), 0x44BC_2CF5_AD77_0999);
        assert_eq!(hash(b"Nobody inspects the spammish repetition"), 0xFBCE_A83C_8A37_8BF1);
    }

    #[test]
    fn the_cut_of_the_input_does_not_matter() {
        let bytes: Vec<u8> = (0..200u8).map(|i| i.wrapping_mul(37)).collect();
        for first in 0..bytes.len() {
            let mut pieces = Xxh64::new();
            pieces.update(&bytes[..first]);
            pieces.update(&bytes[first..first + (bytes.len() - first) / 3]);
            pieces.update(&bytes[first + (bytes.len() - first) / 3..]);
            assert_eq!(pieces.digest(), hash(&bytes), "cut at {first}");
        }
    }
}
