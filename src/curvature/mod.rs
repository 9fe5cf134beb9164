//! Products of per-example gradients and Jacobians, from the layer calls that a forward pass has recorded.
//!
//! Here belong sums over a batch: squares, Gauss-Newton diagonals, Kronecker factors, kernels. What they are used
//! for, and over which data (the driver, [`crate::fisher`], posteriors), is above; how a layer's gradients follow
//! from its input is in [`crate::nn`].
//!
//! [`tapped`] finds the layer calls of each parameter, [`parameter`] sums over the gradients of one, [`linearized`]
//! pulls vectors on the outputs back to them, [`noted`] knows what part each output has in the loss,
//! [`same_examples`] whether the rows of the layer calls belong together, and everything else is a kind of result.

mod absolutes;
mod factors;
mod ggn;
mod jacobian;
mod kfac;
mod linearized;
mod noted;
mod parameter;
mod pass;
mod per_example;
mod same_examples;
mod squares;
mod tangent_kernel;
mod tapped;

pub(crate) use factors::{Factored, Factors};
pub(crate) use ggn::ggn;
pub(crate) use kfac::kfac;
pub(crate) use linearized::{Linearized, Looked};
pub(crate) use pass::Pass;
pub(crate) use per_example::per_example;
pub(crate) use tangent_kernel::Entries;
