//! SAM: sharpness-aware minimization.

use super::common::{config, fields};
use crate::driver::{NoPosterior, Row, Rule, Site, Start, Weights, When};
use crate::{Expectation, Real, Result, check};

config! {
    /// Sharpness-aware minimization over SGD with momentum.
    ///
    /// Row of the table: Gaussian with fixed covariance, stochastic approximation; the expectation of the loss over
    /// that Gaussian is relaxed to its best concave upper bound, which puts a maximum in its place.
    ///
    /// ```text
    /// ĝ₁ = ∇L(m)
    /// ε = ρ ĝ₁/‖ĝ₁‖                      global L2 norm over all trainable parameters; ε = 0 where ĝ₁ = 0
    /// ĝ = ∇L(m+ε)                        on the same batch
    /// u = ĝ + δ(m - m₀)
    /// b ← μ b + u
    /// m ← m - α b
    /// ```
    ///
    /// Two evaluations per step. With [`Optimizer::step_chunks`](crate::Optimizer::step_chunks) each chunk of the batch
    /// has an ε and a ĝ of its own, and the ĝ are averaged (m-sharpness). With ρ = 0 it is [`Sgd`](crate::Sgd). Its
    /// covariance is fixed by assumption, not learned, so there is no posterior; [`BayesianSam`](crate::BayesianSam)
    /// learns one.
    ///
    /// Batch normalization moves its statistics in both evaluations; other normalizations have no such memory.
    ///
    /// Sources: Foret et al., *Sharpness-Aware Minimization for Efficiently Improving Generalization* (ICLR 2021);
    /// Möllenhoff and Khan, *SAM as an Optimal Relaxation of Bayes* (ICLR 2023), for its place in the table.
    pub struct Sam {
        /// Radius ρ ≥ 0 of the perturbation, in units of the weights; default 0.05.
        rho: f64 = 0.05;
        /// Momentum μ in [0, 1); default 0.9.
        momentum: f64 = 0.9;
        /// δ ≥ 0, the L2 term δm added to the gradient at m+ε; default 0.
        weight_decay: f64 = 0.0;
        /// Effective sample size λ > 0; only needed for a prior built from a posterior. Default: none.
        ess: Option<f64> = None, via f64;
    }
}

impl Row for Sam {
    const NAME: &'static str = "sam";
    const STATE: &'static [&'static str] = &["momentum"];
    type Arithmetic = Weights;
    type Posterior = NoPosterior;
    fields!(weight_decay ess);

    fn validate(&self) -> Result<()> {
        check::non_negative("rho", self.rho)?;
        check::rate("momentum", self.momentum)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        self.ess.map_or(Ok(()), |ess| check::positive("ess", ess))
    }
    fn expectation(&self) -> Expectation {
        Expectation::Adversarial { sampled: false }
    }
}

impl Rule for Sam {
    type State<T: Real> = [T; 1];
    type Coefficients<T: Real> = [T; 3];

    fn initial(&self, _: Start) -> [f64; 1] {
        [0.0]
    }
    fn keeps(&self, _: usize) -> bool {
        self.momentum > 0.0
    }
    fn coefficients(&self, when: When) -> [f64; 3] {
        [when.lr, self.momentum, self.rho]
    }
    #[inline(always)]
    fn adversarial<T: Real>(&self, [_, _, rho]: [T; 3], gradient: T, norm: T, _: T, _: [T; 1]) -> T {
        // The quotient first, which is 0 for the infinite norm that stands for a vanishing gradient.
        rho * (gradient / norm)
    }
    #[inline(always)]
    fn update<T: Real>(&self, [lr, mu, _]: [T; 3], x: Site<T>, [b]: [T; 1]) -> (T, [T; 1]) {
        let u = x.gradient + x.delta * (x.mean - x.prior_mean);
        let b = mu * b + u;
        (x.mean - lr * b, [b])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ε = 0.5·3/5; u = 1 + 0.1·(2-1) = 1.1, b = 0.5·3 + 1.1 = 2.6, and half of α = 0.2.
    #[test]
    fn one_step_by_hand() {
        let rule = Sam::default().momentum(0.5).rho(0.5);
        let k = rule.coefficients(When { t: 2, lr: 0.1 });
        assert_eq!(rule.adversarial(k, 3.0, 5.0, 0.1, [3.0]), 0.3);
        let site = Site { mean: 2.0, gradient: 1.0, curvature: 0.0, prior_mean: 1.0, delta: 0.1 };
        let (m, [b]) = rule.update(k, site, [3.0]);
        assert!((m - (2.0 - 0.26)).abs() < 1e-15 && (b - 2.6).abs() < 1e-15, "{m} {b}");
    }

    #[test]
    fn without_a_direction_there_is_no_perturbation() {
        let rule = Sam::default();
        let k = rule.coefficients(When { t: 1, lr: 0.1 });
        assert_eq!(rule.adversarial(k, 0.0, f64::INFINITY, 0.0, [0.0]), 0.0);
    }

    /// ρ is that of Foret et al. (2021); momentum and learning rate are those of the SGD that they start from.
    #[test]
    fn defaults() {
        let sam = Sam { rho: 0.05, momentum: 0.9, weight_decay: 0.0, ess: None };
        assert_eq!(Sam::default(), sam);
    }
}
