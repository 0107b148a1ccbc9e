//! Philox4x32-10: random bits as a pure function of a counter and a key.
//!
//! Idea: no state, so the mask of a token is the same whichever call, thread, micro-batch or
//! recomputation asks for it. The counter names the place (channel group, token, site, step) and
//! the key is the run's seed.
//!
//! Source: `[Salmon11]`.

/// What names one random tensor of a run; token and channel name its elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PhiloxKey {
    /// Seed of the run.
    pub seed: u64,
    /// Optimizer step.
    pub step: u32,
    /// Which random op of the model.
    pub site: u32,
}

impl PhiloxKey {
    /// Four random words for channels `4 * group .. 4 * group + 4` of a token.
    #[inline(always)]
    pub fn words(self, token: u32, group: u32) -> [u32; 4] {
        let key = [self.seed as u32, (self.seed >> 32) as u32];
        philox4x32_10([group, token, self.site, self.step], key)
    }
}

/// The ten-round bijection of `counter` under `key`.
#[inline(always)]
pub fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let product0 = u64::from(counter[0]) * 0xD251_1F53;
        let product1 = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (product1 >> 32) as u32 ^ counter[1] ^ key[0],
            product1 as u32,
            (product0 >> 32) as u32 ^ counter[3] ^ key[1],
            product0 as u32,
        ];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known-answer vectors published with Random123 (`kat_vectors`, philox 4x32 10).
    #[test]
    fn the_published_known_answers_come_out() {
        assert_eq!(
            philox4x32_10([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            philox4x32_10([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            philox4x32_10(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }
}
