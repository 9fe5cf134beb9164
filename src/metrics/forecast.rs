//! What is predicted of a number: a Gaussian, or a mixture of several that samples of a posterior make.

use super::Interval;
use super::inputs::{finite, numbers, open_unit, same_shape};
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// For each number y of a prediction (a row of `[N]`, an element of `[N, D]`) a mixture of K Gaussians:
///
/// ```text
/// p(y) = Σₖ wₖ N(y | mₖ, vₖ)
/// ```
///
/// Comes from [`predict_regression`](crate::Posterior#method.predict_regression), where mₖ is what sample k of the
/// weights says and vₖ the variance of the noise around it, or from anybody's numbers:
///
/// ```
/// use tch::Tensor;
/// use tch_blr::metrics::Forecast;
/// # fn main() -> tch_blr::Result<()> {
/// let t = |x: [f64; 3]| Tensor::from_slice(&x);
/// let f = Forecast::gaussian(&t([0.0, 1.0, 2.0]), &t([1.0, 1.0, 4.0]))?;
/// let y = t([0.5, -1.0, 2.0]);
/// let interval = f.interval(0.9)?;
/// println!("NLL {} CRPS {} coverage {}", f.nll(&y)?, f.crps(&y)?, interval.coverage(&y)?);
/// # assert!((interval.coverage(&y)? - 2.0 / 3.0).abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
///
/// Every element is a prediction of its own; nothing is said of how several outputs vary together. All numbers are in
/// f64 on the CPU, without a graph. Scores are means over the elements.
#[derive(Debug)]
pub struct Forecast {
    /// `[K]`, with the sum 1.
    pub(super) weights: Tensor,
    /// `[K, N]`
    pub(super) means: Tensor,
    /// Of y, `[K, N]`, ≥ 0.
    pub(super) variances: Tensor,
    /// What part of them is noise, `[K, N]`, kept beside them: their difference from a large variance has no digits.
    noise: Tensor,
    /// And what is not.
    uncertain: Tensor,
    /// Of a prediction.
    shape: Vec<i64>,
}

impl Forecast {
    /// One Gaussian for each element: means and variances of one shape, all of it noise
    /// ([`Forecast::around`] tells two parts apart). A variance of 0 says that y is the mean.
    ///
    /// # Errors
    /// [`Error::Metric`] for two shapes, no elements, a number that is not finite, a negative variance.
    pub fn gaussian(mean: &Tensor, variance: &Tensor) -> Result<Self> {
        let mean = finite("mean", mean)?;
        let variance = numbers("variance", variance, "a finite number ≥ 0", non_negative)?;
        same_shape("variance", &variance, "mean", &mean.size())?;
        Self::stacked(&[1.0], &mean.f_unsqueeze(0)?, &variance.f_unsqueeze(0)?)
    }

    /// One Gaussian for each element, with noise around a number that is itself uncertain, as of a
    /// [linearised model](crate::laplace::OutputGaussian::forecast): N(mean, epistemic + noise), three tensors of one
    /// shape.
    ///
    /// # Errors
    /// As [`Forecast::gaussian`], of both variances.
    pub fn around(mean: &Tensor, epistemic: &Tensor, noise: &Tensor) -> Result<Self> {
        let epistemic = numbers("epistemic", epistemic, "a finite number ≥ 0", non_negative)?;
        let noise = numbers("noise", noise, "a finite number ≥ 0", non_negative)?;
        same_shape("noise", &noise, "epistemic", &epistemic.size())?;
        let f = Self::gaussian(mean, &(&epistemic + &noise))?;
        Ok(Forecast { noise: noise.f_reshape([1, -1])?, uncertain: epistemic.f_reshape([1, -1])?, ..f })
    }

    /// A mixture of K Gaussians for each element: `weights` of the components, each ≥ 0, which are divided by their
    /// sum; `means` and `variances` `[K, …]`.
    ///
    /// # Errors
    /// As [`Forecast::gaussian`]; another number of weights than of components, weights without a positive sum.
    pub fn mixture(weights: &[f64], means: &Tensor, variances: &Tensor) -> Result<Self> {
        let means = finite("means", means)?;
        let variances = numbers("variances", variances, "a finite number ≥ 0", non_negative)?;
        same_shape("variances", &variances, "means", &means.size())?;
        Self::stacked(weights, &means, &variances)
    }

