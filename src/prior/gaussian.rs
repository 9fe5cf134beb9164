//! A Gaussian prior on one block of weights: what a step and a checkpoint need of it. Which posterior a block's prior
//! is cut from is in the module above.

use crate::linalg::{self, matrix_shape};
use crate::posterior::BlockPrecision;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// Families of Gaussians over several parameters, from the narrowest; each contains those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// Independent weights.
    Diagonal,
    /// Independent parameters, each with a precision that is diagonal in a Kronecker-factored basis.
    Kronecker,
    /// One precision matrix over all weights.
    Full,
}

impl Family {
    pub(crate) fn describe(self) -> &'static str {
        match self {
            Family::Diagonal => "isotropic or a diagonal Gaussian",
            Family::Kronecker => "isotropic, or a diagonal or Kronecker-factored Gaussian",
            Family::Full => "any Gaussian",
        }
    }
}

/// A precision P₀, or Δ = P₀/ess, over the weights of a block.
#[derive(Debug)]
pub(crate) enum Precision {
    /// A multiple of the identity.
    Isotropic(f64),
    /// Diagonal in a basis: of the block as a matrix, a vector being a matrix of one row.
    Block(BlockPrecision),
    /// `[n, n]`
    Full(Tensor),
}

impl Precision {
    /// That of independent weights.
    pub(super) fn vector(diagonal: &Tensor) -> Self {
        Precision::Block(BlockPrecision { left: None, right: None, precision: diagonal.reshape([1, -1]) })
    }

    /// With `f` applied to the eigenvalues, or to the elements; `f` must be linear for the two to agree.
    fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        match self {
            Precision::Isotropic(p) => Precision::Isotropic(*p),
            Precision::Block(BlockPrecision { left, right, precision }) => {
                let [left, right] = [left, right].map(|q| q.as_ref().map(Tensor::shallow_clone));
                Precision::Block(BlockPrecision { left, right, precision: f(precision) })
            }
            Precision::Full(p) => Precision::Full(f(p)),
        }
    }

    /// P x for x in the shape of the block.
    fn times(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Precision::Isotropic(p) => x * *p,
            Precision::Block(p) => p.times(x)?,
            Precision::Full(p) => p.f_mv(&x.f_reshape([-1])?)?.f_reshape(x.size())?,
        })
    }

    /// P as a matrix `[n, n]`.
    pub(super) fn dense(&self) -> Result<Tensor> {
        match self {
            // Callers know the size and make their own identity, as `add_to` does.
            Precision::Isotropic(_) => Err(Error::Posterior("an isotropic precision has no size".to_owned())),
            Precision::Block(p) => p.dense(),
            Precision::Full(p) => Ok(p.shallow_clone()),
        }
    }

    /// The diagonal `[n]`, if there are no other elements.
    pub(super) fn diagonal(&self) -> Result<Tensor> {
        match self {
            Precision::Block(BlockPrecision { left: None, right: None, precision }) => Ok(precision.f_reshape([-1])?),
            _ => Err(Error::Posterior("the prior's precision is not diagonal".to_owned())),
        }
    }
}

/// The prior of a block of weights as its row sees it: N(m₀, (ess·Δ)⁻¹), with Δ = P₀/ess on the scale of the mean loss.
///
/// An isotropic prior has Δ = δI and m₀ = 0.
#[derive(Debug)]
pub struct BlockPrior {
    /// In the shape of the block; `None` for zero.
    mean: Option<Tensor>,
    precision: Precision,
}

impl BlockPrior {
    /// N(0, 1/(ess·δ)) for every weight.
    pub fn isotropic(delta: f64) -> Self {
        BlockPrior { mean: None, precision: Precision::Isotropic(delta) }
    }

    /// N(mean, precision⁻¹), of the same tensors.
    pub(super) fn new(mean: Tensor, precision: &Precision) -> Self {
        BlockPrior { mean: Some(mean), precision: precision.map(Tensor::shallow_clone) }
    }

    /// In the kind and on the device of a tensor.
    pub(super) fn like(&self, t: &Tensor) -> Self {
        let like = |x: &Tensor| x.to_device(t.device()).to_kind(t.kind()).contiguous();
        let precision = match &self.precision {
            Precision::Isotropic(p) => Precision::Isotropic(*p),
            Precision::Block(p) => Precision::Block(p.like(t)),
            Precision::Full(p) => Precision::Full(like(p)),
        };
        BlockPrior { mean: self.mean.as_ref().map(like), precision }
    }

