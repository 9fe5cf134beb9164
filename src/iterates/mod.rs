//! The weights that a training passes through: averages of them, and posteriors.
//!
//! They are observers. Each looks at variables by name when it is told to (after a step, after an epoch), and knows
//! nothing of how these are trained, so any optimizer will do, tch's too.
//!
//! | | what it keeps | `update`, `collect` | posterior |
//! |---|---|---|---|
//! | [`Ema`] | an average with a window, on demand a variance | after each step | [`DiagonalGaussian`] |
//! | [`Lawa`] | the last k of every n-th weights | after each step | [`DiagonalGaussian`] |
//! | [`Swag`] | mean, variance, the last K deviations | after each epoch | [`LowRankGaussian`], [`DiagonalGaussian`] |
//!
//! The spread of iterates belongs to the training as much as to the data: of plain SGD at a constant learning rate it
//! is about (lr/2B) times the identity near a minimum where gradient noise and Hessian agree, whatever the number of
//! examples. So it predicts as it is, and as a prior, or in a merge, it needs a scale
//! ([`temper`](crate::DiagonalGaussian::temper)). [`soft_update`] moves one model towards another.
//!
//! Variances are kept centred, as v ← (1-r)(v + rδ²) with δ the distance of the new weights from the mean: the mean of
//! the squares less the square of the mean has no digits left in f32 where weights move by a thousandth of their size.
//! Where a weight has not moved at all its variance is 0, and a posterior takes [`SMALLEST_VARIANCE`] for it.
//!
//! [`DiagonalGaussian`]: crate::DiagonalGaussian
//! [`LowRankGaussian`]: crate::LowRankGaussian

mod ema;
mod lawa;
mod moments;
mod soft_update;
mod swag;
mod watched;

pub use ema::Ema;
pub use lawa::Lawa;
pub use moments::SMALLEST_VARIANCE;
pub use soft_update::soft_update;
pub use swag::{Deviations, Swag};

#[cfg(test)]
mod testing {
    use tch::{Kind, Tensor};

    pub fn set(w: &Tensor, x: &[f64]) {
        tch::no_grad(|| w.shallow_clone().copy_(&Tensor::from_slice(x)));
    }

    pub fn values(t: &Tensor) -> Vec<f64> {
        Vec::try_from(t.to_kind(Kind::Double)).unwrap()
    }
}
