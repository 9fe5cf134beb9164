//! How far a merge is from what joint training would find: what needs the model and its loss, not only tensors.

use super::Tensors;
use crate::gradient::IntoTensor;
use crate::params::{Buffers, Leaf, Perturbed};
use crate::posterior::in_model;
use crate::{Error, Params, Result, check};
use tch::{Kind, Tensor};

/// Puts weights into a model; dropping the guard brings back the old ones.
pub(super) fn enter(params: &Params, weights: &Tensors) -> Result<Perturbed> {
    if let Some(leaf) =
        params.leaves().iter().find(|l| l.trainable() && !l.names.iter().any(|n| weights.contains_key(n)))
    {
        return Err(Error::parameter(leaf.name(), "the model has it, but the weights to be tried do not"));
    }
    // The weights may also hold buffers, which the parameters do not list.
    let known = weights.iter().filter(|(name, _)| params.find(name).is_some_and(Leaf::trainable));
    let values = known.map(|(name, t)| (name.clone(), t.detach().copy()));
    Perturbed::enter(in_model(params, values)?)
}

fn value<L: IntoTensor>(params: &Params, loss: &mut dyn FnMut() -> L) -> Result<f64> {
    let _no_grad = tch::no_grad_guard();
    let loss = Buffers::unmoved(params, || loss().into_tensor())?;
    if !loss.defined() || loss.numel() != 1 {
        return Err(Error::Loss("expected one number".to_owned()));
    }
    Ok(loss.double_value(&[]))
}

fn gradient<L: IntoTensor>(params: &Params, weights: &Tensors, loss: &mut dyn FnMut() -> L) -> Result<Vec<Tensor>> {
    let _guard = enter(params, weights)?;
    let variables: Vec<&Tensor> = params.leaves().iter().filter(|l| l.trainable()).map(|l| &l.tensor).collect();
    // Whatever the caller has set: this needs a graph.
    let loss = Buffers::unmoved(params, || tch::with_grad(|| loss().into_tensor()))?;
    if !loss.defined() || loss.numel() != 1 || !loss.requires_grad() {
        return Err(Error::Loss("expected one number with a graph back to the weights".to_owned()));
    }
    // While the guard lives: libtorch refuses the graph once the weights were put back.
    let gradients = Tensor::f_run_backward(&[loss], &variables, false, false)?;
    // A head of another model: the loss does not depend on it, and is flat there.
    let own = |(g, v): (&Tensor, &Tensor)| if g.defined() { g.detach().copy() } else { v.detach().zeros_like() };
    let gradients: Vec<Tensor> = gradients.iter().zip(variables).map(own).collect();
    Ok(gradients)
}

/// ‖∇L_t(θ_merged) - ∇L_t(θ_t)‖₂ for every model t, over all parameters: what task arithmetic neglects and gradient
/// matching makes small, in units of the loss. Afterwards the model's variables have their old values.
///
/// `models` are the weights θ_t, each with a closure that computes L_t from the variables of `params`. For the mismatch
/// of summed losses, let the closures sum over the data.
///
/// # Errors
/// Weights that do not belong to the model; a loss that is not one number with a graph to the weights; an error of
/// a closure, or batch normalization in training mode.
pub fn gradient_mismatch<L: IntoTensor>(
    params: impl Into<Params>,
    merged: &Tensors,
    models: &mut [(&Tensors, &mut dyn FnMut() -> L)],
) -> Result<Vec<f64>> {
    let params = Params::separate(params)?;
    let each = models.iter_mut().map(|(weights, loss)| {
        let (at_merged, at_own) = (gradient(&params, merged, loss)?, gradient(&params, weights, loss)?);
        let _no_grad = tch::no_grad_guard();
        let squares = at_merged.iter().zip(&at_own).map(|(a, b)| {
            let d = a.to_kind(Kind::Double) - b.to_kind(Kind::Double);
            d.square().sum(Kind::Double).double_value(&[])
        });
        Ok(squares.sum::<f64>().sqrt())
    });
    each.collect()
}

/// Losses along the straight line (1-t) a + t b.
#[derive(Debug, Clone, PartialEq)]
pub struct Barrier {
    /// t from 0 to 1 in equal steps.
    pub t: Vec<f64>,
    /// The loss at each.
    pub loss: Vec<f64>,
    /// The largest of loss(t) - [(1-t) loss(0) + t loss(1)], which is at least 0.
    pub height: f64,
}

/// The loss at `points` ≥ 2 weights on the straight line from `a` to `b`, both ends included, and how far it rises
/// above the line between the losses at the ends. Two fine-tunes without a barrier between them can be averaged.
/// Afterwards the model's variables have their old values.
///
/// # Errors
/// Fewer than 2 points; weights that do not belong to the model; a loss that is not one number; an error of the
/// closure.
pub fn barrier<L: IntoTensor>(
    params: impl Into<Params>,
    a: &Tensors,
    b: &Tensors,
    points: usize,
    mut loss: impl FnMut() -> L,
) -> Result<Barrier> {
    check::that("points", points, points >= 2, "at least 2")?;
    let params = Params::separate(params)?;
    // Fails before anything is computed if one of the two does not fit.
    for end in [a, b] {
        drop(enter(&params, end)?);
    }
    let t: Vec<f64> = (0..points).map(|i| i as f64 / (points - 1) as f64).collect();
    let mut losses = Vec::with_capacity(points);
    for &t in &t {
        let between = {
            let _no_grad = tch::no_grad_guard();
            let line = a.iter().filter(|(name, _)| params.find(name).is_some());
            let point = |(name, a): (&String, &Tensor)| b.get(name).map(|b| (name.clone(), a * (1.0 - t) + b * t));
            line.filter_map(point).collect::<Tensors>()
        };
        let _guard = enter(&params, &between)?;
        losses.push(value(&params, &mut loss)?);
    }
    let (first, last) = (losses[0], losses[points - 1]);
    let above = t.iter().zip(&losses).map(|(t, loss)| loss - ((1.0 - t) * first + t * last));
    // `f64::max` drops a NaN, which has to show.
    let height = above.fold(0.0, |highest: f64, x| if x.is_nan() { x } else { highest.max(x) });
    Ok(Barrier { t, loss: losses, height })
}
