//! Predictions of numbers: what a sample of the weights says of an observation, and the mixture of all that they say.

use super::Posterior;
use super::predictive::{defined, each_stratum, joined as concatenated};
use crate::gradient::WithOutput;
use crate::metrics::Forecast;
use crate::{Error, Params, Result, check};
use tch::{Device, Kind, Tensor};

/// What the closure of [`predict_regression`](Posterior#method.predict_regression) may return: a mean and the variance
/// of the noise, `(mean, variance)`, or a `Result` of it whose error ends the call.
///
/// The variance σ² is a number for all, that of a [`Likelihood::Gaussian`](crate::nn::Likelihood::Gaussian), or a
/// tensor in the mean's shape, from a network that gives both.
#[diagnostic::on_unimplemented(
    message = "the closure must return `(mean, variance of the noise)`, and not `{Self}`",
    note = "`(Tensor, f64)` for the same noise everywhere, `(Tensor, Tensor)` for each number's own, or a `Result` of \
            either if it may fail"
)]
pub trait IntoGaussian {
    /// The mean and the variance, of which the latter may be a single number; or the closure's own error as
    /// [`Error::Closure`].
    ///
    /// # Errors
    /// [`Error::Closure`]
    fn into_gaussian(self) -> Result<(Tensor, Tensor)>;
}

impl IntoGaussian for (Tensor, Tensor) {
    fn into_gaussian(self) -> Result<(Tensor, Tensor)> {
        Ok(self)
    }
}

impl IntoGaussian for (Tensor, f64) {
    fn into_gaussian(self) -> Result<(Tensor, Tensor)> {
        Ok((self.0, Tensor::from(self.1)))
    }
}

impl<V, E: Into<Box<dyn std::error::Error + Send + Sync>>> IntoGaussian for std::result::Result<(Tensor, V), E>
where
    (Tensor, V): IntoGaussian,
{
    fn into_gaussian(self) -> Result<(Tensor, Tensor)> {
        self.into_parts()?.into_gaussian()
    }
}

pub(super) fn predict_regression<G: IntoGaussian>(
    q: &dyn Posterior,
    params: &Params,
    samples: usize,
    mut gaussian: impl FnMut() -> G,
) -> Result<Forecast> {
    check::count("samples", samples)?;
    let (mut weights, mut means, mut variances): (Vec<f64>, Vec<Tensor>, Vec<Tensor>) = Default::default();
    for predicted in each_stratum(q, params, samples, || copies(gaussian())) {
        let (weight, (mean, variance)) = predicted?;
        if let Some(first) = means.first()
            && first.size() != mean.size()
        {
            let (first, now) = (first.size(), mean.size());
            return Err(Error::Posterior(format!(
                "the closure returned shape {now:?} after {first:?}: expected the same examples each time"
            )));
        }
        weights.push(weight);
        means.push(mean);
        variances.push(variance);
    }
    Forecast::mixture(&weights, &Tensor::f_stack(&means, 0)?, &Tensor::f_stack(&variances, 0)?)
}

/// The outputs of all batches, one after the other.
pub(super) fn joined<G: IntoGaussian>(batches: impl IntoIterator<Item = G>) -> Result<(Tensor, Tensor)> {
    let parts = batches.into_iter().map(copies).collect::<Result<Vec<_>>>()?;
    let (means, variances): (Vec<Tensor>, Vec<Tensor>) = parts.into_iter().unzip();
    Ok((concatenated(means)?, concatenated(variances)?))
}

/// Mean and variance of one shape, in f64 on the CPU and in memory of their own: the mean may be a variable, which does
/// not stay at this sample.
fn copies(gaussian: impl IntoGaussian) -> Result<(Tensor, Tensor)> {
    let (mean, variance) = gaussian.into_gaussian()?;
    let wide = |t: Tensor| Ok::<_, Error>(defined(t)?.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?);
    let (mean, variance) = (wide(mean)?, wide(variance)?);
    let (m, v) = (mean.size(), variance.size());
    if !v.is_empty() && v != m {
        // [B] beside [B, 1] would be broadcast to a matrix.
        return Err(Error::Posterior(format!(
            "the closure returned a mean of shape {m:?} and a variance of shape {v:?}: expected the same, or one number"
        )));
    }
    Ok((mean.copy(), variance.f_expand(&m, false)?.copy()))
}
