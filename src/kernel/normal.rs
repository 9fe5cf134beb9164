//! Standard normals from random bits by Box and Muller's transform:
//!
//! ```text
//! u = (x + ½) / 2³²  ∈ (0, 1)          x: 32 random bits
//! z₀ = √(-2 ln u₀) cos 2πu₁,  z₁ = √(-2 ln u₀) sin 2πu₁        so |z| ≤ 6.8
//! ```
//!
//! Here belong its two forms: in f32 and f64 by polynomials, which run in vector registers and give the same bits on every
//! device (`cuda/prelude.cu` has them once more), and by libtorch's operations where no kernel runs. They agree to the
//! rounding of log, sin and cos.

use super::noise::Draw;
use super::philox::{GROUP, Keys, MULTIPLIERS, W, counters, keys, philox, round_keys};
use super::tensors::op;
use crate::Result;
use tch::{Device, Kind, TchError, Tensor};

/// 2⁻³²
const TO_UNIT: f64 = 1.0 / 4_294_967_296.0;

/// Numbers that Box and Muller's transform is implemented for.
pub(crate) trait Normals: Copy + Default {
    /// Two standard normals from two random words.
    fn box_muller(x0: u32, x1: u32) -> [Self; 2];

    /// Standard normals for the positions from 64·`group` on; N is a multiple of 64 and of 4·C, where C counters are
    /// worked on together.
    #[inline(always)]
    fn normals<const C: usize, const N: usize>(seed: u64, at: Draw, group: u64, z: &mut [Self; N]) {
        // Two loops, so that the CPU has several independent groups at hand in each.
        let mut bits = [0; N];
        words::<C>(&keys(seed), at, group, &mut bits);
        let (pairs, words) = (z.as_chunks_mut::<{ 2 * W }>().0, bits.as_chunks::<{ 2 * W }>().0);
        for (z, x) in pairs.iter_mut().zip(words) {
            for l in 0..W {
                [z[l], z[W + l]] = Self::box_muller(x[l], x[W + l]);
            }
        }
    }
}

/// The random words of groups, of C/W of them at a time.
#[inline(always)]
fn words<const C: usize>(keys: &Keys, at: Draw, group: u64, bits: &mut [u32]) {
    for (i, bits) in bits.chunks_exact_mut(4 * C).enumerate() {
        let mut all = [[0; C]; 4];
        for g in 0..C / W {
            let counters = counters(at, group + (i * C / W + g) as u64);
            for (all, counters) in all.iter_mut().zip(&counters) {
                all[g * W..][..W].copy_from_slice(counters);
            }
        }
        let words = philox(all, keys);
        for (g, bits) in bits.as_chunks_mut::<GROUP>().0.iter_mut().enumerate() {
            for (bits, words) in bits.as_chunks_mut::<W>().0.iter_mut().zip(&words) {
                bits.copy_from_slice(&words[g * W..][..W]);
            }
        }
    }
}

