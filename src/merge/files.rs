//! Merging files that need not fit into memory.

use super::draft::{Draft, Entry};
use super::engine::{self, Input, Inputs, Number, Output, Plan};
use super::weight_file::{INDEX, PRECISION, StoredTensor, WeightFile};
use super::{Method, same_tensors};
use crate::{Error, Result, check};
use blr_merge::storage;
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Component, Path, PathBuf};

/// One of the files that are merged.
#[derive(Debug, Clone)]
pub struct FileModel {
    path: PathBuf,
    weight: f64,
    curvature: Option<PathBuf>,
}

impl FileModel {
    /// What [`WeightFile::open`] opens, with weight 1.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        FileModel { path: path.into(), weight: 1.0, curvature: None }
    }

    /// w_k; ignored for a base. Default 1.
    #[must_use]
    pub fn weight(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }

    /// A file with the curvature H_k of each weight, under the weight's name, as [`Model::curvature`](super::Model::curvature).
    /// Without it, methods that need curvature expect a posterior's file, with the precisions `<name>.precision`.
    #[must_use]
    pub fn curvature(mut self, path: impl Into<PathBuf>) -> Self {
        self.curvature = Some(path.into());
        self
    }
}

/// Where merged files go: to one file, which any path is, or to [`Destination::shards`].
#[derive(Debug, Clone)]
pub struct Destination {
    path: PathBuf,
    /// Bytes of tensors in a shard.
    most: Option<u64>,
}

impl Destination {
    /// A new or empty folder: shards `model-00001-of-0000N.safetensors` with at most so many bytes of tensors each, and their index
    /// `model.safetensors.index.json`. A tensor that is larger has a shard of its own, and one and its precision share theirs.
    /// [`WeightFile::open`] takes the folder.
    pub fn shards(folder: impl Into<PathBuf>, most: u64) -> Self {
        Destination { path: folder.into(), most: Some(most) }
    }

    /// Errors before any work is done.
    fn check(&self) -> Result<()> {
        let Some(most) = self.most else { return Ok(()) };
        check::that("max_shard_size", most, most > 0, "a number of bytes > 0")?;
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

/// What [`merge_files`] did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Number of tensors that were merged.
    pub tensors: usize,
    /// Number of weights in these.
    pub weights: u64,
    /// Tensors of integers and booleans, copied from the base or the first model.
    pub copied: Vec<String>,
    /// Whether precisions were merged and written as well.
    pub posterior: bool,
}

/// A model that is open.
struct Source {
    weights: WeightFile,
    curvature: Option<WeightFile>,
}

impl Source {
    fn open(model: &FileModel, method: Method) -> Result<Self> {
        let curvature = model.curvature.as_ref().filter(|_| method.needs_curvature());
        Ok(Source { weights: WeightFile::open(&model.path)?, curvature: curvature.map(WeightFile::open).transpose()? })
    }

    fn name(&self) -> String {
        self.weights.path().display().to_string()
    }

    /// All that are not precisions of others.
    fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        let tensors = self.weights.tensors().iter().filter(|(name, _)| !self.weights.is_precision(name));
        tensors.map(|(name, t)| (name.as_str(), t.shape.as_slice())).collect()
    }

    /// Where the curvature of a weight is.
    fn curvature(&self, name: &str) -> Result<(&WeightFile, &StoredTensor)> {
        let refuse =
            |path: &Path, problem: String| Err(Error::parameter(name, format!("{} {problem}", path.display())));
        let shape = &self.weights.tensors()[name].shape;
        match &self.curvature {
            None => match self.weights.precision_of(name) {
                Some(s) => Ok((&self.weights, s)),
                None => {
                    refuse(self.weights.path(), format!("has no `{name}{PRECISION}` of its shape; give its curvature"))
                }
            },
            Some(file) => match file.tensors().get(name) {
                Some(h) if h.shape == *shape && h.is_floating() => Ok((file, h)),
                Some(h) => {
                    refuse(file.path(), format!("has it as {:?} {:?}: expected the shape {shape:?}", h.dtype, h.shape))
                }
                None => refuse(file.path(), "does not have its curvature".to_owned()),
            },
        }
    }
}

