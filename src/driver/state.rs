//! Optimizer ↔ one checkpoint file.

use super::{Optimizer, sums::Sums};
use crate::expectation::Link;
use crate::gradient::Clip;
use crate::kernel::{self, Noise, Philox};
use crate::params::Leaf;
use crate::prior::{Isotropic, PriorOf};
use crate::rows::Rule;
use crate::{Error, Result, Schedule, checkpoint};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use tch::Tensor;

/// What the file is.
fn form<R: Rule>() -> String {
    format!("{} optimizer", R::NAME)
}

/// Everything that is not a tensor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content<R> {
    config: R,
    schedule: Schedule,
    clip: Option<Clip>,
    /// Absent if the noise was given as tensors.
    noise: Option<Philox>,
    steps: u64,
    accumulated: Accumulated,
    parameters: Vec<Parameter<R>>,
}

/// [`Sums`] without its tensors.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Accumulated {
    weight: f64,
    evaluations: u64,
    loss: f64,
    per_example: bool,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameter<R> {
    name: String,
    steps: u64,
    config: R,
    /// Absent if the prior is tensors.
    prior: Option<Isotropic>,
    /// Whether the file has its accumulated gradient.
    gradient: bool,
    /// Whether the file has its accumulated curvature statistic.
    curvature: bool,
}

impl<R: Rule> Optimizer<R> {
    /// Writes weights (in f32 or f64), state, prior, configuration, schedule, step count, noise position and
    /// accumulated gradients to one safetensors file, which is replaced atomically: after a crash at any moment `path`
    /// holds the previous checkpoint or this one.
    ///
    /// Tensor keys and fields are listed in `docs/design.md`; frozen variables are in it as well.
    ///
    /// Not in it: buffers (save the [`VarStore`](tch::nn::VarStore) for those), noise given as tensors, and the state of
    /// libtorch's own generator.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut tensors = Vec::new();
        let mut parameters = Vec::new();
        for (i, (slot, leaf)) in self.slots.iter().zip(self.params.leaves()).enumerate() {
            let mut put = |what: &str, t: &Tensor| tensors.push((format!("{what}.{}", leaf.name()), t.detach()));
            put("mean", &slot.mean_now(leaf));
            for (name, t) in R::STATE.iter().zip(&slot.state) {
                _ = t.as_ref().map(|t| put(&format!("state.{name}"), t));
            }
            let prior = match &slot.prior {
                PriorOf::Isotropic(prior) => Some(*prior),
                PriorOf::Posterior { mean, precision } => {
                    put("prior.mean", mean);
                    put("prior.precision", precision);
                    None
                }
            };
            let mut accumulated = |what: &str, sums: &[Option<Tensor>]| {
                let t = sums.get(i).and_then(Option::as_ref);
                t.inspect(|t| put(what, t)).is_some()
            };
            let gradient = accumulated("accumulated.gradient", &self.sums.gradients);
            let curvature = accumulated("accumulated.curvature", &self.sums.curvature);
            let (name, steps, config) = (leaf.name().to_owned(), slot.steps, slot.config);
            parameters.push(Parameter { name, steps, config, prior, gradient, curvature });
        }
        let content = Content {
            config: self.config,
            schedule: self.schedule,
            clip: self.clip,
            noise: if let Noise::Philox(p) = self.noise { Some(p) } else { None },
            steps: self.steps,
            accumulated: Accumulated {
                weight: self.sums.weight,
                evaluations: self.sums.evaluations,
                loss: self.sums.loss,
                per_example: self.sums.per_example,
            },
            parameters,
        };
        checkpoint::save(path.as_ref(), &form::<R>(), &tensors, &content)
    }

    /// Takes up training where [`Optimizer::save`] left it: weights, state, prior, every hyper-parameter, step count,
    /// noise. The next step is bit-identical to the one that the saved optimizer would have taken.
    ///
    /// The optimizer must be of the same row, over the same parameters in the same order; kinds may differ only where the
    /// state is f32 anyway (bf16, f16, f32), the device may be another.
    ///
    /// # Errors
    /// A file that cannot be read, is broken, or belongs to another row; parameters that are missing, extra or of
    /// another shape or kind. Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (mut tensors, content): (_, Content<serde_json::Value>) = checkpoint::load(path, &form::<R>())?;
        self.params.refresh();
        self.params.check()?;
        self.add_slots()?;

        // Read and check everything, then change everything.
        let base: R = config(path, content.config)?;
        content.schedule.validate().map_err(|e| Error::file(path, e))?;
        content.clip.map_or(Ok(()), Clip::validate).map_err(|e| Error::file(path, e))?;
        let mut restored = Vec::new();
        let mut saved = content.parameters.into_iter();
        for leaf in self.params.leaves() {
            let p = saved
                .next()
                .ok_or_else(|| Error::file(path, format!("has no parameter `{}`, which the model has", leaf.name())))?;
            restored.push(Restored::new(path, p, leaf, base, &mut tensors)?);
        }
        if let Some(p) = saved.next() {
            return Err(Error::file(path, format!("has a parameter `{}`, which the model has not", p.name)));
        }
        if let Some(name) = tensors.keys().next() {
            return Err(Error::file(path, format!("has a tensor `{name}` that belongs to nothing")));
        }

        let Accumulated { weight, evaluations, loss, per_example } = content.accumulated;
        if weight < 0.0 {
            return Err(Error::file(path, format!("its accumulated weight is {weight}: expected a number ≥ 0")));
        }
        let counts = restored.iter().map(|saved| saved.steps).chain([content.steps, evaluations]);
        if let Some(count) = counts.into_iter().find(|n| *n >= kernel::STEPS) {
            return Err(Error::file(path, format!("counts {count} steps or evaluations, which cannot be")));
        }

        let _no_grad = tch::no_grad_guard();
        let mut sums = Sums { weight, evaluations, loss, per_example, ..Sums::default() };
        for ((slot, leaf), saved) in self.slots.iter_mut().zip(self.params.leaves()).zip(restored) {
            let link = saved.config.link();
            if link == Link::Identity || leaf.trainable() {
                leaf.tensor.shallow_clone().copy_(&link.weight(&saved.mean));
            }
            if let Some(own) = &mut slot.mean {
                own.copy_(&saved.mean);
            }
            slot.steps = saved.steps;
            slot.restore(leaf, saved.config, saved.prior);
            for (own, t) in slot.state.iter_mut().zip(saved.state) {
                _ = own.as_mut().zip(t).map(|(own, t)| own.copy_(&t));
            }
            sums.gradients.push(saved.gradient);
            sums.curvature.push(saved.curvature);
        }
        self.sums = sums;
        self.config = base;
        self.schedule = content.schedule;
        self.clip = content.clip;
        self.steps = content.steps;
        self.last = None;
        if let Some(p) = content.noise {
            self.noise = p.into();
        }
        Ok(())
    }
}

