//! What can be read and changed between steps.

use super::Optimizer;
use crate::prior::PriorOf;
use crate::rows::{GaussianRule, Rule};
use crate::{Error, Params, Result, Schedule};
use tch::{Kind, Tensor};

impl<R: Rule> Optimizer<R> {
    /// Number of updates so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The configuration that parameters without an override have.
    pub fn config(&self) -> &R {
        &self.config
    }

    /// The parameters, in the order of the noise and of published trajectories.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The learning rate of the next step, schedule included, of parameters without an override.
    pub fn lr(&self) -> f64 {
        self.config.learning_rate() * self.schedule.factor(self.steps)
    }

    /// One state tensor of one parameter by its name in [`Rule::STATE`], for example `state("fc.weight", "hess")`: a
    /// handle to the optimizer's own memory. `None` if there is no such parameter or state, or if the
    /// configuration has no use for it (the momentum of SGD without momentum).
    pub fn state(&self, parameter: &str, name: &str) -> Option<Tensor> {
        let i = R::STATE.iter().position(|s| *s == name)?;
        let leaf = self.params.leaves().iter().position(|l| l.names.iter().any(|n| n == parameter))?;
        Some(self.slots.get(leaf)?.state[i].as_ref()?.shallow_clone())
    }

    /// Sets the learning rate of all parameters, in every group and with an override too; the schedule multiplies it.
    ///
    /// # Errors
    /// A learning rate out of range; nothing has changed then.
    pub fn set_lr(&mut self, lr: f64) -> Result<()> {
        self.configure(|c| c.with_learning_rate(lr))
    }

    /// Sets the learning rate of the parameters of one group.
    ///
    /// # Errors
    /// A learning rate out of range, or a group without a parameter; nothing has changed then.
    pub fn set_lr_group(&mut self, group: usize, lr: f64) -> Result<()> {
        self.configure_group(group, |c| c.with_learning_rate(lr))
    }

    /// Sets the weight decay of all parameters, in every group and with an override too. A [`Prior`](crate::Prior) that
    /// was given stays.
    ///
    /// # Errors
    /// A weight decay out of range; nothing has changed then.
    pub fn set_weight_decay(&mut self, delta: f64) -> Result<()> {
        self.configure(|c| c.with_weight_decay(delta))
    }

    /// Sets the weight decay of the parameters of one group.
    ///
    /// # Errors
    /// A weight decay out of range, or a group without a parameter; nothing has changed then.
    pub fn set_weight_decay_group(&mut self, group: usize, delta: f64) -> Result<()> {
        self.configure_group(group, |c| c.with_weight_decay(delta))
    }

    /// Replaces the schedule; its step count goes on.
    ///
    /// # Errors
    /// A schedule out of range; nothing has changed then.
    pub fn set_schedule(&mut self, schedule: Schedule) -> Result<()> {
        schedule.validate()?;
        self.schedule = schedule;
        Ok(())
    }

    /// Changes any hyper-parameter of all parameters, for example `|c| c.momentum(0.9)`.
    ///
    /// # Errors
    /// A value out of range, or a change of how often or where the loss is evaluated; nothing has changed then.
    pub fn configure(&mut self, change: impl Fn(R) -> R) -> Result<()> {
        self.configure_where(|_| true, &change)?;
        self.config = change(self.config);
        Ok(())
    }

    /// Changes any hyper-parameter of the parameters of one group. Variables that are created later have the group's
    /// configuration as it was built.
    ///
    /// # Errors
    /// A group without a parameter, and as [`Optimizer::configure`].
    pub fn configure_group(&mut self, group: usize, change: impl Fn(R) -> R) -> Result<()> {
        if !self.params.leaves().iter().any(|l| l.group == group) {
            let mut groups: Vec<usize> = self.params.leaves().iter().map(|l| l.group).collect();
            groups.sort_unstable();
            groups.dedup();
            return Err(Error::Parameters(format!("none is in group {group}; there are the groups {groups:?}")));
        }
        self.configure_where(|g| g == group, &change)
    }

