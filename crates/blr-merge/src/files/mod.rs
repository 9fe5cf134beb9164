//! Merging safetensors files, streamed: what is read from where (sources.rs), what is written to where (write.rs),
//! and the two functions that users call.

mod remove;
mod sources;
mod write;

pub use remove::remove_files;

use crate::engine::Plan;
use crate::{Error, Method, Result};
use sources::{Sources, names};
use std::path::{Path, PathBuf};

/// One of the files that are merged.
#[derive(Debug, Clone)]
pub struct FileModel {
    path: PathBuf,
    weight: f64,
    curvature: Option<PathBuf>,
}

impl FileModel {
    /// Whatever [`WeightFile::open`](crate::WeightFile::open) takes, with weight 1.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        FileModel { path: path.into(), weight: 1.0, curvature: None }
    }

    /// w_k; ignored for a base. Default 1.
    #[must_use]
    pub fn weight(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }

    /// A file with the curvature H_k ≥ 0 of each weight, under the weight's name: of the loss of this model's task
    /// alone, or H₀ for the base, on the scale of the loss summed over the data. Without it, methods that need
    /// curvature expect a posterior's file, which holds the precisions `<name>.precision`.
    #[must_use]
    pub fn curvature(mut self, path: impl Into<PathBuf>) -> Self {
        self.curvature = Some(path.into());
        self
    }
}

/// Where a merged model goes: one file, which any path converts into, or [`Destination::shards`].
#[derive(Debug, Clone)]
pub struct Destination {
    path: PathBuf,
    /// Most bytes of tensors in a shard.
    most: Option<u64>,
}

impl Destination {
    /// A new or empty folder: shards `model-00001-of-0000N.safetensors` with at most `most` bytes of tensors each, and
    /// their index `model.safetensors.index.json`. A tensor larger than that has a shard to itself; a weight and its
    /// precision share one. [`WeightFile::open`](crate::WeightFile::open) takes the folder.
    pub fn shards(folder: impl Into<PathBuf>, most: u64) -> Self {
        Destination { path: folder.into(), most: Some(most) }
    }

    /// Fails before any work is done, where it can be known.
    fn check(&self) -> Result<()> {
        let Some(most) = self.most else { return Ok(()) };
        Error::unless(most > 0, "max_shard_size", most, "a number of bytes > 0")?;
        let taken = match std::fs::read_dir(&self.path) {
            Ok(mut entries) => entries.next().is_some(),
            Err(_) => self.path.exists(),
        };
        if taken {
            return Err(Error::file(&self.path, "is there already: shards go to a new or empty folder"));
        }
        Ok(())
    }
}

impl<P: AsRef<Path>> From<P> for Destination {
    fn from(path: P) -> Self {
        Destination { path: path.as_ref().to_owned(), most: None }
    }
}

/// What [`merge_files`] or [`remove_files`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Number of tensors that were merged; a weight's precision does not count.
    pub tensors: usize,
    /// Number of weights in these.
    pub weights: u64,
    /// Tensors of integers and booleans, which were copied from the base or the first model.
    pub copied: Vec<String>,
    /// Whether precisions were merged and written too.
    pub posterior: bool,
}

/// Merges models in safetensors files, streamed in pieces of tensors: neither a model nor a single tensor needs to fit
/// into memory.
///
/// Computed in f32, or in f64 where an input is f64; sums over a tensor and everything with curvature always in f64. On
/// the same inputs the result has the same bits, whatever the number of threads; another order of models changes the
/// rounding of sums.
///
/// Names, shapes, kinds and metadata of the result are those of the base, or of the first model if the method needs no
/// base. Methods with curvature take files of curvature or posteriors' files (tensors `<name>` and `<name>.precision`,
/// as `tch_blr::DiagonalGaussian::save` writes them), and merge posteriors into a posterior's file; the other methods
/// make plain weights of posteriors. [`Method::dare`] knows a model by the end of its path that tells it from the
/// others.
///
/// `out`, a file or [`Destination::shards`], appears or is replaced atomically once everything is written. `progress`
/// is called with the bytes written so far and those to be written in all.
///
/// # Errors
/// A base or a curvature that the method needs and that is not given; models that differ in names or shapes, kinds that
/// cannot be merged, numbers that are not finite, curvature < 0 or a merged precision ≤ 0, all with the name of the
/// tensor; weights and settings out of range; files that cannot be read or written, or are broken. `out` is then as it
/// was before.
pub fn merge_files(
    method: Method,
    base: Option<&FileModel>,
    models: &[FileModel],
    out: impl Into<Destination>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Merged> {
    let out = out.into();
    out.check()?;
    let names = names(models);
    let weighted: Vec<(&str, f64)> = names.iter().zip(models).map(|(name, m)| (name.as_str(), m.weight)).collect();
    method.validate(&weighted)?;
    let sources = Sources::open(method, base, models)?;
    let posteriors = method.needs_curvature() && sources.pattern().curvature.is_none();
    write::write(&Plan { method, models: weighted, posteriors }, &sources, &out, progress)
}
