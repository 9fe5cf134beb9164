//! Vadam, Vprop and noisy Adam: Adam and RMSprop at samples of the posterior.

use super::common::{config, fields, samples};
use crate::driver::{Row, Rule, Site, Start, Weights, When};
use crate::{DiagonalGaussian, Expectation, Real, Result, Statistic, check};

config! {
    /// Variational Adam; [`Vadam::vprop`] and [`Vadam::noisy_adam`] are settings of it.
    ///
    /// Row of the table: Gaussian with diagonal covariance; Adam without the delta method. The Hessian is still the
    /// squared mini-batch gradient, and the step still has Adam's root.
    ///
    /// ```text
    /// e ~ N(0, 1/(λ(s+δ)))               λ = ess
    /// ĝ = ∇L(m+e)                        averaged over samples
    /// b ← β₁ b + (1-β₁) (ĝ + δ(m-m₀))
    /// s ← β₂ s + (1-β₂) ĝ²               ĝ² averaged over samples
    /// m ← m - α b̂ / (√ŝ + δ + γ)         b̂ = b/(1-β₁ᵗ), ŝ = s/(1-β₂ᵗ)
    /// ```
    ///
    /// | | b̂ | ŝ | denominator |
    /// |---|---|---|---|
    /// | Vadam (default) | b/(1-β₁ᵗ) | s/(1-β₂ᵗ) | √ŝ + δ + γ, γ = 0 |
    /// | [`Vadam::vprop`] | β₁ = 0: ĝ + δ(m-m₀) | s | √s + δ + γ, γ = 0 |
    /// | [`Vadam::noisy_adam`] | b/(1-β₁ᵗ) | s | s + δ + γ |
    ///
    /// The posterior is N(m, 1/(λ(s+δ))): samples are drawn with s itself, neither its root nor ŝ, and without the
    /// damping γ. ĝ² is an estimate of the curvature for batches of one example only; for larger ones it is too small
    /// by up to the batch size ([`Von::vogn`](crate::Von::vogn) squares per example, [`Ivon`](crate::Ivon) has no
    /// bias). With a prior built from a posterior, s starts at 0.
    ///
    /// Sources: Khan et al., *Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam* (ICML 2018),
    /// section 3; Zhang et al., *Noisy Natural Gradient as Variational Inference* (ICML 2018), for noisy Adam.
    pub struct Vadam {
        /// Effective sample size λ > 0, usually the number of training examples (`docs/scales.md`). Must be set.
        ess: Option<f64> = None, via f64;
        /// Initial squared gradient s₀ ≥ 0, with s₀+δ > 0; default 0, so that q starts with the prior's precision. The
        /// bias correction of s is for s₀ = 0: with another one ŝ starts at up to s₀/(1-β₂), so switch `debias_square`
        /// off.
        square_init: f64 = 0.0;
        /// β₁ in [0, 1), decay of the gradient average; default 0.9.
        beta1: f64 = 0.9;
        /// β₂ in [0, 1), decay of the squared gradients; default 0.999.
        beta2: f64 = 0.999;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 1e-4.
        weight_decay: f64 = 1e-4;
        /// External damping γ ≥ 0 of the step; default 0.
        damping: f64 = 0.0;
        /// Where the gradient is evaluated, with samples; default one Monte-Carlo sample.
        expectation: Expectation = Expectation::MonteCarlo { samples: 1 };
        /// Divide the gradient average by 1-β₁ᵗ; default on.
        debias: bool = true;
        /// Divide the average of squares by 1-β₂ᵗ in the step; default on.
        debias_square: bool = true;
        /// √ŝ in the denominator, as Adam has it, and not ŝ; default on.
        square_root: bool = true;
    }
}

impl Vadam {
    /// Variational RMSprop: no momentum, no bias correction.
    pub fn vprop() -> Self {
        Vadam::default().beta1(0.0).debias(false).debias_square(false)
    }

    /// Noisy Adam: no root and no bias correction of s. The published damping γ is the user's to set.
    pub fn noisy_adam() -> Self {
        Vadam::default().square_root(false).debias_square(false)
    }
}

impl Row for Vadam {
    const NAME: &'static str = "vadam";
    const STATE: &'static [&'static str] = &["momentum", "square"];
    type Arithmetic = Weights;
    type Posterior = DiagonalGaussian;
    fields!(weight_decay ess expectation beta2);

    fn validate(&self) -> Result<()> {
        check::ess(self.ess)?;
        check::non_negative("square_init", self.square_init)?;
        check::rate("beta1", self.beta1)?;
        check::rate("beta2", self.beta2)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        check::non_negative("damping", self.damping)?;
        self.expectation.check_sampled()?;
        // Where the gradient vanishes, the new s is what is left of the old one.
        let kept = if self.beta2 > 0.0 { self.square_init } else { 0.0 };
        check::positive("square_init + weight_decay", kept + self.weight_decay)
    }
    fn statistic(&self) -> Statistic {
        Statistic::SquaredGradient
    }
}