impl Normals for f64 {
    #[inline(always)]
    fn box_muller(x0: u32, x1: u32) -> [f64; 2] {
        let r = wide_minus_two_ln(x0).sqrt();
        let [sin, cos] = wide_sin_cos_turn(x1);
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
    // Measured from the bits of √½ instead of 1, so that m lies about 1, where the series has its centre.
    let k = bits.wrapping_sub(SQRT_HALF) as i32 >> 23;
    let m = f32::from_bits(bits.wrapping_sub((k << 23) as u32));
    // Near u = 1 the rounding of x to f32 would be all that is left of ln u; there 1-u comes off the integer.
    let d = if k == 32 { (!x as f32 + 0.5) * -(TO_UNIT as f32) } else { m - 1.0 };
    let s = d / (m + 1.0);
    // A polynomial in s² alone: ln m is odd in s.
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
    // An eighth of a turn is added, so that cutting off the lower bits rounds to the nearest quarter.
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

/// [`minus_two_ln`] in f64, where x+½, u and 1-u are exact, so that u near 1 needs no care; the series to 5·10⁻¹⁸.
#[inline(always)]
fn wide_minus_two_ln(x: u32) -> f64 {
    const SQRT_HALF: u64 = 0x3FE6_A09E_667F_3BCD;
    // Keeps exponents positive: few vector instructions know signed numbers of 64 bits. As bits of an f64, and as the
    // number behind 2⁵², which makes an f64 of an integer.
    const AWAY: u64 = 64;
    const DIGITS: u64 = 0x4330_0000_0000_0000;
    let bits = (f64::from(x) + 0.5).to_bits();
    let k = (bits + (AWAY << 52) - SQRT_HALF) >> 52;
    let m = f64::from_bits(bits + (AWAY << 52) - (k << 52));
    let halvings = f64::from_bits(DIGITS + 32 + AWAY) - f64::from_bits(DIGITS + k);
    let s = (m - 1.0) / (m + 1.0);
    let t = s * s;
    let tail = t
        * (-4.0 * 0.090_914_445_626_308_61
            + t * (-4.0 * 0.076_658_608_002_780_21 + t * (-4.0 * 0.073_082_248_425_217_03)));
    let series = t
        * (-4.0 * 0.333_333_333_333_333_5
            + t * (-4.0 * 0.199_999_999_999_497_52
                + t * (-4.0 * 0.142_857_143_129_877_43 + t * (-4.0 * 0.111_111_055_673_975_4 + tail))));
    s * (-4.0 + series) + halvings * (2.0 * std::f64::consts::LN_2)
}

/// sin and cos of 2π(x+½)/2³² as in [`sin_cos_turn`], by polynomials to 2·10⁻¹⁷.
#[inline(always)]
fn wide_sin_cos_turn(x: u32) -> [f64; 2] {
    const TO_RADIANS: f64 = std::f64::consts::TAU * TO_UNIT;
    let quarter = x.wrapping_add(1 << 29);
    let r = (f64::from(x.wrapping_sub(quarter & (3 << 30)) as i32) + 0.5) * TO_RADIANS;
    let t = r * r;
    let tail = t * (2.755_731_610_255_150_7e-6 + t * (-2.505_113_184_480_886_6e-8 + t * 1.591_812_928_083_5e-10));
    let sin = r + r
        * (t * (-0.166_666_666_666_666_66
            + t * (0.008_333_333_333_330_948 + t * (-1.984_126_983_675_857_4e-4 + tail))));
    let tail = t * (-2.755_731_727_172_921e-7 + t * (2.087_614_626_828_136e-9 + t * -1.138_263_241_674_366_7e-11));
    let cos = 1.0
        + t * (-0.5
            + t * (0.041_666_666_666_666_664
                + t * (-0.001_388_888_888_888_739_8 + t * (2.480_158_729_876_568_6e-5 + tail))));
    let odd = quarter & (1 << 30) != 0;
    let (a, b) = if odd { (cos, sin) } else { (sin, cos) };
    let signed = |x: f64, sign: u32| f64::from_bits(x.to_bits() ^ u64::from(sign >> 31) << 63);
    [signed(a, quarter), signed(b, quarter.wrapping_add(1 << 30))]
}

/// Groups of normals that follow each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub first: u64,
    pub groups: u64,
}

/// The normals of these groups, one run after the other, by integer operations of libtorch for memory that the CPU does
/// not reach; in f64.
pub(super) fn normals(seed: u64, at: Draw, runs: &[Run], device: Device) -> Result<Tensor> {
    // libtorch has no unsigned 64-bit operations: it shifts signs in from the left, and they are masked off again.
    const LOW: i64 = 0xFFFF_FFFF;
    let and = |x: &Tensor, mask: i64| op(x.f_bitwise_and(mask));
    let upper = |x: &Tensor| op(x.f_bitwise_right_shift_tensor_scalar(32));
    let xor = |x: &Tensor, y: &Tensor| op(x.f_bitwise_xor_tensor(y));
    let counters = runs.iter().map(|run| {
        let start = (run.first * W as u64) as i64;
        op(Tensor::f_arange_start(start, start + (run.groups * W as u64) as i64, (Kind::Int64, device)))
    });
    let counter = op(Tensor::f_cat(&counters.collect::<std::result::Result<Vec<_>, _>>()?, 0))?;
    // Words 0 and 2 of all counters, which a round multiplies, and words 1 and 3, which it mixes in: a row each, so that
    // one operation serves both.
    let rows = |a: Tensor, b: u64| op(Tensor::f_stack(&[&a, &op(a.f_full_like(i64::from(b as u32)))?], 0));
    let step_high = ((at.step >> 32) as i64 & 0xFFFF) << 16;
    let high = op(and(&upper(&counter)?, 0xFFFF)?.f_bitwise_or(step_high))?;
    let (mut even, mut odd) = (rows(and(&counter, LOW)?, at.step)?, rows(high, at.sample)?);
    let column = |words: [u32; 2]| Tensor::from_slice(&words.map(i64::from)).reshape([2, 1]);
    let keys: Vec<Tensor> = round_keys(seed).map(column).collect();
    let keys = op(Tensor::f_stack(&keys, 0)?.f_to_device(device))?;
    let multipliers = op(column(MULTIPLIERS).f_to_device(device))?;
    for round in 0..keys.size()[0] {
        // The product wraps as a signed number, which leaves its 64 bits as they are. Its upper half goes to the other
        // row, and its lower half is the next word, whose upper bits no longer matter.
        let product = op(op(even.f_mul(&multipliers))?.f_flip([0]))?;
        let mixed = xor(&xor(&upper(&product)?, &odd)?, &keys.f_get(round)?)?;
        (even, odd) = (and(&mixed, LOW)?, product);
    }
    // In f64, because a device's f32 functions need not agree with the polynomials above.
    let unit = |x: &Tensor| op(op(op(x.f_to_kind(Kind::Double))?.f_add_scalar(0.5))?.f_mul_scalar(TO_UNIT));
    let (u0, u1) = (unit(&even)?, unit(&and(&odd, LOW)?)?);
    let r = op(op(op(u0.f_log())?.f_mul_scalar(-2.0))?.f_sqrt())?;
    let angle = op(u1.f_mul_scalar(std::f64::consts::TAU))?;
    let part = |wave: std::result::Result<Tensor, TchError>| op(r.f_mul(&op(wave)?));
    let z = op(Tensor::f_stack(&[part(angle.f_cos())?, part(angle.f_sin())?], 1))?;
    // From [pair, cos or sin, counter] to positions.
    let z = z.f_reshape([4, -1, W as i64])?.f_transpose(0, 1)?;
    Ok(op(z.f_reshape([-1]))?)
}

#[cfg(test)]
mod tests {
    use super::super::groups;
    use super::*;

