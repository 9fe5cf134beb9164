//! The Normal-gamma distribution: a mean and a precision together.

use super::numbers::{numbers, positive, tensor};
use super::random::Stream;
use super::{ConjugatePrior, ExponentialFamily, Gamma};
use crate::{Error, Result};
use tch::Tensor;

/// τ ~ Gamma(a, b), x ~ N(m, 1/(κτ)); P = 4.
///
/// ```text
/// λ = ( κm, -½κ, a-½, -b - ½κm² )        T = ( τx, τx², ln τ, τ )
/// μ = ( m a/b, 1/κ + m² a/b, ψ(a) - ln b, a/b )
/// A = ln Γ(a) - a ln b - ½ ln κ + ½ ln 2π
/// ```
///
/// Draws: `[n, 2]`, columns x and τ. Conjugate to y ~ N(x, 1/τ) with both unknown.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NormalGamma {
    mean: f64,
    kappa: f64,
    precision: Gamma,
}

impl NormalGamma {
    /// From m, κ > 0, a > 0 and b > 0.
    ///
    /// # Errors
    /// Any others.
    pub fn new(mean: f64, kappa: f64, shape: f64, rate: f64) -> Result<Self> {
        if !mean.is_finite() {
            return Err(Error::family(Self::NAME, format!("the mean m = {mean}: expected a finite number")));
        }
        positive(Self::NAME, "κ", kappa)?;
        positive(Self::NAME, "the shape a", shape)?;
        positive(Self::NAME, "the rate b", rate)?;
        Ok(NormalGamma { mean, kappa, precision: Gamma::new(shape, rate)? })
    }

    /// m
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// κ: how many data the knowledge of the mean is worth
    pub fn kappa(&self) -> f64 {
        self.kappa
    }

    /// The marginal of τ, Gamma(a, b).
    pub fn precision(&self) -> Gamma {
        self.precision
    }
}

impl ExponentialFamily for NormalGamma {
    const NAME: &'static str = "Normal-gamma";

    fn from_natural(lambda: &Tensor) -> Result<Self> {
        let [l1, l2, l3, l4] = numbers(Self::NAME, "λ", lambda)?;
        // Checked before it divides: κ = 0 would make the mean infinite, and the message would blame that.
        let kappa = -2.0 * l2;
        positive(Self::NAME, "κ = -2 λ₂", kappa)?;
        Self::new(l1 / kappa, kappa, l3 + 0.5, -l4 - 0.5 * l1 * l1 / kappa)
    }

    fn natural(&self) -> Tensor {
        let (m, kappa) = (self.mean, self.kappa);
        let (a, b) = (self.precision.shape(), self.precision.rate());
        Tensor::from_slice(&[kappa * m, -0.5 * kappa, a - 0.5, -b - 0.5 * kappa * m * m])
    }

    fn from_expectation(mu: &Tensor) -> Result<Self> {
        let [x, square, log, tau] = numbers(Self::NAME, "μ", mu)?;
        let precision = Gamma::from_expectation(&Tensor::from_slice(&[log, tau]))?;
        // A difference: digits are lost where the mean is large against 1/√κ.
        let spread = square - x * x / tau;
        positive(Self::NAME, "1/κ = μ₂ - μ₁²/μ₄", spread)?;
        Self::new(x / tau, 1.0 / spread, precision.shape(), precision.rate())
    }

    fn expectation(&self) -> Tensor {
        let [log, tau] = [0, 1].map(|i| self.precision.expectation().double_value(&[i]));
        Tensor::from_slice(&[self.mean * tau, 1.0 / self.kappa + self.mean * self.mean * tau, log, tau])
    }

    fn log_partition(&self) -> f64 {
        self.precision.log_partition() - 0.5 * self.kappa.ln() + 0.5 * std::f64::consts::TAU.ln()
    }

    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor(Self::NAME, "(x, τ)", x, &[-1, 2])?;
        let (x, tau) = (x.select(1, 0), x.select(1, 1));
        let log = self.precision.statistics(&tau)?.select(1, 0);
        Ok(Tensor::stack(&[&(&tau * &x), &(&tau * x.square()), &log, &tau], 1))
    }

    fn sample(&self, n: usize, seed: u64) -> Tensor {
        let mut stream = Stream::new(seed);
        let draws: Vec<f64> = (0..n)
            .flat_map(|_| {
                let tau = stream.gamma(self.precision.shape()) / self.precision.rate();
                [self.mean + stream.normal() / (self.kappa * tau).sqrt(), tau]
            })
            .collect();
        Tensor::from_slice(&draws).reshape([n as i64, 2])
    }
}

impl ConjugatePrior for NormalGamma {
    /// y ~ N(x, 1/τ): t(y) = (y, -½, ½, -½y²)
    fn likelihood(&self, y: &Tensor) -> Result<Tensor> {
        let y = tensor("Normal", "y", y, &[-1])?;
        let half = y.full_like(0.5);
        Ok(Tensor::stack(&[&y, &-&half, &half, &(y.square() * -0.5)], 1))
    }
}
