//! Optimizer ↔ one checkpoint file: which numbers and tensors it holds, and whether those of a file fit.
//!
//! How tensors and their description become a safetensors file, and how that is replaced atomically, is in
//! [`crate::storage`]. A posterior has a file of its own, [`crate::posterior`].

use super::Optimizer;
use super::arithmetic::{Arithmetic, Unit, check_lr};
use super::divergence::Divergence;
use super::row::{Row, shared};
use super::sums::Sums;
use crate::gradient::Clip;
use crate::kernel::{self, Noise, Philox};
use crate::params::{Leaf, Params};
use crate::prior::{BlockPrior, Isotropic, Layout, PriorOf};
use crate::storage::checkpoint;
use crate::{Error, Result, Schedule, check};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet, VecDeque};
use std::path::Path;
use tch::{Kind, Tensor};

/// What the file is.
fn form<R: Row>() -> String {
    format!("{} optimizer", R::NAME)
}

/// Everything that is not a tensor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content<R> {
    config: R,
    lr: f64,
    schedule: Schedule,
    clip: Option<Clip>,
    /// Absent if the noise was given as tensors.
    noise: Option<Philox>,
    steps: u64,
    accumulated: Accumulated,
    units: Vec<OfUnit<R>>,
    /// Where the noise of each parameter starts, frozen ones included.
    positions: BTreeMap<String, u64>,
    /// Names of the tensors `buffer.*`.
    buffers: Vec<String>,
}

/// Further than any model's noise reaches, and far from overflowing.
const POSITIONS: u64 = 1 << 44;

