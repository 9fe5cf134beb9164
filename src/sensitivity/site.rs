//! Losses to second order in the outputs: what an example leaves in a Gaussian posterior. No weights appear here.

use super::error;
use crate::likelihood::{Likelihood, Outputs, conjugates, rows};
use crate::{Result, kernel};
use tch::{Kind, Tensor};

/// A part for each of N examples with C outputs f, of the loss ℓ = -ln p(y | f) at f̂:
///
/// ```text
/// ℓ(f̂ + d) ≈ ℓ - αᵀd + ½dᵀΛd          α = -∂ℓ/∂f,   Λ = ∂²ℓ/∂f² = RRᵀ
/// ```
///
/// Λ has no inverse for a softmax, where adding a constant to all logits changes nothing; nothing here asks for one.
/// "Its shape" below is the shape of the model's outputs, `[N]` or `[N, C]`.
#[derive(Debug)]
pub(super) struct Sites {
    pub likelihood: Likelihood,
    /// y as a prediction, in its shape.
    pub targets: Tensor,
    /// f̂ in its shape.
    pub outputs: Tensor,
    /// ℓ `[N]`
    pub losses: Tensor,
    /// α in its shape.
    pub alpha: Tensor,
    /// Λ `[N]` or `[N, C, C]`
    pub lambda: Tensor,
    /// R `[N, C, K]`, K the rank of Λ.
    pub root: Tensor,
}

impl Sites {
    /// At outputs `[N]` or `[N, C]`, for classes `[N]` (i64; categorical) or values in the shape of the outputs.
    pub fn of(likelihood: Likelihood, outputs: &Tensor, targets: &Tensor) -> Result<Self> {
        let outputs = Outputs::new(likelihood, outputs, None)?;
        if outputs.examples() == 0 {
            return Err(error("there are no examples: the outputs are empty"));
        }
        outputs.check_finite()?;
        let targets = outputs.targets(Some(targets))?;
        if let Some(value) = kernel::first_non_finite(&targets) {
            return Err(error(format!("the targets are not finite ({value})")));
        }
        let alpha = -outputs.residual(&targets)?;
        let root = outputs.roots()?;
        let lambda = squares(&root, outputs.z.dim() == 1)?;
        let losses = outputs.nll(&targets, None)?;
        Ok(Sites { likelihood, targets, outputs: outputs.z, losses, alpha, lambda, root })
    }

    /// N
    pub fn len(&self) -> i64 {
        self.alpha.size()[0]
    }

    /// C
    pub fn columns(&self) -> i64 {
        self.root.size()[1]
    }

    /// Σ αᵀd - ½dᵀΛd for d in any shape: how much less the losses are at f̂ + d.
    pub fn gain(&self, d: &Tensor) -> Result<f64> {
        number(&self.gains(&d.f_reshape(self.alpha.size())?)?)
    }

    /// Of each, `[N]`; d has the shape of the outputs.
    fn gains(&self, d: &Tensor) -> Result<Tensor> {
        let (down, bent) = (&self.alpha * d, d * self.bend(d)?);
        rows(&(down - bent * 0.5))
    }

    /// Λd
    fn bend(&self, d: &Tensor) -> Result<Tensor> {
        let d = d.f_reshape([self.len(), self.columns(), 1])?;
        // By the root, which one output has in the same shape as several.
        Ok(self.root.f_bmm(&self.root.f_transpose(1, 2)?.f_bmm(&d)?)?.f_reshape(self.alpha.size())?)
    }

    /// The same parabolas, seen from f̂ + d.
    pub fn moved(self, d: &Tensor) -> Result<Self> {
        let d = d.f_reshape(self.alpha.size())?;
        let (losses, alpha) = (&self.losses - self.gains(&d)?, &self.alpha - self.bend(&d)?);
        Ok(Sites { outputs: &self.outputs + d, losses, alpha, ..self })
    }

    /// Those of some examples.
    pub fn select(&self, at: &Tensor) -> Result<Self> {
        let pick = |t: &Tensor| t.f_index_select(0, at);
        Ok(Sites {
            likelihood: self.likelihood,
            targets: pick(&self.targets)?,
            outputs: pick(&self.outputs)?,
            losses: pick(&self.losses)?,
            alpha: pick(&self.alpha)?,
            lambda: pick(&self.lambda)?,
            root: pick(&self.root)?,
        })
    }

    /// Σ ℓ(f) - (-ℓ*(-α)) = Σ ℓ(f) + ℓ*(-α), with the conjugate ℓ* of the loss itself: never less than -Σ αᵀf. Infinite
    /// if α is not a slope of the loss anywhere.
    pub fn conjugate_sum(&self, f: &Tensor) -> Result<f64> {
        let y = &self.targets;
        let losses = Outputs::new(self.likelihood, &f.f_reshape(y.size())?, None)?.nll(y, None)?;
        Ok(number(&losses)? + conjugates(self.likelihood, y, &self.alpha)?)
    }
}

/// AAᵀ of each A `[M, C, ·]`: `[M, C, C]`, or `[M]` of one output.
pub(super) fn squares(a: &Tensor, one: bool) -> Result<Tensor> {
    let all = a.f_bmm(&a.f_transpose(1, 2)?)?;
    Ok(if one { all.f_reshape([-1])? } else { all })
}

/// The sum.
pub(super) fn number(each: &Tensor) -> Result<f64> {
    Ok(each.f_sum(None::<Kind>)?.double_value(&[]))
}
