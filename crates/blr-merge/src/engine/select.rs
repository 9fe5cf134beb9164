//! Which elements of the differences d_k = θ_k - θ₀ are kept: what TIES and DARE must know of whole tensors before they
//! merge the first element.

use super::Input;
use super::job::{Job, sum};
use crate::Error;
use crate::method::{Keep, Rescale};
use crate::number::{BLOCK, Number, part_of};
use crate::philox::words;
use rayon::prelude::*;

/// Bins of a histogram: one for each value of a 16-bit digit. With 8-bit digits there would be twice the passes over
/// the files; with all 32 bits at once, a histogram of gigabytes.
const BINS: usize = 1 << 16;

/// How the elements of one model's difference are kept, once the passes over the whole tensor are done.
pub(super) enum Selection {
    All,
    /// Those above a magnitude, and the first `ties` that have exactly this one.
    Above {
        magnitude: u64,
        ties: usize,
    },
    /// Those whose 32 random bits are below `below` = density·2³², times `scale`.
    Random {
        stream: u64,
        below: u64,
        scale: f64,
    },
}

impl Selection {
    /// Zeroes what is not kept among the elements `at`.. of d. Chunks must come in order, since the ties that are left
    /// for the next ones are counted down.
    pub fn apply<T: Number>(&mut self, at: usize, d: &mut [T]) {
        match self {
            Selection::All => {}
            Selection::Above { magnitude, ties } => {
                let magnitude = *magnitude;
                let tied = |d: &&T| d.magnitude() == magnitude;
                // Each block is told in advance how many ties it may keep, so that blocks can run side by side and the
                // first ties of the tensor are the ones kept, whichever thread is faster.
                let found: Vec<usize> = d.par_chunks(BLOCK).map(|d| d.iter().filter(tied).count()).collect();
                let quotas: Vec<usize> = found
                    .iter()
                    .map(|n| {
                        let quota = (*n).min(*ties);
                        *ties -= quota;
                        quota
                    })
                    .collect();
                d.par_chunks_mut(BLOCK).zip(quotas).for_each(|(d, mut quota)| {
                    for d in d {
                        let m = d.magnitude();
                        let keep = m > magnitude || m == magnitude && quota > 0;
                        quota -= usize::from(keep && m == magnitude);
                        if !keep {
                            *d = T::zero();
                        }
                    }
                });
            }
            Selection::Random { stream, below, scale } => {
                let (stream, below, scale) = (*stream, *below, T::from_wide(*scale));
                d.par_chunks_mut(BLOCK).enumerate().for_each(|(block, d)| {
                    // One position of the stream serves four elements; blocks begin at multiples of four.
                    let first = (at + block * BLOCK) as u64 / 4;
                    for (group, d) in d.chunks_mut(4).enumerate() {
                        let words = words(stream, first + group as u64);
                        for (d, word) in d.iter_mut().zip(words) {
                            *d = if u64::from(word) < below { *d * scale } else { T::zero() };
                        }
                    }
                });
            }
        }
    }
}