    /// δ, if Δ = δI and m₀ = 0.
    pub fn delta(&self) -> Option<f64> {
        if let Precision::Isotropic(delta) = self.precision { Some(delta) } else { None }
    }

    /// Δ(m - m₀), the gradient of -ln prior/ess at m.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn pull(&self, mean: &Tensor) -> Result<Tensor> {
        match &self.mean {
            // Not m - 0, which would be a pass over the weights for nothing.
            None => self.precision.times(mean),
            Some(m0) => self.precision.times(&(mean - m0)),
        }
    }

    /// sign·Δ + H for a block's matrix H `[n, n]`.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn add_to(&self, hess: &Tensor, sign: f64) -> Result<Tensor> {
        Ok(match &self.precision {
            Precision::Isotropic(delta) => {
                // Not in place on the diagonal: `hess` belongs to the caller.
                hess + Tensor::eye(hess.size()[0], (hess.kind(), hess.device())) * (sign * delta)
            }
            other => hess + other.dense()? * sign,
        })
    }

    /// The diagonal of (Q_L ⊗ Q_R)ᵀ Δ (Q_L ⊗ Q_R) in the shape of a block, a matrix `[r, c]` or a vector; a missing
    /// side is the identity. One number, 0-dim, for an isotropic prior. In the prior's own basis it is all of Δ.
    ///
    /// # Errors
    /// A prior of full covariance, or one whose bases are those of another matrix.
    pub fn in_basis(&self, left: Option<&Tensor>, right: Option<&Tensor>, shape: &[i64]) -> Result<Tensor> {
        match &self.precision {
            Precision::Isotropic(delta) => Ok(Tensor::from(*delta)),
            Precision::Block(p) => Ok(p.diagonal_in(left, right)?.f_reshape(shape)?),
            Precision::Full(_) => {
                let problem = "a full precision has no diagonal in a Kronecker-factored basis".to_owned();
                Err(Error::Posterior(problem))
            }
        }
    }

    /// The bases of its rows and columns, where it is Kronecker-factored.
    pub fn bases(&self) -> [Option<&Tensor>; 2] {
        match &self.precision {
            Precision::Block(p) => [p.left.as_ref(), p.right.as_ref()],
            _ => [None, None],
        }
    }

    /// Rows and columns of the matrix whose bases those are; `None` without any.
    pub fn sides(&self) -> Option<[i64; 2]> {
        match &self.precision {
            Precision::Block(p) if (p.left.is_some() || p.right.is_some()) && p.precision.numel() > 0 => {
                Some(matrix_shape(&p.precision.size()))
            }
            _ => None,
        }
    }

    /// The same Gaussian with its precision divided by ess.
    pub(crate) fn per_example(&self, ess: f64) -> Self {
        let precision = match &self.precision {
            Precision::Isotropic(p) => Precision::Isotropic(p / ess),
            other => other.map(|p| p / ess),
        };
        BlockPrior { mean: self.mean.as_ref().map(Tensor::shallow_clone), precision }
    }

    /// m₀ and P₀ of a prior that is diagonal, in the shape of its mean.
    pub(crate) fn diagonal(&self) -> Option<(&Tensor, Tensor)> {
        let mean = self.mean.as_ref()?;
        // `view_` is tch's name for libtorch's `view` with a list of sizes; nothing is changed in place.
        Some((mean, self.precision.diagonal().ok()?.view_(mean.size())))
    }

    /// The prior of some of the weights of a joint block when the others are held at `at`: Δ among them, around the
    /// mean that follows from the others.
    pub(crate) fn conditional(&self, index: &Tensor, rest: &Tensor, at: &Tensor) -> Result<Self> {
        let pick = |t: &Tensor, i: &Tensor| t.f_index_select(0, i);
        let zero = || at.zeros_like();
        let m0 = &self.mean.as_ref().map_or_else(zero, Tensor::shallow_clone);
        Ok(match &self.precision {
            Precision::Isotropic(delta) => BlockPrior::isotropic(*delta),
            Precision::Block(_) => {
                let diagonal = pick(&self.precision.diagonal()?, index)?;
                BlockPrior::new(pick(m0, index)?, &Precision::vector(&diagonal))
            }
            Precision::Full(p) => {
                // With P in parts, N(m₀, P⁻¹) given the rest has the precision P_II and the mean m₀_I - P_II⁻¹ P_IR
                // (x_R - m₀_R).
                let rows = pick(p, index)?;
                let (own, across) = (rows.f_index_select(1, index)?, rows.f_index_select(1, rest)?);
                let push = across.f_mv(&(pick(at, rest)? - pick(m0, rest)?))?;
                // A solution, not an inverse: it keeps digits where P_II is badly conditioned, and it is needed once.
                let shift = Tensor::f_linalg_solve(&own, &push, true)?;
                BlockPrior::new(pick(m0, index)? - shift, &Precision::Full(own))
            }
        })
    }

    /// Its tensors by name, for a checkpoint.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, Tensor)> {
        let Some(mean) = &self.mean else { return Vec::new() };
        let handle = Tensor::shallow_clone;
        let mut all = vec![("mean", handle(mean))];
        match &self.precision {
            Precision::Isotropic(_) => {}
            Precision::Block(BlockPrecision { left, right, precision }) => {
                all.push(("precision", precision.reshape(mean.size())));
                all.extend(left.iter().map(|t| ("left", handle(t))));
                all.extend(right.iter().map(|t| ("right", handle(t))));
            }
            Precision::Full(t) => all.push(("precision", handle(t))),
        }
        all
    }
}

