//! What the driver asks of the arithmetic of a row: that of single weights, or that of blocks.

use super::builder::Override;
use super::row::{Row, When};
use super::sums::Sums;
use crate::kernel::{self, Noise};
use crate::params::{Leaf, Params, Perturbed};
use crate::prior::{Family, Isotropic, Prior, PriorOf};
use crate::{Error, Result, Statistic};
use std::fmt::Debug;
use tch::{Kind, Tensor};

/// The arithmetic of rows that treat each weight by itself: [`Rule`](crate::rule::Rule).
#[derive(Debug, Clone, Copy)]
pub struct Weights;

/// The arithmetic of rows over blocks of weights, as tensors: [`BlockRule`](crate::rule::BlockRule).
#[derive(Debug, Clone, Copy)]
pub struct Blocks;

/// What one row learns together: a parameter, or all of them in a joint row.
#[derive(Debug)]
pub struct Unit<R: Row> {
    /// Indices of its parameters.
    pub members: Vec<usize>,
    /// After overrides, with the prior's δ for weight decay where that is a prior.
    pub row: R,
    pub lr: f64,
    /// Updates so far.
    pub steps: u64,
    /// Root mean square of its weights when the optimizer first saw them; 0 without any.
    pub rms: f64,
    pub prior: PriorOf,
    pub kept: <R::Arithmetic as Arithmetic<R>>::Kept,
}

impl<R: Row> Unit<R> {
    /// The settings of update number `steps` + `ahead`.
    pub(super) fn when(&self, ahead: u64, lr_factor: f64) -> When {
        When { t: self.steps + ahead, lr: self.lr * lr_factor }
    }

    pub(super) fn leaves<'a>(&self, params: &'a Params) -> impl Iterator<Item = &'a Leaf> + use<'a, '_, R> {
        self.members.iter().map(|i| &params.leaves()[*i])
    }

    /// The name in checkpoints and messages: that of its first parameter.
    pub(super) fn name<'a>(&self, params: &'a Params) -> &'a str {
        // Every unit has a member, but a message is no place for a panic.
        self.members.first().map_or("?", |i| params.leaves()[*i].name())
    }
}

/// δ of a unit with an isotropic prior.
pub(super) fn delta<R: Row>(prior: Isotropic, row: &R) -> f64 {
    prior.delta(row.isotropic_delta(), row.effective_sample_size())
}

/// 1 - β₂ᵗ, the share of the precision that was learned, of the unit with the fewest updates, but for those without
/// any; `None` if there are no others, or the precision is no such average.
pub(super) fn learned<R: Row>(units: &[Unit<R>]) -> Option<f64> {
    let trained = units.iter().filter(|unit| unit.steps > 0);
    let shares = trained.map(|unit| unit.row.initial_share(unit.steps).map(|start| 1.0 - start));
    shares.collect::<Option<Vec<_>>>()?.into_iter().reduce(f64::min)
}

/// Root mean square of all elements; 0 without any.
pub(crate) fn rms(t: &Tensor) -> Result<f64> {
    let _no_grad = tch::no_grad_guard();
    Ok((kernel::sum_of_squares([t])? / t.numel().max(1) as f64).sqrt())
}

/// The step being taken.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    pub params: &'a Params,
    /// Updates of the optimizer so far.
    pub number: u64,
    /// The schedule's factor on the learning rate.
    pub lr_factor: f64,
}

/// Noise of an evaluation.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    pub noise: &'a Noise,
    /// Number of the draw in the step's noise.
    pub draw: u64,
    pub sign: f64,
}

/// Variables at their second point, and the statistics of units that the first has given.
pub type Ascended = (Perturbed, Vec<Vec<Tensor>>);

/// From the settings of a row to units.
#[derive(Debug)]
pub struct Plan<'a, R> {
    pub row: R,
    pub lr: f64,
    pub overrides: &'a [Override<R>],
    pub prior: Option<&'a Prior>,
}

impl<R: Row> Plan<'_, R> {
    /// Row and learning rate of one parameter.
    pub(super) fn settings(&self, leaf: &Leaf) -> Result<(R, f64)> {
        // In the order given: each changes what those before it have left.
        let own = self.overrides.iter().fold((self.row, self.lr), |own, o| o.apply(own, leaf.group, leaf.name()));
        check_lr(own.1)?;
        own.0.validate()?;
        if super::row::shared(&own.0) != super::row::shared(&self.row) {
            // The closure is called for all of them at once.
            let problem = "an override changes where the loss is evaluated or which statistic that gives, and all \
                           parameters share one evaluation; set it for all";
            return Err(Error::parameter(leaf.name(), problem));
        }
        Ok(own)
    }
}

