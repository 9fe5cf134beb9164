//! A trained model as a Gaussian process on its own data: what each example holds of it.

use super::error;
use crate::curvature::{Forward, Linearized, Looked};
use crate::nn::Likelihood;
use crate::{Error, IntoTensor, Params, Result, check, kernel, linalg};
use tch::{Device, Kind, Tensor};

/// The dual of a fit: two numbers per example in place of the weights.
///
/// For a model f = φᵀθ with the prior N(0, 1/δ), at the optimum θ of Σℓᵢ(fᵢ) + ½δ‖θ‖², each example has the local natural
/// parameters (Khan and Rue 2023, *The Bayesian Learning Rule*; Adam et al. 2021, *Dual Parameterization of Sparse Variational
/// Gaussian Processes*)
///
/// ```text
/// αᵢ = -ℓᵢ'(fᵢ) = yᵢ - pᵢ          βᵢ = ℓᵢ''(fᵢ) = pᵢ(1-pᵢ)         divided by σ² (and p(1-p) → 1) for a Gaussian
/// θ = Φᵀα/δ                       S = δ + Φᵀ diag(β) Φ
/// ```
///
/// of which the first is the representer theorem: α are the dual variables of the fit, and the Lagrange multipliers of the
/// examples. The same posterior is that of a Gaussian process with the kernel k(x, x') = φ(x)ᵀφ(x')/δ and the targets
/// ỹ = φᵀθ + α/β of noise 1/β (for a Gaussian y and σ²). A network with one output is such a model in its Jacobian,
/// φ = ∂f/∂θ ([`jacobian`]): Laplace's approximation with the Gauss-Newton matrix is exactly this process (Khan et al. 2019,
/// *Approximate Inference Turns Deep Networks into Gaussian Processes*, DNN2GP).
///
/// Everything is dense and in f64: P² for S, N² for what is computed by the kernel.
///
/// ```
/// # use tch::{Kind, Tensor};
/// use tch_blr::memory::DualView;
/// use tch_blr::nn::Likelihood;
/// # fn main() -> tch_blr::Result<()> {
/// let x = Tensor::from_slice(&[-1.0, -0.5, 0.2, 0.9, 1.4]);
/// let y = Tensor::from_slice(&[-1.1, -0.2, 0.3, 0.8, 1.6]);
/// let features = Tensor::stack(&[x.ones_like(), x], 1);
/// let noise = Likelihood::Gaussian { variance: 0.04 };
/// let fit = |delta| DualView::fitted(&features, &y, noise, delta);
/// // The prior that explains the data best.
/// let best = [0.01, 0.1, 1.0, 10.0].into_iter().map(fit).collect::<tch_blr::Result<Vec<_>>>()?;
/// let evidence = best.iter().map(DualView::log_marginal_likelihood).collect::<tch_blr::Result<Vec<_>>>()?;
/// assert!(evidence[2] > evidence[0] && evidence[2] > evidence[3]);
/// assert!(best[2].effective_parameters()? < 2.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct DualView {
    likelihood: Likelihood,
    delta: f64,
    /// Φ `[N, P]`
    features: Tensor,
    /// y `[N]`
    targets: Tensor,
    /// θ `[P]`
    weights: Tensor,
    /// `[N]`
    alpha: Tensor,
    /// `[N]`
    beta: Tensor,
    /// L with S = LLᵀ `[P, P]`
    factor: Tensor,
}

/// What a [`DualView`] predicts of other inputs.
#[derive(Debug)]
pub struct DualPrediction {
    /// φᵀθ `[M]`
    pub output: Tensor,
    /// v = φᵀS⁻¹φ `[M]`, the variance of the output.
    pub variance: Tensor,
    /// p = sigmoid(φᵀθ), or the output itself of a Gaussian.
    pub mean: Tensor,
    /// Variance of the prediction that more data would take away: Λ v Λ, or v of a Gaussian.
    pub epistemic: Tensor,
    /// Variance of a label that would stay: Λ = p(1-p), or σ².
    pub aleatoric: Tensor,
}

