//! From a closure's loss to the gradients of the parameters: what may be returned as a loss, and how large gradients
//! are limited. Curvature from the same backward pass belongs to `curvature`.

mod clip;
mod loss;

pub use clip::Clip;
pub use loss::{IntoTensor, WithOutput};
pub(crate) use loss::{Loss, examples};
