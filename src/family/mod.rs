//! Exponential families, the Bayesian learning rule on them, and the algorithms that are its special cases.

mod bernoulli;
mod beta;
mod categorical;
mod dirichlet;
mod em;
mod exponential;
mod gamma;
mod gaussian;
mod kalman;
mod laplace;
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
pub use dirichlet::Dirichlet;
pub use em::Mixture;
pub use exponential::{ConjugatePrior, ExponentialFamily};
pub use gamma::Gamma;
pub use gaussian::Gaussian;
pub use kalman::Kalman;
pub use laplace::laplace;
pub use mean_field_gaussian::MeanFieldGaussian;
pub use normal_gamma::NormalGamma;
pub use rule::{conjugate_posterior, converge, gradient_mu, rule_step};
pub use svi::BayesianMixture;
pub use vmp::vmp_step;
