//! A Gaussian over a model's outputs, and what it predicts.

use crate::kernel::{self, Draw, Field};
use crate::likelihood::{Likelihood, Outputs};
use crate::metrics::Forecast;
use crate::{Error, Result, check, linalg};
use std::f64::consts::{PI, TAU};
use tch::{Kind, Tensor};

/// The step of the noise of outputs: one that neither an optimizer, a posterior nor sampled labels of the same seed
/// reach.
const OUTPUTS: u64 = u64::MAX - 2;

/// f ~ N(μ, V) for the outputs of every example by itself: from [`Laplace::predict`](super::Laplace::predict), or from
/// any Gaussian posterior by its `output_covariance`. All in f64.
///
/// ```
/// # use tch::Tensor;
/// use tch_blr::laplace::{Link, OutputGaussian};
/// use tch_blr::nn::Likelihood;
/// # fn main() -> tch_blr::Result<()> {
/// let (logit, variance) = (Tensor::from_slice(&[1.0]), Tensor::from_slice(&[2.0]).view([1, 1, 1]));
/// let f = OutputGaussian::new(Likelihood::Bernoulli, &logit, &variance)?;
/// let p = f.probabilities(Link::Probit)?.double_value(&[0]); // 0.6788; 0.6751 by quadrature, 0.7311 at the mean
/// assert!((p - 0.6788294711).abs() < 1e-10);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct OutputGaussian {
    likelihood: Likelihood,
    /// `[B]` or `[B, C]`
    mean: Tensor,
    /// `[B, C, C]`
    covariance: Tensor,
}

/// How class probabilities are averaged over a Gaussian of the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Link {
    /// MacKay's: softmax of μ_c/√(1 + πV_cc/8), the sigmoid of a single logit. The logits have the mean 0 before, since
    /// a constant added to all of them says nothing (Spiegelhalter and Lauritzen 1990).
    /// Each logit is damped by all of its own variance, also by what all of a row have in common and a softmax does not
    /// see: of a last layer that is what only the prior knows, and the probabilities are too even then.
    #[default]
    Probit,
    /// The same of differences: 1/Σⱼ exp(-(μ_c - μ_j)/√(1 + πV(c,j)/8)) with V(c,j) = V_cc + V_jj - 2V_cj, divided by
    /// their sum. Noise that all logits of a row have in common changes nothing; of two classes it is the probit of
    /// their difference. Nearer to the exact average than `Probit` (Lu, Ie and Sha 2020, *Mean-Field Approximation to
    /// Gaussian-Softmax Integral*).
    PairwiseProbit,
    /// Laplace's bridge to a Dirichlet distribution, [`OutputGaussian::dirichlet`]; less accurate than the probit.
    Bridge,
    /// The bridge with logits scaled to a typical variance, as in some implementations.
    ScaledBridge,
    /// The mean over draws of the logits, which converges to the exact average as 1/√samples; `samples` ≥ 1.
    MonteCarlo {
        /// Number of draws.
        samples: u32,
        /// The same seed gives the same draws.
        seed: u64,
    },
}

fn refuse(problem: impl Into<String>) -> Error {
    Error::Likelihood(problem.into())
}

impl OutputGaussian {
    /// From means `[B]` or `[B, C]` and covariances `[B, C, C]`, C = 1 for means `[B]`.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite, a negative variance, a covariance that is not symmetric.
    pub fn new(likelihood: Likelihood, mean: &Tensor, covariance: &Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let outputs = Outputs::as_is(likelihood, mean)?;
        outputs.check_finite()?;
        let (b, c) = (outputs.examples(), mean.size().get(1).copied().unwrap_or(1));
        if !covariance.defined() || covariance.size() != [b, c, c] {
            let found = if covariance.defined() { format!("{:?}", covariance.size()) } else { "undefined".to_owned() };
            return Err(refuse(format!("the covariance of the outputs is {found}: expected [{b}, {c}, {c}]")));
        }
        if let Some(value) = kernel::first_non_finite(covariance) {
            return Err(refuse(format!("the covariance of the outputs is not finite ({value})")));
        }
        let wide = |t: &Tensor| t.detach().to_kind(Kind::Double);
        let (mean, covariance) = (wide(mean).copy(), wide(covariance).to_device(mean.device()));
        if covariance.numel() > 0 {
            let least = covariance.f_diagonal(0, 1, 2)?.f_min()?.double_value(&[]);
            if least < 0.0 {
                return Err(refuse(format!("a variance of the outputs is {least:e}: expected a number ≥ 0")));
            }
            let transposed = covariance.f_transpose(1, 2)?;
            let (skew, scale) = ((&covariance - &transposed).abs().max(), covariance.abs().max());
            let (skew, scale) = (skew.double_value(&[]), scale.double_value(&[]));
            if skew > 1e-5 * scale {
                return Err(refuse(format!("the covariance of the outputs differs from its transpose by {skew:e}")));
            }
        }
        let covariance = (&covariance + covariance.f_transpose(1, 2)?) * 0.5;
        Ok(OutputGaussian { likelihood, mean, covariance })
    }

