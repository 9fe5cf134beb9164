//! What the model owes to each example: the memory-perturbation equation, one example at a time. A set of examples is
//! in `removal.rs`, the view from the data in `dual.rs`.

use super::{error, home};
use crate::fisher::Batch;
use crate::kernel::{self, Draw};
use crate::likelihood::{Likelihood, Outputs, logits_of_mean, rows};
use crate::{Error, GaussianPosterior, IntoTensor, Params, Result, check};
use tch::{Device, Kind, Tensor};

/// Smallest probability in a logarithm of [`Sensitivity::nll`]: an example that the model is wrongly certain of then
/// counts for 23 nats and not for all others together.
const SMALLEST: f64 = 1e-10;

/// The step of the outputs' noise: one that no optimizer of the same seed reaches, nor a posterior or the labels of a
/// Fisher information, which draw at the last two.
const OUTPUTS: u64 = u64::MAX - 2;

/// How far a trained model would move without each of its examples, without training it again.
///
/// A posterior N(m, S⁻¹) at the end of the Bayesian learning rule is a sum of the examples' parts. Taking out that of
/// example i moves the mean by the memory-perturbation equation (Nickl et al. 2023, *The Memory Perturbation Equation*)
///
/// ```text
/// m^\i - m = S⁻¹ ∇ℓᵢ = S⁻¹ Jᵢᵀ eᵢ                                 weights      Removal::shift
/// f^\i - f ≈ vᵢ eᵢ              vᵢ = Jᵢ S⁻¹ Jᵢᵀ                    outputs      Sensitivity::shift
/// p^\i - p ≈ Λᵢ vᵢ eᵢ                                            predictions  Sensitivity::shift_of_predictions
/// ```
///
/// with the outputs f `[C]` and their Jacobian Jᵢ `[C, P]`, the error e = p - y of the prediction (divided by σ² for a
/// Gaussian) and Λ the Hessian of -ln p(y | f). The prediction error times the prediction variance: nothing is trained,
/// and the cost is about that of C backward passes over the data. S of any Gaussian posterior will do, an optimizer's
/// own during training included ([`Optimizer::posterior`](crate::Optimizer::posterior)); how good the estimate is
/// depends on how close m is to a fixed point and S to the Hessian.
///
/// S still has example i in it. Taking its curvature out as well, S - JᵢᵀΛᵢJᵢ, gives
/// [`Sensitivity::leave_one_out_shift`], which is exact for linear regression; near an optimum it matters where
/// leverages are large.
///
/// # Which number for what
/// | | is large for |
/// |---|---|
/// | [`Sensitivity::score`], Σ_c \|e Λ v\| | **uncertain** examples; where the model is sure, Λ ≈ 0 hides any shift |
/// | [`Sensitivity::shift_size`], ‖v e‖ | **mislabelled** ones, whose errors are near 1 where Λ would hide them |
/// | [`Sensitivity::leverage`], tr(Λv) | examples that the model fits because they are there, whatever their label |
///
/// Where the model is sure, Λ = p(1-p) is nearly zero and no shift of the logits changes the prediction, whether it is
/// right or not. A mislabelled example is one where the model is sure of something else.
///
/// All use the predictions of the mean or, as is usual when sensitivities are followed over a training, averaged ones:
/// [`Sensitivity::averaged`].
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::{Prior, fisher::Fisher, nn::{self, Likelihood}, selection, sensitivity::Sensitivity};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root(), 4, 3, Default::default());
/// # let x = Tensor::randn([40, 4], (Kind::Float, Device::Cpu));
/// # let y = Tensor::randint(3, [40], (Kind::Int64, Device::Cpu));
/// let q = Fisher::exact().diagonal(&vs, [&x], |x| net.forward(x))?.laplace(Prior::isotropic(1.0))?;
/// let s = Sensitivity::of(&q, &vs, [(&x, &y)], Likelihood::Categorical, |x| net.forward(x))?;
/// let suspects = selection::top(&s.shift_size()?, 4)?;        // wrong labels?
/// let estimate = s.nll(&s.shift()?)?;                      // of the test loss, from training data alone
/// # assert!(suspects.len() == 4 && estimate > s.nll(&s.outputs().zeros_like())?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Sensitivity {
    /// f `[N]` or `[N, C]`, f64
    outputs: Outputs,
    /// What p is the prediction of: f, or the logits of an average.
    logits: Outputs,
    /// y as predictions, in the shape of f.
    targets: Tensor,
    /// e, in the shape of f.
    errors: Tensor,
    /// v `[N, C, C]`, or its diagonals `[N, C]`
    covariance: Tensor,
}

