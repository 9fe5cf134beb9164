//! Σ x² over the memory of tensors, in one pass. It is what every step reads its gradients for before it accepts them, so
//! it has to go as fast as the memory.
#![allow(unsafe_code)]

use super::memory::{Array, BLOCK, Lane, Memory};
use super::threads;
use super::vectors::{Vectorized, Width};
use std::sync::atomic::{AtomicU64, Ordering};
use tch::Tensor;

/// Positions whose squares are summed together: a warp of a GPU's has them, so that there are warps enough.
pub(super) const SUMMED: usize = 1 << 13;
/// Independent sums of them, because the additions of one would wait for each other; a thread of a GPU's has one. Both
/// numbers are part of the result: they must follow neither the device nor the width of the vectors.
pub(super) const SUMS: usize = 32;

/// Σ x² over contiguous CPU tensors that are computed in `F`, in f64: the same bits for any number of threads.
pub(super) fn sum_of_squares<F: Lane>(tensors: &[&Tensor]) -> f64 {
    let arrays: Vec<Array<F>> = tensors.iter().map(|t| Array::of(t)).collect();
    let pieces = threads::pieces(arrays.iter().map(|x| x.len), SUMMED);
    // A sum for each piece, added in order at the end, so that it does not show in the bits which thread was faster.
    let sums: Vec<AtomicU64> = pieces.iter().map(|_| AtomicU64::new(0)).collect();
    let threads = threads::worth(arrays.iter().map(|x| x.len).sum());
    threads::share(pieces.len(), threads, |i| {
        let (t, at) = pieces[i];
        let len = SUMMED.min(arrays[t].len - at);
        let sum = Width::chosen().run(Squares { array: &arrays[t], start: at, len });
        // Relaxed, because the end of `share` orders every store before the reads below.
        sums[i].store(sum.to_bits(), Ordering::Relaxed);
    });
    sums.into_iter().map(|x| f64::from_bits(x.into_inner())).sum()
}

/// The sum of a piece.
pub(super) struct Squares<'a, F> {
    pub array: &'a Array<F>,
    pub start: usize,
    pub len: usize,
}

impl<F: Lane> Vectorized for Squares<'_, F> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        let Squares { array, start, len } = self;
        let mut sums = [0.0; SUMS];
        match array.memory {
            Memory::Own(p) | Memory::Around(p) => {
                // SAFETY: `start + len` initialised elements of this kind lie there, alive and not written to.
                add_squares(unsafe { std::slice::from_raw_parts(p.add(start), len) }, &mut sums);
            }
            Memory::Half(..) | Memory::Single(_) => {
                let mut block = [F::default(); BLOCK];
                for at in (start..start + len).step_by(BLOCK) {
                    let n = BLOCK.min(start + len - at);
                    // SAFETY: as above.
                    unsafe { array.memory.read(at, n, &mut block) };
                    add_squares(&block[..n], &mut sums);
                }
            }
        }
        sums.iter().sum()
    }
}

#[inline(always)]
fn add_squares<F: Lane>(x: &[F], sums: &mut [f64; SUMS]) {
    let (chunks, rest) = x.as_chunks::<SUMS>();
    for chunk in chunks {
        add_chunk(chunk, sums);
    }
    // Filled up with zeros, which add nothing: a loop of its own over `rest` would make the compiler keep the sums in
    // memory, one by one, in the loop above as well.
    let mut last = [F::default(); SUMS];
    last[..rest.len()].copy_from_slice(rest);
    add_chunk(&last, sums);
}

#[inline(always)]
fn add_chunk<F: Lane>(x: &[F; SUMS], sums: &mut [f64; SUMS]) {
    // Converted before anything else, all of them: the vectoriser does not see through both at once.
    let x: [f64; SUMS] = std::array::from_fn(|l| x[l].into());
    for l in 0..SUMS {
        sums[l] += x[l] * x[l];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::{Device, Kind};

    /// Element i of a piece belongs to sum i mod 32, in ascending order; then the sums of a piece, then the pieces.
    fn one_by_one(x: &[f64]) -> f64 {
        let piece = |x: &[f64]| {
            let mut sums = [0.0; 32];
            x.iter().enumerate().for_each(|(i, x)| sums[i % 32] += x * x);
            sums.iter().sum::<f64>()
        };
        x.chunks(SUMMED).map(piece).sum()
    }

    #[test]
    fn the_order_of_the_sum_is_fixed() {
        let sizes = [0, 1, 31, 32, 33, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17, SUMMED + 5];
        for (n, kind) in sizes
            .into_iter()
            .flat_map(|n| [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half].map(|kind| (n, kind)))
        {
            let x = Tensor::linspace(-1.3, 2.9, n as i64, (Kind::Double, Device::Cpu)).to_kind(kind);
            let expected = one_by_one(&Vec::try_from(x.to_kind(Kind::Double)).unwrap());
            let double = kind == Kind::Double;
            let found = if double { sum_of_squares::<f64>(&[&x]) } else { sum_of_squares::<f32>(&[&x]) };
            assert_eq!(found.to_bits(), expected.to_bits(), "{n} of {kind:?}: {found} {expected}");
        }
    }
}
