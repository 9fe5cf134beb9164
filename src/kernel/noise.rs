//! Standard normal noise as a function of a position, not of a generator's state.
//!
//! A draw is identified by (seed, step, sample, position of the weight). So it can be repeated instead of stored,
//! resumed without saving a generator, and does not depend on the order or number of threads that produce it.
//! The bits come from Philox4x32-10 (Salmon et al., SC 2011), the normals from them by Box and Muller's transform:
//!
//! ```text
//! u = (x + ½) / 2³²  ∈ (0, 1)          x: 32 random bits
//! z₀ = √(-2 ln u₀) cos 2πu₁,  z₁ = √(-2 ln u₀) sin 2πu₁        so |z| ≤ 6.8
//! ```
//!
//! The integers are the same on every device; the normals agree to the rounding of the device's log, sin and cos.

use super::Field;
use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Where an optimizer's standard normals come from; see [`Rule::noise`](crate::Rule::noise). Data-parallel ranks and
/// parallel chains take a generator each, [`Philox::fold_in`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Noise {
    /// A counter-based generator.
    Philox(Philox),
    /// Tensors given in advance, to replay a published trajectory.
    Given(Given),
}

/// The counter-based generator Philox4x32-10 with a 64-bit key (Salmon et al., SC 2011), and Box and Muller's transform.
///
/// A normal is a function of (seed, step, sample, position of the weight). So nothing is stored to resume, and the number
/// of threads does not matter. CPU and CUDA agree to the rounding of log, sin and cos.
///
/// Processes that draw side by side need a generator each, or they all draw the same: `Philox { seed }.fold_in(rank)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Philox {
    /// The key. Different seeds give independent streams; [`Philox::fold_in`] makes one from another and a number.
    pub seed: u64,
}

/// Standard normals given in advance as `noise[step][sample][parameter]`, all counted from 0, each of its parameter's
/// shape, parameters in the order of [`Params::names`](crate::Params::names). With antithetic sampling one sample serves
/// a pair. Not part of a checkpoint.
#[derive(Debug)]
pub struct Given(pub Vec<Vec<Vec<Tensor>>>);

impl From<Philox> for Noise {
    fn from(p: Philox) -> Self {
        Noise::Philox(p)
    }
}

impl From<Given> for Noise {
    fn from(g: Given) -> Self {
        Noise::Given(g)
    }
}

impl Philox {
    /// A seed drawn from libtorch's global generator, so that [`tch::manual_seed`] makes it reproducible.
    pub(crate) fn from_libtorch() -> Self {
        let words = Tensor::randint(1 << 32, [2], (Kind::Int64, Device::Cpu));
        Philox { seed: (words.int64_value(&[0]) as u64) << 32 | words.int64_value(&[1]) as u64 }
    }

    /// The generator of one process or chain among several, whose number is `data`.
    ///
    /// ```
    /// use tch_blr::Philox;
    /// let of = |rank| Philox { seed: 7 }.fold_in(rank);
    /// assert_eq!(of(3), of(3));
    /// assert_ne!(of(3), of(4));
    /// ```
    ///
    /// The new key is 64 of the 128 bits that the Philox block function, under the old key, gives at a counter made of
    /// `data`. All are u64: 0 counts as a number like others, and gives another generator than the one it is made from.
    /// Repeating it nests, for a chain on a rank: `p.fold_in(rank).fold_in(chain)`; the order counts.
    ///
    /// * **Certain:** the result is a function of (seed, data) alone. It lies in `seed`, so an optimizer's checkpoint holds
    ///   it, and whoever loads that file goes on with *its* noise: each rank has to load the file that it saved.
    /// * **Probable:** keys differ. As 64 random bits each, of R of them some two are equal with probability ≤ R²/2⁶⁵
    ///   (3·10⁻¹⁴ at R = 1000), and those two would draw the same.
    /// * **Not proven:** that streams of different keys are independent. It is what Philox was designed and tested for
    ///   (Salmon et al., SC 2011), and `tests/normals.rs` looks for correlations between them.
    ///
    /// Noise never uses the blocks that keys are made from, unless a step has 2³² samples.
    #[must_use]
    pub fn fold_in(self, data: u64) -> Self {
        // A draw's counter is (48 bits of position, 48 of step, 32 of sample). That uses up all 128 bits, so no value is
        // left for keys alone; they take the last sample, and a part of its steps.
        let counter = [data as u32, (data >> 32) as u32, KEYS, u32::MAX].map(|word| [word]);
        let [[low], [high], ..] = philox(counter, self.seed);
        Philox { seed: u64::from(high) << 32 | u64::from(low) }
    }
}

