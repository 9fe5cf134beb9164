//! The gamma distribution.

use super::numbers::{digamma, inside, ln_gamma, numbers, positive, tensor, trigamma};
use super::random::Stream;
use super::{ConjugatePrior, ExponentialFamily};
use crate::{Error, Result};
use tch::Tensor;

/// Gamma with shape a and rate b on x > 0, mean a/b; P = 2.
///
/// ```text
/// λ = ( a-1, -b )        T(x) = ( ln x, x )        μ = ( ψ(a) - ln b, a/b )
/// A = ln Γ(a) - a ln b
/// ```
///
/// Draws: `[n]`. Conjugate to counts x ~ Poisson(θ): a ← a + x, b ← b + 1.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gamma {
    shape: f64,
    rate: f64,
}

impl Gamma {
    /// From a > 0 and b > 0.
    ///
    /// # Errors
    /// Any others.
    pub fn new(shape: f64, rate: f64) -> Result<Self> {
        positive(Self::NAME, "the shape a", shape)?;
        positive(Self::NAME, "the rate b", rate)?;
        Ok(Gamma { shape, rate })
    }

    /// a
    pub fn shape(&self) -> f64 {
        self.shape
    }

    /// b
    pub fn rate(&self) -> f64 {
        self.rate
    }

    /// a/b
    pub fn mean(&self) -> f64 {
        self.shape / self.rate
    }
}

impl ExponentialFamily for Gamma {
    const NAME: &'static str = "Gamma";

    fn from_natural(lambda: &Tensor) -> Result<Self> {
        let [shape, rate] = numbers(Self::NAME, "λ", lambda)?;
        Self::new(shape + 1.0, -rate)
    }

    fn natural(&self) -> Tensor {
        Tensor::from_slice(&[self.shape - 1.0, -self.rate])
    }

    /// Solves ln a - ψ(a) = ln μ₂ - μ₁ =: s by Newton's method for 1/a (Minka, *Estimating a Gamma distribution*,
    /// 2002).
    fn from_expectation(mu: &Tensor) -> Result<Self> {
        let [log, mean] = numbers(Self::NAME, "μ", mu)?;
        positive(Self::NAME, "the mean μ₂", mean)?;
        let s = mean.ln() - log;
        if s <= 0.0 {
            let problem = format!("μ = ({log}, {mean}): expected E[ln x] below ln E[x] = {}", mean.ln());
            return Err(Error::family(Self::NAME, problem));
        }
        // Minka's closed-form start, within about 1.5 % of the solution.
        let mut a = (3.0 - s + ((s - 3.0).powi(2) + 24.0 * s).sqrt()) / (12.0 * s);
        // A few steps are enough; the limit ends an iteration that flickers in the last digit.
        for _ in 0..50 {
            let trigamma = trigamma(&Tensor::from(a)).double_value(&[]);
            let next = 1.0 / (1.0 / a + (a.ln() - digamma(a) - s) / (a * a * (1.0 / a - trigamma)));
            let change = (next - a).abs();
            a = next;
            // As many digits as f64 has.
            if change <= 1e-15 * a {
                break;
            }
        }
        Self::new(a, a / mean)
    }

    fn expectation(&self) -> Tensor {
        Tensor::from_slice(&[digamma(self.shape) - self.rate.ln(), self.mean()])
    }

    fn log_partition(&self) -> f64 {
        ln_gamma(self.shape) - self.shape * self.rate.ln()
    }

    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor(Self::NAME, "x", x, &[-1])?;
        inside(Self::NAME, Tensor::stack(&[x.log(), x.shallow_clone()], 1), &x.gt(0.0), "x > 0")
    }

    fn sample(&self, n: usize, seed: u64) -> Tensor {
        let mut stream = Stream::new(seed);
        Tensor::from_slice(&(0..n).map(|_| stream.gamma(self.shape) / self.rate).collect::<Vec<_>>())
    }
}

impl ConjugatePrior for Gamma {
    /// x ~ Poisson(θ), x = 0, 1, …: t(x) = (x, -1)
    fn likelihood(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor("Poisson", "x", x, &[-1])?;
        // Counts come as f64, exact up to 2⁵³.
        let ok = x.ge(0.0).logical_and(&x.eq_tensor(&x.floor()));
        inside("Poisson", Tensor::stack(&[&x, &-x.ones_like()], 1), &ok, "{0, 1, …}")
    }
}