    /// Samples of y itself, `[K, …]`: each of them as probable as the others, and nothing between.
    ///
    /// # Errors
    /// As [`Forecast::gaussian`].
    pub fn samples(samples: &Tensor) -> Result<Self> {
        let samples = finite("samples", samples)?;
        let k = samples.size().first().map_or(0, |k| *k as usize);
        Self::stacked(&vec![1.0; k], &samples, &samples.f_zeros_like()?)
    }

    fn stacked(weights: &[f64], means: &Tensor, variances: &Tensor) -> Result<Self> {
        let &[k, ref shape @ ..] = &means.size()[..] else {
            return Err(Error::Metric("the components are a single number: expected [K, …]".into()));
        };
        let shape = shape.to_vec();
        if weights.len() != k as usize {
            let n = weights.len();
            return Err(Error::Metric(format!("{n} weights for {k} components: expected one for each")));
        }
        if let Some(i) = weights.iter().position(|w| !non_negative(*w)) {
            return Err(Error::Metric(format!("weights[{i}] = {}: expected a finite number ≥ 0", weights[i])));
        }
        let sum: f64 = weights.iter().sum();
        if !(sum > 0.0 && sum.is_finite()) {
            return Err(Error::Metric(format!("the weights have the sum {sum}: expected a positive number")));
        }
        let [means, variances] = [means, variances].map(|t| t.f_reshape([k, -1]));
        let (means, variances) = (means?, variances?);
        let (noise, uncertain) = (variances.shallow_clone(), variances.f_zeros_like()?);
        Ok(Forecast { weights: Tensor::from_slice(weights) / sum, means, variances, noise, uncertain, shape })
    }

    /// K
    pub fn components(&self) -> usize {
        self.weights.size()[0] as usize
    }

    /// The shape of a prediction, without components.
    pub fn size(&self) -> &[i64] {
        &self.shape
    }

    /// `E[y] = Σₖ wₖ mₖ`
    ///
    /// # Errors
    /// If libtorch fails; as all of these.
    pub fn mean(&self) -> Result<Tensor> {
        self.whole(&self.average(&self.means)?)
    }

