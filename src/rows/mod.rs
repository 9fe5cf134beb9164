//! The rows of the table, one file each; their options.

mod any;
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
pub use bayesbinn::BayesBiNN;
pub use bsam::BayesianSam;
pub use evon::Evon;
pub use full_von::FullVon;
pub use ivon::Ivon;
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
