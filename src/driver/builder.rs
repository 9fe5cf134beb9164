//! From a configuration to an optimizer: what is chosen once, before the first step.
//!
//! Here are the choices that are not a number of the row, and the checks that need nothing but them. What can still
//! change between steps is in `settings.rs`.

use super::arithmetic::{Arithmetic, check_lr};
use super::compiled::Compiled;
use super::ranks::Ranks;
use super::row::Row;
use super::{Clipped, Optimizer, divergence::Divergence, skip::Skips, sums::Sums};
use crate::gradient::Clip;
use crate::kernel::{Noise, Philox};
use crate::parallel::Collective;
use crate::{Params, Prior, Result, Schedule, check};
use std::fmt;

/// Everything about an optimizer that is not a number of its row: prior, noise, groups, schedule, clipping.
///
/// Comes from [`Row::builder`], or from `builder`, `prior`, `noise`, `group`, .. of a row's settings, and ends in
/// [`Builder::build`].
#[derive(Debug)]
pub struct Builder<R: Row> {
    pub(super) config: R,
    pub(super) prior: Option<Prior>,
    noise: Option<Noise>,
    pub(super) overrides: Vec<Override<R>>,
    schedule: Schedule,
    clip: Option<Clip>,
    check_finite: bool,
    skip_non_finite: bool,
    skip_unseen: bool,
    divergence: Option<f64>,
    collective: Option<Box<dyn Collective>>,
    compare: Option<u64>,
    /// Of this builder and of the optimizer that it makes.
    compiled: &'static Compiled<R>,
}

/// From settings and a learning rate to other ones.
type Change<R> = dyn Fn((R, f64)) -> (R, f64) + Send;

/// Whether an override applies to a group and name.
type Applies = dyn Fn(usize, &str) -> bool + Send;

/// A change of settings and learning rate for some parameters.
pub struct Override<R> {
    applies: Box<Applies>,
    change: Box<Change<R>>,
}

impl<R> Override<R> {
    /// Settings and learning rate of a parameter.
    pub(super) fn apply(&self, own: (R, f64), group: usize, name: &str) -> (R, f64) {
        if (self.applies)(group, name) { (self.change)(own) } else { own }
    }
}

impl<R> fmt::Debug for Override<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Override")
    }
}

impl<R: Row> Builder<R> {
    pub(crate) fn new(config: R) -> Self {
        Builder {
            config,
            prior: None,
            noise: None,
            overrides: Vec::new(),
            schedule: Schedule::Constant,
            clip: None,
            check_finite: true,
            skip_non_finite: false,
            skip_unseen: false,
            divergence: None,
            collective: None,
            compare: None,
            compiled: Compiled::HERE,
        }
    }

    /// Changes settings of the row, for all parameters: `Ivon::auto(ess, steps).map(|c| c.samples(2))`.
    #[must_use]
    pub fn map(mut self, change: impl FnOnce(R) -> R) -> Self {
        self.config = change(self.config);
        self
    }

    /// Uses this prior in place of the isotropic one of the weight decay: a posterior (`.prior(&q)`) or a [`Prior`].
    ///
    /// Parameters are matched by name. A parameter that only one of the two sides has is an error of
    /// [`Builder::build`]; [`Prior::elsewhere`] and [`DiagonalGaussian::select`](crate::DiagonalGaussian::select) are
    /// the remedies. The weights stay where they are:
    /// [`DiagonalGaussian::copy_mean_to`](crate::DiagonalGaussian::copy_mean_to) starts the training at the prior's
    /// mean.
    #[must_use]
    pub fn prior(mut self, prior: impl Into<Prior>) -> Self {
        self.prior = Some(prior.into());
        self
    }

    /// Draws from this noise: [`Philox`] with a seed of your own, or [`Given`](crate::Given) tensors. By default the
    /// seed is drawn from libtorch's generator when the optimizer is built, so [`tch::manual_seed`] fixes it.
    #[must_use]
    pub fn noise(mut self, noise: impl Into<Noise>) -> Self {
        self.noise = Some(noise.into());
        self
    }

