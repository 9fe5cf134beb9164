//! Stochastic gradient descent: Gaussian with fixed covariance, delta method.

use super::common::{config, fields};
use crate::driver::{DeltaRule, NoPosterior, Row, Rule, Site, Start, Weights, When};
use crate::{Real, Result, check};

config! {
    /// Stochastic gradient descent with momentum, as in PyTorch and tch.
    ///
    /// Row of the table: Gaussian with fixed covariance S = 1, delta method, stochastic approximation.
    ///
    /// ```text
    /// u = ĝ + δ(m - m₀)
    /// b ← μ b + (1-d) u                  d = 0 in the first step and without momentum
    /// m ← m - α b                        Nesterov: m ← m - α (u + μ b)
    /// ```
    ///
    /// Its covariance is fixed by assumption, not learned, so there is no posterior.
    ///
    /// Source: Khan and Rue, *The Bayesian Learning Rule* (2023), section 4.1; semantics of `torch.optim.SGD`.
    pub struct Sgd {
        /// Momentum μ in [0, 1); default 0.
        momentum: f64 = 0.0;
        /// Dampening d in [0, 1]; default 0.
        dampening: f64 = 0.0;
        /// Nesterov momentum; needs momentum > 0 and no dampening. Default off.
        nesterov: bool = false;
        /// δ ≥ 0, the L2 term δm added to the gradient; default 0.
        weight_decay: f64 = 0.0;
        /// Effective sample size λ > 0; only needed for a prior built from a posterior. Default: none.
        ess: Option<f64> = None, via f64;
    }
}

impl Row for Sgd {
    const NAME: &'static str = "sgd";
    const STATE: &'static [&'static str] = &["momentum"];
    type Arithmetic = Weights;
    type Posterior = NoPosterior;
    fields!(weight_decay ess);

    fn validate(&self) -> Result<()> {
        check::rate("momentum", self.momentum)?;
        check::that("dampening", self.dampening, (0.0..=1.0).contains(&self.dampening), "a number in [0, 1]")?;
        let possible = !self.nesterov || (self.momentum > 0.0 && self.dampening == 0.0);
        check::that("nesterov", self.nesterov, possible, "momentum > 0 and dampening = 0 with it")?;
        check::non_negative("weight_decay", self.weight_decay)?;
        self.ess.map_or(Ok(()), |ess| check::positive("ess", ess))
    }
}

impl Rule for Sgd {
    type State<T: Real> = [T; 1];
    type Coefficients<T: Real> = [T; 3];

    fn initial(&self, _: Start) -> [f64; 1] {
        [0.0]
    }
    fn keeps(&self, _: usize) -> bool {
        self.momentum > 0.0
    }
    fn coefficients(&self, when: When) -> [f64; 3] {
        // As in torch, which starts the buffer with the gradient itself, undampened.
        let fresh = if when.t <= 1 || self.momentum == 0.0 { 1.0 } else { 1.0 - self.dampening };
        [when.lr, self.momentum, fresh]
    }
    #[inline(always)]
    fn update<T: Real>(&self, [lr, mu, fresh]: [T; 3], x: Site<T>, [b]: [T; 1]) -> (T, [T; 1]) {
        let u = x.gradient + x.delta * (x.mean - x.prior_mean);
        let b = mu * b + fresh * u;
        let v = if self.nesterov { u + mu * b } else { b };
        (x.mean - lr * v, [b])
    }
}

impl DeltaRule for Sgd {}

#[cfg(test)]
mod tests {
    use super::*;

    /// Second step with α = 0.1, μ = 0.9: u = 1 + 0.1·(2-1) = 1.1, b = 0.9·3 + (1-d)·1.1.
    fn second(rule: Sgd) -> (f64, [f64; 1]) {
        let site = Site { mean: 2.0, gradient: 1.0, curvature: 0.0, prior_mean: 1.0, delta: 0.1 };
        rule.update(rule.coefficients(When { t: 2, lr: 0.1 }), site, [3.0])
    }

    #[test]
    fn one_step_by_hand() {
        let rule = Sgd::default().momentum(0.9);
        for (rule, mean, b) in
            [(rule.dampening(0.5), 2.0 - 0.1 * 3.25, 3.25), (rule.nesterov(true), 2.0 - 0.1 * (1.1 + 0.9 * 3.8), 3.8)]
        {
            let (m, [buffer]) = second(rule);
            assert!((m - mean).abs() < 1e-15 && (buffer - b).abs() < 1e-15, "{m} {buffer}");
        }
    }

    #[test]
    fn dampening_starts_in_the_second_step() {
        let rule = Sgd::default().momentum(0.9).dampening(0.5);
        let fresh = |t| rule.coefficients(When { t, lr: 0.1 })[2];
        assert_eq!([1, 2, 3].map(fresh), [1.0, 0.5, 0.5]);
    }

    #[test]
    fn defaults_are_those_of_torch() {
        let plain = Sgd { momentum: 0.0, dampening: 0.0, nesterov: false, weight_decay: 0.0, ess: None };
        assert_eq!(Sgd::default(), plain);
    }
}
