//! Matrices that must be positive definite, with typed errors where they are not; and tensors as matrices, in and out
//! of a basis. Operations that only wrap libtorch's belong here if their arguments are easily confused.

use crate::{Error, Result};
use tch::{Kind, Tensor};

/// L with A = L Lᵀ.
///
/// # Errors
/// [`Error::NotPositiveDefinite`] if A is not positive definite or not finite; `what` names it.
pub(crate) fn cholesky(what: &str, a: &Tensor) -> Result<Tensor> {
    // `_ex` reports a failure as a number. The plain factorization throws, and its message does not name the matrix.
    let (l, info) = a.f_linalg_cholesky_ex(false, false)?;
    let minor = info.int64_value(&[]);
    // The factorization does not always notice that a matrix is not finite.
    if minor == 0 && l.isfinite().all().int64_value(&[]) == 1 {
        return Ok(l);
    }
    let problem = if a.isfinite().all().int64_value(&[]) == 1 {
        format!("its leading minor of order {minor} of {} is not", a.size()[0])
    } else {
        "it has elements that are not finite".to_owned()
    };
    Err(Error::NotPositiveDefinite { what: what.to_owned(), problem })
}

/// A⁻¹ from L.
pub(crate) fn inverse(l: &Tensor) -> Result<Tensor> {
    Ok(l.f_cholesky_inverse(false)?)
}

/// A⁻¹ x from L; x is a vector.
pub(crate) fn solve(l: &Tensor, x: &Tensor) -> Result<Tensor> {
    Ok(x.f_unsqueeze(1)?.f_cholesky_solve(l, false)?.f_squeeze_dim(1)?)
}

/// L⁻¹ B
pub(crate) fn forward(l: &Tensor, b: &Tensor) -> Result<Tensor> {
    // The flags are upper, left, unitriangular.
    Ok(l.f_linalg_solve_triangular(b, false, true, false)?)
}

/// L⁻ᵀ z for a vector z ~ N(0, I): distributed as N(0, A⁻¹).
pub(crate) fn spread(l: &Tensor, z: &Tensor) -> Result<Tensor> {
    // The flags again, for the transposed view of L, whose triangle is the upper one.
    Ok(l.f_tr()?.f_linalg_solve_triangular(&z.f_unsqueeze(1)?, true, true, false)?.f_squeeze_dim(1)?)
}

/// ln det A from L.
pub(crate) fn log_det(l: &Tensor) -> f64 {
    // A sum of logarithms: the product of the diagonal leaves the range of f64 for a few hundred weights.
    2.0 * l.diag(0).log().sum(Kind::Double).double_value(&[])
}

/// Eigenvalues, ascending, and eigenvectors of a symmetric A, in its kind. Computed in f64: for second moments of f32
/// with many directions of no variance LAPACK does not converge in f32.
pub(crate) fn eigen(a: &Tensor) -> Result<(Tensor, Tensor)> {
    let (values, vectors) = a.f_to_kind(Kind::Double)?.f_linalg_eigh("L")?;
    Ok((values.f_to_kind(a.kind())?, vectors.f_to_kind(a.kind())?))
}

/// Whether all elements are zero: a second moment without any evidence, whose eigenvectors mean nothing.
pub(crate) fn is_zero(a: &Tensor) -> Result<bool> {
    Ok(a.f_any()?.f_int64_value(&[])? == 0)
}

/// Q', nearer to the eigenvectors of A than Q is, in the same order: one step of the power method and
/// orthogonalization. In A's kind; n³ products and a factorization, a small part of what [`eigen`] takes.
pub(crate) fn nearer_eigenvectors(a: &Tensor, q: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_linalg_qr(&a.f_matmul(q)?, "reduced")?.0)
}

/// ½(A + Aᵀ)
pub(crate) fn symmetric(a: &Tensor) -> Result<Tensor> {
    // LAPACK reads one triangle. The mean of both takes no side in the rounding of the products that A comes from.
    Ok((a + a.f_tr()?) * 0.5)
}

