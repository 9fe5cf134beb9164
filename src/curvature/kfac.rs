//! Kronecker factors of the Fisher information of layers that multiply their input by a weight.
//!
//! At position t of example i a layer computes zᵢₜ = W aᵢₜ, and with δᵢₜ = ∂ℓᵢ/∂zᵢₜ the gradient of ℓᵢ is Σₜ δᵢₜ aᵢₜᵀ.
//! With inputs and derivatives treated as independent, and different positions as uncorrelated (Martens and Grosse
//! 2015; Grosse and Martens 2016 for convolutions), the Fisher information Σᵢ wᵢ vec(Gᵢ) vec(Gᵢ)ᵀ is
//!
//! ```text
//! G ⊗ A,    A = (Σᵢₜ wᵢ aᵢₜ aᵢₜᵀ) / W,    G = (Σᵢₜ wᵢ δᵢₜ δᵢₜᵀ) W / Σᵢₜ wᵢ,    W = Σᵢ wᵢ
//! ```
//!
//! where wᵢ is the weight of ℓᵢ in the loss: 1/B in a mean, so that A is (1/B) Σ aaᵀ, and G the mean of δδᵀ over the
//! positions of B examples. A bias is the weight of the input 1. A parameter that several layer calls use has the
//! positions of all of them.

use super::factors::Factors;
use super::linearized::along;
use super::noted::{self, Parts};
use super::same_examples;
use super::tapped::{Deltas, PerParameter, Tapped, common_batch, unexplained};
use crate::gradient::examples;
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

