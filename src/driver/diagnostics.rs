//! How a training is going: numbers that are read off the posterior and the last update, and change nothing.
//!
//! Quality of predictions is measured in [`crate::metrics`].

use super::arithmetic::delta;
use super::row::{MaybePosterior, Row};
use super::{Optimizer, Unit};
use crate::posterior::{DiagonalGaussian, FullGaussian, KroneckerGaussian, Posterior};
use crate::prior::PriorOf;
use crate::{Error, Result};
use std::any::Any;
use tch::{Kind, Tensor};

/// How a training is going, on the scale of the mean loss.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Diagnostics {
    /// Updates so far.
    pub steps: u64,
    /// As [`Optimizer::skipped`].
    pub skipped: u64,
    /// Mean loss of the last update: an estimate of E_q\[L\].
    pub loss: f64,
    /// Global L2 norm of the gradient of the last update's last evaluation, before clipping; NaN without the check for
    /// finite gradients.
    pub gradient_norm: f64,
    /// Standard deviations of the posterior; `None` for rows without one, or without `ess`.
    pub sigma: Option<Sigma>,
    /// KL(q ‖ prior)/ess in nats, the other term of the objective; `None` under a flat prior (δ = 0) or one whose
    /// precision is not diagonal, and without a Gaussian posterior.
    pub kl_per_example: Option<f64>,
    /// The evidence lower bound per example, -(loss + KL/ess); `None` where `kl_per_example` is.
    pub elbo_per_example: Option<f64>,
}

/// Posterior standard deviations of single weights, over all weights. If min, mean and max stay where they started, the
/// precision is not being learned: lower β₂ or `hess_init`.
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
        let Some(last) = self.last else {
            let problem = "there is nothing to diagnose before the first step after building or loading";
            return Err(Error::Posterior(problem.to_owned()));
        };
        let without = Diagnostics {
            steps: self.steps,
            skipped: self.skipped(),
            loss: last.loss,
            gradient_norm: last.gradient_norm,
            sigma: None,
            kl_per_example: None,
            elbo_per_example: None,
        };
        let (Some(ess), true) = (self.config.effective_sample_size(), R::Posterior::EXISTS) else {
            return Ok(without);
        };
        let q = self.posterior_or_none()?.boxed()?;
        let kl = self.kl(&*q).map(|kl| kl / ess);
        Ok(Diagnostics {
            sigma: Some(sigma(&*q)),
            kl_per_example: kl,
            elbo_per_example: kl.map(|kl| -(last.loss + kl)),
            ..without
        })
    }

    /// KL(q ‖ prior) = E_q[-ln prior] - entropy, for a prior that is a product over the weights.
    fn kl(&self, q: &dyn Posterior) -> Option<f64> {
        // In f64 throughout: the two terms are of the size of the number of weights, and nearly cancel.
        let mut cross = -entropy(q)?;
        for unit in &self.units {
            for leaf in unit.leaves(&self.params).filter(|leaf| leaf.trainable() && leaf.tensor.numel() > 0) {
                let (m, v) = (double(&q.mean(leaf.name())?), double(&q.variance(leaf.name())?));
                let (offset, p) = prior_of(unit, &m)?;
                // Twice the cross-entropy of N(m, v) and the prior at one weight.
                let each = (v + offset.square()) * &p - p.log() + std::f64::consts::TAU.ln();
                cross += 0.5 * each.sum(Kind::Double).double_value(&[]);
            }
        }
        Some(cross)
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

fn sigma(q: &dyn Posterior) -> Sigma {
    let mut sigma = Sigma { mean: 0.0, min: f64::INFINITY, max: 0.0 };
    let variances = q.names().filter_map(|name| q.variance(name));
    for sd in variances.filter(|v| v.numel() > 0).map(|v| double(&v).sqrt()) {
        sigma.mean += sd.sum(Kind::Double).double_value(&[]) / q.len() as f64;
        sigma.min = sigma.min.min(sd.min().double_value(&[]));
        sigma.max = sigma.max.max(sd.max().double_value(&[]));
    }
    sigma
}
