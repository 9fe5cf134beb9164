//! Elementwise passes on a GPU: one kernel, compiled at run time, over all tensors of a step.
#![allow(dead_code)] // Nothing runs here yet.

#[cfg(any(feature = "cuda", test))]
mod cache;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(any(feature = "cuda", test))]
mod nvrtc;
#[cfg(any(feature = "cuda", test))]
mod search;

/// Threads of a block.
pub(super) const BLOCK: u32 = 512;