impl Sensitivity {
    /// Of the examples in batches (inputs, targets), at the model's present weights, which should be the posterior's
    /// mean.
    ///
    /// The closure gives outputs `[B]` or `[B, C]`, row i from example i alone; targets are classes `[B]` (i64;
    /// categorical) or values in the shape of the outputs. Everything is kept on the CPU in f64, v as `[N, C, C]`: for
    /// many classes take [`Sensitivity::diagonal`].
    ///
    /// # Errors
    /// No examples, targets that do not fit, outputs that are not finite; as
    /// [`DiagonalGaussian::output_variance`](crate::DiagonalGaussian::output_variance).
    pub fn of<B: Into<Batch>, L: IntoTensor>(
        q: &impl GaussianPosterior,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        likelihood: Likelihood,
        model: impl Fn(&Tensor) -> L,
    ) -> Result<Self> {
        let params = Params::separate(params)?;
        Self::each(batches, likelihood, model, |outputs| q.covariance_of_outputs(&params, outputs))
    }

    /// The same with v replaced by its diagonal: C² less memory, and for linear layers less time.
    ///
    /// # Errors
    /// As [`Sensitivity::of`].
    pub fn diagonal<B: Into<Batch>, L: IntoTensor>(
        q: &impl GaussianPosterior,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        likelihood: Likelihood,
        model: impl Fn(&Tensor) -> L,
    ) -> Result<Self> {
        let params = Params::separate(params)?;
        Self::each(batches, likelihood, model, |outputs| {
            let v = q.variance_of_outputs(&params, outputs)?;
            Ok(v.f_reshape([v.size()[0], -1])?)
        })
    }

    fn each<B: Into<Batch>, L: IntoTensor>(
        batches: impl IntoIterator<Item = B>,
        likelihood: Likelihood,
        model: impl Fn(&Tensor) -> L,
        mut v: impl FnMut(&mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor>,
    ) -> Result<Self> {
        let (mut outputs, mut targets, mut covariance) = (Vec::new(), Vec::new(), Vec::new());
        for batch in batches {
            let batch = batch.into();
            // The last batch of a loader may be empty.
            if batch.inputs.size().first() == Some(&0) {
                continue;
            }
            let mut f = Tensor::new();
            // The posterior runs the model, since it needs the graph; the outputs are taken along, so that one pass
            // serves both.
            let found = v(&mut || {
                let z = model(&batch.inputs).into_tensor()?;
                f = z.detach();
                Ok(z)
            })?;
            let _no_grad = tch::no_grad_guard();
            let f = Outputs::new(likelihood, &home("outputs", &f)?, None)?;
            targets.push(f.targets(batch.targets.as_ref())?);
            outputs.push(f.z);
            covariance.push(home("covariances v of the outputs", &found)?);
        }
        if outputs.is_empty() {
            return Err(error("there are no examples: the batches are none or empty"));
        }
        let _no_grad = tch::no_grad_guard();
        let [outputs, targets, covariance] = [outputs, targets, covariance].map(|parts| Tensor::f_cat(&parts, 0));
        Self::assembled(Outputs::new(likelihood, &outputs?, None)?, targets?, covariance?)
    }

    /// From quantities that are already known: outputs f `[N]` or `[N, C]`, targets as in [`Sensitivity::of`], and v
    /// `[N, C, C]` or its diagonals `[N, C]`, C = 1 for outputs `[N]`. For posteriors that do not implement
    /// [`GaussianPosterior`] and for Gaussian processes.
    ///
    /// # Errors
    /// Other shapes, numbers that are not finite.
    pub fn new(likelihood: Likelihood, outputs: &Tensor, targets: &Tensor, v: &Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let outputs = Outputs::new(likelihood, &home("outputs", outputs)?, None)?;
        let targets = outputs.targets(Some(targets))?;
        Self::assembled(outputs, targets, home("covariances v of the outputs", v)?)
    }

    fn assembled(outputs: Outputs, targets: Tensor, covariance: Tensor) -> Result<Self> {
        let n = outputs.examples();
        let c = outputs.z.size().get(1).copied().unwrap_or(1);
        let (v, z) = (covariance.size(), outputs.z.size());
        if v != [n, c, c] && v != [n, c] {
            let expected = format!("expected [{n}, {c}, {c}], or [{n}, {c}] for diagonals");
            return Err(error(format!("v is {v:?} for outputs {z:?}: {expected}")));
        }
        let (logits, errors) = (outputs.shallow_clone(), outputs.residual(&targets)?);
        Ok(Sensitivity { outputs, logits, targets, errors, covariance })
    }

    /// The same with predictions averaged over what the posterior leaves open, for every number that depends on p:
    ///
    /// ```text
    /// p̄ᵢ = (1/K) Σ_k softmax(f_ik) or sigmoid(f_ik),   f_ik ~ N(fᵢ, vᵢ)         e = p̄ - y,   Λ of p̄
    /// ```
    ///
    /// This is how Nickl et al. follow sensitivities over a training, with K = `samples` = 150. An example that the
    /// mean is sure of while the posterior is not then counts as uncertain. Where v is 0, and for a Gaussian
    /// likelihood, whose predictions are linear in f, nothing changes; nor do f, v and [`Sensitivity::nll`], which adds
    /// shifts to f. A function of the arguments: the same seed gives the same draws, and the error falls with 1/√K.
    ///
    /// # Errors
    /// No samples, a v that is not a covariance matrix.
    pub fn averaged(&self, samples: usize, seed: u64) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        check::count("samples", samples)?;
        let root = self.root()?;
        let (z, shape) = (columns(&self.outputs.z)?, self.outputs.z.size());
        let draw = |k: usize| -> Result<Tensor> {
            let normals = kernel::normals(seed, Draw { step: OUTPUTS, sample: k as u64, parameter: 0, group: 0 }, &z)?;
            Ok((times(&root, &normals)? + &z).f_reshape(&shape)?)
        };
        let likelihood = self.outputs.likelihood;
        let logits = match likelihood {
            // Linear in f, so the mean of the draws would be f and their noise.
            Likelihood::Gaussian { .. } => self.outputs.z.shallow_clone(),
            Likelihood::Categorical | Likelihood::Bernoulli => logits_of_mean(likelihood, (0..samples).map(draw))?,
        };
        let logits = Outputs::new(likelihood, &logits, None)?;
        let (outputs, errors) = (self.outputs.shallow_clone(), logits.residual(&self.targets)?);
        let [targets, covariance] = [&self.targets, &self.covariance].map(Tensor::shallow_clone);
        Ok(Sensitivity { outputs, logits, targets, errors, covariance })
    }

