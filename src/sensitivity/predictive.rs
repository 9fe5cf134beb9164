//! What a dual view predicts for other inputs, with the two parts of its uncertainty.

use super::site::squares;
use super::{DualView, error, home};
use crate::Result;
use crate::likelihood::Outputs;
use tch::Tensor;

/// What a [`DualView`] predicts for M other inputs.
#[derive(Debug)]
pub struct DualPrediction {
    /// f `[M]` or `[M, C]`
    pub output: Tensor,
    /// v = JS⁻¹Jᵀ `[M]` or `[M, C, C]`, the covariance of the outputs.
    pub variance: Tensor,
    /// p: the softmax or sigmoid of f, or f itself of a Gaussian.
    pub mean: Tensor,
    /// Covariance of the prediction that more data would take away: Λ v Λ, or v of a Gaussian.
    pub epistemic: Tensor,
    /// Covariance of a label that would stay: Λ, or σ²I.
    pub aleatoric: Tensor,
}

impl DualView {
    /// What is predicted for features `[M, P]` or `[M, C, P]`, with the outputs Jθ of the linear model.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite.
    pub fn predict(&self, features: &Tensor) -> Result<DualPrediction> {
        let _no_grad = tch::no_grad_guard();
        let output = self.rows(features)?.f_matmul(&self.weights)?;
        self.predict_at(&if self.one() { output.f_squeeze_dim(1)? } else { output }, features)
    }

    /// The same at outputs `[M]` or `[M, C]` that are known: for a network its own, of which Jθ is a linear
    /// continuation from θ = 0 only.
    ///
    /// # Errors
    /// As [`DualView::predict`].
    pub fn predict_at(&self, outputs: &Tensor, features: &Tensor) -> Result<DualPrediction> {
        let _no_grad = tch::no_grad_guard();
        let (jacobian, output) = (self.rows(features)?, home("outputs", outputs)?);
        let m = jacobian.size()[0];
        let shape = if self.one() { vec![m] } else { vec![m, self.sites.columns()] };
        if output.size() != shape {
            return Err(error(format!("the outputs are {:?}: expected {shape:?}", output.size())));
        }
        let white = self.white(&jacobian)?;
        let output = Outputs::new(self.sites.likelihood, &output, None)?;
        // The derivative of the mean by the output is Λ times σ² (1 where there is none), the variance of a label Λ
        // times its square.
        let scale = output.likelihood.scale();
        let root = output.roots()?;
        let slope = squares(&root, false)? * scale;
        Ok(DualPrediction {
            variance: squares(&white, self.one())?,
            epistemic: squares(&slope.f_bmm(&white)?, self.one())?,
            aleatoric: squares(&root, self.one())? * (scale * scale),
            mean: output.prediction()?.copy(),
            output: output.z,
        })
    }
}
