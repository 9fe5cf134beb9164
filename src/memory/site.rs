//! Losses to second order in the outputs: what an example leaves in a Gaussian posterior.

use super::error;
use crate::continual::Memory;
use crate::nn::Likelihood;
use crate::nn::tape::Output;
use crate::{Result, kernel};
use tch::{Kind, Tensor};

/// A part for each of N examples with C outputs f, of the loss ℓ = -ln p(y | f) at f̂:
///
/// ```text
/// ℓ(f̂ + d) ≈ ℓ - αᵀd + ½dᵀΛd          α = -∂ℓ/∂f,   Λ = ∂²ℓ/∂f² = RRᵀ
/// ```
///
/// Λ has no inverse for a softmax, where adding a constant to all logits changes nothing; nothing here asks for one. "Its shape"
/// below is that of the outputs the model has, `[N]` or `[N, C]`.
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
    pub fn of(likelihood: Likelihood, outputs: Tensor, targets: &Tensor) -> Result<Self> {
        let memory = Memory::new(&outputs, likelihood).targets(targets);
        let _ = memory.outputs(&|_| outputs.shallow_clone())?;
        memory.check(&outputs)?;
        let targets = memory.hard(&outputs)?;
        if let Some(value) = kernel::first_non_finite(&targets) {
            return Err(error(format!("the targets are not finite ({value})")));
        }
        let output = Output { z: outputs, likelihood };
        let alpha = -output.residual(&targets)?;
        let (root, lambda) = curvature(&output)?;
        let losses = losses(likelihood, &output.z, &targets)?;
        Ok(Sites { likelihood, targets, outputs: output.z, losses, alpha, lambda, root })
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

    /// Σ ℓ(f) - (-ℓ*(-α)) = Σ ℓ(f) + ℓ*(-α), with the conjugate ℓ* of the loss itself: never less than -Σ αᵀf. Infinite if α is
    /// no slope of the loss anywhere.
    pub fn conjugate_sum(&self, f: &Tensor) -> Result<f64> {
        let (y, alpha) = (&self.targets, &self.alpha);
        let conjugates = match self.likelihood {
            Likelihood::Gaussian { variance } => {
                // The normalizer of the density is in the losses.
                let normal = 0.5 * (std::f64::consts::TAU * variance).ln();
                alpha.f_square()? * (0.5 * variance) - alpha * y - normal
            }
            Likelihood::Bernoulli | Likelihood::Categorical => {
                let p = y - alpha;
                if p.numel() > 0 && (p.min().double_value(&[]) < 0.0 || p.max().double_value(&[]) > 1.0) {
                    return Ok(f64::INFINITY);
                }
                let entropy = p.f_xlogy(&p)?;
                if self.likelihood == Likelihood::Bernoulli {
                    let q: Tensor = 1.0 - p;
                    entropy + q.f_xlogy(&q)?
                } else {
                    entropy
                }
            }
        };
        Ok(number(&losses(self.likelihood, &f.f_reshape(y.size())?, y)?)? + number(&conjugates)?)
    }
}

/// R `[N, C, K]`, and Λ `[N]` or `[N, C, C]`.
pub(super) fn curvature(output: &Output) -> Result<(Tensor, Tensor)> {
    let n = output.z.size()[0];
    let columns = (0..output.columns()).map(|c| Ok(output.root(c)?.f_reshape([n, -1])?)).collect::<Result<Vec<_>>>()?;
    let root = Tensor::f_stack(&columns, 2)?;
    let lambda = squares(&root, output.z.dim() == 1)?;
    Ok((root, lambda))
}

/// AAᵀ of each A `[M, C, ·]`: `[M, C, C]`, or `[M]` of one output.
pub(super) fn squares(a: &Tensor, one: bool) -> Result<Tensor> {
    let all = a.f_bmm(&a.f_transpose(1, 2)?)?;
    Ok(if one { all.f_reshape([-1])? } else { all })
}

/// -ln p(y | f) `[N]`
fn losses(likelihood: Likelihood, f: &Tensor, y: &Tensor) -> Result<Tensor> {
    rows(&match likelihood {
        Likelihood::Categorical => -(f.f_log_softmax(1, None::<Kind>)? * y),
        Likelihood::Bernoulli => {
            let (one, zero) = (f.f_log_sigmoid()?, f.f_neg()?.f_log_sigmoid()?);
            zero * (y - 1.0) - one * y
        }
        Likelihood::Gaussian { variance } => {
            (f - y).f_square()? * (0.5 / variance) + 0.5 * (std::f64::consts::TAU * variance).ln()
        }
    })
}

/// Over all but the first dimension.
fn rows(each: &Tensor) -> Result<Tensor> {
    let &[n, ..] = &each.size()[..] else { return Ok(each.shallow_clone()) };
    Ok(each.f_reshape([n, each.numel() as i64 / n.max(1)])?.f_sum_dim_intlist(1, false, None::<Kind>)?)
}

/// The sum.
pub(super) fn number(each: &Tensor) -> Result<f64> {
    Ok(each.f_sum(None::<Kind>)?.double_value(&[]))
}
