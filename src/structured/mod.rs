//! The driver of the rows whose posterior is not a product over the weights: perturb → closure → estimate → update, on
//! blocks of weights instead of single ones.

mod derivatives;
mod eigenbasis;
mod rule;
mod state;

pub(crate) use eigenbasis::{EIGENBASIS, Eigenbasis};
pub use rule::{Block, Evaluated, FisherLabels, Learned, SecondDerivatives, StructuredRule};

use crate::driver::Override;
use crate::expectation::Perturbed;
use crate::gradient::{Clip, IntoTensor, Loss};
use crate::kernel::{self, Draw, Field, Noise, Philox};
use crate::nn::tape::Recording;
use crate::params::Leaf;
use crate::posterior::matrix_shape;
use crate::rows::When;
use crate::{Error, Expectation, Params, Prior, Result, Schedule};
use tch::{Kind, Tensor};

/// Everything about a structured optimizer that is not a number of its row; from [`StructuredRule::builder`].
#[derive(Debug)]
pub struct StructuredBuilder<R: StructuredRule> {
    config: R,
    prior: Option<Prior>,
    noise: Option<Noise>,
    overrides: Vec<Override<R>>,
    schedule: Schedule,
    clip: Option<Clip>,
}

impl<R: StructuredRule> StructuredBuilder<R> {
    pub(crate) fn new(config: R) -> Self {
        let schedule = Schedule::Constant;
        StructuredBuilder { config, prior: None, noise: None, overrides: Vec::new(), schedule, clip: None }
    }

    /// Uses this prior in place of the weight decay. These rows have isotropic priors only, [`Prior::isotropic`]; for any
    /// other, [`StructuredBuilder::build`] is an error.
    #[must_use]
    pub fn prior(mut self, prior: impl Into<Prior>) -> Self {
        self.prior = Some(prior.into());
        self
    }

    /// Draws from this noise; as [`Builder::noise`](crate::Builder::noise).
    #[must_use]
    pub fn noise(mut self, noise: impl Into<Noise>) -> Self {
        self.noise = Some(noise.into());
        self
    }

    /// Changes hyper-parameters for the variables of one group (tch's `set_group`); as
    /// [`Builder::group`](crate::Builder::group). Not for rows with one block of all weights
    /// ([`StructuredRule::JOINT`]).
    #[must_use]
    pub fn group(self, group: usize, change: impl Fn(R) -> R + Send + 'static) -> Self {
        self.overriding(move |g, _| g == group, change)
    }

    /// Changes hyper-parameters for the variables whose name passes; as [`Builder::named`](crate::Builder::named). Not for
    /// rows with one block of all weights.
    #[must_use]
    pub fn named(
        self,
        applies: impl Fn(&str) -> bool + Send + 'static,
        change: impl Fn(R) -> R + Send + 'static,
    ) -> Self {
        self.overriding(move |_, name| applies(name), change)
    }

    fn overriding(
        mut self,
        applies: impl Fn(usize, &str) -> bool + Send + 'static,
        change: impl Fn(R) -> R + Send + 'static,
    ) -> Self {
        self.overrides.push(Override::new(applies, change));
        self
    }

    /// Multiplies the learning rate by a function of the step count; default constant.
    #[must_use]
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Limits every element of each evaluation's gradient to ±max > 0, before curvature is estimated from it. Replaces an
    /// earlier choice; default no clipping.
    #[must_use]
    pub fn clip_grad_value(mut self, max: f64) -> Self {
        self.clip = Some(Clip::Value(max));
        self
    }

    /// Scales each evaluation's gradient to a global L2 norm of at most max > 0, before curvature is estimated from it.
    /// Replaces an earlier choice; default no clipping.
    #[must_use]
    pub fn clip_grad_norm(mut self, max: f64) -> Self {
        self.clip = Some(Clip::Norm(max));
        self
    }