/// The position of one parameter's noise.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draw {
    pub step: u64,
    pub sample: u64,
    /// Index of the parameter.
    pub parameter: usize,
    /// Number of groups of normals before the parameter.
    pub group: u64,
}

/// The noise of one parameter: where it will be generated, or what it is.
#[derive(Debug)]
pub(crate) enum Drawn {
    Counter { seed: u64, at: Draw },
    Tensor(Tensor),
}

impl Drawn {
    /// As a tensor like `like`.
    pub(crate) fn tensor(self, like: &Tensor) -> Tensor {
        match self {
            Drawn::Counter { seed, at } => super::normals(seed, at, like),
            Drawn::Tensor(z) => z,
        }
    }

    /// As an input of the kernel.
    pub(crate) fn field(&self) -> Field<'_> {
        match self {
            Drawn::Counter { seed, at } => Field::Noise { seed: *seed, at: *at },
            Drawn::Tensor(z) => Field::Tensor(z),
        }
    }
}

/// Third word of the counters that [`Philox::fold_in`] uses, where draws have the low half of the step.
const KEYS: u32 = u32::from_be_bytes(*b"fold");

/// How many steps have noise of their own.
pub(crate) const STEPS: u64 = 1 << 48;

/// Groups of normals that a tensor of `n` elements takes.
pub(crate) fn groups(n: usize) -> u64 {
    n.div_ceil(GROUP) as u64
}

