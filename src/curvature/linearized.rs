//! A batch of a model's outputs to first order in the weights: per-example gradients of sᵢᵀzᵢ for any vectors s.
//!
//! With the Jacobian Jᵢ of example i's output zᵢ `[C]`, a column s of one vector per example gives Gᵢ = Jᵢᵀsᵢ by one
//! backward pass over the layers' outputs; the gradients of the weights are never formed. Sums over several columns of
//! Gᵢ² share one matrix product with the layer's inputs.

use super::per_example::{CHUNK_ELEMENTS, Contribution, Match, Parameter, accumulation_kind, global_scale, match_uses};
use crate::nn::Likelihood;
use crate::nn::tape::{Outer, Output, Recording, Tape};
use crate::params::{Buffers, Leaf};
use crate::{Error, IntoTensor, Params, Result, kernel};
use std::collections::HashMap;
use tch::{Kind, Tensor, no_grad_guard};

/// One forward pass.
#[derive(Debug)]
pub(crate) struct Forward {
    tape: Tape,
    pub output: Output,
}

impl Forward {
    /// Runs the closure, whose output is `[B]` or `[B, C]`; `labels`: the columns to keep.
    pub(crate) fn run<L: IntoTensor>(
        params: &Params,
        likelihood: Likelihood,
        labels: Option<&[i64]>,
        closure: impl FnOnce() -> L,
    ) -> Result<Self> {
        let buffers = Buffers::new(params);
        let recording = Recording::start();
        let z = tch::with_grad(|| closure().into_tensor());
        let tape = recording.finish();
        buffers.unchanged()?;
        let z = z?;
        let refuse = |problem: String| Err::<Self, _>(Error::Curvature(problem));
        if !z.defined() || !z.is_floating_point() || !matches!(z.dim(), 1 | 2) {
            let form = if z.defined() { format!("{:?} {:?}", z.kind(), z.size()) } else { "undefined".to_owned() };
            return refuse(format!("the model's output is {form}: expected floating-point outputs [B] or [B, C]"));
        }
        if !z.requires_grad() {
            return refuse(
                "the model's output has no graph; compute it from the trainable variables, with gradients enabled"
                    .to_owned(),
            );
        }
        let size = z.size();
        if likelihood == Likelihood::Categorical && !matches!(size[..], [_, c] if c >= 2) {
            return refuse(format!(
                "the model's output is {size:?}: a categorical likelihood needs logits [B, C] of C ≥ 2 classes; for one \
                 logit per example choose Likelihood::Bernoulli"
            ));
        }
        let z = tch::with_grad(|| {
            // Probabilities of half precision would not add up to one.
            let z = z.f_to_kind(accumulation_kind(z.kind()))?;
            let Some(labels) = labels else { return Ok(z) };
            if let Some(label) = labels.iter().find(|label| !(0..size[1]).contains(label)) {
                let last = size[1] - 1;
                return Err(Error::Curvature(format!(
                    "label {label} is active, but the model has the outputs 0 to {last}"
                )));
            }
            Ok(z.f_index_select(1, &Tensor::from_slice(labels).to_device(z.device()))?)
        })?;
        if let Some(value) = kernel::first_non_finite(&z.detach()) {
            return refuse(format!(
                "the model's output is not finite ({value}); nothing was changed (look at the weights and at the batch)"
            ));
        }
        Ok(Forward { tape, output: Output { z, likelihood } })
    }

    /// B
    pub(crate) fn examples(&self) -> i64 {
        self.output.z.size()[0]
    }
}

/// How the per-example gradients of a parameter are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// It has no part in the output, as far as is known.
    Unused,
    Tapped,
    /// It is used outside of the tapped layers: a backward pass for every example.
    Loop,
}

/// What was found out about a model by its first batch: which parameters are used outside of the tapped layers.
#[derive(Debug, Default)]
pub(crate) struct Looked(Option<Vec<Way>>);

/// A forward pass, and how each parameter's gradients follow from it.
#[derive(Debug)]
pub(crate) struct Linearized<'a> {
    /// `[B, C]`
    z: Tensor,
    pub(super) leaves: Vec<&'a Leaf>,
    tape: &'a Tape,
    uses: Vec<Vec<Match<'a>>>,
    ways: Vec<Way>,
    /// Taps to differentiate by.
    taps: Vec<usize>,
}

/// sᵢᵀzᵢ and its derivatives by the outputs of the tapped layers.
#[derive(Debug)]
pub(crate) struct Column {
    /// `[B]`, with its graph
    losses: Tensor,
    deltas: HashMap<usize, Tensor>,
}

