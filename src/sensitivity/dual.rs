//! A trained model as a Gaussian process on its own data: what each example holds of it. The view as a whole (evidence,
//! duality gap) is in `evidence.rs`, predictions are in `predictive.rs`, and what an example's loss leaves in
//! `site.rs`.

use super::site::{Sites, number, squares};
use super::{error, home};
use crate::curvature::{Linearized, Looked, Pass};
use crate::likelihood::Likelihood;
use crate::{Error, IntoTensor, Params, Result, check, linalg};
use tch::{Device, Kind, Tensor};

/// Numbers in one matrix, at most: 4 GiB.
const LARGEST: i64 = 1 << 29;

/// The dual of a fit: what each example holds of it, in place of the weights.
///
/// For a model with C outputs f = Jθ and the prior N(0, 1/δ), at the optimum θ of Σℓᵢ(fᵢ) + ½δ‖θ‖², each example has
/// the local natural parameters (Khan and Rue 2023, *The Bayesian Learning Rule*; Adam et al. 2021, *Dual
/// Parameterization of Sparse Variational Gaussian Processes*)
///
/// ```text
/// αᵢ = -∂ℓᵢ/∂fᵢ = yᵢ - pᵢ  [C]              of a Gaussian divided by σ²
/// Λᵢ = ∂²ℓᵢ/∂fᵢ²  [C, C]                    diag(p) - ppᵀ of a softmax, p(1-p) of a logit, I/σ² of a Gaussian
/// θ = Σ Jᵢᵀαᵢ/δ                            S = δI + Σ JᵢᵀΛᵢJᵢ
/// ```
///
/// of which the last line is the representer theorem and the posterior's precision: α are the dual variables of the
/// fit, and the Lagrange multipliers of the examples. The same posterior is that of a Gaussian process with the kernel
/// k(x, x') = J(x)J(x')ᵀ/δ, `[C, C]`. A linear model has features φ in place of J. A network is such a model in its
/// Jacobian J = ∂f/∂θ ([`jacobian`]): Laplace's approximation with the Gauss-Newton matrix is exactly this process
/// (Khan et al. 2019, *Approximate Inference Turns Deep Networks into Gaussian Processes*, DNN2GP).
///
/// # Shapes
/// | | one output | C outputs |
/// |---|---|---|
/// | features, Jacobians | `[N, P]` | `[N, C, P]` |
/// | outputs, α | `[N]` | `[N, C]` |
/// | Λ, v, epistemic and aleatoric variance | `[N]` | `[N, C, C]` |
/// | kernel | `[A, B]` | `[A, B, C, C]` |
///
/// Everything is dense and in f64: P² for S, NCP for the features, (NC)² for what is computed by the kernel, each of
/// them 2²⁹ numbers at most.
///
/// ```
/// # use tch::{Kind, Tensor};
/// use tch_blr::sensitivity::DualView;
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
    pub(super) delta: f64,
    /// J `[N, C, P]`
    pub(super) jacobian: Tensor,
    /// θ `[P]`
    pub(super) weights: Tensor,
    pub(super) sites: Sites,
    /// L with S = LLᵀ `[P, P]`
    pub(super) factor: Tensor,
}

/// ∂f/∂θ of each example in f64, the features of [`DualView::linearized`]: `[N, P]` for outputs `[N]` or `[N, 1]`, and
/// `[N, C, P]` for `[N, C]`. P are the trained parameters in order, each in row-major order.
///
/// # Errors
/// Outputs of another form or not finite; [`Error::PerExample`] for batch normalization in training mode;
/// [`Error::Memory`] for more than 2²⁹ numbers.
pub fn jacobian<L: IntoTensor>(params: impl Into<Params>, outputs: impl FnOnce() -> L) -> Result<Tensor> {
    let (f, jacobian) = linearize(&Params::separate(params)?, outputs)?;
    Ok(if f.dim() == 1 { jacobian.f_squeeze_dim(1)? } else { jacobian })
}

/// f `[N]` or `[N, C]`, and the Jacobian `[N, C, P]`.
fn linearize<L: IntoTensor>(params: &Params, outputs: impl FnOnce() -> L) -> Result<(Tensor, Tensor)> {
    params.check()?;
    let pass = Pass::run(params, outputs)?;
    let f = pass.z.detach();
    // One output is `[N]` everywhere here, whichever way the model writes it.
    let f = if matches!(f.size()[..], [_, 1]) { f.f_squeeze_dim(1)? } else { f };
    let weights = params.leaves().iter().filter(|l| l.trainable()).map(|l| l.tensor.numel() as i64).sum();
    within("the Jacobian", &[f.numel() as i64, weights])?;
    Ok((f, Linearized::new(&pass, params, &mut Looked::default())?.jacobian()?))
}