    /// R with v = RRᵀ, in the form of v. By eigenvectors, because v has no Cholesky factor where outputs move together.
    fn root(&self) -> Result<Tensor> {
        let full = self.covariance.dim() == 3;
        let (values, vectors) = if full {
            let (values, vectors) = self.covariance.f_linalg_eigh("L")?;
            (values, Some(vectors))
        } else {
            (self.covariance.shallow_clone(), None)
        };
        // A covariance, except by rounding: v may have been computed in f32.
        let (least, most) = (values.f_amin(1, true)?, values.f_amax(1, true)?);
        let bad = least.f_lt_tensor(&(most.abs() * -1e-5))?.f_nonzero()?;
        if bad.numel() > 0 {
            let i = bad.int64_value(&[0, 0]);
            let least = least.double_value(&[i, 0]);
            return Err(error(format!(
                "v of example {i} is not a covariance matrix: an eigenvalue is {least:e}, expected ≥ 0"
            )));
        }
        let scale = values.f_clamp_min(0.0)?.f_sqrt()?;
        Ok(match vectors {
            Some(vectors) => vectors * scale.f_unsqueeze(1)?,
            None => scale,
        })
    }

    /// f `[N]` or `[N, C]`
    pub fn outputs(&self) -> &Tensor {
        &self.outputs.z
    }

    /// e = p - y in the shape of the outputs, divided by σ² for a Gaussian; -e is the example's dual variable α
    /// ([`DualView`](super::DualView)).
    pub fn errors(&self) -> &Tensor {
        &self.errors
    }

