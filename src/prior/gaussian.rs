//! A Gaussian prior on one block of weights.

use crate::posterior::{into_basis, matrix_shape, out_of_basis};
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

/// A precision, or Δ = P₀/ess, over the weights of a block.
#[derive(Debug)]
pub(crate) enum Precision {
    /// A multiple of the identity.
    Isotropic(f64),
    /// In the shape of the block.
    Diagonal(Tensor),
    /// Q diag(values) Qᵀ with Q = left ⊗ right, for the block as a matrix; a missing side is the identity.
    Kronecker { left: Option<Tensor>, right: Option<Tensor>, values: Tensor },
    /// `[n, n]`
    Full(Tensor),
}

impl Precision {
    /// Other tensors in the same form: `elementwise` for what has the shape of the block, `matrix` for square ones.
    pub(super) fn map(&self, elementwise: impl Fn(&Tensor) -> Tensor, matrix: impl Fn(&Tensor) -> Tensor) -> Self {
        match self {
            Precision::Isotropic(x) => Precision::Isotropic(*x),
            Precision::Diagonal(x) => Precision::Diagonal(elementwise(x)),
            Precision::Kronecker { left, right, values } => Precision::Kronecker {
                left: left.as_ref().map(&matrix),
                right: right.as_ref().map(&matrix),
                values: elementwise(values),
            },
            Precision::Full(x) => Precision::Full(matrix(x)),
        }
    }

    /// P x for x in the shape of the block.
    fn times(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Precision::Isotropic(p) => x * *p,
            Precision::Diagonal(p) => x * p,
            Precision::Kronecker { left, right, values } => {
                let (left, right) = (left.as_ref(), right.as_ref());
                let rotated = into_basis(&x.f_reshape(matrix_shape(&x.size()))?, left, right)?;
                out_of_basis(&(rotated * values.f_reshape(matrix_shape(&x.size()))?), left, right)?
                    .f_reshape(x.size())?
            }
            Precision::Full(p) => p.f_mv(&x.f_reshape([-1])?)?.f_reshape(x.size())?,
        })
    }

    /// P as a matrix `[n, n]`.
    pub(super) fn dense(&self) -> Result<Tensor> {
        Ok(match self {
            Precision::Isotropic(_) => {
                return Err(Error::Posterior("an isotropic precision has no size".to_owned()));
            }
            Precision::Diagonal(p) => p.f_reshape([-1])?.f_diag(0)?,
            Precision::Kronecker { left, right, values } => {
                let like = (values.kind(), values.device());
                let [r, c] = matrix_shape(&values.size());
                let side = |q: &Option<Tensor>, n: i64| q.as_ref().map_or_else(|| Tensor::eye(n, like), Tensor::shallow_clone);
                let q = side(left, r).f_kron(&side(right, c))?;
                (&q * values.f_reshape([1, -1])?).f_matmul(&q.f_tr()?)?
            }
            Precision::Full(p) => p.shallow_clone(),
        })
    }

    /// diag (Q_L ⊗ Q_R)ᵀ P (Q_L ⊗ Q_R) as a matrix: with P = A diag(s) Aᵀ and A = A_L ⊗ A_R it is
    /// (U∘U) s (V∘V)ᵀ for U = Q_LᵀA_L, V = Q_RᵀA_R, because U ⊗ V is what is squared elementwise.
    fn in_basis(&self, left: Option<&Tensor>, right: Option<&Tensor>, shape: &[i64]) -> Result<Tensor> {
        let between = |q: Option<&Tensor>, a: Option<&Tensor>| -> Result<Option<Tensor>> {
            Ok(match (q, a) {
                (None, None) => None,
                (Some(q), None) => Some(q.f_tr()?.f_square()?),
                (None, Some(a)) => Some(a.f_square()?),
                (Some(q), Some(a)) => Some(q.f_tr()?.f_matmul(a)?.f_square()?),
            })
        };
        let (a_left, a_right, values) = match self {
            Precision::Isotropic(p) => return Ok(Tensor::from(*p)),
            Precision::Diagonal(values) => (None, None, values),
            Precision::Kronecker { left, right, values } => (left.as_ref(), right.as_ref(), values),
            Precision::Full(_) => {
                let problem = "a full precision has no diagonal in a Kronecker-factored basis".to_owned();
                return Err(Error::Posterior(problem));
            }
        };
        let (u, v) = (between(left, a_left)?, between(right, a_right)?);
        let s = values.f_reshape(matrix_shape(shape))?;
        out_of_basis(&s, u.as_ref(), v.as_ref())
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

    pub(super) fn new(mean: Tensor, precision: Precision) -> Self {
        BlockPrior { mean: Some(mean), precision }
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
                hess + Tensor::eye(hess.size()[0], (hess.kind(), hess.device())) * (sign * delta)
            }
            other => hess + other.dense()? * sign,
        })
    }

    /// The diagonal of (Q_L ⊗ Q_R)ᵀ Δ (Q_L ⊗ Q_R) in the shape of a block, a matrix `[r, c]` or a vector; a missing side is
    /// the identity. One number, 0-dim, for an isotropic prior. It is all of Δ where the basis is the prior's own.
    ///
    /// # Errors
    /// A prior of full covariance.
    pub fn in_basis(&self, left: Option<&Tensor>, right: Option<&Tensor>, shape: &[i64]) -> Result<Tensor> {
        let diagonal = self.precision.in_basis(left, right, shape)?;
        Ok(if diagonal.dim() == 0 { diagonal } else { diagonal.f_reshape(shape)? })
    }

    /// The bases of its rows and columns, where it is Kronecker-factored.
    pub fn bases(&self) -> [Option<&Tensor>; 2] {
        match &self.precision {
            Precision::Kronecker { left, right, .. } => [left.as_ref(), right.as_ref()],
            _ => [None, None],
        }
    }

    /// The same Gaussian with its precision divided by ess.
    pub(crate) fn per_example(&self, ess: f64) -> Self {
        let divided = |t: &Tensor| t / ess;
        let precision = match &self.precision {
            Precision::Isotropic(p) => Precision::Isotropic(p / ess),
            Precision::Full(p) => Precision::Full(divided(p)),
            other => other.map(divided, Tensor::shallow_clone),
        };
        BlockPrior { mean: self.mean.as_ref().map(Tensor::shallow_clone), precision }
    }

    /// m₀ and P₀ of a prior that is diagonal.
    pub(crate) fn diagonal(&self) -> Option<(&Tensor, &Tensor)> {
        match (&self.mean, &self.precision) {
            (Some(mean), Precision::Diagonal(precision)) => Some((mean, precision)),
            _ => None,
        }
    }

    /// That of some of the weights of a joint block, the others being held at `at`: Δ among them, about the mean that
    /// the others leave them.
    pub(crate) fn conditional(&self, index: &Tensor, rest: &Tensor, at: &Tensor) -> Result<Self> {
        let pick = |t: &Tensor, i: &Tensor| t.f_index_select(0, i);
        let zero = || at.zeros_like();
        let m0 = &self.mean.as_ref().map_or_else(zero, Tensor::shallow_clone);
        Ok(match &self.precision {
            Precision::Isotropic(delta) => BlockPrior::isotropic(*delta),
            Precision::Diagonal(p) => BlockPrior::new(pick(m0, index)?, Precision::Diagonal(pick(p, index)?)),
            Precision::Kronecker { .. } => {
                return Err(Error::Posterior("a matrix is not a joint block, which alone has parts".to_owned()));
            }
            Precision::Full(p) => {
                let rows = pick(p, index)?;
                let (own, across) = (rows.f_index_select(1, index)?, rows.f_index_select(1, rest)?);
                let push = across.f_mv(&(pick(at, rest)? - pick(m0, rest)?))?;
                let shift = Tensor::f_linalg_solve(&own, &push, true)?;
                BlockPrior::new(pick(m0, index)? - shift, Precision::Full(own))
            }
        })
    }

    /// Its tensors by name, for a checkpoint.
    pub(crate) fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut all: Vec<_> = self.mean.iter().map(|t| ("mean", t)).collect();
        match &self.precision {
            Precision::Isotropic(_) => {}
            Precision::Diagonal(t) | Precision::Full(t) => all.push(("precision", t)),
            Precision::Kronecker { left, right, values } => {
                all.push(("precision", values));
                all.extend(left.iter().map(|t| ("left", t)));
                all.extend(right.iter().map(|t| ("right", t)));
            }
        }
        all
    }
}

