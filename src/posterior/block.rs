//! The precision of one parameter as an operator: what a prior in one basis says in another.

use super::kronecker_parameter::same_basis;
use crate::linalg::{columns, into_basis, out_of_basis, sides};
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// P = (A_L ⊗ A_R) diag(vec s) (A_L ⊗ A_R)ᵀ over the weights of a matrix `[r, c]`, vec row by row.
#[derive(Debug)]
pub(crate) struct BlockPrecision {
    /// A_L `[r, r]`, orthogonal; `None` for the identity.
    pub left: Option<Tensor>,
    /// A_R `[c, c]`, orthogonal; `None` for the identity.
    pub right: Option<Tensor>,
    /// s `[r, c]`
    pub precision: Tensor,
}

impl BlockPrecision {
    /// In this kind and on this device.
    pub fn like(&self, t: &Tensor) -> Self {
        let like = |x: &Tensor| x.to_device(t.device()).to_kind(t.kind());
        BlockPrecision {
            left: self.left.as_ref().map(like),
            right: self.right.as_ref().map(like),
            precision: like(&self.precision),
        }
    }

    /// P vec X in the shape of X, with X as `[r, c]`: A_L (s ∘ A_Lᵀ X A_R) A_Rᵀ, since (A ⊗ B) vec X = vec(A X Bᵀ) for
    /// vec row by row.
    pub fn times(&self, x: &Tensor) -> Result<Tensor> {
        let (left, right) = (self.left.as_ref(), self.right.as_ref());
        let matrix = x.f_reshape(self.precision.size())?;
        Ok(out_of_basis(&(into_basis(&matrix, left, right)? * &self.precision), left, right)?.f_reshape(x.size())?)
    }

    /// The diagonal of Qᵀ P Q for Q = Q_L ⊗ Q_R, `None` for the identity, as the matrix whose sides have those bases.
    ///
    /// With U = Q_Lᵀ A_L and V = Q_Rᵀ A_R the mixed-product rule gives Qᵀ P Q = (U ⊗ V) diag(vec s) (U ⊗ V)ᵀ, and so
    ///
    /// ```text
    /// diagᵢⱼ = Σₖₗ Uᵢₖ² Vⱼₗ² sₖₗ = ( (U∘U) s (V∘V)ᵀ )ᵢⱼ
    /// ```
    ///
    /// The off-diagonal elements are lost, unless the bases are the same: then it is s itself, to the bit.
    ///
    /// # Errors
    /// Bases on both that are not of the same matrix: of `[64, 27]` in one and `[576, 3]` in the other.
    pub fn diagonal_in(&self, left: Option<&Tensor>, right: Option<&Tensor>) -> Result<Tensor> {
        let own = self.precision.size();
        let theirs = sides(&own, left, right);
        if own != theirs && (self.left.is_some() || self.right.is_some()) {
            return Err(Error::Posterior(format!(
                "a precision in the bases of a matrix {own:?} is seen in those of {theirs:?}: the two must split the \
                 dimensions of a parameter alike; full() of each has no bases"
            )));
        }
        let u = squared_turn(left, self.left.as_ref())?;
        let v = squared_turn(right, self.right.as_ref())?;
        // Without a basis of its own it is a diagonal, of any matrix.
        out_of_basis(&self.precision.f_reshape(theirs)?, u.as_ref(), v.as_ref())
    }

    /// P as a matrix over vec X.
    pub fn dense(&self) -> Result<Tensor> {
        let like = (self.precision.kind(), self.precision.device());
        let side = |q: &Option<Tensor>, n: i64| {
            // libtorch's Kronecker product refuses other layouts, and eigenvectors come column by column.
            q.as_ref().map_or_else(|| Tensor::eye(n, like), Tensor::contiguous)
        };
        // vec goes row by row, so the left factor of the product is that of the rows.
        let size = self.precision.size();
        let a = side(&self.left, size[0]).f_kron(&side(&self.right, size[1]))?;
        // Columns are scaled by broadcasting, without forming diag(s).
        Ok((&a * self.precision.f_reshape([1, -1])?).f_matmul(&a.f_tr()?)?)
    }

