//! Merging named tensors: their part of the checks, and tensors as inputs and output of the engine.
//!
//! What is computed is in [`blr_merge`], which sees slices of numbers and names.

use super::{Recipe, Role};
use crate::{Error, Result};
use blr_merge::engine::{self, Input, Inputs, Number, Output, Plan, same_tensors};
use std::collections::{BTreeMap, HashMap};
use tch::kind::Element;
use tch::{Device, Kind, Tensor};

/// Tensors by name, for example of [`VarStore::variables`](tch::nn::VarStore::variables).
pub type Tensors = BTreeMap<String, Tensor>;

/// One of the models that are merged.
#[derive(Debug, Clone, Copy)]
pub struct Model<'a> {
    name: &'a str,
    tensors: &'a Tensors,
    weight: f64,
    curvature: Option<Curvature<'a>>,
}

#[derive(Debug, Clone, Copy)]
struct Curvature<'a> {
    tensors: &'a Tensors,
    /// Whether it is the precision of a posterior, H₀ + H_k, rather than H_k.
    precision: bool,
}

impl<'a> Model<'a> {
    /// A model of weight 1. Errors call it by this name, and what [`Method::dare`](super::Method::dare) keeps of it
    /// depends on the name.
    pub fn new(name: &'a str, tensors: &'a Tensors) -> Self {
        Model { name, tensors, weight: 1.0, curvature: None }
    }

    /// w_k (or a_k); ignored for a base. Default 1.
    #[must_use]
    pub fn weight(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }

    /// H_k ≥ 0 for every weight, the curvature of the loss of this model's task alone; for the base, H₀. On the scale
    /// of the loss summed over the data. Tensors of other names are ignored.
    #[must_use]
    pub fn curvature(mut self, h: &'a Tensors) -> Self {
        self.curvature = Some(Curvature { tensors: h, precision: false });
        self
    }

    /// s_k = H₀ + H_k for every weight, the precision of this model's posterior; for the base, the precision of the
    /// prior.
    #[must_use]
    pub fn precision(mut self, s: &'a Tensors) -> Self {
        self.curvature = Some(Curvature { tensors: s, precision: true });
        self
    }
}

/// Of the tensors that are not left out.
fn shapes<'a>(recipe: &Recipe, tensors: &'a Tensors) -> BTreeMap<&'a str, Vec<i64>> {
    let compared = tensors.iter().filter(|(name, _)| recipe.role(name).is_ok_and(|role| role != Role::Kept));
    compared.map(|(name, t)| (name.as_str(), t.size())).collect()
}

fn floating(t: &Tensor) -> bool {
    matches!(t.kind(), Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half)
}

/// The inputs of one merged tensor, flat and on the CPU: weights, each with its curvature.
struct Sources<'a> {
    base: Option<(Tensor, Option<Tensor>)>,
    models: Vec<(Tensor, Option<Tensor>)>,
    /// What they are read as.
    kind: Kind,
    name: &'a str,
}

impl<T: Element> Inputs<T, Error> for Sources<'_> {
    fn read(&mut self, input: Input, at: usize, x: &mut [T]) -> Result<()> {
        let base = |part: fn(&(Tensor, Option<Tensor>)) -> Option<&Tensor>| self.base.as_ref().and_then(part);
        let source = match input {
            Input::Base => base(|b| Some(&b.0)),
            Input::BaseCurvature => base(|b| b.1.as_ref()),
            Input::Model(k) => Some(&self.models[k].0),
            Input::Curvature(k) => self.models[k].1.as_ref(),
        };
        let source = source.ok_or_else(|| Error::parameter(self.name, "an input of the merge is missing"))?;
        // A chunk at a time, so that half-precision tensors are not in memory twice.
        let chunk = source.f_narrow(0, at as i64, x.len() as i64)?.f_to_kind(self.kind)?;
        Ok(chunk.f_copy_data(x, x.len())?)
    }
}

/// The merged tensor's elements so far.
struct Values<T>(Vec<T>);

