//! Exponential families, the Bayesian learning rule on them, and the algorithms that are its special cases.
//!
//! The optimizers of this crate are the rule for Gaussians over millions of weights, approximated so that it fits
//! beside a training loop. This module is the rule itself, for every family, exact, on problems whose parameters are
//! vectors of f64 numbers on the CPU. Models with variables, devices and mini-batches of gradients do not belong
//! here.
//!
//! ```text
//! λ ← (1-ρ) λ - ρ ∇_μ E_q[ ℓ(θ) ]
//! ```
//!
//! [`rule_step`] is that line; [`gradient_mu`] differentiates an E\[ℓ\] written as a function of μ, and
//! [`Gaussian::gradient_mu`] takes E\[∇ℓ\] and E\[∇²ℓ\]. An algorithm is a choice of the family and of the gradient
//! (Khan and Rue, *The Bayesian Learning Rule*, 2023, table 1):
//!
//! | algorithm | q | gradient | here |
//! |---|---|---|---|
//! | conjugate Bayes, ridge regression | any | exact and constant, ρ = 1 | [`conjugate_posterior`] |
//! | Kalman filter | [`Gaussian`] | the same, with a prior that moves | [`Kalman`] |
//! | Newton's and Laplace's method | [`Gaussian`] | delta method: expectations at the mean | [`laplace`] |
//! | expectation-maximization | [`Categorical`] z, Gaussian θ | z: exact, ρ = 1; θ: delta method | [`Mixture`] |
//! | stochastic VI | mean field | over a batch, local ρ = 1 | [`BayesianMixture`] |
//! | variational message passing | mean field | exact, ρ = 1 for all nodes | [`vmp_step`] |
//! | non-conjugate message passing | mean field | E\[ℓ\] is not linear in μ | [`vmp_step`] |
//! | conjugate-computation VI | [`Gaussian`] | exact, kept per datum | [`Cvi`] |
//!
//! | family | λ | T(x) |
//! |---|---|---|
//! | [`Gaussian`] | S m, -½ S | x, xxᵀ |
//! | [`MeanFieldGaussian`] (diagonal) | s m, -½ s | x, x² |
//! | [`Bernoulli`] | ln p/(1-p) | x |
//! | [`Categorical`] | ln πₖ/π_last | one-hot, without the last |
//! | [`Gamma`] | a-1, -b | ln x, x |
//! | [`Beta`] | a-1, b-1 | ln x, ln(1-x) |
//! | [`Dirichlet`] | α-1 | ln x |
//! | [`NormalGamma`] | κm, -½κ, a-½, -b-½κm² | τx, τx², ln τ, τ |
//!
//! To add a family, implement [`ExponentialFamily`]. Each of these claims is a test: `cargo test --test family --test
//! family_conjugate --test family_algorithms --test family_cvi`.

mod bernoulli;
mod beta;
mod categorical;
mod cvi;
mod dirichlet;
mod em;
mod exponential;
mod gamma;
mod gaussian;
mod kalman;
mod laplace;
mod likelihood;
mod mean_field_gaussian;
mod normal_gamma;
mod numbers;
mod random;
mod rule;
mod svi;
mod vmp;

pub use bernoulli::Bernoulli;
pub use beta::Beta;
pub use categorical::Categorical;
pub use cvi::Cvi;
pub use dirichlet::Dirichlet;
pub use em::Mixture;
pub use exponential::{ConjugatePrior, ExponentialFamily};
pub use gamma::Gamma;
pub use gaussian::Gaussian;
pub use kalman::Kalman;
pub use laplace::laplace;
pub use likelihood::{GaussianLikelihood, Likelihood, LogisticLikelihood, PoissonLikelihood, normal_quadrature};
pub use mean_field_gaussian::MeanFieldGaussian;
pub use normal_gamma::NormalGamma;
pub use rule::{conjugate_posterior, converge, gradient_mu, rule_step};
pub use svi::BayesianMixture;
pub use vmp::vmp_step;
