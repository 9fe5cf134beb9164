//! The beta distribution.

use super::dirichlet::concentration;
use super::numbers::{digamma, inside, ln_gamma, numbers, positive, tensor};
use super::random::Stream;
use super::{ConjugatePrior, ExponentialFamily};
use crate::Result;
use tch::Tensor;

/// Beta(a, b) on 0 < x < 1, mean a/(a+b); P = 2.
///
/// ```text
/// λ = ( a-1, b-1 )        T(x) = ( ln x, ln(1-x) )        μ = ( ψ(a) - ψ(a+b), ψ(b) - ψ(a+b) )
/// A = ln Γ(a) + ln Γ(b) - ln Γ(a+b)
/// ```
///
/// Draws: `[n]`. Conjugate to x ~ Bernoulli(θ): a ← a + x, b ← b + 1 - x.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Beta {
    a: f64,
    b: f64,
}

impl Beta {
    /// From a > 0 and b > 0.
    ///
    /// # Errors
    /// Any others.
    pub fn new(a: f64, b: f64) -> Result<Self> {
        positive(Self::NAME, "a", a)?;
        positive(Self::NAME, "b", b)?;
        Ok(Beta { a, b })
    }

    /// a
    pub fn a(&self) -> f64 {
        self.a
    }

    /// b
    pub fn b(&self) -> f64 {
        self.b
    }

    /// a/(a+b)
    pub fn mean(&self) -> f64 {
        self.a / (self.a + self.b)
    }
}

impl ExponentialFamily for Beta {
    const NAME: &'static str = "Beta";

    fn from_natural(lambda: &Tensor) -> Result<Self> {
        let [a, b] = numbers(Self::NAME, "λ", lambda)?;
        Self::new(a + 1.0, b + 1.0)
    }

    fn natural(&self) -> Tensor {
        Tensor::from_slice(&[self.a - 1.0, self.b - 1.0])
    }

    fn from_expectation(mu: &Tensor) -> Result<Self> {
        // A beta is a Dirichlet of two classes, whose Newton iteration serves both.
        let [a, b] = numbers(Self::NAME, "(a, b)", &concentration(Self::NAME, &tensor(Self::NAME, "μ", mu, &[2])?)?)?;
        Self::new(a, b)
    }

    fn expectation(&self) -> Tensor {
        let both = digamma(self.a + self.b);
        Tensor::from_slice(&[digamma(self.a) - both, digamma(self.b) - both])
    }

    fn log_partition(&self) -> f64 {
        ln_gamma(self.a) + ln_gamma(self.b) - ln_gamma(self.a + self.b)
    }

    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor(Self::NAME, "x", x, &[-1])?;
        let ok = x.gt(0.0).logical_and(&x.lt(1.0));
        // log1p, because 1 - x would lose the digits of a small x.
        inside(Self::NAME, Tensor::stack(&[x.log(), (-x).log1p()], 1), &ok, "(0, 1)")
    }

    fn sample(&self, n: usize, seed: u64) -> Tensor {
        let mut stream = Stream::new(seed);
        let mut draw = || {
            let (x, y) = (stream.gamma(self.a), stream.gamma(self.b));
            // A quotient may round to 0 or 1, where ln x or ln(1-x) is infinite. The upper limit is the f64 next to 1.
            (x / (x + y)).clamp(f64::MIN_POSITIVE, 1.0 - 0.5 * f64::EPSILON)
        };
        Tensor::from_slice(&(0..n).map(|_| draw()).collect::<Vec<_>>())
    }
}

impl ConjugatePrior for Beta {
    /// x ~ Bernoulli(θ), x in {0, 1}: t(x) = (x, 1-x)
    fn likelihood(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor("Bernoulli", "x", x, &[-1])?;
        let ok = x.eq(0.0).logical_or(&x.eq(1.0));
        inside("Bernoulli", Tensor::stack(&[&x, &(1.0 - &x)], 1), &ok, "{0, 1}")
    }
}
