//! Predictions averaged over draws of the outputs, returned as outputs, so that an average can be used like a single
//! prediction.

use super::Likelihood;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// Logits whose prediction is the mean of the predictions of some draws of the outputs, of one shape each; for a
/// Gaussian, whose prediction is the output, the mean output.
pub(crate) fn logits_of_mean(
    likelihood: Likelihood,
    draws: impl IntoIterator<Item = Result<Tensor>>,
) -> Result<Tensor> {
    let predict = |z: Tensor| {
        Ok::<_, Error>(match likelihood {
            Likelihood::Gaussian { .. } => z,
            Likelihood::Categorical => z.f_softmax(1, None::<Kind>)?,
            // p and 1 - p from two sigmoids: the smaller of them would lose its digits in a difference from 1.
            Likelihood::Bernoulli => Tensor::f_stack(&[&z, &-&z], 0)?.f_sigmoid()?,
        })
    };
    let (mut sum, mut n): (Option<Tensor>, f64) = (None, 0.0);
    for z in draws {
        let p = predict(z?)?;
        sum = Some(match sum {
            // In place on the first draw, which therefore must not be anyone else's tensor.
            Some(mut sum) => sum.f_add_(&p)?,
            None => p,
        });
        n += 1.0;
    }
    let mean = sum.unwrap_or_default() / n;
    // A mean that underflows gets a very negative logit instead of -∞, from which a NaN would come.
    let log = |p: Tensor| p.clamp_min(f64::MIN_POSITIVE).log();
    Ok(match likelihood {
        Likelihood::Gaussian { .. } => mean,
        Likelihood::Categorical => log(mean),
        Likelihood::Bernoulli => {
            let both = log(mean);
            both.get(0) - both.get(1)
        }
    })
}