    const AT: Draw = Draw { step: 3, sample: 1, parameter: 0, group: 7 };

    fn seeded<T: Normals + Into<f64>>(seed: u64, at: Draw, n: usize) -> Vec<f64> {
        let mut z = [T::default(); 4 * GROUP];
        let chunks = (0..n.div_ceil(z.len())).flat_map(|i| {
            T::normals::<W, _>(seed, at, 4 * i as u64, &mut z);
            z
        });
        chunks.map(Into::into).take(n).collect()
    }

    fn draw(at: Draw, n: usize) -> Vec<f64> {
        seeded::<f64>(42, at, n)
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

    /// The polynomials of the f64 normals against the library's functions, where those get an angle without rounding.
    #[test]
    fn double_precision_normals_are_right_to_the_last_digits() {
        let mut bits = 1_u32;
        let mut next = || {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            bits
        };
        let mut all: Vec<[u32; 2]> = (0..1 << 20).map(|_| [next(), next()]).collect();
        let ends = [0, 1, 2, 1 << 24, 1 << 29, (1 << 29) - 1, 1 << 30, 1 << 31, 3 << 30, u32::MAX - 1, u32::MAX];
        all.extend(ends.iter().flat_map(|x| ends.iter().map(|y| [*x, *y])));
        let mut worst = 0.0_f64;
        for [x, y] in all {
            let u = (f64::from(x) + 0.5) * TO_UNIT;
            // ln(1-v) = -v - v²/2 …, where ln u is a number that it takes more digits than those of u to know.
            let r = (-2.0 * if u > 0.75 { (u - 1.0).ln_1p() } else { u.ln() }).sqrt();
            let quarters = y.wrapping_add(1 << 29) >> 30;
            let rest = f64::from(y.wrapping_sub(quarters << 30) as i32) + 0.5;
            let (sin, cos) = (rest * TO_UNIT * std::f64::consts::TAU).sin_cos();
            let expected = match quarters {
                0 => [r * cos, r * sin],
                1 => [-r * sin, r * cos],
                2 => [-r * cos, -r * sin],
                _ => [r * sin, -r * cos],
            };
            for (z, expected) in f64::box_muller(x, y).into_iter().zip(expected) {
                worst = worst.max(((z - expected) / expected).abs());
            }
        }
        assert!(worst < 1e-15, "{worst:e}");
    }

    /// The polynomials of the f32 normals against those in f64.
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
    fn how_many_counters_are_worked_on_together_does_not_matter() {
        // The last ones cross 2³² counters, where the second word changes.
        for group in [0, 7, (1 << 28) - 6, (1 << 28) - 5] {
            let mut z = [[0.0_f32; 8 * GROUP]; 3];
            f32::normals::<W, _>(42, AT, group, &mut z[0]);
            f32::normals::<{ 2 * W }, _>(42, AT, group, &mut z[1]);
            f32::normals::<{ 4 * W }, _>(42, AT, group, &mut z[2]);
            assert_eq!(z[0], z[1], "{group}");
            assert_eq!(z[0], z[2], "{group}");
        }
    }

    #[test]
    fn tensor_operations_give_the_same_numbers() {
        for at in [AT, Draw { step: 5 << 32 | 9, sample: u64::from(u32::MAX), parameter: 0, group: (3 << 28) + 1 }] {
            // Two runs, with a gap of one group in between.
            let (first, other) = (draw(at, 210), draw(Draw { group: at.group + 5, ..at }, 70));
            let runs = [Run { first: at.group, groups: groups(210) }, Run { first: at.group + 5, groups: groups(70) }];
            let there = normals(42, at, &runs, Device::Cpu).unwrap();
            assert_eq!(there.size(), [(4 + 2) * GROUP as i64]);
            for (start, here) in [(0, first), (4 * GROUP, other)] {
                let there = there.narrow(0, start as i64, here.len() as i64);
                assert!((Tensor::from_slice(&here) - there).abs().max().double_value(&[]) < 1e-13);
            }
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
}
