//! Where E_q\[∇ℓ\] is evaluated, and the guard that brings the mean back.

mod guard;
mod link;

pub use guard::Perturbed;
pub use link::Link;
pub(crate) use link::{half_logistic, sign};

use crate::Result;
use crate::check;

/// The points at which a row evaluates the loss in one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Expectation {
    /// At the mean: E_q\[∇ℓ\] ≈ ∇ℓ(m), the delta method.
    Delta,
    /// At independent samples of q.
    MonteCarlo {
        /// How many, at least 1.
        samples: usize,
    },
    /// At pairs m+e, m-e, which cancel all that is odd in e: the gradient is exact for a quadratic loss.
    Antithetic {
        /// How many pairs, at least 1.
        pairs: usize,
    },
}

impl Expectation {
    pub(crate) fn validate(self) -> Result<()> {
        match self {
            Expectation::Delta => Ok(()),
            Expectation::MonteCarlo { samples } => check::count("samples", samples),
            Expectation::Antithetic { pairs } => check::count("pairs", pairs),
        }
    }

    /// Number of times the loss is evaluated.
    pub(crate) fn evaluations(self) -> u64 {
        match self {
            Expectation::Delta => 1,
            Expectation::MonteCarlo { samples } => samples as u64,
            Expectation::Antithetic { pairs } => 2 * pairs as u64,
        }
    }

    /// For the k-th evaluation of a step: which draw of noise it uses, and with which sign. `None` at the mean.
    pub(crate) fn draw(self, k: u64) -> Option<(u64, f64)> {
        match self {
            Expectation::Delta => None,
            Expectation::MonteCarlo { .. } => Some((k, 1.0)),
            Expectation::Antithetic { .. } => Some((k / 2, if k.is_multiple_of(2) { 1.0 } else { -1.0 })),
        }
    }
}