pub(super) fn check_lr(lr: f64) -> Result<()> {
    crate::check::non_negative("lr", lr)
}

pub trait Sealed {}
impl Sealed for Weights {}
impl Sealed for Blocks {}

/// Sealed: what the driver asks of [`Weights`] and of [`Blocks`]. Units come in the order of their first parameters.
pub trait Arithmetic<R: Row>: Sealed + Sized {
    /// What is kept of a unit beside its settings.
    type Kept: Debug + Send;
    /// Whether the update of a weight is that of no other, so that it can be left out.
    const SINGLE: bool;

    /// Errors if evaluations of the row cannot give what it asks for, or its prior does not fit.
    fn check(row: &R) -> Result<()>;
    /// The widest family of Gaussians that can be a prior.
    fn family() -> Family;
    /// Kind of a parameter's gradient.
    fn kind(leaf: &Leaf) -> Kind;
    /// Gives each parameter that has none a unit.
    fn extend(units: &mut Vec<Unit<R>>, params: &Params, plan: &Plan<R>) -> Result<()>;
    /// Errors if the unit cannot have this row's settings with its prior.
    fn admits(prior: &PriorOf, row: &R) -> Result<()>;
    /// Takes over changed settings or a changed prior.
    fn configure(unit: &mut Unit<R>, params: &Params, row: R);
    /// Takes over weights that were changed from outside.
    fn follow(units: &mut [Unit<R>], params: &Params);
    /// Moves the trainable variables to a sample.
    fn perturb(units: &mut [Unit<R>], step: Step, sample: Sample) -> Result<Perturbed>;
    /// Moves the variables from their mean uphill along this gradient of global norm `norm`, which was found where
    /// they are `at`; also gives the statistic that the row takes from it.
    fn ascend(
        units: &mut [Unit<R>],
        step: Step,
        at: Perturbed,
        gradients: &[Option<Tensor>],
        norm: f64,
    ) -> Result<Ascended>;
    /// Forms the statistics of the evaluation that has just ended, whose point the variables are still `at`: from those
    /// that came with the derivatives (`sums.statistics`), or from gradients and points; of single weights in memory that
    /// may be there in place of the former.
    fn form(units: &[Unit<R>], params: &Params, at: &Perturbed, sums: &mut Sums) -> Result<()>;
    /// Updates the units that have a gradient, or none of them. The statistics are formed, but those of a single
    /// evaluation (`formed` is false), whose point the variables are still `at`.
    fn update(units: &mut [Unit<R>], step: Step, at: Perturbed, sums: &mut Sums, formed: bool) -> Result<()>;
    /// State number `i` of a parameter's unit.
    fn state(unit: &Unit<R>, i: usize) -> Option<Tensor>;
    /// What a checkpoint holds of a unit, beside its prior: mean first.
    fn tensors(unit: &Unit<R>, params: &Params) -> Result<Vec<(String, Tensor)>>;
    /// Shape and kind of a unit's mean.
    fn form_of(unit: &Unit<R>, params: &Params) -> (Vec<i64>, Kind);
    /// Names and shapes of the states that a unit with this row and prior keeps.
    fn expected(unit: &Unit<R>, params: &Params, row: &R, prior: &PriorOf) -> Vec<(usize, Vec<i64>)>;
    /// Shapes of a unit's statistics.
    fn statistics(unit: &Unit<R>, params: &Params) -> Result<Vec<Vec<i64>>>;
    /// Puts in what a checkpoint holds: row and prior are those of the unit already.
    fn restore(unit: &mut Unit<R>, params: &Params, mean: &Tensor, state: Vec<(usize, Tensor)>) -> Result<()>;
    /// The posterior over the trainable parameters.
    fn posterior(units: &[Unit<R>], step: Step) -> Result<R::Posterior>;
    /// The same without the start and the damping.
    fn learned_posterior(units: &[Unit<R>], step: Step) -> Result<R::Posterior>;
}

/// An error of a statistic that this arithmetic does not have.
pub(super) fn unsupported(statistic: Statistic, expected: &'static str) -> Result<()> {
    crate::check::that("statistic", statistic, false, expected)
}
