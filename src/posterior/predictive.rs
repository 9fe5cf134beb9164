//! Predictions averaged over a posterior.

use super::DiagonalGaussian;
use crate::params::Perturbed;
use crate::gradient::IntoTensor;
use crate::{Error, Params, Result, check, metrics};
use tch::{Kind, Tensor};

/// Class probabilities averaged over samples of a posterior, with two measures of uncertainty in nats.
#[derive(Debug)]
pub struct Predictive {
    /// p̄ = (1/K) Σₖ p(·|x, θₖ), shape `[B, C]`.
    pub mean: Tensor,
    /// H(p̄), shape `[B]`: uncertainty in total.
    pub entropy: Tensor,
    /// H(p̄) - (1/K) Σₖ H(p(·|x, θₖ)) ≥ 0, shape `[B]`: the part that more data could resolve.
    pub mutual_information: Tensor,
    /// Number of samples K.
    pub samples: usize,
}

impl DiagonalGaussian {
    /// Monte-Carlo prediction: `probabilities` (shape `[B, C]`, after the softmax) is called with samples 0, 1, … of q in
    /// the model's variables one after the other, without gradients; afterwards the variables are as they were. Variables
    /// that q does not know keep their values. Two calls use the same samples; [`DiagonalGaussian::with_seed`] for others.
    ///
    /// # Errors
    /// No samples, an output that is not `[B, C]` or not probabilities, the closure's own error, or a posterior that
    /// does not fit the model.
    pub fn predict<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        samples: usize,
        probabilities: impl FnMut() -> L,
    ) -> Result<Predictive> {
        check::count("samples", samples)?;
        predict(&params.into(), &vec![1.0; samples], |k| self.sample(k as u64), probabilities)
    }

    /// The outputs of `samples` samples one by one, stacked to `[K, …]`; any output will do (logits, regressions).
    ///
    /// # Errors
    /// As [`DiagonalGaussian::predict`], but for the shape, which must only be the same each time.
    pub fn predict_samples<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        samples: usize,
        outputs: impl FnMut() -> L,
    ) -> Result<Tensor> {
        check::count("samples", samples)?;
        predict_samples(&params.into(), samples, |k| self.sample(k as u64), outputs)
    }
}

/// A value for each parameter of a posterior, by name.
type Sample = Vec<(String, Tensor)>;

/// [`DiagonalGaussian::predict`] for any family: the mean with a weight for each sample.
pub(super) fn predict<L: IntoTensor>(
    params: &Params,
    weights: &[f64],
    sample: impl Fn(usize) -> Result<Sample>,
    mut probabilities: impl FnMut() -> L,
) -> Result<Predictive> {
    let mut total: Option<(Tensor, Tensor)> = None;
    for (k, weight) in weights.iter().enumerate() {
        let p = at(params, sample(k)?, &mut probabilities)?;
        if p.dim() != 2 {
            return Err(Error::Posterior(format!(
                "the closure returned shape {:?}: expected probabilities [B, C]",
                p.size()
            )));
        }
        let entropy = metrics::entropy(&p)? * *weight;
        let p = match p.kind() {
            Kind::Float | Kind::Double => p,
            // Rows of so few digits sum to one within a percent only.
            _ => {
                let p = p.to_kind(Kind::Float);
                &p / p.sum_dim_intlist(1, true, None::<Kind>)
            }
        };
        let p = p * *weight;
        total = Some(match total.take() {
            Some((sum, _)) if sum.size() != p.size() => {
                let (first, now) = (sum.size(), p.size());
                return Err(Error::Posterior(format!(
                    "the closure returned shape {now:?} after {first:?}: expected the same examples each time"
                )));
            }
            None => (p, entropy),
            Some((sum, entropies)) => (sum + p, entropies + entropy),
        });
    }
    let (sum, entropies) = total.ok_or_else(|| Error::Posterior("there are no samples".to_owned()))?;
    let weight = weights.iter().sum::<f64>();
    let mean = sum / weight;
    let entropy = metrics::entropy(&mean)?;
    let mutual_information = (&entropy - entropies / weight).clamp_min(0.0);
    Ok(Predictive { mean, entropy, mutual_information, samples: weights.len() })
}