    /// The variances of the outputs, vᵢ's diagonal, in their shape.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn variance(&self) -> Result<Tensor> {
        let v = if self.covariance.dim() == 3 { self.covariance.f_diagonal(0, 1, 2)? } else { self.covariance.copy() };
        Ok(v.f_reshape(self.outputs.z.size())?)
    }

    /// v e: how the example's own outputs change without it, in their shape.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn shift(&self) -> Result<Tensor> {
        Ok(self.times_v(&columns(&self.errors)?)?.f_reshape(self.outputs.z.size())?)
    }

    /// (I - vΛ)⁻¹ v e: the same with the example's curvature taken out of S, v e / (1 - βv) for one output with β = Λ.
    /// For linear regression with S = Σ JᵀΛJ + prior it is what training without the example gives.
    ///
    /// # Errors
    /// [`Error::Curvature`] for an example with an eigenvalue of Λv of 1 or more, so that S - JᵀΛJ is not a precision.
    /// That can happen with a diagonal S, which has of JᵀΛJ the diagonal only.
    pub fn leave_one_out_shift(&self) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        // With Λ = RRᵀ: (I - vΛ)⁻¹ = I + vR (I - RᵀvR)⁻¹ Rᵀ, whose middle is symmetric and has one column less for a
        // softmax.
        let r = self.logits.roots()?;
        let vr = match self.covariance.dim() {
            3 => self.covariance.f_bmm(&r)?,
            _ => self.covariance.f_unsqueeze(2)? * &r,
        };
        let middle = Tensor::f_eye(r.size()[2], (Kind::Double, Device::Cpu))? - r.f_transpose(1, 2)?.f_bmm(&vr)?;
        // `_ex` says which examples of the batch fail; without it libtorch raises an error for all.
        let (factor, info) = middle.f_linalg_cholesky_ex(false, false)?;
        let bad = info.f_nonzero()?;
        if bad.numel() > 0 {
            let i = bad.int64_value(&[0, 0]);
            let leverage = self.leverage()?.double_value(&[i]);
            return Err(Error::Curvature(format!(
                "example {i} has a leverage of {leverage:.3}, more than the posterior's precision can hold; take the \
                 uncorrected shift(), or a posterior whose precision has the curvature of all examples"
            )));
        }
        let shift = self.times_v(&columns(&self.errors)?)?.f_unsqueeze(2)?;
        let inner = r.f_transpose(1, 2)?.f_bmm(&shift)?.f_cholesky_solve(&factor, false)?;
        Ok((shift + vr.f_bmm(&inner)?).f_reshape(self.outputs.z.size())?)
    }

    /// Λ v e: how its own prediction changes, in the shape of the outputs. (For a Gaussian v e.)
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn shift_of_predictions(&self) -> Result<Tensor> {
        self.logits.prediction_times(&self.shift()?)
    }

    /// Σ_c |e_c Λ_cc v_cc| `[N]`, "prediction error times prediction variance", as
    /// [`Memory::sensitivity`](crate::continual::Memory::sensitivity). For a Gaussian Σ |e v|.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn score(&self) -> Result<Tensor> {
        // In units of the prediction, as shifts of predictions are: e is divided by σ² already.
        let curvature = self.logits.curvature_diagonal()? * self.outputs.likelihood.scale();
        rows(&(&self.errors * self.variance()? * curvature).abs())
    }

    /// ‖v e‖ `[N]`: the length of [`Sensitivity::shift`].
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn shift_size(&self) -> Result<Tensor> {
        Ok(rows(&self.shift()?.f_square()?)?.f_sqrt()?)
    }

    /// tr(Λv) `[N]`: how much of its prediction is the example's own doing, between 0 and the rank of Λ where S has the
    /// curvature of all examples.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn leverage(&self) -> Result<Tensor> {
        self.logits.curvature_trace(&self.covariance)
    }

    /// Σᵢ tr(Λᵢvᵢ): the effective number of parameters, if these are all training data and S their curvature and the
    /// prior's; at most the number of weights then.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn effective_parameters(&self) -> Result<f64> {
        Ok(self.leverage()?.f_sum(None::<Kind>)?.double_value(&[]))
    }

    /// -(1/N) Σᵢ ln p(yᵢ | fᵢ + shiftᵢ), probabilities below 10⁻¹⁰ counted as that.
    ///
    /// With [`Sensitivity::shift`] the estimate of the leave-one-out loss by the memory-perturbation equation, which
    /// follows the test loss during training; with [`Sensitivity::leave_one_out_shift`] the corrected one; with zeros
    /// the training loss.
    ///
    /// # Errors
    /// A shift of another shape than the outputs.
    pub fn nll(&self, shift: &Tensor) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        self.outputs.check_same_shape(shift)?;
        let moved = Outputs::new(self.outputs.likelihood, &(&self.outputs.z + shift.to_device(Device::Cpu)), None)?;
        Ok(moved.nll(&self.targets, Some(SMALLEST))?.f_mean(None::<Kind>)?.double_value(&[]))
    }

    /// v x for x `[N, C]`
    fn times_v(&self, x: &Tensor) -> Result<Tensor> {
        times(&self.covariance, x)
    }
}

/// A x for matrices `[N, C, C]`, or diagonals `[N, C]`, and x `[N, C]`.
fn times(a: &Tensor, x: &Tensor) -> Result<Tensor> {
    Ok(if a.dim() == 3 { a.f_bmm(&x.f_unsqueeze(2)?)?.f_squeeze_dim(2)? } else { a * x })
}

/// `[N, C]`
fn columns(each: &Tensor) -> Result<Tensor> {
    Ok(each.f_reshape([each.size()[0], -1])?)
}
