//! Merging safetensors files, streamed: what is read from where (sources.rs), what is written to where (write.rs),
//! and the functions that users call.

mod adapter;
mod evaluate;
mod remove;
mod soup;
mod sources;
mod write;

pub use evaluate::evaluate;
pub use remove::remove_files;
pub use soup::{Better, Soup, soup_files};

use crate::engine::Plan;
use crate::storage::{Draft, is_floating};
use crate::{Error, Method, Recipe, Result, Role};
use safetensors::Dtype;
use sources::{Sources, names};
use std::path::{Path, PathBuf};

/// One of the files that are merged.
#[derive(Debug, Clone)]
pub struct FileModel {
    path: PathBuf,
    name: Option<String>,
    weight: f64,
    curvature: Option<PathBuf>,
    adapter: Option<PathBuf>,
    alpha: Option<f64>,
}

impl FileModel {
    /// Whatever [`WeightFile::open`](crate::WeightFile::open) takes, with weight 1.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        FileModel { path: path.into(), name: None, weight: 1.0, curvature: None, adapter: None, alpha: None }
    }

    /// What errors call it, and what [`Method::dare`](crate::Method::dare) knows it by. Default: the end of its path
    /// (of its adapter's, if it has one) that tells it from the others.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.name = Some(name.into());
        self
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

    /// A low-rank adapter (LoRA) in PEFT's form, which is added to the weights: the model is W + s·BA for the factors
    /// `<module>.lora_A.weight` [r, in] and `<module>.lora_B.weight` [out, r] of a weight `<module>.weight` [out, in],
    /// with or without `base_model.model.` before the module's name. So products are merged, and factors never.
    /// `path` is a file, or a folder with `adapter_model.safetensors`.
    ///
    /// s = α/r, and α/√r if `adapter_config.json` beside the file says `use_rslora`. Convolutions (A [r, in, …], B
    /// [out, r, 1, …]), embeddings (`lora_embedding_A` and `_B`, without `.weight`) and `fan_in_fan_out` (weights that
    /// are kept transposed) are supported; DoRA, `alpha_pattern`, biases and whole modules in the adapter's file are
    /// refused by name. BA is computed in f64 and added in f32, or in f64 where the merge is. The two factors of a
    /// tensor must fit into memory; the product need not. The kind of the result does not depend on the factors'.
    #[must_use]
    pub fn adapter(mut self, path: impl Into<PathBuf>) -> Self {
        self.adapter = Some(path.into());
        self
    }

    /// α of the adapter. Default: `lora_alpha` of the `adapter_config.json` beside it.
    #[must_use]
    pub fn alpha(mut self, alpha: f64) -> Self {
        self.alpha = Some(alpha);
        self
    }
}

/// Where a merged model goes: one file, which any path converts into, or [`Destination::shards`].
#[derive(Debug, Clone)]
pub struct Destination {
    path: PathBuf,
    /// Most bytes of tensors in a shard.
    most: Option<u64>,
    dtype: Option<Dtype>,
}

impl Destination {
    /// A new or empty folder: shards `model-00001-of-0000N.safetensors` with at most `most` bytes of tensors each, and
    /// their index `model.safetensors.index.json`. A tensor larger than that has a shard to itself; a weight and its
    /// precision share one. [`WeightFile::open`](crate::WeightFile::open) takes the folder.
    pub fn shards(folder: impl Into<PathBuf>, most: u64) -> Self {
        Destination { path: folder.into(), most: Some(most), dtype: None }
    }

    /// The kind of all floating-point numbers: F32, F64, F16 or BF16. Default: for each tensor, the narrowest that
    /// holds those of all models (and the base) exactly; F32 for F16 and BF16 together.
    #[must_use]
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = Some(dtype);
        self
    }

    fn check(&self) -> Result<()> {
        if let Some(most) = self.most {
            Error::unless(most > 0, "max_shard_size", most, "a number of bytes > 0")?;
        }
        if let Some(dtype) = self.dtype {
            Error::unless(is_floating(dtype), "dtype", dtype, "F32, F64, F16 or BF16")?;
        }
        Ok(())
    }

    /// Fails before any work is done, where nothing could be written.
    fn draft(&self) -> Result<Draft> {
        self.check()?;
        if self.most.is_some() { Draft::of_folder(&self.path) } else { Draft::of_file(&self.path) }
    }
}

impl<P: AsRef<Path>> From<P> for Destination {
    fn from(path: P) -> Self {
        Destination { path: path.as_ref().to_owned(), most: None, dtype: None }
    }
}

/// What [`merge_files`] or [`remove_files`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Number of tensors that were merged by the method; a weight's precision does not count.
    pub tensors: usize,
    /// Number of weights in these.
    pub weights: u64,
    /// Tensors that were averaged, whatever the method: statistics of batch normalization.
    pub averaged: Vec<String>,
    /// Tensors that were copied from the base or the first model: integers, booleans, and those left out.
    pub copied: Vec<String>,
    /// Whether precisions were merged and written too.
    pub posterior: bool,
}

