//! From a configuration to an optimizer.

use super::{Optimizer, slot::Slot};
use crate::gradient::Clip;
use crate::kernel::{Noise, Philox};
use crate::rows::Rule;
use crate::{Params, Prior, Result, Schedule};
use std::fmt;

/// Everything about an optimizer that is not a number of its row: prior, noise, groups, schedule, clipping.
///
/// Comes from [`Rule::builder`], [`Rule::prior`] or [`Rule::noise`], and ends in [`Builder::build`].
#[derive(Debug)]
pub struct Builder<R: Rule> {
    pub(super) config: R,
    pub(super) prior: Option<Prior>,
    noise: Option<Noise>,
    pub(super) overrides: Vec<Override<R>>,
    schedule: Schedule,
    clip: Option<Clip>,
    check_finite: bool,
}

/// Whether an override applies to a group and name.
type Applies = dyn Fn(usize, &str) -> bool + Send;

/// A change of the configuration for some parameters.
pub(crate) struct Override<R> {
    applies: Box<Applies>,
    change: Box<dyn Fn(R) -> R + Send>,
}

impl<R> Override<R> {
    pub(crate) fn new(
        applies: impl Fn(usize, &str) -> bool + Send + 'static,
        change: impl Fn(R) -> R + Send + 'static,
    ) -> Self {
        Override { applies: Box::new(applies), change: Box::new(change) }
    }

    pub(crate) fn apply(&self, config: R, group: usize, name: &str) -> R {
        if (self.applies)(group, name) { (self.change)(config) } else { config }
    }
}

impl<R> fmt::Debug for Override<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Override")
    }
}

impl<R: Rule> Builder<R> {
    pub(crate) fn new(config: R) -> Self {
        Builder {
            config,
            prior: None,
            noise: None,
            overrides: Vec::new(),
            schedule: Schedule::Constant,
            clip: None,
            check_finite: true,
        }
    }

    /// Uses this prior in place of the isotropic one of the weight decay: a posterior (`.prior(&q)`) or a [`Prior`].
    ///
    /// Parameters are matched by name. A parameter that only one of the two sides has is an error of
    /// [`Builder::build`]; [`Prior::elsewhere`] and [`DiagonalGaussian::select`](crate::DiagonalGaussian::select) are the
    /// remedies. The weights stay where they are:
    /// [`DiagonalGaussian::copy_mean_to`](crate::DiagonalGaussian::copy_mean_to) starts the training at the prior's mean.
    #[must_use]
    pub fn prior(mut self, prior: impl Into<Prior>) -> Self {
        self.prior = Some(prior.into());
        self
    }

    /// Draws from this noise: [`Philox`] with a seed of your own, or [`Given`](crate::Given) tensors. By default the
    /// seed is drawn from libtorch's generator when the optimizer is built, so [`tch::manual_seed`] fixes it.
    #[must_use]
    pub fn noise(mut self, noise: impl Into<Noise>) -> Self {
        self.noise = Some(noise.into());
        self
    }

    /// Changes hyper-parameters for the variables of one group (tch's `set_group`), for example
    /// `.group(1, |c| c.weight_decay(0.0))`. Overrides apply in the order given.
    #[must_use]
    pub fn group(self, group: usize, change: impl Fn(R) -> R + Send + 'static) -> Self {
        self.overriding(move |g, _| g == group, change)
    }

    /// Changes hyper-parameters for the variables whose name passes, for example
    /// `.named(|name| name.ends_with("bias"), |c| c.lr(0.01))`.
    #[must_use]
    pub fn named(
        self,
        applies: impl Fn(&str) -> bool + Send + 'static,
        change: impl Fn(R) -> R + Send + 'static,
    ) -> Self {
        self.overriding(move |_, name| applies(name), change)
    }

    fn overriding(
        mut self,
        applies: impl Fn(usize, &str) -> bool + Send + 'static,
        change: impl Fn(R) -> R + Send + 'static,
    ) -> Self {
        self.overrides.push(Override::new(applies, change));
        self
    }

    /// Multiplies the learning rate by a function of the step count; default constant.
    #[must_use]
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Limits every element of each evaluation's gradient to ±max > 0, before curvature is estimated from it (per-example
    /// squares are of the unclipped gradients). Replaces an earlier choice; default no clipping.
    #[must_use]
    pub fn clip_grad_value(mut self, max: f64) -> Self {
        self.clip = Some(Clip::Value(max));
        self
    }

    /// Scales each evaluation's gradient to a global L2 norm of at most max > 0, before curvature is estimated from it
    /// (per-example squares are of the unclipped gradients). Replaces an earlier choice; default no clipping.
    #[must_use]
    pub fn clip_grad_norm(mut self, max: f64) -> Self {
        self.clip = Some(Clip::Norm(max));
        self
    }

    /// Whether a gradient that is not finite is an error that leaves everything as it was; default on. Without the
    /// check such a gradient ends up in the weights and the state; the loss is always checked.
    #[must_use]
    pub fn check_finite(mut self, check: bool) -> Self {
        self.check_finite = check;
        self
    }

    /// Builds the optimizer. `lr` is the learning rate of all parameters without an override, whatever the
    /// configuration's was. Variables that the [`VarStore`](tch::nn::VarStore) gets later are picked up.
    ///
    /// # Errors
    /// A hyper-parameter out of range, a curvature statistic that the expectation does not give, a prior without the row's `ess`, an override that changes where the loss is
    /// evaluated, no trainable parameter, parameters on several devices, a prior that does not fit the model.
    pub fn build(self, params: impl Into<Params>, lr: f64) -> Result<Optimizer<R>> {
        let builder = Builder { config: self.config.with_learning_rate(lr), ..self };
        builder.config.validate()?;
        builder.config.curvature().check(builder.config.expectation())?;
        builder.schedule.validate()?;
        builder.clip.map_or(Ok(()), Clip::validate)?;
        let params = params.into();
        params.check()?;
        params.check_overlap()?;
        builder.prior.as_ref().map_or(Ok(()), |prior| prior.check(&params))?;
        let mut optimizer = Optimizer {
            params,
            slots: Vec::new(),
            config: builder.config,
            prior: builder.prior,
            overrides: builder.overrides,
            noise: builder.noise.unwrap_or_else(|| default_noise(&builder.config)),
            schedule: builder.schedule,
            clip: builder.clip,
            check_finite: builder.check_finite,
            steps: 0,
            sums: super::sums::Sums::default(),
            last: None,
            taps_checked: false,
        };
        optimizer.add_slots()?;
        optimizer.follow();
        Ok(optimizer)
    }
}

/// A seed from libtorch's generator; rows that draw nothing leave that as it is.
fn default_noise<R: Rule>(config: &R) -> Noise {
    let draws = config.expectation().draw(0).is_some();
    if draws { Philox::from_libtorch() } else { Philox { seed: 0 } }.into()
}

impl<R: Rule> Optimizer<R> {
    /// Gives every parameter that has none a slot.
    pub(super) fn add_slots(&mut self) -> Result<()> {
        let mut group = self.slots.last().map_or(0, Slot::end);
        for leaf in &self.params.leaves()[self.slots.len()..] {
            let change = |config, o: &Override<R>| o.apply(config, leaf.group, leaf.name());
            let config = self.overrides.iter().fold(self.config, change);
            let slot = Slot::new(leaf, config, self.config, self.prior.as_ref(), group)?;
            group = slot.end();
            self.slots.push(slot);
        }
        Ok(())
    }
}
