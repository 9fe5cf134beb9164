//! Kronecker factors of the Fisher information of layers that multiply their input by a weight.
//!
//! At position t of example i a layer computes zᵢₜ = W aᵢₜ, and with δᵢₜ = ∂ℓᵢ/∂zᵢₜ the gradient of ℓᵢ is Σₜ δᵢₜ aᵢₜᵀ. With
//! inputs and derivatives taken for independent, and different positions for uncorrelated (Martens and Grosse 2015; Grosse
//! and Martens 2016 for convolutions), the Fisher information (1/B) Σᵢ vec(Gᵢ) vec(Gᵢ)ᵀ is
//!
//! ```text
//! G ⊗ A,    A = (1/B) Σᵢₜ aᵢₜ aᵢₜᵀ,    G = (1/n) Σᵢₜ δᵢₜ δᵢₜᵀ
//! ```
//!
//! for n positions of B examples together. A bias is the weight of the input 1. A parameter that several layer calls use has
//! the positions of all of them.

use super::per_example::match_uses;
use crate::nn::tape::{Output, Rule, Tape};
use crate::{Error, Result};
use std::collections::HashMap;
use tch::{Kind, Tensor};

/// What the backward passes give per parameter; `None` where the loss does not depend on it.
#[derive(Debug)]
pub(crate) struct Kfac {
    /// ∇L, in the kind of the parameter.
    pub gradient: Vec<Option<Tensor>>,
    /// The factors of the rows and of the columns of the parameter as a matrix: G and A of a weight, A and G of a bias. f64
    /// for parameters in f64 and f32 for all others.
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
    vectors: Option<impl Fn(usize, &Output) -> Result<Vec<Tensor>>>,
) -> Result<Kfac> {
    let matched = match_uses(tape, params)?;
    let mut taps: Vec<usize> = matched.iter().flatten().map(|(tap, _)| *tap).collect();
    taps.sort_unstable();
    taps.dedup();
    let outputs: Vec<&Tensor> = taps.iter().map(|tap| &tape.taps()[*tap].output).collect();
    let by_tap = |deltas: Vec<Tensor>| -> HashMap<usize, Tensor> {
        taps.iter().copied().zip(deltas).filter(|(_, delta)| delta.defined()).collect()
    };

    let inputs: Vec<&Tensor> = params.iter().map(|(_, p)| *p).chain(outputs.iter().copied()).collect();
    let mut found = Tensor::f_run_backward(&[loss], &inputs, vectors.is_some(), false)?;
    let deltas = by_tap(found.split_off(params.len()));
    let gradient: Vec<Option<Tensor>> = found.into_iter().map(|g| g.defined().then_some(g)).collect();
    let batch = common_batch(&deltas)?;

    let mut uses = Vec::new();
    for ((&(name, tensor), matched), g) in params.iter().zip(&matched).zip(&gradient) {
        let parameter = Parameter { name, tensor, uses: matched };
        let Some(g) = g else {
            uses.push(None);
            continue;
        };
        let positions = parameter.positions(&deltas)?;
        if positions.is_empty() {
            return Err(parameter.unknown());
        }
        if check {
            parameter.explains(g, &positions)?;
        }
        uses.push(Some((parameter, positions)));
    }

    let objectives = match vectors {
        None => vec![deltas],
        Some(vectors) if !outputs.is_empty() => {
            let mut all = Vec::new();
            for s in objectives(tape, vectors)? {
                all.push(by_tap(Tensor::f_run_backward(&[s], &outputs, true, false)?));
            }
            all
        }
        Some(_) => Vec::new(),
    };
    let _no_grad = tch::no_grad_guard();
    let factors = uses.into_iter().map(|of| {
        let Some((parameter, positions)) = of else { return Ok(None) };
        // A is the same for all objectives.
        let second = |x: &Tensor| Ok::<_, Error>(x.f_tr()?.f_matmul(x)?);
        let sum = |all: &[Positions], part: fn(&Positions) -> &Tensor| {
            let mut parts = all.iter().map(|x| second(part(x)));
            let first = parts.next().ok_or_else(|| parameter.unknown())??;
            parts.try_fold(first, |sum, x| Ok::<_, Error>(sum + x?))
        };
        let n: i64 = positions.iter().map(|x| x.inputs.size()[0]).sum();
        let a = sum(&positions, |x| &x.inputs)? / batch as f64;
        let mut g = None;
        for deltas in &objectives {
            let positions = parameter.positions(deltas)?;
            if !positions.is_empty() {
                let more = sum(&positions, |x| &x.deltas)?;
                g = Some(g.map_or_else(|| more.shallow_clone(), |g: Tensor| g + &more));
            }
        }
        let g = g.unwrap_or_else(|| {
            let out = positions[0].deltas.size()[1];
            Tensor::zeros([out, out], (a.kind(), a.device()))
        });
        // δ of the mean loss is that of example i divided by B.
        let g = g * ((batch * batch) as f64 / n as f64);
        Ok(Some(if parameter.tensor.dim() < 2 { [a, g] } else { [g, a] }))
    });
    let factors = factors.collect::<Result<Vec<_>>>()?;
    Ok(Kfac { gradient, factors })
}

