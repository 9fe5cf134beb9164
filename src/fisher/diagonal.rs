//! The diagonal of a Fisher information.

use super::at::{At, at, finite, parameter};
use super::{Batch, Fisher};
use crate::{DiagonalGaussian, IntoTensor, Params, Prior, Result, kernel};
use tch::Tensor;

impl Fisher {
    /// The diagonal of F.
    ///
    /// For a linear layer z = aWᵀ + b with Gᵢ = ∂(sᵢᵀzᵢ)/∂z, the diagonal of a column s is Σᵢ(Gᵢ aᵢᵀ)² = (G⊙G)ᵀ(A⊙A):
    /// one matrix product per batch for all columns together.
    ///
    /// # Errors
    /// [`Error::Likelihood`] for outputs or targets of another form or not finite, active outputs that the model does
    /// not have, or targets outside of them; [`Error::Curvature`] for no examples or a result that is not finite;
    /// [`Error::PerExample`] for batch normalization in training mode; [`Error::Closure`]; [`Error::HyperParameter`]
    /// for settings out of range.
    ///
    /// [`Error::Likelihood`]: crate::Error::Likelihood
    /// [`Error::Curvature`]: crate::Error::Curvature
    /// [`Error::PerExample`]: crate::Error::PerExample
    /// [`Error::Closure`]: crate::Error::Closure
    /// [`Error::HyperParameter`]: crate::Error::HyperParameter
    pub fn diagonal<B: Into<Batch>, L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        model: impl Fn(&Tensor) -> L,
    ) -> Result<DiagonalFisher> {
        let params = Params::separate(params)?;
        // A copy from before the passes: training may go on while the result is in use.
        let solution = params.at_present();
        let sums: Vec<Tensor> = solution.leaves().iter().map(|l| l.tensor.zeros_like()).collect();
        let seen = self.each(&params, batches, model, |batch, columns| {
            let squares = batch.squares(columns.len(), |c| columns.get(c))?;
            let pairs = sums.iter().zip(&squares).filter_map(|(sum, more)| Some((sum, more.as_ref()?)));
            kernel::add(pairs)
        })?;
        for (leaf, sum) in solution.leaves().iter().zip(&sums) {
            // Once at the end: reading from the device after every batch would stall it.
            finite(&parameter(leaf.name()), sum, seen.examples)?;
        }
        Ok(DiagonalFisher { at: At { solution, seen, fisher: self.clone() }, diagonal: sums })
    }
}

/// The diagonal of a Fisher information, from [`Fisher::diagonal`]: a sum over [`DiagonalFisher::examples`] examples.
#[derive(Debug)]
pub struct DiagonalFisher {
    at: At,
    diagonal: Vec<Tensor>,
}

at!(DiagonalFisher);

impl DiagonalFisher {
    /// diag F of one parameter, in its shape: f64 for weights in f64, f32 for all others.
    pub fn get(&self, name: &str) -> Option<&Tensor> {
        let leaves = self.at.solution.leaves().iter();
        leaves.zip(&self.diagonal).find_map(|(l, f)| l.names.iter().any(|n| n == name).then_some(f))
    }

    /// Laplace's approximation N(θ, (F + P₀)⁻¹) around the weights θ at which F was computed.
    ///
    /// They should be a minimum of the loss and the prior together, -ln p(data | θ) + ½(θ-m₀)ᵀP₀(θ-m₀); the mean m₀
    /// enters in no other way. With the last task's posterior as prior this is diagonal online Laplace, the penalty
    /// of online EWC at its Bayesian weight (Huszár 2018). Where a prior has [`Prior::elsewhere`], the precision is
    /// N·δ.
    ///
    /// # Errors
    /// A prior of other parameters or shapes; a precision that is not positive and finite, as where both F and P₀
    /// vanish.
    pub fn laplace(&self, prior: impl Into<Prior>) -> Result<DiagonalGaussian> {
        let _no_grad = tch::no_grad_guard();
        let priors = self.at.precisions(&prior.into())?;
        let entries = self.at.solution.leaves().iter().zip(&self.diagonal).zip(priors);
        DiagonalGaussian::new(entries.map(|((leaf, f), p)| (leaf.name(), leaf.tensor.copy(), p + f)))
    }
}
