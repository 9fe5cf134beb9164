//! RMSprop: diagonal Gaussian, delta method, squared gradients for the Hessian, square-root scaling.

use super::common::{config, fields};
use crate::driver::{DeltaRule, Row, Rule, Site, Start, Weights, When};
use crate::{DiagonalGaussian, Real, Result, check};

config! {
    /// RMSprop, as in PyTorch and tch.
    ///
    /// Row of the table: Gaussian with diagonal covariance; delta method, stochastic approximation, Hessian by the
    /// squared mini-batch gradient, square-root scaling, slow-moving scale vectors.
    ///
    /// ```text
    /// u = ĝ + δ(m - m₀)
    /// v ← a v + (1-a) u²
    /// ḡ ← a ḡ + (1-a) u                  centred only
    /// b ← μ b + u / (√(v - ḡ²) + ε)      ḡ = 0 unless centred
    /// m ← m - α b
    /// ```
    ///
    /// The posterior precision ess·(√v + δ) is a heuristic: √v has the units of a curvature only up to the scale of the
    /// gradient noise. It needs [`RmsProp::ess`].
    ///
    /// Sources: Khan and Rue, *The Bayesian Learning Rule* (2023), section 4.2; semantics of `torch.optim.RMSprop`.
    pub struct RmsProp {
        /// Decay a of the squared gradients, in [0, 1); default 0.99.
        alpha: f64 = 0.99;
        /// ε > 0 beside the square root; default 1e-8.
        eps: f64 = 1e-8;
        /// Momentum μ in [0, 1); default 0.
        momentum: f64 = 0.0;
        /// Subtract the squared mean gradient: an estimate of the variance instead of the second moment. Default
        /// off.
        centered: bool = false;
        /// δ ≥ 0, the L2 term δm added to the gradient; default 0.
        weight_decay: f64 = 0.0;
        /// Effective sample size λ > 0; only needed for a posterior, or for a prior built from one. Default: none.
        ess: Option<f64> = None, via f64;
    }
}

impl Row for RmsProp {
    const NAME: &'static str = "rmsprop";
    const STATE: &'static [&'static str] = &["momentum", "square", "mean_gradient"];
    type Arithmetic = Weights;
    type Posterior = DiagonalGaussian;
    fields!(weight_decay ess);

    fn validate(&self) -> Result<()> {
        check::rate("alpha", self.alpha)?;
        check::positive("eps", self.eps)?;
        check::rate("momentum", self.momentum)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        self.ess.map_or(Ok(()), |ess| check::positive("ess", ess))
    }
}

impl Rule for RmsProp {
    type State<T: Real> = [T; 3];
    type Coefficients<T: Real> = [T; 6];

    fn initial(&self, _: Start) -> [f64; 3] {
        [0.0; 3]
    }
    fn keeps(&self, state: usize) -> bool {
        match Self::STATE[state] {
            "momentum" => self.momentum > 0.0,
            "mean_gradient" => self.centered,
            _ => true,
        }
    }
    fn coefficients(&self, when: When) -> [f64; 6] {
        // As in Adam: nobody is given a precision without ess.
        let ess = self.ess.unwrap_or(f64::INFINITY);
        [ess, when.lr, self.alpha, 1.0 - self.alpha, self.eps, self.momentum]
    }
    #[inline(always)]
    fn update<T: Real>(&self, k: [T; 6], x: Site<T>, [b, v, mean]: [T; 3]) -> (T, [T; 3]) {
        let [_, lr, decay, fresh, eps, mu] = k;
        let u = x.gradient + x.delta * (x.mean - x.prior_mean);
        let v = decay * v + fresh * u * u;
        let (mean, scale) = if self.centered {
            let mean = decay * mean + fresh * u;
            // A variance, so only rounding makes it negative; a constant gradient does, and the root would be NaN.
            (mean, (v - mean * mean).max(T::real(0.0)))
        } else {
            (mean, v)
        };
        let b = mu * b + u / (scale.sqrt() + eps);
        (x.mean - lr * b, [b, v, mean])
    }
    #[inline(always)]
    fn precision<T: Real>(&self, [ess, ..]: [T; 6], delta: T, [_, v, _]: [T; 3]) -> T {
        ess * (v.sqrt() + delta)
    }
}

impl DeltaRule for RmsProp {}
#[cfg(test)]
mod tests {
    use super::*;

    /// u = 1 + 0.5·(3-1) = 2, v = ½·4 + ½·u² = 4, so √v + ε = 4; centered with the mean 2, which stays: √0 + ε = 2.
    #[test]
    fn one_step_by_hand() {
        let rule = RmsProp::default().alpha(0.5).eps(2.0).momentum(0.5).ess(10.0);
        let site = Site { mean: 3.0, gradient: 1.0, curvature: 0.0, prior_mean: 1.0, delta: 0.5 };
        for (rule, b) in [(rule, 0.5 + 0.5), (rule.centered(true), 0.5 + 1.0)] {
            let k = rule.coefficients(When { t: 1, lr: 0.1 });
            let (m, state) = rule.update(k, site, [1.0, 4.0, 2.0]);
            assert_eq!((m, state), (3.0 - 0.1 * b, [b, 4.0, 2.0]));
            assert_eq!(rule.precision(k, 0.5, state), 10.0 * (2.0 + 0.5));
        }
    }

    #[test]
    fn defaults_are_those_of_torch() {
        let RmsProp { alpha, eps, momentum, centered, weight_decay, ess } = RmsProp::default();
        assert_eq!((alpha, eps, momentum, centered, weight_decay, ess), (0.99, 1e-8, 0.0, false, 0.0, None));
    }
}
