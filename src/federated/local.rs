//! What one client has to minimize.

use super::dual::Dual;
use super::gaussian::Gaussian;
use super::layout::Part;
use super::moments::{Moments, joined, times};
use crate::{Error, Params, Result, linalg};
use tch::{Kind, Tensor};

/// One client's task in one round: a Gaussian prior, a number of examples, and a correction of the loss.
///
/// ```text
/// min over q of  ess · E_q[ L_k + c ] + KL(q ‖ prior)        L_k: mean loss of the client's N_k examples
/// c(θ) = ( θᵀv - ½ θᵀVθ ) / ess,  up to a constant           (v, V): the client's dual, over ρ
/// ```
///
/// On the side of the client:
///
/// ```text
/// local.start(&vs)?;                                             weights ← m_g
/// Ivon::default().ess(local.ess()).prior(local.prior())          any row with a posterior
/// opt.step(|| mean_loss() + local.correction(&params)?)
/// opt.posterior()                                                the answer
/// ```
///
/// Under a prior from a posterior q starts with the prior's precision, so at the server's posterior. The correction is
/// evaluated where the row evaluates the loss. At samples it is unbiased, and its curvature is seen with the same noise
/// as that of the loss, from which it is taken: near the fixed point the two cancel. [`Local::cavity`] says the same
/// without a correction, where that is a posterior.
///
/// Weights alone are an answer to a method with fixed precisions: [`Local::at`]. [`Local::laplace`] is the answer of
/// FedLap-Cov.
///
/// In the first round the server's mean is that of the prior. A network does not learn from zeros: choose a prior
/// around common initial weights, or set those in place of [`Local::start`].
#[derive(Debug)]
pub struct Local<Q> {
    pub(super) client: String,
    pub(super) round: u64,
    /// N_k
    pub(super) examples: f64,
    pub(super) ess: f64,
    pub(super) prior: Q,
    pub(super) posterior: Q,
    /// (v, V)
    pub(super) share: Dual,
    /// v - V m at the prior's mean m, `[n]`
    slope: Tensor,
    /// m `[n]`
    center: Tensor,
    /// The prior's precision.
    strength: Tensor,
}

impl<Q: Gaussian> Local<Q> {
    pub(super) fn new(
        (client, round): (String, u64),
        (examples, ess): (f64, f64),
        (prior, posterior): (Q, Q),
        share: Dual,
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let Moments { mean: center, precision: strength, .. } = prior.moments()?;
        let slope = &share.linear - times(&share.precision, &center);
        Ok(Local { client, round, examples, ess, prior, posterior, share, slope, center, strength })
    }

    /// Name of the client.
    pub fn client(&self) -> &str {
        &self.client
    }

    /// The number of rounds before this one.
    pub fn round(&self) -> u64 {
        self.round
    }

    /// Effective sample size N_k/(τρ), which makes the mean loss what the method's divergence is compared with.
    pub fn ess(&self) -> f64 {
        self.ess
    }

    /// The prior of the client: `.prior(local.prior())`.
    pub fn prior(&self) -> &Q {
        &self.prior
    }

    /// N(m_g, S_g⁻¹), what the server knows.
    pub fn posterior(&self) -> &Q {
        &self.posterior
    }

    /// (v, V): the client's dual over ρ, whose negative the prior holds.
    pub fn share(&self) -> &Dual {
        &self.share
    }

    /// Puts the server's mean into the variables of the client's model.
    ///
    /// # Errors
    /// A parameter of the server that the model does not have, or has in another shape.
    pub fn start(&self, params: impl Into<Params>) -> Result<()> {
        let params = Params::separate(params)?;
        let means = self.posterior.names().filter_map(|name| Some((name.to_owned(), self.posterior.mean(name)?)));
        let pairs = crate::posterior::in_model(&params, means)?;
        let _claim = params.claim()?;
        let _no_grad = tch::no_grad_guard();
        pairs.into_iter().try_for_each(|(mut variable, mean)| Ok(variable.f_copy_(&mean)?))
    }

    /// c(θ) at the values that the variables have now, to be added to the mean loss, with its graph: 0 at the prior's
    /// mean, from which it is counted,
    ///
    /// ```text
    /// c(θ) = [ (θ-m)ᵀ(v - Vm) - ½ (θ-m)ᵀV(θ-m) ] / ess
    /// ```
    ///
    /// For a loss that is a mean over the batch, and any row but those that need per-example gradients, which would not
    /// see it: they take the [`cavity`](Local::cavity). For rows without a prior there is [`Local::penalty`].
    ///
    /// # Errors
    /// As [`Local::start`].
    pub fn correction(&self, params: &Params) -> Result<Tensor> {
        self.parabola(params, &self.share.precision.f_neg()?)
    }

    /// [`Local::correction`] with the prior's own part, for rows that take no prior, such as [`Sgd`](crate::Sgd) and
    /// [`Adam`](crate::Adam): the mean loss and this are what a method over weights minimizes,
    ///
    /// ```text
    /// c(θ) + ½ (θ-m)ᵀ S_prior (θ-m) / ess
    /// ```
    ///
    /// # Errors
    /// As [`Local::start`].
    pub fn penalty(&self, params: &Params) -> Result<Tensor> {
        self.parabola(params, &self.strength.f_sub(&self.share.precision)?)
    }