    /// Builds the optimizer for the parameters that are trainable now; the others are left alone. `lr` is the learning
    /// rate, whatever the configuration's was.
    ///
    /// # Errors
    /// A hyper-parameter out of range, a prior that is not isotropic or without the row's `ess`, an override in a row with
    /// one block or one that changes where the loss is evaluated, no trainable parameter, parameters on several devices.
    pub fn build(self, params: impl Into<Params>, lr: f64) -> Result<StructuredOptimizer<R>> {
        let alone = self.config.with_learning_rate(lr);
        let config = in_prior(self.prior.as_ref(), alone)?;
        config.validate()?;
        if R::JOINT && !self.overrides.is_empty() {
            return Err(Error::Parameters(format!(
                "{} has one block of all weights and so no groups; leave .group(..) and .named(..) out",
                R::NAME
            )));
        }
        self.schedule.validate()?;
        self.clip.map_or(Ok(()), Clip::validate)?;
        let params = params.into();
        params.check()?;
        params.check_overlap()?;
        let noise = self.noise.unwrap_or_else(|| {
            let second = config.second_derivatives();
            let labels = FisherLabels::Sampled;
            let random = matches!(second, SecondDerivatives::Hutchinson { .. })
                || second == SecondDerivatives::Kronecker { labels };
            let draws = random || config.expectation() != Expectation::Delta;
            if draws { Philox::from_libtorch() } else { Philox { seed: 0 } }.into()
        });
        let trained: Vec<usize> = (0..params.len()).filter(|i| params.leaves()[*i].trainable()).collect();
        let members = if R::JOINT { vec![trained] } else { trained.into_iter().map(|i| vec![i]).collect() };
        let _no_grad = tch::no_grad_guard();
        let kept = members.into_iter().map(|members| {
            let mean = initial_mean::<R>(&params, &members)?;
            let leaf = &params.leaves()[members[0]];
            let own = self.overrides.iter().fold(alone, |config, o| o.apply(config, leaf.group, leaf.name()));
            let own = in_prior(self.prior.as_ref(), own)?;
            check_change(&config, &own)?;
            let state = own.initial(&mean);
            Ok(Kept { members, config: own, mean, state })
        });
        let blocks = kept.collect::<Result<Vec<_>>>()?;
        let (schedule, clip) = (self.schedule, self.clip);
        Ok(StructuredOptimizer { params, blocks, config, noise, schedule, clip, steps: 0 })
    }
}

/// The configuration with the prior in place of its weight decay.
fn in_prior<R: StructuredRule>(prior: Option<&Prior>, config: R) -> Result<R> {
    let Some(prior) = prior else { return Ok(config) };
    let precision = prior.isotropic_precision().ok_or_else(|| {
        Error::Posterior(format!(
            "{} takes an isotropic prior only: Prior::isotropic(precision), or its weight_decay",
            R::NAME
        ))
    })?;
    Ok(config.with_weight_decay(precision / crate::check::ess(config.effective_sample_size())?))
}

/// Errors if a block cannot have this configuration: out of range, or evaluated elsewhere than the others.
fn check_change<R: StructuredRule>(config: &R, changed: &R) -> Result<()> {
    changed.validate()?;
    let together = |c: &R| (c.expectation(), c.second_derivatives());
    if together(config) == together(changed) {
        return Ok(());
    }
    Err(Error::Parameters(
        "an override changes where the loss is evaluated or which second derivatives it takes; that is one choice for all"
            .to_owned(),
    ))
}

