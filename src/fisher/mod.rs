//! The Fisher information at a solution, and Laplace's approximation around it.
//!
//! [`Fisher`] says how it is estimated, and its methods make one of these structures: [`DiagonalFisher`],
//! [`KroneckerFisher`] and [`FullFisher`], each with a method `laplace` to the posterior of the same structure, and
//! [`SubsetFisher`] (of single weights) and [`LowRankFisher`], which [`Laplace`](crate::laplace::Laplace) takes as it
//! does the others. The sums over a batch come from the products of [`crate::nn`]'s layers; what is done with a Fisher
//! information (penalties, sensitivities) does not belong here.

mod at;
mod columns;
mod diagonal;
mod full;
mod kronecker;
mod low_rank;
mod settings;
mod subset;

pub(crate) use at::{Fit, Seen};
pub use diagonal::DiagonalFisher;
pub use full::FullFisher;
pub(crate) use kronecker::eigen;
pub use kronecker::{KroneckerFisher, LayerFactors};
pub use low_rank::LowRankFisher;
pub use settings::{Batch, Fisher};
pub use subset::{Subnetwork, SubsetFisher};
