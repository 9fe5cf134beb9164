//! The arithmetic of blocks of weights, as tensors.
//!
//! Here is what the driver asks of rows over blocks ([`Arithmetic`]): how parameters become the block that a row sees
//! and its results become parameters again, and what happens to frozen, unused and late members of a joint block. The
//! equations are the rows'. One file, since every function here is a method of the one trait or a step of it.

use super::arithmetic::{Arithmetic, Ascended, Blocks, Plan, Sample, Step, Unit, delta, rms, unsupported};
use super::block_rule::{Block, BlockRule, Displaced, Evaluated, Learned};
use super::row::Row;
use super::sums::Sums;
use crate::kernel::{self, Draw, Noise};
use crate::linalg::matrix_shape;
use crate::params::{Leaf, Params, Perturbed};
use crate::prior::{BlockPrior, Family, Isotropic, Prior, PriorOf, block_shape};
use crate::{Error, Expectation, Result, Statistic, check};
use std::collections::HashSet;
use tch::{Kind, Tensor};

/// What is kept of one block.
#[derive(Debug)]
pub struct Kept {
    /// The mean, where the variables cannot hold it: of a joint block, and of weights of less precision.
    mean: Option<Tensor>,
    state: Vec<Tensor>,
    /// On the scale of the mean loss.
    prior: BlockPrior,
    /// e of the evaluation that takes place.
    displacement: Option<Displaced>,
}

/// Some of the parameters of a joint block, while the others are held where they are.
struct Part {
    /// Positions of their weights in the block, and those of the rest.
    index: Tensor,
    rest: Tensor,
}

impl Part {
    /// A state tensor of the part alone: its rows and columns.
    fn of(&self, t: &Tensor) -> Result<Tensor> {
        (0..t.dim() as i64).try_fold(t.shallow_clone(), |t, d| Ok(t.f_index_select(d, &self.index)?))
    }

    fn of_all(&self, tensors: &[Tensor]) -> Result<Vec<Tensor>> {
        tensors.iter().map(|t| self.of(t)).collect()
    }
}

impl<R: BlockRule> Unit<R> {
    /// Shape and kind of the block.
    fn form(&self, params: &Params) -> (Vec<i64>, Kind) {
        match &self.members[..] {
            [i] if !R::JOINT => {
                let leaf = &params.leaves()[*i];
                (block_shape(&leaf.tensor.size()), leaf.state_kind())
            }
            _ => (vec![self.leaves(params).map(|leaf| leaf.tensor.numel() as i64).sum()], Kind::Double),
        }
    }

    /// Shape of its parameter, or of a joint block.
    fn shape(&self, params: &Params) -> Vec<i64> {
        match &self.members[..] {
            [i] if !R::JOINT => params.leaves()[*i].tensor.size(),
            _ => self.form(params).0,
        }
    }

    /// The state that it would start with under these settings.
    fn first_state(&self, params: &Params, row: &R, prior: &BlockPrior) -> Result<Vec<Tensor>> {
        row.initial(&self.shape(params), &self.mean_now(params)?, prior)
    }

    /// One tensor in the shape of the block from one per parameter.
    fn join(&self, params: &Params, part: impl Fn(usize, &Leaf) -> Result<Tensor>) -> Result<Tensor> {
        let (shape, kind) = self.form(params);
        let flat = |(i, leaf): (&usize, &Leaf)| Ok(part(*i, leaf)?.f_to_kind(kind)?.f_reshape([-1])?);
        let parts = self.members.iter().zip(self.leaves(params)).map(flat).collect::<Result<Vec<_>>>()?;
        // A single part is not copied and may be the variable's own memory, so nobody writes to the result.
        let whole = if let [one] = &parts[..] { one.shallow_clone() } else { Tensor::f_cat(&parts, 0)? };
        Ok(whole.f_reshape(shape)?)
    }

