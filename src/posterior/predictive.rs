//! Predictions averaged over a posterior: the loop over samples, and what the average says about uncertainty.

use super::{Posterior, in_model};
use crate::gradient::IntoTensor;
use crate::params::Buffers;
use crate::{Error, Params, Result, check, metrics};
use tch::{Kind, Tensor};

/// Class probabilities averaged over samples of a posterior, with two measures of uncertainty in nats.
#[derive(Debug)]
pub struct Predictive {
    /// p̄ = Σₖ wₖ p(·|x, θₖ), shape `[B, C]`; wₖ is 1/K, or by the weights of a mixture's components.
    pub mean: Tensor,
    /// H(p̄), shape `[B]`: uncertainty in total.
    pub entropy: Tensor,
    /// H(p̄) - Σₖ wₖ H(p(·|x, θₖ)) ≥ 0, shape `[B]`: the part that more data could resolve.
    pub mutual_information: Tensor,
    /// Number of samples K.
    pub samples: usize,
}

/// `samples` samples of each stratum.
pub(super) fn predict<L: IntoTensor>(
    q: &dyn Posterior,
    params: &Params,
    samples: usize,
    mut probabilities: impl FnMut() -> L,
) -> Result<Predictive> {
    check::count("samples", samples)?;
    let mut total: Option<(Tensor, Tensor)> = None;
    let mut kind = Kind::Float;
    // Sample by sample, as the terms are added: a mixture's weights need not sum to one in floating point.
    let (mut sum_of_weights, mut count) = (0.0, 0);
    for predicted in each_stratum(q, params, samples, || copy(probabilities())) {
        let (weight, p) = predicted?;
        (sum_of_weights, count) = (sum_of_weights + weight, count + 1);
        if p.dim() != 2 {
            return Err(Error::Posterior(format!(
                "the closure returned shape {:?}: expected probabilities [B, C]",
                p.size()
            )));
        }
        // Also the check that these are probabilities, in every sample.
        let entropy = metrics::entropy_in_f64(&p)? * weight;
        kind = if p.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        // Rows of half precision sum to one only within a percent.
        let coarse = !matches!(p.kind(), Kind::Float | Kind::Double);
        // In f64, because the mutual information is a difference of two numbers that may agree in most of their digits.
        let p = p.to_kind(Kind::Double);
        let p = if coarse { &p / p.sum_dim_intlist(1, true, None::<Kind>) } else { p } * weight;
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
    let mean = sum / sum_of_weights;
    let entropy = metrics::entropy_in_f64(&mean)?;
    // It is not negative by Jensen's inequality, but the difference can round below zero.
    let mutual_information = (&entropy - entropies / sum_of_weights).clamp_min(0.0);
    let [mean, entropy, mutual_information] = [mean, entropy, mutual_information].map(|t| t.to_kind(kind));
    Ok(Predictive { mean, entropy, mutual_information, samples: count })
}

/// Of the whole, not of its strata: every output stands for itself.
pub(super) fn predict_samples<L: IntoTensor>(
    q: &dyn Posterior,
    params: &Params,
    samples: usize,
    mut outputs: impl FnMut() -> L,
) -> Result<Tensor> {
    check::count("samples", samples)?;
    let mut buffers = Some(Buffers::new(params));
    let all = (0..samples).map(|k| at(params, q.sample(k as u64)?, &mut buffers, &mut || copy(outputs())));
    let all = all.collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_stack(&all, 0)?)
}

/// The outputs of all batches, one after the other.
pub(super) fn joined<L: IntoTensor>(batches: impl IntoIterator<Item = L>) -> Result<Tensor> {
    let outputs = batches.into_iter().map(IntoTensor::into_tensor).collect::<Result<Vec<_>>>()?;
    if outputs.is_empty() {
        return Err(Error::Posterior("there are no batches to predict".to_owned()));
    }
    Ok(Tensor::f_cat(&outputs, 0)?)
}

/// What the closure gives at each of `samples` samples of each stratum, with the sample's weight.
pub(super) fn each_stratum<T>(
    q: &dyn Posterior,
    params: &Params,
    samples: usize,
    mut closure: impl FnMut() -> Result<T>,
) -> impl Iterator<Item = Result<(f64, T)>> {
    let strata = q.strata().into_iter().enumerate();
    let mut buffers = Some(Buffers::new(params));
    strata
        .flat_map(move |(stratum, w)| (0..samples).map(move |k| (stratum, k as u64, w)))
        .map(move |(stratum, k, w)| Ok((w, at(params, q.sample_stratum(stratum, k)?, &mut buffers, &mut closure)?)))
}

/// What the closure gives with this sample in the model's variables, without gradients; none of it may be a variable.
/// `buffers` are looked at once.
fn at<T>(
    params: &Params,
    sample: Vec<(String, Tensor)>,
    buffers: &mut Option<Buffers>,
    closure: &mut impl FnMut() -> Result<T>,
) -> Result<T> {
    let _no_grad = tch::no_grad_guard();
    // Until the end of the function, so that also an error of the closure brings the weights back.
    let _guard = in_model::enter(params, sample)?;
    let output = closure();
    // Before the closure's own error: one that fails may have moved them as well.
    let moved = buffers.take().and_then(Buffers::restored);
    let output = output?;
    if let Some(name) = moved {
        return Err(Error::Posterior(format!(
            "the closure changed the buffer `{name}`, as batch normalization in training mode does: predictions would \
             depend on the batch. Predict with train = false"
        )));
    }
    Ok(output)
}

/// A copy: the output may be a variable itself, which does not stay at this sample.
fn copy(output: impl IntoTensor) -> Result<Tensor> {
    Ok(defined(output.into_tensor()?)?.copy())
}

pub(super) fn defined(output: Tensor) -> Result<Tensor> {
    if output.defined() {
        return Ok(output);
    }
    Err(Error::Posterior("the closure returned an undefined tensor".to_owned()))
}
