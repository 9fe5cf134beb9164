//! Kronecker factors of the Fisher information of layers that multiply their input by a weight.
//!
//! At position t of example i a layer computes zᵢₜ = W aᵢₜ, and with δᵢₜ = ∂ℓᵢ/∂zᵢₜ the gradient of ℓᵢ is Σₜ δᵢₜ aᵢₜᵀ.
//! With inputs and derivatives taken for independent, and different positions for uncorrelated (Martens and Grosse
//! 2015; Grosse and Martens 2016 for convolutions), the Fisher information (1/B) Σᵢ vec(Gᵢ) vec(Gᵢ)ᵀ is
//!
//! ```text
//! G ⊗ A,    A = (1/B) Σᵢₜ aᵢₜ aᵢₜᵀ,    G = (1/n) Σᵢₜ δᵢₜ δᵢₜᵀ
//! ```
//!
//! for n positions of B examples together. A bias is the weight of the input 1. A parameter that several layer calls
//! use has the positions of all of them.

use super::factors::Factors;
use super::ggn::outputs;
use super::linearized::along;
use super::parameter::Parameter;
use super::tapped::{PerParameter, Tapped, common_batch, unexplained};
use crate::likelihood::Outputs;
use crate::linalg::matrix_shape;
use crate::nn::tape::Tape;
use crate::{Error, Result};
use tch::Tensor;

/// What the backward passes give per parameter; `None` where the loss does not depend on it.
#[derive(Debug)]
pub(crate) struct Kfac {
    /// ∇L, in the kind of the parameter.
    pub gradient: PerParameter,
    /// The factors of the rows and of the columns of the parameter as a matrix: G and A of a weight, A and G of a bias.
    /// f64 for parameters in f64 and f32 for all others.
    pub factors: Vec<Option<[Tensor; 2]>>,
}

/// * `loss`: L, the mean over the examples, computed inside a recording.
/// * `params`: name and leaf of each parameter; all require gradients.
/// * `vectors(i, output)`: vectors s, each in the shape of output i of the model, with Σ ssᵀ (or its mean) the Fisher
///   information of an example's likelihood there; δ then belongs to the losses sᵢᵀzᵢ instead of ℓᵢ.
/// * `check`: whether to make sure that the gradient is that of the tapped layers alone.
///
/// # Errors
/// A parameter that is used otherwise than by `linear` and `conv2d` of [`crate::nn`], or a number of examples that is
/// ambiguous; with `vectors`, a loss that is none of [`crate::nn`]'s.
pub(crate) fn kfac(
    loss: &Tensor,
    tape: &Tape,
    params: &[(&str, &Tensor)],
    check: bool,
    vectors: Option<impl Fn(usize, &Outputs) -> Result<Vec<Tensor>>>,
) -> Result<Kfac> {
    let tapped = Tapped::new(tape, params)?;
    let (gradient, deltas) = tapped.differentiate(loss, &tapped.leaves(), vectors.is_some())?;
    let each = tapped.parameters(&deltas, 1);
    let batch = common_batch(params.iter().map(|(name, _)| *name).zip(&each), "")?.max(1);
    let parameters = tapped.parameters(&deltas, batch);
    for ((&(name, _), parameter), _) in params.iter().zip(&parameters).zip(&gradient).filter(|(_, g)| g.is_some()) {
        if !parameter.is_used() || parameter.uses.iter().any(|u| u.rule.matrix().is_none()) {
            return Err(unknown(name));
        }
    }
    if check {
        let _no_grad = tch::no_grad_guard();
        let squares = parameters.iter().zip(&gradient).map(|(p, g)| g.as_ref().map(|_| p.squares()).transpose());
        if let Some(&p) = unexplained(&parameters, &gradient, &squares.collect::<Result<PerParameter>>()?)?.first() {
            return Err(unknown(params[p].0));
        }
    }

    let mut factors: Vec<Option<Factors>> = Vec::with_capacity(params.len());
    for (&(_, tensor), g) in params.iter().zip(&gradient) {
        let [rows, columns] = matrix_shape(&tensor.size());
        // A bias is the row [1, n], and as a layer's weight [n, 1].
        let sides = if tensor.dim() < 2 { [columns, rows] } else { [rows, columns] };
        factors.push(g.as_ref().map(|_| Factors::zeros(tensor, sides, None)).transpose()?);
    }
    // δ of the mean loss is that of example i divided by B.
    let scale = if vectors.is_some() { 1.0 } else { (batch * batch) as f64 };
    let mut add = |parameters: &[Parameter], inputs: bool, outputs: bool| {
        for (factors, parameter) in factors.iter_mut().zip(parameters) {
            if let Some(factors) = factors {
                factors.add(parameter, inputs, outputs)?;
            }
        }
        Ok::<_, Error>(())
    };
    // A is that of the uses that the loss depends on, and the same for all columns.
    add(&parameters, true, vectors.is_none())?;
    if let Some(vectors) = vectors {
        for (i, output) in outputs(tape)?.iter().enumerate() {
            // Where the output has a row for each position of a sequence, the layers count sequences.
            let share = batch as f64 / output.examples() as f64;
            for s in vectors(i, output)? {
                let s = if share == 1.0 { s } else { s * share };
                let (_, deltas) = tapped.differentiate(&along(&output.z, &s)?.sum, &[], true)?;
                add(&tapped.parameters(&deltas, batch), false, true)?;
            }
        }
    }
    let _no_grad = tch::no_grad_guard();
    let factors = factors.into_iter().zip(params).map(|(of, (_, tensor))| {
        let Some(Factors { inputs, outputs, positions, .. }) = of else { return Ok(None) };
        let (a, g) = (inputs / batch as f64, outputs * (scale / positions.max(1) as f64));
        Ok(Some(if tensor.dim() < 2 { [a, g] } else { [g, a] }))
    });
    let factors = factors.collect::<Result<Vec<_>>>()?;
    Ok(Kfac { gradient, factors })
}

fn unknown(name: &str) -> Error {
    let problem = "the loss depends on it otherwise than as the weight or bias of `linear` or ungrouped `conv2d` of \
                   `tch_blr::nn`, so that it has no Kronecker factors; build the model from these layers, or freeze it";
    Error::parameter(name, problem)
}
