//! Conjugate-computation variational inference, with a site for every datum.

use super::numbers::tensor;
use super::rule::leaves;
use super::{ExponentialFamily, Gaussian, Likelihood};
use crate::{Error, Result, check};
use tch::{Device, Kind, Tensor};

/// The best Gaussian q(θ) for a Gaussian prior and data that see linear functions of θ: generalized linear models (Φ
/// is the design matrix) and Gaussian processes (θ are function values, the prior's covariance is the kernel matrix,
/// and Φ selects the values with a target, or is the identity).
///
/// ```text
/// p(y, θ) = N(θ; prior) Πᵢ exp( -ℓ(fᵢ, yᵢ) ),  fᵢ = φᵢᵀθ
/// λ       = λ₀ + Σᵢ λ̃ᵢ                      λ̃ᵢ = the site of datum i: (λ̃ᵢ⁽¹⁾ φᵢ, λ̃ᵢ⁽²⁾ vec φᵢφᵢᵀ)
/// λ̃ᵢ      ← (1-ρ) λ̃ᵢ - ρ ∇_μ E_q[ℓᵢ]
/// ∇_μ E_q[ℓᵢ] = ( E[ℓ′] - E[ℓ″] mᵢ, ½ E[ℓ″] )                     under fᵢ ~ N(mᵢ, vᵢ)
/// ```
///
/// This is the rule: the prior's part of λ is a fixed point of it, and is put there at once. Every step is a
/// conjugate one with Gaussian pseudo-observations (Khan and Lin, 2017). With ρ = 1 it is non-conjugate variational
/// message passing, and for Gaussian likelihoods the exact posterior after one step. ρ < 1 damps.
///
/// A site says what q knows from one datum, two numbers each. So a datum can be taken out again: exactly and at once
/// if the model is conjugate, otherwise with a few more steps from where it left the others.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_blr::family::{Cvi, Gaussian, LogisticLikelihood};
/// # fn main() -> tch_blr::Result<()> {
/// // A column of ones and one input; the third class does not fit the others.
/// let x = Tensor::from_slice(&[1.0, -1.5, 1.0, 0.2, 1.0, 0.9, 1.0, 2.0]).reshape([4, 2]);
/// let y = Tensor::from_slice(&[0.0, 1.0, 0.0, 1.0]);
/// let prior = Gaussian::new(&Tensor::from_slice(&[0.0, 0.0]), &Tensor::eye(2, (Kind::Double, Device::Cpu)))?;
/// let mut q = Cvi::new(prior, &x, &y, LogisticLikelihood)?;
/// q.fit(1.0, 1e-10, 100)?;
/// let slope = q.posterior().mean().double_value(&[1]);
/// q.remove(2)?;
/// q.fit(1.0, 1e-10, 100)?;
/// assert!(q.posterior().mean().double_value(&[1]) > slope && q.len() == 3);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Cvi<L> {
    prior: Gaussian,
    likelihood: L,
    /// Φ, `[n, d]`
    features: Tensor,
    /// y, `[n]`
    targets: Tensor,
    /// λ̃⁽¹⁾ and λ̃⁽²⁾, `[n, 2]`
    sites: Tensor,
    posterior: Gaussian,
}

const NAME: &str = "CVI";

impl<L: Likelihood> Cvi<L> {
    /// From Φ `[n, d]` and y `[n]`, with sites of zero: q is the prior.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite, targets that the likelihood does not have.
    pub fn new(prior: Gaussian, features: &Tensor, targets: &Tensor, likelihood: L) -> Result<Self> {
        let nothing = |size: &[i64]| Tensor::zeros(size, (Kind::Double, Device::Cpu));
        let mut q = Cvi {
            features: nothing(&[0, prior.dim()]),
            targets: nothing(&[0]),
            sites: nothing(&[0, 2]),
            posterior: Gaussian::from_natural(&prior.natural())?,
            prior,
            likelihood,
        };
        q.insert(features, targets)?;
        Ok(q)
    }

    /// More data, after those that are there: q stays as it is until the next step.
    ///
    /// # Errors
    /// As [`Cvi::new`].
    pub fn insert(&mut self, features: &Tensor, targets: &Tensor) -> Result<()> {
        let targets = tensor(NAME, "y", targets, &[-1])?;
        let features = tensor(NAME, "Φ", features, &[targets.size()[0], self.prior.dim()])?;
        // All checks before the first change, so that an error leaves features, targets and sites of one length.
        self.likelihood.check(&targets)?;
        let sites = Tensor::zeros([targets.size()[0], 2], (Kind::Double, targets.device()));
        self.sites = Tensor::cat(&[&self.sites, &sites], 0);
        self.features = Tensor::cat(&[&self.features, &features], 0);
        self.targets = Tensor::cat(&[&self.targets, &targets], 0);
        Ok(())
    }

