//! Files of named tensors, in the format of [safetensors](https://github.com/huggingface/safetensors).
//!
//! What belongs here knows names, bytes and kinds of numbers, and nothing about merging. The constants are what this
//! crate and tch-blr agree on about the files that the latter writes.

mod convert;
mod draft;
mod format;
mod header;
mod regular;
mod weight_file;
mod writer;

pub(crate) use convert::is_floating;
pub use draft::Draft;
pub use header::StoredTensor;
pub(crate) use regular::read as read_small;
pub use weight_file::WeightFile;
pub(crate) use weight_file::{INDEX, PIECE};
pub use writer::{Entry, FileWriter};

/// Key of the entry in a file's metadata by which tch-blr says what the file is: a posterior, or the state of an
/// optimizer.
pub const DESCRIPTION: &str = "tch_blr";

/// Suffix of the name of a weight's precision in a posterior's file: `<name>.precision` beside `<name>`.
pub const PRECISION: &str = ".precision";

/// What the description calls a diagonal Gaussian, whose file has precisions.
pub const POSTERIOR: &str = "diagonal Gaussian posterior";

/// What the description calls an average over a training, whose tensors are a model's weights as they are.
pub const AVERAGE: &str = "moving average of weights";
