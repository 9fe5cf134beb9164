//! What a Gaussian posterior over the weights says about a model's outputs, to first order.
//!
//! Here is what needs both a posterior and the linearisation of a model; `posterior` itself knows no curvature.

use crate::curvature::{Linearized, Looked, Pass};
use crate::posterior::{DiagonalGaussian, FullGaussian, Posterior, in_model};
use crate::{Error, IntoTensor, Params, Result, kernel, linalg};
use tch::{Kind, Tensor};

impl DiagonalGaussian {
    /// Variances of the model's outputs under this posterior, to first order in the weights:
    ///
    /// ```text
    /// v_ik = J_ik S⁻¹ J_ikᵀ,    J_ik = ∂z_ik/∂θ at the model's present weights (normally the mean)
    /// ```
    ///
    /// The closure gives the outputs z `[B]` or `[B, C]` (logits), row i from example i only; the result has their
    /// shape, in f64 for outputs in f64 and otherwise in f32, without a graph. With the likelihood's Hessian Λᵢ, v_i
    /// is what the leverage and the sensitivity of an example need (Nickl et al. 2023, *The Memory Perturbation
    /// Equation*), and what the predictive distribution of a linearised network has (Khan et al. 2019, *Approximate
    /// Inference Turns Deep Networks into Gaussian Processes*).
    ///
    /// One forward pass and C+1 backward passes over the layers of [`crate::nn`]; no Jacobian is formed. For a linear
    /// layer with inputs aᵢ, v is Σ (Gᵢₖ⊙Gᵢₖ) ⊙ (aᵢ⊙aᵢ)Vᵀ. Parameters used outside of those layers take a backward pass
    /// for every example and output. Trainable parameters that the posterior does not have count as known. Weights and
    /// `.grad` stay as they are.
    ///
    /// # Errors
    /// A parameter that the model lacks, has frozen, or has in another shape; [`Error::Likelihood`]
    /// for outputs of another form or not finite, [`Error::Curvature`] for a variance that is not finite;
    /// [`Error::PerExample`] for batch normalization in training mode.
    pub fn output_variance<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        outputs: impl FnOnce() -> L,
    ) -> Result<Tensor> {
        self.of_outputs(&Params::separate(params)?, outputs, |model, v, size| Ok(model.variance(v)?.f_reshape(size)?))
    }

    /// Covariances `[B, C, C]` of each example's outputs, Jᵢ S⁻¹ Jᵢᵀ: as [`DiagonalGaussian::output_variance`], which
    /// is its diagonal and takes less memory. C is 1 for outputs `[B]`.
    ///
    /// # Errors
    /// As there.
    pub fn output_covariance<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        outputs: impl FnOnce() -> L,
    ) -> Result<Tensor> {
        self.of_outputs(&Params::separate(params)?, outputs, |model, v, _| model.covariance(v))
    }

    fn of_outputs<L: IntoTensor>(
        &self,
        params: &Params,
        outputs: impl FnOnce() -> L,
        of: impl FnOnce(&mut Linearized, &[Option<Tensor>], &[i64]) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let means = self.names().map(|name| (name.to_owned(), self.mean(name).unwrap_or_default()));
        // Before the forward pass, which may be the expensive part.
        fits(params, means.collect())?;
        let trained = params.leaves().iter().filter(|l| l.trainable());
        // In the order of the model's parameters, which is that of the linearization; `None` counts as known, without
        // variance.
        let variances = trained.map(|leaf| {
            let variance = leaf.names.iter().find_map(|name| self.variance(name))?;
            Some(variance.to_device(leaf.tensor.device()).to_kind(leaf.state_kind()))
        });
        let variances: Vec<Option<Tensor>> = variances.collect();
        let pass = Pass::run(params, outputs)?;
        let size = pass.z.size();
        finite(of(&mut Linearized::new(&pass, params, &mut Looked::default())?, &variances, &size)?)
    }
}

impl FullGaussian {
    /// Covariances `[B, C, C]` in f64 of each example's outputs, Jᵢ S⁻¹ Jᵢᵀ, as [`DiagonalGaussian::output_covariance`]
    /// with the whole matrix S. It forms the Jacobian, 8·B·C·P bytes, so keep the batches small enough for that.
    ///
    /// # Errors
    /// As [`DiagonalGaussian::output_variance`].
    pub fn output_covariance<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        outputs: impl FnOnce() -> L,
    ) -> Result<Tensor> {
        self.of_outputs(&Params::separate(params)?, outputs)
    }

    fn of_outputs<L: IntoTensor>(&self, params: &Params, outputs: impl FnOnce() -> L) -> Result<Tensor> {
        fits(params, self.names().map(|name| (name.to_owned(), self.mean(name).unwrap_or_default())).collect())?;
        let pass = Pass::run(params, outputs)?;
        let jacobian = Linearized::new(&pass, params, &mut Looked::default())?.jacobian()?;
        let _no_grad = tch::no_grad_guard();
        let &[batch, outputs, _] = &jacobian.size()[..] else { unreachable!("[B, C, P]") };
        let mut start = 0;
        let trained = params.leaves().iter().filter(|l| l.trainable());
        let places: Vec<(&Vec<String>, i64, i64)> = trained
            .map(|leaf| {
                let (first, n) = (start, leaf.tensor.numel() as i64);
                start += n;
                (&leaf.names, first, n)
            })
            .collect();
        // In the posterior's order, in which L is; columns of parameters that it does not know are left out.
        let parts = self.names().filter_map(|name| {
            let (_, first, n) = places.iter().find(|(names, ..)| names.iter().any(|n| n == name))?;
            Some(jacobian.f_narrow(2, *first, *n))
        });
        let parts = parts.collect::<std::result::Result<Vec<_>, _>>()?;
        let rows = Tensor::f_cat(&parts, 2)?.f_reshape([batch * outputs, -1])?;
        // J S⁻¹ Jᵀ = (L⁻¹Jᵀ)ᵀ(L⁻¹Jᵀ)
        // Contiguous: LAPACK would copy the transposed view anyway.
        let white = linalg::forward(&self.factor().to_device(rows.device()), &rows.f_tr()?.f_contiguous()?)?;
        let white = white.f_tr()?.f_reshape([batch, outputs, -1])?;
        finite(white.f_bmm(&white.f_transpose(1, 2)?)?)
    }
}

