//! The curvature Λ = ∂²ℓ/∂z² of each example's loss with respect to its output, as Λ = Σ_c s_c s_cᵀ, its products and
//! labels drawn from the prediction.
//!
//! For these likelihoods Λ does not depend on the label, so that it is also the Fisher information of p(y | z).

use super::loss::rows;
use super::{Labels, Likelihood, Outputs};
use crate::{Error, Result, kernel};
use tch::{Kind, Tensor};

impl Outputs {
    /// Number of vectors s_c with Σ_c s_c s_cᵀ = Λ.
    pub(crate) fn columns(&self) -> i64 {
        let columns = self.z.size().get(1).copied().unwrap_or(1);
        // Adding a constant to all logits changes nothing, so that Λ of the softmax has one rank less.
        columns - i64::from(matches!(self.likelihood, Likelihood::Categorical))
    }

    /// s_c of every example, in the shape of z.
    ///
    /// Λ is diag(p(1-p)) of sigmoids and I/σ² of a Gaussian. For the softmax it is diag(p) - ppᵀ, and s_c a column of
    /// its Cholesky factor: class c against those after it, whose probabilities add up to q,
    ///
    /// ```text
    /// s_c = √(p_c q / (p_c + q)) (e_c - p_after/q)
    /// ```
    ///
    /// which subtracts no numbers that are close to each other.
    pub(crate) fn root(&self, c: i64) -> Result<Tensor> {
        let z = self.matrix()?;
        let unit = unit(&z, c)?;
        let s = match self.likelihood {
            Likelihood::Categorical => {
                let p = z.f_softmax(1, None::<Kind>)?;
                let (one, after) = (p.f_narrow(1, c, 1)?, p.f_narrow(1, c + 1, p.size()[1] - c - 1)?);
                let q = after.f_sum_dim_intlist(1, true, None::<Kind>)?;
                // Where all later classes have underflowed, 0/0 stands for no share.
                let shares = (&after / &q).f_masked_fill(&q.f_eq(0.0)?, 0.0)?;
                let both = &one + &q;
                let size = (&one * &q / &both).f_masked_fill(&both.f_eq(0.0)?, 0.0)?.f_sqrt()?;
                unit.f_narrow(1, c + 1, after.size()[1])?.f_copy_(&-shares)?;
                unit * size
            }
            Likelihood::Bernoulli => unit * deviation(&z)?,
            Likelihood::Gaussian { variance } => unit / variance.sqrt(),
        };
        Ok(s.f_reshape(self.z.size())?)
    }

