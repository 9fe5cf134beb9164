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
use std::collections::{BTreeMap, HashSet};
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
}

/// [`Sums`] without its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Accumulated {
    weight: f64,
    evaluations: u64,
    loss: f64,
    per_example: bool,
    /// Names of the parameters that have an accumulated gradient.
    gradients: Vec<String>,
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
    /// Not in it: buffers (save the [`VarStore`](tch::nn::VarStore) for those), noise given as tensors, and the state
    /// of libtorch's own generator.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        (self.compiled.save)(self, path.as_ref())
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
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
            let statistics = self.sums.statistics.get(u).map_or(&[][..], Vec::as_slice);
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
        for (g, leaf) in self.sums.gradients.iter().zip(self.params.leaves()) {
            if let Some(g) = g {
                tensors.push((format!("accumulated.gradient.{}", leaf.name()), g.detach()));
                gradients.push(leaf.name().to_owned());
            }
        }
        let Sums { weight, evaluations, loss, per_example, .. } = self.sums;
        let content = Content {
            config: self.config,
            lr: self.lr,
            schedule: self.schedule,
            clip: self.clip,
            noise: if let Noise::Philox(p) = self.noise { Some(p) } else { None },
            steps: self.steps,
            accumulated: Accumulated { weight, evaluations, loss, per_example, gradients },
            units,
        };
        checkpoint::save(path, &form::<R>(), &tensors, &content)
    }

    /// Takes up training where [`Optimizer::save`] left it: weights, state, prior, every hyper-parameter, step count,
    /// noise. The next step is bit-identical to the one that the saved optimizer would have taken.
    ///
    /// The optimizer must be of the same row, over the same parameters in the same order; kinds may differ only where
    /// the state is f32 anyway (bf16, f16, f32), the device may be another.
    ///
    /// # Errors
    /// A file that cannot be read, is broken, or belongs to another row; parameters that are missing, extra or of
    /// another shape or kind. Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        (self.compiled.load)(self, path.as_ref())
    }

    pub(super) fn read(&mut self, path: &Path) -> Result<()> {
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

        // Read and check everything, then change everything.
        let base: R = settings(path, content.config)?;
        check_lr(content.lr).map_err(at_file)?;
        content.schedule.validate().map_err(at_file)?;
        content.clip.map_or(Ok(()), Clip::validate).map_err(at_file)?;
        let mut file = File { path, tensors };
        let mut restored = Vec::new();
        let mut saved = content.units.into_iter();
        for unit in &self.units {
            let p = saved.next().ok_or_else(|| {
                let name = unit.name(&self.params);
                Error::file(path, format!("has no parameter `{name}`, which the model has"))
            })?;
            restored.push(Restored::new(&mut file, p, unit, &self.params, base).map_err(at_file)?);
        }
        if let Some(p) = saved.next() {
            let name = p.parameters.first().map_or("?", String::as_str);
            return Err(Error::file(path, format!("has a parameter `{name}`, which the model does not have")));
        }
        let Accumulated { weight, evaluations, loss, per_example, gradients: names } = content.accumulated;
        let mut gradients: Vec<Option<Tensor>> = Vec::new();
        if !names.is_empty() {
            let names: HashSet<String> = names.into_iter().collect();
            for leaf in self.params.leaves() {
                // By any of them: a tied variable's first name depends on when it was tied.
                let name = leaf.names.iter().find(|name| names.contains(*name));
                let kind = R::Arithmetic::kind(leaf);
                let take = |name: &String| {
                    file.take(&format!("accumulated.gradient.{name}"), &leaf.tensor.size(), kind, leaf.tensor.device())
                };
                gradients.push(name.map(take).transpose()?);
            }
        }
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

        let _no_grad = tch::no_grad_guard();
        let mut statistics = Vec::new();
        for (unit, saved) in self.units.iter_mut().zip(restored) {
            (unit.steps, unit.lr, unit.rms, unit.prior) = (saved.steps, saved.lr, saved.rms, saved.prior);
            R::Arithmetic::configure(unit, &self.params, saved.row);
            R::Arithmetic::restore(unit, &self.params, &saved.mean, saved.state)?;
            statistics.push(saved.statistics);
        }
        // Whether the last gradient was cut, and how long it was, is not in the file.
        let (gradient_norm, cut) = (f64::NAN, false);
        self.sums = Sums { weight, evaluations, loss, gradient_norm, cut, per_example, gradients, statistics };
        self.config = base;
        self.lr = content.lr;
        self.schedule = content.schedule;
        self.clip = content.clip;
        self.steps = content.steps;
        self.last = None;
        self.divergence = self.divergence.map(Divergence::anew);
        // Noise that was given as tensors is not in the file: the optimizer keeps its own.
        if let Some(p) = content.noise {
            self.noise = p.into();
        }
        Ok(())
    }
}

fn settings<R: Row>(path: &Path, value: serde_json::Value) -> Result<R> {
    let row: R = serde_json::from_value(value)
        .map_err(|e| Error::file(path, format!("has a configuration that does not fit: {e}")))?;
    row.validate().map(|()| row).map_err(|e| Error::file(path, e))
}

/// Tensors that have not been taken yet.
struct File<'a> {
    path: &'a Path,
    tensors: BTreeMap<String, Tensor>,
}

impl File<'_> {
    /// A finite tensor of this shape, kind and device.
    fn take(&mut self, name: &str, size: &[i64], kind: Kind, device: tch::Device) -> Result<Tensor> {
        let refused = |problem: String| Error::file(self.path, problem);
        // Removed, so that what is left in the end belongs to nothing.
        let t = self.tensors.remove(name).ok_or_else(|| refused(format!("has no tensor `{name}`")))?;
        if t.kind() != kind || t.size() != size {
            let (found, own) = (t.kind(), t.size());
            return Err(refused(format!("tensor `{name}` is {found:?} {own:?}: expected {kind:?} {size:?}")));
        }
        if let Some(value) = kernel::first_non_finite(&t) {
            return Err(refused(format!("tensor `{name}` is not finite ({value})")));
        }
        Ok(t.to_device(device))
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