samples!(Vadam);

impl Rule for Vadam {
    type State<T: Real> = [T; 2];
    type Coefficients<T: Real> = [T; 8];
    const FORMED: &'static [Statistic] = &[Statistic::SquaredGradient];

    fn initial(&self, start: Start) -> [f64; 2] {
        [0.0, if start.posterior_prior { 0.0 } else { self.square_init }]
    }
    fn keeps(&self, state: usize) -> bool {
        Self::STATE[state] != "momentum" || self.beta1 > 0.0
    }
    fn coefficients(&self, when: When) -> [f64; 8] {
        // Not at t = 0, the precision before the first step: 1-β⁰ would be 0.
        let debias = |on: bool, beta: f64| if on && when.t > 0 { 1.0 - beta.powf(when.t as f64) } else { 1.0 };
        let rate = when.lr / debias(self.debias, self.beta1);
        let debias2 = debias(self.debias_square, self.beta2).recip();
        let ess = self.ess.unwrap_or(f64::NAN);
        [ess, rate, self.beta1, 1.0 - self.beta1, self.beta2, 1.0 - self.beta2, debias2, self.damping]
    }
    #[inline(always)]
    fn update<T: Real>(&self, k: [T; 8], x: Site<T>, [b, s]: [T; 2]) -> (T, [T; 2]) {
        let [_, rate, beta1, fresh1, beta2, fresh2, debias2, gamma] = k;
        let b = beta1 * b + fresh1 * (x.gradient + x.delta * (x.mean - x.prior_mean));
        let s = beta2 * s + fresh2 * x.curvature;
        // Only the step is corrected for bias; samples are drawn with s itself.
        let scale = if self.square_root { (s * debias2).sqrt() } else { s * debias2 };
        (x.mean - rate * b / (scale + x.delta + gamma), [b, s])
    }
    #[inline(always)]
    fn precision<T: Real>(&self, [ess, ..]: [T; 8], delta: T, [_, s]: [T; 2]) -> T {
        ess * (s + delta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Second step: u = 3 + ½·(1+1) = 4, b = ½·1 + ½·4 = 2.5; s = ¾·1 + ¼·13 = 4 from the mean square 13;
    /// 1-β₁² = ¾, 1-β₂² = 7/16; δ = ½.
    #[test]
    fn one_step_by_hand() {
        let own = |rule: Vadam| rule.ess(10.0).beta2(0.75).damping(0.25);
        let site = Site { mean: 1.0, gradient: 3.0, curvature: 13.0, prior_mean: -1.0, delta: 0.5 };
        for (rule, b, step) in [
            (own(Vadam::default().beta1(0.5)), 2.5, 2.5 / 0.75 / (2.0 / 0.4375_f64.sqrt() + 0.75)),
            (own(Vadam::vprop()), 4.0, 4.0 / 2.75),
            (own(Vadam::noisy_adam().beta1(0.5)), 2.5, 2.5 / 0.75 / 4.75),
        ] {
            let k = rule.coefficients(When { t: 2, lr: 0.3 });
            let (m, state) = rule.update(k, site, [1.0, 1.0]);
            assert!((m - (1.0 - 0.3 * step)).abs() < 1e-15, "{m}");
            assert_eq!((state, rule.precision(k, 0.5, state)), ([b, 4.0], 45.0));
        }
    }

    /// Khan et al. (2018), figure 1, where learning rate and prior have no default.
    #[test]
    fn defaults_are_those_of_the_paper() {
        let Vadam { ess, square_init, beta1, beta2, damping, expectation, .. } = Vadam::default();
        assert_eq!((ess, square_init, beta1, beta2, damping), (None, 0.0, 0.9, 0.999, 0.0));
        assert_eq!(expectation, Expectation::MonteCarlo { samples: 1 });
        let Vadam { debias, debias_square, square_root, .. } = Vadam::default();
        assert!(debias && debias_square && square_root);
        let Vadam { beta1, debias, debias_square, square_root, .. } = Vadam::vprop();
        assert_eq!((beta1, debias, debias_square, square_root), (0.0, false, false, true));
        let Vadam { beta1, debias, debias_square, square_root, .. } = Vadam::noisy_adam();
        assert_eq!((beta1, debias, debias_square, square_root), (0.9, true, false, false));
    }
}
