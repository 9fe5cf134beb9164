//! The parameters of a recorded forward pass, the layer calls that use them, and the backward passes over either.

use super::parameter::{CHUNK_ELEMENTS, Contribution, Parameter, accumulation_kind};
use crate::nn::tape::{Rule, Tape};
use crate::{Error, Result};
use std::collections::HashMap;
use tch::{Kind, Tensor};

/// δ = ∂L/∂z by the number of the tap, where L depends on that layer call.
pub(super) type Deltas = HashMap<usize, Tensor>;

/// One value per parameter, `None` where a loss does not depend on it.
pub(crate) type PerParameter = Vec<Option<Tensor>>;

/// Parameters, and for each the taps that use it with the rule by which its per-example gradients follow.
#[derive(Debug)]
pub(super) struct Tapped<'a> {
    /// Name and leaf.
    pub params: Vec<(&'a str, &'a Tensor)>,
    /// Elements of a chunk of examples.
    pub elements: i64,
    tape: &'a Tape,
    uses: Vec<Vec<(usize, &'a dyn Rule)>>,
}

impl<'a> Tapped<'a> {
    /// Identity is that of the memory and its layout: every handle to a variable shares it.
    pub(super) fn new(tape: &'a Tape, params: &[(&'a str, &'a Tensor)]) -> Result<Self> {
        let mut at_address: HashMap<_, Vec<usize>> = HashMap::new();
        for (p, (_, tensor)) in params.iter().enumerate() {
            at_address.entry(tensor.data_ptr()).or_default().push(p);
        }
        let mut uses: Vec<Vec<_>> = params.iter().map(|_| Vec::new()).collect();
        for (index, tap) in tape.taps().iter().enumerate() {
            for used in &tap.uses {
                for &p in at_address.get(&used.parameter.data_ptr()).into_iter().flatten() {
                    // Same address, but perhaps another view of the same storage.
                    if params[p].1.f_is_set_to(&used.parameter)? {
                        uses[p].push((index, used.rule.as_ref()));
                    }
                }
            }
        }
        Ok(Tapped { params: params.to_vec(), elements: CHUNK_ELEMENTS, tape, uses })
    }

    pub(super) fn leaves(&self) -> Vec<&'a Tensor> {
        self.params.iter().map(|(_, leaf)| *leaf).collect()
    }

    pub(super) fn uses(&self, p: usize) -> &[(usize, &'a dyn Rule)] {
        &self.uses[p]
    }

    /// Treats a parameter as one that no layer uses.
    pub(super) fn forget(&mut self, p: usize) {
        self.uses[p].clear();
    }

    /// The leading dimensions of the outputs of the layers that use a parameter.
    pub(super) fn batches(&self, p: usize) -> impl Iterator<Item = i64> {
        self.uses[p].iter().map(|(tap, _)| self.output(*tap).size()[0])
    }

    /// z of a layer call.
    pub(super) fn output(&self, tap: usize) -> &'a Tensor {
        &self.tape.taps()[tap].output
    }

    /// Leaves out the layer calls that z does not come from: those of another batch in the same closure.
    pub(super) fn only_before(&mut self, z: &Tensor) -> Result<()> {
        let total = tch::with_grad(|| z.f_sum(None::<Kind>))?;
        let (_, deltas) = self.differentiate(&total, &[], true)?;
        for uses in &mut self.uses {
            uses.retain(|(tap, _)| deltas.contains_key(tap));
        }
        Ok(())
    }

    /// Derivatives of a 0-dim loss by `leaves` (or any other tensors that it depends on), and by the outputs of all layers that use a parameter.
    pub(super) fn differentiate(
        &self,
        loss: &Tensor,
        leaves: &[&Tensor],
        keep_graph: bool,
    ) -> Result<(PerParameter, Deltas)> {
        let mut taps: Vec<usize> = self.uses.iter().flatten().map(|&(tap, _)| tap).collect();
        // A weight and a bias share a tap, and libtorch differentiates by each input that it is given.
        taps.sort_unstable();
        taps.dedup();
        let outputs = taps.iter().map(|&tap| self.output(tap));
        let inputs: Vec<&Tensor> = leaves.iter().copied().chain(outputs).collect();
        if inputs.is_empty() {
            // Given no inputs, a backward pass accumulates into every leaf's `.grad`.
            return Ok((Vec::new(), Deltas::new()));
        }
        // libtorch leaves out the gradients of what nobody asks for, so that no weight's is formed unless it is in
        // `leaves`.
        let mut found = Tensor::f_run_backward(&[loss], &inputs, keep_graph, false)?;
        let deltas = found.split_off(leaves.len());
        let gradient = found.into_iter().map(|g| g.defined().then_some(g)).collect();
        Ok((gradient, taps.into_iter().zip(deltas).filter(|(_, delta)| delta.defined()).collect()))
    }

    /// A parameter with its uses that a loss depends on, for a batch of that many examples.
    pub(super) fn parameter<'b>(&self, p: usize, deltas: &'b Deltas, batch: i64) -> Parameter<'b>
    where
        'a: 'b,
    {
        let contribution = |&(tap, rule): &(usize, &'a dyn Rule)| Some(Contribution { rule, delta: deltas.get(&tap)? });
        let uses = self.uses[p].iter().filter_map(contribution).collect();
        Parameter { tensor: self.params[p].1, uses, batch, elements: self.elements }
    }

    /// All parameters.
    pub(super) fn parameters<'b>(&self, deltas: &'b Deltas, batch: i64) -> Vec<Parameter<'b>>
    where
        'a: 'b,
    {
        (0..self.params.len()).map(|p| self.parameter(p, deltas, batch)).collect()
    }
}

