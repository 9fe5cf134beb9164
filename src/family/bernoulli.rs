//! The Bernoulli distribution, held by its natural parameter, which every finite number is.

use super::ExponentialFamily;
use super::numbers::{inside, numbers, tensor};
use super::random::Stream;
use crate::{Error, Result};
use tch::Tensor;

/// x ∈ {0, 1} with P(x = 1) = p; P = 1.
///
/// ```text
/// λ = ln p/(1-p)        T(x) = x        μ = p        A = ln(1 + eᵏ), k = λ
/// ```
///
/// Draws: `[n]`. A weight s = 2x-1 ∈ {-1, 1} has natural parameter ½λ and mean 2μ-1 = tanh ½λ.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bernoulli {
    logit: f64,
}

impl Bernoulli {
    /// From p in (0, 1).
    ///
    /// # Errors
    /// Any other p.
    pub fn new(p: f64) -> Result<Self> {
        if !(p > 0.0 && p < 1.0) {
            return Err(Error::family(Self::NAME, format!("p = {p}: expected a number in (0, 1)")));
        }
        Ok(Bernoulli { logit: (p / (1.0 - p)).ln() })
    }

    /// p
    pub fn p(&self) -> f64 {
        1.0 / (1.0 + (-self.logit).exp())
    }
}

impl ExponentialFamily for Bernoulli {
    const NAME: &'static str = "Bernoulli";

    fn from_natural(lambda: &Tensor) -> Result<Self> {
        let [logit] = numbers(Self::NAME, "λ", lambda)?;
        Ok(Bernoulli { logit })
    }

    fn natural(&self) -> Tensor {
        Tensor::from_slice(&[self.logit])
    }

    fn from_expectation(mu: &Tensor) -> Result<Self> {
        let [p] = numbers(Self::NAME, "μ", mu)?;
        Self::new(p)
    }

    fn expectation(&self) -> Tensor {
        Tensor::from_slice(&[self.p()])
    }

    fn log_partition(&self) -> f64 {
        // ln(1 + eᵏ) without overflow, and with all digits of a small eᵏ.
        self.logit.max(0.0) + (-self.logit.abs()).exp().ln_1p()
    }

    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        // Exact comparison: a number next to 1 is not a rounded 1 here but a mistake of the caller.
        let x = tensor(Self::NAME, "x", x, &[-1])?;
        let ok = x.eq(0.0).logical_or(&x.eq(1.0));
        inside(Self::NAME, x.unsqueeze(1), &ok, "{0, 1}")
    }

    fn sample(&self, n: usize, seed: u64) -> Tensor {
        let mut stream = Stream::new(seed);
        Tensor::from_slice(&(0..n).map(|_| f64::from(stream.uniform() < self.p())).collect::<Vec<_>>())
    }
}