/// Merges models in safetensors files, streamed in pieces of tensors: neither a model nor a single tensor needs to fit
/// into memory.
///
/// Computed in f32, or in f64 where an input or the result is; sums over a tensor and everything with curvature always
/// in f64. On the same inputs the result has the same bits, whatever the number of threads; another order of models
/// changes the rounding of sums.
///
/// A method is applied to all weights; a [`Recipe`] leaves some out, and says what becomes of tensors that are no
/// weights. Names, shapes and metadata of the result are those of the base, or of the first model if the method needs
/// no base. Methods with curvature take files of curvature or posteriors' files (as `tch_blr::DiagonalGaussian::save`
/// writes them: they say so in their metadata, and hold `<name>` and `<name>.precision`), and merge posteriors into a
/// posterior's file; the other methods make plain weights of posteriors.
///
/// `out`, a file or [`Destination::shards`], appears or is replaced atomically once everything is written. `progress`
/// is called with the bytes written so far and those to be written in all.
///
/// # Errors
/// A base or a curvature that the method needs and that is not given; models that differ in names or shapes, kinds that
/// cannot be merged, numbers that are not finite, curvature < 0, a merged precision ≤ 0 or one that the kind of the
/// result rounds to 0, factors of adapters that come without a base, all with the name of the tensor; weights and
/// settings out of range; files that cannot be read or written, are broken, or hold neither weights nor a diagonal
/// posterior (an optimizer's checkpoint); adapters whose factors are not pairs that fit their weights. `out` is then as
/// it was before.
pub fn merge_files(
    recipe: impl Into<Recipe>,
    base: Option<&FileModel>,
    models: &[FileModel],
    out: impl Into<Destination>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Merged> {
    let (recipe, out) = (recipe.into(), out.into());
    let names = names(models)?;
    let weighted = weighted(&names, models);
    recipe.validate(&weighted)?;
    let draft = out.draft()?;
    let work = Work::new(&recipe, weighted, Sources::open(&recipe, base, models)?)?;
    write::write(&work, &out, draft, progress)
}

/// What [`merge_files`] would do with one tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Planned {
    /// Its name; a posterior's precision is a tensor of its own.
    pub name: String,
    /// The kind that the result would have.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its size in the result.
    pub bytes: u64,
    /// The method, and a weight for each model; none if it would be copied.
    pub merge: Option<(Method, Vec<f64>)>,
}

/// What [`merge_files`] would do, from the headers of the files alone. Of `out` nothing is looked at but the kind of
/// numbers; nothing is written.
///
/// # Errors
/// As [`merge_files`], but for what only the numbers show, and for the destination.
pub fn plan_files(
    recipe: impl Into<Recipe>,
    base: Option<&FileModel>,
    models: &[FileModel],
    out: impl Into<Destination>,
) -> Result<Vec<Planned>> {
    let (recipe, out) = (recipe.into(), out.into());
    let names = names(models)?;
    let weighted = weighted(&names, models);
    recipe.validate(&weighted)?;
    out.check()?;
    let work = Work::new(&recipe, weighted, Sources::open(&recipe, base, models)?)?;
    let mut planned = Vec::new();
    for (name, tensor) in work.sources.tensors() {
        let plan = match tensor.role {
            Role::Kept => None,
            Role::Statistic => Some(work.plan(name)?.average()),
            Role::Weight => Some(work.plan(name)?),
        };
        let merge = plan.map(|plan| (plan.method, plan.models.iter().map(|(_, w)| *w).collect::<Vec<f64>>()));
        planned.extend(write::entries(&work, &out, name, tensor).into_iter().map(|entry| Planned {
            bytes: entry.bytes(),
            name: entry.name,
            dtype: entry.dtype,
            shape: entry.shape,
            merge: merge.clone(),
        }));
    }
    Ok(planned)
}

fn weighted<'a>(names: &'a [String], models: &[FileModel]) -> Vec<(&'a str, f64)> {
    names.iter().zip(models).map(|(name, m)| (name.as_str(), m.weight)).collect()
}

/// A merge whose files are open and fit together.
struct Work<'a> {
    recipe: &'a Recipe,
    models: Vec<(&'a str, f64)>,
    sources: Sources,
    /// Whether posteriors are merged into one.
    posteriors: bool,
}

impl<'a> Work<'a> {
    fn new(recipe: &'a Recipe, models: Vec<(&'a str, f64)>, sources: Sources) -> Result<Self> {
        let posteriors = recipe.needs_curvature() && sources.pattern().is_posterior();
        let work = Work { recipe, models, sources, posteriors };
        // Before anything is computed, so that an error does not come after minutes of work.
        let merged = work.sources.tensors().filter(|(_, tensor)| tensor.role != Role::Kept);
        merged.into_iter().try_for_each(|(name, _)| work.plan(name).map(drop))?;
        Ok(work)
    }

    fn plan(&self, name: &str) -> Result<Plan<'a>> {
        self.recipe.plan(name, &self.models, self.posteriors)
    }
}