    /// All of them, R `[B, C, K]` with Λ = RRᵀ.
    pub(crate) fn roots(&self) -> Result<Tensor> {
        let b = self.examples();
        let each = (0..self.columns()).map(|c| Ok(self.root(c)?.f_reshape([b, -1])?)).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_stack(&each, 2)?)
    }

    /// Vectors s of every example, each in the shape of z, with Σ ssᵀ = Λ, exactly or on average; `normals()`: standard
    /// normals in the shape of z, where labels are drawn.
    ///
    /// [`Labels::Observed`] has none: its vector is the residual of the data.
    pub(crate) fn vectors(&self, labels: Labels, normals: impl FnOnce() -> Result<Tensor>) -> Result<Vec<Tensor>> {
        match labels {
            Labels::Exact => (0..self.columns()).map(|c| self.root(c)).collect(),
            Labels::Sampled => Ok(vec![self.sampled(&normals()?)?]),
            Labels::Observed => Ok(Vec::new()),
        }
    }

    /// One random s of every example with E\[ssᵀ\] = Λ, from standard normals in the shape of z: p - e_ŷ with ŷ ~ p of
    /// the softmax, and the columns of Λ^½ with random signs otherwise.
    pub(crate) fn sampled(&self, normals: &Tensor) -> Result<Tensor> {
        let z = self.z.detach();
        // Their mean is 0 and their square 1: the exact Λ in every draw but for the products of different columns.
        let signs = || Ok::<_, Error>(normals.f_ge(0.0)?.f_to_kind(z.kind())? * 2.0 - 1.0);
        match self.likelihood {
            Likelihood::Categorical => {
                let p = z.f_softmax(1, None::<Kind>)?;
                // ŷ is the number of classes whose cumulated probability is below u = Φ(normal): one normal for each
                // example, so that labels come from the same counter-based noise as everything that is drawn.
                let u = (normals.f_narrow(1, 0, 1)? / 2f64.sqrt()).f_erf()? * 0.5 + 0.5;
                // Cumulated in f64: with thousands of classes, f32 would end visibly away from 1.
                let below = p.f_cumsum(1, Kind::Double)?.f_lt_tensor(&u)?;
                // Rounding can leave the last cumulated probability below u.
                let label = below.f_sum_dim_intlist(1, true, Kind::Int64)?.f_clamp_max(p.size()[1] - 1)?;
                let one = p.f_zeros_like()?.f_scatter_value(1, &label, 1.0)?;
                Ok(p - one)
            }
            Likelihood::Bernoulli => Ok(signs()? * deviation(&z)?),
            Likelihood::Gaussian { variance } => Ok(signs()? / variance.sqrt()),
        }
    }

    /// The diagonals of Λ in the shape of z: p(1-p), or 1/σ².
    pub(crate) fn curvature_diagonal(&self) -> Result<Tensor> {
        let p = tch::no_grad(|| self.prediction())?;
        Ok(match self.likelihood {
            Likelihood::Categorical | Likelihood::Bernoulli => &p * (1.0 - &p),
            Likelihood::Gaussian { variance } => kernel::filled(&p, 1.0 / variance),
        })
    }

    /// ∂p/∂z x for x in the shape of z: how a prediction moves with its output. This is σ²Λx for a Gaussian and Λx
    /// otherwise.
    pub(crate) fn prediction_times(&self, x: &Tensor) -> Result<Tensor> {
        let p = tch::no_grad(|| self.prediction())?;
        Ok(match self.likelihood {
            Likelihood::Gaussian { .. } => x.shallow_clone(),
            Likelihood::Bernoulli => &p * (1.0 - &p) * x,
            Likelihood::Categorical => {
                let along = (&p * x).f_sum_dim_intlist(1, true, None::<Kind>)?;
                &p * (x - along)
            }
        })
    }

    /// The columns of ∂p/∂z, each `[B, C]`.
    pub(crate) fn slopes(&self) -> Result<Vec<Tensor>> {
        let flat = Outputs::as_is(self.likelihood, &self.matrix()?)?;
        (0..flat.z.size()[1]).map(|c| flat.prediction_times(&unit(&flat.z, c)?)).collect()
    }

    /// tr(Λv) `[B]` for covariances v `[B, C, C]` of the outputs, or their diagonals `[B, C]`.
    pub(crate) fn curvature_trace(&self, v: &Tensor) -> Result<Tensor> {
        let full = v.dim() == 3;
        let diagonal = if full { v.f_diagonal(0, 1, 2)? } else { v.shallow_clone() };
        let trace = rows(&(self.curvature_diagonal()?.f_reshape(diagonal.size())? * &diagonal))?;
        if !full || self.likelihood != Likelihood::Categorical {
            return Ok(trace);
        }
        // Λ = diag p - ppᵀ, of which p(1-p) is the diagonal: pᵀvp without its diagonal is left.
        let p = tch::no_grad(|| self.prediction())?;
        let shared = v.f_bmm(&p.f_unsqueeze(2)?)?.f_squeeze_dim(2)? * &p - p.f_square()? * diagonal;
        Ok(trace - rows(&shared)?)
    }
}

/// One in column c of every example, for z `[B, C]`.
fn unit(z: &Tensor, c: i64) -> Result<Tensor> {
    let unit = z.f_zeros_like()?;
    _ = unit.f_narrow(1, c, 1)?.f_fill_(1.0)?;
    Ok(unit)
}

/// √(p(1-p))
fn deviation(z: &Tensor) -> Result<Tensor> {
    // p(1-p) is exactly 0 in f32 from a logit of 17.4 on, where it is below 3·10⁻⁸.
    let p = z.f_sigmoid()?;
    Ok(p.f_mul(&p.f_neg()?.f_add_scalar(1.0)?)?.f_sqrt()?)
}
