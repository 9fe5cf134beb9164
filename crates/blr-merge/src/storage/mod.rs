//! Files of named tensors: what belongs here knows bytes and names, and nothing about merging.

mod atomic;

pub use atomic::replace;

/// Key of the entry in a file's metadata by which tch-blr says what the file is: a posterior, or the state of an optimizer.
pub const DESCRIPTION: &str = "tch_blr";

/// Suffix of the name of a weight's precision in a posterior's file: `<name>.precision` beside `<name>`.
pub const PRECISION: &str = ".precision";
