//! Numbers as bytes in a file, and back.

use crate::number::{BLOCK, Number};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

/// Bytes of an element of the kinds that merges compute with.
pub(super) fn width(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::BF16 | Dtype::F16 => Some(2),
        Dtype::F32 => Some(4),
        Dtype::F64 => Some(8),
        _ => None,
    }
}

/// Whether merges compute with this kind.
pub(crate) fn is_floating(dtype: Dtype) -> bool {
    width(dtype).is_some()
}

/// The largest number that the kind has no place for: it and all below are rounded to 0.
pub(crate) fn vanishing(dtype: Dtype) -> f64 {
    // Half of the smallest subnormal, a tie that goes to the even number, 0.
    match dtype {
        Dtype::F16 => 2f64.powi(-25),
        Dtype::BF16 => 2f64.powi(-134),
        Dtype::F32 => 2f64.powi(-150),
        _ => 0.0,
    }
}

/// Numbers from their bytes, as many as `x` has places for. Narrower kinds are exact in `x`; f64 is rounded if T is
/// f32.
pub(super) fn decode<T: Number>(dtype: Dtype, bytes: &[u8], x: &mut [T]) {
    fn each<T: Number, const W: usize>(bytes: &[u8], x: &mut [T], f: impl Fn([u8; W]) -> T + Sync) {
        x.par_chunks_mut(BLOCK).zip(bytes.par_chunks(BLOCK * W)).for_each(|(x, bytes)| {
            let (numbers, _) = bytes.as_chunks::<W>();
            x.iter_mut().zip(numbers).for_each(|(x, bytes)| *x = f(*bytes));
        });
    }
    match dtype {
        Dtype::BF16 => each(bytes, x, |b| T::from_single(bf16::from_le_bytes(b).to_f32())),
        Dtype::F16 => each(bytes, x, |b| T::from_single(f16::from_le_bytes(b).to_f32())),
        Dtype::F32 => each(bytes, x, |b| T::from_single(f32::from_le_bytes(b))),
        Dtype::F64 => each(bytes, x, |b| T::from_wide(f64::from_le_bytes(b))),
        _ => unreachable!("width() admits only these"),
    }
}

/// Replaces `bytes` by those of the numbers, rounded to the kind. Returns the index of the first number that is too
/// large for it.
pub(super) fn encode<T: Number>(dtype: Dtype, x: &[T], bytes: &mut Vec<u8>) -> Option<usize> {
    fn each<T: Number, const W: usize>(
        x: &[T],
        bytes: &mut Vec<u8>,
        f: impl Fn(T) -> ([u8; W], bool) + Sync,
    ) -> Option<usize> {
        bytes.resize(x.len() * W, 0);
        let blocks = x.par_chunks(BLOCK).zip(bytes.par_chunks_mut(BLOCK * W)).enumerate();
        let lost = blocks.filter_map(|(block, (x, bytes))| {
            let (places, _) = bytes.as_chunks_mut::<W>();
            let mut lost = None;
            for (i, (x, place)) in x.iter().zip(places).enumerate() {
                let finite;
                (*place, finite) = f(*x);
                if !finite {
                    lost = lost.or(Some(block * BLOCK + i));
                }
            }
            lost
        });
        lost.min()
    }
    match dtype {
        Dtype::BF16 => each(x, bytes, |x| {
            let y = bf16::from_f32(x.single());
            (y.to_le_bytes(), y.is_finite())
        }),
        Dtype::F16 => each(x, bytes, |x| {
            let y = f16::from_f32(x.single());
            (y.to_le_bytes(), y.is_finite())
        }),
        Dtype::F32 => each(x, bytes, |x| (x.single().to_le_bytes(), x.single().is_finite())),
        Dtype::F64 => each(x, bytes, |x| (x.wide().to_le_bytes(), x.is_finite())),
        _ => unreachable!("width() admits only these"),
    }
}