/// [`Sums`] without its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Accumulated {
    weight: f64,
    merged: bool,
    /// Of all ranks.
    evaluations: u64,
    loss: f64,
    per_example: bool,
    /// Names of the parameters that have an accumulated gradient.
    gradients: Vec<String>,
    /// Whether they also have the mean of its size.
    #[serde(default)]
    sizes: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OfUnit<R> {
    /// Its parameters: one, or those of a joint block.
    parameters: Vec<String>,
    steps: u64,
    config: R,
    lr: f64,
    /// Of the weights that it started from.
    rms: f64,
    prior: PriorContent,
    /// Number of its accumulated statistics.
    statistics: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
enum PriorContent {
    Isotropic(Isotropic),
    /// The tensors `prior.*` of the unit.
    Gaussian(Layout),
}

impl<R: Row> Optimizer<R> {
    /// Writes weights (in f32 or f64), state, prior, settings, schedule, step count, noise position and accumulated
    /// gradients to one safetensors file, which is replaced atomically: after a crash at any moment `path` holds the
    /// previous checkpoint or this one.
    ///
    /// Tensor keys and fields are listed in `docs/design.md`. Frozen variables of elementwise rows are in it as well,
    /// and not those that were never trained in a row over blocks.
    ///
    /// So are the buffers of the stores that the parameters come from (batch-norm statistics, constants), in f32 or
    /// f64: a model that goes on answers as the one that was saved. Parameters by [`Params::named`] have no store, and
    /// so no buffers.
    ///
    /// Not in it: noise given as tensors, and the state of libtorch's own generator.
    ///
    /// # Errors
    /// If the file cannot be written; a buffer of integers with some beyond 2⁵³, or of complex numbers.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        (self.compiled.save)(self, path.as_ref())
    }

    pub(super) fn write(&self, path: &Path, sums: &Sums) -> Result<()> {
        let mut tensors = Vec::new();
        let mut units = Vec::new();
        for (u, unit) in self.units.iter().enumerate() {
            let name = unit.name(&self.params);
            let mut put = |what: &str, t: &Tensor| tensors.push((format!("{what}.{name}"), t.detach()));
            for (what, t) in R::Arithmetic::tensors(unit, &self.params)? {
                put(&what, &t);
            }
            let prior = match &unit.prior {
                PriorOf::Isotropic(prior) => PriorContent::Isotropic(*prior),
                PriorOf::Gaussian(prior) => {
                    prior.tensors().into_iter().for_each(|(what, t)| put(&format!("prior.{what}"), &t));
                    PriorContent::Gaussian(prior.layout())
                }
            };
            let statistics = sums.statistics.get(u).map_or(&[][..], Vec::as_slice);
            for (i, t) in statistics.iter().enumerate() {
                put(&format!("accumulated.statistic.{i}"), t);
            }
            units.push(OfUnit {
                parameters: unit.leaves(&self.params).map(|leaf| leaf.name().to_owned()).collect(),
                steps: unit.steps,
                config: unit.row,
                lr: unit.lr,
                rms: unit.rms,
                prior,
                statistics: statistics.len(),
            });
        }
        let mut gradients = Vec::new();
        for (i, (g, leaf)) in sums.gradients.iter().zip(self.params.leaves()).enumerate() {
            if let Some(g) = g {
                tensors.push((format!("accumulated.gradient.{}", leaf.name()), g.detach()));
                gradients.push(leaf.name().to_owned());
                if let Some(size) = sums.sizes.get(i).and_then(Option::as_ref) {
                    tensors.push((format!("accumulated.size.{}", leaf.name()), size.detach()));
                }
            }
        }
        let mut buffers = Vec::new();
        for (name, t) in self.params.buffers() {
            let stored = if t.kind() == Kind::Float { t.detach() } else { t.detach().f_to_kind(Kind::Double)? };
            if !t.is_floating_point() && !stored.to_kind(t.kind()).equal(&t) {
                return Err(Error::parameter(
                    &name,
                    "this buffer has numbers that an f64 of the file cannot hold; keep it outside of the store",
                ));
            }
            tensors.push((format!("buffer.{name}"), stored));
            buffers.push(name);
        }
        // Not of one that was refused when it came late.
        let known =
            |i: usize, leaf: &Leaf| !leaf.trainable() || self.units.iter().any(|unit| unit.members.contains(&i));
        let Sums { weight, merged, evaluations, loss, per_example, .. } = *sums;
        let content = Content {
            config: self.config,
            lr: self.lr,
            schedule: self.schedule,
            clip: self.clip,
            noise: if let Noise::Philox(p) = self.noise { Some(p) } else { None },
            steps: self.steps,
            accumulated: Accumulated {
                weight,
                merged,
                evaluations,
                loss,
                per_example,
                gradients,
                sizes: !sums.sizes.is_empty(),
            },
            units,
            positions: self.params.noise_groups(known),
            buffers,
        };
        checkpoint::save(path, &form::<R>(), &tensors, &content)
    }

    /// Takes up training where [`Optimizer::save`] left it: weights, state, prior, every hyper-parameter, step count,
    /// noise. The next step is bit-identical to the one that the saved optimizer would have taken.
    ///
    /// The optimizer must be of the same row, over parameters and buffers of the same names, in any order but in a row
    /// with one block of all weights; kinds may differ only where the state is f32 anyway (bf16, f16, f32), the device
    /// may be another.
    ///
    /// # Errors
    /// A file that cannot be read, is broken, or belongs to another row; parameters or buffers that are missing, extra
    /// or of another shape or kind. Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        (self.compiled.load)(self, path.as_ref())
    }

    /// Accumulated gradients of the parameters of these names, and their sizes if there are any.
    fn accumulated(&self, file: &mut File, names: Vec<String>, sized: bool) -> Result<[Vec<Option<Tensor>>; 2]> {
        let mut found = [Vec::new(), Vec::new()];
        if names.is_empty() {
            return Ok(found);
        }
        let names: HashSet<String> = names.into_iter().collect();
        for leaf in self.params.leaves() {
            // By any of them: a tied variable's first name depends on when it was tied.
            let name = leaf.names.iter().find(|name| names.contains(*name));
            let (size, kind, device) = (leaf.tensor.size(), R::Arithmetic::kind(leaf), leaf.tensor.device());
            let mut take = |what: &str| {
                name.map(|name| file.take(&format!("accumulated.{what}.{name}"), &size, kind, device)).transpose()
            };
            found[0].push(take("gradient")?);
            if sized {
                found[1].push(take("size")?);
            }
        }
        Ok(found)
    }

    /// Reads and checks everything, and changes nothing but to pick up new variables.
    pub(super) fn read(&mut self, path: &Path) -> Result<Loaded<R>> {
        let at_file = |e: Error| match e {
            e @ Error::File { .. } => e,
            e => Error::file(path, e),
        };
        // Settings stay JSON until `settings` reads them, so that an error names file and field.
        let (tensors, content): (_, Content<serde_json::Value>) = checkpoint::load(path, &form::<R>())?;
        // The file may have been saved with variables that this optimizer has not picked up yet.
        self.params.refresh();
        self.params.check()?;
        self.extend()?;
        let base: R = settings(path, content.config)?;
        check_lr(content.lr).map_err(at_file)?;
        content.schedule.validate().map_err(at_file)?;
        content.clip.map_or(Ok(()), Clip::validate).map_err(at_file)?;
        let mut file = File { path, tensors };
        let mut restored = Vec::new();
        let mut saved = VecDeque::from(content.units);
        for unit in &self.units {
            // By name: the model may have been built in another order.
            let own = |p: &OfUnit<_>| {
                unit.leaves(&self.params).any(|leaf| p.parameters.iter().any(|n| leaf.names.contains(n)))
            };
            let Some(own) = saved.iter().position(own).and_then(|at| saved.remove(at)) else {
                let name = unit.name(&self.params);
                let other = saved.iter().flat_map(|p| &p.parameters).filter(|n| self.params.find(n).is_none());
                // A few of them, to tell which model it is.
                let other = other.take(3).map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", ");
                let other = if other.is_empty() { other } else { format!(", but {other}, which it does not have") };
                let problem = format!("has no parameter `{name}`, which the model has{other}; build the same model");
                return Err(Error::file(path, problem));
            };
            restored.push(Restored::new(&mut file, own, unit, &self.params, base).map_err(at_file)?);
        }
        if let Some(p) = saved.front() {
            let name = p.parameters.first().map_or("?", String::as_str);
            return Err(Error::file(path, format!("has a parameter `{name}`, which the model does not have")));
        }
        let buffers = self.buffers_of(&mut file, &content.buffers)?;
        if let Some((name, _)) = content.positions.iter().find(|(_, at)| **at >= POSITIONS) {
            return Err(Error::file(path, format!("has a position of `{name}` in the noise that cannot be")));
        }
        let Accumulated { weight, merged, evaluations, loss, per_example, gradients: names, sizes: sized } =
            content.accumulated;
        let [gradients, sizes] = self.accumulated(&mut file, names, sized)?;
        if let Some(name) = file.tensors.keys().next() {
            return Err(Error::file(path, format!("has a tensor `{name}` that belongs to nothing")));
        }
        // JSON has neither NaN nor infinity, so only the sign can be wrong.
        if weight < 0.0 {
            return Err(Error::file(path, format!("its accumulated weight is {weight}: expected a number ≥ 0")));
        }
        // The noise has 48 bits for the step, and a larger count would overflow.
        let counts = restored.iter().map(|saved| saved.steps).chain([content.steps, evaluations]);
        if let Some(count) = counts.into_iter().find(|n| *n >= kernel::STEPS) {
            return Err(Error::file(path, format!("counts {count} steps or evaluations, which cannot be")));
        }

        // Whether the last gradient was cut, and how long it was, is not in the file; it may have been very long.
        let (gradient_norm, largest_norm, cut) = (f64::NAN, f64::INFINITY, false);
        let sizes = match self.skip_unseen {
            false => Vec::new(),
            // Written by an optimizer that did not ask for it.
            true if sizes.is_empty() => gradients.iter().map(|g| g.as_ref().map(Tensor::abs)).collect(),
            true => sizes,
        };
        let statistics = restored.iter_mut().map(|saved| std::mem::take(&mut saved.statistics)).collect();
        let sums = Sums {
            weight,
            merged,
            evaluations,
            loss,
            gradient_norm,
            largest_norm,
            cut,
            per_example,
            gradients,
            statistics,
            sizes,
        };
        let Content { lr, schedule, clip, noise, steps, positions, .. } = content;
        Ok(Loaded { base, lr, schedule, clip, noise, steps, positions, units: restored, buffers, sums })
    }

    /// Changes everything.
    pub(super) fn take_up(&mut self, loaded: Loaded<R>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        self.params.set_noise_groups(&loaded.positions);
        for (mut buffer, saved) in loaded.buffers {
            buffer.copy_(&saved);
        }
        for (unit, saved) in self.units.iter_mut().zip(loaded.units) {
            (unit.steps, unit.lr, unit.rms, unit.prior) = (saved.steps, saved.lr, saved.rms, saved.prior);
            R::Arithmetic::configure(unit, &self.params, saved.row);
            R::Arithmetic::restore(unit, &self.params, &saved.mean, saved.state)?;
        }
        self.sums = self.own_part(loaded.sums);
        self.config = loaded.base;
        self.lr = loaded.lr;
        self.schedule = loaded.schedule;
        self.clip = loaded.clip;
        self.steps = loaded.steps;
        self.last = None;
        self.divergence = self.divergence.map(Divergence::anew);
        // Noise that was given as tensors is not in the file: the optimizer keeps its own.
        if let Some(p) = loaded.noise {
            self.noise = p.into();
        }
        self.changed();
        Ok(())
    }
}

