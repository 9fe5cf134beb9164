//! Placeholder until the likelihood room is merged.
/// Labels y in the Fisher information E\[∇ℓ ∇ℓᵀ\] of a likelihood.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Labels {
    /// Drawn.
    Sampled,
    /// Expectation.
    Exact,
    /// Data.
    Observed,
}
