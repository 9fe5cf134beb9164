//! What the model owes to each example: the memory-perturbation equation.

use super::error;
use crate::continual::Memory;
use crate::kernel::Draw;
use crate::nn::Likelihood;
use crate::nn::tape::Output;
use crate::{
    Batch, DiagonalFisher, DiagonalGaussian, Error, Fisher, GaussianPosterior, IntoTensor, Params, Result, check,
    kernel,
};
use tch::{Device, Kind, Tensor};

/// Smallest probability in a logarithm.
const SMALLEST: f64 = 1e-10;

/// How far a trained model would move without each of its examples, without training it again.
///
/// A posterior N(m, S⁻¹) at the end of the Bayesian learning rule is a sum of the examples' parts. Taking out that of example
/// i moves the mean by the memory-perturbation equation (Nickl et al. 2023, *The Memory Perturbation Equation*)
///
/// ```text
/// m^\i - m = S⁻¹ ∇ℓᵢ = S⁻¹ Jᵢᵀ eᵢ                                 weights      Removal::shift
/// f^\i - f ≈ vᵢ eᵢ              vᵢ = Jᵢ S⁻¹ Jᵢᵀ                    outputs      Sensitivity::shift
/// p^\i - p ≈ Λᵢ vᵢ eᵢ                                            predictions  Sensitivity::shift_of_predictions
/// ```
///
/// with the outputs f `[C]` and their Jacobian Jᵢ `[C, P]`, the error e = p - y of the prediction (divided by σ² for a
/// Gaussian) and Λ the Hessian of -ln p(y | f). The prediction error times the prediction variance: nothing is trained, and the
/// cost is about that of C backward passes over the data. S of any Gaussian posterior will do, an optimizer's own during training
/// included ([`Optimizer::posterior`](crate::Optimizer::posterior)); how good the estimate is depends on how close m is to a
/// fixed point and S to the Hessian.
///
/// S still has example i in it. Taking its curvature out as well, S - JᵢᵀΛᵢJᵢ, gives
/// [`Sensitivity::leave_one_out_shift`], which is exact for linear regression; near an optimum it matters where leverages are
/// large.
///
/// # Which number for what
/// | | is large for |
/// |---|---|
/// | [`Sensitivity::score`], Σ_c \|e Λ v\| | **uncertain** examples. Where the model is sure, Λ = p(1-p) is nearly zero and no shift of the logits changes the prediction, whether it is right or not |
/// | [`Sensitivity::shift_size`], ‖v e‖ | **mislabelled** ones. They have errors near 1 where the model is sure of something else, and that is where Λ would hide them |
/// | [`Sensitivity::leverage`], tr(Λv) | examples that the model fits because they are there, whatever their label |
///
/// All from the predictions of the mean, or, as sensitivities are followed over a training, [`Sensitivity::averaged`] ones.
///
/// ```
/// # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
/// use tch_blr::{Fisher, Prior, memory::{self, Sensitivity}, nn::{self, Likelihood}};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = VarStore::new(Device::Cpu);
/// # let net = nn::linear(vs.root(), 4, 3, Default::default());
/// # let x = Tensor::randn([40, 4], (Kind::Float, Device::Cpu));
/// # let y = Tensor::randint(3, [40], (Kind::Int64, Device::Cpu));
/// let q = Fisher::exact().diagonal(&vs, [&x], |x| net.forward(x))?.laplace(Prior::isotropic(1.0))?;
/// let s = Sensitivity::of(&q, &vs, [(&x, &y)], Likelihood::Categorical, |x| net.forward(x))?;
/// let suspects = memory::top(&s.shift_size()?, 4)?;        // wrong labels?
/// let estimate = s.nll(&s.shift()?)?;                      // of the test loss, from training data alone
/// # assert!(suspects.len() == 4 && estimate > s.nll(&s.outputs().zeros_like())?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Sensitivity {
    likelihood: Likelihood,
    /// f `[N]` or `[N, C]`, f64
    outputs: Tensor,
    /// What p is the prediction of: f, or the logits of an average.
    logits: Tensor,
    /// y as predictions, in the shape of f.
    targets: Tensor,
    /// e, in the shape of f.
    errors: Tensor,
    /// v `[N, C, C]`, or its diagonals `[N, C]`
    covariance: Tensor,
}