    /// Changes hyper-parameters for the variables of one group (tch's `set_group`), for example
    /// `.group(1, |c| c.weight_decay(0.0))`. Overrides apply in the order given.
    #[must_use]
    pub fn group(self, group: usize, change: impl Fn(R) -> R + Send + 'static) -> Self {
        self.overriding(move |g, _| g == group, move |(row, lr)| (change(row), lr))
    }

    /// Gives the variables of one group a learning rate of their own, in place of the argument of [`Builder::build`].
    #[must_use]
    pub fn group_lr(self, group: usize, lr: f64) -> Self {
        self.overriding(move |g, _| g == group, move |(row, _)| (row, lr))
    }

    /// Changes hyper-parameters for the variables whose name passes, for example
    /// `.named(|name| name.ends_with("bias"), |c| c.weight_decay(0.0))`.
    #[must_use]
    pub fn named(
        self,
        applies: impl Fn(&str) -> bool + Send + 'static,
        change: impl Fn(R) -> R + Send + 'static,
    ) -> Self {
        self.overriding(move |_, name| applies(name), move |(row, lr)| (change(row), lr))
    }

    /// Gives the variables whose name passes a learning rate of their own.
    #[must_use]
    pub fn named_lr(self, applies: impl Fn(&str) -> bool + Send + 'static, lr: f64) -> Self {
        self.overriding(move |_, name| applies(name), move |(row, _)| (row, lr))
    }

    fn overriding(
        mut self,
        applies: impl Fn(usize, &str) -> bool + Send + 'static,
        change: impl Fn((R, f64)) -> (R, f64) + Send + 'static,
    ) -> Self {
        self.overrides.push(Override { applies: Box::new(applies), change: Box::new(change) });
        self
    }

    /// Multiplies the learning rate by a function of the step count; default constant.
    #[must_use]
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Limits every element of each evaluation's gradient to ±max > 0, before curvature is estimated from it
    /// (per-example squares are of the unclipped gradients). Replaces an earlier choice; default no clipping.
    #[must_use]
    pub fn clip_grad_value(mut self, max: f64) -> Self {
        self.clip = Some(Clip::Value(max));
        self
    }

    /// Scales each evaluation's gradient to a global L2 norm of at most max > 0, before curvature is estimated from it
    /// (per-example squares are of the unclipped gradients). Replaces an earlier choice; default no clipping.
    ///
    /// Price's estimate is proportional to the gradient and is scaled with it: while every step is clipped, h of
    /// [`Ivon`](crate::Ivon), [`Evon`](crate::Evon) and the like is too small by max/‖g‖, and q as much too wide. Their
    /// `clip_radius` instead limits the length of the step, weight by weight, after h has divided it, and leaves the
    /// estimate alone. So this is for single gradients that are out of all proportion; see
    /// [`Diagnostics::clipped`](crate::Diagnostics::clipped) for how often it cuts.
    #[must_use]
    pub fn clip_grad_norm(mut self, max: f64) -> Self {
        self.clip = Some(Clip::Norm(max));
        self
    }

    /// Whether a gradient that is not finite is an error that leaves everything as it was; default on. Without the
    /// check such a gradient ends up in the weights and the state; the loss is always checked.
    #[must_use]
    pub fn check_finite(mut self, check: bool) -> Self {
        self.check_finite = check;
        self
    }

    /// Leaves out what is not finite, instead of ending with an error: a step whose loss or gradient is not makes no
    /// update and returns NaN, and a micro-batch that is not does not count in the mean. Without it, default, both are
    /// errors.
    ///
    /// A step that was left out is none: weights, state, step count, schedule and bias corrections stay. Only its noise
    /// is spent, so that the next step is at other samples, even on the same batch. What the closure has changed itself
    /// (batch-norm statistics) is not undone. [`Optimizer::skipped`] counts them, and after 100 without an update in
    /// between the error is returned after all. A gradient is only looked at with [`Builder::check_finite`]. An update by
    /// finite gradients that would leave the range of the numbers is an error all the same.
    #[must_use]
    pub fn skip_non_finite(mut self) -> Self {
        self.skip_non_finite = true;
        self
    }

