//! The files that a merge reads: opened, checked against each other, and read as the engine's inputs.

use super::FileModel;
use super::adapter::{Adapter, Change};
use crate::engine::{Input, Inputs, Number, same_tensors};
use crate::storage::{PRECISION, StoredTensor, WeightFile};
use crate::{Error, Method, Recipe, Result, Role};
use safetensors::Dtype;
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// A model that is open.
pub(super) struct Source {
    weights: WeightFile,
    /// Its file of curvature; none if the model is a posterior, or the method needs no curvature.
    curvature: Option<WeightFile>,
    adapter: Option<Adapter>,
    /// Names that its file lacks, and that of the tensor that stands for each.
    tied: BTreeMap<String, String>,
}

impl Source {
    fn open(model: &FileModel, recipe: &Recipe) -> Result<Self> {
        let weights = Self::known(&model.path, "a model's weights or a diagonal Gaussian posterior")?;
        let curvature = model.curvature.as_ref().filter(|_| recipe.needs_curvature());
        let curvature = curvature.map(|path| Self::known(path, "curvatures under the weights' names")).transpose()?;
        if let Some(posterior) = curvature.as_ref().filter(|file| file.is_posterior()) {
            let problem = "is a posterior, whose `<name>` is a mean and not the curvature of `<name>`";
            return Err(Error::file(posterior.path(), problem));
        }
        let adapter = |path: &PathBuf| Adapter::open(path, model.alpha, &weights);
        let adapter = model.adapter.as_ref().map(adapter).transpose()?;
        if adapter.is_some() && recipe.needs_curvature() && curvature.is_none() {
            let problem = "is given with an adapter, of which it has no precision: give a file with the curvature";
            return Err(Error::file(weights.path(), problem));
        }
        if adapter.is_none() && model.alpha.is_some() {
            return Err(Error::file(weights.path(), "is given with α, and without the adapter that has it"));
        }
        let absent = |(name, of): &&(String, String)| {
            !weights.tensors().contains_key(name) && weights.tensors().contains_key(of)
        };
        let tied = recipe.tied.iter().filter(absent).cloned().collect();
        Ok(Source { weights, curvature, adapter, tied })
    }

    /// A file of tensors whose names are those of weights.
    fn known(path: &Path, expected: &str) -> Result<WeightFile> {
        let file = WeightFile::open(path)?;
        match file.other_form() {
            Some(form) => Err(Error::file(path, format!("holds `{form}`, which is not merged: expected {expected}"))),
            None => Ok(file),
        }
    }

    fn name(&self) -> String {
        self.weights.path().display().to_string()
    }

    pub fn is_posterior(&self) -> bool {
        self.weights.is_posterior() && self.curvature.is_none()
    }

    pub fn file(&self) -> &WeightFile {
        &self.weights
    }

    /// Its tensors that are not precisions of others, and those that others stand for.
    fn tensors(&self) -> impl Iterator<Item = (&str, &StoredTensor)> {
        let own = self.weights.tensors().iter().filter(|(name, _)| !self.weights.is_precision(name));
        let tied = self.tied.iter().map(|(name, of)| (name, &self.weights.tensors()[of]));
        own.chain(tied).map(|(name, t)| (name.as_str(), t))
    }

    /// One of its tensors.
    fn tensor(&self, name: &str) -> Option<&StoredTensor> {
        let name = self.tied.get(name).map_or(name, String::as_str);
        self.weights.tensors().get(name)
    }

    /// What its adapter adds to one of its tensors.
    fn change(&self, name: &str) -> Result<Option<Change>> {
        let name = self.tied.get(name).map_or(name, String::as_str);
        self.adapter.as_ref().map_or(Ok(None), |adapter| adapter.change(name))
    }

    /// Whether the tensor is not what its file holds, but that and what its adapter adds.
    pub fn changed(&self, name: &str) -> bool {
        let name = self.tied.get(name).map_or(name, String::as_str);
        self.adapter.as_ref().is_some_and(|adapter| adapter.changes(name))
    }

