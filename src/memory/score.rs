//! A number for every example.

use super::error;
use crate::continual::Memory;
use crate::curvature::{Forward, Linearized, Looked, Part};
use crate::kernel;
use crate::nn::Likelihood;
use crate::{DiagonalGaussian, Params, Result, check};
use std::collections::HashMap;
use tch::{Device, Kind, Tensor};

/// A score without information: uniform on (0, 1), of example i by the seed and i alone; `[n]` in f64.
pub fn random_scores(n: usize, seed: u64) -> Tensor {
    Tensor::from_slice(&(0..n as u64).map(|i| uniform(seed, i)).collect::<Vec<_>>()).to_device(Device::Cpu)
}

/// 52 random bits as a number in (0, 1).
pub(super) fn uniform(seed: u64, counter: u64) -> f64 {
    let [high, low, ..] = kernel::words(seed, counter);
    let bits = (u64::from(high) << 32 | u64::from(low)) >> 12;
    (bits as f64 + 0.5) / (1u64 << 52) as f64
}

/// Scores of the examples, `[M]` in f64, at the model's present weights. With e = p - y for what the outputs f predict
/// (divided by σ² for a Gaussian), Λ the Hessian of -ln p(y | f) and v the variance of the outputs.
impl Memory {
    /// tr Λᵢ = Σ_c p_ic (1 - p_ic), between 0 for a certain prediction and 1 - 1/C; the same number for all in a regression
    /// (Pan et al. 2020; Khan and Swaroop 2021).
    ///
    /// # Errors
    /// An empty memory, outputs of another form or that are not finite.
    pub fn lambda(&self, forward: impl Fn(&Tensor) -> Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let p = self.predicted(&forward)?;
        sum(&curvature(self.likelihood(), &p))
    }

    /// tr(Λᵢ vᵢ) with vᵢ = Jᵢ S⁻¹ Jᵢᵀ of a posterior around the present weights: the leverage. Over all training data it adds up
    /// to the effective number of parameters, where S is their curvature and the prior's.
    ///
    /// # Errors
    /// As [`Memory::lambda`] and [`DiagonalGaussian::output_covariance`].
    pub fn leverage(
        &self,
        q: &DiagonalGaussian,
        params: impl Into<Params>,
        forward: impl Fn(&Tensor) -> Tensor,
    ) -> Result<Tensor> {
        let v = q.output_covariance(params, || self.outputs(&forward))?;
        let _no_grad = tch::no_grad_guard();
        let p = self.predicted(&forward)?;
        let p = p.f_reshape([p.size()[0], -1])?;
        let own = &v.f_diagonal(0, 1, 2)?;
        let leverage = sum(&(curvature(self.likelihood(), &p) * own))?;
        if self.likelihood() != Likelihood::Categorical {
            return Ok(leverage);
        }
        // Λ = diag p - ppᵀ, of which p(1-p) is the diagonal: pᵀvp without its diagonal is left.
        let shared = v.f_matmul(&p.f_unsqueeze(2)?)?.f_squeeze_dim(2)? * &p - p.f_square()? * own;
        Ok(leverage - sum(&shared)?)
    }

    /// Σ_c |e_ic Λ_icc v_icc|, "prediction error × prediction variance": how far its prediction would move, had the model not
    /// been trained on it (Nickl et al. 2023, *The Memory Perturbation Equation*). For a Gaussian |e v|.
    ///
    /// # Errors
    /// As [`Memory::leverage`]; no targets, or other ones.
    pub fn sensitivity(
        &self,
        q: &DiagonalGaussian,
        params: impl Into<Params>,
        forward: impl Fn(&Tensor) -> Tensor,
    ) -> Result<Tensor> {
        let v = q.output_variance(params, || self.outputs(&forward))?;
        let _no_grad = tch::no_grad_guard();
        let (p, e) = self.errors(&forward)?;
        let moved =
            if let Likelihood::Gaussian { .. } = self.likelihood() { e } else { curvature(self.likelihood(), &p) * e };
        sum(&(moved * v).abs())
    }