impl Noise {
    /// Standard normals for a parameter.
    pub(crate) fn draw(&self, at: Draw, like: &Tensor) -> Result<Drawn> {
        let z = match self {
            Noise::Philox(p) => return Ok(Drawn::Counter { seed: p.seed, at }),
            Noise::Given(Given(z)) => z,
        };
        let (step, sample) = (at.step as usize, at.sample as usize);
        let z = z.get(step).and_then(|s| s.get(sample)).and_then(|s| s.get(at.parameter)).ok_or_else(|| {
            Error::Noise(format!(
                "nothing was given for step {step}, sample {sample}, parameter {} (counted from 0)",
                at.parameter
            ))
        })?;
        if z.size() != like.size() {
            return Err(Error::Noise(format!(
                "shape {:?} was given for step {step}, sample {sample}, parameter {}: expected {:?}",
                z.size(),
                at.parameter,
                like.size()
            )));
        }
        Ok(Drawn::Tensor(z.to_kind(like.kind()).to_device(like.device()).contiguous()))
    }
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: u32 = 10;

fn round_keys(seed: u64) -> impl Iterator<Item = [u32; 2]> {
    let key = [seed as u32, (seed >> 32) as u32];
    (0..ROUNDS).map(move |i| std::array::from_fn(|j| key[j].wrapping_add(i.wrapping_mul(WEYL[j]))))
}

/// Counters that are worked on together.
const W: usize = 16;
/// Normals of W counters. Position p of a draw has word ⌊p/W⌋ mod 4 of counter W·⌊p/64⌋ + (p mod W).
pub(crate) const GROUP: usize = 4 * W;

/// Counters of a group: 48 bits of counter, 48 of step, 32 of sample, as `[word][counter]`.
#[inline(always)]
fn counters(at: Draw, group: u64) -> [[u32; W]; 4] {
    let first = (at.group + group) * W as u64;
    // W divides 2³², so only the low word differs within a group.
    let high = (first >> 32) as u32 & 0xFFFF | ((at.step >> 32) as u32) << 16;
    let low = std::array::from_fn(|l| first as u32 + l as u32);
    [low, [high; W], [at.step as u32; W], [at.sample as u32; W]]
}

/// Four random words for each counter.
#[allow(clippy::needless_range_loop)] // four arrays at once, for the vectoriser
#[inline(always)]
fn philox<const W: usize>(counters: [[u32; W]; 4], seed: u64) -> [[u32; W]; 4] {
    // In 64 bits, of which the upper half is anything: a product of lower halves is one vector instruction, and no word
    // needs to be moved between lanes.
    const LOW: u64 = 0xFFFF_FFFF;
    let mut c = [[0; W]; 4];
    let mut words = [[0; W]; 4];
    // Loops, because `map` of arrays is not always inlined.
    for (c, counters) in c.iter_mut().zip(&counters) {
        for (c, counter) in c.iter_mut().zip(counters) {
            *c = u64::from(*counter);
        }
    }
    for [k0, k1] in round_keys(seed) {
        for l in 0..W {
            let a = u64::from(MULTIPLIERS[0]) * (c[0][l] & LOW);
            let b = u64::from(MULTIPLIERS[1]) * (c[2][l] & LOW);
            c[0][l] = (b >> 32) ^ c[1][l] ^ u64::from(k0);
            c[2][l] = (a >> 32) ^ c[3][l] ^ u64::from(k1);
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

/// Four random words of a stream that is read in sequence; no elementwise draw has its sample number.
pub(crate) fn words(seed: u64, counter: u64) -> [u32; 4] {
    philox([[counter as u32], [(counter >> 32) as u32], [u32::MAX], [u32::MAX]], seed).map(|[word]| word)
}

const TO_UNIT: f64 = 1.0 / 4_294_967_296.0;

/// Numbers that Box and Muller's transform is implemented for.
pub(super) trait Normals: Copy + Default {
    /// Two standard normals from two random words.
    fn box_muller(x0: u32, x1: u32) -> [Self; 2];

    /// Standard normals for the positions from 64·`group` on; N is a multiple of 64.
    #[inline(always)]
    fn normals<const N: usize>(seed: u64, at: Draw, group: u64, z: &mut [Self; N]) {
        // Two loops, so that the CPU has several independent groups at hand in each.
        let mut bits = [0; N];
        for (i, bits) in bits.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            let words = philox(counters(at, group + i as u64), seed);
            for (bits, words) in bits.as_chunks_mut::<W>().0.iter_mut().zip(&words) {
                *bits = *words;
            }
        }
        let (pairs, words) = (z.as_chunks_mut::<{ 2 * W }>().0, bits.as_chunks::<{ 2 * W }>().0);
        for (z, x) in pairs.iter_mut().zip(words) {
            for l in 0..W {
                [z[l], z[W + l]] = Self::box_muller(x[l], x[W + l]);
            }
        }
    }
}

impl Normals for f64 {
    #[inline(always)]
    fn box_muller(x0: u32, x1: u32) -> [f64; 2] {
        let [u0, u1] = [x0, x1].map(|x| (f64::from(x) + 0.5) * TO_UNIT);
        let r = (-2.0 * u0.ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * u1).sin_cos();
        [r * cos, r * sin]
    }
}

impl Normals for f32 {
    #[inline(always)]
    fn box_muller(x0: u32, x1: u32) -> [f32; 2] {
        let r = minus_two_ln(x0).sqrt();
        let [sin, cos] = sin_cos_turn(x1);
        [r * cos, r * sin]
    }
}

// The coefficients below minimise the largest relative error over the interval (Lawson's algorithm on 4000 points).

/// -2 ln((x+½)/2³²) ≥ 0 by a polynomial, so that it runs in vector registers: (x+½) = 2ᵏ·m with m in [√½, √2), and with
/// s = (m-1)/(m+1), ln m = 2 artanh s = 2s(1 + s²/3 + s⁴/5 + …), here to 10⁻⁹ of it.
#[inline(always)]
fn minus_two_ln(x: u32) -> f32 {
    const SQRT_HALF: u32 = 0x3F35_04F3;
    let bits = (x as f32 + 0.5).to_bits();
    let k = bits.wrapping_sub(SQRT_HALF) as i32 >> 23;
    let m = f32::from_bits(bits.wrapping_sub((k << 23) as u32));
    // Near u = 1 the rounding of x to f32 would be all that is left of ln u; there 1-u comes off the integer.
    let d = if k == 32 { (!x as f32 + 0.5) * -(TO_UNIT as f32) } else { m - 1.0 };
    let s = d / (m + 1.0);
    let t = s * s;
    let series = -4.0 + t * (-4.0 * 0.333_333_9 + t * (-4.0 * 0.199_887_71 + t * (-4.0 * 0.149_358_64)));
    s * series + (32 - k) as f32 * (2.0 * std::f32::consts::LN_2)
}

/// sin and cos of 2πx/2³²: the nearest quarter of a turn comes off the integer, without rounding, and polynomials to
/// 4·10⁻⁹ serve what is left in [-π/4, π/4]. (The ½ of u is below the rounding.)
#[inline(always)]
fn sin_cos_turn(x: u32) -> [f32; 2] {
    const TO_RADIANS: f32 = (std::f64::consts::TAU * TO_UNIT) as f32;
    const SIGN: u32 = 1 << 31;
    let quarter = x.wrapping_add(1 << 29);
    let r = x.wrapping_sub(quarter & (3 << 30)) as i32 as f32 * TO_RADIANS;
    let t = r * r;
    let sin = r + r * (t * (-0.166_666_55 + t * (0.008_332_18 + t * -0.000_195_17)));
    let cos = 1.0 + t * (-0.5 + t * (0.041_666_647 + t * (-0.001_388_736_8 + t * 0.000_024_438_45)));
    let odd = quarter & (1 << 30) != 0;
    let (a, b) = if odd { (cos, sin) } else { (sin, cos) };
    // sin is negative in the third and fourth quarter, cos in the second and third.
    let signed = |x: f32, sign: u32| f32::from_bits(x.to_bits() ^ (sign & SIGN));
    [signed(a, quarter), signed(b, quarter.wrapping_add(1 << 30))]
}

/// The same numbers by integer operations of libtorch, for memory that the CPU does not reach; in f64, then rounded.
pub(super) fn normals(seed: u64, at: Draw, like: &Tensor) -> Tensor {
    const LOW: i64 = 0xFFFF_FFFF;
    let n = like.numel();
    let integers = (Kind::Int64, like.device());
    let start = (at.group * W as u64) as i64;
    let counter = Tensor::arange_start(start, start + (groups(n) * W as u64) as i64, integers);
    let step_high = ((at.step >> 32) as i64 & 0xFFFF) << 16;
    let mut c = [
        counter.bitwise_and(LOW),
        counter.bitwise_right_shift_tensor_scalar(32).bitwise_and(0xFFFF).bitwise_or(step_high),
        counter.full_like(i64::from(at.step as u32)),
        counter.full_like(i64::from(at.sample as u32)),
    ];
    for [k0, k1] in round_keys(seed) {
        // The product wraps as a signed number, which leaves its 64 bits as they are.
        let product = |m: u32, x: &Tensor| x * i64::from(m);
        let high = |x: &Tensor| x.bitwise_right_shift_tensor_scalar(32).bitwise_and(LOW);
        let (a, b) = (product(MULTIPLIERS[0], &c[0]), product(MULTIPLIERS[1], &c[2]));
        c = [
            high(&b).bitwise_xor_tensor(&c[1]).bitwise_xor(i64::from(k0)),
            b.bitwise_and(LOW),
            high(&a).bitwise_xor_tensor(&c[3]).bitwise_xor(i64::from(k1)),
            a.bitwise_and(LOW),
        ];
    }
    let u = c.map(|x| (x.to_kind(Kind::Double) + 0.5) * TO_UNIT);
    let polar = |u0: &Tensor, u1: &Tensor| {
        let (r, angle) = ((u0.log() * -2.0).sqrt(), u1 * std::f64::consts::TAU);
        [&r * angle.cos(), &r * angle.sin()]
    };
    let [z0, z1] = polar(&u[0], &u[1]);
    let [z2, z3] = polar(&u[2], &u[3]);
    let z = Tensor::stack(&[z0, z1, z2, z3].map(|z| z.reshape([-1, W as i64])), 1);
    z.flatten(0, -1).narrow(0, 0, n as i64).to_kind(like.kind()).reshape(like.size())
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Draw = Draw { step: 3, sample: 1, parameter: 0, group: 7 };

    fn seeded<T: Normals + Into<f64>>(seed: u64, at: Draw, n: usize) -> Vec<f64> {
        let mut z = [T::default(); 4 * GROUP];
        let chunks = (0..n.div_ceil(z.len())).flat_map(|i| {
            T::normals(seed, at, 4 * i as u64, &mut z);
            z
        });
        chunks.map(Into::into).take(n).collect()
    }

    fn draw(at: Draw, n: usize) -> Vec<f64> {
        seeded::<f64>(42, at, n)
    }

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
            assert_eq!(philox(counter.map(|word: u32| [word]), key), expected.map(|word: u32| [word]));
        }
    }

    /// Philox4x32-10 written down from its definition, one number after the other: with L and R the halves of a block, a
    /// round multiplies each half's first word and mixes the high part into the other half.
    fn one_block(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
        (0..10).fold(counter, |[l0, r0, l1, r1], round| {
            let key = [(key[0], 0x9E37_79B9_u64), (key[1], 0xBB67_AE85)]
                .map(|(k, weyl)| ((u64::from(k) + round * weyl) % (1 << 32)) as u32);
            let [p0, p1] = [u64::from(l0) * 0xD251_1F53, u64::from(l1) * 0xCD9E_8D57];
            let split = |p: u64| ((p / (1 << 32)) as u32, (p % (1 << 32)) as u32);
            let ((high0, low0), (high1, low1)) = (split(p0), split(p1));
            [high1 ^ r0 ^ key[0], low1, high0 ^ r1 ^ key[1], low0]
        })
    }

    #[test]
    fn folding_in_is_the_block_function_at_a_counter_of_its_own() {
        // One of the published answers first, for the definition above.
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let answer = [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1];
        assert_eq!(one_block(pi, [0xa409_3822, 0x299f_31d0]), answer);
        for (seed, data) in [(0, 0), (42, 1), (u64::MAX, u64::MAX), (0x299f_31d0_a409_3822, 0x85a3_08d3_243f_6a88)] {
            let [seed_low, seed_high, low, high] = [seed, seed >> 32, data, data >> 32].map(|x| x as u32);
            let [k0, k1, ..] = one_block([low, high, 0x666F_6C64, 0xFFFF_FFFF], [seed_low, seed_high]);
            assert_eq!(Philox { seed }.fold_in(data).seed, u64::from(k0) + u64::from(k1) * (1 << 32), "{seed} {data}");
        }
    }

    /// Each two of the 3·2¹⁶ + 1 keys below are equal with probability 2⁻⁶⁴: altogether 10⁻⁹.
    #[test]
    fn ranks_have_seeds_of_their_own() {
        let (p, ranks) = (Philox { seed: 42 }, 1 << 16);
        let near = (0..ranks).map(|rank| p.fold_in(rank));
        let far = (0..ranks).map(|rank| p.fold_in(rank << 32 | 1 << 31));
        let nested = (0..ranks).map(|i| p.fold_in(i / 256).fold_in(i % 256));
        let seeds: std::collections::HashSet<u64> = near.chain(far).chain(nested).chain([p]).map(|p| p.seed).collect();
        assert_eq!(seeds.len() as u64, 3 * ranks + 1);
        assert_ne!(p.fold_in(1).fold_in(2), p.fold_in(2).fold_in(1));
        // The bits of the keys are balanced: each is set in half of the ranks, within 5 of its standard errors.
        for bit in 0..64 {
            let set = (0..ranks).filter(|rank| p.fold_in(*rank).seed >> bit & 1 == 1).count() as f64;
            assert!((set - ranks as f64 / 2.0).abs() < 5.0 * (ranks as f64 / 4.0).sqrt(), "bit {bit}: {set}");
        }
    }

    #[test]
    fn a_draw_is_a_function_of_its_position() {
        assert_eq!(draw(AT, 100), draw(AT, 100));
        // A longer draw begins with the shorter one, and starts where its group says.
        assert_eq!(draw(AT, 100)[..], draw(AT, 300)[..100]);
        assert_eq!(draw(Draw { group: 8, ..AT }, 64)[..], draw(AT, 128)[64..]);
        let others = [
            Draw { step: 4, ..AT },
            Draw { step: AT.step + (1 << 32), ..AT },
            Draw { sample: 2, ..AT },
            Draw { group: AT.group + (1 << 32), ..AT },
        ];
        for other in others {
            assert!(draw(other, 70).iter().zip(draw(AT, 70)).all(|(a, b)| *a != b), "{other:?}");
        }
        assert_ne!(seeded::<f64>(43, AT, 8), draw(AT, 8));
    }

    /// The polynomials of the f32 normals against the library's functions in f64.
    #[test]
    fn single_precision_normals_are_those_of_double_precision() {
        let n = 1 << 20;
        let (single, double) = (seeded::<f32>(42, AT, n), draw(AT, n));
        let worst = single.iter().zip(&double).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f64::max);
        assert!(worst < 8.0 * f64::from(f32::EPSILON), "{worst:e}");
        // The ends of the range.
        for x in [0, 1, 2, 1 << 24, 1 << 31, u32::MAX - 1, u32::MAX] {
            for y in [0, 1 << 29, 1 << 30, 1 << 31, 3 << 30, u32::MAX] {
                for (a, b) in f32::box_muller(x, y).into_iter().zip(f64::box_muller(x, y)) {
                    assert!((f64::from(a) - b).abs() < 8.0 * f64::from(f32::EPSILON), "{x} {y}: {a} {b}");
                }
            }
        }
    }