/// ∂f/∂θ of each example for a model with one output, `[N, P]` in f64: the features of [`DualView::linearized`]. P are the
/// trained parameters in order, each in row-major order. The closure gives outputs `[N]` or `[N, 1]`.
///
/// # Errors
/// Outputs of another form or not finite; [`Error::PerExample`] for batch normalization in training mode.
pub fn jacobian<L: IntoTensor>(params: impl Into<Params>, outputs: impl FnOnce() -> L) -> Result<Tensor> {
    Ok(linearize(&params.into(), outputs)?.1)
}

/// f `[N]` and the Jacobian.
fn linearize<L: IntoTensor>(params: &Params, outputs: impl FnOnce() -> L) -> Result<(Tensor, Tensor)> {
    params.check()?;
    let forward = Forward::run(params, Likelihood::Bernoulli, None, outputs)?;
    let size = forward.output.z.size();
    if !matches!(size[..], [_] | [_, 1]) {
        return Err(error(format!("the outputs are {size:?}: expected one per example, [N] or [N, 1]")));
    }
    let jacobian = Linearized::new(&forward, params, &mut Looked::default())?.jacobian()?;
    Ok((forward.output.z.detach().f_reshape([-1])?, jacobian.f_squeeze_dim(1)?))
}

impl DualView {
    /// Of weights θ `[P]` that were trained on features Φ `[N, P]` and targets `[N]` (0 or 1, or values) with the prior
    /// precision δ > 0. Their optimum is assumed, not found: [`DualView::duality_gap`] tells how far they are from it.
    ///
    /// # Errors
    /// A categorical likelihood, shapes that do not fit, numbers that are not finite, δ or σ² that is not positive.
    pub fn new(
        features: &Tensor,
        targets: &Tensor,
        weights: &Tensor,
        likelihood: Likelihood,
        delta: f64,
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let (features, weights) = (home("features", features)?, home("weights", weights)?);
        let &[_, p] = &features.size()[..] else {
            return Err(error(format!("the features are {:?}: expected [N, P], a row per example", features.size())));
        };
        if weights.size() != [p] {
            return Err(error(format!("the weights are {:?}: expected [{p}], one for each feature", weights.size())));
        }
        let outputs = features.f_mv(&weights)?;
        Self::at(features, targets, weights, &outputs, likelihood, delta)
    }

    /// Of a network with one output at its present weights, linearized there. Its prior is N(0, 1/δ) on all trained weights.
    ///
    /// # Errors
    /// As [`DualView::new`] and [`jacobian`].
    pub fn linearized<L: IntoTensor>(
        params: impl Into<Params>,
        outputs: impl FnOnce() -> L,
        targets: &Tensor,
        likelihood: Likelihood,
        delta: f64,
    ) -> Result<Self> {
        let params = params.into();
        let (f, features) = linearize(&params, outputs)?;
        let _no_grad = tch::no_grad_guard();
        let trained = params.leaves().iter().filter(|l| l.trainable());
        let weights = trained.map(|l| home("weights", &l.tensor)?.f_reshape([-1]).map_err(Error::from));
        let weights = Tensor::f_cat(&weights.collect::<Result<Vec<_>>>()?, 0)?;
        Self::at(home("features", &features)?, targets, weights, &home("outputs", &f)?, likelihood, delta)
    }

    /// The exact fit of a linear regression: θ = S⁻¹Φᵀy/σ².
    ///
    /// # Errors
    /// As [`DualView::new`]; a likelihood that is not Gaussian.
    pub fn fitted(features: &Tensor, targets: &Tensor, likelihood: Likelihood, delta: f64) -> Result<Self> {
        let Likelihood::Gaussian { variance } = likelihood else {
            return Err(error(
                "only a Gaussian likelihood has its fit in closed form; train the weights, then new(..)".to_owned(),
            ));
        };
        let p = features.size().get(1).copied().unwrap_or(0);
        let zero = Tensor::f_zeros([p], (Kind::Double, Device::Cpu))?;
        let mut view = Self::new(features, targets, &zero, likelihood, delta)?;
        let _no_grad = tch::no_grad_guard();
        view.weights = linalg::solve(&view.factor, &(view.features.f_tr()?.f_mv(&view.targets)? / variance))?;
        view.alpha = (&view.targets - view.features.f_mv(&view.weights)?) / variance;
        Ok(view)
    }