/// An optimizer whose posterior is not a product over the weights: one row ([`StructuredRule`]) over the parameters that
/// were trainable when it was built.
///
/// The loop is that of [`Optimizer`](crate::Optimizer), and so are the promises: outside of a step the variables hold the
/// mean; a call that returns an error has changed nothing. A parameter that the loss does not depend on has the gradient
/// zero, so that it goes towards its prior.
///
/// ```
/// # use tch::{nn, nn::Module, Device, Kind, Tensor};
/// use tch_blr::{FullVon, StructuredRule};
/// # fn main() -> tch_blr::Result<()> {
/// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::randn([8, 1], (Kind::Float, Device::Cpu)));
/// let vs = nn::VarStore::new(Device::Cpu);
/// let net = nn::linear(vs.root(), 4, 1, Default::default());
/// let mut opt = FullVon::default().ess(8.0).build(&vs, 0.1)?;
/// opt.step(|| (net.forward(&x) - &y).square().mean(Kind::Float) * 0.5)?;
/// assert_eq!(opt.posterior()?.precision().size(), [5, 5]); // four weights and the bias
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct StructuredOptimizer<R: StructuredRule> {
    params: Params,
    blocks: Vec<Kept<R>>,
    config: R,
    noise: Noise,
    schedule: Schedule,
    clip: Option<Clip>,
    steps: u64,
}

/// What is kept of one block.
#[derive(Debug)]
struct Kept<R> {
    /// Indices of its parameters.
    members: Vec<usize>,
    /// After the overrides.
    config: R,
    mean: Tensor,
    state: Vec<Tensor>,
}

/// Running means over the evaluations of a step, per block.
struct Mean {
    gradient: Tensor,
    statistics: Vec<Tensor>,
}

/// Noise samples from here on are those of Hutchinson's probes and of labels.
const PROBES: u64 = 1 << 31;

/// Shape and kind of a block.
fn form<R: StructuredRule>(members: &[&Leaf]) -> (Vec<i64>, Kind) {
    match members {
        [leaf] if !R::JOINT => {
            let shape = leaf.tensor.size();
            let shape = if shape.len() < 2 { vec![shape.iter().product()] } else { matrix_shape(&shape).to_vec() };
            (shape, leaf.state_kind())
        }
        _ => (vec![members.iter().map(|leaf| leaf.tensor.numel() as i64).sum()], Kind::Double),
    }
}

fn initial_mean<R: StructuredRule>(params: &Params, members: &[usize]) -> Result<Tensor> {
    let leaves: Vec<&Leaf> = members.iter().map(|i| &params.leaves()[*i]).collect();
    let (shape, kind) = form::<R>(&leaves);
    let parts = leaves.iter().map(|leaf| Ok(leaf.tensor.detach().f_to_kind(kind)?.f_reshape([-1])?));
    Ok(Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?.f_reshape(shape)?)
}

impl<R> Kept<R> {
    fn leaves<'a>(&self, params: &'a Params) -> Vec<&'a Leaf> {
        self.members.iter().map(|i| &params.leaves()[*i]).collect()
    }

    /// A tensor of the block as its parameters, in their shapes.
    fn split<'a>(&self, params: &'a Params, x: &Tensor) -> Vec<(&'a Leaf, Tensor)> {
        let flat = x.reshape([-1]);
        let mut first = 0;
        let part = |leaf: &'a Leaf| {
            let n = leaf.tensor.numel() as i64;
            first += n;
            (leaf, flat.narrow(0, first - n, n).reshape(leaf.tensor.size()))
        };
        self.leaves(params).into_iter().map(part).collect()
    }

    /// The mean; where the variables were changed from outside (loaded, re-initialised), so is it.
    fn mean_now(&self, params: &Params) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let parts = self.split(params, &self.mean).into_iter().map(|(leaf, own)| {
            let unchanged = own.f_to_kind(leaf.tensor.kind())?.f_eq_tensor(&leaf.tensor)?;
            Ok(own.f_where_self(&unchanged, &leaf.tensor.f_to_kind(own.kind())?)?.f_reshape([-1])?)
        });
        Ok(Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?.f_reshape(self.mean.size())?)
    }
}