impl<'a> Linearized<'a> {
    /// With the trained parameters of `params`. The first batch of a model is compared with plain gradients.
    pub(crate) fn new(forward: &'a Forward, params: &'a Params, looked: &mut Looked) -> Result<Self> {
        let leaves: Vec<&Leaf> = params.leaves().iter().filter(|l| l.trainable()).collect();
        let named: Vec<(&str, &Tensor)> = leaves.iter().map(|l| (l.name(), &l.tensor)).collect();
        let mut uses = match_uses(&forward.tape, &named)?;
        let z = &forward.output.z;
        let z = if z.dim() == 1 { tch::with_grad(|| z.f_unsqueeze(1))? } else { z.shallow_clone() };
        let batch = z.size()[0];
        let first = looked.0.is_none();
        let before = looked.0.take().unwrap_or_else(|| vec![Way::Unused; leaves.len()]);
        let mut ways = Vec::with_capacity(leaves.len());
        for (uses, before) in uses.iter().zip(&before) {
            let fits = uses.iter().all(|&(tap, _)| forward.tape.taps()[tap].output.size()[0] == batch);
            ways.push(match before {
                Way::Loop => Way::Loop,
                _ if uses.is_empty() => Way::Unused,
                _ if fits => Way::Tapped,
                _ => Way::Loop,
            });
        }
        for (uses, way) in uses.iter_mut().zip(&ways) {
            if *way != Way::Tapped {
                uses.clear();
            }
        }
        let mut taps: Vec<usize> = uses.iter().flatten().map(|&(tap, _)| tap).collect();
        taps.sort_unstable();
        taps.dedup();
        let mut linearized = Linearized { z, leaves, tape: &forward.tape, uses, ways, taps };
        if first {
            linearized.look()?;
        }
        looked.0 = Some(linearized.ways.clone());
        Ok(linearized)
    }

    /// Number of parameters.
    pub(crate) fn parameters(&self) -> usize {
        self.leaves.len()
    }

    pub(super) fn batch(&self) -> i64 {
        self.z.size()[0]
    }

    /// `[B, C]` of the output's shape.
    fn outputs(&self) -> i64 {
        self.z.size()[1]
    }

    /// Compares the tapped gradients with plain ones, for a column of numbers without a pattern.
    fn look(&mut self) -> Result<()> {
        let wave = Tensor::f_arange(self.z.numel() as i64, (self.z.kind(), self.z.device()))?;
        let s = wave.f_mul_scalar(1.7)?.f_add_scalar(0.3)?.f_sin()?.f_reshape(self.z.size())?;
        let column = self.pull(&s)?;
        let leaves: Vec<&Tensor> = self.leaves.iter().map(|l| &l.tensor).collect();
        let total = tch::with_grad(|| column.losses.f_sum(None::<Kind>))?;
        let plain = Tensor::f_run_backward(&[&total], &leaves, true, false)?;
        let _no_grad = no_grad_guard();
        let uses: Vec<Vec<Contribution>> = (0..plain.len()).map(|p| self.contributions(p, &column)).collect();
        let mut squares: Vec<Option<Tensor>> = Vec::with_capacity(plain.len());
        for (p, uses) in uses.iter().enumerate() {
            let c = if uses.is_empty() { None } else { Some(self.parameter(p, uses).squares()?) };
            squares.push(c);
        }
        let all = global_scale(&squares, self.batch())?;
        let mut outside = Vec::new();
        for (p, (g, c)) in plain.iter().zip(&squares).enumerate() {
            let explained = match c {
                _ if !g.defined() => true,
                Some(c) => self.parameter(p, &uses[p]).explains(g, c, all)?,
                None => false,
            };
            if !explained {
                outside.push(p);
            }
        }
        drop(uses);
        for p in outside {
            self.loop_over(p);
        }
        Ok(())
    }

    fn loop_over(&mut self, p: usize) {
        self.ways[p] = Way::Loop;
        self.uses[p].clear();
    }