    /// Σ ln s: ln det P, as the bases are orthogonal.
    pub fn log_det(&self) -> f64 {
        self.precision.to_kind(Kind::Double).log().sum(Kind::Double).double_value(&[])
    }
}

/// Elementwise squares of Qᵀ A; `None` for the identity.
fn squared_turn(q: Option<&Tensor>, a: Option<&Tensor>) -> Result<Option<Tensor>> {
    if same_basis(q, a) {
        // The product of rounded matrices would only be near the identity.
        return Ok(None);
    }
    let turn = match (q, a) {
        (Some(q), Some(a)) => columns(q)?.f_tr()?.f_matmul(&columns(a)?)?,
        (Some(q), None) => q.f_tr()?,
        (None, Some(a)) => a.shallow_clone(),
        (None, None) => return Ok(None),
    };
    Ok(Some(turn.f_square()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    const F64: (Kind, Device) = (Kind::Double, Device::Cpu);

    #[test]
    fn bases_of_another_matrix_are_refused() {
        let ones = |r: i64, c: i64| Tensor::ones([r, c], F64);
        let p = |left, right, precision| BlockPrecision { left, right, precision };
        let e =
            p(Some(basis(4, 0.1)), None, ones(4, 3)).diagonal_in(Some(&basis(2, 0.3)), None).unwrap_err().to_string();
        assert!(e.contains("[4, 3]") && e.contains("[2, 6]") && e.contains("full()"), "{e}");
        // Seen by the weights, or seen from there, it is nobody's matrix.
        assert_eq!(p(None, Some(basis(6, 0.2)), ones(2, 6)).diagonal_in(None, None).unwrap().size(), [2, 6]);
        assert_eq!(p(None, None, ones(2, 6)).diagonal_in(Some(&basis(4, 0.1)), None).unwrap().size(), [4, 3]);
    }

    /// An orthogonal matrix without a pattern.
    fn basis(n: i64, phase: f64) -> Tensor {
        let a = (Tensor::arange(n * n, F64) * 1.7 + phase).sin().reshape([n, n]);
        Tensor::linalg_qr(&a, "reduced").0.contiguous()
    }

    fn or_identity(q: Option<&Tensor>, n: i64) -> Tensor {
        q.map_or_else(|| Tensor::eye(n, F64), Tensor::shallow_clone)
    }

    #[test]
    fn products_and_diagonals_are_those_of_the_dense_matrix() {
        let (r, c) = (3, 4);
        let s = (Tensor::arange(r * c, F64) * 0.9).cos().exp().reshape([r, c]);
        let x = (Tensor::arange(r * c, F64) * 2.3).sin().reshape([r, c]);
        let sides = |n, phase| [None, Some(basis(n, phase))];
        for (left, right) in sides(r, 0.3).iter().flat_map(|l| sides(c, 0.5).map(|r| (l.as_ref().map(Tensor::copy), r)))
        {
            let a = or_identity(left.as_ref(), r).kron(&or_identity(right.as_ref(), c));
            let dense = a.matmul(&s.reshape([-1]).diag(0)).matmul(&a.tr());
            let p = BlockPrecision { left, right, precision: s.copy() };
            let far = |x: Tensor, y: Tensor| (x - y.reshape([r, c])).abs().max().double_value(&[]);
            assert!(far(p.times(&x).unwrap(), dense.mv(&x.reshape([-1]))) < 1e-14);
            assert!((p.dense().unwrap() - &dense).abs().max().double_value(&[]) < 1e-14);
            assert!((p.log_det() - dense.logdet().double_value(&[])).abs() < 1e-13);
            for (l, r_) in sides(r, 1.1).iter().flat_map(|l| sides(c, 2.2).map(|r| (l.as_ref().map(Tensor::copy), r))) {
                let q = or_identity(l.as_ref(), r).kron(&or_identity(r_.as_ref(), c));
                let expected = q.tr().matmul(&dense).matmul(&q).diagonal(0, 0, 1);
                assert!(far(p.diagonal_in(l.as_ref(), r_.as_ref()).unwrap(), expected) < 1e-14);
            }
            // In its basis it is what it is, in every bit.
            assert_eq!(p.diagonal_in(p.left.as_ref(), p.right.as_ref()).unwrap(), s);
        }
    }
}