    /// Where the curvature of a weight is.
    fn curvature(&self, name: &str) -> Result<(&WeightFile, &StoredTensor)> {
        let refuse =
            |path: &Path, problem: String| Err(Error::parameter(name, format!("{} {problem}", path.display())));
        let name = self.tied.get(name).map_or(name, String::as_str);
        let shape = &self.weights.tensors()[name].shape;
        match &self.curvature {
            None if !self.weights.is_posterior() => refuse(
                self.weights.path(),
                "is not a posterior that tch-blr has saved; give a file with its curvature".to_owned(),
            ),
            None => match self.weights.precision_of(name) {
                Some(s) => Ok((&self.weights, s)),
                None => refuse(self.weights.path(), format!("has no `{name}{PRECISION}` of the same shape")),
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

/// Names for the models: those that they were given, else the shortest ends of their paths that tell them apart. They
/// decide what DARE keeps, so they must not depend on the folder that the command runs in.
pub(super) fn names(models: &[FileModel]) -> Result<Vec<String>> {
    let parts: Vec<Vec<String>> = models
        .iter()
        .map(|m| {
            let path = m.adapter.as_ref().unwrap_or(&m.path);
            path.components()
                .filter(|c| *c != Component::CurDir)
                .rev()
                .map(|c| c.as_os_str().to_string_lossy().into_owned())
                .collect()
        })
        .collect();
    let longest = parts.iter().map(Vec::len).max().unwrap_or(0);
    let named = |n: usize| -> Vec<String> {
        let end = |p: &Vec<String>| p.iter().take(n).rev().map(String::as_str).collect::<Vec<_>>().join("/");
        models.iter().zip(&parts).map(|(m, p)| m.name.clone().unwrap_or_else(|| end(p))).collect()
    };
    let twice = |names: &[String]| {
        let mut sorted: Vec<&String> = names.iter().collect();
        sorted.sort_unstable();
        sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0].clone())
    };
    let Some(name) = twice(&named(longest)) else {
        return Ok((1..=longest).map(named).find(|names| twice(names).is_none()).unwrap_or_else(|| named(longest)));
    };
    Err(Error::Merge(format!(
        "two models are `{name}`: give one model once, with a larger weight, or give each a name of its own (--name)"
    )))
}

/// A tensor of the result.
pub(super) struct Tensor {
    pub role: Role,
    /// That of the base or the first model.
    pub like: StoredTensor,
    /// Its kind if the user does not choose another.
    pub dtype: Dtype,
}

/// The files of a merge, checked against each other.
pub(super) struct Sources {
    base: Option<Source>,
    models: Vec<Source>,
    tensors: BTreeMap<String, Tensor>,
}

impl Sources {
    pub fn open(recipe: &Recipe, base: Option<&FileModel>, models: &[FileModel]) -> Result<Self> {
        let base = if recipe.needs_base() {
            let missing = || Error::Merge("this method needs the base that the models were fine-tuned from".to_owned());
            Some(Source::open(base.ok_or_else(missing)?, recipe)?)
        } else {
            None
        };
        let models = models.iter().map(|m| Source::open(m, recipe)).collect::<Result<Vec<_>>>()?;
        let mut sources = Sources { base, models, tensors: BTreeMap::new() };
        recipe.check(&sources.all().flat_map(Source::tensors).map(|(name, _)| name).collect::<Vec<_>>())?;
        if let Some((name, of)) = recipe.tied.iter().find(|(name, _)| sources.all().all(|s| s.tensor(name).is_none())) {
            return Err(Error::parameter(name, format!("no model has it, nor `{of}` to stand for it")));
        }
        let mut tensors = BTreeMap::new();
        for (name, like) in sources.pattern().tensors() {
            let role = match recipe.role(name)? {
                // Of integers nothing is computed.
                Role::Weight | Role::Statistic if copied(like.dtype) => Role::Kept,
                // With a precision it has been learned, whatever it is called.
                Role::Statistic if sources.pattern().is_posterior() && recipe.needs_curvature() => Role::Weight,
                role => role,
            };
            tensors.insert(name.to_owned(), Tensor { role, like: like.clone(), dtype: like.dtype });
        }
        sources.all().try_for_each(|source| sources.check(source, recipe, &tensors))?;
        for (name, tensor) in &mut tensors {
            if tensor.role != Role::Kept {
                tensor.dtype = sources.widest(name, recipe.needs_curvature() && tensor.role == Role::Weight)?;
            }
        }
        sources.tensors = tensors;
        Ok(sources)
    }

    /// Checks that a model can be merged with those before it.
    fn check<'a>(&'a self, source: &'a Source, recipe: &Recipe, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
        let (curved, pattern) = (recipe.needs_curvature(), self.pattern());
        let (ours, theirs) = (pattern.name(), source.name());
        if curved && source.curvature.is_some() != pattern.curvature.is_some() {
            let problem = format!("{ours} and {theirs} must both be posteriors or both come with a file of curvature");
            return Err(Error::Merge(problem));
        }
        if let Some(name) = source.tied.keys().next().filter(|_| source.is_posterior()) {
            return Err(Error::parameter(name, format!("{theirs} is a posterior, which has no tied weights")));
        }
        // What is left out may differ, or be in some of the files only.
        let compared = |(name, _): &(&str, &StoredTensor)| recipe.role(name).is_ok_and(|role| role != Role::Kept);
        let of = |source: &'a Source| source.tensors().filter(compared).map(|(name, t)| (name, &t.shape[..])).collect();
        let shapes: BTreeMap<&str, &[usize]> = of(pattern);
        same_tensors((&ours, &shapes), (&theirs, &of(source)))?;
        for name in shapes.into_keys() {
            let tensor = &tensors[name];
            let (first, other) = (&tensor.like, source.tensor(name).unwrap_or(&tensor.like));
            if first.is_floating() != other.is_floating() {
                let problem = format!("it is {:?} in {ours} and {:?} in {theirs}", first.dtype, other.dtype);
                return Err(Error::parameter(name, problem));
            }
            if !first.is_floating() && !copied(first.dtype) {
                let problem = format!("its kind {:?} cannot be merged: expected F32, F64, BF16 or F16", first.dtype);
                return Err(Error::parameter(name, problem));
            }
            if curved && tensor.role == Role::Weight {
                source.curvature(name)?;
            }
        }
        Ok(())
    }

    /// The narrowest kind that holds a tensor of all models, and its precisions if the result has one.
    fn widest(&self, name: &str, curved: bool) -> Result<Dtype> {
        let mut widest = None;
        for source in self.all() {
            let precision = if curved && source.is_posterior() { Some(source.curvature(name)?.1) } else { None };
            for t in source.tensor(name).into_iter().chain(precision) {
                widest = Some(widest.map_or(t.dtype, |other| both(other, t.dtype)));
            }
        }
        Ok(widest.unwrap_or(Dtype::F32))
    }

    fn all(&self) -> impl Iterator<Item = &Source> {
        self.base.iter().chain(&self.models)
    }

    /// The files that are read.
    pub fn files(&self) -> impl Iterator<Item = &WeightFile> {
        self.all()
            .flat_map(|s| std::iter::once(&s.weights).chain(&s.curvature).chain(s.adapter.as_ref().map(Adapter::file)))
    }

    /// The one that the result looks like.
    pub fn pattern(&self) -> &Source {
        self.base.as_ref().unwrap_or_else(|| &self.models[0])
    }

    /// The same, as an input.
    pub fn pattern_input(&self) -> Input {
        if self.base.is_some() { Input::Base } else { Input::Model(0) }
    }

    /// The tensors that the result has, without precisions.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        &self.tensors[name]
    }
}

