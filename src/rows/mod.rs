//! The rows of the table, one file each; their options.
//!
//! A file has the settings of a row, its equations in the documentation, and the same equations as an implementation of
//! [`Rule`](crate::rule::Rule) or [`BlockRule`](crate::rule::BlockRule). What rows share is in `common.rs` (macros,
//! pieces of rows with a full covariance) and `eigenbasis.rs`; everything that is not arithmetic of one weight or block
//! is the driver's. [`MixtureOfGaussians`] and [`MultiIvon`] are in the table and not rows of the driver; their
//! documentation says why.

mod any;
mod auto;
mod common;
mod eigenbasis;

mod adam;
mod adamw;
mod bayesbinn;
mod bsam;
mod evon;
mod full_von;
mod ivon;
mod mixture;
mod multi_ivon;
mod newton;
mod noisy_kfac;
mod rmsprop;
mod sam;
mod sam_rmsprop;
mod sgd;
mod soap;
mod ste;
mod vadam;
mod von;

pub use adam::Adam;
pub use adamw::AdamW;
pub use any::{AnyRow, BuildOptions};
pub use auto::StepLength;
pub use bayesbinn::BayesBiNN;
pub use bsam::BayesianSam;
pub use evon::Evon;
pub use full_von::FullVon;
pub use ivon::{Ivon, PriorPull};
pub use mixture::MixtureOfGaussians;
pub use multi_ivon::MultiIvon;
pub use newton::{DiagonalNewton, Newton};
pub use noisy_kfac::NoisyKfac;
pub use rmsprop::RmsProp;
pub use sam::Sam;
pub use sam_rmsprop::SamRmsProp;
pub use sgd::Sgd;
pub use soap::Soap;
pub use ste::Ste;
pub use vadam::Vadam;
pub use von::{Momentum, PrecisionInStep, Von};