    /// Leaves single weights alone, in a step in which they have a gradient of exactly zero in every evaluation, and
    /// none of the row's statistic either: rows of an embedding whose tokens do not occur in the batch, units that are
    /// dead, outputs that are masked, experts that no example reaches. Their mean and all of their state stay as they
    /// are to the bit, as those of a parameter do that the loss does not depend on; also known as lazy updates. Default
    /// off, as published.
    ///
    /// Without it such a gradient counts as measured. In rows that learn a precision that is a curvature of zero: h
    /// decays with every batch in which a token is missing, until its noise is the prior's, or without bound where
    /// `weight_decay` is 0. With it the precision of a token that never occurs is where it started, ess·(h₀+δ), and
    /// that of a rare one is what its own batches have said. Bias corrections still count the parameter's steps, and
    /// neither decay nor momentum move a weight that was left alone.
    ///
    /// Takes a copy of those parameters that have such weights, for the time of the update. For elementwise rows; those
    /// over blocks refuse it.
    #[must_use]
    pub fn skip_unseen(mut self) -> Self {
        self.skip_unseen = true;
        self
    }

    /// Makes a loss that rises an error before the update, [`Error::Diverged`](crate::Error::Diverged): where the
    /// average of the loss (exponential, over some 50 updates) is more than `margin` > 0 above the lowest that it has
    /// been; in the loss's own unit, for a cross-entropy 1. Default off. The watch begins after ten updates, and anew
    /// with [`Optimizer::set_lr`] and after loading a checkpoint, which does not hold it.
    #[must_use]
    pub fn check_divergence(mut self, margin: f64) -> Self {
        self.divergence = Some(margin);
        self
    }

    /// Trains with others: each rank of the [`Collective`] builds the same optimizer for the same model, evaluates the loss of
    /// its own part of each batch, and calls what the others call; all make the same update, from the mean over all ranks
    /// of gradient and curvature, and so keep the same bits.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// use tch_blr::{Ivon, parallel::Threads};
    /// # fn main() -> tch_blr::Result<()> {
    /// # let (x, y) = (Tensor::ones([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
    /// # let (x, y) = (&x, &y);
    /// # let xs = std::sync::Mutex::new([x.copy(), x.copy()]);
    /// # let ys = std::sync::Mutex::new([y.copy(), y.copy()]);
    /// # let mine = |rank: usize| (xs.lock().unwrap()[rank].copy(), ys.lock().unwrap()[rank].copy());
    /// let steps = Threads::run(2, |collective| {
    ///     let (x, y) = mine(tch_blr::parallel::Collective::rank(&collective));
    ///     let vs = nn::VarStore::new(Device::Cpu);
    ///     let net = nn::linear(vs.root(), 4, 3, Default::default());
    ///     let mut opt = Ivon::default().ess(16.0).builder().parallel(collective).build(&vs, 0.1)?;
    ///     opt.step(|| net.forward(&x).cross_entropy_for_logits(&y)) // the mean over both ranks
    /// })?;
    /// # assert_eq!(steps[0].as_ref().unwrap(), steps[1].as_ref().unwrap());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// * **Start:** weights, buffers and the seed (unless [`Builder::noise`] gives one, the same to all) are those of rank
    ///   0. So are variables that are created later, on all ranks in the same order.
    /// * **Samples:** each rank evaluates at a sample of its own. R ranks of one evaluation do what
    ///   [`Optimizer::step_chunks`] with R chunks does in one process, in the rows with samples and in the others, to the
    ///   bit if the collective adds up in the order of the ranks; products (e·ĝ, ĝ²) are formed before the sum. Rows of
    ///   two points climb on each rank's own gradient (m-sharpness).
    /// * **Weights:** ranks count equally if they return mean losses, and by their examples if they return losses per
    ///   example. A rank without data returns no losses, a tensor of shape `[0]`.
    /// * **Decisions** are of all: what one rank's closure returns as an error, or its panic, is an error of all
    ///   ([`Error::Rank`](crate::Error::Rank)), and none has changed; [`Builder::clip_grad_norm`] limits the mean gradient
    ///   over all ranks; [`Builder::skip_non_finite`] leaves a step out on all.
    /// * **Files:** all ranks call [`Optimizer::save`], and rank 0 writes; all read the file with [`Optimizer::load`], and
    ///   may be more or fewer than those that saved. Buffers (batch-norm statistics) are those of rank 0; what was
    ///   accumulated since the last update goes on to rounding.
    ///
    /// `docs/scale.md` tells what it costs. In the methods' errors, read "another rank's" beside each.
    #[must_use]
    pub fn parallel(mut self, collective: impl Collective + 'static) -> Self {
        self.collective = Some(Box::new(collective));
        self
    }

