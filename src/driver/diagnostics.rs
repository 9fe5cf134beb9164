//! How a training is going: numbers that are read off the posterior and the last update, and change nothing.
//!
//! Quality of predictions is measured in [`crate::metrics`].

use super::arithmetic::{Arithmetic, delta, learned};
use super::row::{MaybePosterior, Row};
use super::{Optimizer, Unit};
use crate::kernel;
use crate::params::Leaf;
use crate::posterior::{DiagonalGaussian, FullGaussian, KroneckerGaussian, Posterior};
use crate::prior::PriorOf;
use crate::{Error, Result};
use std::any::Any;
use tch::{Kind, Tensor};

/// How a training is going, on the scale of the mean loss. [`Diagnostics::advice`] puts into words what stands out.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Diagnostics {
    /// Updates so far.
    pub steps: u64,
    /// Learning rate of the last update, schedule included, of parameters without an override.
    pub lr: f64,
    /// As [`Optimizer::skipped`].
    pub skipped: u64,
    /// Share of the updates, since the optimizer was built, whose gradient was cut by
    /// [`Builder::clip_grad_norm`](crate::Builder::clip_grad_norm) (of several evaluations, the last one's); `None`
    /// without that, or before the first.
    pub clipped: Option<f64>,
    /// Mean loss of the last update: an estimate of E_q\[L\].
    pub loss: f64,
    /// Global L2 norm of the gradient of the last update's last evaluation, before clipping; NaN without the check for
    /// finite gradients.
    pub gradient_norm: f64,
    /// Standard deviations of the noise, which the posterior's samples have; `None` for rows without a posterior, or
    /// without `ess`.
    pub sigma: Option<Sigma>,
    /// KL(q ‖ prior)/ess in nats, the other term of the objective; `None` under a flat prior (δ = 0) or one whose
    /// precision is not diagonal, and without a Gaussian posterior.
    pub kl_per_example: Option<f64>,
    /// The evidence lower bound per example, -(loss + KL/ess); `None` where `kl_per_example` is.
    pub elbo_per_example: Option<f64>,
    /// Share of the data in the posterior's precision, beside what it started with: 1-β₂ᵗ after t updates, of the
    /// parameter with the fewest; `None` for rows whose precision is not such an average.
    pub learned: Option<f64>,
    /// Share of the prior in the posterior's precision, the mean of σ²P₀ over the weights: 1 where the data have said
    /// nothing. `None` where `kl_per_example` is.
    pub prior_share: Option<f64>,
    /// Standard deviations beside the weights, per parameter; empty where `sigma` is `None`.
    pub spreads: Vec<Spread>,
    /// Of elementwise rows: parameters whose passes take many operations of libtorch in place of one, which gives the
    /// same, only slower.
    pub fallback: Option<Fallback>,
}

/// Parameters that are not updated in one pass.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fallback {
    /// Name of the first of them.
    pub name: String,
    /// How many there are.
    pub parameters: usize,
    /// Why it is that the first is not.
    pub reason: String,
}

/// How far the noise spreads the weights of a parameter.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Spread {
    /// Name of the parameter.
    pub name: String,
    /// Number of its dimensions.
    pub dimensions: usize,
    /// Root mean square of the noise's standard deviations.
    pub sigma: f64,
    /// The largest of them.
    pub largest: f64,
    /// Whether a prior bounds them: σ is at most that of the prior where the data have said nothing, and without bound
    /// where there is none (δ = 0).
    pub bounded: bool,
    /// Root mean square of the weights, at the mean.
    pub weights: f64,
}

impl Spread {
    /// σ over weights; infinite where all weights are 0.
    pub fn ratio(&self) -> f64 {
        self.sigma / self.weights
    }
}

/// Standard deviations of the noise of single weights, over all weights. If min, mean and max stay where they started,
/// the precision is not being learned: lower β₂ or `hess_init`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Sigma {
    /// Mean over all weights.
    pub mean: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl<R: Row> Optimizer<R> {
    /// Looks at posterior, loss and gradient; a pass over the weights, so not for every step.
    ///
    /// # Errors
    /// Before the first update since the optimizer was built (a checkpoint does not hold the last loss), and as
    /// [`Optimizer::posterior`].
    pub fn diagnostics(&self) -> Result<Diagnostics> {
        (self.compiled.diagnostics)(self)
    }

    pub(super) fn diagnosed(&self) -> Result<Diagnostics> {
        let Some(last) = self.last else {
            let problem = "there is nothing to diagnose before the first step after building or loading";
            return Err(Error::Posterior(problem.to_owned()));
        };
        let without = Diagnostics {
            steps: self.steps,
            lr: last.lr,
            skipped: self.skipped(),
            clipped: (self.clipped.updates > 0).then(|| self.clipped.cut as f64 / self.clipped.updates as f64),
            loss: last.loss,
            gradient_norm: last.gradient_norm,
            sigma: None,
            kl_per_example: None,
            elbo_per_example: None,
            learned: None,
            prior_share: None,
            spreads: Vec::new(),
            fallback: self.fallback(),
        };
        let ess = self.config.effective_sample_size();
        let Some(ess) = ess.filter(|_| R::Posterior::EXISTS && self.config.has_posterior()) else {
            return Ok(without);
        };
        let q = self.posterior_or_none()?.boxed()?;
        let (kl, prior_share) = self.against_prior(&*q).map(|(kl, share)| (kl / ess, share)).unzip();
        Ok(Diagnostics {
            sigma: Some(sigma(&*q)),
            kl_per_example: kl,
            elbo_per_example: kl.map(|kl| -(last.loss + kl)),
            learned: learned(&self.units),
            prior_share,
            spreads: self.spreads(&*q),
            ..without
        })
    }

    /// KL(q ‖ prior) = E_q[-ln prior] - entropy, and the mean of σ²P₀, for a prior that is a product over the weights.
    fn against_prior(&self, q: &dyn Posterior) -> Option<(f64, f64)> {
        // In f64 throughout: the two terms are of the size of the number of weights, and nearly cancel.
        let (mut kl, mut share) = (-entropy(q)?, 0.0);
        for unit in &self.units {
            for leaf in unit.leaves(&self.params).filter(|leaf| leaf.trainable() && leaf.tensor.numel() > 0) {
                let (m, v) = (double(&q.mean(leaf.name())?), double(&q.variance(leaf.name())?));
                let (offset, p) = prior_of(unit, &m)?;
                share += (&v * &p).sum(Kind::Double).double_value(&[]);
                // Twice the cross-entropy of N(m, v) and the prior at one weight.
                let each = (v + offset.square()) * &p - p.log() + std::f64::consts::TAU.ln();
                kl += 0.5 * each.sum(Kind::Double).double_value(&[]);
            }
        }
        Some((kl, share / q.len() as f64))
    }
}

