//! Order statistics of whole tensors, without sorting or holding them: thresholds of the largest elements, and ranks.

use super::Input;
use super::job::Job;
use crate::Error;
use crate::number::{BLOCK, Number};
use rayon::prelude::*;
use std::ops::Range;

/// Bins of a histogram: one for each value of a 16-bit digit. With 8-bit digits there would be twice the passes over
/// the files; with all 32 bits at once, a histogram of gigabytes.
const BINS: usize = 1 << 16;

/// What elements are ranked by: their magnitudes, of so many tensors.
#[derive(Debug, Clone, Copy)]
pub(super) enum Of {
    /// The d_k = θ_k - θ₀ of every model.
    Differences,
    /// The standard deviation of each element over the models (one tensor), whose order is that of the variance.
    Deviation,
}

/// So many of the largest elements of a tensor: those above a magnitude, and the first `ties` that have exactly this
/// one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Top {
    magnitude: u64,
    ties: usize,
}

impl Top {
    pub const ALL: Top = Top { magnitude: 0, ties: usize::MAX };
    pub const NONE: Top = Top { magnitude: u64::MAX, ties: 0 };

    /// Its part in each block of the next chunk of the tensor: told in advance how many ties it may take, blocks can
    /// run side by side, and the first ties of the tensor are the ones taken, whichever thread is faster.
    pub fn blocks<T: Number>(&mut self, d: &[T]) -> Vec<Top> {
        let tied = |d: &&T| d.magnitude() == self.magnitude;
        let count = |d: &[T]| if self.ties == 0 { 0 } else { d.iter().filter(tied).count() };
        let found: Vec<usize> = d.par_chunks(BLOCK).map(count).collect();
        let part = |n: usize| {
            let ties = n.min(self.ties);
            self.ties -= ties;
            Top { ties, ..*self }
        };
        found.into_iter().map(part).collect()
    }

    /// Whether the next element, which has this magnitude, is one of them.
    pub fn takes(&mut self, magnitude: u64) -> bool {
        let tie = magnitude == self.magnitude && self.ties > 0;
        self.ties -= usize::from(tie);
        magnitude > self.magnitude || tie
    }
}

impl<T: Number, E: From<Error>> Job<'_, T, E> {
    /// Calls `visit` with the index of each tensor and its elements at a place.
    fn ranked(
        &mut self,
        of: Of,
        at: Range<usize>,
        (base, d, models): &mut (Vec<T>, Vec<T>, Vec<Vec<T>>),
        visit: &mut dyn FnMut(usize, &[T]),
    ) -> Result<(), E> {
        match of {
            Of::Differences => {
                self.read(Input::Base, at.clone(), base)?;
                for k in 0..self.plan.models.len() {
                    self.difference(k, at.clone(), base, d)?;
                    visit(k, d);
                }
            }
            Of::Deviation => visit(0, &self.deviation(at, models)?),
        }
        Ok(())
    }

    /// The largest elements of each tensor, as many as each rank says. Their thresholds' 16-bit digits are found one
    /// after the other, from the highest, each by a pass that counts the elements whose higher digits are those found
    /// before.
    pub fn tops(&mut self, of: Of, ranks: &[usize]) -> Result<Vec<Vec<Top>>, E> {
        let len = self.len;
        let tensors = if matches!(of, Of::Differences) { self.plan.models.len() } else { 1 };
        let mut buffers = Default::default();
        // Digits that are found, and the rank among those that share them.
        let mut found = vec![ranks.iter().map(|rank| (0u64, *rank)).collect::<Vec<_>>(); tensors];
        let sought = |rank: usize| rank > 0 && rank < len;
        let passes = if ranks.iter().any(|rank| sought(*rank)) { T::DIGITS } else { 0 };
        for digit in (0..passes).rev() {
            let mut counts = vec![vec![vec![0usize; BINS]; ranks.len()]; tensors];
            for at in self.chunks() {
                self.ranked(of, at, &mut buffers, &mut |k, d| {
                    for ((prefix, _), counts) in found[k].iter().zip(&mut counts[k]) {
                        count(d, counts, |m| {
                            let m = m >> (16 * digit);
                            (m >> 16 == *prefix).then_some(m)
                        });
                    }
                })?;
            }
            for ((prefix, rank), counts) in found.iter_mut().flatten().zip(counts.into_iter().flatten()) {
                let mut bin = BINS - 1;
                while bin > 0 && counts[bin] < *rank {
                    *rank -= counts[bin];
                    bin -= 1;
                }
                *prefix = *prefix << 16 | bin as u64;
            }
        }
        let top = |((magnitude, ties), rank): ((u64, usize), &usize)| match *rank {
            0 => Top::NONE,
            rank if rank >= len => Top::ALL,
            // What is left of a rank is how many of the elements with exactly this magnitude are among the largest.
            _ => Top { magnitude, ties },
        };
        Ok(found.into_iter().map(|found| found.into_iter().zip(ranks).map(top).collect()).collect())
    }

    /// For each model and each first digit of a |d|, the mean of the places that the elements with it have in the order
    /// of |d|, between 0 and 1.
    pub fn mean_ranks(&mut self) -> Result<Vec<Vec<f64>>, E> {
        let mut counts = vec![vec![0usize; BINS]; self.plan.models.len()];
        let mut buffers = Default::default();
        for at in self.chunks() {
            self.ranked(Of::Differences, at, &mut buffers, &mut |k, d| {
                let parts = d.par_chunks(part(d)).map(|d| {
                    let mut counts = vec![0u32; BINS];
                    for d in d {
                        counts[d.first_digit()] += 1;
                    }
                    counts
                });
                add(&mut counts[k], parts.collect());
            })?;
        }
        let len = self.len as f64;
        let ranks = |counts: Vec<usize>| {
            let mut below = 0;
            let rank = |n: usize| {
                let middle = below as f64 + n as f64 / 2.0;
                below += n;
                middle / len
            };
            counts.into_iter().map(rank).collect()
        };
        Ok(counts.into_iter().map(ranks).collect())
    }
}

/// Elements for one histogram: as few histograms as threads, for each is larger than a block.
fn part<T>(d: &[T]) -> usize {
    d.len().div_ceil(rayon::current_num_threads()).max(BLOCK)
}

/// Adds histograms of parts to that of the tensor.
fn add(counts: &mut [usize], parts: Vec<Vec<u32>>) {
    for part in parts {
        counts.iter_mut().zip(part).for_each(|(count, n)| *count += n as usize);
    }
}

/// Counts the elements by the last digit of what `digits` makes of their magnitudes.
fn count<T: Number>(d: &[T], counts: &mut [usize], digits: impl Fn(u64) -> Option<u64> + Sync) {
    let parts = d.par_chunks(part(d)).map(|d| {
        let mut counts = vec![0u32; BINS];
        for m in d.iter().filter_map(|d| digits(d.magnitude())) {
            counts[(m & 0xffff) as usize] += 1;
        }
        counts
    });
    add(counts, parts.collect());
}
