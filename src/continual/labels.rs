//! Labels in a memory: the part of the past's gradient that soft labels leave out, and replay, which has both.

use super::memory::Memory;
use super::past::{Model, Regularizer};
use crate::{IntoTensor, Result, check};
use tch::Tensor;

/// Σ w (p_old - y)ᵀ f(θ): what soft labels leave out of the past data's gradient (for a Gaussian divided by σ²).
///
/// [`SoftLabels`](super::SoftLabels) at temperature 1 plus this has the gradient Σ w Jᵢᵀ(pᵢ - yᵢ) of [`Replay`]. It
/// matters where the model is not linear in its weights and the labels are not fitted (Daxberger et al. 2023).
#[derive(Debug)]
pub struct LabelNoise {
    memory: Memory,
    residual: Tensor,
}

impl LabelNoise {
    /// With what the model predicts now.
    ///
    /// # Errors
    /// As [`SoftLabels::of`](super::SoftLabels::of); a memory without targets, or whose classes are not among its
    /// labels.
    pub fn of<L: IntoTensor>(memory: Memory, forward: impl Fn(&Tensor) -> L) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let f = memory.checked_outputs(&|x| forward(x).into_tensor())?;
        // The old model's residual, and a constant from here on: the term is linear in f, so its gradient is Jᵀ times
        // that.
        let residual = f.residual(&memory.hard(&f)?)?;
        Ok(LabelNoise { memory, residual })
    }
}

impl Regularizer for LabelNoise {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let f = self.memory.outputs(model.forward)?;
        f.check_same_shape(&self.residual)?;
        self.memory.weighted_sum(&(f.z * &self.residual))
    }
}

/// w Σ wᵢ ℓ(yᵢ, fᵢ(θ)): the past's own examples again. With the weight -1 their removal, which in a K-prior whose
/// memory holds them leaves a convex problem.
#[derive(Debug)]
pub struct Replay {
    memory: Memory,
    weight: f64,
}

impl Replay {
    /// The loss on a memory with targets.
    ///
    /// # Errors
    /// An empty memory, one without targets.
    pub fn new(memory: Memory) -> Result<Self> {
        Self::weighted(memory, 1.0)
    }

    /// The loss times w, which may be negative.
    ///
    /// # Errors
    /// As [`Replay::new`]; w that is not finite.
    pub fn weighted(memory: Memory, w: f64) -> Result<Self> {
        check::that("w", w, w.is_finite(), "a finite number")?;
        // In the constructor, so that a loop does not fail in its first step.
        memory.check_some()?;
        memory.check_targets()?;
        memory.check_weights()?;
        Ok(Replay { memory, weight: w })
    }
}

impl Regularizer for Replay {
    fn value(&self, model: &Model) -> Result<Tensor> {
        let f = self.memory.outputs(model.forward)?;
        Ok(self.memory.weighted_sum(&f.losses(&self.memory.hard(&f)?)?)? * self.weight)
    }
}