impl Sensitivity {
    /// Of the examples in batches (inputs, targets), at the model's present weights, which should be the posterior's mean.
    ///
    /// The closure gives outputs `[B]` or `[B, C]`, row i from example i alone; targets are classes `[B]` (i64; categorical) or
    /// values in the shape of the outputs. Everything is kept on the CPU in f64, v as `[N, C, C]`: for many classes take
    /// [`Sensitivity::diagonal`].
    ///
    /// # Errors
    /// No examples, targets that do not fit, outputs that are not finite; as [`DiagonalGaussian::output_variance`].
    pub fn of<B: Into<Batch>, L: IntoTensor>(
        q: &impl GaussianPosterior,
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        likelihood: Likelihood,
        model: impl FnMut(&Tensor) -> L,
    ) -> Result<Self> {
        let params = params.into();
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
        model: impl FnMut(&Tensor) -> L,
    ) -> Result<Self> {
        let params = params.into();
        Self::each(batches, likelihood, model, |outputs| {
            let v = q.variance_of_outputs(&params, outputs)?;
            Ok(v.f_reshape([v.size()[0], -1])?)
        })
    }

    fn each<B: Into<Batch>, L: IntoTensor>(
        batches: impl IntoIterator<Item = B>,
        likelihood: Likelihood,
        mut model: impl FnMut(&Tensor) -> L,
        mut v: impl FnMut(&mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor>,
    ) -> Result<Self> {
        let (mut outputs, mut targets, mut covariance) = (Vec::new(), Vec::new(), Vec::new());
        for batch in batches {
            let batch = batch.into();
            if batch.inputs.size().first() == Some(&0) {
                continue;
            }
            let mut f = Tensor::new();
            let found = v(&mut || {
                let z = model(&batch.inputs).into_tensor()?;
                f = z.detach();
                Ok(z)
            })?;
            let _no_grad = tch::no_grad_guard();
            let f = home(&f)?;
            targets.push(predictions(&batch, likelihood, &f)?);
            outputs.push(f);
            covariance.push(home(&found)?);
        }
        if outputs.is_empty() {
            return Err(error("there are no examples: the batches are none or empty".to_owned()));
        }
        let _no_grad = tch::no_grad_guard();
        let [outputs, targets, covariance] = [outputs, targets, covariance].map(|parts| Tensor::f_cat(&parts, 0));
        Self::assembled(likelihood, outputs?, targets?, covariance?)
    }

    /// From what is known already: outputs f `[N]` or `[N, C]`, targets as in [`Sensitivity::of`], and v `[N, C, C]` or its
    /// diagonals `[N, C]`, C = 1 for outputs `[N]`. For posteriors that are no [`GaussianPosterior`] and for Gaussian
    /// processes.
    ///
    /// # Errors
    /// Other shapes, numbers that are not finite.
    pub fn new(likelihood: Likelihood, outputs: &Tensor, targets: &Tensor, v: &Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let outputs = home(outputs)?;
        let batch = Batch { inputs: outputs.shallow_clone(), targets: Some(targets.shallow_clone()) };
        let targets = predictions(&batch, likelihood, &outputs)?;
        Self::assembled(likelihood, outputs, targets, home(v)?)
    }

    fn assembled(likelihood: Likelihood, outputs: Tensor, targets: Tensor, covariance: Tensor) -> Result<Self> {
        let n = outputs.size()[0];
        let c = outputs.size().get(1).copied().unwrap_or(1);
        if covariance.size() != [n, c, c] && covariance.size() != [n, c] {
            return Err(error(format!(
                "v is {:?} for outputs {:?}: expected [{n}, {c}, {c}], or [{n}, {c}] for diagonals",
                covariance.size(),
                outputs.size()
            )));
        }
        if let Some(value) = kernel::first_non_finite(&covariance) {
            return Err(error(format!("v is not finite ({value})")));
        }
        let logits = outputs.shallow_clone();
        let errors = Output { z: logits.shallow_clone(), likelihood }.residual(&targets)?;
        Ok(Sensitivity { likelihood, outputs, logits, targets, errors, covariance })
    }

    /// The same with predictions averaged over what the posterior leaves open, for every number that comes of p:
    ///
    /// ```text
    /// p̄ᵢ = (1/K) Σ_k softmax(f_ik) or sigmoid(f_ik),   f_ik ~ N(fᵢ, vᵢ)         e = p̄ - y,   Λ of p̄
    /// ```
    ///
    /// So Nickl et al. follow sensitivities over a training, with K = `samples` = 150. An example that the mean is sure of while
    /// the posterior is not then counts as uncertain. Where v is 0, and for a Gaussian likelihood, whose predictions are linear in
    /// f, nothing changes; nor do f, v and [`Sensitivity::nll`], which adds shifts to f. A function of the arguments: the same
    /// seed gives the same draws, and the error falls with 1/√K.
    ///
    /// # Errors
    /// No samples, a v that is no covariance.
    pub fn averaged(&self, samples: usize, seed: u64) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        check::count("samples", samples)?;
        let root = self.root()?;
        let z = columns(&self.outputs)?;
        let draw = |k: usize| -> Result<Tensor> {
            let normals = kernel::normals(seed, Draw { step: k as u64, sample: 0, parameter: 0, group: 0 }, &z);
            Ok((times(&root, &normals)? + &z).f_reshape(self.outputs.size())?)
        };
        let mean_log = |predict: &dyn Fn(Tensor) -> Result<Tensor>| -> Result<Tensor> {
            let mut sum = predict(draw(0)?)?;
            for k in 1..samples {
                sum = sum.f_add_(&predict(draw(k)?)?)?;
            }
            Ok((sum / samples as f64).clamp_min(f64::MIN_POSITIVE).log())
        };
        let logits = match self.likelihood {
            Likelihood::Gaussian { .. } => self.outputs.shallow_clone(),
            Likelihood::Categorical => mean_log(&|f| Ok(f.f_softmax(1, None::<Kind>)?))?,
            // p̄ and 1 - p̄, each with its digits.
            Likelihood::Bernoulli => {
                let both = mean_log(&|f| Ok(Tensor::f_stack(&[&f, &-&f], 0)?.f_sigmoid()?))?;
                both.get(0) - both.get(1)
            }
        };
        let errors = Output { z: logits.shallow_clone(), likelihood: self.likelihood }.residual(&self.targets)?;
        let [outputs, targets, covariance] =
            [&self.outputs, &self.targets, &self.covariance].map(Tensor::shallow_clone);
        Ok(Sensitivity { likelihood: self.likelihood, outputs, logits, targets, errors, covariance })
    }