/// The mean of sᵢᵀzᵢ over the examples, for each s of each output.
fn objectives(tape: &Tape, vectors: impl Fn(usize, &Output) -> Result<Vec<Tensor>>) -> Result<Vec<Tensor>> {
    if tape.outputs().is_empty() {
        return Err(Error::Loss(
            "the Fisher information needs the model's output; compute the loss with cross_entropy, binary_cross_entropy \
             or squared_error of `tch_blr::nn`, or choose FisherLabels::Observed"
                .to_owned(),
        ));
    }
    let mut all = Vec::new();
    for (i, output) in tape.outputs().iter().enumerate() {
        for s in vectors(i, output)? {
            all.push((&output.z * s).f_sum(None::<Kind>)? / output.z.size()[0] as f64);
        }
    }
    Ok(all)
}

/// The leading dimension that all layers' outputs share; 1 if there are none.
fn common_batch(deltas: &HashMap<usize, Tensor>) -> Result<i64> {
    let mut sizes: Vec<i64> = deltas.values().map(|delta| delta.size()[0]).collect();
    sizes.sort_unstable();
    match (sizes.first(), sizes.last()) {
        (Some(a), Some(b)) if a != b => Err(Error::PerExample(format!(
            "one layer saw {a} examples and another {b} (leading dimensions of their outputs), so that the number of \
             examples is ambiguous; keep the batch as the leading dimension in every layer of `tch_blr::nn`"
        ))),
        (Some(a), _) => Ok(*a),
        _ => Ok(1),
    }
}

/// The rows of one layer call.
struct Positions {
    /// a `[n, in]`
    inputs: Tensor,
    /// δ `[n, out]`, of the mean loss.
    deltas: Tensor,
}

struct Parameter<'a> {
    name: &'a str,
    tensor: &'a Tensor,
    uses: &'a [(usize, &'a dyn Rule)],
}

impl Parameter<'_> {
    fn unknown(&self) -> Error {
        let problem = "the loss depends on it otherwise than as the weight or bias of `linear` or ungrouped `conv2d` of \
                       `tch_blr::nn`, so that it has no Kronecker factors; build the model from these layers, or freeze it";
        Error::parameter(self.name, problem)
    }

    /// Of every use that the loss depends on.
    fn positions(&self, deltas: &HashMap<usize, Tensor>) -> Result<Vec<Positions>> {
        let _no_grad = tch::no_grad_guard();
        let kind = if self.tensor.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let of = |(tap, rule): &(usize, &dyn Rule)| {
            let delta = deltas.get(tap)?;
            Some((|| {
                let delta = delta.f_totype(kind)?;
                let matrix = rule.matrix().ok_or_else(|| self.unknown())?;
                Ok(Positions { inputs: matrix.inputs(0, &delta)?, deltas: matrix.outputs(&delta)? })
            })())
        };
        self.uses.iter().filter_map(of).collect()
    }

    /// Errors unless g = Σ δᵀa, as it is not if the parameter is also used outside of the tapped layers.
    fn explains(&self, g: &Tensor, positions: &[Positions]) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        // A copy: the gradient itself is still wanted.
        let mut rest = g.f_to_kind(Kind::Double)?.f_reshape([-1])?.copy();
        let mut scale = 0.0;
        for x in positions {
            let part = x.deltas.f_tr()?.f_matmul(&x.inputs)?.f_to_kind(Kind::Double)?.f_reshape([-1])?;
            rest -= part;
            // Rounding errors of the positions' terms, whose sum may vanish.
            let norms = |x: &Tensor| x.f_norm_scalaropt_dim(2.0, [1i64], false);
            scale += f64::try_from((norms(&x.deltas)? * norms(&x.inputs)?).f_sum(Kind::Double)?)?;
        }
        let error = f64::try_from(rest.f_norm()?)?;
        let half = matches!(self.tensor.kind(), Kind::Half | Kind::BFloat16);
        let tolerance = if self.tensor.kind() == Kind::Double {
            1e-8
        } else if half {
            2e-2
        } else {
            5e-3
        };
        // NaN passes: it is reported as a gradient that is not finite.
        if error > tolerance * scale { Err(self.unknown()) } else { Ok(()) }
    }
}
