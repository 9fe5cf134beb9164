//! A start that needs no search: what `Ivon::auto`, `Von::auto`, `BayesianSam::auto` and `Evon::auto` share.
//!
//! `docs/tuning.md` has the derivation, what else was tried, and the figures.

use crate::driver::{Site, Start};
use crate::{Real, Result, Schedule, check};
use tch::Tensor;

/// How long a step of the mean is. The rule leaves that free: any positive factor per weight on the natural gradient
/// has the same fixed points, and touches neither precision nor noise.
///
/// ```text
/// m ← m - α (b̂ + δ(m-m₀)) / d          b̂ the average of gradients
/// ```
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum StepLength {
    /// d = h+δ (and γ), the natural gradient with one learning rate, as the papers have it. The default.
    Newton,
    /// d = √(v̂ + δ/λ), with v ← βv + (1-β)(ĝ + δ(m-m₀))² and v̂ = v/(1-βᵗ): α is the length of a weight's typical
    /// step, as in Adam, whatever the scale of loss and precision.
    ///
    /// δ/λ is the mean square of the prior's pull δ(m-m₀) over the prior. Without it, a weight that no example speaks
    /// about would go to m₀ at full speed.
    Adam {
        /// β in [0, 1)
        beta: f64,
    },
}

/// β, 1-β, 1/(1-βᵗ), and the smallest divisor.
pub(super) type Divisor<T> = [T; 4];

impl StepLength {
    /// Whether v is kept.
    pub(super) fn has_squares(self) -> bool {
        self != StepLength::Newton
    }
    pub(super) fn coefficients(self, t: u64) -> Divisor<f64> {
        match self {
            StepLength::Newton => [0.0; 4],
            // Weights without gradient and prior have 0/0; and gradients below 1e-19, whose squares vanish in f32, must
            // not become steps.
            StepLength::Adam { beta } => [beta, 1.0 - beta, 1.0 / (1.0 - beta.powf(t as f64)), 1e-15],
        }
    }
    /// d and the new v, from λ and δ as they are in the step, and the precision h+δ (and γ) that Newton's divides by.
    #[inline(always)]
    pub(super) fn divisor<T: Real>(
        self,
        [beta, fresh, debias, least]: Divisor<T>,
        x: Site<T>,
        (lambda, delta, precision): (T, T, T),
        v: T,
    ) -> (T, T) {
        match self {
            StepLength::Newton => (precision, v),
            StepLength::Adam { .. } => {
                let g = x.gradient + delta * (x.mean - x.prior_mean);
                let v = beta * v + fresh * g * g;
                ((debias * v + delta / lambda).sqrt().max(least), v)
            }
        }
    }

    /// As [`StepLength::divisor`] for a whole block, whose u = ĝ + δ(m-m₀) and δ/λ are given: d, and the new v.
    pub(super) fn divisor_of_block(self, t: u64, u: &Tensor, delta: &Tensor, v: &Tensor) -> (Tensor, Tensor) {
        let [beta, fresh, debias, least] = self.coefficients(t);
        let v = v * beta + u.square() * fresh;
        ((&v * debias + delta).sqrt().clamp_min(least), v)
    }
}

/// Errors if a factor by which a precision may grow is no growth.
pub(super) fn check_growth(factor: f64) -> Result<()> {
    check::that("max_growth", factor, factor.is_finite() && factor > 1.0, "a number > 1")
}

/// h₀: as given, or the one whose noise 1/√(λh₀) is `relative` times the root mean square of the parameter's weights.
pub(super) fn hess_init(given: f64, relative: Option<f64>, start: Start, lambda: f64) -> f64 {
    match relative {
        Some(r) => 1.0 / (lambda * (r * start.rms.max(SMALLEST_SCALE)).powi(2)),
        // q starts with the precision of the prior.
        None if start.posterior_prior => 0.0,
        None => given,
    }
}