/// What a checkpoint says of a [`BlockPrior`] beside its tensors: mean, precision and, where they are named here,
/// bases.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub(crate) enum Layout {
    Block {
        left: bool,
        right: bool,
        /// Of the matrix whose bases those are.
        rows: Option<i64>,
    },
    Full,
}

impl BlockPrior {
    pub(crate) fn layout(&self) -> Layout {
        if let Precision::Full(_) = self.precision {
            return Layout::Full;
        }
        let [left, right] = self.bases().map(|q| q.is_some());
        Layout::Block { left, right, rows: self.sides().map(|[rows, _]| rows) }
    }

    /// From the tensors of a checkpoint: `take(name, shape)` for a block of this shape.
    pub(crate) fn restore(
        layout: Layout,
        shape: &[i64],
        mut take: impl FnMut(&str, &[i64]) -> Result<Tensor>,
    ) -> Result<Self> {
        let n: i64 = shape.iter().product();
        let mean = take("mean", shape)?;
        let precision = match layout {
            Layout::Block { left, right, rows } => {
                let [r, c] = match rows {
                    None => matrix_shape(shape),
                    Some(r) if r > 0 && n % r == 0 => [r, n / r],
                    Some(r) => {
                        let problem = format!("its prior has {r} rows, which {n} weights do not fill");
                        return Err(Error::Posterior(problem));
                    }
                };
                let precision = take("precision", shape)?.reshape([r, c]);
                // A file may come from anyone. An isotropic prior is not stored here, so every element must be a
                // precision.
                if precision.gt(0.0).all().int64_value(&[]) == 0 {
                    return Err(Error::Posterior("tensor `prior.precision` is not positive everywhere".to_owned()));
                }
                let left = left.then(|| take("left", &[r, r])).transpose()?;
                let right = right.then(|| take("right", &[c, c])).transpose()?;
                Precision::Block(BlockPrecision { left, right, precision })
            }
            Layout::Full => {
                let precision = take("precision", &[n; 2])?;
                // For its error: a step would fail on such a matrix only later, without naming the file.
                let _ = linalg::cholesky("tensor `prior.precision`", &precision.to_kind(Kind::Double))?;
                Precision::Full(precision)
            }
        };
        Ok(BlockPrior { mean: Some(mean), precision })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file may come from anyone: what is no precision is refused, NaN included.
    #[test]
    fn a_stored_precision_is_checked() {
        let restore = |layout, elements: [f32; 4]| {
            let precision = Tensor::from_slice(&elements);
            let zeros = Tensor::zeros([2], tch::kind::FLOAT_CPU);
            let size = if let Layout::Full = layout { 4 } else { 2 };
            BlockPrior::restore(layout, &[2], |name, shape| {
                Ok(if name == "mean" { zeros.copy() } else { precision.narrow(0, 0, size).reshape(shape) })
            })
        };
        let diagonal = Layout::Block { left: false, right: false, rows: None };
        restore(diagonal, [1.0, 2.0, 0.0, 0.0]).unwrap();
        restore(Layout::Full, [2.0, 1.0, 1.0, 2.0]).unwrap();
        for bad in [0.0, -1.0, f32::NAN] {
            let e = restore(diagonal, [1.0, bad, 0.0, 0.0]).unwrap_err().to_string();
            assert!(e.contains("prior.precision") && e.contains("not positive"), "{e}");
            let e = restore(Layout::Full, [bad, 1.0, 1.0, bad]).unwrap_err().to_string();
            assert!(e.contains("prior.precision"), "{e}");
        }
    }
}
