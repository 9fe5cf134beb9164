//! Bayesian-learning-rule optimizers over libtorch tensors.

mod checkpoint;
mod curvature;
mod error;
mod expectation;
mod gradient;
mod kernel;
pub mod metrics;
pub mod nn;
mod optim;
mod optimizer;
mod params;
mod posterior;
mod prior;
mod schedule;

pub use curvature::Curvature;
pub use error::{Error, Result};
pub use expectation::{Expectation, Perturbed};
pub use gradient::IntoTensor;
pub use kernel::{Given, Noise, Pack, Philox, Real};
pub use optim::{
    Adam, AdamW, DeltaRule, GaussianRule, HessianEstimator, Ivon, Momentum, PrecisionInStep, RmsProp, Rule, Sgd, Site,
    Vogn, Von, VonCurvature, When,
};
pub use optimizer::{Builder, Diagnostics, Evaluation, Optimizer, Sigma};
pub use params::Params;
pub use posterior::{DiagonalGaussian, Natural, Predictive, combine};
pub use prior::Prior;
pub use schedule::Schedule;
pub use tch;

// The snippets of these pages are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
#[cfg(doctest)]
#[doc = include_str!("../docs/porting.md")]
struct Porting;
#[cfg(doctest)]
#[doc = include_str!("../docs/scales.md")]
struct Scales;