impl DualView {
    /// Of weights θ `[P]` that were trained with the prior precision δ > 0 on features Φ `[N, P]` and targets `[N]` or
    /// `[N, 1]` (0 or 1, or values), or on Jacobians `[N, C, P]` and targets as classes `[N]` (i64; categorical) or `[N, C]`. Their
    /// optimum is assumed, not found: [`DualView::duality_gap`] tells how far they are from it.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite, δ or σ² that is not positive, more than 2²⁹ numbers in a
    /// matrix.
    pub fn new(
        features: &Tensor,
        targets: &Tensor,
        weights: &Tensor,
        likelihood: Likelihood,
        delta: f64,
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let (features, weights) = (home("features", features)?, home("weights", weights)?);
        let size = features.size();
        let (&[_, p] | &[_, _, p]) = &size[..] else {
            return Err(error(format!(
                "the features are {size:?}: expected [N, P], a row per example, or [N, C, P] for C outputs"
            )));
        };
        if weights.size() != [p] {
            return Err(error(format!("the weights are {:?}: expected [{p}], one for each feature", weights.size())));
        }
        let outputs = features.f_matmul(&weights)?;
        Self::at(&features, targets, weights, &outputs, likelihood, delta)
    }

    /// Of a network at its present weights, linearized there. Its prior is N(0, 1/δ) on all trained weights; its
    /// outputs `[N]`, `[N, 1]` (taken as `[N]`, and so are such targets) or `[N, C]` are those of the given targets.
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
        let params = Params::separate(params)?;
        let (f, jacobian) = linearize(&params, outputs)?;
        let _no_grad = tch::no_grad_guard();
        let trained = params.leaves().iter().filter(|l| l.trainable());
        let weights = trained.map(|l| home("weights", &l.tensor)?.f_reshape([-1]).map_err(Error::from));
        let weights = Tensor::f_cat(&weights.collect::<Result<Vec<_>>>()?, 0)?;
        Self::at(&home("features", &jacobian)?, targets, weights, &home("outputs", &f)?, likelihood, delta)
    }

    /// The exact fit of a linear regression: θ = S⁻¹ Σ Jᵢᵀyᵢ/σ².
    ///
    /// # Errors
    /// As [`DualView::new`]; a likelihood that is not Gaussian.
    pub fn fitted(features: &Tensor, targets: &Tensor, likelihood: Likelihood, delta: f64) -> Result<Self> {
        if !matches!(likelihood, Likelihood::Gaussian { .. }) {
            return Err(error(
                "only a Gaussian likelihood has its fit in closed form; train the weights, then new(..)",
            ));
        }
        let p = features.size().last().copied().unwrap_or(0);
        let zero = Tensor::f_zeros([p], (Kind::Double, Device::Cpu))?;
        let view = Self::new(features, targets, &zero, likelihood, delta)?;
        let _no_grad = tch::no_grad_guard();
        // From θ = 0 the minimum of a quadratic is one Newton step away, and α is y/σ² there.
        let step = linalg::solve(&view.factor, &pull(&view.jacobian, &view.sites.alpha)?)?;
        let d = view.jacobian.f_matmul(&step)?;
        Ok(DualView { weights: step, sites: view.sites.moved(&d)?, ..view })
    }

    /// Of outputs in the shape that they are to have.
    fn at(
        features: &Tensor,
        targets: &Tensor,
        weights: Tensor,
        outputs: &Tensor,
        likelihood: Likelihood,
        delta: f64,
    ) -> Result<Self> {
        check::positive("delta", delta)?;
        // As outputs `[N, 1]` are taken as `[N]`: one batch then serves the loss, the Fisher information and this.
        let one = outputs.dim() == 1 && targets.defined() && targets.size() == [outputs.size()[0], 1];
        let targets = if one { targets.f_squeeze_dim(1)? } else { targets.shallow_clone() };
        let sites = Sites::of(likelihood, outputs, &targets)?;
        let jacobian = features.f_reshape([sites.len(), sites.columns(), -1])?;
        // The factor of S, not its inverse, which would lose digits where δ is small.
        let factor = precision(&jacobian, &sites.root, delta)?;
        Ok(DualView { delta, jacobian, weights, sites, factor })
    }

    /// α `[N]` or `[N, C]`: the dual variables, -e of [`Sensitivity`](super::Sensitivity).
    pub fn alpha(&self) -> &Tensor {
        &self.sites.alpha
    }

    /// Λ, the curvature of each loss: β `[N]` of one output, `[N, C, C]` of several.
    pub fn lambda(&self) -> &Tensor {
        &self.sites.lambda
    }

    /// θ `[P]`
    pub fn weights(&self) -> &Tensor {
        &self.weights
    }

    /// Σ Jᵢᵀαᵢ/δ `[P]`: the weights as a sum over the examples. It is θ at the optimum.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn representer(&self) -> Result<Tensor> {
        Ok(pull(&self.jacobian, &self.sites.alpha)? / self.delta)
    }

    /// The prior's kernel J(x)J(x')ᵀ/δ of two sets of features: `[A, B]`, or `[A, B, C, C]` of C outputs.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite, more than 2²⁹ numbers.
    pub fn kernel(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let (a, b) = (self.rows(a)?, self.rows(b)?);
        let (left, right, c) = (a.size()[0], b.size()[0], self.sites.columns());
        let all = self.gram(&a.f_flatten(0, 1)?, &b.f_flatten(0, 1)?)?;
        if self.one() {
            return Ok(all);
        }
        Ok(all.f_reshape([left, c, right, c])?.f_permute([0, 2, 1, 3])?)
    }

    /// Its trace over the outputs, Σ_c k_cc `[A, B]`: how alike two inputs are to the model. It takes C² less memory
    /// than the whole kernel.
    ///
    /// # Errors
    /// As [`DualView::kernel`].
    pub fn kernel_trace(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        self.gram(&self.rows(a)?.f_flatten(1, -1)?, &self.rows(b)?.f_flatten(1, -1)?)
    }

    /// Its sum over all pairs of outputs, Σ_cd k_cd `[A, B]`: the kernel of the sum of the outputs.
    ///
    /// # Errors
    /// As [`DualView::kernel`].
    pub fn kernel_sum(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let sum = |t: &Tensor| Ok::<_, Error>(self.rows(t)?.f_sum_dim_intlist(1, false, None::<Kind>)?);
        self.gram(&sum(a)?, &sum(b)?)
    }

    /// abᵀ/δ of two matrices.
    pub(super) fn gram(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        within("the kernel", &[a.size()[0], b.size()[0]])?;
        Ok(a.f_matmul(&b.f_tr()?)? / self.delta)
    }

    /// v = JᵢS⁻¹Jᵢᵀ `[N]` or `[N, C, C]` of the training examples.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn variance(&self) -> Result<Tensor> {
        squares(&self.white(&self.jacobian)?, self.one())
    }

    /// J L⁻ᵀ `[M, C, P]`
    pub(super) fn white(&self, jacobian: &Tensor) -> Result<Tensor> {
        let columns = jacobian.f_flatten(0, 1)?.f_tr()?.f_contiguous()?;
        Ok(linalg::forward(&self.factor, &columns)?.f_tr()?.f_reshape(jacobian.size())?)
    }

    /// h = tr(Λv) `[N]`, between 0 and the rank of Λ: how much of its prediction is the example's own doing.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn leverage(&self) -> Result<Tensor> {
        let each = self.sites.root.f_transpose(1, 2)?.f_bmm(&self.white(&self.jacobian)?)?;
        Ok(each.f_square()?.f_sum_dim_intlist([1, 2].as_slice(), false, None::<Kind>)?)
    }

    /// Σh = P - δ tr S⁻¹: the effective number of parameters.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn effective_parameters(&self) -> Result<f64> {
        number(&self.leverage()?)
    }

    /// S⁻¹Jᵢᵀαᵢ `[N, P]`: row i is the derivative of the optimum by the weight of example i in the loss, and minus it
    /// the change of the weights when it leaves, to first order.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sensitivity(&self) -> Result<Tensor> {
        let alpha = self.sites.alpha.f_reshape([self.sites.len(), 1, self.sites.columns()])?;
        let rows = alpha.f_bmm(&self.jacobian)?.f_squeeze_dim(1)?;
        Ok(rows.f_tr()?.f_cholesky_solve(&self.factor, false)?.f_tr()?)
    }

    /// f - (I - vΛ)⁻¹vα `[N]` or `[N, C]`: each example's outputs by the model without it; exact for linear regression,
    /// and for it f - vα/(1-βv) of one output.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn leave_one_out(&self) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        // (I - vRRᵀ)⁻¹v = v + vR(I - RᵀvR)⁻¹Rᵀv. The middle has the rank of Λ, and needs no inverse of Λ or v.
        let (white, root) = (self.white(&self.jacobian)?, &self.sites.root);
        let v = squares(&white, false)?;
        let shift = v.f_bmm(&self.sites.alpha.f_reshape([self.sites.len(), self.sites.columns(), 1])?)?;
        let own = squares(&root.f_transpose(1, 2)?.f_bmm(&white)?, false)?;
        let middle = Tensor::f_eye(root.size()[2], (Kind::Double, Device::Cpu))? - own;
        let inner = Tensor::f_linalg_solve(&middle, &root.f_transpose(1, 2)?.f_bmm(&shift)?, true)?;
        let shift = shift + v.f_bmm(&root.f_bmm(&inner)?)?;
        Ok(&self.sites.outputs - shift.f_reshape(self.sites.outputs.size())?)
    }

    /// The posterior divided by the parts of these examples R: S' = S - Σ_R JᵢᵀΛᵢJᵢ, and θ - S'⁻¹ Σ_R Jᵢᵀαᵢ. For linear
    /// regression it is the fit of the others; otherwise it is one Newton step towards it.
    ///
    /// # Errors
    /// A position outside, or twice.
    pub fn without(&self, positions: &[i64]) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let n = self.sites.len();
        for (k, i) in positions.iter().enumerate() {
            if !(0..n).contains(i) || positions[..k].contains(i) {
                let last = n - 1;
                return Err(error(format!("position {i} of {n} examples: expected each of 0 to {last} once at most")));
            }
        }
        let others: Vec<i64> = (0..n).filter(|i| !positions.contains(i)).collect();
        let (gone, left) = (Tensor::from_slice(positions), Tensor::from_slice(&others));
        let pick = |at: &Tensor| Ok::<_, Error>((self.jacobian.f_index_select(0, at)?, self.sites.select(at)?));
        let (jacobian, sites) = pick(&left)?;
        let (theirs, parts) = pick(&gone)?;
        let factor = precision(&jacobian, &sites.root, self.delta)?;
        let step = -linalg::solve(&factor, &pull(&theirs, &parts.alpha)?)?;
        // The others' parabolas stay as they are, only seen from the new weights.
        let sites = sites.moved(&jacobian.f_matmul(&step)?)?;
        Ok(DualView { delta: self.delta, jacobian, weights: &self.weights + step, sites, factor })
    }

    /// Whether outputs are `[N]`.
    pub(super) fn one(&self) -> bool {
        self.sites.alpha.dim() == 1
    }

    /// Features of other inputs, `[M, C, P]`.
    pub(super) fn rows(&self, features: &Tensor) -> Result<Tensor> {
        let (c, p) = (self.sites.columns(), self.weights.size()[0]);
        let features = home("features", features)?;
        match &features.size()[..] {
            &[_, columns] if columns == p && self.one() => Ok(features.f_unsqueeze(1)?),
            &[_, outputs, columns] if (outputs, columns) == (c, p) && !self.one() => Ok(features),
            size => {
                let expected = if self.one() { format!("[M, {p}]") } else { format!("[M, {c}, {p}]") };
                Err(error(format!("the features are {size:?}: expected {expected}")))
            }
        }
    }
}