    /// R with v = RRᵀ, in the form of v. By eigenvectors: v has no Cholesky factor where outputs move together.
    fn root(&self) -> Result<Tensor> {
        let full = self.covariance.dim() == 3;
        let (values, vectors) = if full {
            let (values, vectors) = self.covariance.f_linalg_eigh("L")?;
            (values, Some(vectors))
        } else {
            (self.covariance.shallow_clone(), None)
        };
        // Below zero by more than the rounding of what v may have been computed in, f32.
        let (least, most) = (values.f_amin(1, true)?, values.f_amax(1, true)?);
        let bad = least.f_lt_tensor(&(most.abs() * -1e-5))?.f_nonzero()?;
        if bad.numel() > 0 {
            let i = bad.int64_value(&[0, 0]);
            let least = least.double_value(&[i, 0]);
            return Err(error(format!("v of example {i} is no covariance: an eigenvalue is {least:e}, expected ≥ 0")));
        }
        let scale = values.f_clamp_min(0.0)?.f_sqrt()?;
        Ok(match vectors {
            Some(vectors) => vectors * scale.f_unsqueeze(1)?,
            None => scale,
        })
    }

    /// f `[N]` or `[N, C]`
    pub fn outputs(&self) -> &Tensor {
        &self.outputs
    }

    /// e = p - y in the shape of the outputs, divided by σ² for a Gaussian; -e is the example's dual variable α
    /// ([`DualView`](crate::memory::DualView)).
    pub fn errors(&self) -> &Tensor {
        &self.errors
    }

