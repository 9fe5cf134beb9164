//! Adam: RMSprop with momentum and bias correction.

use super::common::{config, fields};
use crate::driver::{DeltaRule, Row, Rule, Site, Start, Weights, When};
use crate::{DiagonalGaussian, Real, Result, check};

config! {
    /// Adam, as in PyTorch and tch, with AMSGrad on request.
    ///
    /// Row of the table: Gaussian with diagonal covariance; delta method, stochastic approximation, Hessian by the
    /// squared mini-batch gradient, square-root scaling, slow-moving scale vectors.
    ///
    /// ```text
    /// u = ĝ + δ(m - m₀)
    /// b ← β₁ b + (1-β₁) u
    /// v ← β₂ v + (1-β₂) u²               AMSGrad: v̄ ← max(v̄, v), used in place of v below
    /// m ← m - α/(1-β₁ᵗ) · b / ( √v / √(1-β₂ᵗ) + ε )
    /// ```
    ///
    /// The posterior precision ess·(√(v/(1-β₂ᵗ)) + δ) is a heuristic: √v has the units of a curvature only up to the
    /// scale of the gradient noise. It needs [`Adam::ess`].
    ///
    /// Sources: Kingma and Ba (2015); Khan and Rue, *The Bayesian Learning Rule* (2023), section 4.2; semantics of
    /// `torch.optim.Adam`.
    pub struct Adam {
        /// β₁ in [0, 1), decay of the gradient average; default 0.9.
        beta1: f64 = 0.9;
        /// β₂ in [0, 1), decay of the squared gradients; default 0.999.
        beta2: f64 = 0.999;
        /// ε > 0 beside the square root; default 1e-8.
        eps: f64 = 1e-8;
        /// AMSGrad: divide by the largest v so far. Default off.
        amsgrad: bool = false;
        /// δ ≥ 0, the L2 term δm added to the gradient; default 0.
        weight_decay: f64 = 0.0;
        /// Effective sample size λ > 0; only needed for a posterior, or for a prior built from one. Default: none.
        ess: Option<f64> = None, via f64;
    }
}

impl Row for Adam {
    const NAME: &'static str = "adam";
    const STATE: &'static [&'static str] = &["momentum", "square", "square_max"];
    type Arithmetic = Weights;
    type Posterior = DiagonalGaussian;
    fields!(weight_decay ess);

    fn validate(&self) -> Result<()> {
        check::rate("beta1", self.beta1)?;
        check::rate("beta2", self.beta2)?;
        check::positive("eps", self.eps)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        self.ess.map_or(Ok(()), |ess| check::positive("ess", ess))
    }
}

impl Rule for Adam {
    type State<T: Real> = [T; 3];
    type Coefficients<T: Real> = [T; 8];

    fn initial(&self, _: Start) -> [f64; 3] {
        [0.0; 3]
    }
    fn keeps(&self, state: usize) -> bool {
        Self::STATE[state] != "square_max" || self.amsgrad
    }
    fn coefficients(&self, when: When) -> [f64; 8] {
        // t = 0 asks for the precision before the first step, where 1-β⁰ would be 0.
        let debias = |beta: f64| if when.t == 0 { 1.0 } else { 1.0 - beta.powf(when.t as f64) };
        let rate = when.lr / debias(self.beta1);
        // Without ess nobody is given a precision, but the coefficient must be some number.
        let ess = self.ess.unwrap_or(f64::INFINITY);
        // The correction outside of the root, √v/√(1-β₂ᵗ), as in libtorch: √(v/(1-β₂ᵗ)) rounds differently.
        let debias2 = debias(self.beta2).sqrt().recip();
        [ess, debias2, rate, self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, self.eps]
    }
    #[inline(always)]
    fn update<T: Real>(&self, k: [T; 8], x: Site<T>, [b, v, v_max]: [T; 3]) -> (T, [T; 3]) {
        let [_, debias2, rate, beta1, fresh1, beta2, fresh2, eps] = k;
        let u = x.gradient + x.delta * (x.mean - x.prior_mean);
        let b = beta1 * b + fresh1 * u;
        let v = beta2 * v + fresh2 * u * u;
        let v_max = if self.amsgrad { v_max.max(v) } else { v_max };
        let scale = if self.amsgrad { v_max } else { v };
        (x.mean - rate * b / (scale.sqrt() * debias2 + eps), [b, v, v_max])
    }
    #[inline(always)]
    fn precision<T: Real>(&self, [ess, debias2, ..]: [T; 8], delta: T, [_, v, v_max]: [T; 3]) -> T {
        let scale = if self.amsgrad { v_max } else { v };
        ess * (scale.sqrt() * debias2 + delta)
    }
}

impl DeltaRule for Adam {}
#[cfg(test)]
mod tests {
    use super::*;

    /// Second step: u = 3 + 0.5·(1+1) = 4, b = ½·1 + ½·4 = 2.5, v = ¾·1 + ¼·16 = 4.75, 1-β₁² = 0.75, 1-β₂² = 0.4375.
    #[test]
    fn one_step_by_hand() {
        let rule = Adam::default().beta1(0.5).beta2(0.75).eps(1.0).ess(10.0);
        let site = Site { mean: 1.0, gradient: 3.0, curvature: 0.0, prior_mean: -1.0, delta: 0.5 };
        for (rule, largest, scale) in
            [(rule, 9.0, 4.75), (rule.amsgrad(true), 9.0, 9.0), (rule.amsgrad(true), 2.0, 4.75)]
        {
            let k = rule.coefficients(When { t: 2, lr: 0.3 });
            let (m, state) = rule.update(k, site, [1.0, 1.0, largest]);
            let root = (scale / 0.4375_f64).sqrt();
            assert!((m - (1.0 - 0.4 * 2.5 / (root + 1.0))).abs() < 1e-15, "{m}");
            assert_eq!(state[..2], [2.5, 4.75]);
            assert_eq!(state[2], if rule.amsgrad { scale } else { largest });
            assert!((rule.precision(k, 0.5, state) - 10.0 * (root + 0.5)).abs() < 1e-13);
        }
    }

    /// Kingma and Ba (2015), algorithm 1.
    #[test]
    fn defaults_are_those_of_the_paper() {
        let Adam { beta1, beta2, eps, amsgrad, weight_decay, ess } = Adam::default();
        assert_eq!((beta1, beta2, eps, amsgrad, weight_decay, ess), (0.9, 0.999, 1e-8, false, 0.0, None));
    }
}