/// Σ Jᵢᵀaᵢ `[P]`
pub(super) fn pull(jacobian: &Tensor, a: &Tensor) -> Result<Tensor> {
    Ok(jacobian.f_flatten(0, 1)?.f_tr()?.f_mv(&a.f_reshape([-1])?)?)
}

/// The factor of S.
fn precision(jacobian: &Tensor, root: &Tensor, delta: f64) -> Result<Tensor> {
    let p = jacobian.size()[2];
    within("the precision of the weights", &[p, p])?;
    // ΣJᵀΛJ as a Gram matrix of RᵀJ, which is positive semi-definite up to rounding.
    let each = root.f_transpose(1, 2)?.f_bmm(jacobian)?.f_flatten(0, 1)?;
    let s = each.f_tr()?.f_matmul(&each)? + Tensor::f_eye(p, (Kind::Double, Device::Cpu))? * delta;
    linalg::cholesky("the precision of the weights", &linalg::symmetric(&s)?)
}

/// Refuses matrices that are too large to be intended.
fn within(what: &str, size: &[i64]) -> Result<()> {
    // Saturating: shapes of a large network overflow the product.
    let numbers = size.iter().fold(1i64, |product, n| product.saturating_mul(*n));
    if numbers <= LARGEST {
        return Ok(());
    }
    Err(error(format!(
        "{what} of {size:?} has {numbers} numbers, and a dual view keeps at most 2²⁹ = {LARGEST} (4 GiB) in a matrix: \
         take fewer examples, or train fewer of the weights (the last layer); Sensitivity needs no such matrix"
    )))
}