/// Rows and columns of a parameter as a matrix.
pub(crate) fn matrix_shape(shape: &[i64]) -> [i64; 2] {
    match shape {
        [] => [1, 1],
        [n] => [1, *n],
        [r, rest @ ..] => [*r, rest.iter().product()],
    }
}

/// Q_L X Q_Rᵀ: from the basis to the weights.
pub(crate) fn out_of_basis(x: &Tensor, left: Option<&Tensor>, right: Option<&Tensor>) -> Result<Tensor> {
    let x = left.map_or_else(|| Ok(x.shallow_clone()), |q| q.f_matmul(x))?;
    Ok(right.map_or_else(|| Ok(x.shallow_clone()), |q| x.f_matmul(&q.f_tr()?))?)
}

/// Q_Lᵀ X Q_R: from the weights to the basis.
pub(crate) fn into_basis(x: &Tensor, left: Option<&Tensor>, right: Option<&Tensor>) -> Result<Tensor> {
    let x = left.map_or_else(|| Ok(x.shallow_clone()), |q| q.f_tr()?.f_matmul(x))?;
    Ok(right.map_or_else(|| Ok(x.shallow_clone()), |q| x.f_matmul(q))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(x: &[f64], n: i64) -> Tensor {
        Tensor::from_slice(x).reshape([n, n])
    }

    #[test]
    fn factors_give_back_the_matrix() {
        let a = matrix(&[4.0, 2.0, 0.6, 2.0, 5.0, 1.0, 0.6, 1.0, 3.0], 3);
        let l = cholesky("A", &a).unwrap();
        let close = |x: Tensor, y: &Tensor| assert!((x - y).abs().max().double_value(&[]) < 1e-14);
        let identity = Tensor::eye(3, (Kind::Double, tch::Device::Cpu));
        close(l.matmul(&l.tr()), &a);
        close(inverse(&l).unwrap().matmul(&a), &identity);
        close(l.matmul(&forward(&l, &a).unwrap()), &a);
        let x = Tensor::from_slice(&[1.0, -2.0, 0.5]);
        close(a.mv(&solve(&l, &x).unwrap()), &x);
        close(l.tr().mv(&spread(&l, &x).unwrap()), &x);
        assert!((log_det(&l) - a.logdet().double_value(&[])).abs() < 1e-14);
    }

    /// As the inputs of a first layer on images: few examples, and pixels that are always zero.
    #[test]
    fn a_singular_second_moment_has_eigenvectors() {
        let like = (Kind::Float, tch::Device::Cpu);
        let wave = |n: i64, step: f64| (Tensor::arange(n, like) * step).sin();
        let x = (wave(128, 12.9).unsqueeze(1) * 7.0 + wave(784, 78.2) * 5.0).sin().clamp_min(0.5) - 0.5;
        let a = x.tr().matmul(&x) / 128.0;
        let (values, vectors) = eigen(&a).unwrap();
        let close = |x: Tensor, y: &Tensor| assert!((x - y).abs().max().double_value(&[]) < 1e-4);
        close(vectors.matmul(&values.diag(0)).matmul(&vectors.tr()), &a);
        close(vectors.tr().matmul(&vectors), &Tensor::eye(784, like));
    }

    #[test]
    fn what_has_no_factor_is_named() {
        for (x, problem) in [
            ([1.0, 2.0, 2.0, 1.0], "minor of order 2"),
            ([0.0, 0.0, 0.0, 0.0], "minor of order 1"),
            ([f64::NAN, 0.0, 0.0, 1.0], "not finite"),
            ([1.0, 0.0, f64::INFINITY, 1.0], "not finite"),
        ] {
            let e = cholesky("the precision", &matrix(&x, 2)).unwrap_err().to_string();
            assert!(e.starts_with("the precision is not positive definite") && e.contains(problem), "{e}");
        }
    }
}
