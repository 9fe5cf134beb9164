//! Where E_q\[∇ℓ\] is evaluated: the choice of points, and which draw of noise belongs to each. Moving the weights
//! there is the driver's work.

use crate::{Result, check};

/// The points at which a row evaluates the loss in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Expectation {
    /// At the mean: E_q\[∇ℓ\] ≈ ∇ℓ(m), the delta method.
    Delta,
    /// At independent samples of q.
    MonteCarlo {
        /// How many, 1 to 2²⁰.
        samples: usize,
    },
    /// At pairs m+e, m-e, which cancel all that is odd in e: the gradient is exact for a quadratic loss.
    Antithetic {
        /// How many pairs, 1 to 2²⁰.
        pairs: usize,
    },
    /// At m+ε, where ε is the row's step uphill ([`Rule::adversarial`](crate::rule::Rule::adversarial)) along ĝ₁, the
    /// gradient of a first evaluation on the same batch, which serves only to find ε.
    Adversarial {
        /// Whether ĝ₁ is taken at a sample of q (Bayesian SAM) or at the mean (SAM). ε is added to the mean in both.
        sampled: bool,
    },
}

/// Most samples, or pairs, of a step. A number beyond is a slip, or a file's: such a step would not end.
const MOST: usize = 1 << 20;

impl Expectation {
    pub(crate) fn validate(self) -> Result<()> {
        let count = |name, n| check::that(name, n, (1..=MOST).contains(&n), "a number from 1 to 1,048,576");
        match self {
            Expectation::Delta | Expectation::Adversarial { .. } => Ok(()),
            Expectation::MonteCarlo { samples } => count("samples", samples),
            Expectation::Antithetic { pairs } => count("pairs", pairs),
        }
    }

    /// Errors unless it draws samples.
    pub(crate) fn check_sampled(self) -> Result<()> {
        let sampled = matches!(self, Expectation::MonteCarlo { .. } | Expectation::Antithetic { .. });
        check::that("expectation", self, sampled, "MonteCarlo or Antithetic: this row evaluates the loss at samples")?;
        self.validate()
    }

    /// With this many samples, or pairs if it is antithetic; an evaluation at the mean becomes one at samples.
    pub(crate) fn with_samples(self, n: usize) -> Self {
        match self {
            Expectation::Delta | Expectation::MonteCarlo { .. } => Expectation::MonteCarlo { samples: n },
            Expectation::Antithetic { .. } => Expectation::Antithetic { pairs: n },
            // It has one point by definition, and no number of samples to set.
            adversarial @ Expectation::Adversarial { .. } => adversarial,
        }
    }

    /// Number of points at which the gradient is averaged.
    pub(crate) fn evaluations(self) -> u64 {
        match self {
            Expectation::Delta | Expectation::Adversarial { .. } => 1,
            Expectation::MonteCarlo { samples } => samples as u64,
            Expectation::Antithetic { pairs } => 2 * pairs as u64,
        }
    }

    /// Whether each of these points is found by another evaluation first.
    pub(crate) fn is_adversarial(self) -> bool {
        matches!(self, Expectation::Adversarial { .. })
    }

    /// Which draw of noise the k-th evaluation of a step uses (adversarial: its first point), and with which sign;
    /// `None` at the mean.
    pub(crate) fn draw(self, k: u64) -> Option<(u64, f64)> {
        match self {
            Expectation::Delta | Expectation::Adversarial { sampled: false } => None,
            Expectation::MonteCarlo { .. } | Expectation::Adversarial { sampled: true } => Some((k, 1.0)),
            // Evaluations 2i and 2i+1 are the pair of draw i.
            Expectation::Antithetic { .. } => Some((k / 2, if k.is_multiple_of(2) { 1.0 } else { -1.0 })),
        }
    }
}
