//! Bayesian-learning-rule optimizers over libtorch tensors.

mod error;
pub mod metrics;

pub use error::{Error, Result};
pub use tch;