/// [`DiagonalGaussian::predict_samples`] for any family.
pub(super) fn predict_samples<L: IntoTensor>(
    params: &Params,
    samples: usize,
    sample: impl Fn(usize) -> Result<Sample>,
    mut outputs: impl FnMut() -> L,
) -> Result<Tensor> {
    let all = (0..samples).map(|k| at(params, sample(k)?, &mut outputs)).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_stack(&all, 0)?)
}

/// The closure's output with this sample in the model's variables, without gradients.
fn at<L: IntoTensor>(params: &Params, sample: Sample, closure: &mut impl FnMut() -> L) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let _guard = Perturbed::enter(DiagonalGaussian::in_model(params, sample)?)?;
    let output = closure().into_tensor()?;
    if !output.defined() {
        return Err(Error::Posterior("the closure returned an undefined tensor".to_owned()));
    }
    // A copy: the output may be a variable itself, which does not stay at this sample.
    Ok(output.copy())
}

/// Use of a posterior's samples in a model, for types with `sample(k)`, `means()` and a field `seed`.
macro_rules! in_a_model {
    ($Posterior:ident) => {
        impl $Posterior {
            /// The same posterior with other samples; default seed 0.
            #[must_use]
            pub fn with_seed(mut self, seed: u64) -> Self {
                self.seed = seed;
                self
            }

            /// Puts sample `k` into the variables of a model until the guard is dropped. Variables that the posterior does
            /// not know stay as they are.
            ///
            /// # Errors
            /// A parameter of the posterior that the model has not, or has in another shape.
            pub fn perturb(&self, params: impl Into<$crate::Params>, k: u64) -> $crate::Result<$crate::Perturbed> {
                let changes = $crate::DiagonalGaussian::in_model(&params.into(), self.sample(k)?)?;
                $crate::Perturbed::enter(changes.iter().map(|(variable, value)| (variable, value.shallow_clone())))
            }

            /// Puts the mean into the variables of a model, for good.
            ///
            /// # Errors
            #[doc = concat!("As [`", stringify!($Posterior), "::perturb`].")]
            pub fn copy_mean_to(&self, params: impl Into<$crate::Params>) -> $crate::Result<()> {
                let changes = $crate::DiagonalGaussian::in_model(&params.into(), self.means())?;
                let _no_grad = tch::no_grad_guard();
                for (mut variable, value) in changes {
                    variable.f_copy_(&value)?;
                }
                Ok(())
            }
        }
        $crate::posterior::predictive::predictions!($Posterior);
    };
}
pub(super) use in_a_model;

/// Predictions averaged over samples of equal weight, for types with `sample(k)`.
macro_rules! predictions {
    ($Posterior:ident) => {
        impl $Posterior {
            /// Monte-Carlo prediction, as [`DiagonalGaussian::predict`](crate::DiagonalGaussian::predict).
            ///
            /// # Errors
            /// As there.
            pub fn predict<L: $crate::IntoTensor>(
                &self,
                params: impl Into<$crate::Params>,
                samples: usize,
                probabilities: impl FnMut() -> L,
            ) -> $crate::Result<$crate::Predictive> {
                $crate::check::count("samples", samples)?;
                let sample = |k| self.sample(k as u64);
                $crate::posterior::predictive::predict(&params.into(), &vec![1.0; samples], sample, probabilities)
            }

            /// The outputs of `samples` samples one by one, stacked to `[K, …]`, as
            /// [`DiagonalGaussian::predict_samples`](crate::DiagonalGaussian::predict_samples).
            ///
            /// # Errors
            /// As there.
            pub fn predict_samples<L: $crate::IntoTensor>(
                &self,
                params: impl Into<$crate::Params>,
                samples: usize,
                outputs: impl FnMut() -> L,
            ) -> $crate::Result<tch::Tensor> {
                $crate::check::count("samples", samples)?;
                $crate::posterior::predictive::predict_samples(
                    &params.into(),
                    samples,
                    |k| self.sample(k as u64),
                    outputs,
                )
            }
        }
    };
}
pub(super) use predictions;