    fn at(
        features: Tensor,
        targets: &Tensor,
        weights: Tensor,
        outputs: &Tensor,
        likelihood: Likelihood,
        delta: f64,
    ) -> Result<Self> {
        check::positive("delta", delta)?;
        let targets = home("targets", targets)?;
        let n = features.size()[0];
        if targets.size() != [n] {
            return Err(error(format!("the targets are {:?}: expected [{n}], one for each row", targets.size())));
        }
        let (alpha, beta) = match likelihood {
            Likelihood::Bernoulli => {
                let p = outputs.f_sigmoid()?;
                // Rounding to p = 1 would leave no noise to divide by.
                (&targets - &p, &p * (-outputs).f_sigmoid()?)
            }
            Likelihood::Gaussian { variance } => {
                check::positive("variance", variance)?;
                ((&targets - outputs) / variance, outputs.full_like(1.0 / variance))
            }
            Likelihood::Categorical => {
                return Err(error(
                    "a dual view has one output per example: Likelihood::Bernoulli or Gaussian".to_owned(),
                ));
            }
        };
        let factor = precision(&features, &beta, delta)?;
        Ok(DualView { likelihood, delta, features, targets, weights, alpha, beta, factor })
    }

    /// α `[N]`: the dual variables, -e of [`Sensitivity`](super::Sensitivity).
    pub fn alpha(&self) -> &Tensor {
        &self.alpha
    }

    /// β `[N]`, the curvature of each loss.
    pub fn beta(&self) -> &Tensor {
        &self.beta
    }