    /// Takes datum i and its site out; the data after it move up. For Gaussian likelihoods q is then the posterior of
    /// the others, otherwise a start from which [`Cvi::fit`] gets there.
    ///
    /// # Errors
    /// No such datum, or a site without which S is not positive definite; nothing changes then.
    pub fn remove(&mut self, i: usize) -> Result<()> {
        if i >= self.len() {
            return Err(Error::family(NAME, format!("no datum {i}: there are {}, counted from 0", self.len())));
        }
        let others: Vec<i64> = (0..self.len() as i64).filter(|j| *j != i as i64).collect();
        let others = Tensor::from_slice(&others);
        let [features, targets, sites] =
            [&self.features, &self.targets, &self.sites].map(|t| t.index_select(0, &others));
        // The posterior first: without this site there may be none, and nothing has changed yet.
        self.posterior = Gaussian::from_natural(&self.assemble(&features, &sites))?;
        (self.features, self.targets, self.sites) = (features, targets, sites);
        Ok(())
    }

    /// λ₀ + Σᵢ λ̃ᵢ
    fn assemble(&self, features: &Tensor, sites: &Tensor) -> Tensor {
        let (first, second) = (sites.select(1, 0), sites.select(1, 1));
        // Φᵀ diag(λ̃⁽²⁾) Φ in one product: no [n, d, d] tensor of single sites.
        let matrix = features.tr().matmul(&(features * second.unsqueeze(1)));
        self.prior.natural() + Tensor::cat(&[features.tr().mv(&first), matrix.flatten(0, 1)], 0)
    }

    /// One step for all sites together. Returns how far the site that moved most did, relative to the largest.
    ///
    /// # Errors
    /// ρ that is not positive, expectations that are not finite, and [`Error::Step`] as in
    /// [`rule_step`](super::rule_step). Nothing changes then.
    pub fn step(&mut self, rho: f64) -> Result<f64> {
        check::positive("rho", rho)?;
        if self.is_empty() {
            return Ok(0.0);
        }
        let (mean, variance) = self.posterior.project(&self.features)?;
        let [_, gradient, hessian] = self.likelihood.expected(&self.targets, &mean, &variance)?;
        let gradient_mu = Tensor::stack(&[&gradient - &hessian * mean, hessian * 0.5], 1);
        // Checked, not converted: a NaN from the likelihood must not reach the sites.
        let gradient_mu = tensor(NAME, "∇_μ E_q[ℓᵢ]", &gradient_mu, &self.sites.size())?;
        let after = |rho: f64| &self.sites * (1.0 - rho) - &gradient_mu * rho;
        let posterior = |rho: f64| Gaussian::from_natural(&self.assemble(&self.features, &after(rho)));
        // Before any site moves; and on the way out the bisection asks for smaller ρ.
        let next = posterior(rho).map_err(|e| leaves(rho, &e, |rho| posterior(rho).is_ok()))?;
        let sites = after(rho);
        // Not 0, when no site says anything: the change is then 0, too, and 0/0 would never converge.
        let size = sites.abs().max().double_value(&[]).max(f64::MIN_POSITIVE);
        let change = (&sites - &self.sites).abs().max().double_value(&[]) / size;
        (self.sites, self.posterior) = (sites, next);
        Ok(change)
    }

    /// Steps until no site moves by more than `tolerance` times the largest.
    ///
    /// # Errors
    /// As [`Cvi::step`], and [`Error::NotConverged`] after `max_steps`.
    pub fn fit(&mut self, rho: f64, tolerance: f64, max_steps: usize) -> Result<()> {
        let mut change = f64::INFINITY;
        for _ in 0..max_steps {
            change = self.step(rho)?;
            if change <= tolerance {
                return Ok(());
            }
        }
        Err(Error::NotConverged { steps: max_steps, change })
    }

    /// q(θ)
    pub fn posterior(&self) -> &Gaussian {
        &self.posterior
    }

    /// λ̃⁽¹⁾ and λ̃⁽²⁾ of each datum's function value, `[n, 2]`: datum i counts as an observation
    /// -λ̃⁽¹⁾/(2 λ̃⁽²⁾) with noise of variance -1/(2 λ̃⁽²⁾).
    pub fn sites(&self) -> &Tensor {
        &self.sites
    }

    /// n
    pub fn len(&self) -> usize {
        self.targets.numel()
    }

    /// Whether there are no data.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The evidence lower bound -Σᵢ E_q\[ℓᵢ\] - KL(q ‖ prior); with Gaussian likelihoods, after a step, ln p(y).
    ///
    /// # Errors
    /// As [`Likelihood::expected`].
    pub fn elbo(&self) -> Result<f64> {
        let (mean, variance) = self.posterior.project(&self.features)?;
        let [loss, ..] = self.likelihood.expected(&self.targets, &mean, &variance)?;
        Ok(-loss.sum(Kind::Double).double_value(&[]) - self.posterior.kl(&self.prior)?)
    }
}