/// The shortest ends of the paths that tell them apart, so that a model's name does not depend on where the command runs.
fn names(models: &[FileModel]) -> Vec<String> {
    let parts: Vec<Vec<String>> = models
        .iter()
        .map(|m| {
            m.path
                .components()
                .filter(|c| *c != Component::CurDir)
                .rev()
                .map(|c| c.as_os_str().to_string_lossy().into_owned())
                .collect()
        })
        .collect();
    let longest = parts.iter().map(Vec::len).max().unwrap_or(0);
    let ends = |n: usize| -> Vec<String> {
        let end = |p: &Vec<String>| p.iter().take(n).rev().map(String::as_str).collect::<Vec<_>>().join("/");
        parts.iter().map(end).collect()
    };
    let apart = |names: &Vec<String>| {
        let mut sorted: Vec<&String> = names.iter().collect();
        sorted.sort_unstable();
        sorted.windows(2).all(|pair| pair[0] != pair[1])
    };
    (1..=longest).map(ends).find(apart).unwrap_or_else(|| ends(longest))
}

/// The files of a merge, checked against each other.
struct Sources {
    base: Option<Source>,
    models: Vec<Source>,
}

impl Sources {
    fn open(method: Method, base: Option<&FileModel>, models: &[FileModel]) -> Result<Self> {
        let base = if method.needs_base() {
            let missing = || Error::Merge("this method needs the base that the models were fine-tuned from".to_owned());
            Some(Source::open(base.ok_or_else(missing)?, method)?)
        } else {
            None
        };
        let models = models.iter().map(|m| Source::open(m, method)).collect::<Result<Vec<_>>>()?;
        let sources = Sources { base, models };
        let pattern = sources.pattern();
        for source in sources.all() {
            same_tensors((&pattern.name(), &pattern.shapes()), (&source.name(), &source.shapes()))?;
            if method.needs_curvature() && source.curvature.is_some() != pattern.curvature.is_some() {
                let problem = format!(
                    "{} and {} must both be posteriors or both come with a file of curvature",
                    pattern.name(),
                    source.name()
                );
                return Err(Error::Merge(problem));
            }
            for name in pattern.shapes().keys() {
                let [ours, theirs] = [pattern, source].map(|s| &s.weights.tensors()[*name]);
                if ours.is_floating() != theirs.is_floating() {
                    let problem = format!(
                        "it is {:?} in {} and {:?} in {}",
                        ours.dtype,
                        pattern.name(),
                        theirs.dtype,
                        source.name()
                    );
                    return Err(Error::parameter(name, problem));
                }
                if !ours.is_floating() && !whole(ours.dtype) {
                    let problem = format!("its kind {:?} cannot be merged: expected F32, F64, BF16 or F16", ours.dtype);
                    return Err(Error::parameter(name, problem));
                }
                if method.needs_curvature() && theirs.is_floating() {
                    source.curvature(name)?;
                }
            }
        }
        Ok(sources)
    }

    fn all(&self) -> impl Iterator<Item = &Source> {
        self.base.iter().chain(&self.models)
    }

    /// The one that the result looks like.
    fn pattern(&self) -> &Source {
        self.base.as_ref().unwrap_or_else(|| &self.models[0])
    }
}

/// Kinds that are copied.
fn whole(dtype: Dtype) -> bool {
    use Dtype::{BOOL, I8, I16, I32, I64, U8, U16, U32, U64};
    matches!(dtype, BOOL | I8 | I16 | I32 | I64 | U8 | U16 | U32 | U64)
}

/// The inputs of one tensor.
struct Reader<'a> {
    sources: &'a Sources,
    name: &'a str,
    buffer: Vec<u8>,
}

impl<'a> Reader<'a> {
    fn place(&self, input: Input) -> Result<(&'a WeightFile, &'a StoredTensor)> {
        let missing = || Error::parameter(self.name, "an input of the merge is missing");
        let base = || self.sources.base.as_ref().ok_or_else(missing);
        let weights = |s: &'a Source| s.weights.tensors().get(self.name).map(|t| (&s.weights, t)).ok_or_else(missing);
        match input {
            Input::Base => weights(base()?),
            Input::BaseCurvature => base()?.curvature(self.name),
            Input::Model(k) => weights(&self.sources.models[k]),
            Input::Curvature(k) => self.sources.models[k].curvature(self.name),
        }
    }