impl<R: StructuredRule> StructuredOptimizer<R> {
    /// Evaluates the loss (once, or at each sample), updates the weights, and returns the mean loss. The closure is that
    /// of [`Optimizer::step`](crate::Optimizer::step).
    ///
    /// # Errors
    /// The closure's own error, a loss of another shape or without a graph, a loss or derivative that is not finite, a
    /// precision that is not positive definite, parameters that changed kind, device or whether they are trainable.
    /// Nothing has changed then.
    pub fn step<L: IntoTensor>(&mut self, mut closure: impl FnMut() -> L) -> Result<f64> {
        self.params.refresh();
        self.check()?;
        let before = self.blocks.iter().map(|b| b.mean_now(&self.params)).collect::<Result<Vec<_>>>()?;
        let evaluations = self.config.expectation().evaluations();
        let mut loss = 0.0;
        let mut sums: Option<Vec<Mean>> = None;
        for k in 0..evaluations {
            let (value, found) = self.evaluate(k, &before, &mut closure)?;
            let share = 1.0 / (k + 1) as f64;
            loss += (value - loss) * share;
            sums = Some(match sums {
                None => found,
                Some(sums) => sums.into_iter().zip(found).map(|(a, b)| a.merge(b, share)).collect(),
            });
        }
        self.update(&before, &sums.unwrap_or_default())?;
        Ok(loss)
    }

    /// Errors unless the parameters are those that the optimizer was built for.
    fn check(&self) -> Result<()> {
        self.params.check()?;
        let members: Vec<usize> = self.blocks.iter().flat_map(|b| b.members.iter().copied()).collect();
        for (i, leaf) in self.params.leaves().iter().enumerate() {
            if leaf.trainable() != members.contains(&i) {
                let now = if leaf.trainable() { "trainable" } else { "frozen" };
                let problem = format!("it is {now} now and was not when the optimizer was built; build it afterwards");
                return Err(Error::parameter(leaf.name(), problem));
            }
        }
        Ok(())
    }

    /// The noise of a block: standard normals of its shape.
    fn normals(&self, b: usize, sample: u64) -> Result<Tensor> {
        let block = &self.blocks[b];
        let mut group = 0;
        let mut parts = Vec::new();
        for (parameter, leaf) in self.params.leaves().iter().enumerate() {
            if block.members.contains(&parameter) {
                let at = Draw { step: self.steps, sample, parameter, group };
                let like = Tensor::f_empty(leaf.tensor.size(), (block.mean.kind(), block.mean.device()))?;
                parts.push(kernel::tensor(self.noise.draw(at, &like)?.field(), &like).f_reshape([-1])?);
            }
            group += kernel::groups(leaf.tensor.numel());
        }
        Ok(Tensor::f_cat(&parts, 0)?.f_reshape(block.mean.size())?)
    }

    /// e of every block in evaluation number `k`.
    fn displacements(&self, k: u64) -> Result<Vec<Tensor>> {
        let _no_grad = tch::no_grad_guard();
        let Some((sample, sign)) = self.config.expectation().draw(k) else {
            return Ok(self.blocks.iter().map(|b| b.mean.zeros_like()).collect());
        };
        let of = |(b, block): (usize, &Kept<R>)| {
            Ok(block.config.displacement(&self.normals(b, sample)?, &block.state)? * sign)
        };
        self.blocks.iter().enumerate().map(of).collect()
    }

