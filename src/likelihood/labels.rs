//! Where the labels of a Fisher information come from.

/// The labels y in the Fisher information E\[∇ℓ ∇ℓᵀ\] of a likelihood, ℓ = -ln p(y | z).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Labels {
    /// The expectation over the model's own prediction in closed form, which is also the generalized Gauss-Newton
    /// matrix: one backward pass per column of the output curvature (C-1 for C classes, one per output otherwise).
    /// The loss must be one of [`crate::nn`], which name their likelihood.
    Exact,
    /// Drawn from the model's own prediction: unbiased for [`Labels::Exact`], at the price of one further backward pass
    /// per draw. The loss must be one of [`crate::nn`].
    Sampled,
    /// Those of the data: the empirical Fisher information, without a further backward pass. It does not estimate the
    /// Fisher information: it goes to zero where the data are fitted, and is wrong where the model is misspecified
    /// (Kunstner et al. 2019, *Limitations of the Empirical Fisher Approximation*).
    Observed,
}
