//! What a posterior over the weights says about a model's outputs, to first order.

use super::DiagonalGaussian;
use crate::curvature::{Forward, Linearized, Looked};
use crate::nn::Likelihood;
use crate::{Error, IntoTensor, Params, Result, kernel};
use tch::Tensor;

impl DiagonalGaussian {
    /// Variances of the model's outputs under this posterior, to first order in the weights:
    ///
    /// ```text
    /// v_ik = J_ik S⁻¹ J_ikᵀ,    J_ik = ∂z_ik/∂θ at the model's present weights (normally the mean)
    /// ```
    ///
    /// The closure gives the outputs z `[B]` or `[B, C]` (logits), row i from example i only; the result has their shape,
    /// in f64 for outputs in f64 and f32 else, without a graph. With the likelihood's Hessian Λᵢ, v_i is what the leverage
    /// and the sensitivity of an example need (Nickl et al. 2023, *The Memory Perturbation Equation*), and what the
    /// predictive distribution of a linearised network has (Khan et al. 2019, *Approximate Inference Turns Deep Networks
    /// into Gaussian Processes*).
    ///
    /// One forward pass and C+1 backward passes over the layers of [`crate::nn`]; no Jacobian is formed. For a linear layer
    /// with inputs aᵢ, v is Σ (Gᵢₖ⊙Gᵢₖ) ⊙ (aᵢ⊙aᵢ)Vᵀ. Parameters used outside of those layers take a backward pass for every
    /// example and output. Trainable parameters that the posterior does not have count as known. Weights and `.grad` stay
    /// as they are.
    ///
    /// # Errors
    /// A parameter that the model has not, has frozen, or has in another shape; [`Error::Curvature`] for outputs of another
    /// form or not finite, or a variance that is not finite; [`Error::PerExample`] for batch normalization in training mode.
    pub fn output_variance<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        outputs: impl FnOnce() -> L,
    ) -> Result<Tensor> {
        self.of_outputs(&params.into(), outputs, |model, v, size| Ok(model.variance(v)?.f_reshape(size)?))
    }

    /// Covariances `[B, C, C]` of each example's outputs, Jᵢ S⁻¹ Jᵢᵀ: as [`DiagonalGaussian::output_variance`], which is its
    /// diagonal and takes less memory. C is 1 for outputs `[B]`.
    ///
    /// # Errors
    /// As there.
    pub fn output_covariance<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        outputs: impl FnOnce() -> L,
    ) -> Result<Tensor> {
        self.of_outputs(&params.into(), outputs, |model, v, _| model.covariance(v))
    }

    fn of_outputs<L: IntoTensor>(
        &self,
        params: &Params,
        outputs: impl FnOnce() -> L,
        of: impl FnOnce(&mut Linearized, &[Option<Tensor>], &[i64]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        params.check()?;
        // Names and shapes that do not fit are errors.
        Self::in_model(
            params,
            self.names().map(|name| (name.to_owned(), self.mean(name).map_or_else(Tensor::new, Tensor::shallow_clone))),
        )?;
        let frozen = |name: &&str| params.find(name).is_some_and(|leaf| !leaf.trainable());
        if let Some(name) = self.names().find(frozen) {
            return Err(Error::parameter(name, "it is frozen, and without gradients; leave it out with select(..)"));
        }
        let trained = params.leaves().iter().filter(|l| l.trainable());
        let variances = trained.map(|leaf| {
            let variance = leaf.names.iter().find_map(|name| self.variance(name))?;
            Some(variance.to_device(leaf.tensor.device()).to_kind(leaf.state_kind()))
        });
        let variances: Vec<Option<Tensor>> = variances.collect();
        // Any likelihood that takes outputs as they are will do.
        let forward = Forward::run(params, Likelihood::Bernoulli, None, outputs)?;
        let size = forward.output.z.size();
        let found = of(&mut Linearized::new(&forward, params, &mut Looked::default())?, &variances, &size)?;
        match kernel::first_non_finite(&found) {
            None => Ok(found),
            Some(value) => Err(Error::Curvature(format!(
                "a variance of the outputs is not finite ({value}); look at the weights, the inputs and the posterior's \
                 precision"
            ))),
        }
    }
}
