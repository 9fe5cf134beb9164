//! Predictions averaged over draws of the outputs.

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
            // p and 1 - p, each with its digits.
            Likelihood::Bernoulli => Tensor::f_stack(&[&z, &-&z], 0)?.f_sigmoid()?,
        })
    };
    let (mut sum, mut n): (Option<Tensor>, f64) = (None, 0.0);
    for z in draws {
        let p = predict(z?)?;
        sum = Some(match sum {
            Some(mut sum) => sum.f_add_(&p)?,
            None => p,
        });
        n += 1.0;
    }
    let mean = sum.unwrap_or_default() / n;
    // A mean that underflows has a very negative logit, and not one of -∞, from which NaN would come.
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