fn config<R: Rule>(path: &Path, value: serde_json::Value) -> Result<R> {
    let config: R = serde_json::from_value(value)
        .map_err(|e| Error::file(path, format!("has a configuration that does not fit: {e}")))?;
    config.validate().map(|()| config).map_err(|e| Error::file(path, e))
}

/// What a checkpoint holds of one parameter, fit for it.
struct Restored<R> {
    steps: u64,
    config: R,
    mean: Tensor,
    state: Vec<Option<Tensor>>,
    prior: PriorOf,
    gradient: Option<Tensor>,
    curvature: Option<Tensor>,
}

impl<R: Rule> Restored<R> {
    fn new(
        path: &Path,
        p: Parameter<serde_json::Value>,
        leaf: &Leaf,
        base: R,
        tensors: &mut BTreeMap<String, Tensor>,
    ) -> Result<Self> {
        let refused = |problem: String| Error::file(path, problem);
        if !leaf.names.contains(&p.name) {
            let (saved, name) = (&p.name, leaf.name());
            return Err(refused(format!("has parameter `{saved}` where the model has `{name}`; build the same model")));
        }
        let expected = (leaf.state_kind(), leaf.tensor.size());
        let mut take = |what: &str| {
            let name = format!("{what}.{}", p.name);
            let t = tensors.remove(&name).ok_or_else(|| refused(format!("has no tensor `{name}`")))?;
            let found = (t.kind(), t.size());
            if found != expected {
                let ((kind, size), (our_kind, our_size)) = (found, &expected);
                return Err(refused(format!(
                    "tensor `{name}` is {kind:?} {size:?}: expected {our_kind:?} {our_size:?}"
                )));
            }
            if let Some(value) = kernel::first_non_finite(&t) {
                return Err(refused(format!("tensor `{name}` is not finite ({value})")));
            }
            if what == "prior.precision" && t.numel() > 0 && t.min().double_value(&[]) <= 0.0 {
                return Err(refused(format!("tensor `{name}` is not positive everywhere")));
            }
            Ok(t.to_device(leaf.tensor.device()))
        };
        let mean = take("mean")?;
        let config: R = config(path, p.config)?;
        let state = R::STATE.iter().enumerate();
        let state = state.map(|(i, name)| config.keeps(i).then(|| take(&format!("state.{name}"))).transpose());
        let state = state.collect::<Result<Vec<_>>>()?;
        let prior = match p.prior {
            Some(prior) => prior.validate().map(|()| PriorOf::Isotropic(prior)).map_err(|e| Error::file(path, e))?,
            None => PriorOf::Posterior { mean: take("prior.mean")?, precision: take("prior.precision")? },
        };
        let gradient = p.gradient.then(|| take("accumulated.gradient")).transpose()?;
        let curvature = p.curvature.then(|| take("accumulated.curvature")).transpose()?;
        prior.admits(config).map_err(|e| Error::file(path, e))?;
        if (config.expectation(), config.curvature()) != (base.expectation(), base.curvature()) {
            return Err(refused(format!("has parameter `{}` evaluated at other points than the rest", p.name)));
        }
        Ok(Restored { steps: p.steps, config, mean, state, prior, gradient, curvature })
    }
}
