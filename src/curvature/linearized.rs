//! A batch of a model's outputs to first order in the weights: per-example gradients of sᵢᵀzᵢ for any vectors s.
//!
//! With the Jacobian Jᵢ of example i's output zᵢ `[C]`, a column s of one vector per example gives Gᵢ = Jᵢᵀsᵢ by one
//! backward pass over the layers' outputs; the gradients of the weights are never formed. Sums over several columns of
//! Gᵢ² share one matrix product with the layer's inputs.

use super::per_example::{CHUNK_ELEMENTS, Contribution, Match, Parameter, accumulation_kind, global_scale, match_uses};
use crate::linalg::matrix_shape;
use crate::nn::Likelihood;
use crate::nn::tape::{Outer, Output, Recording, Tape};
use crate::params::{Buffers, Leaf};
use crate::{Error, IntoTensor, Params, Result, kernel};
use std::collections::HashMap;
use tch::{Kind, Tensor, no_grad_guard};

/// How many examples show whether a parameter is used outside of the tapped layers.
const LOOK_AT: i64 = 16;

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

    /// Compares the tapped gradients of a few examples with plain ones, for a column of numbers without a pattern.
    fn look(&mut self) -> Result<()> {
        let wave = Tensor::f_arange(self.z.numel() as i64, (self.z.kind(), self.z.device()))?;
        let s = wave.f_mul_scalar(1.7)?.f_add_scalar(0.3)?.f_sin()?.f_reshape(self.z.size())?;
        let few = LOOK_AT.min(self.batch());
        _ = s.f_narrow(0, few, self.batch() - few)?.f_zero_()?;
        let mut column = self.pull(&s)?;
        let leaves: Vec<&Tensor> = self.leaves.iter().map(|l| &l.tensor).collect();
        let total = tch::with_grad(|| column.losses.f_sum(None::<Kind>))?;
        let plain = Tensor::f_run_backward(&[&total], &leaves, true, false)?;
        let _no_grad = no_grad_guard();
        for delta in column.deltas.values_mut() {
            *delta = delta.f_narrow(0, 0, few)?;
        }
        let uses: Vec<Vec<Contribution>> = (0..plain.len()).map(|p| self.contributions(p, &column)).collect();
        let parameter = |p: usize| Parameter { batch: few, ..self.parameter(p, &uses[p]) };
        let mut squares: Vec<Option<Tensor>> = Vec::with_capacity(plain.len());
        for (p, uses) in uses.iter().enumerate() {
            let c = if uses.is_empty() { None } else { Some(parameter(p).squares()?) };
            squares.push(c);
        }
        let all = global_scale(&squares, few)?;
        let mut outside = Vec::new();
        for (p, (g, c)) in plain.iter().zip(&squares).enumerate() {
            let explained = match c {
                _ if !g.defined() => true,
                Some(c) => parameter(p).explains(g, c, all)?,
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

    /// Calls `f(first, G)` for Gᵢ of a tapped parameter, a chunk of examples at a time, as many as fit `share` times.
    fn in_chunks(
        &self,
        p: usize,
        uses: &[Contribution],
        share: i64,
        mut f: impl FnMut(i64, Tensor) -> Result<()>,
    ) -> Result<()> {
        let parameter = self.parameter(p, uses);
        let chunk = (parameter.chunk() / share).max(1);
        let mut first = 0;
        while first < self.batch() {
            let length = chunk.min(self.batch() - first);
            f(first, parameter.gradients(first, length)?)?;
            first += length;
        }
        Ok(())
    }

    /// Adds Σ_c Σᵢ Gᵢ_c² to `sums`, over the columns that `column(0..columns)` gives.
    pub(crate) fn add_squares(
        &mut self,
        columns: i64,
        column: impl Fn(i64) -> Result<Tensor>,
        sums: &mut [Tensor],
    ) -> Result<()> {
        let mut squares = Squares::new(self.parameters());
        for c in 0..columns {
            let column = self.pull(&column(c)?)?;
            squares.add(self, &column, &(0..self.parameters()).collect::<Vec<_>>(), sums)?;
        }
        squares.finish(sums)
    }

    /// Adds the factors of the parameters that have them to `parts`, and Σ_c Σᵢ Gᵢ_c² to the others.
    pub(crate) fn add_factors(
        &mut self,
        columns: i64,
        column: impl Fn(i64) -> Result<Tensor>,
        parts: &mut [Part],
    ) -> Result<()> {
        let mut squares = Squares::new(self.parameters());
        for c in 0..columns {
            let column = self.pull(&column(c)?)?;
            let _no_grad = no_grad_guard();
            let mut rest = Vec::new();
            for (p, part) in parts.iter_mut().enumerate() {
                match part {
                    Part::Factors(_) | Part::Bias if self.ways[p] == Way::Loop => return Err(self.changed(p)),
                    Part::Factors(factors) => self.add_to_factors(p, &column, c == 0, factors)?,
                    Part::Bias => {}
                    Part::Diagonal(_) => rest.push(p),
                }
            }
            let mut sums: Vec<Tensor> = parts.iter().map(Part::diagonal).collect();
            squares.add(self, &column, &rest, &mut sums)?;
        }
        squares.finish(&mut parts.iter().map(Part::diagonal).collect::<Vec<_>>())
    }

    fn add_to_factors(&self, p: usize, column: &Column, first_column: bool, factors: &mut Factors) -> Result<()> {
        let uses = self.contributions(p, column);
        let [only] = &uses[..] else {
            if uses.is_empty() {
                return Ok(());
            }
            return Err(self.changed(p));
        };
        let Some(matrix) = only.rule.matrix() else { return Err(self.changed(p)) };
        let chunk = self.parameter(p, &uses).chunk();
        let mut first = 0;
        while first < self.batch() {
            let length = chunk.min(self.batch() - first);
            let delta = only.delta.f_narrow(0, first, length)?.f_totype(self.kind(p))?;
            if first_column {
                let a = matrix.inputs(first, &delta)?;
                factors.positions += a.size()[0];
                let a = if factors.bias.is_none() { a } else { a.f_constant_pad_nd([0, 1])? };
                if factors.bias.is_some() {
                    _ = a.f_narrow(1, a.size()[1] - 1, 1)?.f_fill_(1.0)?;
                }
                _ = factors.inputs.f_addmm_(&a.f_tr()?, &a)?;
            }
            let d = matrix.outputs(&delta)?;
            _ = factors.outputs.f_addmm_(&d.f_tr()?, &d)?;
            first += length;
        }
        Ok(())
    }

    fn changed(&self, p: usize) -> Error {
        let name = self.leaves[p].name();
        Error::parameter(
            name,
            "the model uses it in another way in a later batch; its Kronecker factors need the same computation for every \
             batch (Fisher::diagonal does not)",
        )
    }

    /// What each parameter has: a weight that one layer call uses has factors, which its bias shares.
    pub(crate) fn parts(&self) -> Result<Vec<Part>> {
        let only_use = |p: usize| if let [only] = &self.uses[p][..] { Some(only) } else { None };
        let is_weight =
            |p: usize| self.leaves[p].tensor.dim() > 1 && only_use(p).is_some_and(|(_, rule)| rule.matrix().is_some());
        let mut parts = Vec::with_capacity(self.parameters());
        for (p, leaf) in self.leaves.iter().enumerate() {
            let zeros = |shape: &[i64]| Tensor::f_zeros(shape, (self.kind(p), leaf.tensor.device()));
            let partner = |weight: bool| {
                let tap = only_use(p)?.0;
                (0..self.parameters())
                    .find(|&q| q != p && is_weight(q) == weight && only_use(q).is_some_and(|&(other, _)| other == tap))
            };
            parts.push(if is_weight(p) {
                let [out, width] = matrix_shape(&leaf.tensor.size());
                let bias = partner(false);
                let width = width + i64::from(bias.is_some());
                let (inputs, outputs) = (zeros(&[width, width])?, zeros(&[out, out])?);
                Part::Factors(Factors { bias, inputs, outputs, positions: 0 })
            } else if partner(true).is_some() {
                Part::Bias
            } else {
                Part::Diagonal(zeros(&leaf.tensor.size())?)
            });
        }
        Ok(parts)
    }

    /// Adds Σ_c Σᵢ Gᵢ_cGᵢ_cᵀ over all weights, one parameter after the other, to `sum` `[P, P]` in f64.
    pub(crate) fn add_outer_products(
        &mut self,
        columns: i64,
        column: impl Fn(i64) -> Result<Tensor>,
        sum: &mut Tensor,
    ) -> Result<()> {
        let weights = sum.size()[0];
        let chunk = (CHUNK_ELEMENTS / (4 * weights).max(1)).clamp(1, self.batch().max(1));
        for c in 0..columns {
            let column = self.pull(&column(c)?)?;
            let _no_grad = no_grad_guard();
            let mut first = 0;
            while first < self.batch() {
                let length = chunk.min(self.batch() - first);
                let rows = self.rows(&column, first, length, weights)?;
                _ = sum.f_addmm_(&rows.f_tr()?, &rows)?;
                first += length;
            }
        }
        Ok(())
    }

    /// Gᵢ over all weights, one parameter after the other, `[length, P]` in f64.
    fn rows(&self, column: &Column, first: i64, length: i64, weights: i64) -> Result<Tensor> {
        let device = self.leaves.first().map_or(tch::Device::Cpu, |l| l.tensor.device());
        let rows = Tensor::f_zeros([length, weights], (Kind::Double, device))?;
        let mut starts = Vec::with_capacity(self.parameters());
        let mut start = 0;
        for p in 0..self.parameters() {
            let n = self.leaves[p].tensor.numel() as i64;
            let uses = self.contributions(p, column);
            if !uses.is_empty() {
                let g = self.parameter(p, &uses).gradients(first, length)?;
                rows.f_narrow(1, start, n)?.f_copy_(&g.f_reshape([length, n])?)?;
            }
            starts.push((start, n));
            start += n;
        }
        for i in 0..if self.loops() { length } else { 0 } {
            for (p, g) in self.of_example(column, first + i)? {
                let (start, n) = starts[p];
                rows.f_select(0, i)?.f_narrow(0, start, n)?.f_copy_(&g.f_reshape([n])?)?;
            }
        }
        Ok(rows)
    }

    /// Jᵢ of every example, `[B, C, P]` in f64, its columns as in [`Linearized::rows`].
    pub(crate) fn jacobian(&mut self) -> Result<Tensor> {
        let weights = self.leaves.iter().map(|l| l.tensor.numel() as i64).sum();
        let mut all = Vec::with_capacity(self.outputs() as usize);
        for k in 0..self.outputs() {
            let column = self.pull(&self.unit(k)?)?;
            let _no_grad = no_grad_guard();
            all.push(self.rows(&column, 0, self.batch(), weights)?);
        }
        Ok(Tensor::f_stack(&all, 1)?)
    }

    /// One for output k of every example.
    fn unit(&self, k: i64) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        let unit = self.z.detach().f_zeros_like()?;
        _ = unit.f_narrow(1, k, 1)?.f_fill_(1.0)?;
        Ok(unit)
    }

    /// Jᵢ diag(V) Jᵢᵀ of every example, its diagonal `[B, C]`; V of each parameter in its shape and the kind of its sums,
    /// `None` for zero.
    pub(crate) fn variance(&mut self, v: &[Option<Tensor>]) -> Result<Tensor> {
        let mut all = Vec::with_capacity(self.outputs() as usize);
        let mut spread: Vec<Option<Tensor>> = v.iter().map(|_| None).collect();
        for k in 0..self.outputs() {
            let column = self.pull(&self.unit(k)?)?;
            let _no_grad = no_grad_guard();
            let mut sum = Tensor::f_zeros([self.batch()], (self.z.kind(), self.z.device()))?;
            for (p, v) in v.iter().enumerate() {
                let Some(v) = v else { continue };
                let uses = self.contributions(p, &column);
                if let Some((delta, outer)) = self.outer(p, &uses)? {
                    let w = match &mut spread[p] {
                        Some(w) => w,
                        new => new.insert(outer.spread(v)?),
                    };
                    let squares = delta.f_square()?.f_reshape([self.batch(), -1])?;
                    sum = sum.f_add(&squares.f_mul(w)?.f_sum_dim_intlist(1, false, None::<Kind>)?)?;
                } else if !uses.is_empty() {
                    self.in_chunks(p, &uses, 1, |first, g| {
                        let n = g.size()[0];
                        let each =
                            g.f_square()?.f_mul(v)?.f_reshape([n, -1])?.f_sum_dim_intlist(1, false, None::<Kind>)?;
                        _ = sum.f_narrow(0, first, n)?.f_add_(&each)?;
                        Ok(())
                    })?;
                }
            }
            for i in 0..if self.loops() { self.batch() } else { 0 } {
                for (p, g) in self.of_example(&column, i)? {
                    if let Some(v) = &v[p] {
                        _ = sum.f_select(0, i)?.f_add_(&g.f_square()?.f_mul(v)?.f_sum(None::<Kind>)?)?;
                    }
                }
            }
            all.push(sum);
        }
        Ok(Tensor::f_stack(&all, 1)?)
    }

    /// Jᵢ diag(V) Jᵢᵀ `[B, C, C]`, as [`Linearized::variance`].
    pub(crate) fn covariance(&mut self, v: &[Option<Tensor>]) -> Result<Tensor> {
        let columns = (0..self.outputs()).map(|k| self.pull(&self.unit(k)?)).collect::<Result<Vec<_>>>()?;
        let _no_grad = no_grad_guard();
        let (batch, outputs) = (self.batch(), self.outputs());
        let sum = Tensor::f_zeros([batch, outputs, outputs], (self.z.kind(), self.z.device()))?;
        for (p, v) in v.iter().enumerate() {
            let Some(v) = v else { continue };
            let uses: Vec<Vec<Contribution>> = columns.iter().map(|c| self.contributions(p, c)).collect();
            // The outputs are one tensor, so that a layer has a part in all of them or in none.
            let Some(first_uses) = uses.first().filter(|uses| !uses.is_empty()) else { continue };
            if let Some((_, outer)) = self.outer(p, first_uses)? {
                let deltas = uses.iter().flatten().map(|u| Ok(u.delta.f_totype(v.kind())?.f_reshape([batch, -1])?));
                let deltas = Tensor::f_stack(&deltas.collect::<Result<Vec<_>>>()?, 1)?;
                let weighted = deltas.f_mul(&outer.spread(v)?.f_unsqueeze(1)?)?;
                _ = sum.shallow_clone().f_add_(&weighted.f_bmm(&deltas.f_transpose(1, 2)?)?)?;
                continue;
            }
            self.in_chunks(p, first_uses, outputs, |first, g| {
                let n = g.size()[0];
                let rows =
                    uses.iter().map(|uses| Ok(self.parameter(p, uses).gradients(first, n)?.f_reshape([n, -1])?));
                let rows = Tensor::f_stack(&rows.collect::<Result<Vec<_>>>()?, 1)?;
                let weighted = rows.f_mul(&v.f_reshape([-1])?)?;
                _ = sum.f_narrow(0, first, n)?.f_add_(&weighted.f_bmm(&rows.f_transpose(1, 2)?)?)?;
                Ok(())
            })?;
        }
        for i in 0..if self.loops() { batch } else { 0 } {
            let each = columns.iter().map(|c| Ok(self.of_example(c, i)?.into_iter().collect::<HashMap<_, _>>()));
            let each = each.collect::<Result<Vec<_>>>()?;
            for k in 0..each.len() {
                for l in 0..each.len() {
                    for (p, g) in &each[k] {
                        if let (Some(v), Some(other)) = (&v[*p], each[l].get(p)) {
                            let product = g.f_mul(v)?.f_mul(other)?.f_sum(None::<Kind>)?;
                            _ = sum.f_select(0, i)?.f_select(0, k as i64)?.f_select(0, l as i64)?.f_add_(&product)?;
                        }
                    }
                }
            }
        }
        Ok(sum)
    }
}

/// Σ_c Σᵢ Gᵢ_c² while the columns come in: of what layers with Gᵢ = δᵢaᵢᵀ leave, Σ_c δ_c² is enough until the end.
struct Squares(Vec<Option<(Tensor, Outer)>>);

impl Squares {
    fn new(parameters: usize) -> Self {
        Squares((0..parameters).map(|_| None).collect())
    }

    /// Adds a column for the parameters `which`.
    fn add(&mut self, batch: &Linearized, column: &Column, which: &[usize], sums: &mut [Tensor]) -> Result<()> {
        let _no_grad = no_grad_guard();
        for &p in which {
            let uses = batch.contributions(p, column);
            if let Some((delta, outer)) = batch.outer(p, &uses)? {
                match &mut self.0[p] {
                    Some((sum, _)) => _ = sum.f_addcmul_(&delta, &delta)?,
                    new => *new = Some((delta.f_square()?, outer)),
                }
            } else if !uses.is_empty() {
                _ = sums[p].f_add_(&batch.parameter(p, &uses).sum_of_squares()?)?;
            }
        }
        for i in 0..if batch.loops() { batch.batch() } else { 0 } {
            for (p, g) in batch.of_example(column, i)? {
                if which.contains(&p) {
                    _ = sums[p].f_addcmul_(&g, &g)?;
                }
            }
        }
        Ok(())
    }

    fn finish(self, sums: &mut [Tensor]) -> Result<()> {
        let _no_grad = no_grad_guard();
        for (sum, found) in sums.iter_mut().zip(self.0) {
            if let Some((squares, outer)) = found {
                _ = sum.f_add_(&outer.squares(&squares)?)?;
            }
        }
        Ok(())
    }
}

/// What a Kronecker-factored sum keeps of a parameter.
#[derive(Debug)]
pub(crate) enum Part {
    /// Of a weight.
    Factors(Factors),
    /// Of a bias: it belongs to the factors of its layer's weight.
    Bias,
    /// Of everything else, in its shape.
    Diagonal(Tensor),
}

/// Sums over all positions of all examples.
#[derive(Debug)]
pub(crate) struct Factors {
    pub bias: Option<usize>,
    /// Σ aaᵀ, a with a 1 at the end if there is a bias.
    pub inputs: Tensor,
    /// Σ_c Σ δδᵀ
    pub outputs: Tensor,
    /// How many.
    pub positions: i64,
}

impl Part {
    /// The tensor to add squares to; nothing else has any.
    fn diagonal(&self) -> Tensor {
        if let Part::Diagonal(sum) = self { sum.shallow_clone() } else { Tensor::new() }
    }
}
