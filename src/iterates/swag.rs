//! A Gaussian through the weights that SGD passes.

use super::moments::{Moments, check_some, clamped, gaussian};
use super::watched::{Part, Watched};
use crate::params::{Params, Perturbed};
use crate::storage::checkpoint;
use crate::{DiagonalGaussian, Error, LowRankGaussian, Result, check};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::Path;
use tch::Tensor;

/// SWAG (Maddox et al. 2019, *A Simple Baseline for Bayesian Uncertainty in Deep Learning*): a Gaussian of the iterates
/// θ₁ … θ_T of any optimizer at a constant or cyclic learning rate, collected once per epoch.
///
/// ```text
/// m = (1/T) Σ θᵢ      v = (1/T) Σ (θᵢ - m)²      D: the last K deviations      K ≤ T, at most the rank
/// posterior()    N(m, ½ ( diag v + DᵀD/(K-1) ))
/// diagonal()     N(m, diag v), not halved
/// ```
///
/// as published; v is at least [`SMALLEST_VARIANCE`](crate::iterates::SMALLEST_VARIANCE). The published scale c of the
/// covariance, default 1, is a temperature: `swag.posterior()?.temper(c)?`, or chosen on validation data by
/// [`fit_temperature`](LowRankGaussian::fit_temperature).
///
/// **Scale.** The spread of iterates belongs to the learning rate and the batch (about lr/2B near a minimum), not to
/// the number of examples. As the prior of a next task or in a merge it needs a scale that you choose,
/// `swag.diagonal()?.temper(c)?`, or take the precision of a Fisher information ([`fisher`](crate::fisher)) at the
/// mean.
///
/// Published settings: 200 epochs of SGD, the learning rate on a cosine from 0.05 towards epoch 160 and constant at
/// 0.01 from there, collected every epoch from 160, K = 20, 64 samples.
///
/// Kinds, late and frozen variables: as in [`Ema`](crate::Ema). Buffers are not averaged: the statistics of a batch
/// normalization have to be computed again for the mean, and for every sample; group and layer normalization
/// ([`crate::nn`]) have none. Memory: (K+2) numbers for each weight.
///
/// ```
/// use tch::{Device, Kind, Tensor, nn, nn::Module, nn::OptimizerConfig};
/// use tch_blr::Swag;
/// # fn main() -> tch_blr::Result<()> {
/// # tch::manual_seed(0);
/// # let (x, y) = (Tensor::randn([64, 4], (Kind::Float, Device::Cpu)), Tensor::randint(3, [64], (Kind::Int64, Device::Cpu)));
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root(), 4, 3, Default::default());
/// let mut opt = nn::Sgd::default().build(&vs, 0.05)?; // tch's own
/// let mut swag = Swag::new(&vs, 20)?;
/// for epoch in 0..30 {
///     for (x, y) in x.split(16, 0).iter().zip(y.split(16, 0)) {
///         opt.backward_step(&net.forward(x).cross_entropy_for_logits(&y));
///     }
///     if epoch >= 10 {
///         swag.collect()?;
///     }
/// }
/// let q = swag.posterior()?;
/// let p = q.predict(&vs, 64, || net.forward(&x).softmax(-1, Kind::Float))?;
/// # assert_eq!((p.mean.size(), q.rank()), (vec![64, 3], 20));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Swag {
    watched: Watched<Iterates>,
    rank: usize,
    deviations: Deviations,
    collected: u64,
}

/// From what a deviation of [`Swag`] is measured. Both are there whichever was chosen during the training.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Deviations {
    /// θᵢ - mᵢ, from the mean of the first i iterates, as the published code does: the first deviation is 0, and early
    /// ones are too small.
    #[default]
    Running,
    /// θᵢ - m_T, from the mean of all: with K = T, DᵀD/(K-1) is the unbiased sample covariance.
    Final,
}