/// What a file holds, fit for the optimizer that has read it.
pub(super) struct Loaded<R> {
    base: R,
    lr: f64,
    schedule: Schedule,
    clip: Option<Clip>,
    noise: Option<Philox>,
    steps: u64,
    positions: BTreeMap<String, u64>,
    units: Vec<Restored<R>>,
    /// With what they are to become.
    buffers: Vec<(Tensor, Tensor)>,
    sums: Sums,
}

impl<R: Row> Optimizer<R> {
    /// The buffers that the model has, with what the file has for them: the same ones.
    fn buffers_of(&self, file: &mut File, names: &[String]) -> Result<Vec<(Tensor, Tensor)>> {
        let own = self.params.buffers();
        let refused = |problem: String| Err(Error::file(file.path, problem));
        if let Some(name) = names.iter().find(|name| !own.iter().any(|(n, _)| n == *name)) {
            return refused(format!(
                "has a buffer `{name}`, which the model does not have; build the same model, from its store \
                 (parameters by name have no buffers)"
            ));
        }
        if let Some((name, _)) = own.iter().find(|(name, _)| !names.contains(name)) {
            return refused(format!(
                "has no buffer `{name}`, which the model has, so that its answers would be others than those of the \
                 model that was saved; build the model that was saved, from its store"
            ));
        }
        let take = |(name, t): (String, Tensor)| {
            // Not all need be finite, as of a mask with -∞.
            let kind = if t.kind() == Kind::Float { Kind::Float } else { Kind::Double };
            let saved = file.take_any(&format!("buffer.{name}"), &t.size(), kind)?;
            Ok((t, saved))
        };
        own.into_iter().map(take).collect()
    }
}

