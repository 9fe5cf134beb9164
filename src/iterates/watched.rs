//! What observers have in common: parameters by name, each with what is kept of it, in a model and in a file.

use crate::params::{Claim, Leaf, Params, Perturbed};
use crate::storage::checkpoint;
use crate::{Error, Result, kernel};
use serde::Serialize;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// The parameters of a model, and an S for each.
#[derive(Debug)]
pub(super) struct Watched<S> {
    params: Params,
    kept: Vec<Kept<S>>,
}

/// What is kept of one parameter, in this kind (f32 or f64) and on this device.
#[derive(Debug)]
struct Kept<S> {
    size: Vec<i64>,
    kind: Kind,
    device: Device,
    of: S,
}

/// The weights at one moment, which nobody updates as long as this lives.
pub(super) struct Present {
    _claim: Claim,
    weights: Vec<(String, Tensor)>,
}

impl<S> Watched<S> {
    /// `start` makes what is kept of a parameter from a copy of its value.
    pub fn new(params: impl Into<Params>, start: impl Fn(Tensor) -> S) -> Result<Self> {
        let params = Params::separate(params)?;
        if params.is_empty() {
            let problem = "there are none; create the model's variables (layers) before the average";
            return Err(Error::Parameters(problem.to_owned()));
        }
        params.check_free()?;
        let mut watched = Watched { params, kept: Vec::new() };
        watched.extend(start);
        Ok(watched)
    }

    /// Variables that have come since the last look get what is kept of them.
    fn extend(&mut self, start: impl Fn(Tensor) -> S) {
        let _no_grad = tch::no_grad_guard();
        let new = &self.params.leaves()[self.kept.len()..];
        self.kept.extend(new.iter().map(|leaf| {
            let (size, kind, device) = (leaf.tensor.size(), leaf.state_kind(), leaf.tensor.device());
            Kept { size, kind, device, of: start(leaf.tensor.detach().to_kind(kind).copy()) }
        }));
    }

    /// The weights now, those of new variables too, of which nothing is kept before [`Watched::take_in`].
    ///
    /// # Errors
    /// A parameter of another shape than at the first look; variables that a guard holds. Nothing has changed then.
    pub fn look(&mut self) -> Result<Present> {
        self.params.refresh();
        let claim = self.params.claim()?;
        self.pairs().try_for_each(|(leaf, kept)| same_shape(leaf.name(), &kept.size, &leaf.tensor.size()))?;
        let weights = self.params.leaves().iter().map(|leaf| (leaf.name().to_owned(), leaf.tensor.detach()));
        Ok(Present { weights: weights.collect(), _claim: claim })
    }

    /// Hands each parameter's present weights to what is kept of it, in its kind and on its device; `start` makes this
    /// for new ones.
    pub fn take_in(&mut self, present: &Present, start: impl Fn(Tensor) -> S, mut each: impl FnMut(&mut S, &Tensor)) {
        let _no_grad = tch::no_grad_guard();
        self.extend(start);
        for (kept, (_, weights)) in self.kept.iter_mut().zip(&present.weights) {
            each(&mut kept.of, &weights.to_device(kept.device).to_kind(kept.kind));
        }
    }

    fn pairs(&self) -> impl Iterator<Item = (&Leaf, &Kept<S>)> {
        self.params.leaves().iter().zip(&self.kept)
    }

    /// By name, in order.
    pub fn all(&self) -> impl Iterator<Item = (String, &S)> {
        self.pairs().map(|(leaf, kept)| (leaf.name().to_owned(), &kept.of))
    }

    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut S> {
        self.kept.iter_mut().map(|kept| &mut kept.of)
    }

    pub fn get(&self, name: &str) -> Option<&S> {
        self.kept.get(self.params.number(name)?).map(|kept| &kept.of)
    }

    /// Puts values into the variables until the guard is dropped.
    pub fn swap_in(&self, value: impl Fn(&S) -> Tensor) -> Result<Perturbed> {
        let value = |(leaf, kept): (&Leaf, &Kept<S>)| {
            same_shape(leaf.name(), &kept.size, &leaf.tensor.size())?;
            // A copy, because writing to the variable would write to it.
            let place = (leaf.tensor.device(), leaf.tensor.kind());
            Ok((leaf.tensor.shallow_clone(), value(&kept.of).f_to_device(place.0)?.f_to_kind(place.1)?.copy()))
        };
        Perturbed::enter(self.pairs().map(value).collect::<Result<Vec<_>>>()?)
    }

