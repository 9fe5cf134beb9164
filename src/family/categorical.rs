//! The categorical distribution.

use super::ExponentialFamily;
use super::numbers::{inside, positive_tensor, tensor};
use super::random::Stream;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// x ∈ {0, …, K-1} with probabilities π; P = K-1.
///
/// ```text
/// λₖ = ln πₖ/π_last        T(x)ₖ = 1 if x = k        μₖ = πₖ        k < last = K-1
/// A = ln(1 + Σ exp λₖ)
/// ```
///
/// The last class is the reference, so that λ ↔ μ is one to one. Draws: `[n]`, as f64 numbers.
#[derive(Debug)]
pub struct Categorical {
    /// ln π, `[K]`
    log_probabilities: Tensor,
}

impl Categorical {
    /// From positive weights `[K]` of K ≥ 2 classes, which are divided by their sum.
    ///
    /// # Errors
    /// Fewer classes, weights that are not finite and positive.
    pub fn new(weights: &Tensor) -> Result<Self> {
        let weights = positive_tensor(Self::NAME, "the weights π", weights, &[-1])?;
        if weights.numel() < 2 {
            return Err(Error::family(Self::NAME, "one class: expected two or more"));
        }
        // Normalized by a log-softmax, since the sum of large weights may overflow.
        Ok(Categorical { log_probabilities: weights.log().log_softmax(0, Kind::Double) })
    }

    /// π, `[K]`
    pub fn probabilities(&self) -> Tensor {
        self.log_probabilities.exp()
    }

    /// ln π, `[K]`
    pub fn log_probabilities(&self) -> &Tensor {
        &self.log_probabilities
    }

    fn last(&self) -> i64 {
        self.log_probabilities.size()[0] - 1
    }
}

impl ExponentialFamily for Categorical {
    const NAME: &'static str = "Categorical";

    fn from_natural(lambda: &Tensor) -> Result<Self> {
        let lambda = tensor(Self::NAME, "λ", lambda, &[-1])?;
        if lambda.numel() == 0 {
            return Err(Error::family(Self::NAME, "one class: expected two or more"));
        }
        // The last class is the reference, with λ = 0.
        let logits = lambda.constant_pad_nd([0, 1]);
        Ok(Categorical { log_probabilities: logits.log_softmax(0, Kind::Double) })
    }

    fn natural(&self) -> Tensor {
        self.log_probabilities.narrow(0, 0, self.last()) - self.log_probabilities.get(self.last())
    }

    fn from_expectation(mu: &Tensor) -> Result<Self> {
        let mu = positive_tensor(Self::NAME, "μ", mu, &[-1])?;
        // Its sign is checked below: it is the test that the others sum to less than 1.
        let last = -mu.sum(Kind::Double) + 1.0;
        Self::new(&positive_tensor(Self::NAME, "(μ, 1 - Σ μ)", &Tensor::cat(&[mu, last.reshape([1])], 0), &[-1])?)
    }

    fn expectation(&self) -> Tensor {
        self.probabilities().narrow(0, 0, self.last())
    }

    fn log_partition(&self) -> f64 {
        // π_last = 1/(1 + Σ exp λₖ), so A is already there, without a sum that could overflow.
        -self.log_probabilities.double_value(&[self.last()])
    }

    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor(Self::NAME, "x", x, &[-1])?;
        let classes = Tensor::arange(self.last() + 1, (Kind::Double, x.device()));
        let one_hot = x.unsqueeze(1).eq_tensor(&classes).to_kind(Kind::Double);
        let known = one_hot.sum_dim_intlist(1, false, Kind::Double).eq(1.0);
        inside(Self::NAME, one_hot.narrow(1, 0, self.last()), &known, "{0, …, K-1}")
    }

    fn sample(&self, n: usize, seed: u64) -> Tensor {
        let mut stream = Stream::new(seed);
        let u: Vec<f64> = (0..n).map(|_| stream.uniform()).collect();
        // The class is the number of cumulative probabilities that u has passed; the last of them is 1.
        let passed = self.expectation().cumsum(0, Kind::Double);
        Tensor::from_slice(&u).unsqueeze(1).ge_tensor(&passed).to_kind(Kind::Double).sum_dim_intlist(
            1,
            false,
            Kind::Double,
        )
    }
}
