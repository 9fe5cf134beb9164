//! What every row says about itself, whatever its arithmetic. Its equations are in [`Rule`](crate::rule::Rule) or
//! [`BlockRule`](crate::rule::BlockRule).

use super::arithmetic::Arithmetic;
use crate::posterior::Posterior;
use crate::{Error, Expectation, Result, Statistic};
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;

/// When an update happens, and how large a step it may take.
#[derive(Debug, Clone, Copy)]
pub struct When {
    /// How many times this parameter (or block) has been updated, this time included: t = 1, 2, … Zero before the first
    /// update.
    pub t: u64,
    /// The learning rate α of this update, schedule included.
    pub lr: f64,
}

/// What a row's `weight_decay` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Decay {
    /// δ = prior precision / ess of the isotropic prior N(0, 1/(ess·δ)).
    Prior,
    /// A shrinkage beside the prior, which has δ = 0 unless one is given ([`AdamW`](crate::AdamW)).
    Decoupled,
    /// The weight of KL(q‖prior), for rows without a Gaussian prior ([`BayesBiNN`](crate::BayesBiNN)).
    Kl,
}

/// A row of the table of the Bayesian learning rule: plain settings, and what the driver must know before the first
/// evaluation of the loss.
///
/// A row's arithmetic is either that of single weights ([`Rule`](crate::rule::Rule), [`Weights`](crate::rule::Weights))
/// or that of blocks of weights as tensors ([`BlockRule`](crate::rule::BlockRule), [`Blocks`](crate::rule::Blocks)).
/// Everything else comes with [`Optimizer`](crate::Optimizer): samples, curvature, groups, priors, schedules, clipping,
/// accumulation, checkpoints, errors. The learning rate is not among the settings; it is handed to each update.
pub trait Row: Copy + Debug + Send + Sync + Serialize + DeserializeOwned + 'static {
    /// Name of the row, as in checkpoints.
    const NAME: &'static str;
    /// Names of the state tensors kept for each parameter (or block).
    const STATE: &'static [&'static str];
    /// What `weight_decay` is; a prior by default.
    const DECAY: Decay = Decay::Prior;
    /// [`Weights`](crate::rule::Weights) or [`Blocks`](crate::rule::Blocks).
    type Arithmetic: Arithmetic<Self> + Debug;
    /// What [`Optimizer::posterior`](crate::Optimizer::posterior) returns; [`NoPosterior`] for rows without one.
    type Posterior: MaybePosterior;

    /// Starts a [`Builder`](crate::Builder). On the crate's own rows this works without the trait in scope.
    fn builder(self) -> super::Builder<Self> {
        super::Builder::new(self)
    }
    /// Effective sample size λ of the posterior, where one was given.
    fn effective_sample_size(&self) -> Option<f64> {
        None
    }
    /// δ of the isotropic prior N(0, 1/(ess·δ)), or what stands in its place ([`Row::DECAY`]).
    fn isotropic_delta(&self) -> f64 {
        0.0
    }
    /// The same settings with another weight decay; by default as they are.
    #[must_use]
    fn with_weight_decay(self, delta: f64) -> Self {
        let _ = delta;
        self
    }
    /// Checks every hyper-parameter; the error names the field.
    ///
    /// # Errors
    /// [`Error::HyperParameter`]
    fn validate(&self) -> Result<()>;
    /// Where E_q\[∇ℓ\] is evaluated; by default once, at the mean.
    fn expectation(&self) -> Expectation {
        Expectation::Delta
    }
    /// The same settings without the damping γ of the noise, for rows that have one: their precision is then that of
    /// what is known, ess·(h+δ). By default as they are.
    #[must_use]
    fn undamped(self) -> Self {
        self
    }
    /// Share of the initial Hessian in the precision after t updates, as β₂ᵗ; `None` for rows whose precision is not
    /// such an average, or starts from none by default. Of those that have one, it is a function of the form
    /// ess·(h+δ+γ).
    fn initial_share(&self, t: u64) -> Option<f64> {
        let _ = t;
        None
    }
    /// Whether there is a posterior with these settings and an ess, of rows that have one; by default there is.
    fn has_posterior(&self) -> bool {
        true
    }
    /// What an evaluation gives beside the gradient, for the estimate of E_q\[∇²ℓ\]; by default nothing.
    fn statistic(&self) -> Statistic {
        Statistic::Unused
    }
}

/// Errors if a hyper-parameter is out of range, or if evaluations cannot give what the row asks for: of settings that
/// come from a builder or from a file.
pub(super) fn check<R: Row>(row: &R) -> Result<()> {
    row.validate()?;
    row.statistic().check(row.expectation())?;
    R::Arithmetic::check(row)
}

/// The settings that all parameters share, because one evaluation of the loss serves all.
pub(super) fn shared<R: Row>(row: &R) -> (Expectation, Statistic) {
    (row.expectation(), row.statistic())
}

/// The posterior of rows that have none, such as SGD, whose covariance is fixed by assumption.
// The private field keeps anyone from making one, so a row without a posterior can only return the error.
#[derive(Debug)]
pub struct NoPosterior(());

/// A posterior or none: any [`Posterior`], and [`NoPosterior`].
pub trait MaybePosterior: Sized {
    /// Whether it is a posterior.
    const EXISTS: bool;

    /// The posterior as a trait object.
    ///
    /// # Errors
    /// If there is none.
    fn boxed(self) -> Result<Box<dyn Posterior>>;
}

impl<P: Posterior + 'static> MaybePosterior for P {
    const EXISTS: bool = true;

    fn boxed(self) -> Result<Box<dyn Posterior>> {
        Ok(Box::new(self))
    }
}

impl MaybePosterior for NoPosterior {
    const EXISTS: bool = false;

    fn boxed(self) -> Result<Box<dyn Posterior>> {
        Err(none())
    }
}

/// The error of asking for a posterior that does not exist.
pub(super) fn none() -> Error {
    Error::Posterior(
        "this row has no posterior, because its covariance is fixed by assumption; train with Ivon, Von or another row \
         that has one"
            .to_owned(),
    )
}
