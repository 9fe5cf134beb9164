//! Class probabilities against labels, and their entropy.

use super::inputs::{Probabilities, check, top};
use crate::Result;
use tch::{Kind, Tensor};

/// The smallest probability that [`nll`] distinguishes from zero: 2⁻¹²⁶ ≈ 1.2·10⁻³⁸, the smallest normal f32.
///
/// A softmax in f32 underflows below it. An example whose label has probability zero then costs 87.3 nats, not
/// infinity.
pub const NLL_CLAMP: f64 = f32::MIN_POSITIVE as f64;

/// Share of examples whose most probable class is the label: `(1/N) Σₙ 𝟙[ĉₙ = yₙ]`.
///
/// # Errors
/// See the [module](crate::metrics#errors).
pub fn accuracy(probs: &Tensor, labels: &Tensor) -> Result<f64> {
    let (p, y) = check(probs, labels)?;
    // By `top` and not by libtorch's argmax, which does not promise the first among ties on every device.
    let hits = p.rows().zip(&y).filter(|(row, y)| top(row).0 == **y).count();
    Ok(hits as f64 / y.len() as f64)
}

/// Negative log-likelihood of the averaged probabilities, in nats per example: -(1/N) Σₙ ln max(pₙ(yₙ), [`NLL_CLAMP`]).
///
/// # Errors
/// See the [module](crate::metrics#errors).
pub fn nll(probs: &Tensor, labels: &Tensor) -> Result<f64> {
    let (p, y) = check(probs, labels)?;
    let sum: f64 = p.rows().zip(&y).map(|(row, &y)| -row[y].max(NLL_CLAMP).ln()).sum();
    Ok(sum / y.len() as f64)
}

/// Brier score: `(1/N) Σₙ Σ_c (pₙ(c) - 𝟙[c = yₙ])²`, between 0 and 2.
///
/// The sum runs over all classes, as in Brier (1950); for two classes this is twice the one-column form.
///
/// # Errors
/// See the [module](crate::metrics#errors).
pub fn brier(probs: &Tensor, labels: &Tensor) -> Result<f64> {
    let (p, y) = check(probs, labels)?;
    let sum: f64 = p
        .rows()
        .zip(&y)
        .flat_map(|(row, &y)| row.iter().enumerate().map(move |(c, p)| (p - f64::from(u8::from(c == y))).powi(2)))
        .sum();
    Ok(sum / y.len() as f64)
}

/// Entropy of each prediction in nats, `Hₙ = -Σ_c pₙ(c) ln pₙ(c)`, with 0 ln 0 = 0: between 0 and ln C.
///
/// The result is `[N]` on the device of `probs`, f64 if `probs` is f64 and f32 otherwise, without a graph.
///
/// # Errors
/// See the [module](crate::metrics#errors).
pub fn entropy(probs: &Tensor) -> Result<Tensor> {
    let p = Probabilities::read(probs)?;
    // Probabilities may lie slightly below zero, by the tolerance, where ln would give a NaN.
    let term = |&p: &f64| if p > 0.0 { -p * p.ln() } else { 0.0 };
    // A row that sums to a little more than one would otherwise end below zero.
    let values: Vec<f64> = p.rows().map(|row| row.iter().map(term).sum::<f64>().max(0.0)).collect();
    let kind = if probs.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
    Ok(Tensor::from_slice(&values).f_to_kind(kind)?.f_to_device(probs.device())?)
}

/// As [`entropy`], of rows that are divided by their sums, and in f64: for differences of entropies.
pub(crate) fn entropy_in_f64(probs: &Tensor) -> Result<Tensor> {
    let p = Probabilities::read(probs)?;
    let of_row = |row: &[f64]| {
        let sum: f64 = row.iter().sum();
        row.iter().map(|p| p / sum).filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum::<f64>()
    };
    Ok(Tensor::from_slice(&p.rows().map(of_row).collect::<Vec<_>>()).f_to_device(probs.device())?)
}
