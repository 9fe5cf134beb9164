//! What the loss that was returned makes of the losses that were noted: a weight wᵢ = ∂L/∂ℓᵢ for each example.
//!
//! To first order in the ℓᵢ, the curvature of L is that of Σᵢ wᵢ ℓᵢ, which is Σᵢ wᵢ JᵢᵀΛᵢJᵢ: the vectors sᵢ with Λᵢ = Σ
//! sᵢsᵢᵀ are multiplied by √wᵢ. The weights come with the gradient, from the same backward pass.

use super::parameter::accumulation_kind;
use super::tapped::PerParameter;
use crate::likelihood::{Likelihood, Outputs};
use crate::nn::tape::{Noted, Tape};
use crate::{Error, Result};
use tch::{Kind, Tensor, no_grad_guard};

/// A noted loss that has a part in the loss that was returned.
#[derive(Debug)]
pub(super) struct Part<'a> {
    pub output: &'a Outputs,
    /// wᵢ ≥ 0 `[B]`
    pub weights: Tensor,
    /// Σᵢ wᵢ > 0, or NaN
    pub total: f64,
}

/// All of them.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    pub parts: Vec<Part<'a>>,
    /// Whether a loss was left out because all of its weights are zero: in another batch they may be not.
    pub left_out: bool,
}

/// The noted losses, to be differentiated by; at least one.
pub(super) fn losses(tape: &Tape) -> Result<Vec<&Tensor>> {
    if tape.noted().is_empty() {
        return Err(Error::Likelihood(
            "the curvature needs the model's output beside the loss; compute the loss with cross_entropy, \
             binary_cross_entropy or squared_error of `tch_blr::nn`, or choose Labels::Observed"
                .to_owned(),
        ));
    }
    Ok(tape.noted().iter().map(|noted| &noted.losses).collect())
}

impl<'a> Parts<'a> {
    /// From the derivatives by [`losses`].
    pub(super) fn new(tape: &'a Tape, derivatives: PerParameter) -> Result<Self> {
        let _no_grad = no_grad_guard();
        if derivatives.iter().all(Option::is_none) {
            return Err(Error::Likelihood(
                "no loss of `tch_blr::nn` that the closure has computed has a part in the loss that it returned, so \
                 that there would be no curvature: return what cross_entropy, binary_cross_entropy or squared_error \
                 gave (a mean, a sum with weights), without a detach in between"
                    .to_owned(),
            ));
        }
        let mut all = Parts { parts: Vec::new(), left_out: false };
        for (i, (noted, w)) in tape.noted().iter().zip(derivatives).enumerate() {
            let Some(mut weights) = w else { continue };
            weights = weights.f_to_kind(accumulation_kind(weights.kind()))?;
            if let Some(counted) = &noted.counted {
                // Their loss is a constant 0, whatever the weight and whatever Λ would be.
                weights = weights.f_mul(counted)?;
            }
            let (least, total) = range(&weights)?;
            if least < 0.0 {
                return Err(negative(i, noted, &weights));
            }
            // No backward pass for what has no part in it.
            if total == 0.0 {
                all.left_out = true;
            } else {
                all.parts.push(Part { output: &noted.output, weights, total });
            }
        }
        Ok(all)
    }
}

impl Part<'_> {
    /// √wᵢ sᵢ, for s in the shape of the output.
    pub(super) fn weighted(&self, s: &Tensor) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        let root = self.weights.f_sqrt()?;
        Ok(s.f_mul(&if s.dim() == 2 { root.f_unsqueeze(1)? } else { root })?)
    }
}

/// The least and the sum, by one read from the device.
fn range(weights: &Tensor) -> Result<(f64, f64)> {
    if weights.numel() == 0 {
        return Ok((0.0, 0.0));
    }
    let both = Tensor::f_stack(&[weights.f_min()?, weights.f_sum(None::<Kind>)?], 0)?;
    let both = Vec::<f64>::try_from(both.f_to_kind(Kind::Double)?)?;
    Ok((both[0], both[1]))
}

fn negative(i: usize, noted: &Noted, weights: &Tensor) -> Error {
    let at = weights.argmin(0, false).int64_value(&[]);
    let name = match noted.output.likelihood {
        Likelihood::Categorical => "cross_entropy",
        Likelihood::Bernoulli => "binary_cross_entropy",
        Likelihood::Gaussian { .. } => "squared_error",
    };
    Error::Likelihood(format!(
        "the loss that was returned falls with that of example {at} in call {} of a loss of `tch_blr::nn` ({name}): \
         ∂L/∂ℓ is {:.3e}, and a curvature needs weights ≥ 0; what is to be subtracted must count for the gradient alone: \
         compute it with a loss of tch, or detach it",
        i + 1,
        weights.double_value(&[at])
    ))
}
