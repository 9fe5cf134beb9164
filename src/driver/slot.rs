//! What the optimizer keeps for one parameter.

use super::programs::Pass;
use crate::expectation::Link;
use crate::kernel::{self, Field, Inputs, Pack};
use crate::params::Leaf;
use crate::prior::{Isotropic, Prior, PriorOf};
use crate::rows::{Rule, When};
use crate::{Error, Result};
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct Slot<R: Rule> {
    pub config: R,
    /// Updates so far.
    pub steps: u64,
    /// The mean in f32, for weights of less precision; the λ of binary weights.
    pub mean: Option<Tensor>,
    /// One tensor per name in [`Rule::STATE`] that the configuration keeps.
    pub state: Vec<Option<Tensor>>,
    pub prior: PriorOf,
    /// δ of a prior that is tensors.
    delta: Option<Tensor>,
    /// The point of an evaluation away from the mean, kept for the next one to be written there.
    pub point: Option<Tensor>,
    /// Position in the noise.
    pub noise_group: u64,
    noise_groups: u64,
}

impl<R: Rule> Slot<R> {
    pub(super) fn new(leaf: &Leaf, config: R, base: R, prior: Option<&Prior>, noise_group: u64) -> Result<Self> {
        config.validate()?;
        if (config.expectation(), config.curvature()) != (base.expectation(), base.curvature()) {
            return Err(Error::parameter(
                leaf.name(),
                "an override changes how often or where the loss is evaluated, which all parameters share",
            ));
        }
        let prior = prior.map_or(Ok(PriorOf::Isotropic(Isotropic::WeightDecay)), |prior| prior.of(leaf))?;
        prior.admits(config)?;
        let initial = config.initial(prior.is_posterior());
        for (i, name) in R::STATE.iter().enumerate() {
            let x = initial.get(i);
            if leaf.state_kind() == Kind::Float && !(x as f32).is_finite() {
                return Err(Error::parameter(leaf.name(), format!("its initial state `{name}` = {x:e} is beyond f32")));
            }
        }
        let _no_grad = tch::no_grad_guard();
        let apart = config.link() != Link::Identity || leaf.tensor.kind() != leaf.state_kind();
        let mut slot = Slot {
            config,
            steps: 0,
            mean: apart.then(|| config.link().learned(&leaf.tensor.to_kind(leaf.state_kind()))),
            state: R::STATE.iter().map(|_| None).collect(),
            prior,
            delta: None,
            point: None,
            noise_group,
            noise_groups: kernel::groups(leaf.tensor.numel()),
        };
        slot.configure(leaf, config);
        Ok(slot)
    }

    /// Where the next parameter's noise starts.
    pub(super) fn end(&self) -> u64 {
        self.noise_group + self.noise_groups
    }

    /// Takes over a changed configuration; a prior that was given keeps its precision.
    pub(super) fn configure(&mut self, leaf: &Leaf, config: R) {
        let _no_grad = tch::no_grad_guard();
        self.config = self.prior.in_config(config);
        let ess = self.config.effective_sample_size().unwrap_or(f64::NAN);
        self.delta = match &self.prior {
            PriorOf::Isotropic(_) => None,
            PriorOf::Posterior { precision, .. } => Some(precision / ess),
        };
        for i in 0..R::STATE.len() {
            let keeps = self.config.keeps(i);
            if keeps != self.state[i].is_some() {
                let initial = self.initial(i);
                self.state[i] = keeps.then(|| self.mean(leaf).detach().full_like(initial));
            }
        }
    }

    /// Takes over the configuration and the prior of a checkpoint.
    pub(super) fn restore(&mut self, leaf: &Leaf, config: R, prior: PriorOf) {
        self.prior = prior;
        self.configure(leaf, config);
    }

    /// The coefficients of the update that comes next.
    pub(super) fn next(&self, lr_factor: f64) -> Pass<R> {
        self.pass(When { t: self.steps + 1, lr_factor })
    }

    pub(super) fn pass(&self, when: When) -> Pass<R> {
        Pass::new(self.config, when)
    }

    fn initial(&self, i: usize) -> f64 {
        self.config.initial(self.prior.is_posterior()).get(i)
    }

    /// Inputs of a pass: the given ones, then the state.
    pub(super) fn with_state<'a>(&'a self, inputs: impl IntoIterator<Item = Field<'a>>) -> Inputs<'a> {
        let state = self.state.iter().enumerate();
        let state = state.map(|(i, t)| t.as_ref().map_or_else(|| Field::Number(self.initial(i)), Field::Tensor));
        inputs.into_iter().chain(state).collect()
    }

    /// m₀
    pub(super) fn prior_mean(&self) -> Field<'_> {
        match &self.prior {
            PriorOf::Isotropic(_) => Field::Number(0.0),
            PriorOf::Posterior { mean, .. } => Field::Tensor(mean),
        }
    }

    /// δ
    pub(super) fn delta(&self) -> Field<'_> {
        match (&self.prior, &self.delta) {
            (PriorOf::Isotropic(prior), _) => Field::Number(prior.delta(&self.config)),
            (PriorOf::Posterior { .. }, delta) => Field::Tensor(delta.as_ref().expect("set with the prior")),
        }
    }

    /// The tensor that holds the mean.
    pub(super) fn mean<'a>(&'a self, leaf: &'a Leaf) -> &'a Tensor {
        self.mean.as_ref().unwrap_or(&leaf.tensor)
    }

    /// Memory for the points of a trainable variable.
    pub(super) fn make_point(&mut self, leaf: &Leaf) {
        if leaf.trainable() && self.point.is_none() {
            self.point = Some(self.mean(leaf).detach().empty_like());
        }
    }

    /// A point as the variable can hold it: itself, or rounded where weights are of less precision.
    pub(super) fn value(&self, leaf: &Leaf, point: &Tensor) -> Tensor {
        if self.mean.is_some() { point.to_kind(leaf.tensor.kind()) } else { point.shallow_clone() }
    }

    /// The mean; where half-precision weights were changed from outside (loaded, re-initialised), so is it.
    pub(super) fn mean_now(&self, leaf: &Leaf) -> Tensor {
        let Some(mean) = &self.mean else { return leaf.tensor.shallow_clone() };
        mean_now(self.config.link(), mean, leaf)
    }

    /// Takes over what [`Slot::mean_now`] finds, and makes binary weights what they are by their link.
    pub(super) fn follow(&mut self, leaf: &Leaf) {
        let Some(mean) = &mut self.mean else { return };
        let _no_grad = tch::no_grad_guard();
        let link = self.config.link();
        let weight = |mean: &Tensor| link.weight(mean).to_kind(leaf.tensor.kind());
        // Not written without need: a graph may have been recorded at them.
        if weight(mean).equal(&leaf.tensor) {
            return;
        }
        let now = mean_now(link, mean, leaf);
        mean.copy_(&now);
        if link != Link::Identity && leaf.trainable() {
            leaf.tensor.shallow_clone().copy_(&weight(mean));
        }
    }
}

fn mean_now(link: Link, mean: &Tensor, leaf: &Leaf) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let unchanged = link.weight(mean).to_kind(leaf.tensor.kind()).eq_tensor(&leaf.tensor);
    mean.where_self(&unchanged, &link.learned(&leaf.tensor.to_kind(mean.kind())))
}