/// * `loss`: L, 0-dim, computed inside a recording; `losses`: `[N]`, of which it is the mean, if the closure returned
///   them.
/// * `params`: name and leaf of each parameter; all require gradients.
/// * `vectors(i, output)`: vectors s, each in the shape of output i of the model, with Σ ssᵀ (or its mean) the Fisher
///   information of an example's likelihood there; δ then belongs to the losses sᵢᵀzᵢ instead of ℓᵢ.
/// * `check`: whether to make sure that the gradient comes from the tapped layers alone.
///
/// # Errors
/// A parameter that is used in another way than by `linear` and `conv2d` of [`crate::nn`]; without `vectors`, a number
/// of examples that is ambiguous; with them, a loss that does not come from [`crate::nn`].
pub(crate) fn kfac(
    loss: &Tensor,
    losses: Option<&Tensor>,
    tape: &Tape,
    params: &[(&str, &Tensor)],
    check: bool,
    vectors: Option<impl Fn(usize, &Outputs) -> Result<Vec<Tensor>>>,
) -> Result<Kfac> {
    let tapped = Tapped::new(tape, params)?;
    let mut inputs = tapped.leaves();
    if vectors.is_some() {
        inputs.extend(noted::losses(tape)?);
    }
    let (mut gradient, deltas) = tapped.differentiate(loss, &inputs, vectors.is_some() || check)?;
    let weights = gradient.split_off(params.len());
    // The number of examples is not known yet; 1 stands for it while the layers are asked.
    let parameters = tapped.parameters(&deltas, 1);
    for ((&(name, _), parameter), _) in params.iter().zip(&parameters).zip(&gradient).filter(|(_, g)| g.is_some()) {
        if !parameter.is_used() || parameter.uses.iter().any(|u| u.rule.matrix().is_none()) {
            return Err(unknown(name));
        }
    }
    if check {
        let _no_grad = tch::no_grad_guard();
        let scales = parameters.iter().zip(&gradient).map(|(p, g)| g.as_ref().map(|_| p.scale_apart()).transpose());
        if let Some(&p) = unexplained(&parameters, &gradient, &scales.collect::<Result<Vec<_>>>()?)?.first() {
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
    let found = match vectors {
        None => observed([Some(loss).filter(|_| check), losses], &tapped, &deltas, factors)?,
        Some(vectors) => expected(&tapped, &deltas, &Parts::new(tape, weights)?, vectors, factors)?,
    };
    let sides = found.into_iter().zip(params);
    let factors = sides.map(|(found, (_, tensor))| found.map(|[g, a]| if tensor.dim() < 2 { [a, g] } else { [g, a] }));
    Ok(Kfac { gradient, factors: factors.collect() })
}

/// G and A from the labels of the data, with δ that of the loss itself, which is given if its rows are to be checked.
fn observed(
    [loss, losses]: [Option<&Tensor>; 2],
    tapped: &Tapped,
    deltas: &Deltas,
    mut all: Vec<Option<Factors>>,
) -> Result<Vec<Option<[Tensor; 2]>>> {
    let parameters = tapped.parameters(deltas, 1);
    let batch = common_batch(tapped.params.iter().map(|(name, _)| *name).zip(&parameters), "")?.max(1);
    let examples = examples(losses, batch)?;
    let strangers = loss.map(|loss| same_examples::unknown(tapped, loss, losses, deltas, 0..parameters.len()));
    if let Some(&p) = strangers.transpose()?.unwrap_or_default().first() {
        return Err(same_examples::refused(tapped.params[p].0, ""));
    }
    for (factors, parameter) in all.iter_mut().zip(&parameters) {
        if let Some(factors) = factors {
            factors.add_inputs(parameter, None)?;
            factors.add_outputs(parameter)?;
        }
    }
    let _no_grad = tch::no_grad_guard();
    // δ of the mean loss is that of an example divided by their number.
    let scale = (examples * batch) as f64;
    Ok(all
        .into_iter()
        .map(|f| f.map(|f| [f.outputs * (scale / f.positions.max(1.0)), f.inputs / batch as f64]))
        .collect())
}

/// G and A from vectors on the outputs, with the weights that these have in the loss.
fn expected(
    tapped: &Tapped,
    deltas: &Deltas,
    Parts { parts, .. }: &Parts,
    vectors: impl Fn(usize, &Outputs) -> Result<Vec<Tensor>>,
    mut all: Vec<Option<Factors>>,
) -> Result<Vec<Option<[Tensor; 2]>>> {
    // W of each parameter, over the outputs that depend on it.
    let mut totals = vec![0.0; all.len()];
    for (i, part) in parts.iter().enumerate() {
        for (c, s) in vectors(i, part.output)?.iter().enumerate() {
            // Of no leaf: the gradient is known, and only δ is wanted. The graph stays for the next vector.
            let sum = along(&part.output.z, &part.weighted(s)?)?.sum;
            let (_, deltas) = tapped.differentiate(&sum, &[], true)?;
            for ((factors, parameter), total) in all.iter_mut().zip(tapped.parameters(&deltas, 1)).zip(&mut totals) {
                let Some(factors) = factors.as_mut().filter(|_| parameter.is_used()) else { continue };
                // The inputs are the same in every column and count once.
                if c == 0 {
                    factors.add_inputs(&parameter, Some(part))?;
                    *total += part.total;
                }
                factors.add_outputs(&parameter)?;
            }
        }
    }
    let parameters = tapped.parameters(deltas, 1);
    for ((factors, parameter), total) in all.iter_mut().zip(&parameters).zip(&mut totals) {
        if let Some(factors) = factors.as_mut().filter(|_| *total == 0.0) {
            // G is zero, as it should be; A must not fall with it, because a product of two means would fall twice.
            factors.add_inputs(parameter, None)?;
            *total = parameter.batches().next().unwrap_or(1).max(1) as f64;
        }
    }
    let _no_grad = tch::no_grad_guard();
    let mean = |(f, total): (Option<Factors>, f64)| f.map(|f| [f.outputs * (total / f.positions), f.inputs / total]);
    Ok(all.into_iter().zip(totals).map(mean).collect())
}

fn unknown(name: &str) -> Error {
    let problem = "the loss depends on it in another way than as the weight or bias of `linear` or ungrouped `conv2d` \
                   of `tch_blr::nn`, so that it has no Kronecker factors; build the model from these layers, or freeze \
                   it";
    Error::parameter(name, problem)
}