/// Every parameter of the posterior is one of the model's, and trained.
pub(crate) fn fits(params: &Params, means: Vec<(String, Tensor)>) -> Result<()> {
    params.check()?;
    let names: Vec<String> = means.iter().map(|(name, _)| name.clone()).collect();
    in_model(params, means)?;
    let frozen = |name: &&String| params.find(name).is_some_and(|leaf| !leaf.trainable());
    match names.iter().find(frozen) {
        Some(name) => Err(Error::parameter(name, "it is frozen, and so has no gradient; leave it out with select(..)")),
        None => Ok(()),
    }
}

fn finite(found: Tensor) -> Result<Tensor> {
    match kernel::first_non_finite(&found) {
        None => Ok(found),
        Some(value) => Err(Error::Curvature(format!(
            "a variance of the outputs is not finite ({value}); look at the weights, the inputs and the posterior's \
             precision"
        ))),
    }
}

/// A Gaussian posterior as seen from the data: what it says about a model's outputs, to first order in the weights, and
/// how far a gradient moves it.
pub trait GaussianPosterior: Posterior {
    /// The diagonals of [`GaussianPosterior::covariance_of_outputs`], in the shape of the outputs.
    ///
    /// # Errors
    /// As [`DiagonalGaussian::output_variance`].
    fn variance_of_outputs(&self, params: &Params, outputs: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor>;

    /// vᵢ = JᵢS⁻¹Jᵢᵀ `[B, C, C]` at the model's present weights.
    ///
    /// # Errors
    /// As [`DiagonalGaussian::output_variance`].
    fn covariance_of_outputs(&self, params: &Params, outputs: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor>;

    /// S⁻¹g of each of the posterior's parameters, in f64, for a gradient g by name; a missing gradient counts as zero.
    ///
    /// # Errors
    /// A gradient of another shape.
    fn solve(&self, gradient: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>>;
}

impl GaussianPosterior for DiagonalGaussian {
    fn variance_of_outputs(&self, params: &Params, outputs: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor> {
        self.of_outputs(params, outputs, |model, v, size| Ok(model.variance(v)?.f_reshape(size)?))
    }

    fn covariance_of_outputs(&self, params: &Params, outputs: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor> {
        self.of_outputs(params, outputs, |model, v, _| model.covariance(v))
    }

    fn solve(&self, gradient: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let each = self.names().map(|name| {
            let s = self.precision(name).map_or_else(Tensor::new, |s| s.to_kind(Kind::Double));
            Ok((name.to_owned(), find(gradient, name, &s)?.f_div(&s)?))
        });
        each.collect()
    }
}

impl GaussianPosterior for FullGaussian {
    fn variance_of_outputs(&self, params: &Params, outputs: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor> {
        let mut size = Vec::new();
        let v = self.of_outputs(params, || {
            let z = outputs()?;
            size = z.size();
            Ok::<_, Error>(z)
        })?;
        Ok(v.f_diagonal(0, 1, 2)?.f_reshape(&size)?)
    }

    fn covariance_of_outputs(&self, params: &Params, outputs: &mut dyn FnMut() -> Result<Tensor>) -> Result<Tensor> {
        self.of_outputs(params, outputs)
    }

    fn solve(&self, gradient: &[(String, Tensor)]) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let parts = self.names().map(|name| {
            let like = self.mean(name).unwrap_or_default();
            Ok(find(gradient, name, &like)?.f_reshape([-1])?)
        });
        let g = Tensor::f_cat(&parts.collect::<Result<Vec<_>>>()?, 0)?;
        Ok(self.split(&linalg::solve(self.factor(), &g)?))
    }
}

/// In f64, in the shape and on the device of `like`.
fn find(gradient: &[(String, Tensor)], name: &str, like: &Tensor) -> Result<Tensor> {
    let Some((_, g)) = gradient.iter().find(|(n, _)| n == name) else {
        // A parameter that the loss does not depend on has no gradient, and does not move in a diagonal posterior; in
        // a full one it does, through the others.
        return Ok(like.f_zeros_like()?.f_to_kind(Kind::Double)?);
    };
    if g.size() != like.size() {
        let (theirs, ours) = (g.size(), like.size());
        return Err(Error::parameter(name, format!("the gradient has shape {theirs:?} and the posterior {ours:?}")));
    }
    Ok(g.f_to_device(like.device())?.f_to_kind(Kind::Double)?)
}
