//! The prior over the weights: isotropic, or yesterday's posterior.

use crate::params::Leaf;
use crate::posterior::DiagonalGaussian;
use crate::rows::Rule;
use crate::{Error, Link, Params, Result};
use tch::Tensor;

/// The prior N(m₀, P₀⁻¹) of an optimizer, on the scale of the posterior's own precision (not divided by ess).
///
/// An optimizer's `weight_decay` is the shorthand for an isotropic prior of precision P₀ = ess·δ around zero. A
/// `Prior` given to [`Rule::prior`](crate::Rule::prior) takes its place. In every step δ = P₀/ess with the ess of that
/// optimizer, so the same posterior serves tasks of different size (`docs/scales.md`).
#[derive(Debug)]
pub struct Prior(Form);

#[derive(Debug)]
enum Form {
    Isotropic { precision: f64 },
    Posterior { q: DiagonalGaussian, elsewhere: Option<f64> },
}

impl Prior {
    /// N(0, 1/precision) for every weight; precision ≥ 0, else building the optimizer is an error. The same as a weight
    /// decay of precision/ess, and it stays so when ess changes. In [`AdamW`](crate::AdamW), whose decay is no prior, it
    /// acts beside the decay.
    pub fn isotropic(precision: f64) -> Self {
        Prior(Form::Isotropic { precision })
    }

    /// For a prior built from a posterior: parameters that the posterior does not know (new heads) get the isotropic
    /// prior N(0, 1/(ess·δ)), δ ≥ 0, instead of being an error. No effect on an isotropic prior.
    #[must_use]
    pub fn elsewhere(self, delta: f64) -> Self {
        match self.0 {
            Form::Posterior { q, .. } => Prior(Form::Posterior { q, elsewhere: Some(delta) }),
            isotropic @ Form::Isotropic { .. } => Prior(isotropic),
        }
    }

    /// P₀ of N(0, P₀⁻¹); `None` if the prior is a posterior.
    pub(crate) fn isotropic_precision(&self) -> Option<f64> {
        if let Form::Isotropic { precision } = self.0 { Some(precision) } else { None }
    }

    /// Errors if a number is out of range, or if the posterior has a parameter that the model has not.
    pub(crate) fn check(&self, params: &Params) -> Result<()> {
        match &self.0 {
            Form::Isotropic { precision } => Isotropic::Precision(*precision).validate(),
            Form::Posterior { q, elsewhere } => {
                elsewhere.map_or(Ok(()), |delta| Isotropic::Delta(delta).validate())?;
                q.names().find(|name| params.find(name).is_none()).map_or(Ok(()), |name| {
                    Err(Error::parameter(
                        name,
                        "the prior has it and the model has not; leave it out with posterior.select(..)",
                    ))
                })
            }
        }
    }

    /// The prior of one parameter.
    pub(crate) fn of(&self, leaf: &Leaf) -> Result<PriorOf> {
        match &self.0 {
            Form::Isotropic { precision } => Ok(PriorOf::Isotropic(Isotropic::Precision(*precision))),
            Form::Posterior { q, elsewhere } => {
                let Some(entry) = leaf.names.iter().find_map(|name| q.entry(name)) else {
                    return elsewhere.map(|delta| PriorOf::Isotropic(Isotropic::Delta(delta))).ok_or_else(|| {
                        Error::parameter(
                            leaf.name(),
                            "the prior does not know it; give such parameters an isotropic prior with .elsewhere(δ)",
                        )
                    });
                };
                if entry.mean.size() != leaf.tensor.size() {
                    return Err(Error::parameter(
                        leaf.name(),
                        format!("the prior has shape {:?} and the model {:?}", entry.mean.size(), leaf.tensor.size()),
                    ));
                }
                let like = |t: &Tensor| t.to_device(leaf.tensor.device()).to_kind(leaf.state_kind()).contiguous();
                let _no_grad = tch::no_grad_guard();
                Ok(PriorOf::Posterior { mean: like(&entry.mean), precision: like(&entry.precision) })
            }
        }
    }
}

impl From<&DiagonalGaussian> for Prior {
    fn from(q: &DiagonalGaussian) -> Self {
        Prior(Form::Posterior { q: q.shallow_clone(), elsewhere: None })
    }
}

impl From<DiagonalGaussian> for Prior {
    fn from(q: DiagonalGaussian) -> Self {
        Prior(Form::Posterior { q, elsewhere: None })
    }
}

/// The prior of one parameter.
#[derive(Debug)]
pub(crate) enum PriorOf {
    Isotropic(Isotropic),
    Posterior { mean: Tensor, precision: Tensor },
}

/// N(0, 1/(ess·δ)), by what stays when a hyper-parameter changes.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub(crate) enum Isotropic {
    /// δ is the row's weight decay.
    WeightDecay,
    /// δ is this.
    Delta(f64),
    /// ess·δ is this.
    Precision(f64),
}

impl Isotropic {
    pub(crate) fn delta(self, config: &impl Rule) -> f64 {
        match self {
            Isotropic::WeightDecay => config.isotropic_delta(),
            Isotropic::Delta(delta) => delta,
            Isotropic::Precision(precision) => precision / config.effective_sample_size().unwrap_or(f64::NAN),
        }
    }

    /// P₀ for N examples; a weight decay belongs to an optimizer and counts as none.
    pub(crate) fn precision(self, examples: f64) -> f64 {
        match self {
            Isotropic::WeightDecay => 0.0,
            Isotropic::Delta(delta) => examples * delta,
            Isotropic::Precision(precision) => precision,
        }
    }

    pub(crate) fn validate(self) -> Result<()> {
        use crate::check;
        match self {
            Isotropic::WeightDecay => Ok(()),
            Isotropic::Delta(delta) => check::non_negative("elsewhere", delta),
            Isotropic::Precision(precision) => check::non_negative("prior precision", precision),
        }
    }
}

impl PriorOf {
    /// N(0, 1/P₀) is the row's weight decay P₀/ess, so that all that depends on the one depends on the other (the rescaled
    /// learning rate of [`Ivon`](crate::Ivon)); but not in a row whose decay is no prior.
    pub(crate) fn in_config<R: Rule>(&self, config: R) -> R {
        let PriorOf::Isotropic(prior @ Isotropic::Precision(_)) = self else { return config };
        let decay_is_prior = config.with_weight_decay(1.0).isotropic_delta() == 1.0;
        if decay_is_prior { config.with_weight_decay(prior.delta(&config)) } else { config }
    }

    /// Errors if a row with this configuration cannot have this prior.
    pub(crate) fn admits<R: Rule>(&self, config: R) -> Result<()> {
        if matches!(self, PriorOf::Isotropic(Isotropic::WeightDecay)) {
            return config.validate();
        }
        if config.link() != Link::Identity {
            return Err(Error::Posterior(format!(
                "a Gaussian prior was given to the binary weights of `{}`: leave it out (BayesBiNN has prior_natural)",
                R::NAME
            )));
        }
        if config.effective_sample_size().is_none() {
            return Err(Error::HyperParameter {
                name: "ess",
                value: "not set".to_owned(),
                expected: "the effective sample size, to put the prior's precision on the scale of the mean loss: .ess(60_000.0)",
            });
        }
        match self {
            // What the row asks of its weight decay, it asks of this in its place.
            PriorOf::Isotropic(prior) => config.with_weight_decay(prior.delta(&config)).validate(),
            PriorOf::Posterior { .. } => config.validate(),
        }
    }

    pub(crate) fn is_posterior(&self) -> bool {
        matches!(self, PriorOf::Posterior { .. })
    }
}