    /// μ `[B]` or `[B, C]`
    pub fn mean(&self) -> &Tensor {
        &self.mean
    }

    /// V `[B, C, C]`
    pub fn covariance(&self) -> &Tensor {
        &self.covariance
    }

    /// V_cc in the shape of μ.
    pub fn variance(&self) -> Tensor {
        self.covariance.diagonal(0, 1, 2).reshape(self.mean.size())
    }

    /// Class probabilities in the shape of μ, rows of which sum to 1; of single logits the probabilities of y = 1.
    ///
    /// For V → 0 the probits and Monte Carlo give the softmax of μ; a bridge does so of two classes only. A constant
    /// added to the logits of an example changes nothing.
    ///
    /// # Errors
    /// A Gaussian likelihood, a bridge of single logits or with a variance of 0, no samples, a covariance that has a
    /// negative eigenvalue.
    pub fn probabilities(&self, link: Link) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        if let Likelihood::Gaussian { .. } = self.likelihood {
            return Err(refuse("a Gaussian predicts numbers and no probabilities of classes: take forecast()"));
        }
        match link {
            Link::Probit => {
                let damped = self.centred()? / (self.variance() * (PI / 8.0) + 1.0).f_sqrt()?;
                self.squash(&damped)
            }
            // Of one logit there is no difference but from 0.
            Link::PairwiseProbit if self.likelihood != Likelihood::Categorical => self.probabilities(Link::Probit),
            Link::PairwiseProbit => {
                let apart = self.mean.f_unsqueeze(2)? - self.mean.f_unsqueeze(1)?;
                let own = self.variance();
                let variance = own.f_unsqueeze(2)? + own.f_unsqueeze(1)? - &self.covariance * 2.0;
                let odds = -apart / (variance.f_clamp_min(0.0)? * (PI / 8.0) + 1.0).f_sqrt()?;
                Ok((-odds.f_logsumexp(2, false)?).f_softmax(1, Kind::Double)?)
            }
            Link::Bridge | Link::ScaledBridge => {
                Ok(self.log_dirichlet(link == Link::ScaledBridge)?.f_softmax(1, Kind::Double)?)
            }
            Link::MonteCarlo { samples, seed } => self.monte_carlo(samples, seed),
        }
    }

    /// Concentrations α > 0 `[B, C]` of the Dirichlet distribution that the softmax of the logits has about; their
    /// means are the probabilities of [`Link::Bridge`].
    ///
    /// Of logits with the mean 0, as everywhere here, whose common part then needs no correction by V (μ' = μ -
    /// V1(1ᵀμ)/(1ᵀV1) of the source is μ); and of V' = V - V11ᵀV/(1ᵀV1), without the direction that a softmax does not
    /// see,
    ///
    /// ```text
    /// α_c = (1/V'_cc) (1 - 2/C + e^{μ_c} Σⱼ e^{-μ_j} / C²)
    /// ```
    ///
    /// (MacKay 1998, *Choice of Basis for Laplace Approximation*; Hobbhahn et al. 2022.)
    ///
    /// # Errors
    /// As [`OutputGaussian::probabilities`].
    pub fn dirichlet(&self) -> Result<Tensor> {
        Ok(self.log_dirichlet(false)?.f_exp()?)
    }

    /// [`OutputGaussian::dirichlet`] with μ/√k for μ and V'/k for V', k = mean(V'_cc)/√(C/2); the means are the
    /// probabilities of [`Link::ScaledBridge`].
    ///
    /// # Errors
    /// As [`OutputGaussian::probabilities`].
    pub fn scaled_dirichlet(&self) -> Result<Tensor> {
        Ok(self.log_dirichlet(true)?.f_exp()?)
    }

    fn log_dirichlet(&self, scaled: bool) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        if self.likelihood != Likelihood::Categorical {
            return Err(refuse("a bridge is from logits of two or more classes [B, C]: take Link::Probit"));
        }
        let c = self.mean.size()[1] as f64;
        // With the mean 0, 1ᵀμ is 0 and the correction of μ is none.
        let mut mean = self.centred()?;
        let along = self.covariance.f_sum_dim_intlist(2, false, Kind::Double)?;
        let total = along.f_sum_dim_intlist(1, true, Kind::Double)?;
        // Where V does not move the constant direction, there is nothing to take away.
        let gauge = (along.f_square()? / &total).f_masked_fill(&total.f_le(0.0)?, 0.0)?;
        let mut variance = self.variance() - gauge;
        if variance.numel() > 0 {
            let least = variance.f_min()?.double_value(&[]);
            if least <= 0.0 {
                return Err(refuse(format!(
                    "a variance of the logits is {least:e} without their common part: a bridge needs all > 0; take \
                     Link::Probit"
                )));
            }
        }
        if scaled {
            let k = variance.f_mean_dim(1, true, Kind::Double)? / (0.5 * c).sqrt();
            mean /= k.f_sqrt()?;
            variance /= k;
        }
        // In logarithms, because logits of some hundreds have no exponentials.
        let both = &mean + (-&mean).f_logsumexp(1, true)? - 2.0 * c.ln();
        let constant = Tensor::f_full_like(&both, (1.0 - 2.0 / c).ln())?;
        Ok(both.f_logaddexp(&constant)? - variance.f_log()?)
    }

    /// Logits with the mean 0 in every row; single ones as they are.
    fn centred(&self) -> Result<Tensor> {
        if self.likelihood != Likelihood::Categorical {
            return Ok(self.mean.copy());
        }
        Ok(&self.mean - self.mean.f_mean_dim(1, true, Kind::Double)?)
    }

    fn squash(&self, logits: &Tensor) -> Result<Tensor> {
        Outputs::as_is(self.likelihood, logits)?.prediction()
    }

    fn monte_carlo(&self, samples: u32, seed: u64) -> Result<Tensor> {
        check::count("samples", samples as usize)?;
        let (mean, root) = (self.centred()?, self.root()?);
        let mut sum = mean.f_zeros_like()?;
        for sample in 0..samples {
            let at = Draw { step: OUTPUTS, sample: u64::from(sample), parameter: 0, group: 0 };
            let z = kernel::tensor(Field::Noise { seed, at }, &mean)?;
            let z = root.f_bmm(&z.f_reshape([root.size()[0], -1, 1])?)?.f_reshape(mean.size())?;
            sum += self.squash(&(&mean + z))?;
        }
        Ok(sum / f64::from(samples))
    }

    /// R `[B, C, C]` with RRᵀ = V. From eigenvalues, because V may be singular, of which Cholesky makes an error.
    fn root(&self) -> Result<Tensor> {
        let (values, vectors) = self.covariance.f_linalg_eigh("L")?;
        if values.numel() > 0 {
            let (least, largest) = (values.min().double_value(&[]), values.max().double_value(&[]));
            if least < -1e-6 * largest.abs() {
                let problem = format!("an eigenvalue is {least:e}");
                return Err(Error::NotPositiveDefinite { what: "the covariance of the outputs".to_owned(), problem });
            }
        }
        Ok(vectors * values.f_clamp_min(0.0)?.f_sqrt()?.f_unsqueeze(1)?)
    }

    /// What it says of observations, N(μ, V_cc + σ²) for each output by itself, in closed form: V_cc is what more data
    /// would take away, the noise σ² would stay. With intervals and scores, and on the CPU.
    ///
    /// # Errors
    /// A likelihood of classes; no outputs at all.
    pub fn forecast(&self) -> Result<Forecast> {
        let noise = self.mean.f_full_like(self.noise()?)?;
        Forecast::around(&self.mean, &self.variance(), &noise)
    }

    /// ln p(y | x) `[B]` in nats of observations y in the shape of μ: that of N(μ, V + σ²I).
    ///
    /// # Errors
    /// A likelihood of classes; observations of another shape or not finite.
    pub fn log_density(&self, y: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let noise = self.noise()?;
        Outputs::as_is(self.likelihood, &self.mean)?.check_targets(y)?;
        if let Some(value) = kernel::first_non_finite(y) {
            return Err(refuse(format!("an observation is not finite ({value})")));
        }
        let (b, c) = (self.covariance.size()[0], self.covariance.size()[1]);
        let eye = Tensor::f_eye(c, (Kind::Double, self.mean.device()))?;
        // Positive definite by σ² > 0.
        let factor = (&self.covariance + eye * noise).f_linalg_cholesky(false)?;
        let off = (y.f_to_device(self.mean.device())?.f_to_kind(Kind::Double)? - &self.mean).f_reshape([b, c, 1])?;
        let white =
            linalg::forward(&factor, &off)?.f_reshape([b, c])?.f_square()?.f_sum_dim_intlist(1, false, Kind::Double)?;
        let log_det = factor.f_diagonal(0, 1, 2)?.f_log()?.f_sum_dim_intlist(1, false, Kind::Double)? * 2.0;
        Ok((white + log_det + c as f64 * TAU.ln()) * -0.5)
    }

    fn noise(&self) -> Result<f64> {
        match self.likelihood {
            Likelihood::Gaussian { variance } => Ok(variance),
            other => Err(refuse(format!("{other:?} predicts classes and no numbers: take probabilities(..)"))),
        }
    }
}