fn settings<R: Row>(path: &Path, value: serde_json::Value) -> Result<R> {
    let row: R = serde_json::from_value(value)
        .map_err(|e| Error::file(path, format!("has a configuration that does not fit: {e}")))?;
    super::row::check(&row).map(|()| row).map_err(|e| Error::file(path, e))
}

/// Tensors that have not been taken yet.
struct File<'a> {
    path: &'a Path,
    tensors: BTreeMap<String, Tensor>,
}

impl File<'_> {
    /// A finite tensor of this shape, kind and device.
    fn take(&mut self, name: &str, size: &[i64], kind: Kind, device: tch::Device) -> Result<Tensor> {
        let t = self.take_any(name, size, kind)?;
        if let Some(value) = kernel::first_non_finite(&t) {
            return Err(Error::file(self.path, format!("tensor `{name}` is not finite ({value})")));
        }
        Ok(t.to_device(device))
    }

    /// A tensor of this shape and kind.
    fn take_any(&mut self, name: &str, size: &[i64], kind: Kind) -> Result<Tensor> {
        let refused = |problem: String| Error::file(self.path, problem);
        // Removed, so that what is left in the end belongs to nothing.
        let t = self.tensors.remove(name).ok_or_else(|| refused(format!("has no tensor `{name}`")))?;
        if t.kind() != kind || t.size() != size {
            let (found, own) = (t.kind(), t.size());
            return Err(refused(format!("tensor `{name}` is {found:?} {own:?}: expected {kind:?} {size:?}")));
        }
        Ok(t)
    }
}