    /// One backward pass, for s `[B, C]`.
    pub(crate) fn pull(&mut self, s: &Tensor) -> Result<Column> {
        let (losses, total) = tch::with_grad(|| {
            let losses = self.z.f_mul(&s.f_reshape(self.z.size())?)?.f_sum_dim_intlist(1, false, None::<Kind>)?;
            let total = losses.f_sum(None::<Kind>)?;
            Ok::<_, Error>((losses, total))
        })?;
        // A parameter that had no part so far may have one in this batch.
        let unused: Vec<usize> = (0..self.ways.len()).filter(|&p| self.ways[p] == Way::Unused).collect();
        let mut inputs: Vec<&Tensor> = self.taps.iter().map(|&tap| &self.tape.taps()[tap].output).collect();
        inputs.extend(unused.iter().map(|&p| &self.leaves[p].tensor));
        // A backward pass with respect to nothing would accumulate into every leaf's `.grad`.
        let mut found =
            if inputs.is_empty() { Vec::new() } else { Tensor::f_run_backward(&[total], &inputs, true, false)? };
        let of_unused = found.split_off(self.taps.len());
        for (p, g) in unused.into_iter().zip(of_unused) {
            if g.defined() {
                self.loop_over(p);
            }
        }
        let deltas = self.taps.iter().copied().zip(found).filter(|(_, delta)| delta.defined()).collect();
        Ok(Column { losses, deltas })
    }

    pub(super) fn contributions<'b>(&self, p: usize, column: &'b Column) -> Vec<Contribution<'b>>
    where
        'a: 'b,
    {
        let uses = self.uses[p].iter();
        uses.filter_map(|&(tap, rule)| Some(Contribution { rule, delta: column.deltas.get(&tap)? })).collect()
    }

    pub(super) fn parameter<'b>(&'b self, p: usize, uses: &'b [Contribution<'b>]) -> Parameter<'b> {
        Parameter { tensor: &self.leaves[p].tensor, uses, batch: self.batch(), elements: CHUNK_ELEMENTS }
    }

    /// Kind of what is summed for a parameter.
    pub(super) fn kind(&self, p: usize) -> Kind {
        accumulation_kind(self.leaves[p].tensor.kind())
    }

    /// δ and aᵢ if Gᵢ = δᵢaᵢᵀ.
    pub(super) fn outer(&self, p: usize, uses: &[Contribution]) -> Result<Option<(Tensor, Outer)>> {
        let [only] = uses else { return Ok(None) };
        let delta = only.delta.f_totype(self.kind(p))?;
        Ok(only.rule.outer(&delta)?.map(|outer| (delta, outer)))
    }

    /// Gᵢ of the parameters that no tap explains.
    pub(super) fn of_example(&self, column: &Column, i: i64) -> Result<Vec<(usize, Tensor)>> {
        let looped: Vec<usize> = (0..self.ways.len()).filter(|&p| self.ways[p] == Way::Loop).collect();
        if looped.is_empty() {
            return Ok(Vec::new());
        }
        let leaves: Vec<&Tensor> = looped.iter().map(|&p| &self.leaves[p].tensor).collect();
        let one = tch::with_grad(|| column.losses.f_select(0, i))?;
        let found = Tensor::f_run_backward(&[one], &leaves, true, false)?;
        let found = looped.into_iter().zip(found).filter(|(_, g)| g.defined());
        found.map(|(p, g)| Ok((p, g.f_totype(self.kind(p))?))).collect()
    }

    pub(super) fn loops(&self) -> bool {
        self.ways.contains(&Way::Loop)
    }

    /// Adds Σ_c Σᵢ Gᵢ_c² to `sums`, over the columns that `column(0..columns)` gives.
    pub(crate) fn add_squares(
        &mut self,
        columns: i64,
        column: impl Fn(i64) -> Result<Tensor>,
        sums: &mut [Tensor],
    ) -> Result<()> {
        let mut of_deltas: Vec<Option<(Tensor, Outer)>> = (0..self.parameters()).map(|_| None).collect();
        for c in 0..columns {
            let column = self.pull(&column(c)?)?;
            let _no_grad = no_grad_guard();
            for p in 0..self.parameters() {
                let uses = self.contributions(p, &column);
                if let Some((delta, outer)) = self.outer(p, &uses)? {
                    match &mut of_deltas[p] {
                        Some((sum, _)) => _ = sum.f_addcmul_(&delta, &delta)?,
                        new => *new = Some((delta.f_square()?, outer)),
                    }
                } else if !uses.is_empty() {
                    _ = sums[p].f_add_(&self.parameter(p, &uses).sum_of_squares()?)?;
                }
            }
            for i in 0..if self.loops() { self.batch() } else { 0 } {
                for (p, g) in self.of_example(&column, i)? {
                    _ = sums[p].f_addcmul_(&g, &g)?;
                }
            }
        }
        let _no_grad = no_grad_guard();
        for (sum, found) in sums.iter_mut().zip(of_deltas) {
            if let Some((squares, outer)) = found {
                _ = sum.f_add_(&outer.squares(&squares)?)?;
            }
        }
        Ok(())
    }
}
