//! The rows of the table, one file each.

pub(crate) mod rule;

mod adam;
mod adamw;
mod bsam;
mod evon;
mod full_von;
mod ivon;
mod newton;
mod rmsprop;
mod sam;
mod sam_rmsprop;
mod sgd;
mod von;

pub use adam::Adam;
pub use adamw::AdamW;
pub use bsam::BayesianSam;
pub use evon::Evon;
pub use full_von::{FullHessian, FullVon};
pub use ivon::{HessianEstimator, Ivon};
pub use newton::{DiagonalNewton, HessianDiagonal, Newton};
pub use rmsprop::RmsProp;
pub use rule::{DeltaRule, GaussianRule, Rule, Site, When};
pub use sam::Sam;
pub use sam_rmsprop::SamRmsProp;
pub use sgd::Sgd;
pub use von::{Momentum, PrecisionInStep, Vogn, Von, VonCurvature};