/// What counts as the scale of weights that start at zero: biases, the second factor of an adapter.
const SMALLEST_SCALE: f64 = 0.01;
/// σ₀ over the weights' own scale.
pub(super) const RELATIVE_NOISE: f64 = 0.03;
/// β of the squared gradients: with Adam's 0.999 a run of some hundred steps is over before it has seen a change.
pub(super) const STEP_LENGTH: StepLength = StepLength::Adam { beta: 0.99 };

/// β₂ of a run over this many steps: at its end e⁻¹ of h₀ is left, and the rest was learned.
pub(super) fn beta2(steps: u64) -> f64 {
    (1.0 - 1.0 / steps as f64).max(0.0)
}

/// A tenth of the steps to warm up, then a cosine to 0.
pub(super) fn schedule(steps: u64) -> Schedule {
    Schedule::Cosine { warmup: steps / 10, total: steps, end: 0.0 }
}

/// The settings of `auto` that rows with `relative_noise` and `step_length` share. A macro, because they are fields of
/// several types.
macro_rules! settings {
    ($row:expr, $ess:expr, $steps:expr) => {
        $row.ess($ess)
            .weight_decay(1.0 / $ess)
            .relative_noise($crate::rows::auto::RELATIVE_NOISE)
            .beta2($crate::rows::auto::beta2($steps))
            .step_length($crate::rows::auto::STEP_LENGTH)
    };
}
pub(super) use settings;

/// Errors if one of the settings that they share is out of range.
pub(super) fn validate(relative_noise: Option<f64>, step_length: StepLength) -> Result<()> {
    relative_noise.map_or(Ok(()), |r| check::positive("relative_noise", r))?;
    match step_length {
        StepLength::Newton => Ok(()),
        StepLength::Adam { beta } => check::rate("step_length beta", beta),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// v ← ¾·2 + ¼·(3 + ½(5-1))² = 1.5 + 6.25; t = 1, so v̂ = 4v; d² = 31 + ½/2.
    #[test]
    fn a_divisor_by_hand() {
        let adam = StepLength::Adam { beta: 0.75 };
        let site = Site { mean: 5.0, gradient: 3.0, curvature: 0.0, prior_mean: 1.0, delta: 0.5 };
        let (d, v) = adam.divisor(adam.coefficients(1), site, (2.0, 0.5, 99.0), 2.0);
        assert!((v, (d * d - 31.25_f64).abs() < 1e-14) == (7.75, true), "{d} {v}");
        let newton = StepLength::Newton;
        assert_eq!(newton.divisor(newton.coefficients(1), site, (2.0, 0.5, 99.0), 2.0), (99.0, 2.0));
    }

    /// Neither gradient nor prior: the step is 0/d with a d that is not zero.
    #[test]
    fn nothing_to_go_by_is_no_step() {
        let adam = STEP_LENGTH;
        let site = Site { mean: 5.0_f32, gradient: 0.0, curvature: 0.0, prior_mean: 0.0, delta: 0.0 };
        let k = adam.coefficients(1).map(|x| x as f32);
        assert_eq!(0.0 / adam.divisor(k, site, (100.0, 0.0, 1.0), 0.0).0, 0.0);
    }

    #[test]
    fn noise_is_relative_to_the_weights() {
        let start = |rms| Start { posterior_prior: false, rms };
        // 1/(100·(0.1·2)²)
        assert!((hess_init(7.0, Some(0.1), start(2.0), 100.0) - 0.25).abs() < 1e-15);
        // Weights that start at zero count as 0.01.
        assert!((hess_init(7.0, Some(0.1), start(0.0), 100.0) / 1e4 - 1.0).abs() < 1e-12);
        assert_eq!(hess_init(7.0, None, start(2.0), 100.0), 7.0);
        // A posterior as prior is a start by itself, but no scale of the weights.
        let posterior = Start { posterior_prior: true, rms: 2.0 };
        assert_eq!(hess_init(7.0, None, posterior, 100.0), 0.0);
        assert!((hess_init(7.0, Some(0.1), posterior, 100.0) - 0.25).abs() < 1e-15);
    }
}
