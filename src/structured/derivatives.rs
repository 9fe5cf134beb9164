//! Gradients, and second derivatives by differentiating them once more.

use super::SecondDerivatives;
use crate::nn::tape::{Output, Tape};
use crate::posterior::matrix_shape;
use crate::{Labels, Result, curvature};
use tch::{Kind, Tensor};

/// Gradient of a loss with respect to each block's parameters, and second derivatives within each block. Vectors are
/// the block's parameters one after the other, in their own kind.
#[derive(Debug)]
pub(super) struct Derivatives {
    /// `[n]` per block
    pub gradient: Vec<Tensor>,
    /// Per block as asked: nothing, one of `[n, n]` or `[n]`, or the two Kronecker factors.
    pub second: Vec<Vec<Tensor>>,
}

/// `blocks`: the parameters of each block; `probe(b, p)`: the p-th vector of random signs `[n]` for block b.
pub(super) fn differentiate(
    loss: &Tensor,
    blocks: &[Vec<&Tensor>],
    second: SecondDerivatives,
    probe: impl Fn(usize, usize) -> Result<Tensor>,
) -> Result<Derivatives> {
    let all: Vec<&Tensor> = blocks.iter().flatten().copied().collect();
    let twice = second != SecondDerivatives::Unused;
    let found = Tensor::f_run_backward(&[loss], &all, twice, twice)?;
    let mut found = found.into_iter();
    let mut result = Derivatives { gradient: Vec::new(), second: Vec::new() };
    for (b, block) in blocks.iter().enumerate() {
        let gradient = flat(block, &found.by_ref().take(block.len()).collect::<Vec<_>>())?;
        // ∇²L v; zero where the gradient is a constant.
        let product = |x: Tensor| -> Result<Tensor> {
            if !x.requires_grad() {
                return Ok(gradient.zeros_like());
            }
            flat(block, &Tensor::f_run_backward(&[x], block, true, false)?)
        };
        let n = gradient.size()[0];
        let rows = || (0..n).map(|i| product(gradient.f_get(i)?));
        let empty = || gradient.detach().zeros_like();
        result.second.push(match second {
            SecondDerivatives::Unused | SecondDerivatives::Kronecker { .. } => Vec::new(),
            SecondDerivatives::Hessian if n == 0 => vec![empty().f_reshape([0, 0])?],
            SecondDerivatives::Hessian => {
                let h = Tensor::f_stack(&rows().collect::<Result<Vec<_>>>()?, 0)?;
                vec![(&h + h.tr()) * 0.5]
            }
            SecondDerivatives::Diagonal if n == 0 => vec![empty()],
            SecondDerivatives::Diagonal => {
                let diagonal = rows().enumerate().map(|(i, row)| Ok(row?.f_get(i as i64)?));
                vec![Tensor::f_stack(&diagonal.collect::<Result<Vec<_>>>()?, 0)?]
            }
            SecondDerivatives::Hutchinson { probes } => {
                let mut sum = empty();
                for p in 0..probes {
                    let v = probe(b, p)?.to_kind(gradient.kind());
                    sum += product((&gradient * &v).f_sum(None::<Kind>)?)? * v;
                }
                vec![sum / probes as f64]
            }
        });
        result.gradient.push(gradient.detach());
    }
    Ok(result)
}

/// As [`differentiate`], with the Kronecker factors of blocks of one named parameter each; zeros for a parameter that the
/// loss does not depend on. `check`: see [`curvature::kfac`]; `normals(i, z)`: noise for the labels of output i.
pub(super) fn kronecker(
    loss: &Tensor,
    blocks: &[(&str, &Tensor)],
    tape: &Tape,
    labels: Labels,
    check: bool,
    normals: impl Fn(usize, &Tensor) -> Result<Tensor>,
) -> Result<Derivatives> {
    let vectors = |i: usize, output: &Output| output.vectors(labels, || normals(i, &output.z));
    let vectors = (labels != Labels::Observed).then_some(vectors);
    let found = curvature::kfac(loss, tape, blocks, check, vectors)?;
    let mut result = Derivatives { gradient: Vec::new(), second: Vec::new() };
    for ((_, p), (g, factors)) in blocks.iter().zip(found.gradient.into_iter().zip(found.factors)) {
        result.gradient.push(flat(&[p], &[g.unwrap_or_else(Tensor::new)])?.detach());
        let [r, c] = matrix_shape(&p.size());
        let zeros = || [r, c].map(|n| Tensor::zeros([n, n], (p.kind(), p.device())));
        result.second.push(factors.unwrap_or_else(zeros).into());
    }
    Ok(result)
}

/// One vector, with zeros where the loss does not depend on a parameter.
fn flat(block: &[&Tensor], found: &[Tensor]) -> Result<Tensor> {
    let parts = block.iter().zip(found).map(|(p, g)| {
        if !g.defined() {
            return Ok(Tensor::f_zeros([p.numel() as i64], (p.kind(), p.device()))?);
        }
        let g = if g.is_sparse() { g.f_to_dense(None, false)? } else { g.shallow_clone() };
        Ok(g.f_reshape([-1])?)
    });
    Ok(Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?)
}