    /// One safetensors file: of each parameter the tensors `<name><suffix>`.
    pub fn save<C: Serialize>(
        &self,
        path: &Path,
        form: &str,
        content: impl FnOnce(Vec<String>) -> C,
        tensors: impl Fn(&S) -> Vec<(&'static str, Tensor)>,
    ) -> Result<()> {
        let of = |(name, kept): (String, &S)| {
            let named = tensors(kept).into_iter().map(move |(suffix, t)| (format!("{name}{suffix}"), t));
            named.collect::<Vec<_>>()
        };
        let tensors: Vec<_> = self.all().flat_map(of).collect();
        checkpoint::save(path, form, &tensors, &content(self.all().map(|(name, _)| name).collect()))
    }

    /// What a file keeps of each of the parameters, which are the same in any order; for [`Watched::put`].
    pub fn read(
        &mut self,
        path: &Path,
        mut tensors: BTreeMap<String, Tensor>,
        names: Vec<String>,
        start: impl Fn(Tensor) -> S,
        read: impl Fn(&mut Part) -> Result<S>,
    ) -> Result<Vec<S>> {
        self.params.refresh();
        self.extend(start);
        let names: HashSet<String> = names.into_iter().collect();
        let mut all = Vec::new();
        for (leaf, kept) in self.params.leaves().iter().zip(&self.kept) {
            // By any of its names: a tied variable's first one depends on when it was tied.
            let name = leaf.names.iter().find(|name| names.contains(*name)).map_or(leaf.name(), String::as_str);
            let Kept { size, kind, device, .. } = kept;
            all.push(read(&mut Part { path, name, size, place: (*kind, *device), tensors: &mut tensors })?);
        }
        if let Some(name) = tensors.keys().next() {
            return Err(Error::file(path, format!("has a tensor `{name}`, which the model does not have")));
        }
        Ok(all)
    }

    pub fn put(&mut self, all: Vec<S>) {
        self.kept.iter_mut().zip(all).for_each(|(kept, of)| kept.of = of);
    }
}

impl Present {
    /// Errors on a NaN or infinity, which an average would keep. Reads from the device.
    pub fn check_finite(&self) -> Result<()> {
        self.weights.iter().try_for_each(|(name, weights)| match kernel::first_non_finite(weights) {
            Some(value) => Err(Error::parameter(
                name,
                format!("its weights are not finite ({value}); nothing was collected (lower the learning rate)"),
            )),
            None => Ok(()),
        })
    }
}

/// The tensors of one parameter in a file.
pub(super) struct Part<'a> {
    path: &'a Path,
    name: &'a str,
    size: &'a [i64],
    place: (Kind, Device),
    tensors: &'a mut BTreeMap<String, Tensor>,
}

impl Part<'_> {
    /// Tensor `<name><suffix>`, in the parameter's shape behind these dimensions.
    pub fn take(&mut self, suffix: &str, before: &[i64]) -> Result<Tensor> {
        let name = format!("{}{suffix}", self.name);
        let refused = |problem: String| Error::file(self.path, problem);
        let missing = || refused(format!("has no tensor `{name}`, which the model has"));
        let found = self.tensors.remove(&name).ok_or_else(missing)?;
        let expected = [before, self.size].concat();
        if found.size() != expected {
            return Err(refused(format!("tensor `{name}` has shape {:?}: expected {expected:?}", found.size())));
        }
        if let Some(value) = kernel::first_non_finite(&found) {
            return Err(refused(format!("tensor `{name}` is not finite ({value})")));
        }
        Ok(found.f_to_device(self.place.1)?.f_to_kind(self.place.0)?)
    }

    /// The same for one of numbers that are not negative.
    pub fn take_variance(&mut self, suffix: &str) -> Result<Tensor> {
        let found = self.take(suffix, &[])?;
        if found.numel() > 0 && found.min().double_value(&[]) < 0.0 {
            let (name, least) = (self.name, found.min().double_value(&[]));
            return Err(Error::file(self.path, format!("tensor `{name}{suffix}` has an element {least:e} < 0")));
        }
        Ok(found)
    }
}

pub(super) fn same_shape(name: &str, was: &[i64], now: &[i64]) -> Result<()> {
    if was == now {
        return Ok(());
    }
    Err(Error::parameter(name, format!("its average has shape {was:?} and its weight {now:?}")))
}