    /// The variances of the outputs, vᵢ's diagonal, in their shape.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn variance(&self) -> Result<Tensor> {
        let v = if self.covariance.dim() == 3 { self.covariance.f_diagonal(0, 1, 2)? } else { self.covariance.copy() };
        Ok(v.f_reshape(self.outputs.size())?)
    }

    /// v e: how the example's own outputs change without it, in their shape.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn shift(&self) -> Result<Tensor> {
        Ok(self.times_v(&columns(&self.errors)?)?.f_reshape(self.outputs.size())?)
    }

    /// (I - vΛ)⁻¹ v e: the same with the example's curvature taken out of S, v e / (1 - βv) for one output with β = Λ. For linear
    /// regression with S = Σ JᵀΛJ + prior it is what training without the example gives.
    ///
    /// # Errors
    /// [`Error::Curvature`] for an example with an eigenvalue of Λv of 1 or more, so that S - JᵀΛJ is no precision. That can happen
    /// with a diagonal S, which has of JᵀΛJ the diagonal only.
    pub fn leave_one_out_shift(&self) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        // With Λ = RRᵀ: (I - vΛ)⁻¹ = I + vR (I - RᵀvR)⁻¹ Rᵀ, whose middle is symmetric and has one column less for a softmax.
        let output = self.output();
        let roots = (0..output.columns()).map(|c| columns(&output.root(c)?)).collect::<Result<Vec<_>>>()?;
        let r = Tensor::f_stack(&roots, 2)?;
        let vr = match self.covariance.dim() {
            3 => self.covariance.f_bmm(&r)?,
            _ => self.covariance.f_unsqueeze(2)? * &r,
        };
        let middle = Tensor::f_eye(r.size()[2], (Kind::Double, Device::Cpu))? - r.f_transpose(1, 2)?.f_bmm(&vr)?;
        let (factor, info) = middle.f_linalg_cholesky_ex(false, false)?;
        let bad = info.f_nonzero()?;
        if bad.numel() > 0 {
            let i = bad.int64_value(&[0, 0]);
            let leverage = self.leverage()?.double_value(&[i]);
            return Err(Error::Curvature(format!(
                "example {i} has a leverage of {leverage:.3}, more than the posterior's precision can hold; take the uncorrected \
                 shift(), or a posterior whose precision has the curvature of all examples"
            )));
        }
        let shift = self.times_v(&columns(&self.errors)?)?.f_unsqueeze(2)?;
        let inner = r.f_transpose(1, 2)?.f_bmm(&shift)?.f_cholesky_solve(&factor, false)?;
        Ok((shift + vr.f_bmm(&inner)?).f_reshape(self.outputs.size())?)
    }

    /// Λ v e: how its own prediction changes, in the shape of the outputs. (For a Gaussian v e.)
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn shift_of_predictions(&self) -> Result<Tensor> {
        let shift = self.shift()?;
        let p = self.prediction()?;
        Ok(match self.likelihood {
            Likelihood::Gaussian { .. } => shift,
            Likelihood::Bernoulli => &p * (1.0 - &p) * shift,
            Likelihood::Categorical => {
                let along = (&p * &shift).f_sum_dim_intlist(1, true, None::<Kind>)?;
                &p * (shift - along)
            }
        })
    }

    /// Σ_c |e_c Λ_cc v_cc| `[N]`, "prediction error times prediction variance", as
    /// [`Memory::sensitivity`](crate::continual::Memory::sensitivity). For a Gaussian Σ |e v|.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn score(&self) -> Result<Tensor> {
        let ev = &self.errors * self.variance()?;
        let p = self.prediction()?;
        sum(&match self.likelihood {
            Likelihood::Gaussian { .. } => ev.abs(),
            Likelihood::Bernoulli | Likelihood::Categorical => (ev * (&p - p.square())).abs(),
        })
    }

    /// ‖v e‖ `[N]`: the length of [`Sensitivity::shift`].
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn shift_size(&self) -> Result<Tensor> {
        Ok(sum(&self.shift()?.f_square()?)?.f_sqrt()?)
    }

    /// tr(Λv) `[N]`: how much of its prediction is the example's own doing, between 0 and the rank of Λ where S has the curvature
    /// of all examples.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn leverage(&self) -> Result<Tensor> {
        let own = self.variance()?;
        let p = self.prediction()?;
        let leverage = match self.likelihood {
            Likelihood::Gaussian { variance } => own / variance,
            Likelihood::Bernoulli | Likelihood::Categorical => own * &p * (1.0 - &p),
        };
        let leverage = sum(&leverage)?;
        if self.likelihood != Likelihood::Categorical || self.covariance.dim() == 2 {
            return Ok(leverage);
        }
        // Λ = diag p - ppᵀ, of which p(1-p) is the diagonal: pᵀvp without its diagonal is left.
        let shared = self.times_v(&p)? * &p - p.f_square()? * self.variance()?;
        Ok(leverage - sum(&shared)?)
    }

    /// Σᵢ tr(Λᵢvᵢ): the effective number of parameters, if these are all training data and S their curvature and the prior's; at
    /// most the number of weights then.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn effective_parameters(&self) -> Result<f64> {
        Ok(self.leverage()?.f_sum(None::<Kind>)?.double_value(&[]))
    }

    /// -(1/N) Σᵢ ln p(yᵢ | fᵢ + shiftᵢ), probabilities below 10⁻¹⁰ counted as that.
    ///
    /// With [`Sensitivity::shift`] the estimate of the leave-one-out loss by the memory-perturbation equation, which follows the
    /// test loss during training; with [`Sensitivity::leave_one_out_shift`] the corrected one; with zeros the training loss.
    ///
    /// # Errors
    /// A shift of another shape than the outputs.
    pub fn nll(&self, shift: &Tensor) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        if shift.size() != self.outputs.size() {
            let (theirs, ours) = (shift.size(), self.outputs.size());
            return Err(error(format!("the shift is {theirs:?} and the outputs are {ours:?}: expected the same")));
        }
        let z = &self.outputs + shift.to_device(Device::Cpu);
        let losses = match self.likelihood {
            Likelihood::Categorical => {
                let p = z.f_softmax(1, None::<Kind>)? * &self.targets;
                -sum(&p)?.clamp_min(SMALLEST).log()
            }
            Likelihood::Bernoulli => {
                let log = |z: Tensor| z.sigmoid().clamp_min(SMALLEST).log();
                -sum(&(&self.targets * log(z.copy()) + (1.0 - &self.targets) * log(-z)))?
            }
            Likelihood::Gaussian { variance } => {
                let normal = 0.5 * (std::f64::consts::TAU * variance).ln();
                sum(&((z - &self.targets).f_square()? * (0.5 / variance) + normal))?
            }
        };
        Ok(losses.f_mean(None::<Kind>)?.double_value(&[]))
    }

    fn output(&self) -> Output {
        Output { z: self.logits.shallow_clone(), likelihood: self.likelihood }
    }

    fn prediction(&self) -> Result<Tensor> {
        Memory::new(&self.logits, self.likelihood).prediction(&self.logits)
    }

    /// v x for x `[N, C]`
    fn times_v(&self, x: &Tensor) -> Result<Tensor> {
        times(&self.covariance, x)
    }
}

