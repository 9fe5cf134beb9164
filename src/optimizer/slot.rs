//! What the optimizer keeps for one parameter.

use super::programs::Pass;
use crate::kernel::{self, Field, Pack};
use crate::optim::{Rule, When};
use crate::params::Leaf;
use crate::prior::{Isotropic, Prior, PriorOf};
use crate::{Error, Result};
use tch::{Kind, Tensor};

#[derive(Debug)]
pub(super) struct Slot<R: Rule> {
    pub config: R,
    /// Updates so far.
    pub steps: u64,
    /// The mean in f32, for weights of less precision.
    pub mean: Option<Tensor>,
    /// One tensor per name in [`Rule::STATE`].
    pub state: Vec<Tensor>,
    pub prior: PriorOf,
    /// m₀ and δ.
    pub prior_fields: [Field; 2],
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
        let config = prior.in_config(config);
        let _no_grad = tch::no_grad_guard();
        let like = leaf.tensor.to_kind(leaf.state_kind());
        let initial = config.initial(prior.is_posterior());
        for (i, name) in R::STATE.iter().enumerate() {
            let x = initial.get(i);
            if like.kind() == Kind::Float && !(x as f32).is_finite() {
                return Err(Error::parameter(leaf.name(), format!("its initial state `{name}` = {x:e} is beyond f32")));
            }
        }
        Ok(Slot {
            config,
            steps: 0,
            mean: (leaf.tensor.kind() != leaf.state_kind()).then(|| like.copy()),
            state: (0..R::STATE.len()).map(|i| like.full_like(initial.get(i))).collect(),
            prior_fields: prior.fields(&config),
            prior,
            noise_group,
            noise_groups: kernel::groups(leaf.tensor.numel()),
        })
    }

    /// Where the next parameter's noise starts.
    pub(super) fn end(&self) -> u64 {
        self.noise_group + self.noise_groups
    }

    /// Takes over a changed configuration; a prior that was given keeps its precision.
    pub(super) fn configure(&mut self, config: R) {
        self.config = self.prior.in_config(config);
        self.prior_fields = self.prior.fields(&self.config);
    }

    /// Takes over the configuration and the prior of a checkpoint.
    pub(super) fn restore(&mut self, config: R, prior: PriorOf) {
        self.prior = prior;
        self.configure(config);
    }

    /// The coefficients of the update that comes next.
    pub(super) fn next(&self, lr_factor: f64) -> Pass<R> {
        self.pass(When { t: self.steps + 1, lr_factor })
    }

    pub(super) fn pass(&self, when: When) -> Pass<R> {
        Pass::new(self.config, when)
    }

    pub(super) fn delta(&self) -> Field {
        self.prior_fields[1].shallow_clone()
    }

    /// The tensor that holds the mean.
    pub(super) fn mean(&self, leaf: &Leaf) -> Tensor {
        self.mean.as_ref().unwrap_or(&leaf.tensor).shallow_clone()
    }

    /// The mean; where half-precision weights were changed from outside (loaded, re-initialised), so is it.
    pub(super) fn mean_now(&self, leaf: &Leaf) -> Tensor {
        let Some(mean) = &self.mean else { return leaf.tensor.shallow_clone() };
        let _no_grad = tch::no_grad_guard();
        let unchanged = mean.to_kind(leaf.tensor.kind()).eq_tensor(&leaf.tensor);
        mean.where_self(&unchanged, &leaf.tensor.to_kind(Kind::Float))
    }

    /// Takes over what [`Slot::mean_now`] finds.
    pub(super) fn follow(&mut self, leaf: &Leaf) {
        let now = self.mean_now(leaf);
        if let Some(mean) = &mut self.mean {
            let _no_grad = tch::no_grad_guard();
            mean.copy_(&now);
        }
    }
}
