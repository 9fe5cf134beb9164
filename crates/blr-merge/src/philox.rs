//! Random words as a function of a seed and a position: Philox4x32-10 (Salmon et al., *Parallel Random Numbers: As Easy
//! as 1, 2, 3*, SC 2011).
//!
//! What DARE keeps can so be computed again in every pass over a tensor, by any number of threads. tch-blr has the same
//! generator over vectors of counters, for its kernels; both are held to the published answers.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What is added to the key after each round.
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: u32 = 10;

fn philox([mut c0, mut c1, mut c2, mut c3]: [u32; 4], key: u64) -> [u32; 4] {
    let [mut k0, mut k1] = [key as u32, (key >> 32) as u32];
    for _ in 0..ROUNDS {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(c0);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(c2);
        [c0, c1, c2, c3] = [(b >> 32) as u32 ^ c1 ^ k0, b as u32, (a >> 32) as u32 ^ c3 ^ k1, a as u32];
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    [c0, c1, c2, c3]
}

/// The four words of a stream at a position.
pub(crate) fn words(seed: u64, position: u64) -> [u32; 4] {
    // The upper half of the counter has no meaning here; all ones is what these streams have always had, and results
    // follow from it.
    philox([position as u32, (position >> 32) as u32, u32::MAX, u32::MAX], seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors of Philox publish with Random123 (`kat_vectors`, philox4x32 10 rounds).
    #[test]
    fn published_answers() {
        let ones = u32::MAX;
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, expected) in [
            ([0; 4], 0, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], u64::MAX, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, 0x299f_31d0_a409_3822, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox(counter, key), expected);
        }
    }
}
