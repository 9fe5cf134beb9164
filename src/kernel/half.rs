//! Half precision, which the lanes read and write but do not compute in: bfloat16 and IEEE's binary16, to and from f32
//! by their bits.
//!
//! The same operations are printed for a GPU (`cuda/prelude.cu`), so that weights are rounded alike there. They have no
//! branches: the compiler makes vector instructions of them.

use tch::Kind;

/// A kind of number with 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Half {
    BFloat16,
    Float16,
}

/// 2⁻¹⁴, the smallest normal number of binary16, as bits of an f32.
const SMALLEST: u32 = 113 << 23;

impl Half {
    pub(super) fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::BFloat16 => Some(Half::BFloat16),
            Kind::Half => Some(Half::Float16),
            _ => None,
        }
    }
}

/// The number with these bits; exact.
#[inline(always)]
pub(super) fn from_bfloat16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// The bits of the nearest bfloat16, of two the even one.
#[inline(always)]
pub(super) fn to_bfloat16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    // Rounding could make an infinity of a NaN.
    if x.is_nan() { 0x7FC0 } else { rounded as u16 }
}

/// The number with these bits; exact.
#[inline(always)]
pub(super) fn from_float16(x: u16) -> f32 {
    let sign = u32::from(x & 0x8000) << 16;
    let magnitude = u32::from(x & 0x7FFF) << 13;
    // The exponents of 31 (infinite) and 255, of 0 and 112 more apart than the rest.
    let usual = magnitude + (112 << 23);
    let endless = magnitude + (224 << 23);
    // Subnormal: as the digits behind a 1, which is taken away again.
    let small = (f32::from_bits(magnitude + SMALLEST) - f32::from_bits(SMALLEST)).to_bits();
    let bits = if magnitude >= 31 << 23 {
        endless
    } else if magnitude < 1 << 23 {
        small
    } else {
        usual
    };
    f32::from_bits(sign | bits)
}

/// The bits of the nearest binary16, of two the even one; infinite from 65520 on.
#[inline(always)]
pub(super) fn to_float16(x: f32) -> u16 {
    const HALF: f32 = 0.5;
    let bits = x.to_bits();
    let (sign, magnitude) = (bits >> 16 & 0x8000, bits & 0x7FFF_FFFF);
    let usual = (magnitude.wrapping_add(0xFFF + (magnitude >> 13 & 1)) >> 13).wrapping_sub(112 << 10);
    // The last digit of ½ in f32 is the smallest number of binary16, so that the sum is rounded to its multiples.
    let small = (f32::from_bits(magnitude) + HALF).to_bits().wrapping_sub(HALF.to_bits());
    let finite = if magnitude < SMALLEST { small } else { usual };
    let endless = if magnitude > 255 << 23 { 0x7E00 } else { 0x7C00 };
    (sign | if magnitude >= 0x477F_F000 { endless } else { finite }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Tensor;

    /// Every number of 16 bits, and libtorch's f32 of it.
    fn all(kind: Kind) -> (Vec<u16>, Vec<f32>) {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let signed: Vec<i16> = bits.iter().map(|x| *x as i16).collect();
        let t = Tensor::from_slice(&signed).view_dtype(kind).to_kind(Kind::Float);
        (bits, Vec::try_from(t).unwrap())
    }

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
    }

    #[test]
    fn every_half_is_the_number_that_libtorch_reads() {
        for (kind, read) in [(Kind::BFloat16, from_bfloat16 as fn(u16) -> f32), (Kind::Half, from_float16)] {
            let (bits, numbers) = all(kind);
            for (x, number) in bits.into_iter().zip(numbers) {
                assert!(same(read(x), number), "{kind:?} {x:#06x}: {} {number}", read(x));
            }
        }
    }

    /// Each number of 16 bits, its neighbours in f32, the middle to the next one and the neighbours of that.
    #[test]
    fn rounding_is_that_of_libtorch() {
        for (kind, write) in [(Kind::BFloat16, to_bfloat16 as fn(f32) -> u16), (Kind::Half, to_float16)] {
            let (_, numbers) = all(kind);
            let step = if kind == Kind::BFloat16 { 1_u32 << 15 } else { 1 << 12 };
            let around = |x: f32| [0, 1, u32::MAX, step, step + 1, step - 1].map(|d| x.to_bits().wrapping_add(d));
            let mut all: Vec<f32> = numbers.into_iter().flat_map(around).map(f32::from_bits).collect();
            // Below the normal numbers of binary16 their middles are further apart.
            all.extend((0..4096).flat_map(|i| {
                let middle = (i as f32 + 0.5) * 2f32.powi(-24);
                [middle, middle.next_up(), middle.next_down(), -middle]
            }));
            all.extend([65_519.996, 65_520.0, 65_504.0, f32::MAX, f32::MIN_POSITIVE, 1e-45]);
            let expected = Tensor::from_slice(&all).to_kind(kind).view_dtype(Kind::Int16);
            let expected: Vec<i16> = Vec::try_from(expected).unwrap();
            for (x, bits) in all.into_iter().zip(expected) {
                let (found, bits) = (write(x), bits as u16);
                let nan = x.is_nan() && (found & 0x7FFF) > if kind == Kind::BFloat16 { 0x7F80 } else { 0x7C00 };
                assert!(found == bits || nan, "{kind:?} {x:e}: {found:#06x} {bits:#06x}");
            }
        }
    }
}