    /// ‖eᵢ‖, the size of the loss's gradient by the outputs: EL2N (Paul et al. 2021, *Deep Learning on a Data Diet*).
    ///
    /// # Errors
    /// As [`Memory::lambda`]; no targets, or other ones.
    pub fn gradient_norm(&self, forward: impl Fn(&Tensor) -> Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let (_, e) = self.errors(&forward)?;
        Ok(sum(&e.square())?.sqrt())
    }

    /// ‖Jᵢᵀeᵢ‖, the size of the loss's gradient by the weights: GraNd (Paul et al. 2021, *Deep Learning on a Data Diet*). They
    /// average it over a few networks early in training; average what this gives.
    ///
    /// One backward pass for all examples, if the model is made of the layers of [`crate::nn`]: a linear layer with inputs
    /// aᵢ and gradients δᵢ by its outputs adds ‖δᵢaᵢᵀ‖² = ‖δᵢ‖²‖aᵢ‖². Parameters used outside of them take one for every
    /// example. Frozen ones are left out.
    ///
    /// # Errors
    /// As [`Memory::gradient_norm`] and [`Fisher::diagonal`](crate::Fisher::diagonal).
    pub fn weight_gradient_norm(
        &self,
        params: impl Into<Params>,
        forward: impl Fn(&Tensor) -> Tensor,
    ) -> Result<Tensor> {
        let params = params.into();
        params.check()?;
        let (_, e) = tch::no_grad(|| self.errors(&forward))?;
        // Any likelihood that takes outputs as they are will do.
        let pass = Forward::run(&params, Likelihood::Bernoulli, None, || self.outputs(&forward))?;
        let one = Tensor::f_ones([1], (Kind::Double, e.device()))?;
        let ones = params.leaves().iter().map(|leaf| Ok((leaf.name(), one.f_expand(leaf.tensor.size(), false)?)));
        let ones: HashMap<&str, Tensor> = ones.collect::<Result<_>>()?;
        let mut model = Linearized::new(&pass, &params, &mut Looked::default())?;
        let squares = model.kernels(&[e], Part::Diagonal, |name| ones.get(name))?;
        Ok(squares[0].f_sqrt()?)
    }

    fn predicted(&self, forward: &dyn Fn(&Tensor) -> Tensor) -> Result<Tensor> {
        let f = self.outputs(forward)?;
        self.check(&f)?;
        self.prediction(&f)
    }

    /// p and e.
    fn errors(&self, forward: &dyn Fn(&Tensor) -> Tensor) -> Result<(Tensor, Tensor)> {
        let p = self.predicted(forward)?;
        let e = &p - self.hard(&p)?;
        let scale = if let Likelihood::Gaussian { variance } = self.likelihood() { 1.0 / variance } else { 1.0 };
        Ok((p, e * scale))
    }
}

/// The diagonal of Λ.
fn curvature(likelihood: Likelihood, p: &Tensor) -> Tensor {
    match likelihood {
        Likelihood::Categorical | Likelihood::Bernoulli => p * (1.0 - p),
        Likelihood::Gaussian { variance } => p.full_like(1.0 / variance),
    }
}

/// Over the columns.
fn sum(each: &Tensor) -> Result<Tensor> {
    Ok(each.f_reshape([each.size()[0], -1])?.f_sum_dim_intlist(1, false, Kind::Double)?)
}

/// As numbers, if there are as many as expected and none is NaN.
pub(super) fn numbers(scores: &Tensor) -> Result<Vec<f64>> {
    let &[_] = &scores.size()[..] else {
        return Err(error(format!("the scores are {:?}: expected [n], a number per example", scores.size())));
    };
    let numbers: Vec<f64> = Vec::try_from(scores.detach().to_device(Device::Cpu).to_kind(Kind::Double).contiguous())?;
    match numbers.iter().position(|s| s.is_nan()) {
        Some(i) => Err(error(format!("the score of example {i} is NaN; look at the weights and at the example"))),
        None => Ok(numbers),
    }
}

/// k ≥ 1
pub(super) fn count(k: usize) -> Result<()> {
    check::count("k", k)
}
