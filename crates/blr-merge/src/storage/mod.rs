//! Files of named tensors, in the format of [safetensors](https://github.com/huggingface/safetensors).
//!
//! What belongs here knows names, bytes and kinds of numbers, and nothing about merging. The two constants are what
//! this crate and tch-blr agree on about posteriors' files.

mod atomic;
mod convert;
mod header;
mod weight_file;
mod writer;

pub use atomic::replace;
pub use header::{StoredTensor, other_format};
pub use weight_file::WeightFile;
pub(crate) use weight_file::{INDEX, PIECE};
pub(crate) use writer::{Entry, FileWriter};

/// Key of the entry in a file's metadata by which tch-blr says what the file is: a posterior, or the state of an
/// optimizer.
pub const DESCRIPTION: &str = "tch_blr";

/// Suffix of the name of a weight's precision in a posterior's file: `<name>.precision` beside `<name>`.
pub const PRECISION: &str = ".precision";