    /// A tensor of the block as its parameters, in their shapes.
    fn split<'a>(&self, params: &'a Params, x: &Tensor) -> Vec<(usize, &'a Leaf, Tensor)> {
        let flat = x.reshape([-1]);
        let mut first = 0;
        let part = |(i, leaf): (&usize, &'a Leaf)| {
            let n = leaf.tensor.numel() as i64;
            first += n;
            (*i, leaf, flat.narrow(0, first - n, n).reshape(leaf.tensor.size()))
        };
        self.members.iter().zip(self.leaves(params)).map(part).collect()
    }

    /// The mean, with the weights that were changed from outside (loaded, re-initialised) where it is kept apart.
    fn mean_now(&self, params: &Params) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let Some(own) = &self.kept.mean else { return self.join(params, |_, leaf| Ok(leaf.tensor.detach())) };
        let parts = self.split(params, own);
        self.join(params, |i, leaf| {
            let own = parts.iter().find(|p| p.0 == i).map_or_else(|| leaf.tensor.detach(), |p| p.2.shallow_clone());
            // As the last update left it, rounded to the variable's kind.
            let unchanged = own.f_to_kind(leaf.tensor.kind())?.f_eq_tensor(&leaf.tensor)?;
            Ok(own.f_where_self(&unchanged, &leaf.tensor.f_to_kind(own.kind())?)?)
        })
    }

    /// Standard normals of the shape of the block.
    fn normals(&self, step: Step, sample: Sample) -> Result<Tensor> {
        let (params, kind) = (step.params, self.form(step.params).1);
        // By parameter and not by block, so that a weight keeps its noise when the block grows.
        self.join(params, |i, _| drawn(params, i, kind, sample.noise, step.number, sample.draw))
    }

    /// The part of a joint block whose parameters pass; `None` if all do.
    fn part(&self, params: &Params, passes: impl Fn(usize, &Leaf) -> bool) -> Result<Option<Part>> {
        if self.members.iter().zip(self.leaves(params)).all(|(i, leaf)| passes(*i, leaf)) {
            return Ok(None);
        }
        // By way of `join`, so that a position means the same as in the other tensors of the block.
        let mask = self.join(params, |i, leaf| {
            let (size, like) = ([leaf.tensor.numel() as i64], (Kind::Double, leaf.tensor.device()));
            Ok(if passes(i, leaf) { Tensor::f_ones(size, like) } else { Tensor::f_zeros(size, like) }?)
        })?;
        let positions = |mask: Tensor| Ok::<_, Error>(mask.f_nonzero()?.f_reshape([-1])?);
        Ok(Some(Part { index: positions(mask.f_ne(0.0)?)?, rest: positions(mask.f_eq(0.0)?)? }))
    }

    /// e of a block from standard normals; in a joint block the frozen weights stay.
    fn displaced(&self, params: &Params, z: &Tensor) -> Result<Displaced> {
        let Some(part) = self.part(params, |_, leaf| leaf.trainable())? else {
            return self.row.displacement(self.steps + 1, z, &self.kept.state, &self.kept.prior);
        };
        let prior = self.kept.prior.conditional(&part.index, &part.rest, &self.mean_now(params)?)?;
        // Rows and columns of a *precision* are the conditional Gaussian given the rest, which is what holding means.
        let moved = self.row.displacement(self.steps + 1, &part.of(z)?, &part.of_all(&self.kept.state)?, &prior)?;
        Ok(z.f_zeros_like()?.f_index_copy(0, &part.index, &moved.e)?.into())
    }

    /// The new mean and state.
    fn updated(&self, step: Step, sums: &Sums, statistics: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let params = step.params;
        let (mean, when) = (self.mean_now(params)?, self.when(1, step.lr_factor));
        let gradient = self.gradient(params, sums)?;
        let x = Block { mean: &mean, gradient: &gradient, statistics, prior: &self.kept.prior };
        // The state is learned from the whole block; the loss is flat along what it does not depend on.
        let (new, state) = self.row.update(when, &x, &self.kept.state)?;
        let Some(part) = self.part(params, |i, leaf| sums.gradient(i, leaf).is_some())? else {
            return Ok((new, state));
        };
        let prior = self.kept.prior.conditional(&part.index, &part.rest, &mean)?;
        let (old, gradient, statistics) = (part.of(&mean)?, part.of(&gradient)?, part.of_all(statistics)?);
        let x = Block { mean: &old, gradient: &gradient, statistics: &statistics, prior: &prior };
        // A second time, for the mean: the first also moves what has no gradient, through off-diagonal elements.
        let (moved, _) = self.row.update(when, &x, &part.of_all(&self.kept.state)?)?;
        Ok((mean.f_index_copy(0, &part.index, &moved)?, state))
    }

    /// ĝ of the block, with zeros for parameters that the loss does not depend on.
    fn gradient(&self, params: &Params, sums: &Sums) -> Result<Tensor> {
        self.join(params, |i, leaf| {
            sums.gradient(i, leaf).map_or_else(|| Ok(leaf.tensor.detach().f_zeros_like()?), |g| Ok(g.shallow_clone()))
        })
    }

    fn has_gradient(&self, params: &Params, sums: &Sums) -> bool {
        self.members.iter().zip(self.leaves(params)).any(|(i, leaf)| sums.gradient(*i, leaf).is_some())
    }
}

