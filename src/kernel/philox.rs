//! Random bits as a function of a counter and a key: Philox4x32-10 (Salmon et al., SC 2011).
//!
//! Here belongs what a counter is made of and how its four random words follow, in integers that are the same on every
//! device. What the bits become is in `normal.rs`; whose noise they are, in `noise.rs`.

use super::noise::Draw;

// From the definition of Philox4x32 (Salmon et al., SC 2011), as are the Weyl constants, the golden ratio and √3 - 1.
// Another number here would be another generator, and files would resume with other noise.
pub(super) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
// The authors' default; seven are the fewest that passed their tests.
const ROUNDS: u32 = 10;

pub(super) fn round_keys(seed: u64) -> impl Iterator<Item = [u32; 2]> {
    let key = [seed as u32, (seed >> 32) as u32];
    (0..ROUNDS).map(move |i| std::array::from_fn(|j| key[j].wrapping_add(i.wrapping_mul(WEYL[j]))))
}

/// Groups of normals that a tensor of `n` elements takes.
pub(crate) fn groups(n: usize) -> u64 {
    n.div_ceil(GROUP) as u64
}

/// Counters that are worked on together: 16 words fill the widest vector register. The number is part of what a draw
/// is, so it must not follow the CPU.
pub(super) const W: usize = 16;
/// Normals of W counters. Position p of a draw has word ⌊p/W⌋ mod 4 of counter W·⌊p/64⌋ + (p mod W).
pub(crate) const GROUP: usize = 4 * W;

/// Counters of a group: 48 bits of counter, 48 of step, 32 of sample, as `[word][counter]`.
#[inline(always)]
pub(super) fn counters(at: Draw, group: u64) -> [[u32; W]; 4] {
    let first = (at.group + group) * W as u64;
    // W divides 2³², so only the low word differs within a group.
    let high = (first >> 32) as u32 & 0xFFFF | ((at.step >> 32) as u32) << 16;
    let low = std::array::from_fn(|l| first as u32 + l as u32);
    [low, [high; W], [at.step as u32; W], [at.sample as u32; W]]
}

/// The keys of the rounds, in each half of 64 bits.
pub(super) type Keys = [[u64; 2]; ROUNDS as usize];

pub(super) fn keys(seed: u64) -> Keys {
    let mut keys = Keys::default();
    for (both, round) in keys.iter_mut().zip(round_keys(seed)) {
        // With nothing in the upper half, which is of no use below, the compiler would shift after it mixes a key in,
        // and need an instruction more.
        *both = round.map(|key| u64::from(key) << 32 | u64::from(key));
    }
    keys
}

/// Four random words for each counter.
#[allow(clippy::needless_range_loop)] // four arrays at once, for the vectoriser
#[inline(always)]
pub(super) fn philox<const N: usize>(counters: [[u32; N]; 4], keys: &Keys) -> [[u32; N]; 4] {
    // In 64 bits, of which the upper half is anything: a product of lower halves is one vector instruction, and no word
    // needs to be moved between lanes.
    const LOW: u64 = 0xFFFF_FFFF;
    let mut c = [[0; N]; 4];
    let mut words = [[0; N]; 4];
    // Loops, because `map` of arrays is not always inlined.
    for (c, counters) in c.iter_mut().zip(&counters) {
        for (c, counter) in c.iter_mut().zip(counters) {
            *c = u64::from(*counter);
        }
    }
    for [k0, k1] in keys {
        for l in 0..N {
            let a = u64::from(MULTIPLIERS[0]) * (c[0][l] & LOW);
            let b = u64::from(MULTIPLIERS[1]) * (c[2][l] & LOW);
            c[0][l] = (b >> 32) ^ c[1][l] ^ k0;
            c[2][l] = (a >> 32) ^ c[3][l] ^ k1;
            c[1][l] = b;
            c[3][l] = a;
        }
    }
    for (words, c) in words.iter_mut().zip(&c) {
        for (word, c) in words.iter_mut().zip(c) {
            *word = *c as u32;
        }
    }
    words
}

/// Who reads numbers in sequence. Each has a stream of its own under one seed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stream {
    /// Scores of examples.
    Scores,
    /// Places in a reservoir.
    Reservoir,
    /// Draws from exponential families.
    Family,
    /// What conformal scores are randomized by.
    Conformal,
}

/// Four random words of a stream that is read in sequence; no elementwise draw has its sample number.
pub(crate) fn words(seed: u64, stream: Stream, counter: u64) -> [u32; 4] {
    philox([[counter as u32], [(counter >> 32) as u32], [u32::MAX - stream as u32], [u32::MAX]], &keys(seed))
        .map(|[word]| word)
}

/// 52 random bits as a number in (0, 1).
pub(crate) fn uniform(seed: u64, stream: Stream, counter: u64) -> f64 {
    let [high, low, ..] = words(seed, stream, counter);
    // 52 and not 53 bits, so that the half that keeps 0 and 1 out is exact in f64.
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 12;
    (bits as f64 + 0.5) / (1u64 << 52) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors of Philox publish with Random123 (`kat_vectors`, philox4x32 10 rounds).
    #[test]
    fn known_answers() {
        let ones = u32::MAX;
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, expected) in [
            ([0; 4], 0, [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([ones; 4], u64::MAX, [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, 0x299f_31d0_a409_3822, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox(counter.map(|word: u32| [word]), &keys(key)), expected.map(|word: u32| [word]));
        }
    }
}