/// A set of examples that is to leave the posterior: one, a class, a client's.
///
/// ```text
/// m^\R - m = S⁻¹ Σ_R ∇ℓⱼ                  shift
/// N(m + (S - F_R)⁻¹ Σ_R ∇ℓⱼ, (S - F_R)⁻¹)    posterior_without: their curvature F_R leaves as well
/// ```
///
/// Both need the examples' loss and curvature only, not the rest of the data. What becomes of predictions: perturb the model with
/// the new mean ([`DiagonalGaussian::copy_mean_to`]), or for the removed examples themselves [`Sensitivity`].
#[derive(Debug)]
pub struct Removal {
    gradient: Vec<(String, Tensor)>,
    curvature: DiagonalFisher,
}

impl Removal {
    /// Of the examples in batches (inputs, targets), at the model's present weights.
    ///
    /// # Errors
    /// As [`Sensitivity::of`] and [`Fisher::diagonal`].
    pub fn of<B: Into<Batch>, L: IntoTensor>(
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        likelihood: Likelihood,
        mut model: impl FnMut(&Tensor) -> L,
    ) -> Result<Self> {
        let params = params.into();
        params.check()?;
        let batches: Vec<Batch> = batches.into_iter().map(Into::into).collect();
        let trained: Vec<_> = params.leaves().iter().filter(|l| l.trainable()).collect();
        let leaves: Vec<&Tensor> = trained.iter().map(|l| &l.tensor).collect();
        let zero =
            |l: &&crate::params::Leaf| (l.name().to_owned(), l.tensor.detach().zeros_like().to_kind(Kind::Double));
        let mut gradient: Vec<(String, Tensor)> = trained.iter().map(zero).collect();
        for batch in &batches {
            let z = tch::with_grad(|| model(&batch.inputs).into_tensor())?;
            let y = predictions(batch, likelihood, &z.detach())?;
            let errors = Output { z: z.detach(), likelihood }.residual(&y)?;
            // ∇Σℓ = Σ Jᵀe
            let total = tch::with_grad(|| (&z * errors).f_sum(None::<Kind>))?;
            if !total.requires_grad() {
                return Err(error("the outputs have no graph; compute them from the trainable variables".to_owned()));
            }
            for (g, (_, sum)) in Tensor::f_run_backward(&[total], &leaves, false, false)?.into_iter().zip(&mut gradient)
            {
                if g.defined() {
                    let _ = sum.f_add_(&g)?;
                }
            }
        }
        let curvature = Fisher::exact().likelihood(likelihood).diagonal(params, batches, model)?;
        Ok(Removal { gradient, curvature })
    }

