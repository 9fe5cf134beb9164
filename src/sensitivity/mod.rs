//! How far a trained model would move without some of its examples, and what each example holds of it.
//!
//! | | |
//! |---|---|
//! | [`Sensitivity`] | how each example's outputs and predictions would change without it; leave-one-out loss |
//! | [`Removal`] | how the weights would change without a group of examples, and the posterior without them |
//! | [`DualView`] | the same seen from the data: the model as a Gaussian process, its dual variables, evidence |
//! | [`SupportVectors`] | a model whose sensitivities are zero for all but a few examples |
//!
//! Scores by which to select examples are in [`crate::selection`]; the Fisher information and posteriors that a
//! sensitivity is computed from in [`crate::fisher`] and at the crate's top.

mod dual;
mod evidence;
mod perturbation;
mod predictive;
mod removal;
mod site;
mod svm;

pub use dual::{DualView, jacobian};
pub use perturbation::Sensitivity;
pub use predictive::DualPrediction;
pub use removal::Removal;
pub use svm::SupportVectors;

use crate::{Error, Result, kernel};
use tch::{Device, Kind, Tensor};

fn error(problem: impl Into<String>) -> Error {
    Error::Memory(problem.into())
}

/// On the CPU in f64, and finite.
fn home(what: &str, t: &Tensor) -> Result<Tensor> {
    if !t.defined() {
        return Err(error(format!("the {what} are undefined")));
    }
    // Matrices of one number per pair of outputs are small beside the model, and differences of covariances need f64.
    let t = t.detach().f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    match kernel::first_non_finite(&t) {
        Some(value) => Err(error(format!("the {what} are not finite ({value})"))),
        None => Ok(t),
    }
}
