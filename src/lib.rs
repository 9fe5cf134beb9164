//! Bayesian-learning-rule optimizers over libtorch tensors.

// Until the driver uses it.
#[allow(dead_code, unused_imports)]
mod curvature;
mod error;
mod kernel;
pub mod nn;

pub use error::{Error, Result};
pub use kernel::{Given, Noise, Philox, Real};
pub use tch;