/// The seed for what one model keeps of one tensor. It follows from the names, so the order of models and tensors, and
/// whatever else is merged, make no difference.
fn stream(seed: u64, tensor: &str, model: &str) -> u64 {
    // FNV-1a over both names, with a byte between them that UTF-8 does not have: "ab" + "c" is not "a" + "bc".
    let bytes = tensor.bytes().chain([0xff]).chain(model.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    // The hash alone mixes its upper bits poorly, and does not know the seed.
    let [low, high, ..] = words(seed, hash);
    u64::from(low) | u64::from(high) << 32
}

impl<T: Number, E: From<Error>> Job<'_, T, E> {
    /// One selection per model.
    pub fn selections(&mut self, keep: Keep) -> Result<Vec<Selection>, E> {
        let models = 0..self.plan.models.len();
        match keep {
            Keep::Largest { density } if density < 1.0 => {
                let kept = part_of(density, self.len).max(1);
                self.thresholds(kept)
            }
            Keep::All | Keep::Largest { .. } => Ok(models.map(|_| Selection::All).collect()),
            Keep::Random { density, rescale, seed } => {
                // density = 1 gives 2³², which no word reaches: everything is kept.
                let below = (density * 4_294_967_296.0).round() as u64;
                let streams = models.map(|k| stream(seed, self.name, self.plan.models[k].0));
                let random = |scale: f64| move |stream| Selection::Random { stream, below, scale };
                match rescale {
                    Rescale::Density => Ok(streams.map(random(1.0 / density)).collect()),
                    Rescale::L1Norm => self.preserving_l1(streams.map(random(1.0)).collect()),
                }
            }
        }
    }

    /// The magnitude of the `kept`-th largest difference of each model, without sorting or holding the tensor: its
    /// 16-bit digits are found one after the other, from the highest, each by a pass that counts the elements whose
    /// higher digits are those found before.
    fn thresholds(&mut self, kept: usize) -> Result<Vec<Selection>, E> {
        let models = self.plan.models.len();
        let (mut base, mut d) = (Vec::new(), Vec::new());
        let (mut prefixes, mut ranks) = (vec![0u64; models], vec![kept; models]);
        for digit in (0..T::DIGITS).rev() {
            let mut counts = vec![vec![0usize; BINS]; models];
            for at in self.chunks() {
                self.read(Input::Base, at.clone(), &mut base)?;
                for k in 0..models {
                    self.difference(k, at.clone(), &base, &mut d)?;
                    let prefix = prefixes[k];
                    // As few histograms as threads: each is larger than a block.
                    let part = d.len().div_ceil(rayon::current_num_threads()).max(BLOCK);
                    let parts = d.par_chunks(part).map(|d| {
                        let mut counts = vec![0u32; BINS];
                        for m in d.iter().map(|d| d.magnitude() >> (16 * digit)) {
                            if m >> 16 == prefix {
                                counts[(m & 0xffff) as usize] += 1;
                            }
                        }
                        counts
                    });
                    for part in parts.collect::<Vec<_>>() {
                        counts[k].iter_mut().zip(part).for_each(|(count, n)| *count += n as usize);
                    }
                }
            }
            for ((prefix, rank), counts) in prefixes.iter_mut().zip(&mut ranks).zip(counts) {
                let mut bin = BINS - 1;
                while bin > 0 && counts[bin] < *rank {
                    *rank -= counts[bin];
                    bin -= 1;
                }
                *prefix = *prefix << 16 | bin as u64;
            }
        }
        // What is left of a rank is how many of the elements with exactly this magnitude are among the largest.
        let above = prefixes.into_iter().zip(ranks).map(|(magnitude, ties)| Selection::Above { magnitude, ties });
        Ok(above.collect())
    }

    /// Random selections, scaled so that each model's Σ|d| over the tensor stays what it is.
    fn preserving_l1(&mut self, mut selections: Vec<Selection>) -> Result<Vec<Selection>, E> {
        let (mut base, mut d) = (Vec::new(), Vec::new());
        let mut norms = vec![[0.0; 2]; selections.len()];
        let l1 = |d: &[T]| sum(d.par_chunks(BLOCK).map(|d| [d.iter().map(|d| d.wide().abs()).sum::<f64>()]))[0];
        for at in self.chunks() {
            self.read(Input::Base, at.clone(), &mut base)?;
            for (k, (selection, [whole, kept])) in selections.iter_mut().zip(&mut norms).enumerate() {
                self.difference(k, at.clone(), &base, &mut d)?;
                *whole += l1(&d);
                selection.apply(at.start, &mut d);
                *kept += l1(&d);
            }
        }
        for (selection, [whole, kept]) in selections.iter_mut().zip(norms) {
            // Where nothing is kept, no scale brings the norm back.
            if let (Selection::Random { scale, .. }, true) = (selection, kept > 0.0) {
                *scale = whole / kept;
            }
        }
        Ok(selections)
    }
}
