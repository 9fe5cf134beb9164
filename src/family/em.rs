//! Expectation-maximization for mixtures of any exponential family.

use super::numbers::{positive_tensor, tensor};
use super::{Categorical, ExponentialFamily, exponential};
use crate::Result;
use tch::{Kind, Tensor};

/// p(x) = Σₖ πₖ pₖ(x) with components of one family, fitted by expectation-maximization.
///
/// ```text
/// E    q(zᵢ = k) ∝ exp( ln πₖ + ⟨λₖ, tᵢ⟩ - nᵢ A(λₖ) )               = rᵢₖ
/// M    μₖ = Σᵢ rᵢₖ tᵢ / Σᵢ rᵢₖ nᵢ,   π = mean of r
/// ```
///
/// The E-step is the rule with ρ = 1 for the categorical q(zᵢ), to which the complete likelihood is conjugate. The
/// M-step is the rule's fixed point for the parameters under the delta method (a Gaussian around them, of which only
/// the mean is used); within an exponential family that is [`ExponentialFamily::from_expectation`]. The Bayesian
/// version keeps distributions of the parameters: [`BayesianMixture`](super::BayesianMixture).
///
/// A datum is a group of nᵢ draws that share their component, given by the sum tᵢ of their statistics; single draws
/// have `counts` of one and [`ExponentialFamily::statistics`].
///
/// ```
/// use tch::Tensor;
/// use tch_blr::family::{Bernoulli, Categorical, Mixture};
/// # fn main() -> tch_blr::Result<()> {
/// // Five rounds of ten flips, each with one of two coins (Do and Batzoglou, 2008). Which coin it was has even odds.
/// let heads = Tensor::from_slice(&[5.0, 9.0, 8.0, 4.0, 7.0]).unsqueeze(1);
/// let flips = Tensor::from_slice(&[10.0; 5]);
/// let even = || Categorical::new(&Tensor::from_slice(&[1.0, 1.0]));
/// let mut coins = Mixture::new(even()?, vec![Bernoulli::new(0.6)?, Bernoulli::new(0.5)?])?;
/// for _ in 0..10 {
///     coins = coins.em_step(&heads, &flips)?.with_weights(even()?)?;
/// }
/// let [a, b] = [0, 1].map(|k| coins.components()[k].p());
/// assert!((a - 0.80).abs() < 0.005 && (b - 0.52).abs() < 0.005);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Mixture<F> {
    weights: Categorical,
    components: Vec<F>,
}

const NAME: &str = "mixture";

impl<F: ExponentialFamily> Mixture<F> {
    /// From π and as many components, of one dimension.
    ///
    /// # Errors
    /// If numbers or dimensions differ.
    pub fn new(weights: Categorical, components: Vec<F>) -> Result<Self> {
        exponential::components(NAME, weights.probabilities().numel(), &components)?;
        Ok(Mixture { weights, components })
    }

    /// π
    pub fn weights(&self) -> &Categorical {
        &self.weights
    }

    /// pₖ
    pub fn components(&self) -> &[F] {
        &self.components
    }

    /// The same components with another π, for example one that is not learned.
    ///
    /// # Errors
    /// If the numbers differ.
    pub fn with_weights(self, weights: Categorical) -> Result<Self> {
        Self::new(weights, self.components)
    }

    /// t `[n, P]` and n `[n]`, checked.
    fn data(&self, statistics: &Tensor, counts: &Tensor) -> Result<(Tensor, Tensor)> {
        let counts = positive_tensor(NAME, "the counts", counts, &[-1])?;
        let size = [counts.size()[0], self.components[0].natural().size()[0]];
        Ok((tensor(NAME, "the statistics", statistics, &size)?, counts))
    }

    /// ln πₖ + ⟨λₖ, tᵢ⟩ - nᵢ A(λₖ), `[n, K]`
    fn scores(&self, statistics: &Tensor, counts: &Tensor) -> Result<Tensor> {
        let (statistics, counts) = self.data(statistics, counts)?;
        let lambdas: Vec<Tensor> = self.components.iter().map(F::natural).collect();
        let log_partitions: Vec<f64> = self.components.iter().map(F::log_partition).collect();
        let log_likelihood =
            statistics.matmul(&Tensor::stack(&lambdas, 1)) - counts.outer(&Tensor::from_slice(&log_partitions));
        Ok(log_likelihood + self.weights.log_probabilities())
    }

    /// r, `[n, K]`.
    ///
    /// # Errors
    /// Shapes that do not fit, counts that are not positive.
    pub fn responsibilities(&self, statistics: &Tensor, counts: &Tensor) -> Result<Tensor> {
        // A softmax of the scores: the densities themselves underflow for data of a few hundred draws.
        Ok(self.scores(statistics, counts)?.softmax(1, Kind::Double))
    }

    /// Σᵢ ln p(xᵢ), in which the draws of a group come in the order that they had.
    ///
    /// # Errors
    /// As [`Mixture::responsibilities`].
    pub fn log_likelihood(&self, statistics: &Tensor, counts: &Tensor) -> Result<f64> {
        let each = self.scores(statistics, counts)?.logsumexp([1], false);
        Ok(each.sum(Kind::Double).double_value(&[]))
    }

    /// The mixture after one E-step and one M-step; its log-likelihood is not lower.
    ///
    /// # Errors
    /// As [`Mixture::responsibilities`]; a component whose draws do not determine it (all equal, or none).
    pub fn em_step(&self, statistics: &Tensor, counts: &Tensor) -> Result<Self> {
        let r = self.responsibilities(statistics, counts)?;
        let (statistics, counts) = self.data(statistics, counts)?;
        let mu = r.tr().matmul(&statistics) / r.tr().mv(&counts).unsqueeze(1); // [K, P]
        let components = (0..self.components.len() as i64).map(|k| F::from_expectation(&mu.get(k)));
        // A component without any responsibility has weight 0, which is an error here, and not a silent NaN later.
        let weights = Categorical::new(&r.sum_dim_intlist(0, false, Kind::Double))?;
        Self::new(weights, components.collect::<Result<_>>()?)
    }
}
