//! Products of per-example gradients and Jacobians, from the layer calls that a forward pass has recorded.
//!
//! Here belong sums over a batch: squares, Gauss-Newton diagonals, Kronecker factors, kernels. Who wants them and over
//! which data (the driver, [`crate::fisher`], posteriors) is above; how a layer's gradients follow from its input is in
//! [`crate::nn`].
//!
//! [`tapped`] finds the layer calls of each parameter, [`parameter`] sums over the gradients of one, [`linearized`]
//! pulls vectors on the outputs back to them, and everything else is a kind of result.

mod factors;
mod ggn;
mod jacobian;
mod kfac;
mod linearized;
mod parameter;
mod pass;
mod per_example;
mod squares;
mod tangent_kernel;
mod tapped;

pub(crate) use factors::{Factored, Factors};
pub(crate) use ggn::ggn;
pub(crate) use kfac::kfac;
pub(crate) use linearized::{Linearized, Looked};
pub(crate) use pass::Pass;
pub(crate) use per_example::per_example;
pub(crate) use tangent_kernel::Entries;

use crate::{Expectation, Result, check};

/// The statistic that an evaluation of the loss contributes to a row's estimate of the diagonal Hessian of the mean
/// loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Curvature {
    /// None, or one that the row forms from the averaged gradient itself (RMSprop, Adam).
    Unused,
    /// ĝ², the squared gradient of each evaluation. In expectation over mini-batches of size B drawn from N examples
    /// w·mean(gᵢ²) + (1-w)·(mean gᵢ)² with w = (N-B)/(B(N-1)) (Khan et al. 2018, theorem 1): a curvature at B = 1 only.
    SquaredGradient,
    /// (1/B) Σᵢ (∇ℓᵢ)²: the empirical Fisher, exact per example. Never negative; not the Hessian of a misfit.
    PerExample,
    /// diag (1/B) Σᵢ JᵢᵀΛᵢJᵢ: the generalized Gauss-Newton matrix, with Jᵢ the Jacobian of example i's output and Λᵢ
    /// the Hessian of its loss there; one backward pass per column of the output. Never negative; the Hessian itself
    /// where the model is linear. The loss must be one of [`crate::nn`].
    GgnExact,
    /// An unbiased estimate of that, by one backward pass: labels are drawn from the model's own prediction.
    GgnMonteCarlo,
    /// e·ĝ, which times the noise's precision estimates the Hessian without bias (Price's theorem).
    Price,
    /// (1-w²)·ĝ at relaxed binary weights w = tanh((λ+d)/τ): τ times the derivative of the loss by λ. Binary rows need
    /// no Hessian; this stands in its place.
    Relaxed,
    /// |ĝ₁|, the size of the gradient at the first point of [`Expectation::Adversarial`].
    AbsoluteGradient,
}

impl Curvature {
    /// Errors if evaluations at these points do not give it.
    pub(crate) fn check(self, expectation: Expectation) -> Result<()> {
        let (fits, expected) = match self {
            Curvature::Price => (!expectation.is_adversarial(), "another statistic: ε is no noise of known precision"),
            Curvature::AbsoluteGradient => (expectation.is_adversarial(), "Expectation::Adversarial with it"),
            _ => (true, ""),
        };
        check::that("curvature", self, fits, expected)
    }
}

impl Curvature {
    /// Whether the statistic comes with the gradient, from tapped layers.
    pub(crate) fn is_tapped(self) -> bool {
        matches!(self, Curvature::PerExample | Curvature::GgnExact | Curvature::GgnMonteCarlo)
    }
}
