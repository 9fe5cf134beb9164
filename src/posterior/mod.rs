//! Posteriors over weights.

mod diagonal;
mod full;
mod kronecker;
mod predictive;

pub use diagonal::{DiagonalGaussian, Natural, combine};
pub use full::FullGaussian;
pub use kronecker::{KroneckerGaussian, KroneckerParameter};
pub(crate) use kronecker::{into_basis, matrix_shape, out_of_basis};
pub use predictive::Predictive;