    fn evaluate<L: IntoTensor>(
        &self,
        k: u64,
        means: &[Tensor],
        closure: &mut impl FnMut() -> L,
    ) -> Result<(f64, Vec<Mean>)> {
        let displacements = self.displacements(k)?;
        let guard = if self.config.expectation() == Expectation::Delta {
            Perturbed::default()
        } else {
            let _no_grad = tch::no_grad_guard();
            let points = self.blocks.iter().zip(means).zip(&displacements).flat_map(|((block, m), e)| {
                let parts = block.split(&self.params, &(m + e)).into_iter();
                parts.map(|(leaf, x)| (&leaf.tensor, x.to_kind(leaf.tensor.kind()).copy()))
            });
            Perturbed::enter(points.collect::<Vec<_>>())?
        };
        let second = self.config.second_derivatives();
        let recording = matches!(second, SecondDerivatives::Kronecker { .. }).then(Recording::start);
        let loss = closure();
        let tape = recording.map(Recording::finish);
        let loss = Loss::new(loss.into_tensor()?, self.steps)?;
        let params: Vec<Vec<&Tensor>> =
            self.blocks.iter().map(|b| b.leaves(&self.params).iter().map(|leaf| &leaf.tensor).collect()).collect();
        let probe = |b: usize, p: usize| {
            let _no_grad = tch::no_grad_guard();
            let z = self.normals(b, PROBES + k * 1024 + p as u64)?.f_reshape([-1])?;
            Ok(z.ge(0.0).to_kind(z.kind()) * 2.0 - 1.0)
        };
        let found = if let (SecondDerivatives::Kronecker { labels }, Some(tape)) = (second, &tape) {
            let single = self.blocks.iter().flat_map(|b| b.leaves(&self.params));
            let named: Vec<_> = single.map(|leaf| (leaf.name(), &leaf.tensor)).collect();
            let normals = |i: usize, z: &Tensor| Ok(self.label_noise(k, i, z));
            derivatives::kronecker(&loss.mean, &named, tape, labels, self.steps == 0, normals)
        } else {
            derivatives::differentiate(&loss.mean, &params, second, probe)
        };
        drop(guard);
        // The closure may have changed the variables.
        self.check()?;
        let found = found?;
        let _no_grad = tch::no_grad_guard();
        let mut gradients: Vec<Option<Tensor>> = found.gradient.into_iter().map(Some).collect();
        for (b, (g, second)) in gradients.iter().flatten().zip(&found.second).enumerate() {
            self.finite("gradient", b, g)?;
            second.iter().try_for_each(|h| self.finite("Hessian", b, h))?;
        }
        if let Some(clip) = self.clip {
            clip.apply(&mut gradients);
        }
        let mut result = Vec::new();
        for ((block, e), (g, h)) in
            self.blocks.iter().zip(&displacements).zip(gradients.into_iter().flatten().zip(found.second))
        {
            let kind = block.mean.kind();
            let gradient = g.f_to_kind(kind)?.f_reshape(block.mean.size())?;
            let second = h.iter().map(|h| h.f_to_kind(kind)).collect::<std::result::Result<Vec<_>, _>>()?;
            let x = Evaluated { displacement: e, gradient: &gradient, second: &second };
            let statistics = block.config.statistics(&x, &block.state)?;
            result.push(Mean { gradient, statistics });
        }
        Ok((loss.value, result))
    }

    /// An error if an element of a tensor of block number `block` is not finite.
    fn finite(&self, what: &'static str, block: usize, t: &Tensor) -> Result<()> {
        let Some(value) = kernel::first_non_finite(t) else { return Ok(()) };
        let bad = t.isfinite().logical_not().nonzero().get(0).int64_value(&[0]);
        let mut end = 0;
        let leaves = self.blocks[block].leaves(&self.params);
        let leaf = leaves.iter().find(|leaf| {
            end += leaf.tensor.numel() as i64;
            bad < end
        });
        let name = leaf.or(leaves.last()).map_or("?", |leaf| leaf.name()).to_owned();
        Err(Error::NonFiniteGradient { what, name, value, step: self.steps })
    }

