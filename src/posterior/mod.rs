//! Posteriors over weights.

mod bernoulli;
mod diagonal;
mod mixture;
mod predictive;

pub use bernoulli::MeanFieldBernoulli;
pub use diagonal::{DiagonalGaussian, Natural, combine};
pub use mixture::Mixture;
pub use predictive::Predictive;