/// Noise samples from here on are those of Hutchinson's probes and of labels: the upper half of the 32 bits that a
/// sample's number has, behind all that an expectation draws.
pub(super) const PROBES: u64 = 1 << 31;

/// Random signs for the p-th probe of a block in evaluation number `k`, one per trainable weight.
pub(super) fn probe(
    params: &Params,
    members: &[usize],
    kind: Kind,
    noise: &Noise,
    step: u64,
    sample: u64,
) -> Result<Tensor> {
    let _no_grad = tch::no_grad_guard();
    let parts = members.iter().map(|i| Ok(drawn(params, *i, kind, noise, step, sample)?.f_reshape([-1])?));
    let z = Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
    Ok(z.ge(0.0).to_kind(z.kind()) * 2.0 - 1.0)
}

/// Standard normals of one parameter, in its shape.
fn drawn(params: &Params, parameter: usize, kind: Kind, noise: &Noise, step: u64, sample: u64) -> Result<Tensor> {
    let leaf = &params.leaves()[parameter];
    let at = Draw { step, sample, parameter, group: params.noise_group(parameter) };
    let like = Tensor::f_empty(leaf.tensor.size(), (kind, leaf.tensor.device()))?;
    noise.draw(at, &like)?.tensor(&like)
}

impl<R: BlockRule> Arithmetic<R> for Blocks {
    type Kept = Kept;
    const SINGLE: bool = false;

