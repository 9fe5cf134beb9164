//! Whether the rows of the layer calls belong together: row i of every call to example i, and to no other.
//!
//! Per-example gradients need it, since they add up over the calls of a layer before they are squared, and no sum tells:
//! a memory that is passed through the model beside a batch of the same size has the right gradient, and the squares of
//! sums over strangers. So the graph is asked, by a backward pass or a few; once per model, as other checks of this
//! kind.

use super::tapped::{Deltas, PerParameter, Tapped};
use crate::{Error, Result};
use tch::{Kind, Tensor, no_grad_guard};

/// The rows of a batch in two parts: without a pattern, so that no arrangement of examples maps each on itself.
struct Halves {
    one: Tensor,
    other: Tensor,
}

impl Halves {
    fn of(rows: i64, like: &Tensor) -> Result<Self> {
        let _no_grad = no_grad_guard();
        let in_one = Tensor::f_arange(rows, (Kind::Double, like.device()))?.f_mul_scalar(2.4)?.f_cos()?.f_gt(0.0)?;
        let rows = |of: &Tensor| Ok::<_, Error>(of.f_nonzero()?.f_reshape([-1])?);
        Ok(Halves { one: rows(&in_one)?, other: rows(&in_one.f_logical_not()?)? })
    }

    fn rows(&self) -> i64 {
        self.one.size()[0] + self.other.size()[0]
    }

    /// Whether derivatives of what belongs to one half are zero in the rows of the other.
    fn are_separate(&self, derivatives: &Tensor) -> Result<bool> {
        let _no_grad = no_grad_guard();
        let outside = derivatives.f_index_select(0, &self.other)?;
        Ok(outside.f_ne(0.0)?.f_any()?.int64_value(&[]) == 0)
    }

    /// Σ x over the rows of one half, with its graph.
    fn sum(&self, x: &Tensor) -> Result<Tensor> {
        tch::with_grad(|| Ok(x.f_index_select(0, &self.one)?.f_sum(None::<Kind>)?))
    }
}

/// The parameters `among` whose layers have rows of which that is not known. The graph of the loss must have been kept.
///
/// * With losses `[B]`, and layers of as many rows: exactly, from what the losses of half of the examples depend on.
/// * Without them, only where a layer was called more than once: two calls belong together if the outputs of one depend
///   on those of the other (a recurrent net, tied layers), or ∂L/∂z of the one on z of the other (two views of an example
///   that are compared), and row i on row i alone. In a sum of two losses neither is so. A loss that is linear in both
///   calls looks like one; then the losses `[B]` are needed.
pub(super) fn unknown(
    tapped: &Tapped,
    loss: &Tensor,
    losses: Option<&Tensor>,
    deltas: &Deltas,
    among: impl IntoIterator<Item = usize>,
) -> Result<Vec<usize>> {
    let of_half = losses.map(|losses| {
        let halves = Halves::of(losses.size()[0], losses)?;
        let (_, deltas) = tapped.differentiate(&halves.sum(losses)?, &[], true)?;
        Ok::<_, Error>((halves, deltas))
    });
    let of_half = of_half.transpose()?;
    let mut found = Vec::new();
    let mut known: Vec<(Vec<usize>, bool)> = Vec::new();
    for p in among {
        let calls = tapped.uses(p).iter().map(|(tap, _)| *tap).filter(|tap| deltas.contains_key(tap));
        let taps: Vec<usize> = calls.collect();
        let Some(&last) = taps.last() else { continue };
        let rows = tapped.output(last).size()[0];
        let together = if let Some((halves, of_half)) = of_half.as_ref().filter(|(halves, _)| halves.rows() == rows) {
            let separate = taps.iter().map(|tap| of_half.get(tap).map_or(Ok(true), |d| halves.are_separate(d)));
            separate.collect::<Result<Vec<_>>>()?.into_iter().all(|separate| separate)
        } else if let Some((_, together)) = known.iter().find(|(others, _)| *others == taps) {
            // A weight and its bias.
            *together
        } else {
            let together = are_together(tapped, loss, &taps)?;
            known.push((taps, together));
            together
        };
        if !together {
            found.push(p);
        }
    }
    Ok(found)
}

/// Whether the calls hang together, one with another, by z or by ∂L/∂z.
fn are_together(tapped: &Tapped, loss: &Tensor, taps: &[usize]) -> Result<bool> {
    let outputs: Vec<&Tensor> = taps.iter().map(|tap| tapped.output(*tap)).collect();
    let halves = Halves::of(outputs[0].size()[0], outputs[0])?;
    let last = outputs.len() - 1;
    let mut strangers: Vec<usize> = (0..last).collect();
    // Those that are known to belong to the last, and were not asked yet.
    let mut next = vec![last];
    let mut slopes: Option<PerParameter> = None;
    while let Some(k) = next.pop() {
        for by_slope in [false, true] {
            if strangers.is_empty() {
                return Ok(true);
            }
            if by_slope && slopes.is_none() {
                slopes = Some(with_graph(loss, &outputs));
            }
            let from = if by_slope { slopes.as_ref().and_then(|all| all[k].as_ref()) } else { Some(outputs[k]) };
            let Some(from) = from.filter(|x| x.requires_grad()) else { continue };
            let inputs: Vec<&Tensor> = strangers.iter().map(|&j| outputs[j]).collect();
            let Ok(reached) = Tensor::f_run_backward(&[halves.sum(from)?], &inputs, true, false) else { continue };
            for (j, d) in std::mem::take(&mut strangers).into_iter().zip(reached) {
                if !d.defined() {
                    strangers.push(j);
                } else if halves.are_separate(&d)? {
                    next.push(j);
                } else {
                    return Ok(false);
                }
            }
        }
    }
    Ok(strangers.is_empty())
}

/// ∂L/∂z with graphs of their own; none if an operation on the way cannot be differentiated twice, which then tells
/// nothing.
fn with_graph(loss: &Tensor, outputs: &[&Tensor]) -> PerParameter {
    match Tensor::f_run_backward(&[loss], outputs, true, true) {
        Ok(found) => found.into_iter().map(|g| g.defined().then_some(g)).collect(),
        Err(_) => outputs.iter().map(|_| None).collect(),
    }
}

/// The error for a parameter among them; `or_else`: the way out, if there is one more.
pub(super) fn refused(name: &str, or_else: &str) -> Error {
    Error::PerExample(format!(
        "row i of the layers that use parameter `{name}` is not known to belong to example i alone, so that its \
         per-example gradients are unknown: they were called for two sets of examples (a memory beside the batch has \
         examples of its own), or the loss of one example depends on the rows of others; for several sets of examples \
         take Labels::Exact and the losses of `tch_blr::nn`, which follow each set by itself, or a row without \
         per-example gradients, as Ivon{or_else}"
    ))
}
