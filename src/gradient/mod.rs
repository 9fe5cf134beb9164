//! From a closure's loss to the gradients of the parameters.

mod clip;
mod loss;

pub use clip::Clip;
pub use loss::IntoTensor;
pub(crate) use loss::Loss;