    fn check(row: &R) -> Result<()> {
        let adversarial = row.expectation().is_adversarial();
        let expected = "an expectation without an ascent: this row has no adversarial point";
        check::that("expectation", row.expectation(), !adversarial, expected)?;
        match row.statistic() {
            Statistic::Unused | Statistic::Price => Ok(()),
            Statistic::KroneckerFisher(_) if !R::JOINT => Ok(()),
            other if other.is_second_order() => Ok(()),
            other => unsupported(other, "a statistic of blocks"),
        }
    }
    fn family() -> Family {
        R::PRIOR
    }
    fn kind(leaf: &Leaf) -> Kind {
        if R::JOINT { Kind::Double } else { leaf.state_kind() }
    }
    fn extend(units: &mut Vec<Unit<R>>, params: &Params, plan: &Plan<R>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let known: HashSet<usize> = units.iter().flat_map(|unit| unit.members.iter().copied()).collect();
        let trained = |i: &usize| params.leaves()[*i].trainable();
        let fresh: Vec<usize> = (0..params.len()).filter(|i| trained(i) && !known.contains(i)).collect();
        if !R::JOINT {
            for i in fresh {
                let (row, lr) = plan.settings(&params.leaves()[i])?;
                units.push(unit(vec![i], row, lr, params, plan.prior)?);
            }
            // One that was frozen when its neighbours got their units comes late; files rely on the order.
            units.sort_by_key(|unit| unit.members[0]);
            return Ok(());
        }
        if !plan.overrides.is_empty() {
            let problem = "has one block of all weights and so no groups; leave .group(..) and .named(..) out";
            return Err(Error::Parameters(format!("{} {problem}", R::NAME)));
        }
        if fresh.is_empty() {
            return Ok(());
        }
        let Some(old) = units.first_mut() else {
            units.push(unit(fresh, plan.row, plan.lr, params, plan.prior)?);
            return Ok(());
        };
        // The block grows at its end, so that what it has learned keeps its place in the corner.
        let mean = old.mean_now(params)?;
        let members = old.members.iter().copied().chain(fresh).collect();
        let mut grown = unit(members, old.row, old.lr, params, plan.prior)?;
        let corner = |t: &Tensor, old: &Tensor| {
            let place =
                (0..t.dim() as i64).zip(old.size()).try_fold(t.shallow_clone(), |t, (d, n)| t.f_narrow(d, 0, n));
            // Into a view, and so into the state itself.
            place?.f_copy_(old)?;
            Ok::<_, Error>(())
        };
        for (t, old) in grown.kept.state.iter().zip(&old.kept.state).chain(grown.kept.mean.iter().zip([&mean])) {
            corner(t, old)?;
        }
        grown.steps = old.steps;
        *old = grown;
        Ok(())
    }
    fn admits(prior: &PriorOf, row: &R) -> Result<()> {
        super::prior::admits(prior, row)
    }
    fn configure(unit: &mut Unit<R>, params: &Params, row: R) {
        let _no_grad = tch::no_grad_guard();
        unit.row = super::prior::in_row(&unit.prior, row);
        unit.kept.prior = scaled(&unit.prior, &unit.row);
        // Before the first state there is none to fit. This only fails when memory runs out.
        let initial = unit.first_state(params, &unit.row, &unit.kept.prior);
        let (false, Ok(initial)) = (unit.kept.state.is_empty(), initial) else { return };
        for (own, new) in unit.kept.state.iter_mut().zip(initial) {
            // Only what settings ask for now, or no longer: a state that goes on must not be reset.
            if own.size() != new.size() {
                *own = new;
            }
        }
    }
    fn follow(units: &mut [Unit<R>], params: &Params) {
        for unit in units {
            if unit.kept.mean.is_some() {
                // This only fails when memory runs out, and then the next use finds the mean again.
                unit.kept.mean = unit.mean_now(params).ok().or(unit.kept.mean.take());
            }
        }
    }
    fn perturb(units: &mut [Unit<R>], step: Step, sample: Sample) -> Result<Perturbed> {
        let params = step.params;
        let _no_grad = tch::no_grad_guard();
        let mut points = Vec::new();
        for unit in units.iter_mut().filter(|unit| unit.leaves(params).any(Leaf::trainable)) {
            let z = unit.normals(step, sample)?;
            let Displaced { e, rotated } = unit.displaced(params, &z)?;
            let signed = |t: Tensor| if sample.sign < 0.0 { -t } else { t };
            // The second of an antithetic pair repeats the draw with a minus.
            let (e, rotated) = (signed(e), rotated.map(signed));
            for (_, leaf, x) in unit.split(params, &(unit.mean_now(params)? + &e)) {
                if leaf.trainable() {
                    // Only the point is rounded to half precision; the statistic is formed with the e that was drawn.
                    let x = x.to_kind(leaf.tensor.kind());
                    // Copied out of the block: several variables must not share memory and version counter.
                    points.push((leaf.tensor.shallow_clone(), if R::JOINT { x.copy() } else { x }));
                }
            }
            unit.kept.displacement = Some(Displaced { e, rotated });
        }
        // Last, so that an error of the row leaves all variables untouched.
        Perturbed::enter(points)
    }
    fn ascend(_: &mut [Unit<R>], _: Step, _: Perturbed, _: &[Option<Tensor>], _: f64) -> Result<Ascended> {
        Err(Error::Loss(format!("{} has no adversarial point", R::NAME)))
    }
    fn form(units: &[Unit<R>], params: &Params, _: &Perturbed, sums: &mut Sums) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let mut formed = Vec::with_capacity(units.len());
        for (u, unit) in units.iter().enumerate() {
            if !unit.has_gradient(params, sums) {
                formed.push(Vec::new());
                continue;
            }
            let gradient = unit.gradient(params, sums)?;
            // One zero, expanded: a row only reads it.
            let at_mean = || {
                Ok::<_, Error>(gradient.f_new_zeros([1], (gradient.kind(), gradient.device()))?.f_expand_as(&gradient)?)
            };
            // Delta may have come from a checkpoint, to an optimizer that has drawn samples before.
            let moved = unit.kept.displacement.as_ref().filter(|_| unit.row.expectation() != Expectation::Delta);
            let displacement = moved.map_or_else(at_mean, |moved| Ok(moved.e.shallow_clone()))?;
            let rotated = moved.and_then(|moved| moved.rotated.as_ref());
            let second = sums.statistics.get(u).map_or(&[][..], Vec::as_slice);
            let t = unit.steps + 1;
            let x = Evaluated { t, displacement: &displacement, rotated, gradient: &gradient, second };
            formed.push(unit.row.statistics(&x, &unit.kept.state)?);
        }
        sums.statistics = formed;
        Ok(())
    }
    fn update(units: &mut [Unit<R>], step: Step, at: Perturbed, sums: &mut Sums, formed: bool) -> Result<()> {
        let params = step.params;
        let _no_grad = tch::no_grad_guard();
        if !formed {
            Self::form(units, params, &at, sums)?;
        }
        // Whose way back must come before the new means, which are found from the old ones.
        drop(at);
        let _claim = params.claim()?;
        // All before the first write, because any of them can fail.
        let updated = units.iter().enumerate().map(|(u, unit)| {
            if !unit.has_gradient(params, sums) {
                return Ok(None);
            }
            let statistics = sums.statistics.get(u).map_or(&[][..], Vec::as_slice);
            let (mean, state) = unit.updated(step, sums, statistics)?;
            // What an update computes from finite derivatives can still overflow. State that was passed on unchanged
            // was looked at when it was new.
            let known = |t: &&Tensor| !unit.kept.state.iter().any(|old| old.is_set_to(t));
            let new = || state.iter().filter(known).chain([&mean]);
            if !kernel::sum_of_squares(new())?.is_finite()
                && let Some(value) = new().find_map(kernel::first_non_finite)
            {
                let (name, what) = (unit.name(params).to_owned(), "updated mean or state");
                return Err(Error::NonFiniteGradient { what, name, value, step: step.number });
            }
            Ok(Some((mean, state)))
        });
        let updated = updated.collect::<Result<Vec<_>>>()?;
        for (unit, updated) in units.iter_mut().zip(updated) {
            let Some((mean, state)) = updated else { continue };
            for (i, leaf, x) in unit.split(params, &mean) {
                if sums.gradient(i, leaf).is_some() {
                    // Through libtorch, which thereby sees the write; only the elementwise kernel has to report its
                    // own.
                    leaf.tensor.shallow_clone().copy_(&x);
                }
            }
            _ = unit.kept.mean.as_mut().map(|own| own.copy_(&mean));
            unit.kept.state = state;
            unit.steps += 1;
        }
        Ok(())
    }
    fn state(unit: &Unit<R>, i: usize) -> Option<Tensor> {
        Some(unit.kept.state.get(i)?.shallow_clone())
    }
    fn tensors(unit: &Unit<R>, params: &Params) -> Result<Vec<(String, Tensor)>> {
        let mean = ("mean".to_owned(), unit.mean_now(params)?);
        let state = R::STATE.iter().zip(&unit.kept.state).map(|(name, t)| (format!("state.{name}"), t.shallow_clone()));
        Ok(std::iter::once(mean).chain(state).collect())
    }
    fn form_of(unit: &Unit<R>, params: &Params) -> (Vec<i64>, Kind) {
        unit.form(params)
    }
    fn expected(unit: &Unit<R>, params: &Params, row: &R, prior: &PriorOf) -> Vec<(usize, Vec<i64>)> {
        let _no_grad = tch::no_grad_guard();
        // Only the row knows its shapes, so it is asked for a state, which is dropped at once.
        let Ok(initial) = unit.first_state(params, row, &scaled(prior, row)) else { return Vec::new() };
        initial.iter().map(Tensor::size).enumerate().collect()
    }
    fn statistics(unit: &Unit<R>, params: &Params) -> Result<Vec<Vec<i64>>> {
        let _no_grad = tch::no_grad_guard();
        // Again by asking the row, with zeros for all that it sees.
        let zero = unit.mean_now(params)?.zeros_like();
        let ([r, c], n) = (matrix_shape(&zero.size()), zero.numel() as i64);
        let sizes = match unit.row.statistic() {
            Statistic::Hessian => vec![vec![n, n]],
            Statistic::HessianDiagonal | Statistic::Hutchinson { .. } => vec![vec![n]],
            Statistic::KroneckerFisher(_) => vec![vec![r, r], vec![c, c]],
            _ => Vec::new(),
        };
        let second: Vec<Tensor> = sizes.iter().map(|size| zero.new_zeros(size, (zero.kind(), zero.device()))).collect();
        let x = Evaluated { t: 1, displacement: &zero, rotated: None, gradient: &zero, second: &second };
        Ok(unit.row.statistics(&x, &unit.kept.state)?.iter().map(Tensor::size).collect())
    }
    fn restore(unit: &mut Unit<R>, params: &Params, mean: &Tensor, state: Vec<(usize, Tensor)>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (_, leaf, x) in unit.split(params, mean) {
            leaf.tensor.shallow_clone().copy_(&x);
        }
        _ = unit.kept.mean.as_mut().map(|own| own.copy_(mean));
        unit.kept.state = state.into_iter().map(|(_, t)| t).collect();
        Ok(())
    }
    fn posterior(units: &[Unit<R>], step: Step) -> Result<R::Posterior> {
        let params = step.params;
        let _no_grad = tch::no_grad_guard();
        let mut parts = Vec::new();
        for unit in units.iter().filter(|unit| unit.leaves(params).any(Leaf::trainable)) {
            parts.push((unit, unit.mean_now(params)?, unit.part(params, |_, leaf| leaf.trainable())?));
        }
        let conditional = parts.iter().map(|(unit, mean, part)| {
            part.as_ref().map_or(Ok(None), |part| {
                let prior = unit.kept.prior.conditional(&part.index, &part.rest, mean)?;
                Ok(Some((part.of_all(&unit.kept.state)?, prior)))
            })
        });
        // Collected first, because what is handed to the row borrows from it.
        let conditional = conditional.collect::<Result<Vec<_>>>()?;
        let learned = parts.iter().zip(&conditional).map(|((unit, mean, _), conditional)| {
            let own = || (&unit.kept.state[..], &unit.kept.prior);
            let (state, prior) = conditional.as_ref().map_or_else(own, |(state, prior)| (&state[..], prior));
            let means = unit.split(params, mean).into_iter().filter(|(_, leaf, _)| leaf.trainable());
            let means = means.map(|(_, leaf, x)| (leaf.name().to_owned(), x.copy())).collect();
            Learned { row: unit.row, when: unit.when(0, step.lr_factor), means, state, prior }
        });
        R::posterior(learned.collect())
    }
    fn learned_posterior(_: &[Unit<R>], _: Step) -> Result<R::Posterior> {
        unreachable!("`Optimizer::learned_posterior` is of rows over weights")
    }
}

