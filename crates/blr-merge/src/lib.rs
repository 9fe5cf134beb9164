//! Merges weights and posteriors in safetensors files.

mod error;
pub mod storage;

pub use error::{Error, Result};