/// What a checkpoint says of a [`BlockPrior`] beside its tensors.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
pub(crate) enum Layout {
    Diagonal,
    Kronecker { left: bool, right: bool },
    Full,
}

impl BlockPrior {
    pub(crate) fn layout(&self) -> Layout {
        match &self.precision {
            Precision::Isotropic(_) | Precision::Diagonal(_) => Layout::Diagonal,
            Precision::Kronecker { left, right, .. } => Layout::Kronecker { left: left.is_some(), right: right.is_some() },
            Precision::Full(_) => Layout::Full,
        }
    }

    /// From the tensors of a checkpoint: `take(name, shape)` for a block of this shape.
    pub(crate) fn restore(
        layout: Layout,
        shape: &[i64],
        mut take: impl FnMut(&str, &[i64]) -> Result<Tensor>,
    ) -> Result<Self> {
        let [r, c] = matrix_shape(shape);
        let mean = take("mean", shape)?;
        let positive = |t: Tensor| {
            if t.numel() > 0 && t.to_kind(Kind::Double).min().double_value(&[]) <= 0.0 {
                return Err(Error::Posterior("its prior's precision is not positive everywhere".to_owned()));
            }
            Ok(t)
        };
        let precision = match layout {
            Layout::Diagonal => Precision::Diagonal(positive(take("precision", shape)?)?),
            Layout::Kronecker { left, right } => Precision::Kronecker {
                values: positive(take("precision", shape)?)?,
                left: left.then(|| take("left", &[r, r])).transpose()?,
                right: right.then(|| take("right", &[c, c])).transpose()?,
            },
            Layout::Full => Precision::Full(take("precision", &[r * c; 2])?),
        };
        Ok(BlockPrior::new(mean, precision))
    }
}