    #[test]
    fn tensor_operations_give_the_same_numbers() {
        let like = Tensor::zeros([3, 70], (Kind::Double, Device::Cpu));
        for at in [AT, Draw { step: 5 << 32 | 9, sample: u64::from(u32::MAX), parameter: 0, group: (3 << 28) + 1 }] {
            let here = Tensor::from_slice(&draw(at, 210)).reshape([3, 70]);
            let there = normals(42, at, &like);
            assert!((here - there).abs().max().double_value(&[]) < 1e-13);
        }
    }

    /// Kolmogorov-Smirnov at 10⁵ draws: the statistic exceeds 1.95/√n with probability 0.1 % for a right generator,
    /// and the seed is fixed, so that this test always gives the same answer.
    #[test]
    fn normals_are_standard_normal() {
        let n = 100_000;
        let mut z = seeded::<f32>(42, Draw { step: 0, sample: 0, parameter: 0, group: 0 }, n);
        let mean = z.iter().sum::<f64>() / n as f64;
        let lag = z.windows(2).map(|w| w[0] * w[1]).sum::<f64>() / n as f64;
        assert!(mean.abs() < 4.0 / (n as f64).sqrt() && lag.abs() < 4.0 / (n as f64).sqrt(), "{mean} {lag}");
        z.sort_by(f64::total_cmp);
        let cdf = Vec::<f64>::try_from((Tensor::from_slice(&z) / 2f64.sqrt()).erf() * 0.5 + 0.5).unwrap();
        let ks = cdf.iter().enumerate().map(|(i, p)| (p - (i as f64 + 0.5) / n as f64).abs()).fold(0.0, f64::max);
        assert!(ks < 1.95 / (n as f64).sqrt(), "KS statistic {ks}");
    }

    #[test]
    fn given_noise_is_checked() {
        let z = Given(vec![vec![vec![Tensor::from_slice(&[1.0, 2.0])]]]);
        let like = Tensor::zeros([2], (Kind::Float, Device::Cpu));
        let first = Draw { step: 0, sample: 0, parameter: 0, group: 0 };
        let noise = Noise::from(z);
        let Ok(Drawn::Tensor(got)) = noise.draw(first, &like) else { panic!("given noise is a tensor") };
        assert_eq!(
            (got.kind(), Vec::<f64>::try_from(got.to_kind(Kind::Double)).unwrap()),
            (Kind::Float, vec![1.0, 2.0])
        );
        let missing = noise.draw(Draw { sample: 1, ..first }, &like).unwrap_err();
        assert!(missing.to_string().contains("sample 1"), "{missing}");
        let shape = noise.draw(first, &like.narrow(0, 0, 1)).unwrap_err();
        assert!(shape.to_string().contains("expected [1]"), "{shape}");
    }
}