/// The parameters with a gradient g ≠ Σᵢ G̃ᵢ, because they are also used outside of the tapped layers, and those with
/// a gradient but without a scale (Σᵢ ‖G̃ᵢ‖²)^½.
pub(super) fn unexplained(
    parameters: &[Parameter],
    gradient: &PerParameter,
    scales: &[Option<f64>],
) -> Result<Vec<usize>> {
    let all = scales.iter().flatten().map(|s| s * s).sum::<f64>().sqrt();
    let mut found = Vec::new();
    for (p, (g, scale)) in gradient.iter().zip(scales).enumerate() {
        let explained = match (g, scale) {
            (None, _) => true,
            (Some(g), Some(scale)) => parameters[p].explains(g, *scale, all)?,
            (Some(_), None) => false,
        };
        if !explained {
            found.push(p);
        }
    }
    Ok(found)
}

/// Calls `f(i, k, ∂ℓᵢ/∂leaf k)` by a backward pass for every example, for losses `[B]` with their graph.
pub(super) fn by_example(
    losses: &Tensor,
    examples: std::ops::Range<i64>,
    leaves: &[&Tensor],
    mut f: impl FnMut(i64, usize, Tensor) -> Result<()>,
) -> Result<()> {
    if leaves.is_empty() {
        return Ok(());
    }
    for i in examples {
        let one = tch::with_grad(|| losses.f_select(0, i))?;
        // The graph is kept, for the other examples and for the caller.
        let found = Tensor::f_run_backward(&[one], leaves, true, false)?;
        for (k, (g, leaf)) in found.into_iter().zip(leaves).enumerate().filter(|(_, (g, _))| g.defined()) {
            f(i, k, g.f_totype(accumulation_kind(leaf.kind()))?)?;
        }
    }
    Ok(())
}

/// The leading dimension that all these layer calls share, for parameters with the names given; 0 without any.
pub(super) fn common_batch<'n>(
    parameters: impl IntoIterator<Item = (&'n str, &'n Parameter<'n>)>,
    or_else: &str,
) -> Result<i64> {
    let mut first: Option<(&str, i64)> = None;
    for (name, parameter) in parameters {
        for batch in parameter.batches() {
            let (other, expected) = *first.get_or_insert((name, batch));
            if batch != expected {
                return Err(Error::PerExample(format!(
                    "the layer of parameter `{other}` saw {expected} examples and that of `{name}` {batch} (leading \
                     dimensions of their outputs), so that the number of examples is ambiguous; keep the batch as the \
                     leading dimension in every layer of `tch_blr::nn`{or_else}"
                )));
            }
        }
    }
    Ok(first.map_or(0, |(_, batch)| batch))
}
