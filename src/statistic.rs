//! What an evaluation of the loss gives beside the gradient: the names of the statistics, and which evaluations can
//! give them. How they are formed belongs to `curvature` and the driver.

use crate::{Expectation, Labels, Result, check};

/// The statistic that each evaluation of the loss contributes to a row's estimate of the Hessian E_q\[∇²L\] of the mean
/// loss. A row averages it over samples and micro-batches, beside the gradient.
///
/// Elementwise rows take the diagonal statistics, one number per weight; rows over blocks take those of blocks too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Statistic {
    /// None, or one that the row forms from the averaged gradient by itself (RMSprop, Adam).
    Unused,
    /// ĝ², the squared gradient of each evaluation. In expectation over mini-batches of size B drawn from N examples
    /// w·mean(gᵢ²) + (1-w)·(mean gᵢ)² with w = (N-B)/(B(N-1)) (Khan et al. 2018, theorem 1): a curvature at B = 1 only.
    SquaredGradient,
    /// The diagonal of the Fisher information (1/B) Σᵢ E_y\[(∇ℓᵢ)²\] of a mean loss. Never negative. By its labels y:
    ///
    /// * [`Labels::Observed`]: (1/B) Σᵢ (∇ℓᵢ)², exact per example and without a further backward pass. It is the
    ///   empirical Fisher information, not the Hessian of a misfit.
    /// * [`Labels::Exact`]: diag Σᵢ wᵢ JᵢᵀΛᵢJᵢ, the generalized Gauss-Newton matrix, with Jᵢ the Jacobian of example i's
    ///   output, Λᵢ the Hessian of its loss there and wᵢ = ∂L/∂ℓᵢ its weight in the loss that the closure returns, 1/B
    ///   in a mean; one backward pass per column of the output. For a linear model it is the Hessian itself. The loss
    ///   must be made of those of [`crate::nn`]; what counts is told at
    ///   [`nn::cross_entropy`](crate::nn::cross_entropy).
    /// * [`Labels::Sampled`]: an unbiased estimate of the exact one by one backward pass, with labels drawn from the
    ///   model's own prediction. The same losses.
    Fisher(Labels),
    /// The Kronecker factors of the Fisher information of each parameter as a matrix `[r, c]`: `[r, r]` of its rows
    /// and `[c, c]` of its columns; `[1, 1]` and `[n, n]` of a parameter with fewer than two dimensions. For weights
    /// and biases of the layers of [`crate::nn`] only.
    KroneckerFisher(Labels),
    /// e·ĝ, where e leads from the mean to the point of the evaluation; times the precision of the noise, it
    /// estimates the Hessian without bias (Price's theorem). In full-covariance rows it is the outer product e ĝᵀ.
    Price,
    /// ∇²L `[n, n]` within each block, by a backward pass for each of its n weights.
    Hessian,
    /// diag ∇²L, by as many backward passes.
    HessianDiagonal,
    /// The mean of v ⊙ (∇²L v) over `probes` vectors v of random signs, one backward pass each: an unbiased estimate of
    /// the diagonal, exact where the Hessian is diagonal (Hutchinson 1989).
    Hutchinson {
        /// How many, 1 to 1024.
        probes: usize,
    },
    /// (1-w²)·ĝ at relaxed binary weights w = tanh((λ+d)/τ): τ times the derivative of the loss by λ. Binary rows
    /// need no Hessian, and have this in its place.
    Relaxed,
    /// |ĝ₁|, the size of the gradient at the first point of [`Expectation::Adversarial`].
    AbsoluteGradient,
}

impl Statistic {
    /// Errors if evaluations at these points do not give it.
    pub(crate) fn check(self, expectation: Expectation) -> Result<()> {
        let (fits, expected) = match self {
            Statistic::Price => (
                // At the mean e is 0, and the uphill step of an adversarial row has no precision that the estimate
                // could be scaled by.
                expectation != Expectation::Delta && !expectation.is_adversarial(),
                "an expectation with samples: Price's estimate needs noise of known precision",
            ),
            Statistic::AbsoluteGradient => (expectation.is_adversarial(), "Expectation::Adversarial with it"),
            Statistic::Hutchinson { probes } => ((1..=PROBES).contains(&probes), "1 to 1024 probes"),
            _ => (true, ""),
        };
        check::that("statistic", self, fits, expected)
    }

    /// As which power of a factor on the gradient it changes: 0 for what is not formed from the gradient that a step uses.
    pub(crate) fn degree(self) -> i32 {
        match self {
            Statistic::Price | Statistic::Relaxed => 1,
            Statistic::SquaredGradient => 2,
            _ => 0,
        }
    }

    /// Whether it comes from layers that record, on the tape of the evaluation.
    pub(crate) fn is_tapped(self) -> bool {
        matches!(self, Statistic::Fisher(_) | Statistic::KroneckerFisher(_))
    }

    /// Whether it is formed by differentiating the gradient once more.
    pub(crate) fn is_second_order(self) -> bool {
        matches!(self, Statistic::Hessian | Statistic::HessianDiagonal | Statistic::Hutchinson { .. })
    }

    /// Whether an evaluation draws random numbers for it: labels or probes.
    pub(crate) fn is_random(self) -> bool {
        matches!(
            self,
            Statistic::Fisher(Labels::Sampled)
                | Statistic::KroneckerFisher(Labels::Sampled)
                | Statistic::Hutchinson { .. }
        )
    }

    /// What it is called in messages.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Statistic::Fisher(Labels::Observed) => "per-example square",
            Statistic::Fisher(_) | Statistic::KroneckerFisher(_) => "Fisher information",
            _ => "Hessian",
        }
    }
}

/// The noise reserves this many numbers of samples for the labels or probes of each evaluation, so it is also the
/// largest number of probes.
pub(crate) const PROBES: usize = 1024;