/// A prior on the scale of the mean loss.
fn scaled<R: Row>(prior: &PriorOf, row: &R) -> BlockPrior {
    match prior {
        PriorOf::Isotropic(isotropic) => BlockPrior::isotropic(delta(*isotropic, row)),
        PriorOf::Gaussian(p) => p.per_example(row.effective_sample_size().unwrap_or(f64::NAN)),
    }
}

/// A new block.
fn unit<R: BlockRule>(members: Vec<usize>, row: R, lr: f64, params: &Params, prior: Option<&Prior>) -> Result<Unit<R>> {
    let kept = Kept { mean: None, state: Vec::new(), prior: BlockPrior::isotropic(0.0), displacement: None };
    let prior_of_none = PriorOf::Isotropic(Isotropic::WeightDecay);
    let mut unit = Unit { members, row, lr, steps: 0, rms: 0.0, prior: prior_of_none, kept };
    let (shape, kind) = unit.form(params);
    let leaves: Vec<&Leaf> = unit.leaves(params).collect();
    if let Some(prior) = prior {
        unit.prior = prior.of(&leaves, &shape, kind, row.effective_sample_size())?;
    }
    Blocks::admits(&unit.prior, &row)?;
    <Blocks as Arithmetic<R>>::configure(&mut unit, params, row);
    let mean = unit.mean_now(params)?;
    unit.rms = rms(&mean)?;
    let apart = R::JOINT || leaves.iter().any(|leaf| leaf.tensor.kind() != kind);
    // After `configure`: whether h starts at h₀ depends on the prior.
    let state = unit.row.initial(&unit.shape(params), &mean, &unit.kept.prior);
    unit.kept.state = state.map_err(|e| Error::parameter(unit.name(params), e.to_string()))?;
    for (state, t) in R::STATE.iter().zip(&unit.kept.state) {
        if let Some(x) = kernel::first_non_finite(t) {
            let problem =
                format!("its initial state `{state}` is {x:e}: the settings that it follows from are beyond f32");
            return Err(Error::parameter(unit.name(params), problem));
        }
    }
    unit.kept.mean = apart.then(|| mean.copy());
    Ok(unit)
}
