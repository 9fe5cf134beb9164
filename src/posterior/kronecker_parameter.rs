//! One parameter of a Gaussian whose precision is diagonal in a Kronecker-factored basis.

use super::BlockPrecision;
use super::valid::{finite_float, form, smallest};
use crate::linalg::{matrix_shape, out_of_basis, sides};
use crate::{Error, Result, kernel, linalg};
use tch::{Kind, Tensor};

/// One parameter of a [`KroneckerGaussian`](crate::KroneckerGaussian). All tensors have the kind (f32 or f64) and
/// device of the mean.
///
/// It is a matrix `[r, c]`: of its rows, or of its first dimensions together against the others, `[576, 3]` of `[64, 3,
/// 3, 3]`, where the size of a basis says so.
#[derive(Debug)]
pub struct KroneckerParameter {
    /// Name of the parameter.
    pub name: String,
    /// M, in the parameter's shape.
    pub mean: Tensor,
    /// Q_L `[r, r]`, orthogonal; `None` for the identity.
    pub left: Option<Tensor>,
    /// Q_R `[c, c]`, orthogonal; `None` for the identity.
    pub right: Option<Tensor>,
    /// s > 0, in the parameter's shape: the precisions in the basis.
    pub precision: Tensor,
}

/// Whether two orthogonal matrices, `None` for the identity, are the same in every bit.
pub(super) fn same_basis(a: Option<&Tensor>, b: Option<&Tensor>) -> bool {
    match (a, b) {
        (None, None) => true,
        // `equal` refuses tensors on two devices, and kinds that differ.
        (Some(a), Some(b)) => a.to_kind(Kind::Double).equal(&b.to_device(a.device()).to_kind(Kind::Double)),
        _ => false,
    }
}

impl KroneckerParameter {
    /// The matrix normal N(M, (A ⊗ B)⁻¹): row precision A `[r, r]` and column precision B `[c, c]`, both symmetric and
    /// positive definite.
    ///
    /// # Errors
    /// Factors of another shape or kind, not finite, or not positive definite.
    pub fn from_factors(name: impl Into<String>, mean: Tensor, a: &Tensor, b: &Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let name = name.into();
        let [r, c] = matrix_shape(&mean.size());
        let eigen = |what: &str, x: &Tensor, n: i64| {
            let like = |t: &Tensor| (t.size(), t.kind(), t.device());
            if !x.defined() || like(x) != (vec![n, n], mean.kind(), mean.device()) {
                let expected = format!("{:?} [{n}, {n}] on {:?}", mean.kind(), mean.device());
                return Err(Error::parameter(&name, format!("its {what} factor is {}: expected {expected}", form(x))));
            }
            if let Some(value) = kernel::first_non_finite(x) {
                return Err(Error::parameter(&name, format!("its {what} factor is not finite ({value})")));
            }
            // Reads one triangle, so that an asymmetry by rounding of the factor is ignored.
            let (values, vectors) = linalg::eigen(x)?;
            let smallest = smallest(&values);
            if smallest <= 0.0 {
                let what = format!("the {what} factor of `{name}`");
                return Err(Error::NotPositiveDefinite { what, problem: format!("an eigenvalue is {smallest:e}") });
            }
            Ok((values, vectors))
        };
        let ((a, left), (b, right)) = (eigen("left", a, r)?, eigen("right", b, c)?);
        let precision = a.f_outer(&b)?.f_reshape(mean.size())?;
        Ok(KroneckerParameter { name, mean, left: Some(left), right: Some(right), precision })
    }

    /// r and c.
    pub(super) fn sides(&self) -> [i64; 2] {
        sides(&self.mean.size(), self.left.as_ref(), self.right.as_ref())
    }

    /// X `[r, c]` of a tensor of the parameter's shape.
    pub(super) fn matrix(&self, x: &Tensor) -> Tensor {
        x.reshape(self.sides())
    }

    /// Q_L X Q_Rᵀ in the parameter's shape.
    pub(super) fn out(&self, x: &Tensor) -> Result<Tensor> {
        let x = out_of_basis(&self.matrix(x), self.left.as_ref(), self.right.as_ref())?;
        Ok(x.f_reshape(self.mean.size())?)
    }

    /// The precision as an operator, of the same tensors.
    pub(super) fn block(&self) -> BlockPrecision {
        BlockPrecision {
            left: self.left.as_ref().map(Tensor::shallow_clone),
            right: self.right.as_ref().map(Tensor::shallow_clone),
            precision: self.matrix(&self.precision),
        }
    }

    /// All in f64, for sums.
    pub(super) fn double(&self) -> Self {
        let wide = |t: &Tensor| t.to_kind(Kind::Double);
        KroneckerParameter {
            name: self.name.clone(),
            mean: wide(&self.mean),
            left: self.left.as_ref().map(wide),
            right: self.right.as_ref().map(wide),
            precision: wide(&self.precision),
        }
    }

    /// With copies of the tensors, if they fit together.
    pub(super) fn owned(self) -> Result<Self> {
        let KroneckerParameter { name, mean, left, right, precision } = self;
        let refuse = |problem: String| Err(Error::parameter(&name, problem));
        finite_float(&name, "mean", &mean)?;
        let shape = mean.size();
        // A basis of any other size is one of the wrong side, or of another parameter.
        let first = |dims: usize| shape[..dims].iter().product::<i64>();
        let split = sides(&shape, left.as_ref(), right.as_ref());
        let [r, c] = if (0..=shape.len()).any(|dims| first(dims) == split[0]) { split } else { matrix_shape(&shape) };
        let bases = [("left basis", left.as_ref(), r), ("right basis", right.as_ref(), c)];
        let bases = bases.map(|(what, q, n)| (what, q, vec![n, n]));
        let tensors = [("mean", Some(&mean), shape.clone()), ("precision", Some(&precision), shape)];
        for (what, t, size) in tensors.into_iter().chain(bases) {
            let Some(t) = t else { continue };
            if !t.defined() || (t.size(), t.kind(), t.device()) != (size.clone(), mean.kind(), mean.device()) {
                let expected = format!("{:?} {size:?} on {:?}", mean.kind(), mean.device());
                return refuse(format!("its {what} is {}: expected {expected}", form(t)));
            }
            if let Some(value) = kernel::first_non_finite(t) {
                return refuse(format!("its {what} is not finite ({value})"));
            }
        }
        if smallest(&precision) <= 0.0 {
            return refuse(format!("its smallest precision is {:e}: expected a number > 0", smallest(&precision)));
        }
        for (what, q) in [("left basis", &left), ("right basis", &right)] {
            // The maximum of no elements is an error in libtorch.
            let Some(q) = q.as_ref().filter(|q| q.numel() > 0) else { continue };
            let wide = q.to_kind(Kind::Double);
            let identity = Tensor::eye(q.size()[0], (Kind::Double, q.device()));
            let error = (wide.tr().matmul(&wide) - identity).abs().max().double_value(&[]);
            // Rounding of a QR or eigenvalue decomposition, with room for large matrices.
            if error > if q.kind() == Kind::Double { 1e-9 } else { 1e-3 } {
                return refuse(format!("its {what} is not orthogonal: QᵀQ differs from the identity by {error:e}"));
            }
        }
        let own = |t: Tensor| t.detach().copy();
        let (left, right) = (left.map(own), right.map(own));
        Ok(KroneckerParameter { name, mean: own(mean), left, right, precision: own(precision) })
    }
}