    /// Epistemic variance, `Σₖ wₖ (mₖ - E[y])²`: what the samples of the weights disagree about, and more data could
    /// resolve. Of one Gaussian what [`Forecast::around`] was given, else 0.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn epistemic(&self) -> Result<Tensor> {
        let apart = (&self.means - self.average(&self.means)?).f_square()?;
        self.whole(&self.average(&(apart + &self.uncertain))?)
    }

    /// Variance of the noise (aleatoric), `Σₖ wₖ vₖ`, which more data do not take away. Of one Gaussian all of its
    /// variance, but for what [`Forecast::around`] was told is epistemic.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn noise(&self) -> Result<Tensor> {
        self.whole(&self.average(&self.noise)?)
    }

    /// Var\[y\], which is [`epistemic`](Self::epistemic) + [`noise`](Self::noise).
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn variance(&self) -> Result<Tensor> {
        Ok(self.epistemic()? + self.noise()?)
    }

    /// The Gaussian with this [`mean`](Self::mean) and [`variance`](Self::variance): what many papers report, and what
    /// quantiles and scores in closed form are of.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn moment_matched(&self) -> Result<Forecast> {
        Forecast::around(&self.mean()?, &self.epistemic()?, &self.noise()?)
    }

    /// Undoes a normalization of y: the prediction of `mean + sd·y`, for a model that was trained on targets less their
    /// `mean`, divided by their `sd`.
    ///
    /// Scores of it are in the unit of the data. RMSE, CRPS, widths and interval scores of normalized targets are sd
    /// times as large there, and a mean NLL is larger by ln sd; coverage and PIT stay.
    ///
    /// # Errors
    /// [`Error::Metric`] unless `mean` is finite and `sd` finite and positive.
    pub fn denormalize(&self, mean: f64, sd: f64) -> Result<Forecast> {
        if !mean.is_finite() {
            return Err(Error::Metric(format!("mean = {mean}: expected a finite number")));
        }
        if !(sd.is_finite() && sd > 0.0) {
            return Err(Error::Metric(format!("sd = {sd}: expected a finite number > 0")));
        }
        let [variances, noise, uncertain] = [&self.variances, &self.noise, &self.uncertain].map(|v| v * (sd * sd));
        let (weights, shape) = (self.weights.copy(), self.shape.clone());
        Ok(Forecast { weights, means: &self.means * sd + mean, variances, noise, uncertain, shape })
    }

    /// P(y' ≤ y) of this prediction for the y that was seen, in its shape: the probability integral transform, uniform
    /// on (0, 1) if the predictions are right ([`ks_uniform`](crate::metrics::ks_uniform)). A sample that is exactly y
    /// counts ½.
    ///
    /// # Errors
    /// [`Error::Metric`] for y of another shape or not finite.
    pub fn pit(&self, y: &Tensor) -> Result<Tensor> {
        let y = self.read(y)?;
        self.whole(&self.cdf(&y)?)
    }

    /// The number that y is below with probability `p` in (0, 1). Of one Gaussian m + √v Φ⁻¹(p); of a mixture between
    /// the extremes of that over its components, where the CDF is bisected until no number is between.
    ///
    /// # Errors
    /// [`Error::Metric`] for other p.
    pub fn quantile(&self, p: f64) -> Result<Tensor> {
        let z = Tensor::from(open_unit("p", p)?).f_special_ndtri()?.f_double_value(&[])?;
        let ends = &self.means + self.variances.f_sqrt()? * z;
        if self.components() == 1 {
            return self.whole(&ends);
        }
        // A component of weight 0 only makes the bracket wider.
        let (mut low, mut high) = (ends.f_min_dim(0, false)?.0, ends.f_max_dim(0, false)?.0);
        loop {
            // Halves first: a sum may be beyond the largest number.
            let middle = &low * 0.5 + &high * 0.5;
            let between = middle.f_gt_tensor(&low)?.f_logical_and(&middle.f_lt_tensor(&high)?)?;
            if !bool::try_from(between.f_any()?)? {
                break;
            }
            let below = self.cdf(&middle)?.f_lt(p)?;
            low = middle.f_where_self(&below, &low)?;
            high = high.f_where_self(&below, &middle)?;
        }
        self.whole(&((low + high) * 0.5))
    }

    /// The central interval of a level in (0, 1), between the (1-level)/2 and (1+level)/2 [quantiles](Self::quantile).
    /// That of a Gaussian with the same moments is `f.moment_matched()?.interval(level)`.
    ///
    /// # Errors
    /// [`Error::Metric`] for other levels.
    pub fn interval(&self, level: f64) -> Result<Interval> {
        let level = open_unit("level", level)?;
        let tail = 0.5 * (1.0 - level);
        Interval::new(&self.quantile(tail)?, &self.quantile(1.0 - tail)?, level)
    }

    /// `Σₖ wₖ Φ((x - mₖ)/√vₖ)` for x `[N]`.
    fn cdf(&self, x: &Tensor) -> Result<Tensor> {
        self.average(&((x - &self.means) / deviation(&self.variances)?).f_special_ndtr()?)
    }

    /// `Σₖ wₖ tₖ` of `[K, N]`
    pub(super) fn average(&self, t: &Tensor) -> Result<Tensor> {
        Ok((t * self.weights.f_unsqueeze(1)?).f_sum_dim_intlist(0, false, Kind::Double)?)
    }

    /// y `[N]`
    pub(super) fn read(&self, y: &Tensor) -> Result<Tensor> {
        let y = finite("y", y)?;
        same_shape("y", &y, "the forecast", &self.shape)?;
        Ok(y.f_reshape([-1])?)
    }

    fn whole(&self, t: &Tensor) -> Result<Tensor> {
        Ok(t.f_reshape(&self.shape)?)
    }
}

/// √v, and where that is 0 a number so small that only 0 divided by it is not infinite.
pub(super) fn deviation(v: &Tensor) -> Result<Tensor> {
    Ok(v.f_sqrt()?.f_clamp_min(f64::MIN_POSITIVE)?)
}

fn non_negative(x: f64) -> bool {
    x.is_finite() && x >= 0.0
}
