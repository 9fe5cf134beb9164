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
    Ok(Tensor::f_linalg_qr(&a.f_matmul(&columns(q)?)?, "reduced")?.0)
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

/// Rows and columns of a tensor of this shape as the matrix whose sides have these bases: of its rows, unless a basis
/// says that it was split elsewhere. Sizes that do not fit the number of elements are ignored.
pub(crate) fn sides(shape: &[i64], left: Option<&Tensor>, right: Option<&Tensor>) -> [i64; 2] {
    let n: i64 = shape.iter().product();
    let size = |q: Option<&Tensor>| q.map(|q| q.size()[0]).filter(|size| *size > 0);
    let split = match (size(left), size(right)) {
        (Some(r), Some(c)) => [r, c],
        (Some(r), None) => [r, n / r],
        (None, Some(c)) => [n / c, c],
        (None, None) => return matrix_shape(shape),
    };
    if n > 0 && split[0] * split[1] == n { split } else { matrix_shape(shape) }
}

/// U Vᵀ, roughly, of X = U Σ Vᵀ: its singular values, but those that are tiny beside the largest, become about 1 (0.7
/// to 1.2). Five steps of the Newton-Schulz iteration of Muon (Jordan et al. 2024), whose polynomial climbs fast and
/// does not converge; it takes the smaller of the two Gram matrices. A vector becomes a unit vector, and zero stays.
pub(crate) fn whitened(x: &Tensor) -> Result<Tensor> {
    if x.numel() == 0 {
        return Ok(x.copy());
    }
    // Before its squares are added up, which could leave the range of f32.
    let x = x / x.f_abs()?.f_max()?.f_clamp_min(SMALLEST)?;
    let x = &x / x.f_norm()?.f_clamp_min(SMALLEST)?;
    let [r, c] = x.size()[..] else { return Ok(x) };
    let mut x = if r > c { x.f_tr()? } else { x };
    for _ in 0..5 {
        let a = x.f_matmul(&x.f_tr()?)?;
        x = &x * 3.4445 + (&a * -4.7750 + a.f_matmul(&a)? * 2.0315).f_matmul(&x)?;
    }
    Ok(if r > c { x.f_tr()? } else { x })
}

/// What a zero is divided by.
const SMALLEST: f64 = 1e-30;

/// Q column by column in memory, as factorizations return it. Products round by layout, which no file keeps: a basis
/// that was read is to give the same bits as the one that was written.
pub(crate) fn columns(q: &Tensor) -> Result<Tensor> {
    Ok(q.f_tr()?.f_contiguous()?.f_tr()?)
}

/// Q_L X Q_Rᵀ: from the basis to the weights.
pub(crate) fn out_of_basis(x: &Tensor, left: Option<&Tensor>, right: Option<&Tensor>) -> Result<Tensor> {
    let x = left.map_or_else(|| Ok(x.shallow_clone()), |q| Ok::<_, Error>(columns(q)?.f_matmul(x)?))?;
    right.map_or_else(|| Ok(x.shallow_clone()), |q| Ok(x.f_matmul(&columns(q)?.f_tr()?)?))
}

/// Q_Lᵀ X Q_R: from the weights to the basis.
pub(crate) fn into_basis(x: &Tensor, left: Option<&Tensor>, right: Option<&Tensor>) -> Result<Tensor> {
    let x = left.map_or_else(|| Ok(x.shallow_clone()), |q| Ok::<_, Error>(columns(q)?.f_tr()?.f_matmul(x)?))?;
    right.map_or_else(|| Ok(x.shallow_clone()), |q| Ok(x.f_matmul(&columns(q)?)?))
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

    /// The five steps as a polynomial of one number, which is what they are of every singular value.
    #[test]
    fn whitening_brings_singular_values_near_one() {
        let like = (Kind::Double, tch::Device::Cpu);
        let singular = |x: &Tensor| x.svd(true, true).1;
        for size in [[64, 32], [32, 64], [5, 5]] {
            // Between -½ and ½, without a pattern.
            let x = (Tensor::arange(size[0] * size[1], like) * 12.9898).sin() * 43_758.545_3;
            let x = (&x - x.floor() - 0.5).reshape(size);
            let found = singular(&whitened(&x).unwrap());
            let mut s = singular(&x);
            s = &s / s.norm();
            for _ in 0..5 {
                s = &s * 3.4445 - s.pow_tensor_scalar(3) * 4.7750 + s.pow_tensor_scalar(5) * 2.0315;
            }
            let expected = s.sort(0, true).0;
            assert!((&found - expected).abs().max().double_value(&[]) < 1e-10);
            if size[0] != size[1] {
                let [least, most] = [found.min(), found.max()].map(|x| x.double_value(&[]));
                assert!(0.6 < least && most < 1.3, "{least} {most}");
            }
            // The length does not matter, nor whether its square is beyond f32; nor is the matrix turned.
            for scale in [1e-25, 1e25] {
                let other = whitened(&(&x * scale).to_kind(Kind::Float)).unwrap();
                assert!((other - whitened(&x).unwrap()).abs().max().double_value(&[]) < 1e-3);
            }
            let (u, _, v) = x.svd(true, true);
            let turned = u.tr().matmul(&whitened(&x).unwrap()).matmul(&v);
            assert!((&turned - turned.diagonal(0, 0, 1).diag(0)).abs().max().double_value(&[]) < 1e-10);
        }
        let vector = whitened(&Tensor::from_slice(&[3.0, -4.0])).unwrap();
        assert!((vector - Tensor::from_slice(&[0.6, -0.8])).abs().max().double_value(&[]) < 1e-15);
        for size in [vec![2, 3], vec![4], vec![0, 3], vec![0]] {
            let zero = Tensor::zeros(size, like);
            assert_eq!(whitened(&zero).unwrap(), zero);
        }
    }

    #[test]
    fn a_basis_says_where_the_matrix_is_split() {
        let q = |n: i64| Tensor::eye(n, (Kind::Double, tch::Device::Cpu));
        let sides = |shape: &[i64], l: i64, r: i64| {
            let side = |n: i64| (n >= 0).then(|| q(n));
            super::sides(shape, side(l).as_ref(), side(r).as_ref())
        };
        assert_eq!(sides(&[8, 3, 3], -1, -1), [8, 9]);
        assert_eq!(sides(&[8, 3, 3], 24, -1), [24, 3]);
        assert_eq!(sides(&[8, 3, 3], -1, 3), [24, 3]);
        assert_eq!(sides(&[8, 3, 3], -1, 72), [1, 72]);
        assert_eq!(sides(&[5], -1, 5), [1, 5]);
        // What does not fit, is refused elsewhere.
        assert_eq!(sides(&[8, 3, 3], 5, -1), [8, 9]);
        assert_eq!(sides(&[8, 3, 3], 8, 3), [8, 9]);
        assert_eq!(sides(&[0, 3], 0, 3), [0, 3]);
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