    /// S⁻¹ Σ_R ∇ℓⱼ of each parameter of the posterior, in f64.
    ///
    /// # Errors
    /// Shapes that differ.
    pub fn shift(&self, q: &impl GaussianPosterior) -> Result<Vec<(String, Tensor)>> {
        q.solve(&self.gradient)
    }

    /// The posterior without them, of the seed of the given one. Its mean is exact for linear regression with one weight, and
    /// wherever S is truly diagonal.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a precision that would not be positive: the posterior does not hold their curvature.
    pub fn posterior_without(&self, q: &DiagonalGaussian) -> Result<DiagonalGaussian> {
        let _no_grad = tch::no_grad_guard();
        let mut entries = Vec::new();
        for name in q.names() {
            let Some((mean, s)) = q.mean(name).zip(q.precision(name)) else { continue };
            let part = |t: &Tensor| t.f_to_device(s.device())?.f_to_kind(Kind::Double);
            let at = |of: Option<&Tensor>| of.map_or_else(|| s.f_zeros_like(), |t| t.f_to_device(s.device()));
            let f = part(&at(self.curvature.get(name))?)?;
            let g = part(&at(self.gradient.iter().find(|(n, _)| n == name).map(|(_, g)| g))?)?;
            for (what, t) in [("curvature", &f), ("gradient", &g)] {
                if t.size() != s.size() {
                    let (theirs, ours) = (t.size(), s.size());
                    return Err(Error::parameter(
                        name,
                        format!("the {what} has shape {theirs:?} and the posterior {ours:?}"),
                    ));
                }
            }
            let left = part(&s)? - f;
            if left.numel() > 0 && left.min().double_value(&[]) <= 0.0 {
                let smallest = left.min().double_value(&[]);
                return Err(Error::parameter(
                    name,
                    format!(
                        "without the examples its smallest precision is {smallest:e}: the posterior holds less curvature than they \
                         have here; take shift(..), which leaves the precision"
                    ),
                ));
            }
            let moved = part(&mean)? + g / &left;
            entries.push((name.to_owned(), moved.to_kind(mean.kind()), left.to_kind(s.kind())));
        }
        Ok(DiagonalGaussian::sharing(entries)?.with_seed(q.seed()))
    }
}

/// On the CPU in f64.
fn home(t: &Tensor) -> Result<Tensor> {
    Ok(t.detach().f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?)
}

/// The targets of a batch as predictions in the shape of the outputs.
fn predictions(batch: &Batch, likelihood: Likelihood, f: &Tensor) -> Result<Tensor> {
    let memory = Memory::new(&batch.inputs, likelihood);
    let memory = batch.targets.iter().fold(memory, Memory::targets);
    let _ = memory.outputs(&|_| f.shallow_clone())?;
    memory.check(f)?;
    memory.hard(f)
}

/// A x for matrices `[N, C, C]`, or diagonals `[N, C]`, and x `[N, C]`.
fn times(a: &Tensor, x: &Tensor) -> Result<Tensor> {
    Ok(if a.dim() == 3 { a.f_bmm(&x.f_unsqueeze(2)?)?.f_squeeze_dim(2)? } else { a * x })
}

/// `[N, C]`
fn columns(each: &Tensor) -> Result<Tensor> {
    Ok(each.f_reshape([each.size()[0], -1])?)
}

/// Over the columns, `[N]`.
fn sum(each: &Tensor) -> Result<Tensor> {
    Ok(columns(each)?.f_sum_dim_intlist(1, false, None::<Kind>)?)
}