    /// θ `[P]`
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// Φᵀα/δ `[P]`: the weights as a sum over the examples. It is θ at the optimum.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn representer(&self) -> Result<Tensor> {
        Ok(self.features.f_tr()?.f_mv(&self.alpha)? / self.delta)
    }

    /// The prior's kernel φ(x)ᵀφ(x')/δ `[A, B]` of two sets of features.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite.
    pub fn kernel(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(self.rows(a)?.f_matmul(&self.rows(b)?.f_tr()?)? / self.delta)
    }

    /// v `[N]`: φᵢᵀS⁻¹φᵢ of the training examples.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn variance(&self) -> Result<Tensor> {
        self.variance_of(&self.features)
    }

    fn variance_of(&self, features: &Tensor) -> Result<Tensor> {
        let white = linalg::forward(&self.factor, &features.f_tr()?.f_contiguous()?)?;
        Ok(white.f_square()?.f_sum_dim_intlist(0, false, None::<Kind>)?)
    }

    /// h = βv `[N]`, each in [0, 1): how much of its prediction is the example's own doing.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn leverage(&self) -> Result<Tensor> {
        Ok(&self.beta * self.variance()?)
    }

    /// Σh = tr(S⁻¹ΦᵀBΦ) = P - δ tr S⁻¹: the effective number of parameters.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn effective_parameters(&self) -> Result<f64> {
        Ok(self.leverage()?.f_sum(None::<Kind>)?.double_value(&[]))
    }

    /// S⁻¹φᵢαᵢ `[N, P]`: row i is the derivative of the optimum by the weight of example i in the loss, and minus it the change
    /// of the weights when it leaves, to first order.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sensitivity(&self) -> Result<Tensor> {
        let rows = &self.features * self.alpha.f_unsqueeze(1)?;
        Ok(rows.f_tr()?.f_cholesky_solve(&self.factor, false)?.f_tr()?)
    }

    /// What is predicted for features φ `[M, P]`.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite.
    pub fn predict(&self, features: &Tensor) -> Result<DualPrediction> {
        let _no_grad = tch::no_grad_guard();
        let features = self.rows(features)?;
        let output = features.f_mv(&self.weights)?;
        let variance = self.variance_of(&features)?;
        if let Likelihood::Gaussian { variance: noise } = self.likelihood {
            let (mean, epistemic, aleatoric) = (output.copy(), variance.copy(), output.full_like(noise));
            return Ok(DualPrediction { output, variance, mean, epistemic, aleatoric });
        }
        let mean = output.f_sigmoid()?;
        let aleatoric: Tensor = &mean * (1.0 - &mean);
        let epistemic = &variance * aleatoric.f_square()?;
        Ok(DualPrediction { output, variance, mean, epistemic, aleatoric })
    }

    /// f - vα/(1-βv) `[N]`: each example's output by the model without it; exact for linear regression.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn leave_one_out(&self) -> Result<Tensor> {
        let v = self.variance()?;
        Ok(self.features.f_mv(&self.weights)? - &v * &self.alpha / (1.0 - &self.beta * &v))
    }

    /// The posterior divided by the parts of these examples: S - Σφβφᵀ, and Sθ - Σφ(βφᵀθ + α). For linear regression it is the
    /// fit of the others; else one Newton step towards it.
    ///
    /// # Errors
    /// A position outside, or twice.
    pub fn without(&self, positions: &[i64]) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let n = self.alpha.size()[0];
        for (k, i) in positions.iter().enumerate() {
            if !(0..n).contains(i) || positions[..k].contains(i) {
                return Err(error(format!(
                    "position {i} of {n} examples: expected each of 0 to {} once at most",
                    n - 1
                )));
            }
        }
        let others: Vec<i64> = (0..n).filter(|i| !positions.contains(i)).collect();
        let (gone, left) = (Tensor::from_slice(positions), Tensor::from_slice(&others));
        let pick = |t: &Tensor, at: &Tensor| t.f_index_select(0, at);
        let (features, beta) = (pick(&self.features, &left)?, pick(&self.beta, &left)?);
        let factor = precision(&features, &beta, self.delta)?;
        let (phi, sites) = (pick(&self.features, &gone)?, pick(&self.beta, &gone)?);
        let site = sites * phi.f_mv(&self.weights)? + pick(&self.alpha, &gone)?;
        // Sθ = LLᵀθ
        let natural = self.factor.f_mv(&self.factor.f_tr()?.f_mv(&self.weights)?)? - phi.f_tr()?.f_mv(&site)?;
        let weights = linalg::solve(&factor, &natural)?;
        // Their own parts stay as they are, so that for a Gaussian only α, which is the error at θ, is another.
        let moved = features.f_mv(&(&weights - &self.weights))?;
        let alpha = pick(&self.alpha, &left)? - &beta * moved;
        let targets = pick(&self.targets, &left)?;
        Ok(DualView { likelihood: self.likelihood, delta: self.delta, features, targets, weights, alpha, beta, factor })
    }

    /// ln N(ỹ | 0, ΦΦᵀ/δ + diag(β)⁻¹) of the targets ỹ = Φθ + α/β, in nats, computed with the weights (P²N):
    ///
    /// ```text
    /// -½( N ln 2π - Σ ln β + ln det S - P ln δ + Σβ(ỹ - Φm)² + δ‖m‖² ),    m = S⁻¹ΦᵀBỹ
    /// ```
    ///
    /// For a Gaussian it is ln p(y), and the δ, σ² or features with the highest one are a good choice (MacKay 1992, *Bayesian
    /// Interpolation*). For other likelihoods it is that of the Gaussian model in their place (DNN2GP).
    ///
    /// # Errors
    /// [`Error::Memory`] for an example without curvature (β = 0).
    pub fn log_marginal_likelihood(&self) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let y = self.pseudo_targets()?;
        let m = linalg::solve(&self.factor, &self.features.f_tr()?.f_mv(&(&self.beta * &y))?)?;
        let misfit = number(&(&self.beta * (&y - self.features.f_mv(&m)?).f_square()?))?;
        let (n, p) = (y.size()[0] as f64, m.size()[0] as f64);
        let volume = linalg::log_det(&self.factor) - p * self.delta.ln() - number(&self.beta.f_log()?)?;
        Ok(-0.5 * (n * std::f64::consts::TAU.ln() + volume + misfit + self.delta * number(&m.f_square()?)?))
    }

    /// The same number by the kernel (N³).
    ///
    /// # Errors
    /// As [`DualView::log_marginal_likelihood`].
    pub fn log_marginal_likelihood_of_kernel(&self) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let y = self.pseudo_targets()?;
        let covariance = self.kernel(&self.features, &self.features)? + self.beta.f_reciprocal()?.f_diag(0)?;
        let factor = linalg::cholesky("the kernel with the noise", &linalg::symmetric(&covariance)?)?;
        let misfit = y.f_dot(&linalg::solve(&factor, &y)?)?.double_value(&[]);
        Ok(-0.5 * (y.size()[0] as f64 * std::f64::consts::TAU.ln() + linalg::log_det(&factor) + misfit))
    }

    /// ỹ `[N]`
    fn pseudo_targets(&self) -> Result<Tensor> {
        let certain = self.beta.f_eq(0.0)?.f_nonzero()?;
        if certain.numel() > 0 {
            let i = certain.int64_value(&[0, 0]);
            return Err(error(format!("example {i} has no curvature (β = 0), and so no Gaussian target in its place")));
        }
        Ok(self.features.f_mv(&self.weights)? + &self.alpha / &self.beta)
    }

    /// P(θ) - D(α) ≥ 0, in nats; 0 at the optimum only. With the conjugate ℓ* of each loss
    ///
    /// ```text
    /// P(θ) = Σℓᵢ(fᵢ) + ½δ‖θ‖²          D(α) = -Σℓᵢ*(-αᵢ) - ‖Φᵀα‖²/(2δ)
    /// ```
    ///
    /// where -ℓ*(-α) is the entropy of y - α for logistic losses, and αy - ½σ²α² for squares. So it bounds how far P(θ) is above
    /// its minimum. Both are of the model f = φᵀθ.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn duality_gap(&self) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let f = self.features.f_mv(&self.weights)?;
        let (losses, conjugates) = if let Likelihood::Gaussian { variance } = self.likelihood {
            let squares = (&f - &self.targets).f_square()? * (0.5 / variance);
            (squares, &self.alpha * &self.targets - self.alpha.f_square()? * (0.5 * variance))
        } else {
            let p = &self.targets - &self.alpha;
            if p.numel() > 0 && (p.min().double_value(&[]) < 0.0 || p.max().double_value(&[]) > 1.0) {
                // No dual variables of a logistic loss: D = -∞.
                return Ok(f64::INFINITY);
            }
            let q: Tensor = 1.0 - &p;
            let entropy = -p.f_xlogy(&p)? - q.f_xlogy(&q)?;
            (-(f.f_log_sigmoid()? + (&self.targets - 1.0) * &f), entropy)
        };
        let primal = number(&losses)? + 0.5 * self.delta * number(&self.weights.f_square()?)?;
        let dual =
            number(&conjugates)? - number(&self.features.f_tr()?.f_mv(&self.alpha)?.f_square()?)? * 0.5 / self.delta;
        Ok(primal - dual)
    }

    /// Features of other inputs.
    fn rows(&self, features: &Tensor) -> Result<Tensor> {
        let p = self.weights.size()[0];
        let features = home("features", features)?;
        if !matches!(features.size()[..], [_, columns] if columns == p) {
            return Err(error(format!("the features are {:?}: expected [M, {p}]", features.size())));
        }
        Ok(features)
    }
}

/// The factor of S.
fn precision(features: &Tensor, beta: &Tensor, delta: f64) -> Result<Tensor> {
    let prior = Tensor::f_eye(features.size()[1], (Kind::Double, Device::Cpu))? * delta;
    let s = features.f_tr()?.f_matmul(&(features * beta.f_unsqueeze(1)?))? + prior;
    linalg::cholesky("the precision of the weights", &linalg::symmetric(&s)?)
}

pub(super) fn number(each: &Tensor) -> Result<f64> {
    Ok(each.f_sum(None::<Kind>)?.double_value(&[]))
}

/// On the CPU in f64, and finite.
pub(super) fn home(what: &str, t: &Tensor) -> Result<Tensor> {
    if !t.defined() {
        return Err(error(format!("the {what} are undefined")));
    }
    let t = t.detach().f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    match kernel::first_non_finite(&t) {
        Some(value) => Err(error(format!("the {what} are not finite ({value})"))),
        None => Ok(t),
    }
}