    /// Whether any of the inputs is in f64.
    fn wide(&self, method: Method) -> Result<bool> {
        let models = (0..self.sources.models.len()).flat_map(|k| [Input::Model(k), Input::Curvature(k)]);
        for input in [Input::Base, Input::BaseCurvature].into_iter().chain(models) {
            let (base, curvature) = match input {
                Input::Base => (true, false),
                Input::BaseCurvature => (true, true),
                Input::Model(_) => (false, false),
                Input::Curvature(_) => (false, true),
            };
            let used = (!base || method.needs_base()) && (!curvature || method.needs_curvature());
            if used && self.place(input)?.1.dtype == Dtype::F64 {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl<T: Number> Inputs<T> for Reader<'_> {
    fn read(&mut self, input: Input, at: usize, x: &mut [T]) -> Result<()> {
        let (file, t) = self.place(input)?;
        file.read(t, at, x, &mut self.buffer)
    }
}

/// Where one merged tensor goes.
struct Writer<'a, 'b> {
    draft: &'a mut Draft<'b>,
    name: &'a str,
    /// `<name>.precision`, if it is written.
    precision: Option<String>,
}

impl<T: Number> Output<T> for Writer<'_, '_> {
    fn values(&mut self, at: usize, x: &[T]) -> Result<()> {
        self.draft.elements(self.name, at, x)
    }

    fn precision(&mut self, at: usize, s: &[T]) -> Result<()> {
        self.precision.as_ref().map_or(Ok(()), |name| self.draft.elements(name, at, s))
    }
}

/// As [`merge`](super::merge), of safetensors files and into one: streamed in pieces of tensors, so that neither models nor single tensors
/// need to fit into memory.
///
/// Names, shapes, kinds and metadata of the result are those of the base, or of the first model if the method needs no base.
/// Methods with curvature take files of curvature, or posteriors' files (tensors `<name>` and `<name>.precision`, as
/// [`DiagonalGaussian::save`](crate::DiagonalGaussian::save) writes them), and make of the latter a posterior's file; the other methods
/// make plain weights of these. For [`Method::dare`] a model is known by the end of its path that tells it from the others.
///
/// `out`, a file or [`Destination::shards`], is replaced atomically once everything is written. `progress` is called with the bytes
/// written and those to be written.
///
/// # Errors
/// As [`merge`](super::merge); files that cannot be read or written, or are broken; kinds of numbers that cannot be merged. `out` is as it
/// was then.
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
    write(&Plan { method, models: weighted, posteriors }, &sources, &out, progress)
}

fn write(plan: &Plan, sources: &Sources, out: &Destination, progress: &mut dyn FnMut(u64, u64)) -> Result<Merged> {
    let pattern = &sources.pattern().weights;
    let mut merged = Merged { tensors: 0, weights: 0, copied: Vec::new(), posterior: plan.posteriors };
    let shards = shards(pattern, plan.posteriors, out.most);
    let total = shards.iter().flatten().map(|(.., bytes)| bytes).sum();
    let mut metadata = pattern.metadata().clone();
    if !plan.posteriors {
        metadata.remove(storage::DESCRIPTION);
    }
    let metadata = Some(metadata).filter(|m| !m.is_empty());
    let mut written = 0;
    let mut count = |bytes| {
        written += bytes;
        progress(written, total);
    };
    storage::replace(&out.path, |draft| {
        let mut fill = |path: &Path, draft: &Path, tensors: &[Entry]| {
            let file = Draft::new(path, draft, metadata.clone(), tensors.to_vec(), &mut count)?;
            let names = tensors.iter().map(|(name, ..)| name.as_str()).filter(|name| !pattern.is_precision(name));
            write_tensors(plan, sources, names, file, &mut merged)
        };
        if out.most.is_none() {
            return shards.iter().try_for_each(|tensors| fill(&out.path, draft, tensors));
        }
        let error = |e: std::io::Error| Error::file(&out.path, format!("cannot be written: {e}"));
        std::fs::create_dir(draft).map_err(error)?;
        let mut map = BTreeMap::new();
        for (i, tensors) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            fill(&out.path.join(&name), &draft.join(&name), tensors)?;
            map.extend(tensors.iter().map(|(tensor, ..)| (tensor, name.clone())));
        }
        let index = serde_json::json!({"metadata": {"total_size": total}, "weight_map": map});
        let mut file = File::create(draft.join(INDEX)).map_err(error)?;
        file.write_all(format!("{index:#}\n").as_bytes()).and_then(|()| file.sync_all()).map_err(error)
    })?;
    Ok(merged)
}

/// What is written, in files of at most so many bytes of tensors: at least one, and one alone without a limit.
fn shards(pattern: &WeightFile, posteriors: bool, most: Option<u64>) -> Vec<Vec<Entry>> {
    let most = most.unwrap_or(u64::MAX);
    let (mut shards, mut room) = (vec![Vec::new()], most);
    for (name, t) in pattern.tensors().iter().filter(|(name, _)| !pattern.is_precision(name)) {
        let entry = |name: String, t: &StoredTensor| (name, t.dtype, t.shape.clone(), t.bytes());
        let precision = pattern.precision_of(name).filter(|_| posteriors);
        let both = std::iter::once(entry(name.clone(), t));
        let both: Vec<Entry> = both.chain(precision.map(|s| entry(format!("{name}{PRECISION}"), s))).collect();
        let bytes = both.iter().map(|(.., bytes)| bytes).sum();
        if bytes > room && shards.last().is_some_and(|shard| !shard.is_empty()) {
            shards.push(Vec::new());
            room = most;
        }
        room = room.saturating_sub(bytes);
        shards.last_mut().expect("there is one from the start").extend(both);
    }
    shards
}

/// Merges these tensors into a file that has places for them.
fn write_tensors<'a>(
    plan: &Plan,
    sources: &Sources,
    names: impl Iterator<Item = &'a str>,
    mut draft: Draft,
    merged: &mut Merged,
) -> Result<()> {
    let pattern = &sources.pattern().weights;
    for name in names {
        let t = &pattern.tensors()[name];
        if !t.is_floating() {
            draft.copy(name, pattern, t)?;
            merged.copied.push(name.to_owned());
            continue;
        }
        let mut reader = Reader { sources, name, buffer: Vec::new() };
        let wide = reader.wide(plan.method)?;
        let precision = plan.posteriors.then(|| format!("{name}{PRECISION}"));
        let mut writer = Writer { draft: &mut draft, name, precision };
        if wide {
            engine::merge::<f64>(plan, name, t.elements(), &mut reader, &mut writer)?;
        } else {
            engine::merge::<f32>(plan, name, t.elements(), &mut reader, &mut writer)?;
        }
        merged.tensors += 1;
        merged.weights += t.elements() as u64;
    }
    draft.finish()
}

