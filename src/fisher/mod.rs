//! The Fisher information at a solution, and Laplace's approximation around it.
//!
//! [`Fisher`] says how it is estimated, and its methods make one of three structures: [`DiagonalFisher`],
//! [`KroneckerFisher`] and [`FullFisher`], each with a method `laplace` to the posterior of the same structure. The
//! sums over a batch come from the products of [`crate::nn`]'s layers; what is done with a Fisher information
//! (penalties, sensitivities) does not belong here.

mod at;
mod columns;
mod diagonal;
mod full;
mod kronecker;
mod settings;

pub use diagonal::DiagonalFisher;
pub use full::FullFisher;
pub use kronecker::{KroneckerFisher, LayerFactors};
pub use settings::{Batch, Fisher};
