//! Adam with decoupled weight decay.

use super::adam::Adam;
use super::common::{config, fields};
use crate::driver::{Decay, DeltaRule, Row, Rule, Site, Start, Weights, When};
use crate::{DiagonalGaussian, Real, Result, check};

config! {
    /// `AdamW`, as in PyTorch and tch: the decay acts on the weights and not through the preconditioner.
    ///
    /// ```text
    /// m ← (1 - α η) m                    η: weight decay
    /// m ← Adam's step from there, with the gradient at the old m
    /// ```
    ///
    /// The decoupled decay is not a prior: it is the one place of this crate where weight decay means something else. A
    /// prior built from a posterior adds its δ(m - m₀) to the gradient as in [`Adam`]; set the decay to 0 then.
    /// The posterior precision is [`Adam`]'s heuristic with δ = 0 unless such a prior is given.
    ///
    /// Sources: Loshchilov and Hutter (2019); semantics of `torch.optim.AdamW`.
    pub struct AdamW {
        /// β₁ in [0, 1), decay of the gradient average; default 0.9.
        beta1: f64 = 0.9;
        /// β₂ in [0, 1), decay of the squared gradients; default 0.999.
        beta2: f64 = 0.999;
        /// ε > 0 beside the square root; default 1e-8.
        eps: f64 = 1e-8;
        /// AMSGrad: divide by the largest v so far. Default off.
        amsgrad: bool = false;
        /// Decoupled weight decay η ≥ 0; default 0.01.
        weight_decay: f64 = 0.01;
        /// Effective sample size λ > 0; only needed for a posterior, or for a prior built from one. Default: none.
        ess: Option<f64> = None, via f64;
    }
}

impl AdamW {
    /// Adam's part of the update.
    fn adam(&self) -> Adam {
        let AdamW { beta1, beta2, eps, amsgrad, weight_decay: _, ess } = *self;
        // The decay acts on the weights here, and must not enter the gradient as well.
        Adam { beta1, beta2, eps, amsgrad, weight_decay: 0.0, ess }
    }
}

impl Row for AdamW {
    const NAME: &'static str = "adamw";
    const STATE: &'static [&'static str] = Adam::STATE;
    const DECAY: Decay = Decay::Decoupled;
    type Arithmetic = Weights;
    type Posterior = DiagonalGaussian;
    fields!(ess);

    fn with_weight_decay(self, decay: f64) -> Self {
        self.weight_decay(decay)
    }
    fn validate(&self) -> Result<()> {
        check::non_negative("weight_decay", self.weight_decay)?;
        self.adam().validate()
    }
}

impl Rule for AdamW {
    type State<T: Real> = [T; 3];
    type Coefficients<T: Real> = [T; 9];

    fn initial(&self, start: Start) -> [f64; 3] {
        self.adam().initial(start)
    }
    fn keeps(&self, state: usize) -> bool {
        self.adam().keeps(state)
    }
    fn coefficients(&self, when: When) -> [f64; 9] {
        let [a, b, c, d, e, f, g, h] = self.adam().coefficients(when);
        [a, b, c, d, e, f, g, h, 1.0 - when.lr * self.weight_decay]
    }
    #[inline(always)]
    fn update<T: Real>(&self, [a, b, c, d, e, f, g, h, keep]: [T; 9], x: Site<T>, state: [T; 3]) -> (T, [T; 3]) {
        // The pull of a prior, if there is one, is taken at the old mean like the gradient; so Adam gets δ = 0.
        let pulled = x.gradient + x.delta * (x.mean - x.prior_mean);
        let decayed = Site { mean: keep * x.mean, gradient: pulled, delta: T::real(0.0), ..x };
        self.adam().update([a, b, c, d, e, f, g, h], decayed, state)
    }
    #[inline(always)]
    fn precision<T: Real>(&self, [a, b, c, d, e, f, g, h, _]: [T; 9], delta: T, state: [T; 3]) -> T {
        self.adam().precision([a, b, c, d, e, f, g, h], delta, state)
    }
}

impl DeltaRule for AdamW {}
#[cfg(test)]
mod tests {
    use super::*;

    /// The second step of the test of [`Adam`], from (1 - 0.3·0.2)·1; the prior pulls from the old mean.
    #[test]
    fn one_step_by_hand() {
        let rule = AdamW::default().beta1(0.5).beta2(0.75).eps(1.0).weight_decay(0.2);
        for (gradient, delta) in [(4.0, 0.0), (3.0, 0.5)] {
            let site = Site { mean: 1.0, gradient, curvature: 0.0, prior_mean: -1.0, delta };
            let (m, state) = rule.update(rule.coefficients(When { t: 2, lr: 0.3 }), site, [1.0, 1.0, 0.0]);
            assert!((m - (0.94 - 1.0 / ((4.75_f64 / 0.4375).sqrt() + 1.0))).abs() < 1e-15, "{m}");
            assert_eq!(state, [2.5, 4.75, 0.0]);
        }
    }

    #[test]
    fn defaults_are_those_of_torch() {
        let AdamW { beta1, beta2, eps, amsgrad, weight_decay, ess } = AdamW::default();
        assert_eq!((beta1, beta2, eps, amsgrad, weight_decay, ess), (0.9, 0.999, 1e-8, false, 0.01, None));
        assert_eq!(AdamW::default().isotropic_delta(), 0.0);
    }
}
