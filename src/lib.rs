//! Bayesian-learning-rule optimizers over libtorch tensors.

mod error;
mod kernel;

pub use error::{Error, Result};
pub use kernel::{Given, Noise, Philox, Real};
pub use tch;