impl<R: Row> Optimizer<R> {
    fn fallback(&self) -> Option<Fallback> {
        let trained = self.params.leaves().iter().filter(|leaf| R::Arithmetic::SINGLE && leaf.trainable());
        let mut slow = trained.filter_map(|leaf| Some((leaf.name(), kernel::fallback(&leaf.tensor)?)));
        let (name, reason) = slow.next()?;
        Some(Fallback { name: name.to_owned(), parameters: 1 + slow.count(), reason })
    }

    fn spreads(&self, q: &dyn Posterior) -> Vec<Spread> {
        let rms = |squares: &Tensor| squares.mean(Kind::Double).double_value(&[]).sqrt();
        let of = |unit: &Unit<R>, leaf: &Leaf| {
            let (mean, variance) = (double(&q.mean(leaf.name())?), double(&noise(q, leaf.name())?));
            (mean.numel() > 0).then(|| Spread {
                name: leaf.name().to_owned(),
                dimensions: mean.dim(),
                sigma: rms(&variance),
                largest: variance.max().double_value(&[]).sqrt(),
                bounded: !matches!(&unit.prior, PriorOf::Isotropic(prior) if delta(*prior, &unit.row) == 0.0),
                weights: rms(&mean.square()),
            })
        };
        self.units.iter().flat_map(|unit| unit.leaves(&self.params).filter_map(move |leaf| of(unit, leaf))).collect()
    }
}

/// m - m₀ and P₀ of a parameter, elementwise.
fn prior_of<R: Row>(unit: &Unit<R>, m: &Tensor) -> Option<(Tensor, Tensor)> {
    match &unit.prior {
        PriorOf::Isotropic(prior) => {
            let delta = delta(*prior, &unit.row);
            let p = delta * unit.row.effective_sample_size()?;
            // A flat prior is not a distribution, so q has no divergence from it.
            (delta > 0.0).then(|| (m.shallow_clone(), m.full_like(p)))
        }
        // In a joint block the prior is a vector over several parameters.
        PriorOf::Gaussian(prior) if unit.members.len() == 1 => {
            let (m0, p) = prior.diagonal()?;
            Some((m - double(m0).reshape(m.size()), double(&p).reshape(m.size())))
        }
        PriorOf::Gaussian(_) => None,
    }
}

/// Entropy of a Gaussian; other posteriors have none in closed form, or no Gaussian prior.
fn entropy(q: &dyn Posterior) -> Option<f64> {
    let q: &dyn Any = q;
    let diagonal = q.downcast_ref::<DiagonalGaussian>().map(DiagonalGaussian::entropy);
    let kronecker = || q.downcast_ref::<KroneckerGaussian>().map(KroneckerGaussian::entropy);
    diagonal.or_else(kronecker).or_else(|| q.downcast_ref::<FullGaussian>().map(FullGaussian::entropy))
}

fn double(t: &Tensor) -> Tensor {
    t.to_kind(Kind::Double)
}

/// That of the samples: damping is not in a posterior's variance.
fn noise(q: &dyn Posterior, name: &str) -> Option<Tensor> {
    let diagonal = (q as &dyn Any).downcast_ref::<DiagonalGaussian>();
    diagonal.map_or_else(|| q.variance(name), |q| q.sampled_variance(name))
}

fn sigma(q: &dyn Posterior) -> Sigma {
    // Counted once: it asks every parameter.
    let weights = q.len() as f64;
    let mut sigma = Sigma { mean: 0.0, min: f64::INFINITY, max: 0.0 };
    let variances = q.names().filter_map(|name| noise(q, name));
    for sd in variances.filter(|v| v.numel() > 0).map(|v| double(&v).sqrt()) {
        sigma.mean += sd.sum(Kind::Double).double_value(&[]) / weights;
        sigma.min = sigma.min.min(sd.min().double_value(&[]));
        sigma.max = sigma.max.max(sd.max().double_value(&[]));
    }
    sigma
}