/// As [`remove`](super::remove), of posteriors' files: the natural parameters of `q` less `weight` times those of `part`.
///
/// # Errors
/// As [`merge_files`]; [`Error::Removal`], with the largest weight that is possible, if `q` does not hold so much precision.
pub fn remove_files(
    q: impl Into<PathBuf>,
    part: impl Into<PathBuf>,
    weight: f64,
    out: impl Into<Destination>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Merged> {
    let out = out.into();
    out.check()?;
    check::positive("weight", weight)?;
    let models = [FileModel::new(q), FileModel::new(part).weight(-weight)];
    let names = names(&models);
    let weighted: Vec<(&str, f64)> = names.iter().zip(&models).map(|(name, m)| (name.as_str(), m.weight)).collect();
    let plan = Plan { method: Method::Combine, models: weighted, posteriors: true };
    let sources = Sources::open(plan.method, None, &models)?;
    let (mut largest, mut what) = (f64::INFINITY, String::new());
    for (name, t) in sources.pattern().weights.tensors() {
        if !t.is_floating() || sources.pattern().weights.is_precision(name) {
            continue;
        }
        let mut reader = Reader { sources: &sources, name, buffer: Vec::new() };
        let ratio = if reader.wide(plan.method)? {
            engine::smallest_ratio::<f64>(&plan, name, t.elements(), &mut reader)?
        } else {
            engine::smallest_ratio::<f32>(&plan, name, t.elements(), &mut reader)?
        };
        if ratio < largest {
            (largest, what) = (ratio, format!("parameter `{name}`"));
        }
    }
    if weight >= largest {
        return Err(Error::Removal { what, weight, largest });
    }
    plan.method.validate(&plan.models)?;
    write(&plan, &sources, &out, progress)
}