    /// Compares what the ranks of [`Builder::parallel`] hold, mean and state, after every `updates` ≥ 1 updates, and makes
    /// it an error of all if a bit differs: it names the first parameter that does. That takes a copy of all to the CPU.
    /// Default off.
    #[must_use]
    pub fn compare_ranks(mut self, updates: u64) -> Self {
        self.compare = Some(updates);
        self
    }

    /// Builds the optimizer. `lr` ≥ 0 is the learning rate of all parameters without one of their own. Variables that
    /// the [`VarStore`](tch::nn::VarStore) gets later are picked up.
    ///
    /// # Errors
    /// A hyper-parameter out of range, a statistic that the expectation does not give, a prior without the row's `ess`
    /// or of a family that the row does not take, an override that changes where the loss is evaluated or in a row with
    /// one block of all weights, no trainable parameter, parameters on several devices, a prior that does not fit the
    /// model.
    pub fn build(self, params: impl Into<Params>, lr: f64) -> Result<Optimizer<R>> {
        (self.compiled.build)(self, params.into(), lr)
    }

    pub(super) fn built(mut self, params: Params, lr: f64) -> Result<Optimizer<R>> {
        let (compare, seed_given) = (self.compare, self.noise.is_some());
        let ranks = self.collective.take().and_then(|collective| Ranks::new(collective, compare));
        let checked = self.checked(params, lr);
        let mut optimizer = match (checked, &ranks) {
            (Err(e), Some(ranks)) => return Err(ranks.tell(&e)),
            (checked, _) => checked?,
        };
        if ranks.is_some() {
            optimizer.ranks = ranks;
            optimizer.start_together(seed_given)?;
        }
        // The memory of the state is taken last, after everything that is cheap to refuse.
        let extended = optimizer.extend();
        optimizer.started_together(extended)?;
        // Binary weights become what their link makes of them. It writes to variables, so nothing may fail behind it.
        R::Arithmetic::follow(&mut optimizer.units, &optimizer.params);
        Ok(optimizer)
    }

    /// An optimizer without state, of settings that may be.
    fn checked(self, mut params: Params, lr: f64) -> Result<Optimizer<R>> {
        let Builder {
            config,
            prior,
            noise,
            overrides,
            schedule,
            clip,
            check_finite,
            skip_non_finite,
            skip_unseen,
            divergence,
            collective: _,
            compare,
            compiled,
        } = self;
        compare.map_or(Ok(()), |n| check::count("compare_ranks", n as usize))?;
        check_lr(lr)?;
        super::row::check(&config)?;
        let expected =
            "it off: this row ties the weights of a parameter together, and has no single ones to leave alone";
        check::that("skip_unseen", skip_unseen, !skip_unseen || R::Arithmetic::SINGLE, expected)?;
        schedule.validate()?;
        divergence.map_or(Ok(()), |margin| check::positive("check_divergence", margin))?;
        clip.map_or(Ok(()), Clip::validate)?;
        params.check()?;
        params.check_separate()?;
        prior.as_ref().map_or(Ok(()), |prior| prior.check(&params, R::NAME, R::Arithmetic::family()))?;
        Ok(Optimizer {
            params,
            units: Vec::new(),
            config,
            lr,
            prior,
            overrides,
            noise: noise.unwrap_or_else(|| default_noise(&config)),
            schedule,
            clip,
            check_finite,
            skip_unseen,
            pruned: Vec::new(),
            skips: Skips::new(skip_non_finite),
            divergence: divergence.map(Divergence::new),
            clipped: Clipped::default(),
            steps: 0,
            sums: Sums::default(),
            last: None,
            compiled,
            taps_checked: 0,
            ranks: None,
        })
    }
}

/// A seed from libtorch's generator, which rows that draw nothing do not touch.
fn default_noise<R: Row>(row: &R) -> Noise {
    let draws = row.expectation().draw(0).is_some() || row.statistic().is_random();
    if draws { Philox::from_libtorch() } else { Philox { seed: 0 } }.into()
}
