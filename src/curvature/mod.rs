//! How E_q\[∇²ℓ\] is estimated.

mod per_example;

pub(crate) use per_example::per_example;

/// The statistic that an evaluation of the loss contributes to a row's estimate of the diagonal Hessian of the mean loss.
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
    /// e·ĝ, which times the noise's precision estimates the Hessian without bias (Price's theorem).
    Price,
    /// (1-w²)·ĝ at relaxed binary weights w = tanh((λ+d)/τ): τ times the derivative of the loss by λ. Binary rows need no
    /// Hessian; this stands in its place.
    Relaxed,
}
