//! Posteriors over weights.

mod diagonal;
mod full;
mod kronecker;
mod predictive;

pub use diagonal::{DiagonalGaussian, Natural, combine};
pub use full::FullGaussian;
pub(crate) use kronecker::matrix_shape;
pub use kronecker::{KroneckerGaussian, KroneckerParameter};
pub use predictive::Predictive;
