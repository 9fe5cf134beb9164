//! Posteriors over the weights of a model: distributions with named parameters that can be sampled, saved, added and
//! put into a model's variables.
//!
//! What belongs here: a family's own mathematics (moments, samples, densities, divergences, its file), and what all
//! families share (`Posterior`, predictive averages, `combine`). A posterior knows no optimizer, no data and no
//! curvature: rooms that do know them make posteriors and use them, never the other way round.

mod any;
mod bernoulli;
mod block;
mod combine;
mod diagonal;
mod full;
mod in_model;
mod kronecker;
mod kronecker_parameter;
mod low_rank;
mod low_rank_parameter;
mod mixture;
mod named;
mod predictive;
mod pruned;
mod regression;
mod temperature;
mod valid;

pub use any::Posterior;
pub use bernoulli::MeanFieldBernoulli;
pub(crate) use block::BlockPrecision;
pub(crate) use combine::Limit;
pub use combine::{NaturalSum, clamp_information, combine};
pub use diagonal::{DiagonalGaussian, Natural};
pub use full::FullGaussian;
pub(crate) use in_model::in_model;
pub use kronecker::KroneckerGaussian;
pub use kronecker_parameter::KroneckerParameter;
pub use low_rank::LowRankGaussian;
pub use mixture::Mixture;
pub use predictive::Predictive;
pub use pruned::PrunedGaussian;
pub use regression::IntoGaussian;