/// What a checkpoint holds of one unit, fit for it.
struct Restored<R> {
    steps: u64,
    row: R,
    lr: f64,
    rms: f64,
    mean: Tensor,
    state: Vec<(usize, Tensor)>,
    prior: PriorOf,
    statistics: Vec<Tensor>,
}

impl<R: Row> Restored<R> {
    fn new(file: &mut File, p: OfUnit<serde_json::Value>, unit: &Unit<R>, params: &Params, base: R) -> Result<Self> {
        let path = file.path;
        let refused = |problem: String| Error::file(path, problem);
        let fits = p.parameters.len() == unit.members.len()
            && unit.leaves(params).zip(&p.parameters).all(|(leaf, name)| leaf.names.contains(name));
        if !fits {
            let ours: Vec<&str> = unit.leaves(params).map(Leaf::name).collect();
            let (saved, ours) = (p.parameters.join("`, `"), ours.join("`, `"));
            return Err(refused(format!("has parameter `{saved}` where the model has `{ours}`; build the same model")));
        }
        let name = &p.parameters[0];
        let (shape, kind) = R::Arithmetic::form_of(unit, params);
        let device = params.leaves()[unit.members[0]].tensor.device();
        let mut take = |what: &str, size: &[i64]| file.take(&format!("{what}.{name}"), size, kind, device);
        let mean = take("mean", &shape)?;
        let row: R = settings(path, p.config)?;
        check_lr(p.lr)?;
        check::non_negative("rms", p.rms)?;
        let prior = match p.prior {
            PriorContent::Isotropic(prior) => prior.validate().map(|()| PriorOf::Isotropic(prior))?,
            PriorContent::Gaussian(layout) => {
                let prior = BlockPrior::restore(layout, &shape, |what, size| take(&format!("prior.{what}"), size));
                PriorOf::Gaussian(prior?)
            }
        };
        R::Arithmetic::admits(&prior, &row)?;
        let expected = R::Arithmetic::expected(unit, params, &row, &prior).into_iter();
        let state = expected.map(|(i, size)| Ok((i, take(&format!("state.{}", R::STATE[i]), &size)?)));
        let state = state.collect::<Result<Vec<_>>>()?;
        let statistics = if p.statistics == 0 { Vec::new() } else { R::Arithmetic::statistics(unit, params)? };
        if statistics.len() != p.statistics {
            let (found, expected) = (p.statistics, statistics.len());
            return Err(refused(format!("has {found} statistics of parameter `{name}`: expected {expected}")));
        }
        let taken = statistics.iter().enumerate().map(|(i, size)| take(&format!("accumulated.statistic.{i}"), size));
        let statistics = taken.collect::<Result<Vec<_>>>()?;
        // One evaluation serves all parameters, so they cannot want different ones.
        if shared(&row) != shared(&base) {
            return Err(refused(format!("has parameter `{name}` evaluated at other points than the rest")));
        }
        Ok(Restored { steps: p.steps, row, lr: p.lr, rms: p.rms, mean, state, prior, statistics })
    }
}