/// Of one parameter.
#[derive(Debug)]
struct Iterates {
    moments: Moments,
    /// eᵢ = θᵢ - mᵢ of the last, the oldest first. Since mᵢ - mᵢ₋₁ = eᵢ/(i-1), they say how far each is from the mean
    /// of all, too.
    running: VecDeque<Tensor>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    rank: usize,
    deviations: Deviations,
    collected: u64,
    /// In order; the file sorts its tensors.
    names: Vec<String>,
}

const FORM: &str = "SWAG iterates";
const VARIANCE: &str = ".variance";
const DEVIATIONS: &str = ".deviations";

/// Deviations that are kept of so many iterates.
fn kept(collected: u64, rank: usize) -> usize {
    usize::try_from(collected).unwrap_or(usize::MAX).min(rank)
}

impl Swag {
    /// Of these parameters, with the last K = `rank` deviations (published: 20), or 0 for [`Swag::diagonal`] alone.
    ///
    /// # Errors
    /// A rank of 1, which has no covariance; no parameter.
    pub fn new(params: impl Into<Params>, rank: usize) -> Result<Self> {
        check_rank(rank)?;
        let watched = Watched::new(params, start(0))?;
        Ok(Swag { watched, rank, deviations: Deviations::default(), collected: 0 })
    }

    /// From what deviations are measured; default [`Deviations::Running`]. It may be chosen at any time.
    #[must_use]
    pub fn deviations(mut self, deviations: Deviations) -> Self {
        self.deviations = deviations;
        self
    }

    /// Takes the present weights: call it once per epoch, when the learning rate is where it stays.
    ///
    /// # Errors
    /// Weights that are not finite, a parameter of another shape than before. Nothing has changed then.
    pub fn collect(&mut self) -> Result<()> {
        let (rank, before) = (self.rank, kept(self.collected, self.rank));
        let present = self.watched.look()?;
        present.check_finite()?;
        let t = self.collected.saturating_add(1);
        self.watched.take_in(&present, start(before), |iterates, weights| {
            iterates.moments.take_in(weights, 1.0 / t as f64);
            if iterates.running.len() == rank {
                iterates.running.pop_front();
            }
            if rank > 0 {
                iterates.running.push_back(weights - &iterates.moments.mean);
            }
        });
        self.collected = t;
        Ok(())
    }

    /// Number of iterates T so far.
    pub fn collected(&self) -> u64 {
        self.collected
    }

