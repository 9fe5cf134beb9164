//! Stochastic variational inference for mixtures.

use super::numbers::tensor;
use super::{ConjugatePrior, Dirichlet, ExponentialFamily, exponential, rule_step};
use crate::{Error, Result, check};
use tch::{Kind, Tensor};

/// q(π) Πₖ q(θₖ) of a mixture with conjugate priors: Dirichlet for the weights, F for each component.
///
/// ```text
/// local     q(zᵢ = k) ∝ exp( E[ln πₖ] + E[ln p(xᵢ|θₖ)] ) = rᵢₖ            the rule with ρ = 1
/// global    λₖ ← (1-ρ) λₖ + ρ ( λ₀ₖ + N/B Σᵢ rᵢₖ t(xᵢ) )                  over B of the N data
///           the same for q(π), with t = rᵢ
/// ```
///
/// With E\[ln p(xᵢ|θₖ)\] = ⟨t(xᵢ), μₖ⟩ the data come in only by their likelihoods t(xᵢ)
/// ([`ConjugatePrior::likelihood`]). All data and ρ = 1 is coordinate ascent, that is variational message passing;
/// batches and ρ = (τ + t)^-κ, ½ < κ ≤ 1, are stochastic variational inference (Hoffman et al., 2013).
///
/// ```
/// use tch::Tensor;
/// use tch_blr::family::{BayesianMixture, ConjugatePrior, Dirichlet, NormalGamma};
/// # fn main() -> tch_blr::Result<()> {
/// let data = Tensor::from_slice(&[-2.1, -1.9, -2.0, 2.9, 3.1, 3.0]);
/// let weights = || Dirichlet::new(&Tensor::from_slice(&[1.0, 1.0]));
/// let component = |mean: f64| NormalGamma::new(mean, 0.1, 1.0, 1.0);
/// let prior = BayesianMixture::new(weights()?, vec![component(0.0)?, component(0.0)?])?;
/// let mut q = BayesianMixture::new(weights()?, vec![component(-1.0)?, component(1.0)?])?; // symmetry broken
/// let likelihood = q.components()[0].likelihood(&data)?;
/// for _ in 0..20 {
///     q = q.step(&prior, &likelihood, 1.0, 1.0)?;
/// }
/// assert!((q.components()[1].mean() - 9.0 / 3.1).abs() < 1e-3); // κ: 3 data and 0.1 from the prior
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct BayesianMixture<F> {
    weights: Dirichlet,
    components: Vec<F>,
}

const NAME: &str = "Bayesian mixture";

impl<F: ConjugatePrior> BayesianMixture<F> {
    /// From q(π) and as many components, of one dimension.
    ///
    /// # Errors
    /// If numbers or dimensions differ.
    pub fn new(weights: Dirichlet, components: Vec<F>) -> Result<Self> {
        exponential::components(NAME, weights.concentration().numel(), &components)?;
        Ok(BayesianMixture { weights, components })
    }

    /// q(π)
    pub fn weights(&self) -> &Dirichlet {
        &self.weights
    }

    /// q(θₖ)
    pub fn components(&self) -> &[F] {
        &self.components
    }

    /// t(xᵢ), checked.
    fn data(&self, likelihood: &Tensor) -> Result<Tensor> {
        tensor(NAME, "the likelihood", likelihood, &[-1, self.components[0].natural().size()[0]])
    }

    /// E\[ln πₖ\] + ⟨t(xᵢ), μₖ⟩, `[n, K]`
    fn scores(&self, likelihood: &Tensor) -> Result<Tensor> {
        let mus: Vec<Tensor> = self.components.iter().map(F::expectation).collect();
        Ok(self.data(likelihood)?.matmul(&Tensor::stack(&mus, 1)) + self.weights.expectation())
    }

    /// r, `[n, K]`, from t(xᵢ) `[n, P]`.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite.
    pub fn responsibilities(&self, likelihood: &Tensor) -> Result<Tensor> {
        Ok(self.scores(likelihood)?.softmax(1, Kind::Double))
    }

    /// One local and one global step on a batch that stands for `scale` = N/B times as many data.
    ///
    /// # Errors
    /// As [`BayesianMixture::responsibilities`]; ρ or a scale that is not positive; a prior with other components;
    /// and as [`rule_step`].
    pub fn step(&self, prior: &Self, likelihood: &Tensor, scale: f64, rho: f64) -> Result<Self> {
        check::positive("scale", scale)?;
        self.same_components(prior)?;
        // From the old factors for all components: the global step is one step of the rule, not a sweep.
        let r = self.responsibilities(likelihood)?;
        let counts = r.sum_dim_intlist(0, false, Kind::Double) * scale;
        let sums = r.tr().matmul(&self.data(likelihood)?) * scale;
        let weights = rule_step(&self.weights, rho, &-(prior.weights.natural() + counts))?;
        let components = self.components.iter().zip(&prior.components).enumerate();
        let components = components.map(|(k, (q, p))| rule_step(q, rho, &-(p.natural() + sums.get(k as i64))));
        Self::new(weights, components.collect::<Result<_>>()?)
    }

    /// The evidence lower bound with the best q(z), without the likelihoods' constants:
    /// Σᵢ ln Σₖ exp( E\[ln πₖ\] + ⟨t(xᵢ), μₖ⟩ ) - KL(q ‖ prior).
    ///
    /// # Errors
    /// As [`BayesianMixture::step`].
    pub fn elbo(&self, prior: &Self, likelihood: &Tensor) -> Result<f64> {
        self.same_components(prior)?;
        // With the best q(z), its energy and entropy are this one logarithm.
        let data = self.scores(likelihood)?.logsumexp([1], false).sum(Kind::Double).double_value(&[]);
        let components = self.components.iter().zip(&prior.components).map(|(q, p)| q.kl(p));
        Ok(data - self.weights.kl(&prior.weights)? - components.sum::<Result<f64>>()?)
    }

    fn same_components(&self, prior: &Self) -> Result<()> {
        let form = |q: &Self| (q.components.len(), q.components[0].natural().numel());
        let ((k, p), theirs) = (form(self), form(prior));
        if theirs != (k, p) {
            let problem =
                format!("the prior has {} components of {} parameters: expected {k} of {p}", theirs.0, theirs.1);
            return Err(Error::family(NAME, problem));
        }
        Ok(())
    }
}
