//! Standard normal noise as a function of a position, not of a generator's state.
//!
//! A draw is identified by (seed, step, sample, block of four weights). So it can be repeated instead of stored,
//! resumed without saving a generator, and does not depend on the order or number of threads that produce it.
//! The bits come from Philox4x32-10 (Salmon et al., SC 2011), the normals from them by Box and Muller's transform:
//!
//! ```text
//! u = (x + ½) / 2³²  ∈ (0, 1)          x: 32 random bits
//! z₀ = √(-2 ln u₀) cos 2πu₁,  z₁ = √(-2 ln u₀) sin 2πu₁        so |z| ≤ 6.8
//! ```
//!
//! The integers are the same on every device; the normals agree to the rounding of the device's log, sin and cos.

use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Where an optimizer's standard normals come from; see [`Rule::noise`](crate::Rule::noise).
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Philox {
    /// The key. Different seeds give independent streams.
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
}

/// The position of one parameter's noise.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draw {
    pub step: u64,
    pub sample: u64,
    /// Index of the parameter.
    pub parameter: usize,
    /// Number of blocks of four elements before the parameter.
    pub block: u64,
}

/// How many steps have noise of their own.
pub(crate) const STEPS: u64 = 1 << 48;

/// Blocks of four normals that a tensor of `n` elements takes.
pub(crate) fn blocks(n: usize) -> u64 {
    n.div_ceil(4) as u64
}

