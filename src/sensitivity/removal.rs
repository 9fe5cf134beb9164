//! A set of examples that leaves a posterior: their gradients and curvature as one sum. Single examples are in
//! `perturbation.rs`.

use super::error;
use crate::fisher::{Batch, DiagonalFisher, Fisher};
use crate::likelihood::{Likelihood, Outputs};
use crate::params::{Buffers, Leaf};
use crate::{DiagonalGaussian, Error, GaussianPosterior, IntoTensor, Params, Result};
use tch::{Kind, Tensor};

/// A set of examples that is to leave the posterior: one, a class, a client's.
///
/// ```text
/// m^\R - m = S⁻¹ Σ_R ∇ℓⱼ                  shift
/// N(m + (S - F_R)⁻¹ Σ_R ∇ℓⱼ, (S - F_R)⁻¹)    posterior_without: their curvature F_R leaves as well
/// ```
///
/// Both need the examples' loss and curvature only, not the rest of the data. What becomes of predictions: perturb the
/// model with the new mean ([`DiagonalGaussian::copy_mean_to`]), or for the removed examples themselves
/// [`Sensitivity`](super::Sensitivity).
#[derive(Debug)]
pub struct Removal {
    gradient: Vec<(String, Tensor)>,
    curvature: DiagonalFisher,
}

impl Removal {
    /// Of the examples in batches (inputs, targets), at the model's present weights.
    ///
    /// # Errors
    /// As [`Sensitivity::of`](super::Sensitivity::of) and [`Fisher::diagonal`].
    pub fn of<B: Into<Batch>, L: IntoTensor>(
        params: impl Into<Params>,
        batches: impl IntoIterator<Item = B>,
        likelihood: Likelihood,
        model: impl Fn(&Tensor) -> L,
    ) -> Result<Self> {
        let params = Params::separate(params)?;
        params.check()?;
        let batches: Vec<Batch> = batches.into_iter().map(Into::into).collect();
        let trained: Vec<_> = params.leaves().iter().filter(|l| l.trainable()).collect();
        let leaves: Vec<&Tensor> = trained.iter().map(|l| &l.tensor).collect();
        let zero = |l: &&Leaf| (l.name().to_owned(), l.tensor.detach().zeros_like().to_kind(Kind::Double));
        let mut gradient: Vec<(String, Tensor)> = trained.iter().map(zero).collect();
        for batch in &batches {
            // Also where the caller has gradients off, as in an evaluation.
            let z = Buffers::unmoved(&params, || tch::with_grad(|| model(&batch.inputs).into_tensor()))?;
            // Detached: e is a constant in Σ zᵀe, whose gradient is then Jᵀe.
            let f = Outputs::new(likelihood, &z.detach(), None)?;
            f.check_finite()?;
            let errors = f.residual(&f.targets(batch.targets.as_ref())?)?;
            // ∇Σℓ = Σ Jᵀe
            let total = tch::with_grad(|| (&z * errors).f_sum(None::<Kind>))?;
            if !total.requires_grad() {
                return Err(error("the outputs have no graph; compute them from the trainable variables"));
            }
            for (g, (_, sum)) in Tensor::f_run_backward(&[total], &leaves, false, false)?.into_iter().zip(&mut gradient)
            {
                // Undefined where no output depends on the parameter; nothing else may be asked of such a tensor.
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

    /// The posterior without them, with the seed of the given one. Its mean is exact for linear regression with one
    /// weight, and wherever S is truly diagonal.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a precision that would not be positive: the posterior does not hold their curvature.
    pub fn posterior_without(&self, q: &DiagonalGaussian) -> Result<DiagonalGaussian> {
        let _no_grad = tch::no_grad_guard();
        let mut entries = Vec::new();
        for name in q.names() {
            let Some((mean, s)) = q.mean(name).zip(q.precision(name)) else { continue };
            // In f64: a precision without most of its examples is a small difference.
            let part = |t: &Tensor| t.f_to_device(s.device())?.f_to_kind(Kind::Double);
            let at = |of: Option<&Tensor>| of.map_or_else(|| s.f_zeros_like(), |t| t.f_to_device(s.device()));
            let f = part(&at(self.curvature.get(name))?)?;
            let g = part(&at(self.gradient.iter().find(|(n, _)| n == name).map(|(_, g)| g))?)?;
            for (what, t) in [("curvature", &f), ("gradient", &g)] {
                if t.size() != s.size() {
                    let (theirs, ours) = (t.size(), s.size());
                    let problem = format!("the {what} has shape {theirs:?} and the posterior {ours:?}");
                    return Err(Error::parameter(name, problem));
                }
            }
            let left = part(&s)? - f;
            if left.numel() > 0 && left.min().double_value(&[]) <= 0.0 {
                let smallest = left.min().double_value(&[]);
                let problem = format!(
                    "without the examples its smallest precision is {smallest:e}: the posterior holds less curvature \
                     than they have here; take shift(..), which leaves the precision"
                );
                return Err(Error::parameter(name, problem));
            }
            let moved = part(&mean)? + g / &left;
            entries.push((name.to_owned(), moved.to_kind(mean.kind()), left.to_kind(s.kind())));
        }
        Ok(DiagonalGaussian::sharing(entries)?.with_seed(q.seed()))
    }
}
