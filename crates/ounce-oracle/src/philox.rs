//! Philox4x32-10: random bits as a function of where they are needed.
//!
//! Written here a second time, apart from the kernels, so that a slip in either shows. A counter of
//! four words passes ten rounds; a round multiplies two of the words with constants, mixes the upper
//! halves of the products with the other two words and the round's key, and the key advances by
//! Weyl constants. Source: `[Salmon11]`.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const N_ROUNDS: u32 = 10;

/// Four random words for a counter and a key.
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    (0..N_ROUNDS).fold(counter, |[a, b, c, d], round| {
        let [key_0, key_1] = [0, 1].map(|i| key[i].wrapping_add(WEYL[i].wrapping_mul(round)));
        let [of_a, of_c] =
            [u64::from(a) * u64::from(MULTIPLIERS[0]), u64::from(c) * u64::from(MULTIPLIERS[1])];
        [high(of_c) ^ b ^ key_0, low(of_c), high(of_a) ^ d ^ key_1, low(of_a)]
    })
}

fn high(product: u64) -> u32 {
    (product >> 32) as u32
}

fn low(product: u64) -> u32 {
    product as u32
}

/// The random word of one element of a random op.
///
/// `token` counts along the step's token axis and `step` from 1, so that cutting the axis
/// elsewhere or running the op again gives the same word.
pub fn word(seed: u64, step: u64, site: u32, token: usize, channel: usize) -> u32 {
    let counter = [(channel / 4) as u32, token as u32, site, step as u32];
    philox4x32(counter, [low(seed), high(seed)])[channel % 4]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The three known answers for philox4x32 with 10 rounds that Random123 is published with.
    #[test]
    fn known_answers_of_random123() {
        let ones = u32::MAX;
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, words) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], [ones; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox4x32(counter, key), words);
        }
    }

    #[test]
    fn words_differ_in_every_coordinate() {
        let here = word(1, 1, 0, 5, 6);
        for other in [
            word(2, 1, 0, 5, 6),
            word(1 << 32 | 1, 1, 0, 5, 6),
            word(1, 2, 0, 5, 6),
            word(1, 1, 1, 5, 6),
            word(1, 1, 0, 6, 6),
            word(1, 1, 0, 5, 7),
            word(1, 1, 0, 5, 10),
        ] {
            assert_ne!(here, other);
        }
    }
}
