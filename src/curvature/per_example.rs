//! g = ∇L and c = (1/B) Σᵢ (∇ℓᵢ)² from one backward pass through tapped layers.
//!
//! L = (1/B) Σᵢ ℓᵢ is a mean, so δᵢ = ∂L/∂zᵢ is (1/B) ∂ℓᵢ/∂zᵢ, and what a layer's rule makes of δᵢ is G̃ᵢ = ∇ℓᵢ/B.
//! Hence
//!
//! ```text
//! g = Σᵢ G̃ᵢ,    c = (1/B) Σᵢ (B G̃ᵢ)² = B Σᵢ G̃ᵢ²
//! ```
//!
//! A parameter that several layer calls use (tied weights, a layer applied twice) has G̃ᵢ = the sum over its uses,
//! taken before squaring.

use super::parameter::{CHUNK_ELEMENTS, Parameter, accumulation_kind};
use super::same_examples;
use super::squares::add;
use super::tapped::{PerParameter, Tapped, by_example, common_batch, unexplained};
use crate::gradient::examples;
use crate::nn::tape::Tape;
use crate::{Error, Result};
use tch::{Tensor, no_grad_guard};

const OR_LOSSES: &str = "return the [B] per-example losses from the closure instead of their mean (slower: B backward \
                         passes for the parameters concerned)";
const LAYERS: &str = "either build the model from the layers of `tch_blr::nn`, with the batch as leading dimension, or";

/// What a backward pass gives per parameter; `None` where the loss does not depend on the parameter.
#[derive(Debug)]
pub(crate) struct PerExample {
    /// g, in the kind of the parameter.
    pub gradient: PerParameter,
    /// c, f64 for parameters in f64 and f32 for all others.
    pub squares: PerParameter,
    /// Whether the check found a parameter that is used outside the tapped layers too, or whose rows do not belong to
    /// one example each, so that a later call without the check would give wrong squares for it.
    pub mixed: bool,
    /// B; 0 if the loss depends on none of the parameters and came without per-example losses.
    #[cfg_attr(not(test), allow(dead_code))]
    pub batch: i64,
}

/// g = ∇L and c = (1/B) Σᵢ (∇ℓᵢ)² of L = (1/B) Σᵢ ℓᵢ.
///
/// * `loss`: L, 0-dim, with its graph, computed inside a recording.
/// * `losses`: ℓ `[B]`, of which `loss` is the mean, if the closure returned them. They allow parameters that are not
///   tapped, at the price of B backward passes for those.
/// * `params`: name and leaf of each parameter; all require gradients.
/// * `check`: compare Σᵢ G̃ᵢ with g, which differ where a parameter is also used outside the tapped layers, and ask
///   whether the [same examples](same_examples) are in the rows of all calls. It costs about as much as the squares do
///   and reads values back from the device; once per model is enough, unless the result is [`PerExample::mixed`].
///
/// Without `losses` and `check`, one backward pass and the graph is freed. Call with gradients enabled.
///
/// # Errors
/// [`Error::PerExample`] if, without `losses`, a parameter is used outside the tapped layers, B is ambiguous, or the
/// rows of a layer are not known to belong to one example each; [`Error::Loss`] for a loss of another shape or without a
/// graph.
pub(crate) fn per_example(
    loss: &Tensor,
    losses: Option<&Tensor>,
    tape: &Tape,
    params: &[(&str, &Tensor)],
    check: bool,
) -> Result<PerExample> {
    in_chunks(CHUNK_ELEMENTS, loss, losses, tape, params, check)
}

