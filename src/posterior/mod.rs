//! Posteriors over weights.

mod bernoulli;
mod diagonal;
mod full;
mod kronecker;
mod mixture;
mod outputs;
mod predictive;

pub use bernoulli::MeanFieldBernoulli;
pub use diagonal::{DiagonalGaussian, Natural, combine};
pub use full::FullGaussian;
pub use kronecker::{KroneckerGaussian, KroneckerParameter};
pub(crate) use kronecker::{into_basis, matrix_shape, out_of_basis};
pub use mixture::Mixture;
pub use outputs::GaussianPosterior;
pub use predictive::Predictive;
