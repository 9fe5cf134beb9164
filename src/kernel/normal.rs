//! Standard normals from random bits by Box and Muller's transform:
//!
//! ```text
//! u = (x + ½) / 2³²  ∈ (0, 1)          x: 32 random bits
//! z₀ = √(-2 ln u₀) cos 2πu₁,  z₁ = √(-2 ln u₀) sin 2πu₁        so |z| ≤ 6.8
//! ```
//!
//! Here belong its three forms: f64 by the library's functions, f32 by polynomials that run in vector registers, and
//! libtorch's operations for memory that the CPU does not reach. They agree to the rounding of log, sin and cos.

use super::noise::Draw;
use super::philox::{GROUP, MULTIPLIERS, W, counters, groups, philox, round_keys};
use tch::{Kind, Tensor};

/// 2⁻³²
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
        // The ½ keeps u away from 0, whose logarithm is infinite.
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

/// The same numbers by integer operations of libtorch, for memory that the CPU does not reach; in f64, then rounded.
pub(super) fn normals(seed: u64, at: Draw, like: &Tensor) -> Tensor {
    // libtorch has no unsigned 64-bit operations: it shifts signs in from the left, and they are masked off again.
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
    // In f64, because a device's f32 functions need not agree with the polynomials above.
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
    use tch::Device;

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
}
