//! Temperature scaling: one number that makes confidences honest, found on validation data.

use super::NLL_CLAMP;
use super::inputs::{Probabilities, check, classes, finite, numbers};
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// A temperature T by which logits are divided before the softmax: `p = softmax(z / T)` (Guo et al. 2017, *On
/// Calibration of Modern Neural Networks*). T > 1 takes confidence away, T < 1 adds some; the predicted class stays.
///
/// ```
/// # use tch::{Kind, Tensor};
/// use tch_blr::metrics::Temperature;
/// # fn main() -> tch_blr::Result<()> {
/// # let validation = Tensor::from_slice(&[2.0, 0.0, 0.0, 1.0, 0.5, 0.0]).view([3, 2]);
/// # let (labels, test) = (Tensor::from_slice(&[0_i64, 1, 1]), validation.shallow_clone());
/// let t = Temperature::fit(&validation, &labels)?; // logits [N, C] of validation data, labels [N]
/// let probs = t.apply(&test)?;
/// # assert!(!t.at_bound() && probs.size() == [3, 2]);
/// # Ok(())
/// # }
/// ```
///
/// Averages over the samples of a posterior have no logits; theirs are ln p̄, for [`Temperature::fit_averaged`] and
/// [`Temperature::apply_averaged`]: p̄(c)^(1/T), divided by its sum.
///
/// This T is of the prediction. That of the weights' noise is found by
/// [`DiagonalGaussian::fit_temperature`](crate::DiagonalGaussian::fit_temperature).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    t: f64,
}

impl Temperature {
    /// T is looked for from here …
    pub const LOWEST: f64 = 1e-3;
    /// … to here.
    pub const HIGHEST: f64 = 1e3;

    /// A known temperature.
    ///
    /// # Errors
    /// [`Error::Metric`] unless it is in [[`LOWEST`](Self::LOWEST), [`HIGHEST`](Self::HIGHEST)].
    pub fn new(t: f64) -> Result<Self> {
        if (Self::LOWEST..=Self::HIGHEST).contains(&t) {
            return Ok(Temperature { t });
        }
        Err(Error::Metric(format!("t = {t}: expected a temperature from {} to {}", Self::LOWEST, Self::HIGHEST)))
    }

    /// The T with the lowest NLL of `softmax(logits / T)`, `[N, C]`, at the labels, `[N]`: to about 10⁻¹⁴ of it.
    ///
    /// The NLL is convex in 1/T, with the derivative `(1/N) Σₙ (E_pₙ[zₙ] - zₙ(yₙ))`, so the minimum is found by
    /// Newton's method between two bounds that close in. There is none where every label has the largest logit, which
    /// makes any smaller T better, or where the logits are no better than chance, which makes any larger T better: then
    /// T is [`LOWEST`](Self::LOWEST) or [`HIGHEST`](Self::HIGHEST), and [`at_bound`](Self::at_bound). It is 1 where no
    /// T makes a difference: all logits of an example equal, or one class only. A logit may be -∞, which excludes a
    /// class.
    ///
    /// # Errors
    /// [`Error::Metric`] for other shapes or kinds, no examples, a label that is not a class or is excluded, a logit
    /// that is NaN or +∞.
    pub fn fit(logits: &Tensor, labels: &Tensor) -> Result<Self> {
        let z = read(logits)?;
        let [n, c] = [0, 1].map(|d| z.size()[d]);
        let labels = classes("logits", labels, n as usize, c as usize)?;
        let y = Tensor::from_slice(&labels.iter().map(|y| *y as i64).collect::<Vec<_>>()).f_unsqueeze(1)?;
        let at_label = z.f_gather(1, &y, false)?.f_squeeze_dim(1)?;
        if let Some(bad) = Vec::<f64>::try_from(&at_label)?.iter().position(|z| z.is_infinite()) {
            let class = labels[bad];
            return Err(Error::Metric(format!(
                "labels[{bad}] = {class}, whose logit is -inf: expected a class that some temperature allows"
            )));
        }
        Self::minimum(&z, &at_label)
    }

    /// The same for averaged probabilities `[N, C]`, whose logits are ln p̄. Probabilities below
    /// [`NLL_CLAMP`](crate::metrics::NLL_CLAMP) count as that.
    ///
    /// # Errors
    /// See the [module](crate::metrics#errors).
    pub fn fit_averaged(probs: &Tensor, labels: &Tensor) -> Result<Self> {
        check(probs, labels)?;
        Self::fit(&log(probs)?, labels)
    }

    /// T
    pub fn value(&self) -> f64 {
        self.t
    }