impl<T: Copy> Output<T, Error> for Values<T> {
    fn values(&mut self, _at: usize, x: &[T]) -> Result<()> {
        self.0.extend_from_slice(x);
        Ok(())
    }
}

/// Merges models of one architecture, tensor by tensor.
///
/// A method is applied to all weights; a [`Recipe`] leaves some out, and says what becomes of tensors that are no
/// weights: statistics of batch normalization are averaged, factors of adapters are refused.
///
/// Computed in f32, or in f64 where an input is f64; sums over a tensor and everything with curvature always in f64. On
/// the same inputs the result has the same bits, whatever the number of threads; another order of models changes the
/// rounding of sums.
///
/// Each tensor of the result has the device of the base's, or of the first model's if the method needs no base, and the
/// narrowest kind that holds those of all models (and the base) exactly: f32 for f16 and bf16 together. From the same
/// model, tensors of integers and booleans are copied, and names that share a tensor there (tied weights) share the
/// merged one.
///
/// # Errors
/// A base or a curvature that the method needs and that is not given; models that differ in names or shapes, numbers
/// that are not finite, curvature < 0 or a merged precision ≤ 0, all with the name of the tensor; weights and settings
/// out of range.
pub fn merge(recipe: impl Into<Recipe>, base: Option<&Model>, models: &[Model]) -> Result<Tensors> {
    let _no_grad = tch::no_grad_guard();
    let recipe = recipe.into();
    let names: Vec<(&str, f64)> = models.iter().map(|m| (m.name, m.weight)).collect();
    recipe.validate(&names)?;
    let base = if recipe.needs_base() {
        Some(base.ok_or_else(|| {
            Error::Merge("this method needs the base that the models were fine-tuned from".to_owned())
        })?)
    } else {
        None
    };
    let all = || base.into_iter().chain(models);
    let pattern = base.unwrap_or(&models[0]);
    recipe.check(&all().flat_map(|m| m.tensors.keys()).map(String::as_str).collect::<Vec<_>>())?;
    let mut roles = BTreeMap::new();
    for (name, t) in pattern.tensors {
        // Of integers nothing is computed.
        let role = recipe.role(name)?;
        roles.insert(name.as_str(), if t.defined() && !floating(t) { Role::Kept } else { role });
    }
    // What is left out may differ, or be in some of the models only.
    let expected = shapes(&recipe, pattern.tensors);
    let mut posteriors = None;
    for model in all() {
        if let Some((name, _)) = model.tensors.iter().find(|(_, t)| !t.defined()) {
            return Err(Error::parameter(name, format!("it is undefined in model `{}`", model.name)));
        }
        // Before anything is computed, so that an error does not come after minutes of work.
        same_tensors((pattern.name, &expected), (model.name, &shapes(&recipe, model.tensors)))?;
        if !recipe.needs_curvature() {
            continue;
        }
        let Some(curvature) = model.curvature else {
            let problem =
                format!("model `{}` has neither curvature nor precision, which this method needs", model.name);
            return Err(Error::Merge(problem));
        };
        if *posteriors.get_or_insert(curvature.precision) != curvature.precision {
            return Err(Error::Merge(
                "some models have a loss's curvature and others a precision; give the same for all".to_owned(),
            ));
        }
        for (name, t) in model.tensors.iter().filter(|(name, _)| roles.get(name.as_str()) == Some(&Role::Weight)) {
            let problem = match curvature.tensors.get(name) {
                None => "is missing".to_owned(),
                Some(h) if h.size() == t.size() && floating(h) => continue,
                Some(h) => format!("is {:?} {:?}: expected the shape {:?}", h.kind(), h.size(), t.size()),
            };
            return Err(Error::parameter(name, format!("its curvature of model `{}` {problem}", model.name)));
        }
    }
    let plan = |name: &str| recipe.plan(name, &names, posteriors.unwrap_or(false));
    roles.iter().filter(|(_, role)| **role != Role::Kept).try_for_each(|(name, _)| plan(name).map(drop))?;

    let mut merged = Tensors::new();
    let mut done: HashMap<usize, Vec<(&Tensor, &str)>> = HashMap::new();
    for (name, like) in pattern.tensors {
        // Same memory, offset and shape: a tied tensor, which has to stay one.
        let there = done.entry(like.data_ptr() as usize).or_default();
        if let Some((_, first)) = there.iter().find(|(t, _)| t.is_set_to(like)) {
            if roles[*first] != roles[name.as_str()] {
                let problem =
                    format!("it is tied to `{first}`, and only one of them is to be merged: include or exclude both");
                return Err(Error::parameter(name, problem));
            }
            let tied = merged[*first].shallow_clone();
            merged.insert(name.clone(), tied);
            continue;
        }
        there.push((like, name));
        let others = || all().filter_map(|m| m.tensors.get(name));
        if let Some(other) = others().find(|t| expected.contains_key(name.as_str()) && floating(t) != floating(like)) {
            let (ours, theirs) = (like.kind(), other.kind());
            return Err(Error::parameter(name, format!("it is {ours:?} in one model and {theirs:?} in another")));
        }
        let kind = others().fold(like.kind(), |kind, t| both(kind, t.kind()));
        let result = match roles[name.as_str()] {
            Role::Kept => like.copy(),
            Role::Statistic => one(&plan(name)?.average(), (name, like, kind), None, models)?,
            Role::Weight => one(&plan(name)?, (name, like, kind), base, models)?,
        };
        merged.insert(name.clone(), result);
    }
    Ok(merged)
}