    /// Standard normals for the labels of output `i` in evaluation number `k`, as
    /// [`Optimizer`](crate::Optimizer) has them.
    fn label_noise(&self, k: u64, i: usize, z: &Tensor) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        let seed = if let Noise::Philox(p) = &self.noise { p.seed } else { 0 };
        let at = Draw { step: self.steps, sample: PROBES + k, parameter: i, group: (i as u64) << 32 };
        kernel::tensor(Field::Noise { seed, at }, &z.detach().to_kind(Kind::Double).contiguous())
    }

    fn update(&mut self, before: &[Tensor], sums: &[Mean]) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let when = When { t: self.steps + 1, lr_factor: self.schedule.factor(self.steps) };
        let updated = self.blocks.iter().zip(before).zip(sums).map(|((block, mean), sums)| {
            let x = Block { mean, gradient: &sums.gradient, statistics: &sums.statistics };
            let (mean, state) = block.config.update(when, &x, &block.state)?;
            // What an update computes from finite derivatives can still overflow.
            for t in state.iter().chain([&mean]) {
                if let Some(value) = kernel::first_non_finite(t) {
                    let name = block.leaves(&self.params).first().map_or("?", |leaf| leaf.name()).to_owned();
                    let what = "updated mean or state";
                    return Err(Error::NonFiniteGradient { what, name, value, step: self.steps });
                }
            }
            Ok((mean, state))
        });
        let updated = updated.collect::<Result<Vec<_>>>()?;
        for (block, (mean, state)) in self.blocks.iter_mut().zip(updated) {
            block.mean = mean;
            block.state = state;
        }
        self.write()?;
        self.steps += 1;
        Ok(())
    }

    /// Puts the means into the variables.
    fn write(&self) -> Result<()> {
        for block in &self.blocks {
            for (leaf, x) in block.split(&self.params, &block.mean) {
                leaf.tensor.shallow_clone().f_copy_(&x)?;
            }
        }
        Ok(())
    }

    /// The posterior over the parameters: owned, so that it neither follows the optimizer nor needs it.
    ///
    /// # Errors
    /// No effective sample size, or a precision that is not positive definite.
    pub fn posterior(&self) -> Result<R::Posterior> {
        let _no_grad = tch::no_grad_guard();
        let learned = self.blocks.iter().map(|block| {
            let mean = block.mean_now(&self.params)?;
            let parts = block.split(&self.params, &mean).into_iter();
            let means = parts.map(|(leaf, x)| (leaf.name().to_owned(), x)).collect();
            Ok(Learned { config: block.config, means, state: &block.state })
        });
        let when = When { t: self.steps, lr_factor: self.schedule.factor(self.steps) };
        R::posterior(when, learned.collect::<Result<Vec<_>>>()?)
    }

    /// Number of updates so far.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The configuration, before overrides.
    pub fn config(&self) -> &R {
        &self.config
    }

    /// The parameters, in the order of the noise; frozen ones too.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The learning rate of the next step, schedule included.
    pub fn lr(&self) -> f64 {
        self.config.learning_rate() * self.schedule.factor(self.steps)
    }

    /// Sets the learning rate of all parameters, in every group and with an override too; the schedule multiplies it.
    ///
    /// # Errors
    /// A learning rate out of range; nothing has changed then.
    pub fn set_lr(&mut self, lr: f64) -> Result<()> {
        let config = self.config.with_learning_rate(lr);
        config.validate()?;
        self.config = config;
        for block in &mut self.blocks {
            block.config = block.config.with_learning_rate(lr);
        }
        Ok(())
    }

    /// One state tensor by its name in [`StructuredRule::STATE`], of the block that this parameter is in: a copy. `None`
    /// if there is no such parameter or state.
    pub fn state(&self, parameter: &str, name: &str) -> Option<Tensor> {
        let i = R::STATE.iter().position(|s| *s == name)?;
        let leaf = self.params.leaves().iter().position(|l| l.names.iter().any(|n| n == parameter))?;
        Some(self.blocks.iter().find(|b| b.members.contains(&leaf))?.state.get(i)?.copy())
    }
}

impl Mean {
    fn merge(self, other: Mean, share: f64) -> Mean {
        let _no_grad = tch::no_grad_guard();
        let mean = |a: Tensor, b: Tensor| &a + (b - &a) * share;
        let statistics = self.statistics.into_iter().zip(other.statistics).map(|(a, b)| mean(a, b));
        Mean { gradient: mean(self.gradient, other.gradient), statistics: statistics.collect() }
    }
}