fn in_chunks(
    elements: i64,
    loss: &Tensor,
    losses: Option<&Tensor>,
    tape: &Tape,
    params: &[(&str, &Tensor)],
    check: bool,
) -> Result<PerExample> {
    let given = validate(loss, losses)?;
    let mut tapped = Tapped::new(tape, params)?;
    tapped.elements = elements;
    let (gradient, deltas) = tapped.differentiate(loss, &tapped.leaves(), check || losses.is_some())?;
    let used: Vec<usize> = (0..gradient.len()).filter(|&p| gradient[p].is_some()).collect();
    let batch = if let Some(batch) = given {
        // Also where its layers have other rows: one example is the one number that can mean something else.
        examples(losses, deltas.values().map(|delta| delta.size()[0]).max().unwrap_or(batch))?;
        batch
    } else {
        // Asked for their leading dimensions only; the number of examples follows from them.
        let each = tapped.parameters(&deltas, 1);
        if let Some(&p) = used.iter().find(|&&p| !each[p].is_used()) {
            // A layer of ours all the same, but one that does not record.
            if gradient[p].as_ref().is_some_and(Tensor::is_sparse) {
                return Err(Error::PerExample(format!(
                    "the gradient of parameter `{}` is sparse, as that of an embedding with `sparse: true`, and its \
                     layer does not record then; make it with `sparse: false`, or {OR_LOSSES}",
                    params[p].0
                )));
            }
            return Err(Error::PerExample(format!(
                "the loss depends on parameter `{}`, but not through a tapped layer, so that its per-example gradients \
                 are unknown; {LAYERS} {OR_LOSSES}",
                params[p].0
            )));
        }
        common_batch(used.iter().map(|&p| (params[p].0, &each[p])), &format!(", or {OR_LOSSES}"))?
    };
    let parameters = tapped.parameters(&deltas, batch);
    let guard = no_grad_guard();
    let mut squares: PerParameter = params.iter().map(|_| None).collect();
    for &p in &used {
        let parameter: &Parameter = &parameters[p];
        // With given losses B is certain, and a layer with other rows is left to the loop below.
        if parameter.is_used() && parameter.batches().all(|b| b == batch) {
            squares[p] = Some(parameter.squares()?);
        }
    }
    let mut untapped: Vec<usize> = used.into_iter().filter(|&p| squares[p].is_none()).collect();
    let mut mixed = false;
    if check {
        // Reads from the device, so callers ask for it only once.
        let scales = parameters.iter().zip(&squares).map(|(p, c)| c.as_ref().map(|c| p.scale(c)).transpose());
        untapped = unexplained(&parameters, &gradient, &scales.collect::<Result<Vec<_>>>()?)?;
        let first = untapped.iter().find(|&&p| squares[p].is_some());
        mixed = first.is_some();
        if let (Some(&p), None) = (first, losses) {
            return Err(Error::PerExample(format!(
                "parameter `{}` is used by tapped layers and outside of them too, so that its per-example gradients \
                 are unknown; {LAYERS} {OR_LOSSES}",
                params[p].0
            )));
        }
        let explained: Vec<usize> =
            (0..params.len()).filter(|p| squares[*p].is_some() && !untapped.contains(p)).collect();
        let strangers = same_examples::unknown(&tapped, loss, losses, &deltas, explained)?;
        if let (Some(&p), None) = (strangers.first(), losses) {
            return Err(same_examples::refused(params[p].0, &format!("; if it is one set, {OR_LOSSES}")));
        }
        mixed |= !strangers.is_empty();
        untapped.extend(strangers);
    }
    drop(guard);
    if let Some(losses) = losses {
        one_by_one(losses, params, &untapped, &mut squares)?;
    }
    Ok(PerExample { gradient, squares, mixed, batch })
}

/// The number of per-example losses, if they are given.
fn validate(loss: &Tensor, losses: Option<&Tensor>) -> Result<Option<i64>> {
    if !loss.size().is_empty() || !loss.requires_grad() {
        return Err(Error::Loss(format!("expected a 0-dim mean loss with a graph; its shape is {:?}", loss.size())));
    }
    let Some(losses) = losses else { return Ok(None) };
    match losses.size()[..] {
        [batch] if batch > 0 && losses.requires_grad() => Ok(Some(batch)),
        _ => Err(Error::Loss(format!(
            "expected [B] per-example losses with a graph; their shape is {:?}",
            losses.size()
        ))),
    }
}

/// c of the parameters `which` by a backward pass for every example.
fn one_by_one(losses: &Tensor, params: &[(&str, &Tensor)], which: &[usize], squares: &mut PerParameter) -> Result<()> {
    let leaves: Vec<&Tensor> = which.iter().map(|&p| params[p].1).collect();
    let batch = losses.size()[0];
    for (&p, leaf) in which.iter().zip(&leaves) {
        squares[p] = Some(Tensor::f_zeros(leaf.size(), (accumulation_kind(leaf.kind()), leaf.device()))?);
    }
    by_example(losses, 0..batch, &leaves, |_, k, g| add(&mut squares[which[k]], g.f_square()?))?;
    for &p in which {
        squares[p] = squares[p].take().map(|mut sum| sum.f_div_scalar_(batch as f64)).transpose()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
