//! Intervals for numbers.

use super::threshold::threshold;
use crate::Result;
use crate::metrics::Interval;
use crate::metrics::inputs::{finite, open_unit, same_shape};
use tch::Tensor;

/// Conformalized quantile regression (Romano et al. 2019): intervals that are moved outwards, or inwards, until they
/// hold 1-α of what is calibrated with.
///
/// ```text
/// s = max(lower - y, y - upper),      [lower - q, upper + q]
/// ```
///
/// They may be any: those of a [`Forecast`](crate::metrics::Forecast), quantiles that a network was trained to give, or
/// a mean as both ends, which makes s the absolute error and every interval as wide as the others.
///
/// ```
/// # use tch::Tensor;
/// use tch_blr::{conformal::Cqr, metrics::Forecast};
/// # fn main() -> tch_blr::Result<()> {
/// # let x = Tensor::linspace(-2.0, 2.0, 40, (tch::Kind::Double, tch::Device::Cpu));
/// # let f = Forecast::gaussian(&x.zeros_like(), &x.ones_like())?;
/// # let (calibration, test, y) = (&f, &f, &x);
/// let cqr = Cqr::calibrate(&calibration.interval(0.9)?, y, 0.1)?;
/// let interval = cqr.interval(&test.interval(0.9)?)?;
/// # assert!(interval.coverage(&x)? >= 0.9);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cqr {
    q: f64,
    alpha: f64,
}

impl Cqr {
    /// Finds q from intervals for examples that the training has not seen, and their y in the same shape.
    ///
    /// # Errors
    /// See the [module](crate::conformal#errors); y of another shape, ends or y that are not finite.
    pub fn calibrate(interval: &Interval, y: &Tensor, alpha: f64) -> Result<Cqr> {
        let (lower, upper, y) =
            (finite("lower", interval.lower())?, finite("upper", interval.upper())?, finite("y", y)?);
        same_shape("y", &y, "the intervals", &lower.size())?;
        let scores = (lower - &y).f_maximum(&(y - upper))?.f_reshape([-1])?;
        Ok(Cqr { q: threshold(&scores, alpha)?, alpha: open_unit("alpha", alpha)? })
    }

    /// q: how far the ends move outwards; negative if inwards, ∞ where there were too few examples for α.
    pub fn threshold(&self) -> f64 {
        self.q
    }

    /// `[lower - q, upper + q]` for new examples, with the level 1-α. Where q < 0 moves the lower end above the upper
    /// one, the interval is empty.
    ///
    /// # Errors
    /// Ends that are not finite.
    pub fn interval(&self, interval: &Interval) -> Result<Interval> {
        let (lower, upper) = (finite("lower", interval.lower())?, finite("upper", interval.upper())?);
        Interval::new(&(lower - self.q), &(upper + self.q), 1.0 - self.alpha)
    }
}