    fn configure_where(&mut self, applies: impl Fn(usize) -> bool, change: &impl Fn(R) -> R) -> Result<()> {
        let base = (self.config.expectation(), self.config.curvature());
        let changed = |config: R| {
            let config = change(config);
            config.validate()?;
            if (config.expectation(), config.curvature()) == base {
                Ok(config)
            } else {
                Err(Error::Parameters(
                    "how often and where the loss is evaluated is fixed when the optimizer is built".to_owned(),
                ))
            }
        };
        changed(self.config)?;
        let configs = self.slots.iter().zip(self.params.leaves()).map(|(slot, leaf)| {
            let config = if applies(leaf.group) { changed(slot.config)? } else { slot.config };
            slot.prior.admits(config).map(|()| config)
        });
        let configs = configs.collect::<Result<Vec<_>>>()?;
        for ((slot, leaf), config) in self.slots.iter_mut().zip(self.params.leaves()).zip(configs) {
            slot.configure(leaf, config);
        }
        Ok(())
    }
}

/// How a training is going, on the scale of the mean loss.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Diagnostics {
    /// Updates so far.
    pub steps: u64,
    /// Mean loss of the last update: an estimate of E_q\[L\].
    pub loss: f64,
    /// Global L2 norm of the gradient of the last update's last evaluation, before clipping; NaN without the check for finite gradients.
    pub gradient_norm: f64,
    /// Standard deviations of the posterior.
    pub sigma: Sigma,
    /// KL(q ‖ prior)/ess in nats, the other term of the objective; `None` under a flat prior (δ = 0).
    pub kl_per_example: Option<f64>,
    /// The evidence lower bound per example, -(loss + KL/ess); `None` under a flat prior.
    pub elbo_per_example: Option<f64>,
}

/// Posterior standard deviations 1/√s over all weights. If min, mean and max stay where they started, the precision is not being
/// learned: lower β₂ or `hess_init`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Sigma {
    /// Mean over all weights.
    pub mean: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl<R: GaussianRule> Optimizer<R> {
    /// Looks at posterior, loss and gradient; a pass over the weights, so not for every step.
    ///
    /// # Errors
    /// Before the first update since the optimizer was built (a checkpoint does not hold the last loss), and as
    /// [`Optimizer::posterior`].
    pub fn diagnostics(&self) -> Result<Diagnostics> {
        let Some(last) = self.last.filter(|_| self.steps > 0) else {
            return Err(Error::Posterior(
                "there is nothing to diagnose before the first step after building or loading".to_owned(),
            ));
        };
        let q = self.posterior()?;
        let mut sigma = Sigma { mean: 0.0, min: f64::INFINITY, max: 0.0 };
        let mut kl = Some(0.0);
        let ess = self.config.effective_sample_size().unwrap_or(f64::NAN);
        let trained = self.slots.iter().zip(self.params.leaves()).filter(|(_, leaf)| leaf.trainable());
        for (slot, leaf) in trained.filter(|(_, leaf)| leaf.tensor.numel() > 0) {
            let entry = q.entry(leaf.name()).expect("the posterior has every trainable parameter");
            let s = entry.precision.to_kind(Kind::Double);
            let sd = s.rsqrt();
            sigma.mean += sd.sum(Kind::Double).double_value(&[]) / q.weights() as f64;
            sigma.min = sigma.min.min(sd.min().double_value(&[]));
            sigma.max = sigma.max.max(sd.max().double_value(&[]));
            let mean = entry.mean.to_kind(Kind::Double);
            let (offset, prior) = match &slot.prior {
                PriorOf::Isotropic(prior) => {
                    let ess = slot.config.effective_sample_size().unwrap_or(f64::NAN);
                    let delta = prior.delta(&slot.config);
                    (mean, (delta > 0.0).then(|| Tensor::from(delta * ess)))
                }
                PriorOf::Posterior { mean: m0, precision } => (mean - m0, Some(precision.to_kind(Kind::Double))),
            };
            kl = kl.zip(prior).map(|(kl, p)| {
                let ratio = &p / s;
                kl + 0.5 * (&ratio - 1.0 - ratio.log() + p * offset.square()).sum(Kind::Double).double_value(&[])
            });
        }
        let kl_per_example = kl.map(|kl| kl / ess);
        Ok(Diagnostics {
            steps: self.steps,
            loss: last.loss,
            gradient_norm: last.gradient_norm,
            sigma,
            kl_per_example,
            elbo_per_example: kl_per_example.map(|kl| -(last.loss + kl)),
        })
    }
}
