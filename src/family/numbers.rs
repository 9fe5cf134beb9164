//! Checked vectors and matrices, and Γ's relatives for one number, from libtorch. Every tensor that comes from
//! outside passes here, so that the algorithms can use operators that panic.

use crate::{Error, Result, kernel};
use tch::{Device, Kind, Tensor};

/// `t` in f64 on the CPU, if it has the `size` (-1: any) and is finite.
pub(super) fn tensor(family: &'static str, what: &str, t: &Tensor, size: &[i64]) -> Result<Tensor> {
    if !t.defined() {
        return Err(Error::family(family, format!("{what} is undefined")));
    }
    let found = t.size();
    if found.len() != size.len() || found.iter().zip(size).any(|(f, s)| *s >= 0 && f != s) {
        return Err(Error::family(family, format!("{what} has shape {found:?}: expected {size:?} (-1: any)")));
    }
    // Detached: a graph of the caller's must not grow into the distributions.
    let t = t.detach().to_device(Device::Cpu).to_kind(Kind::Double).contiguous();
    match kernel::first_non_finite(&t) {
        Some(value) => Err(Error::family(family, format!("{what} is not finite ({value})"))),
        None => Ok(t),
    }
}

/// N numbers.
pub(super) fn numbers<const N: usize>(family: &'static str, what: &str, t: &Tensor) -> Result<[f64; N]> {
    let t = tensor(family, what, t, &[N as i64])?;
    Ok(std::array::from_fn(|i| t.double_value(&[i as i64])))
}

pub(super) fn positive(family: &'static str, what: &str, x: f64) -> Result<()> {
    let ok = x.is_finite() && x > 0.0;
    if ok { Ok(()) } else { Err(Error::family(family, format!("{what} = {x}: expected a finite number > 0"))) }
}

/// As [`tensor`], with every element above 0.
pub(super) fn positive_tensor(family: &'static str, what: &str, t: &Tensor, size: &[i64]) -> Result<Tensor> {
    let t = tensor(family, what, t, size)?;
    if t.numel() == 0 {
        return Err(Error::family(family, format!("{what} is empty")));
    }
    positive(family, &format!("the smallest element of {what}"), t.min().double_value(&[]))?;
    Ok(t)
}

/// `t` if it is inside the support, where `inside` is true.
pub(super) fn inside(family: &'static str, t: Tensor, inside: &Tensor, support: &str) -> Result<Tensor> {
    let ok = inside.all().int64_value(&[]) != 0;
    if ok { Ok(t) } else { Err(Error::family(family, format!("a value lies outside of the support {support}"))) }
}

/// A square matrix that equals its transpose up to rounding.
pub(super) fn symmetric(family: &'static str, what: &str, t: &Tensor, size: i64) -> Result<Tensor> {
    let t = tensor(family, what, t, &[size, size])?;
    let asymmetry = (&t - t.tr()).abs().max().double_value(&[]);
    // Rounding of a product of matrices in f64, with room for badly scaled ones.
    if asymmetry > 1e-8 * t.abs().max().double_value(&[]) {
        return Err(Error::family(family, format!("{what} is not symmetric: elements differ by {asymmetry:e}")));
    }
    Ok((&t + t.tr()) * 0.5)
}

/// Lower L with L Lᵀ = `t`.
pub(super) fn cholesky(family: &'static str, what: &str, t: &Tensor) -> Result<Tensor> {
    // `_ex` reports a failure as a number; the plain factorization throws without naming the matrix.
    let (l, info) = t.f_linalg_cholesky_ex(false, false)?;
    match info.int64_value(&[]) {
        0 => Ok(l),
        k => Err(Error::family(family, format!("{what} is not positive definite (its leading {k}×{k} block)"))),
    }
}

pub(super) fn ln_gamma(x: f64) -> f64 {
    Tensor::from(x).lgamma().double_value(&[])
}

/// ψ = (ln Γ)′
pub(super) fn digamma(x: f64) -> f64 {
    Tensor::from(x).digamma().double_value(&[])
}

/// ψ′ = ζ(2, ·), which libtorch has to more digits than its polygamma.
pub(super) fn trigamma(x: &Tensor) -> Tensor {
    Tensor::from(2.0).special_zeta(x)
}