    /// m of one parameter, in its shape: SWAG's own tensor, so copy it before you write to it.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.watched.get(name).map(|iterates| iterates.moments.mean.shallow_clone())
    }

    /// N(m, ½(diag v + DᵀD/(K-1))).
    ///
    /// # Errors
    /// Fewer than two iterates; a rank of 0; a covariance beyond the range of the weights' kind.
    pub fn posterior(&self) -> Result<LowRankGaussian> {
        let _no_grad = tch::no_grad_guard();
        check_some("SWAG has collected", self.collected)?;
        if self.rank == 0 {
            let problem = "SWAG keeps no deviations (rank 0): take .diagonal(), or make it with a rank of 2 or more";
            return Err(Error::Posterior(problem.to_owned()));
        }
        let k = kept(self.collected, self.rank) as f64;
        let entries = self.watched.all().map(|(name, iterates)| {
            let Moments { mean, variance } = &iterates.moments;
            let d = clamped(variance.as_ref().expect("it is kept")) * 0.5;
            let deviations = match self.deviations {
                Deviations::Running => iterates.stacked(),
                Deviations::Final => iterates.about_the_last_mean(self.collected),
            };
            (name, mean.copy(), d, deviations * (0.5 / (k - 1.0)).sqrt())
        });
        LowRankGaussian::sharing(entries.collect::<Vec<_>>())
    }

    /// N(m, diag v), SWAG-Diagonal.
    ///
    /// # Errors
    /// Fewer than two iterates.
    pub fn diagonal(&self) -> Result<DiagonalGaussian> {
        check_some("SWAG has collected", self.collected)?;
        gaussian(self.watched.all().map(|(name, iterates)| (name, &iterates.moments)), 1.0)
    }

    /// Puts the means into the variables until the guard is dropped, as [`Ema::swap_in`](crate::Ema::swap_in):
    /// stochastic weight averaging.
    ///
    /// # Errors
    /// As there; nothing collected yet.
    pub fn swap_in(&self) -> Result<Perturbed> {
        if self.collected == 0 {
            return Err(Error::Posterior("SWAG has collected nothing yet: call collect() first".to_owned()));
        }
        self.watched.swap_in(|iterates| iterates.moments.mean.shallow_clone())
    }

    /// Writes all that is kept, rank and convention to one safetensors file, which is replaced atomically: of each
    /// parameter the tensors `<name>`, the mean, so that [`VarStore::load`](tch::nn::VarStore::load) reads it too,
    /// `<name>.variance` and `<name>.deviations` `[K, …]` from the running means, the oldest first.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let Swag { rank, deviations, collected, .. } = *self;
        let content = |names| Content { rank, deviations, collected, names };
        self.watched.save(path.as_ref(), FORM, content, |iterates| {
            let Moments { mean, variance } = &iterates.moments;
            let variance = variance.as_ref().map(|v| (VARIANCE, v.shallow_clone()));
            let deviations = (!iterates.running.is_empty()).then(|| (DEVIATIONS, iterates.stacked()));
            [("", mean.shallow_clone())].into_iter().chain(variance).chain(deviations).collect()
        })
    }

    /// Goes on where [`Swag::save`] left it, with the file's rank and convention: of the same parameters, in any order.
    /// The model's variables stay as they are.
    ///
    /// # Errors
    /// As [`Ema::load`](crate::Ema::load). Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (tensors, Content { rank, deviations, collected, names }) = checkpoint::load(path, FORM)?;
        check_rank(rank).map_err(|e| Error::file(path, e))?;
        let iterates = |part: &mut Part| {
            let k = kept(collected, rank);
            let running = if k == 0 { Vec::new() } else { part.take(DEVIATIONS, &[k as i64])?.f_unbind(0)? };
            let variance = Some(part.take_variance(VARIANCE)?);
            let moments = Moments { mean: part.take("", &[])?, variance };
            Ok(Iterates { moments, running: running.into_iter().map(|t| t.copy()).collect() })
        };
        let before = kept(self.collected, self.rank);
        let all = self.watched.read(path, tensors, names, start(before), iterates)?;
        self.watched.put(all);
        (self.rank, self.deviations, self.collected) = (rank, deviations, collected);
        Ok(())
    }
}

fn check_rank(rank: usize) -> Result<()> {
    check::that("rank", rank, rank != 1, "0 for variances alone, or at least 2")
}

/// A variable that is created later was always at its first value.
fn start(kept: usize) -> impl Fn(Tensor) -> Iterates {
    move |weights| {
        let running = (0..kept).map(|_| weights.zeros_like()).collect();
        Iterates { moments: Moments::at(weights, true), running }
    }
}

impl Iterates {
    /// `[K, …]`
    fn stacked(&self) -> Tensor {
        Tensor::stack(&self.running.iter().collect::<Vec<_>>(), 0)
    }

    /// θᵢ - m_T `[K, …]`: eᵢ less the way of the mean since, which is a sum of small numbers. Differences of weights
    /// would have lost their digits in f32.
    fn about_the_last_mean(&self, collected: u64) -> Tensor {
        let mut since = self.moments.mean.zeros_like();
        let mut all = VecDeque::new();
        for (back, e) in self.running.iter().rev().enumerate() {
            all.push_front(e - &since);
            // eᵢ/(i-1); of the first, which is 0, nobody asks.
            let i = collected.saturating_sub(back as u64);
            if i > 1 {
                since += e / (i as f64 - 1.0);
            }
        }
        Tensor::stack(all.make_contiguous(), 0)
    }
}

#[cfg(test)]
mod tests;
