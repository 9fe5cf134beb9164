//! Intervals for numbers, and whether they hold them.

use super::inputs::{finite, mean, numbers, open_unit, same_shape};
use crate::Result;
use tch::{Kind, Tensor};

/// An interval for every number of a prediction, meant to hold it with the probability `level`. Comes from
/// [`Forecast::interval`](crate::metrics::Forecast::interval) or
/// [`Cqr::interval`](crate::conformal::Cqr::interval), or from the quantiles of anybody's regression.
///
/// Where the lower end is above the upper one, the interval is empty: it holds nothing and its width is 0.
#[derive(Debug)]
pub struct Interval {
    lower: Tensor,
    upper: Tensor,
    level: f64,
}

impl Interval {
    /// Ends of one shape, any floating kind and device; a lower one may be -∞ and an upper one ∞. `level` is in (0, 1).
    ///
    /// # Errors
    /// [`Error::Metric`](crate::Error::Metric) for ends that are NaN, empty or of two shapes, and other levels.
    pub fn new(lower: &Tensor, upper: &Tensor, level: f64) -> Result<Self> {
        let lower = numbers("lower", lower, "a number, or -inf", |x| x < f64::INFINITY)?;
        let upper = numbers("upper", upper, "a number, or inf", |x| x > f64::NEG_INFINITY)?;
        same_shape("upper", &upper, "lower", &lower.size())?;
        Ok(Interval { lower, upper, level: open_unit("level", level)? })
    }

    /// The lower ends, in f64 on the CPU.
    pub fn lower(&self) -> &Tensor {
        &self.lower
    }

    /// The upper ends, in f64 on the CPU.
    pub fn upper(&self) -> &Tensor {
        &self.upper
    }

    /// The probability that is meant.
    pub fn level(&self) -> f64 {
        self.level
    }

    /// Share of the numbers y, in the shape of the ends, that lie inside, ends included: [`level`](Self::level) if the
    /// intervals are right. Its standard error is √(level (1-level) / N).
    ///
    /// # Errors
    /// [`Error::Metric`](crate::Error::Metric) for y of another shape or not finite.
    pub fn coverage(&self, y: &Tensor) -> Result<f64> {
        let y = self.read(y)?;
        mean(&y.f_ge_tensor(&self.lower)?.f_logical_and(&y.f_le_tensor(&self.upper)?)?.f_to_kind(Kind::Double)?)
    }

    /// Mean width: sharpness, which is worth something at the right coverage only. ∞ if an end is.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn width(&self) -> Result<f64> {
        mean(&self.widths()?)
    }

    /// Mean interval score (Winkler 1972; Gneiting and Raftery 2007), with α = 1 - level:
    ///
    /// ```text
    /// (u - l) + (2/α) max(l - y, 0) + (2/α) max(y - u, 0)
    /// ```
    ///
    /// Lower is better. It is lowest, on average, for the α/2 and 1-α/2 quantiles of the truth.
    ///
    /// # Errors
    /// As [`coverage`](Self::coverage).
    pub fn score(&self, y: &Tensor) -> Result<f64> {
        let y = self.read(y)?;
        let missed = (&self.lower - &y).f_clamp_min(0.0)? + (y - &self.upper).f_clamp_min(0.0)?;
        mean(&(self.widths()? + missed * (2.0 / (1.0 - self.level))))
    }

    fn widths(&self) -> Result<Tensor> {
        Ok((&self.upper - &self.lower).f_clamp_min(0.0)?)
    }

    fn read(&self, y: &Tensor) -> Result<Tensor> {
        let y = finite("y", y)?;
        same_shape("y", &y, "the intervals", &self.lower.size())?;
        Ok(y)
    }
}