/// The narrowest kind that holds the numbers of both exactly. Of the two narrow ones neither holds the other: one has
/// the digits, the other the range.
fn both(a: Kind, b: Kind) -> Kind {
    match (a, b) {
        (a, b) if a == b => a,
        (Kind::Double, _) | (_, Kind::Double) => Kind::Double,
        _ => Kind::Float,
    }
}

/// The merge of one tensor, in the shape and on the device of `like`.
fn one(
    plan: &Plan,
    (name, like, result): (&str, &Tensor, Kind),
    base: Option<&Model>,
    models: &[Model],
) -> Result<Tensor> {
    let flat = |t: &Tensor| -> Result<Tensor> { Ok(t.detach().f_to_device(Device::Cpu)?.f_reshape([-1])?) };
    let source = |m: &Model| -> Result<(Tensor, Option<Tensor>)> {
        let curvature = m.curvature.filter(|_| plan.method.needs_curvature());
        let curvature = curvature.and_then(|c| c.tensors.get(name)).map(flat).transpose()?;
        Ok((flat(&m.tensors[name])?, curvature))
    };
    let base = base.map(source).transpose()?;
    let models = models.iter().map(source).collect::<Result<Vec<_>>>()?;
    let parts = base.iter().chain(&models).flat_map(|(x, h)| std::iter::once(x).chain(h));
    // One f64 input is enough: rounding it first would lose what it was kept in f64 for.
    let wide = parts.into_iter().any(|t| t.kind() == Kind::Double);
    let kind = if wide { Kind::Double } else { Kind::Float };
    let mut sources = Sources { base, models, kind, name };
    let merged = if wide { run::<f64>(plan, like, &mut sources) } else { run::<f32>(plan, like, &mut sources) }?;
    let merged = merged.f_to_kind(result)?;
    // After the conversion: a sum may fit into f32 and overflow f16.
    if merged.isfinite().all().int64_value(&[]) == 0 {
        return Err(Error::parameter(name, format!("the merge has numbers that are too large for {result:?}")));
    }
    Ok(merged.f_reshape(like.size())?.f_to_device(like.device())?)
}

fn run<T: Number + Element>(plan: &Plan, like: &Tensor, sources: &mut Sources) -> Result<Tensor> {
    let (len, name) = (like.numel(), sources.name);
    let mut values = Values(Vec::with_capacity(len));
    engine::merge::<T, Error>(plan, name, len, sources, &mut values)?;
    Ok(Tensor::f_from_slice(&values.0)?)
}
