//! SAM over RMSprop.

use super::common::{config, fields};
use crate::driver::{Row, Rule, Site, Start, Weights, When};
use crate::{DiagonalGaussian, Expectation, Real, Result, check};

config! {
    /// SAM with RMSprop, the stepping stone from [`Sam`](crate::Sam) to [`BayesianSam`](crate::BayesianSam).
    ///
    /// Row of the table: Gaussian with diagonal covariance; SAM's perturbation, Hessian by the squared mini-batch
    /// gradient, square-root scaling, slow-moving scale vectors.
    ///
    /// ```text
    /// ĝ₁ = ∇L(m)
    /// ε = ρ ĝ₁/‖ĝ₁‖                      global L2 norm over all trainable parameters; ε = 0 where ĝ₁ = 0
    /// ĝ = ∇L(m+ε)                        on the same batch
    /// u = ĝ + δ(m - m₀)
    /// v ← a v + (1-a) u²
    /// m ← m - α u / (√v + η)             η: field `eps`
    /// ```
    ///
    /// The radius is not scaled by v: that each weight has a radius of its own is what Bayesian SAM adds. With ρ = 0 it
    /// is [`RmsProp`](crate::RmsProp). The posterior precision ess·(√v + δ) is as heuristic as there, and needs
    /// [`SamRmsProp::ess`].
    ///
    /// Sources: Möllenhoff and Khan, *SAM as an Optimal Relaxation of Bayes* (ICLR 2023), and Khan's talks about it.
    pub struct SamRmsProp {
        /// Radius ρ ≥ 0 of the perturbation, in units of the weights; default 0.05.
        rho: f64 = 0.05;
        /// Decay a of the squared gradients, in [0, 1); default 0.99.
        alpha: f64 = 0.99;
        /// η > 0 beside the square root; default 1e-8.
        eps: f64 = 1e-8;
        /// δ ≥ 0, the L2 term δm added to the gradient at m+ε; default 0.
        weight_decay: f64 = 0.0;
        /// Effective sample size λ > 0; only needed for a posterior, or for a prior built from one. Default: none.
        ess: Option<f64> = None, via f64;
    }
}

impl Row for SamRmsProp {
    const NAME: &'static str = "sam_rmsprop";
    const STATE: &'static [&'static str] = &["square"];
    type Arithmetic = Weights;
    type Posterior = DiagonalGaussian;
    fields!(weight_decay ess);

    fn validate(&self) -> Result<()> {
        check::non_negative("rho", self.rho)?;
        check::rate("alpha", self.alpha)?;
        check::positive("eps", self.eps)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        self.ess.map_or(Ok(()), |ess| check::positive("ess", ess))
    }
    fn expectation(&self) -> Expectation {
        Expectation::Adversarial { sampled: false }
    }
}

impl Rule for SamRmsProp {
    type State<T: Real> = [T; 1];
    type Coefficients<T: Real> = [T; 6];

    fn initial(&self, _: Start) -> [f64; 1] {
        [0.0]
    }
    fn coefficients(&self, when: When) -> [f64; 6] {
        let ess = self.ess.unwrap_or(f64::INFINITY);
        [ess, when.lr, self.alpha, 1.0 - self.alpha, self.eps, self.rho]
    }
    #[inline(always)]
    fn adversarial<T: Real>(&self, [.., rho]: [T; 6], gradient: T, norm: T, _: T, _: [T; 1]) -> T {
        // As in SAM: the quotient is 0 where the norm stands for a vanishing gradient.
        rho * (gradient / norm)
    }
    #[inline(always)]
    fn update<T: Real>(&self, [_, lr, decay, fresh, eps, _]: [T; 6], x: Site<T>, [v]: [T; 1]) -> (T, [T; 1]) {
        let u = x.gradient + x.delta * (x.mean - x.prior_mean);
        let v = decay * v + fresh * u * u;
        (x.mean - lr * (u / (v.sqrt() + eps)), [v])
    }
    #[inline(always)]
    fn precision<T: Real>(&self, [ess, ..]: [T; 6], delta: T, [v]: [T; 1]) -> T {
        ess * (v.sqrt() + delta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// ε = 0.5·3/5; u = 1 + 0.5·(3-1) = 2, v = ½·4 + ½·u² = 4, so √v + η = 4.
    #[test]
    fn one_step_by_hand() {
        let rule = SamRmsProp::default().alpha(0.5).eps(2.0).rho(0.5).ess(10.0);
        let k = rule.coefficients(When { t: 1, lr: 0.1 });
        assert_eq!(rule.adversarial(k, 3.0, 5.0, 0.5, [4.0]), 0.3);
        let site = Site { mean: 3.0, gradient: 1.0, curvature: 0.0, prior_mean: 1.0, delta: 0.5 };
        let (m, state) = rule.update(k, site, [4.0]);
        assert_eq!((m, state), (3.0 - 0.1 * 0.5, [4.0]));
        assert_eq!(rule.precision(k, 0.5, state), 10.0 * (2.0 + 0.5));
    }

    /// ρ is SAM's, the rest is RMSprop's.
    #[test]
    fn defaults() {
        let rule = SamRmsProp { rho: 0.05, alpha: 0.99, eps: 1e-8, weight_decay: 0.0, ess: None };
        assert_eq!(SamRmsProp::default(), rule);
    }
}
