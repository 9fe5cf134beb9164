//! Products of the curvature, from the tape of layers that record.

mod fisher;
mod ggn;
mod kfac;
mod linearized;
mod per_example;
mod tangent_kernel;

pub use fisher::{Batch, DiagonalFisher, Estimator, Fisher, FullFisher, KroneckerFisher, LayerFactors};
pub(crate) use ggn::ggn;
pub(crate) use kfac::kfac;
pub(crate) use linearized::{Forward, Linearized, Looked};
pub(crate) use per_example::per_example;
pub(crate) use tangent_kernel::Part;
