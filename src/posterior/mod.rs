//! Posteriors over weights.

mod diagonal;
mod predictive;

pub use diagonal::{DiagonalGaussian, Natural, combine};
pub use predictive::Predictive;
