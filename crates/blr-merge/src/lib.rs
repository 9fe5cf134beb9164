//! Merges fine-tunes of one model into one model: safetensors files of any size, or anything else that can be read as
//! slices.
//!
//! [`merge_files`] merges by a [`Method`], or by a [`Recipe`] with methods and weights for some of the tensors, and
//! [`plan_files`] says what it would do. A [`FileModel`] may be a base and a low-rank adapter. [`soup_files`] averages
//! those models that make the average better, [`simplex`] lists weightings to try, [`remove_files`] takes a part out of
//! a posterior again, [`diff_files`] compares, and [`WeightFile`] looks into files. The command `blr-merge` does the
//! same. Files are streamed: neither a model nor a tensor needs to fit into memory. Merging of tensors and of
//! posteriors in memory is in `tch_blr::merge`, which is built on this crate; nothing here needs libtorch.
//!
//! ```
//! use blr_merge::{FileModel, Method, WeightFile, merge_files};
//! use safetensors::{Dtype, serialize_to_file, tensor::TensorView};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let path = |name: &str| folder.path().join(name);
//! for (name, w) in [("a.safetensors", 1f32), ("b.safetensors", 3.0)] {
//!     let bytes = w.to_le_bytes();
//!     serialize_to_file([("w", TensorView::new(Dtype::F32, vec![1], &bytes)?)], None, &path(name))?;
//! }
//! let models = [FileModel::new(path("a.safetensors")), FileModel::new(path("b.safetensors")).weight(3.0)];
//! let merged = merge_files(Method::linear(), None, &models, path("m.safetensors"), &mut |_written, _total| ())?;
//! assert_eq!((merged.tensors, merged.weights), (1, 1));
//! assert_eq!(std::fs::read(path("m.safetensors"))?.last_chunk(), Some(&2.5f32.to_le_bytes()));
//! # Ok(())
//! # }
//! ```
//!
//! Inside: `method` says what is computed, `recipe` for which tensors, [`engine`] computes it over slices, [`storage`]
//! reads and writes files without knowing what for, and `files` and `diff` join the two.

mod diff;
pub mod engine;
mod error;
mod files;
mod method;
mod number;
mod philox;
mod recipe;
mod simplex;
pub mod storage;

pub use diff::{Difference, diff_files};
pub use error::{Error, Result};
pub use files::{
    Better, Destination, FileModel, Merged, Planned, Soup, evaluate, merge_files, plan_files, remove_files, soup_files,
};
pub use method::{Keep, Method, Rescale, TaskVectors};
pub use recipe::{Recipe, Role};
pub use simplex::simplex;
pub use storage::{StoredTensor, WeightFile};
