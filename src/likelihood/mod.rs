//! What a model's output and a label mean: p(y | z) for an output z, and everything that follows from it.
//!
//! Here belong the formulas of the likelihoods (losses, residuals, predictions, the curvature with respect to the
//! output, labels drawn from a prediction) and the checks of outputs, targets and labels, so that each formula and each
//! error text exists once. What depends on the weights does not belong here: see [`crate::nn`] and the curvature
//! products above it. To add a likelihood, extend [`Likelihood`]; the compiler lists the formulas that it needs.

mod average;
mod curvature;
mod labels;
mod loss;
mod outputs;

pub(crate) use average::logits_of_mean;
pub use labels::Labels;
pub(crate) use loss::{conjugates, rows};
pub(crate) use outputs::{IGNORED, Outputs, no_targets};

use crate::{Result, check};

/// p(y | z) of a model's output z, one row per example.
///
/// Its negative logarithm is the loss of [`nn::cross_entropy`](crate::nn::cross_entropy),
/// [`nn::binary_cross_entropy`](crate::nn::binary_cross_entropy) or [`nn::squared_error`](crate::nn::squared_error).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Likelihood {
    /// p(y) = softmax(z)ᵧ over the columns of logits `[B, C]`, C ≥ 2.
    Categorical,
    /// p(y=1) = sigmoid(z), each logit of `[B]` or `[B, D]` by itself.
    Bernoulli,
    /// y ~ N(z, variance·I), for outputs `[B]` or `[B, D]`.
    Gaussian {
        /// σ² > 0 of the noise, in the square of the output's unit.
        variance: f64,
    },
}

impl Likelihood {
    /// Errors if its parameter is out of range.
    pub(crate) fn validate(self) -> Result<()> {
        match self {
            Likelihood::Gaussian { variance } => check::positive("variance", variance),
            Likelihood::Categorical | Likelihood::Bernoulli => Ok(()),
        }
    }

    /// σ² of a Gaussian; 1 for the others, whose natural parameter is the output itself.
    pub(crate) fn scale(self) -> f64 {
        if let Likelihood::Gaussian { variance } = self { variance } else { 1.0 }
    }
}
