//! The files that a merge reads: opened, checked against each other, and read as the engine's inputs.

use super::FileModel;
use crate::engine::{Input, Inputs, Number, same_tensors};
use crate::storage::{PRECISION, StoredTensor, WeightFile};
use crate::{Error, Method, Result};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::{Component, Path};

/// A model that is open.
pub(super) struct Source {
    pub weights: WeightFile,
    /// Its file of curvature; none if the model is a posterior, or the method needs no curvature.
    pub curvature: Option<WeightFile>,
}

impl Source {
    fn open(model: &FileModel, method: Method) -> Result<Self> {
        let curvature = model.curvature.as_ref().filter(|_| method.needs_curvature());
        Ok(Source { weights: WeightFile::open(&model.path)?, curvature: curvature.map(WeightFile::open).transpose()? })
    }

    fn name(&self) -> String {
        self.weights.path().display().to_string()
    }

    /// Its tensors that are not precisions of others.
    fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        let tensors = self.weights.tensors().iter().filter(|(name, _)| !self.weights.is_precision(name));
        tensors.map(|(name, t)| (name.as_str(), t))
    }

    fn shapes(&self) -> BTreeMap<&str, &[usize]> {
        self.tensors().map(|(name, t)| (name, t.shape.as_slice())).collect()
    }

    /// Where the curvature of a weight is.
    fn curvature(&self, name: &str) -> Result<(&WeightFile, &StoredTensor)> {
        let refuse =
            |path: &Path, problem: String| Err(Error::parameter(name, format!("{} {problem}", path.display())));
        let shape = &self.weights.tensors()[name].shape;
        match &self.curvature {
            None => match self.weights.precision_of(name) {
                Some(s) => Ok((&self.weights, s)),
                None => refuse(
                    self.weights.path(),
                    format!("has no `{name}{PRECISION}` of the same shape; give a file with its curvature"),
                ),
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

/// Names for the models: the shortest ends of their paths that tell them apart. They decide what DARE keeps, so they
/// must not depend on the folder that the command runs in.
pub(super) fn names(models: &[FileModel]) -> Vec<String> {
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
    // Where no length tells them apart, a path is given twice; the method's check says so.
    (1..=longest).map(ends).find(apart).unwrap_or_else(|| ends(longest))
}

/// The files of a merge, checked against each other.
pub(super) struct Sources {
    base: Option<Source>,
    models: Vec<Source>,
}

impl Sources {
    pub fn open(method: Method, base: Option<&FileModel>, models: &[FileModel]) -> Result<Self> {
        let base = if method.needs_base() {
            let missing = || Error::Merge("this method needs the base that the models were fine-tuned from".to_owned());
            Some(Source::open(base.ok_or_else(missing)?, method)?)
        } else {
            None
        };
        let models = models.iter().map(|m| Source::open(m, method)).collect::<Result<Vec<_>>>()?;
        let sources = Sources { base, models };
        sources.all().try_for_each(|source| sources.check(source, method))?;
        Ok(sources)
    }

    /// Checks that a model can be merged with those before it.
    fn check(&self, source: &Source, method: Method) -> Result<()> {
        let pattern = self.pattern();
        let (ours, theirs) = (pattern.name(), source.name());
        let shapes = pattern.shapes();
        same_tensors((&ours, &shapes), (&theirs, &source.shapes()))?;
        if method.needs_curvature() && source.curvature.is_some() != pattern.curvature.is_some() {
            let problem = format!("{ours} and {theirs} must both be posteriors or both come with a file of curvature");
            return Err(Error::Merge(problem));
        }
        for name in shapes.keys() {
            let [first, other] = [pattern, source].map(|s| &s.weights.tensors()[*name]);
            if first.is_floating() != other.is_floating() {
                let problem = format!("it is {:?} in {ours} and {:?} in {theirs}", first.dtype, other.dtype);
                return Err(Error::parameter(name, problem));
            }
            if !first.is_floating() && !copied(first.dtype) {
                let problem = format!("its kind {:?} cannot be merged: expected F32, F64, BF16 or F16", first.dtype);
                return Err(Error::parameter(name, problem));
            }
            if method.needs_curvature() && other.is_floating() {
                source.curvature(name)?;
            }
        }
        Ok(())
    }

    fn all(&self) -> impl Iterator<Item = &Source> {
        self.base.iter().chain(&self.models)
    }

    /// The one that the result looks like.
    pub fn pattern(&self) -> &Source {
        self.base.as_ref().unwrap_or_else(|| &self.models[0])
    }

    /// The tensors that the result has, without precisions.
    pub fn weights(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        self.pattern().tensors()
    }
}

/// Kinds of which the result has the base's or the first model's tensor. Not every kind that is left: an average of,
/// say, 8-bit floating-point numbers is wanted, and a silent copy of one model would be taken for it.
fn copied(dtype: Dtype) -> bool {
    use Dtype::{BOOL, I8, I16, I32, I64, U8, U16, U32, U64};
    matches!(dtype, BOOL | I8 | I16 | I32 | I64 | U8 | U16 | U32 | U64)
}

/// Reads the inputs of one tensor.
pub(super) struct Reader<'a> {
    sources: &'a Sources,
    name: &'a str,
    buffer: Vec<u8>,
}

impl<'a> Reader<'a> {
    pub fn new(sources: &'a Sources, name: &'a str) -> Self {
        Reader { sources, name, buffer: Vec::new() }
    }

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

    /// Whether any of the inputs that the method uses is in f64.
    pub fn wide(&self, method: Method) -> Result<bool> {
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
