//! Which elements of the differences d_k = θ_k - θ₀ are kept: what the sparse methods must know of whole tensors before
//! they merge the first element. (Ranks: rank.rs.)

use super::Input;
use super::job::{Job, sum};
use super::rank::{Of, Top};
use crate::Error;
use crate::method::{Keep, Rescale};
use crate::number::{BLOCK, Number, part_of};
use crate::philox::words;
use rayon::prelude::*;

/// How the elements of one model's difference are kept, once the passes over the whole tensor are done.
pub(super) enum Selection {
    All,
    /// The elements of one top that are not in the other, smaller one.
    Between(Top, Top),
    /// Those whose 32 random bits are below `below` = density·2³², times `scale`.
    Random {
        stream: u64,
        below: u64,
        scale: f64,
    },
    /// Those whose 32 random bits are below p·2³², times 1/p, where p is found by the magnitude's first digit.
    Ranked {
        stream: u64,
        probabilities: Vec<f64>,
    },
}

impl Selection {
    /// Zeroes what is not kept among the elements `at`.. of d. Chunks must come in order, since the ties that are left
    /// for the next ones are counted down.
    pub fn apply<T: Number>(&mut self, at: usize, d: &mut [T]) {
        match self {
            Selection::All => {}
            Selection::Between(outer, inner) => {
                let (outer, inner) = (outer.blocks(d), inner.blocks(d));
                d.par_chunks_mut(BLOCK).zip(outer).zip(inner).for_each(|((d, mut outer), mut inner)| {
                    for d in d {
                        let m = d.magnitude();
                        // Both count their ties, whatever the other says.
                        let (outer, inner) = (outer.takes(m), inner.takes(m));
                        if !outer || inner {
                            *d = T::zero();
                        }
                    }
                });
            }
            Selection::Random { stream, below, scale } => {
                let (below, scale) = (*below, T::from_wide(*scale));
                random(*stream, at, d, |d, word| if u64::from(word) < below { d * scale } else { T::zero() });
            }
            Selection::Ranked { stream, probabilities } => {
                random(*stream, at, d, |d, word| {
                    let p = probabilities[d.first_digit()];
                    if f64::from(word) < p * 4_294_967_296.0 { T::from_wide(d.wide() / p) } else { T::zero() }
                });
            }
        }
    }
}

/// d ← f(d, word), with a random word for each of the elements `at`..
fn random<T: Number>(stream: u64, at: usize, d: &mut [T], f: impl Fn(T, u32) -> T + Sync) {
    d.par_chunks_mut(BLOCK).enumerate().for_each(|(block, d)| {
        // One position of the stream serves four elements; blocks begin at multiples of four.
        let first = (at + block * BLOCK) as u64 / 4;
        for (group, d) in d.chunks_mut(4).enumerate() {
            for (d, word) in d.iter_mut().zip(words(stream, first + group as u64)) {
                *d = f(*d, word);
            }
        }
    });
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
        let stream = |k: usize, seed| stream(seed, self.name, self.plan.models[k].0);
        match keep {
            Keep::Largest { density } if density < 1.0 => {
                let kept = part_of(density, self.len).max(1);
                let tops = self.tops(Of::Differences, &[kept])?;
                Ok(tops.into_iter().map(|top| Selection::Between(top[0], Top::NONE)).collect())
            }
            Keep::All | Keep::Largest { .. } => Ok(models.map(|_| Selection::All).collect()),
            Keep::Middle { smallest, largest } => {
                let ranks = [self.len - part_of(smallest, self.len), part_of(largest, self.len)];
                let tops = self.tops(Of::Differences, &ranks)?;
                Ok(tops.into_iter().map(|top| Selection::Between(top[0], top[1])).collect())
            }
            Keep::Ranked { density, epsilon, seed } => {
                let streams: Vec<u64> = models.map(|k| stream(k, seed)).collect();
                let ranks = self.mean_ranks()?.into_iter();
                // ε times a number in (-½, ½) around the density.
                let probability = |rank: f64| density + epsilon * (rank - 0.5);
                let ranked = |(ranks, stream): (Vec<f64>, u64)| {
                    let probabilities = ranks.into_iter().map(probability).collect();
                    Selection::Ranked { stream, probabilities }
                };
                Ok(ranks.zip(streams).map(ranked).collect())
            }
            Keep::Random { density, rescale, seed } => {
                // density = 1 gives 2³², which no word reaches: everything is kept.
                let below = (density * 4_294_967_296.0).round() as u64;
                let streams = models.map(|k| stream(k, seed));
                let random = |scale: f64| move |stream| Selection::Random { stream, below, scale };
                match rescale {
                    Rescale::Density => Ok(streams.map(random(1.0 / density)).collect()),
                    Rescale::L1Norm => {
                        let selections = streams.map(random(1.0)).collect();
                        self.preserving_l1(selections)
                    }
                }
            }
        }
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
