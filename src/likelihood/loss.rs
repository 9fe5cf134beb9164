//! Losses -ln p(y | z), what an output predicts, and how far that is from the label.

use super::{Likelihood, Outputs};
use crate::Result;
use tch::{Kind, Tensor};

impl Outputs {
    /// p in the shape of z, with its graph: softmax, sigmoid, or the output itself.
    pub(crate) fn prediction(&self) -> Result<Tensor> {
        Ok(match self.likelihood {
            Likelihood::Categorical => self.z.f_softmax(-1, None::<Kind>)?,
            Likelihood::Bernoulli => self.z.f_sigmoid()?,
            Likelihood::Gaussian { .. } => self.z.shallow_clone(),
        })
    }

    /// ∂ℓᵢ/∂zᵢ = (p - t)/σ² for targets t in the form of predictions, without a graph.
    pub(crate) fn residual(&self, targets: &Tensor) -> Result<Tensor> {
        let apart = tch::no_grad(|| self.prediction())?.f_sub(targets)?;
        // Not divided by a scale of 1, which would be one more pass over the outputs.
        Ok(match self.likelihood {
            Likelihood::Gaussian { variance } => apart.f_div_scalar(variance)?,
            Likelihood::Categorical | Likelihood::Bernoulli => apart,
        })
    }

    /// -ln p(t | z) `[B]` for targets in the form of predictions, with the graph of z; for a Gaussian without its
    /// normalizer.
    pub(crate) fn losses(&self, targets: &Tensor) -> Result<Tensor> {
        self.bounded_losses(targets, None)
    }

    /// The same, with probabilities below `least` counted as `least`.
    fn bounded_losses(&self, targets: &Tensor, least: Option<f64>) -> Result<Tensor> {
        self.check_same_shape(targets)?;
        let (z, t) = (&self.z, &targets.to_device(self.z.device()));
        let log = |ln_p: Tensor| if let Some(p) = least { ln_p.clamp_min(p.ln()) } else { ln_p };
        rows(&match self.likelihood {
            Likelihood::Categorical => -(log(z.f_log_softmax(-1, None::<Kind>)?) * t),
            // -t ln p - (1-t) ln(1-p). Not softplus, which in libtorch is z from 20 on, with the gradient 1.
            Likelihood::Bernoulli => {
                let (one, zero) = (log(z.f_log_sigmoid()?), log(z.f_neg()?.f_log_sigmoid()?));
                zero * (t - 1.0) - one * t
            }
            Likelihood::Gaussian { variance } => (z - t).f_square()? * (0.5 / variance),
        })
    }

    /// -ln p(t | z) `[B]` in nats, normalizers included; probabilities below `least` count as `least`.
    pub(crate) fn nll(&self, targets: &Tensor, least: Option<f64>) -> Result<Tensor> {
        let normal = self.z.size().get(1).copied().unwrap_or(1) as f64 * normalizer(self.likelihood);
        let losses = self.bounded_losses(targets, least)?;
        // Without a Gaussian, the sum would be another pass over the losses for nothing.
        Ok(if normal == 0.0 { losses } else { losses + normal })
    }
}

/// The loss of the factor in front of an output's density: ½ ln 2πσ² of a Gaussian, otherwise 0.
fn normalizer(likelihood: Likelihood) -> f64 {
    if let Likelihood::Gaussian { variance } = likelihood { 0.5 * (std::f64::consts::TAU * variance).ln() } else { 0.0 }
}

/// Σᵢ ℓᵢ*(-αᵢ), with the conjugates of the losses -ln p(t | z) (normalizers included) and dual variables α in the shape
/// of the targets t. Infinite if α is not a slope of the loss anywhere.
pub(crate) fn conjugates(likelihood: Likelihood, targets: &Tensor, alpha: &Tensor) -> Result<f64> {
    let each = match likelihood {
        Likelihood::Gaussian { variance } => {
            alpha.f_square()? * (0.5 * variance) - alpha * targets - normalizer(likelihood)
        }
        Likelihood::Bernoulli | Likelihood::Categorical => {
            let p = targets - alpha;
            // α is a slope of the loss only if t - α is a probability; beyond, the conjugate is infinite and not NaN.
            if p.numel() > 0 && (p.min().double_value(&[]) < 0.0 || p.max().double_value(&[]) > 1.0) {
                return Ok(f64::INFINITY);
            }
            // xlogy is 0 at p = 0, where p ln p would be NaN.
            let entropy = p.f_xlogy(&p)?;
            if likelihood == Likelihood::Bernoulli {
                let q: Tensor = 1.0 - p;
                entropy + q.f_xlogy(&q)?
            } else {
                entropy
            }
        }
    };
    Ok(each.f_sum(None::<Kind>)?.double_value(&[]))
}

/// Sum over the columns, `[B]`.
pub(crate) fn rows(each: &Tensor) -> Result<Tensor> {
    if each.dim() == 1 {
        return Ok(each.shallow_clone());
    }
    Ok(each.f_sum_dim_intlist(1, false, None::<Kind>)?)
}
