//! Second derivatives of the loss within blocks of parameters, by differentiating the gradient once more.
//!
//! Curvature that comes from layers that record is in [`crate::curvature`].

use crate::{Result, Statistic};
use tch::{Kind, Tensor};

/// The gradient per parameter (`None` where the loss does not depend on it), and second derivatives within each block.
pub(super) struct Derivatives {
    /// In the order of the blocks' parameters.
    pub gradient: Vec<Option<Tensor>>,
    /// Per block one of `[n, n]` or `[n]`, the block's parameters one after the other.
    pub second: Vec<Vec<Tensor>>,
}

/// `blocks`: the parameters of each block; `probe(b, p)`: the p-th vector of random signs `[n]` for block b.
pub(super) fn differentiate(
    loss: &Tensor,
    blocks: &[Vec<&Tensor>],
    statistic: Statistic,
    probe: impl Fn(usize, usize) -> Result<Tensor>,
) -> Result<Derivatives> {
    let all: Vec<&Tensor> = blocks.iter().flatten().copied().collect();
    // The gradient is to be differentiated in turn, so it needs a graph of its own.
    let found = Tensor::f_run_backward(&[loss], &all, true, true)?;
    let mut rest = found.iter();
    let mut second = Vec::with_capacity(blocks.len());
    for (b, block) in blocks.iter().enumerate() {
        let gradient = flat(block, &rest.by_ref().take(block.len()).collect::<Vec<_>>())?;
        // ∇²L v; zero where the gradient is a constant.
        let product = |x: Tensor| -> Result<Tensor> {
            if !x.requires_grad() {
                return Ok(gradient.zeros_like());
            }
            // Kept: the next row or probe goes through the same graph.
            flat(block, &Tensor::f_run_backward(&[x], block, true, false)?.iter().collect::<Vec<_>>())
        };
        let n = gradient.size()[0];
        let rows = || (0..n).map(|i| product(gradient.f_get(i)?));
        let empty = || gradient.detach().zeros_like();
        second.push(vec![match statistic {
            // `stack` refuses an empty list.
            Statistic::Hessian if n == 0 => empty().f_reshape([0, 0])?,
            Statistic::Hessian => {
                let h = Tensor::f_stack(&rows().collect::<Result<Vec<_>>>()?, 0)?;
                // Symmetric except for rounding; a Cholesky factorization would read only one half of it.
                (&h + h.tr()) * 0.5
            }
            Statistic::Hutchinson { probes } => {
                let mut sum = empty();
                for p in 0..probes {
                    let v = probe(b, p)?.to_kind(gradient.kind());
                    sum += product((&gradient * &v).f_sum(None::<Kind>)?)? * v;
                }
                sum / probes as f64
            }
            _ if n == 0 => empty(),
            _ => {
                // A backward pass gives a whole row, and there is no cheaper way to one element of it.
                let diagonal = rows().enumerate().map(|(i, row)| Ok(row?.f_get(i as i64)?));
                Tensor::f_stack(&diagonal.collect::<Result<Vec<_>>>()?, 0)?
            }
        }]);
    }
    // Detached, or the graph of the second derivatives would live as long as the gradient.
    let gradient = found.into_iter().map(|g| g.defined().then(|| g.detach())).collect();
    Ok(Derivatives { gradient, second })
}

/// One vector, with zeros where the loss does not depend on a parameter.
fn flat(block: &[&Tensor], found: &[&Tensor]) -> Result<Tensor> {
    let parts = block.iter().zip(found).map(|(p, g)| {
        if !g.defined() {
            return Ok(Tensor::f_zeros([p.numel() as i64], (p.kind(), p.device()))?);
        }
        let g = if g.is_sparse() { g.f_to_dense(None, false)? } else { g.shallow_clone() };
        Ok(g.f_reshape([-1])?)
    });
    Ok(Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
}
