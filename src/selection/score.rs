//! A number for every example: random, or from what a model predicts for it and how far it is from the label.
//!
//! What is done with scores is in `stream.rs`. How far a model would move without an example, in outputs and weights,
//! is in [`crate::sensitivity`].

use super::error;
use crate::continual::{Forward, Memory};
use crate::curvature::{Entries, Linearized, Looked, Pass};
use crate::kernel::{Stream, uniform};
use crate::likelihood::{Outputs, rows};
use crate::{DiagonalGaussian, IntoTensor, Params, Result};
use tch::{Device, Kind, Tensor};

/// A score without information: uniform on (0, 1), of example i by the seed and i alone; `[n]` in f64.
pub fn random_scores(n: usize, seed: u64) -> Tensor {
    Tensor::from_slice(&(0..n as u64).map(|i| uniform(seed, Stream::Scores, i)).collect::<Vec<_>>())
        .to_device(Device::Cpu)
}

/// Scores of the examples, `[M]` in f64, at the model's present weights. With e = p - y for what the outputs f predict
/// (divided by σ² for a Gaussian), Λ the Hessian of -ln p(y | f) and v the variance of the outputs.
impl Memory {
    /// tr Λᵢ = Σ_c p_ic (1 - p_ic), between 0 for a certain prediction and 1 - 1/C; the same number for all in a
    /// regression (Pan et al. 2020; Khan and Swaroop 2021).
    ///
    /// # Errors
    /// An empty memory, outputs of another form or that are not finite.
    pub fn lambda<L: IntoTensor>(&self, forward: impl Fn(&Tensor) -> L) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        rows(&self.looked_at(&|x| forward(x).into_tensor())?.curvature_diagonal()?)
    }

    /// tr(Λᵢ vᵢ) with vᵢ = Jᵢ S⁻¹ Jᵢᵀ of a posterior around the present weights: the leverage. Over all training data
    /// it adds up to the effective number of parameters, where S is their curvature and the prior's.
    ///
    /// # Errors
    /// As [`Memory::lambda`] and [`DiagonalGaussian::output_covariance`].
    pub fn leverage<L: IntoTensor>(
        &self,
        q: &DiagonalGaussian,
        params: impl Into<Params>,
        forward: impl Fn(&Tensor) -> L,
    ) -> Result<Tensor> {
        let mut outputs = None;
        let v = q.output_covariance(params, || self.seen(&|x| forward(x).into_tensor(), &mut outputs))?;
        let _no_grad = tch::no_grad_guard();
        wide(outputs)?.curvature_trace(&v.f_to_kind(Kind::Double)?)
    }

    /// Σ_c |e_ic Λ_icc v_icc|, "prediction error × prediction variance": how far its prediction would move, had the
    /// model not been trained on it (Nickl et al. 2023, *The Memory Perturbation Equation*). For a Gaussian |e v|.
    ///
    /// # Errors
    /// As [`Memory::leverage`]; no targets, or other ones.
    pub fn sensitivity<L: IntoTensor>(
        &self,
        q: &DiagonalGaussian,
        params: impl Into<Params>,
        forward: impl Fn(&Tensor) -> L,
    ) -> Result<Tensor> {
        let mut outputs = None;
        let v = q.output_variance(params, || self.seen(&|x| forward(x).into_tensor(), &mut outputs))?;
        let _no_grad = tch::no_grad_guard();
        let outputs = wide(outputs)?;
        let e = outputs.residual(&self.hard(&outputs)?)?;
        rows(&(e * outputs.curvature_diagonal()? * outputs.likelihood.scale() * v).abs())
    }

    /// ‖eᵢ‖, the size of the loss's gradient by the outputs: EL2N (Paul et al. 2021, *Deep Learning on a Data Diet*).
    ///
    /// # Errors
    /// As [`Memory::lambda`]; no targets, or other ones.
    pub fn gradient_norm<L: IntoTensor>(&self, forward: impl Fn(&Tensor) -> L) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let outputs = self.looked_at(&|x| forward(x).into_tensor())?;
        Ok(rows(&outputs.residual(&self.hard(&outputs)?)?.square())?.sqrt())
    }

    /// ‖Jᵢᵀeᵢ‖, the size of the loss's gradient by the weights: GraNd (Paul et al. 2021, *Deep Learning on a Data
    /// Diet*). They average it over a few networks early in training; average what this gives.
    ///
    /// One backward pass for all examples, if the model is made of the layers of [`crate::nn`]: a linear layer with
    /// inputs aᵢ and gradients δᵢ by its outputs adds ‖δᵢaᵢᵀ‖² = ‖δᵢ‖²‖aᵢ‖². Parameters used outside of them take one
    /// for every example. Frozen ones are left out.
    ///
    /// # Errors
    /// As [`Memory::gradient_norm`] and [`Fisher::diagonal`](crate::fisher::Fisher::diagonal).
    pub fn weight_gradient_norm<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        forward: impl Fn(&Tensor) -> L,
    ) -> Result<Tensor> {
        let params = Params::separate(params)?;
        params.check()?;
        let mut outputs = None;
        let pass = Pass::run(&params, || self.seen(&|x| forward(x).into_tensor(), &mut outputs))?;
        let outputs = wide(outputs)?;
        let e = outputs.residual(&self.hard(&outputs)?)?;
        // ‖Jᵢᵀeᵢ‖² is the kernel of example i with itself if every weight has the variance 1: a one that is expanded
        // takes no memory.
        let one = Tensor::f_ones([1], (Kind::Double, e.device()))?;
        let trained = params.leaves().iter().filter(|l| l.trainable());
        let ones =
            trained.map(|leaf| Ok(Some(one.f_expand(leaf.tensor.size(), false)?))).collect::<Result<Vec<_>>>()?;
        let mut model = Linearized::new(&pass, &params, &mut Looked::default())?;
        let squares = model.kernels(&[e], Entries::Diagonal, &ones)?;
        Ok(squares[0].f_sqrt()?)
    }

    /// The outputs, in f64 and without their graph.
    fn looked_at(&self, forward: Forward) -> Result<Outputs> {
        let mut outputs = None;
        _ = self.seen(forward, &mut outputs)?;
        wide(outputs)
    }

    /// The outputs with their graph, a copy of which goes to `seen`: one forward pass is enough for both.
    fn seen(&self, forward: Forward, seen: &mut Option<Outputs>) -> Result<Tensor> {
        let outputs = self.checked_outputs(forward)?;
        *seen = Some(outputs.shallow_clone());
        Ok(outputs.z)
    }
}

/// The outputs that a forward pass has left behind, in f64 and without their graph.
fn wide(outputs: Option<Outputs>) -> Result<Outputs> {
    let outputs = outputs.ok_or_else(|| error("the model was not run on it"))?;
    outputs.with_values(|z| z.detach().f_to_kind(Kind::Double))
}

/// As numbers, if there are as many as expected and none is NaN.
pub(super) fn numbers(scores: &Tensor) -> Result<Vec<f64>> {
    let &[_] = &scores.size()[..] else {
        return Err(error(format!("the scores are {:?}: expected [n], a number per example", scores.size())));
    };
    let numbers: Vec<f64> = Vec::try_from(scores.detach().to_device(Device::Cpu).to_kind(Kind::Double).contiguous())?;
    // A NaN has no place in an order, and would be kept or dropped by chance.
    match numbers.iter().position(|s| s.is_nan()) {
        Some(i) => Err(error(format!("the score of example {i} is NaN; look at the weights and at the example"))),
        None => Ok(numbers),
    }
}
