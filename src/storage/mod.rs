//! Named tensors ↔ safetensors files, atomically.
//!
//! What belongs here knows tensors, names and bytes, and neither optimizers nor posteriors. Headers that may come from
//! anyone, files that are streamed, and replacing a file are in [`blr_merge::storage`], as is the file format that the
//! two crates share.

pub(crate) mod checkpoint;

pub(crate) use blr_merge::storage::{AVERAGE, POSTERIOR, PRECISION};
