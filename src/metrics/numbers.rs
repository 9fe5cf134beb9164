//! Scores of predicted numbers.

use super::Forecast;
use super::forecast::deviation;
use super::inputs::{finite, mean, same_shape, scores};
use crate::{Error, Result};
use std::f64::consts::{SQRT_2, TAU};
use tch::{Kind, Tensor};

/// The smallest variance that [`Forecast::nll`] distinguishes from zero.
///
/// Predictions that are sure of a number and wrong then cost much, and those that are right gain little more than
/// 12.9 nats, not infinity.
pub const VARIANCE_FLOOR: f64 = 1e-12;

impl Forecast {
    /// Negative log-likelihood in nats per element, with variances of at least [`VARIANCE_FLOOR`]:
    ///
    /// ```text
    /// - (1/N) Σₙ ln Σₖ wₖ N(yₙ | mₖₙ, vₖₙ)          one Gaussian: ½ ln 2πv + (y-m)²/2v
    /// ```
    ///
    /// That of the Gaussian with the same moments is `f.moment_matched()?.nll(&y)`.
    ///
    /// # Errors
    /// [`Error::Metric`] for y of another shape or not finite; several components without any variance, as
    /// [samples](Forecast::samples) are, which have no density.
    pub fn nll(&self, y: &Tensor) -> Result<f64> {
        if self.components() > 1 && self.variances.f_max()?.f_double_value(&[])? == 0.0 {
            let problem = "samples without noise have no density: take crps(..), or moment_matched()?.nll(..)";
            return Err(Error::Metric(problem.to_owned()));
        }
        let v = self.variances.f_clamp_min(VARIANCE_FLOOR)?;
        let squares = (self.read(y)? - &self.means).f_square()? / &v;
        let log_density = (squares + (v * TAU).f_log()?) * -0.5 + self.weights.f_log()?.f_unsqueeze(1)?;
        Ok(-mean(&log_density.f_logsumexp(0, false)?)?)
    }

    /// Continuous ranked probability score in the unit of y, a mean over the elements: ∫ (P(y' ≤ x) - 𝟙[y ≤ x])² dx,
    /// which is
    ///
    /// ```text
    /// Σₖ wₖ A(y - mₖ, vₖ) - ½ Σⱼₖ wⱼ wₖ A(mⱼ - mₖ, vⱼ + vₖ)        A(d, v) = E|x| of x ~ N(d, v)
    /// ```
    ///
    /// (Gneiting and Raftery 2007; Grimit et al. 2006 for mixtures). For one Gaussian it is s(z(2Φ(z)-1) + 2φ(z) -
    /// 1/√π) with z = (y-m)/s; for [samples](Forecast::samples) mean |x-y| less half the mean |x-x'| over all pairs;
    /// for a sure prediction the absolute error. Lower is better.
    ///
    /// N K²/2 terms: some two seconds for 1000 samples of the weights and 100 numbers.
    ///
    /// # Errors
    /// [`Error::Metric`] for y of another shape or not finite.
    pub fn crps(&self, y: &Tensor) -> Result<f64> {
        let (apart, alone) = self.spread()?;
        mean(&(self.misses(y)? - apart - alone * 0.5))
    }

    /// The score that infinitely many components would have, estimated without bias from those K: as
    /// [`crps`](Self::crps), but the second mean is over the K(K-1) pairs of two different ones. K samples of a
    /// posterior are otherwise charged for being few, so that numbers of two K cannot be compared.
    ///
    /// # Errors
    /// As there; one component, components of different weights.
    pub fn crps_fair(&self, y: &Tensor) -> Result<f64> {
        let k = self.components() as f64;
        let (least, largest) = (self.weights.f_min()?, self.weights.f_max()?);
        if k < 2.0 || (largest - least).f_double_value(&[])? > 1e-12 {
            return Err(Error::Metric(format!(
                "the fair CRPS of {k} components: expected at least 2, of the same weight; crps(..) takes any"
            )));
        }
        mean(&(self.misses(y)? - self.spread()?.0 * (k / (k - 1.0))))
    }

    /// `Σₖ wₖ A(y - mₖ, vₖ)`, `[N]`
    fn misses(&self, y: &Tensor) -> Result<Tensor> {
        self.average(&absolute(&(self.read(y)? - &self.means), &self.variances)?)
    }

    /// `Σⱼₖ wⱼ wₖ A(mⱼ - mₖ, vⱼ + vₖ)` `[N]`, of pairs j < k, and of each component with itself.
    fn spread(&self) -> Result<(Tensor, Tensor)> {
        let (w, m, v) = (self.weights.f_unsqueeze(1)?, &self.means, &self.variances);
        let k = self.components() as i64;
        let mut apart = m.f_get(0)?.f_zeros_like()?;
        for j in 0..k - 1 {
            let after = |t: &Tensor| t.f_narrow(0, j + 1, k - j - 1);
            let each = absolute(&(after(m)? - m.f_get(j)?), &(after(v)? + v.f_get(j)?))?;
            apart += (each * after(&w)? * w.f_get(j)?).f_sum_dim_intlist(0, false, Kind::Double)?;
        }
        let alone = absolute(&m.f_zeros_like()?, &(v * 2.0))?;
        Ok((apart, (alone * w.f_square()?).f_sum_dim_intlist(0, false, Kind::Double)?))
    }
}

/// A(d, v) = E|x| of x ~ N(d, v) = 2√v φ(d/√v) + d(2Φ(d/√v)-1)
fn absolute(d: &Tensor, v: &Tensor) -> Result<Tensor> {
    let s = deviation(v)?;
    let z = d / &s;
    // 2Φ(z)-1 as an erf, which has all its digits near 0.
    Ok((z.f_square()? * -0.5).f_exp()? * s * (2.0 / TAU.sqrt()) + d * (z / SQRT_2).f_erf()?)
}

/// √((1/N) Σ (m - y)²) for means and numbers of one shape.
///
/// # Errors
/// [`Error::Metric`] for two shapes, no numbers, or one that is not finite.
pub fn rmse(predicted: &Tensor, y: &Tensor) -> Result<f64> {
    let (predicted, y) = (finite("predicted", predicted)?, finite("y", y)?);
    same_shape("y", &y, "predicted", &predicted.size())?;
    Ok(mean(&(predicted - y).f_square()?)?.sqrt())
}

/// The distance of Kolmogorov and Smirnov between numbers `[N]` in [0, 1] and the uniform distribution,
/// sup |share of numbers ≤ u - u|: for values of [`Forecast::pit`], flattened. Of right predictions it is above
/// 1.36/√N in one of twenty cases, if N is large and the numbers are independent.
///
/// # Errors
/// [`Error::Metric`] if it is not a 1-D floating tensor, is empty or holds a number that is not in [0, 1].
pub fn ks_uniform(values: &Tensor) -> Result<f64> {
    let mut u = scores("values", values)?;
    if let Some(i) = u.iter().position(|u| !(0.0..=1.0).contains(u)) {
        return Err(Error::Metric(format!("values[{i}] = {}: expected a number in [0, 1]", u[i])));
    }
    u.sort_unstable_by(f64::total_cmp);
    let n = u.len() as f64;
    Ok(u.iter().enumerate().map(|(i, u)| (u - i as f64 / n).max((i + 1) as f64 / n - u)).fold(0.0, f64::max))
}