    /// [ (θ-m)ᵀ(v - Vm) + ½ (θ-m)ᵀA(θ-m) ] / ess
    fn parabola(&self, params: &Params, a: &Tensor) -> Result<Tensor> {
        let theta = self.theta(params)?;
        let here = |t: &Tensor| t.to_device(theta.device());
        let d = theta.f_sub(&here(&self.center))?;
        let c = (&d * here(&self.slope) + &d * times(&here(a), &d) * 0.5).f_sum(Kind::Double)?;
        // A scalar of f64 would make the loss one, against what the model is trained in.
        let double = params.find(self.first()).is_some_and(|leaf| leaf.tensor.kind() == Kind::Double);
        Ok((c / self.ess).f_to_kind(if double { Kind::Double } else { Kind::Float })?)
    }

    /// The same task without a correction: the prior with the client's share taken out of it,
    ///
    /// ```text
    /// λ = λ(prior) - (v, V)
    /// ```
    ///
    /// For rows with per-example gradients, and whenever the client's row should draw from it at the start.
    ///
    /// # Errors
    /// [`Error::Removal`] if no positive precision is left. [`Local::correction`] needs none.
    pub fn cavity(&self) -> Result<Q> {
        let _no_grad = tch::no_grad_guard();
        let prior = self.prior.moments()?;
        match prior.natural().plus(-1.0, &self.share).moments("the cavity's precision") {
            Ok(moments) => Q::of_moments(&moments),
            Err(Error::NotPositiveDefinite { what, .. }) => {
                Err(Error::Removal { what, weight: 1.0, largest: largest_share(&prior, &self.share)? })
            }
            Err(e) => Err(e),
        }
    }

    /// The weights that the variables have now, with the prior's precision: the answer to a method of which the mean
    /// alone counts ([`FedAvg`](super::FedAvg), [`FedLap`](super::FedLap), [`Admm`](super::Admm)).
    ///
    /// # Errors
    /// As [`Local::start`]; weights that are not finite.
    pub fn at(&self, params: impl Into<Params>) -> Result<Q> {
        let _no_grad = tch::no_grad_guard();
        let theta = self.theta(&params.into())?;
        Q::of_moments(&self.prior.moments()?.around(&theta.to_device(self.center.device())))
    }

    /// Laplace's approximation of the answer, at the minimum of the client's loss with its correction and prior, which
    /// the variables hold now:
    ///
    /// ```text
    /// N(θ, S⁻¹)        S = H ess/N_k - V + S_prior
    /// ```
    ///
    /// H is the precision of `curvature`, that of the loss summed over the client's examples: `Dual::from(&fisher)`, or
    /// a [`Dual`] of the client's own, whose linear term does not count.
    ///
    /// # Errors
    /// As [`Local::at`]; a curvature of other parameters or form; [`Error::NotPositiveDefinite`].
    pub fn laplace(&self, params: impl Into<Params>, curvature: &Dual) -> Result<Q> {
        let _no_grad = tch::no_grad_guard();
        let theta = self.theta(&params.into())?.to_device(self.center.device());
        let prior = self.prior.moments()?;
        let h = curvature.precision_in(&prior.layout, "the curvature")?.to_device(theta.device());
        if h.size() != prior.precision.size() {
            let (h, s) = (h.size(), prior.precision.size());
            return Err(Error::Posterior(format!("the curvature has shape {h:?} and the prior's precision {s:?}")));
        }
        let precision = h * (self.ess / self.examples) - &self.share.precision + &prior.precision;
        let linear = times(&precision, &theta);
        let natural = Dual { layout: prior.layout.clone(), linear, precision }.finite("answer")?;
        // For its check; the mean is the weights, without the rounding of a solution.
        Q::of_moments(&natural.moments("the precision of Laplace's approximation")?.around(&theta))
    }

    fn first(&self) -> &str {
        &self.share.layout.parts[0].name
    }

    /// All variables as one vector in f64, with their graph.
    fn theta(&self, params: &Params) -> Result<Tensor> {
        let variable = |p: &Part| {
            let leaf = params.find(&p.name).ok_or_else(|| {
                Error::parameter(&p.name, "the server has it and the model does not; is it another model?")
            })?;
            if leaf.tensor.size() != p.shape {
                let problem = format!("the server has shape {:?} and the model {:?}", p.shape, leaf.tensor.size());
                return Err(Error::parameter(&p.name, problem));
            }
            Ok(leaf.tensor.shallow_clone())
        };
        joined(&self.share.layout.parts.iter().map(variable).collect::<Result<Vec<_>>>()?)
    }
}

/// The supremum of the x for which S - xV is positive definite.
fn largest_share(prior: &Moments, share: &Dual) -> Result<f64> {
    let ratios = if prior.precision.dim() == 1 {
        &share.precision / &prior.precision
    } else {
        let l = linalg::cholesky("the prior's precision", &prior.precision)?;
        let half = linalg::forward(&l, &share.precision)?;
        linalg::eigen(&linalg::symmetric(&linalg::forward(&l, &half.f_tr()?)?)?)?.0
    };
    Ok(1.0 / ratios.max().double_value(&[]))
}