    /// Whether the fit ended at a bound: every label had the largest logit ([`LOWEST`](Self::LOWEST)), or the logits
    /// were no better than chance ([`HIGHEST`](Self::HIGHEST)). More validation data, or other logits, are needed then.
    pub fn at_bound(&self) -> bool {
        self.t <= Self::LOWEST || self.t >= Self::HIGHEST
    }

    /// `softmax(logits / T)`, `[N, C]`, in f64 on the CPU, without a graph.
    ///
    /// # Errors
    /// As [`fit`](Self::fit), but for the labels.
    pub fn apply(&self, logits: &Tensor) -> Result<Tensor> {
        // Relative to the largest, so that a small T does not lead beyond the range of f64.
        Ok((centred(&read(logits)?)? / self.t).f_softmax(1, Kind::Double)?)
    }

    /// p̄(c)^(1/T) / Σ p̄^(1/T) for averaged probabilities `[N, C]`, in f64 on the CPU.
    ///
    /// # Errors
    /// See the [module](crate::metrics#errors).
    pub fn apply_averaged(&self, probs: &Tensor) -> Result<Tensor> {
        Probabilities::read(probs)?;
        self.apply(&log(probs)?)
    }

    /// By b = 1/T.
    fn minimum(z: &Tensor, at_label: &Tensor) -> Result<Self> {
        let label = at_label - z.f_max_dim(1, false)?.0;
        // Excluded classes have p = 0 at every T of the range, and p z must not become 0·∞.
        let z = centred(z)?.f_clamp_min(-1e9)?;
        let slopes = |b: f64| -> Result<(f64, f64)> {
            let p = (&z * b).f_softmax(1, Kind::Double)?;
            let mean = (&p * &z).f_sum_dim_intlist(1, true, Kind::Double)?;
            let variance = (p * (&z - &mean).f_square()?).f_sum_dim_intlist(1, false, Kind::Double)?;
            let first = (mean.f_squeeze_dim(1)? - &label).f_mean(Kind::Double)?;
            Ok((first.f_double_value(&[])?, variance.f_mean(Kind::Double)?.f_double_value(&[])?))
        };
        let (mut low, mut high) = (1.0 / Self::HIGHEST, 1.0 / Self::LOWEST);
        let (at_low, at_high) = (slopes(low)?, slopes(high)?);
        // Nothing moves even where predictions are the least sure.
        if at_low == (0.0, 0.0) {
            return Ok(Temperature { t: 1.0 });
        }
        if at_low.0 >= 0.0 {
            return Ok(Temperature { t: Self::HIGHEST });
        }
        if at_high.0 <= 0.0 {
            return Ok(Temperature { t: Self::LOWEST });
        }
        let mut b: f64 = 1.0;
        for _ in 0..200 {
            let (first, second) = slopes(b)?;
            if first > 0.0 {
                high = b;
            } else {
                low = b;
            }
            let newton = b - first / second;
            // A NaN of a flat place is no step. The ends belong to the bracket: at the minimum the step is too small to
            // leave one. In the logarithm, as the bounds are 10⁶ apart.
            let next = if (low..=high).contains(&newton) { newton } else { (low * high).sqrt() };
            let done = (next - b).abs() <= 1e-15 * b || first == 0.0;
            b = next;
            if done {
                break;
            }
        }
        Ok(Temperature { t: 1.0 / b })
    }
}

/// Logits `[N, C]` in f64, each a number or -∞.
fn read(logits: &Tensor) -> Result<Tensor> {
    let z = numbers("logits", logits, "a number, or -inf for a class that is excluded", |z| z < f64::INFINITY)?;
    if z.dim() != 2 {
        return Err(Error::Metric(format!("logits has shape {:?}: expected [N, C]", z.size())));
    }
    let largest: Vec<f64> = Vec::try_from(z.f_max_dim(1, false)?.0)?;
    match largest.iter().position(|z| *z == f64::NEG_INFINITY) {
        Some(n) => Err(Error::Metric(format!("logits[{n}] excludes every class: expected one that is not -inf"))),
        None => Ok(z),
    }
}

/// Less the largest of each row, which changes no softmax.
fn centred(z: &Tensor) -> Result<Tensor> {
    Ok(z - z.f_max_dim(1, true)?.0)
}

/// ln p̄ in f64. By the module's tolerance a probability may lie a little below zero.
fn log(probs: &Tensor) -> Result<Tensor> {
    Ok(finite("probs", probs)?.f_clamp_min(NLL_CLAMP)?.f_log()?)
}
