//! A linear support vector machine by its dual: the model whose sensitivities are zero for all but a few examples.

use super::site::number;
use super::{error, home};
use crate::{Result, check};
use tch::{Kind, Tensor};

/// The optimum of hinge losses, with its dual variables.
///
/// ```text
/// P(θ) = Σᵢ max(0, 1 - yᵢφᵢᵀθ) + ½δ‖θ‖²          D(α) = Σᵢ αᵢ - ‖Σᵢ αᵢyᵢφᵢ‖²/(2δ),   0 ≤ αᵢ ≤ 1
/// θ = Σᵢ αᵢyᵢφᵢ/δ                               the support vectors have αᵢ > 0
/// ```
///
/// αᵢ is the example's sensitivity: 0 for those that could leave without any change, 1 for those inside of the margin
/// (labels that the machine does not follow among them), and between for those on it. With C = 1/δ it is the usual
/// machine without an intercept; add a constant feature for one, which is then penalized, too. The dual of smooth
/// losses is [`DualView`](super::DualView).
///
/// ```
/// # use tch::Tensor;
/// # fn main() -> tch_blr::Result<()> {
/// let x = Tensor::from_slice(&[-3.0, -1.0, 1.0, 2.0, 4.0]);
/// let x = Tensor::stack(&[x.ones_like(), x], 1);
/// let y = Tensor::from_slice(&[0.0, 0.0, 1.0, 1.0, 1.0]);
/// let machine = tch_blr::sensitivity::SupportVectors::fit(&x, &y, 0.1, 1e-12, 1000)?;
/// assert_eq!(machine.support()?, [1, 2]);
/// assert!(machine.duality_gap()?.abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SupportVectors {
    features: Tensor,
    /// -1 or 1
    signs: Tensor,
    delta: f64,
    alpha: Tensor,
}

impl SupportVectors {
    /// Fits features `[N, P]` and labels `[N]` (0 or 1) with δ > 0 by coordinate ascent of the dual (Hsieh et al. 2008,
    /// *A Dual Coordinate Descent Method for Large-scale Linear SVM*), until the duality gap is at most `tolerance` > 0
    /// nats, or an error after `rounds` ≥ 1 rounds over the data. The order of the examples is the data's.
    ///
    /// # Errors
    /// Shapes and labels that do not fit, numbers that are not finite, settings out of range, a gap that is too large
    /// in the end.
    pub fn fit(features: &Tensor, labels: &Tensor, delta: f64, tolerance: f64, rounds: usize) -> Result<Self> {
        check::positive("delta", delta)?;
        check::positive("tolerance", tolerance)?;
        check::count("rounds", rounds)?;
        let _no_grad = tch::no_grad_guard();
        let (features, labels) = (home("features", features)?, home("labels", labels)?);
        let &[n, p] = &features.size()[..] else {
            return Err(error(format!("the features are {:?}: expected [N, P], a row per example", features.size())));
        };
        if labels.size() != [n] {
            return Err(error(format!("the labels are {:?}: expected [{n}], one for each row", labels.size())));
        }
        let y = Vec::<f64>::try_from(labels.contiguous())?;
        if let Some(bad) = y.iter().find(|y| **y != 0.0 && **y != 1.0) {
            return Err(error(format!("label {bad}: expected 0 or 1")));
        }
        let rows = Vec::<f64>::try_from(features.f_reshape([-1])?.contiguous())?;
        let row = |i: usize| &rows[i * p as usize..(i + 1) * p as usize];
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let signs: Vec<f64> = y.iter().map(|y| 2.0 * y - 1.0).collect();
        // Plain slices: a tensor operation per coordinate would take longer than its arithmetic.
        let (mut alpha, mut theta) = (vec![0.0f64; y.len()], vec![0.0f64; p as usize]);
        let mut gap = f64::INFINITY;
        for _ in 0..rounds {
            for (i, alpha) in alpha.iter_mut().enumerate() {
                let (x, square) = (row(i), dot(row(i), row(i)));
                // The maximum of D along this coordinate. An example without features has the loss 1 whatever θ is.
                let best = if square > 0.0 { *alpha + (1.0 - signs[i] * dot(x, &theta)) * delta / square } else { 1.0 };
                let best = best.clamp(0.0, 1.0);
                let change = (best - *alpha) * signs[i] / delta;
                *alpha = best;
                theta.iter_mut().zip(x).for_each(|(t, x)| *t += change * x);
            }
            let (signs, alpha) = (Tensor::from_slice(&signs), Tensor::from_slice(&alpha));
            let machine = SupportVectors { features: features.shallow_clone(), signs, delta, alpha };
            // From α alone, so that the rounding that θ has accumulated does not count.
            gap = machine.duality_gap()?;
            if gap <= tolerance {
                return Ok(machine);
            }
        }
        Err(error(format!(
            "after {rounds} rounds the duality gap of the machine is {gap:e}: allow more rounds or a gap above \
             {tolerance:e}"
        )))
    }

    /// α `[N]`, each in \[0, 1\].
    pub fn alpha(&self) -> &Tensor {
        &self.alpha
    }

    /// θ `[P]`
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn weights(&self) -> Result<Tensor> {
        Ok(self.features.f_tr()?.f_mv(&(&self.alpha * &self.signs))? / self.delta)
    }

    /// Positions of the examples with α > 0, in order.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn support(&self) -> Result<Vec<i64>> {
        Ok(Vec::try_from(self.alpha.f_gt(0.0)?.f_nonzero()?.f_reshape([-1])?)?)
    }

    /// P(θ) - D(α) ≥ 0 up to rounding, in nats: how far both are from the optimum at most.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn duality_gap(&self) -> Result<f64> {
        let theta = self.weights()?;
        let margins: Tensor = 1.0 - &self.signs * self.features.f_mv(&theta)?;
        let hinge = margins.f_clamp_min(0.0)?.f_sum(None::<Kind>)?.double_value(&[]);
        // ‖Σαyφ‖²/(2δ) = ½δ‖θ‖²
        Ok(hinge + self.delta * number(&theta.f_square()?)? - number(&self.alpha)?)
    }
}