/// The narrowest kind that holds the numbers of both exactly.
fn both(a: Dtype, b: Dtype) -> Dtype {
    match (a, b) {
        (a, b) if a == b => a,
        (Dtype::F64, _) | (_, Dtype::F64) => Dtype::F64,
        // Neither of the two narrow kinds holds the other: one has the digits, the other the range.
        _ => Dtype::F32,
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
    /// What adapters add, of the models whose weights have been read.
    changes: Vec<(Input, Option<Change>)>,
}

impl<'a> Reader<'a> {
    pub fn new(sources: &'a Sources, name: &'a str) -> Self {
        Reader { sources, name, buffer: Vec::new(), changes: Vec::new() }
    }

    fn change(&mut self, input: Input) -> Result<Option<&Change>> {
        let source = match input {
            Input::Base => self.sources.base.as_ref(),
            Input::Model(k) => Some(&self.sources.models[k]),
            Input::BaseCurvature | Input::Curvature(_) => None,
        };
        let Some(source) = source.filter(|source| source.adapter.is_some()) else { return Ok(None) };
        let known = self.changes.iter().position(|(other, _)| *other == input);
        if known.is_none() {
            self.changes.push((input, source.change(self.name)?));
        }
        let place = known.unwrap_or(self.changes.len() - 1);
        Ok(self.changes[place].1.as_ref())
    }

    fn place(&self, input: Input) -> Result<(&'a WeightFile, &'a StoredTensor)> {
        let missing = || Error::parameter(self.name, "an input of the merge is missing");
        let base = || self.sources.base.as_ref().ok_or_else(missing);
        let weights = |source: &'a Source| source.tensor(self.name).map(|t| (&source.weights, t)).ok_or_else(missing);
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
        file.read(t, at, x, &mut self.buffer)?;
        if let Some(change) = self.change(input)? {
            change.add(at, x);
        }
        Ok(())
    }
}
