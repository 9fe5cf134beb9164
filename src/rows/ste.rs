//! Straight-through estimator: binary weights, delta method.

use super::common::{config, fields};
use crate::driver::{DeltaRule, NoPosterior, Row, Rule, Site, Start, Weights, When};
use crate::{Link, Real, Result, check};

config! {
    /// Straight-through estimator for binary weights.
    ///
    /// Row of the table: Bernoulli; delta method, stochastic approximation. [`BayesBiNN`](crate::BayesBiNN) with its
    /// scale s ≡ 1, without the pull of its prior, and with the gradient at the mode instead of a sample.
    ///
    /// ```text
    /// ĝ = ∇L(sign λ)
    /// b ← μ b + ĝ + δλ
    /// λ ← clip( λ - α b, ±ξ )
    /// ```
    ///
    /// λ are the latent real weights. The variables hold the binary weights sign λ ([`Link::Sign`]); their values when
    /// the optimizer is built are the first λ. A posterior as prior is an error.
    ///
    /// Sources: Khan and Rue, *The Bayesian Learning Rule* (2023), section 4.5; Courbariaux, Bengio and David,
    /// *BinaryConnect* (NeurIPS 2015), for the clipping.
    pub struct Ste {
        /// Momentum μ in [0, 1); default 0.
        momentum: f64 = 0.0;
        /// ξ > 0, possibly infinite: the latent weights stay within ±ξ; default 1.
        clip_radius: f64 = 1.0;
        /// δ ≥ 0, decay of the latent weights; default 0.
        weight_decay: f64 = 0.0;
    }
}

impl Row for Ste {
    const NAME: &'static str = "ste";
    const STATE: &'static [&'static str] = &["momentum"];
    type Arithmetic = Weights;
    type Posterior = NoPosterior;
    fields!(weight_decay);

    fn validate(&self) -> Result<()> {
        check::rate("momentum", self.momentum)?;
        check::that("clip_radius", self.clip_radius, self.clip_radius > 0.0, "a number > 0")?;
        check::non_negative("weight_decay", self.weight_decay)
    }
}

impl Rule for Ste {
    type State<T: Real> = [T; 1];
    type Coefficients<T: Real> = [T; 3];

    fn link(&self) -> Link {
        Link::Sign
    }
    fn initial(&self, _: Start) -> [f64; 1] {
        [0.0]
    }
    fn keeps(&self, _: usize) -> bool {
        self.momentum > 0.0
    }
    fn coefficients(&self, when: When) -> [f64; 3] {
        [when.lr, self.momentum, self.clip_radius]
    }
    #[inline(always)]
    fn update<T: Real>(&self, [lr, mu, xi]: [T; 3], x: Site<T>, [b]: [T; 1]) -> (T, [T; 1]) {
        let b = mu * b + x.gradient + x.delta * x.mean;
        // A latent weight far from zero would need many steps to change its sign.
        ((x.mean - lr * b).min(xi).max(-xi), [b])
    }
}

impl DeltaRule for Ste {}

#[cfg(test)]
mod tests {
    use super::*;

    /// b = ½·1 + 3 + ½·(-0.5) = 3.25
    #[test]
    fn one_step_by_hand() {
        let site = Site { mean: -0.5, gradient: 3.0, curvature: 0.0, prior_mean: 0.0, delta: 0.5 };
        let rule = Ste::default().momentum(0.5);
        for (rule, lr, expected) in [(rule, 0.1, -0.825), (rule.clip_radius(0.75), 0.1, -0.75), (rule, -1.0, 1.0)] {
            let (m, b) = rule.update(rule.coefficients(When { t: 2, lr }), site, [1.0]);
            assert!((m - expected).abs() < 1e-15, "{m}");
            assert_eq!(b, [3.25]);
        }
    }

    #[test]
    fn defaults_are_those_of_binaryconnect() {
        let Ste { momentum, clip_radius, weight_decay, .. } = Ste::default();
        assert_eq!((momentum, clip_radius, weight_decay), (0.0, 1.0, 0.0));
    }
}