/// Standard normals of the shape, kind (f32 or f64) and device of `like`.
pub(crate) fn normal(noise: &Noise, at: Draw, like: &Tensor) -> Result<Tensor> {
    let options = (like.kind(), like.device());
    match noise {
        Noise::Philox(p) if like.device() == Device::Cpu => {
            let z = philox_normals(p.seed, at, like.numel());
            Ok(Tensor::from_slice(&z).to_kind(like.kind()).reshape(like.size()))
        }
        Noise::Philox(p) => Ok(philox_normals_on_device(p.seed, at, like)),
        Noise::Given(Given(z)) => {
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
            Ok(z.to_kind(options.0).to_device(options.1))
        }
    }
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: u32 = 10;

fn round_keys(seed: u64) -> impl Iterator<Item = [u32; 2]> {
    let key = [seed as u32, (seed >> 32) as u32];
    (0..ROUNDS).map(move |i| std::array::from_fn(|j| key[j].wrapping_add(i.wrapping_mul(WEYL[j]))))
}

fn philox(mut c: [u32; 4], seed: u64) -> [u32; 4] {
    for [k0, k1] in round_keys(seed) {
        let wide = |m: u32, x: u32| u64::from(m) * u64::from(x);
        let (a, b) = (wide(MULTIPLIERS[0], c[0]), wide(MULTIPLIERS[1], c[2]));
        c = [(b >> 32) as u32 ^ c[1] ^ k0, b as u32, (a >> 32) as u32 ^ c[3] ^ k1, a as u32];
    }
    c
}

/// The counter of block `i` after the draw's first: 48 bits of block, 48 of step, 32 of sample.
fn counter(at: Draw, i: u64) -> [u32; 4] {
    let block = at.block + i;
    let high = (block >> 32) as u32 & 0xFFFF | ((at.step >> 32) as u32) << 16;
    [block as u32, high, at.step as u32, at.sample as u32]
}

const TO_UNIT: f64 = 1.0 / 4_294_967_296.0;

fn philox_normals(seed: u64, at: Draw, n: usize) -> Vec<f64> {
    let mut z = Vec::with_capacity(n + 3);
    for i in 0..blocks(n) {
        let u = philox(counter(at, i), seed).map(|x| (f64::from(x) + 0.5) * TO_UNIT);
        for [u0, u1] in [[u[0], u[1]], [u[2], u[3]]] {
            let r = (-2.0 * u0.ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * u1).sin_cos();
            z.extend([r * cos, r * sin]);
        }
    }
    z.truncate(n);
    z
}

/// The same numbers by integer operations of libtorch, for memory that the CPU does not reach.
fn philox_normals_on_device(seed: u64, at: Draw, like: &Tensor) -> Tensor {
    const LOW: i64 = 0xFFFF_FFFF;
    let n = like.numel();
    let integers = (Kind::Int64, like.device());
    let start = at.block as i64;
    let block = Tensor::arange_start(start, start + blocks(n) as i64, integers);
    let [_, _, step, sample] = counter(at, 0).map(i64::from);
    let step_high = ((at.step >> 32) as i64 & 0xFFFF) << 16;
    let mut c = [
        block.bitwise_and(LOW),
        block.bitwise_right_shift_tensor_scalar(32).bitwise_and(0xFFFF).bitwise_or(step_high),
        block.full_like(step),
        block.full_like(sample),
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
    Tensor::stack(&[z0, z1, z2, z3], 1).flatten(0, 1).narrow(0, 0, n as i64).to_kind(like.kind()).reshape(like.size())
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Draw = Draw { step: 3, sample: 1, parameter: 0, block: 7 };

    fn draw(at: Draw, n: usize) -> Vec<f64> {
        philox_normals(42, at, n)
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
            assert_eq!(philox(counter, key), expected);
        }
    }

    #[test]
    fn a_draw_is_a_function_of_its_position() {
        assert_eq!(draw(AT, 10), draw(AT, 10));
        // A longer draw begins with the shorter one, and starts where its block says.
        assert_eq!(draw(AT, 10)[..], draw(AT, 23)[..10]);
        assert_eq!(draw(Draw { block: 8, ..AT }, 6)[..], draw(AT, 10)[4..]);
        let others = [
            Draw { step: 4, ..AT },
            Draw { step: AT.step + (1 << 32), ..AT },
            Draw { sample: 2, ..AT },
            Draw { block: AT.block + (1 << 32), ..AT },
        ];
        for other in others {
            assert!(draw(other, 8).iter().zip(draw(AT, 8)).all(|(a, b)| *a != b), "{other:?}");
        }
        assert_ne!(philox_normals(43, AT, 8), draw(AT, 8));
    }

    #[test]
    fn tensor_operations_give_the_same_numbers() {
        let like = Tensor::zeros([3, 7], (Kind::Double, Device::Cpu));
        for at in [AT, Draw { step: 5 << 32 | 9, sample: u64::from(u32::MAX), parameter: 0, block: (3 << 32) + 1 }] {
            let here = Tensor::from_slice(&draw(at, 21)).reshape([3, 7]);
            let there = philox_normals_on_device(42, at, &like);
            assert!((here - there).abs().max().double_value(&[]) < 1e-13);
        }
    }

    /// Kolmogorov-Smirnov at 10⁵ draws: the statistic exceeds 1.95/√n with probability 0.1 % for a right generator,
    /// and the seed is fixed, so that this test always gives the same answer.
    #[test]
    fn normals_are_standard_normal() {
        let n = 100_000;
        let mut z = draw(Draw { step: 0, sample: 0, parameter: 0, block: 0 }, n);
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
        let first = Draw { step: 0, sample: 0, parameter: 0, block: 0 };
        let noise = Noise::from(z);
        let got = normal(&noise, first, &like).unwrap();
        assert_eq!(
            (got.kind(), Vec::<f64>::try_from(got.to_kind(Kind::Double)).unwrap()),
            (Kind::Float, vec![1.0, 2.0])
        );
        let missing = normal(&noise, Draw { sample: 1, ..first }, &like).unwrap_err();
        assert!(missing.to_string().contains("sample 1"), "{missing}");
        let shape = normal(&noise, first, &like.narrow(0, 0, 1)).unwrap_err();
        assert!(shape.to_string().contains("expected [1]"), "{shape}");
    }
}
