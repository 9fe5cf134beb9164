//! BayesBiNN: binary weights, learned at relaxed samples of a Bernoulli posterior.

use super::common::{config, fields, samples};
use crate::driver::{Decay, Row, Rule, Site, Start, Weights, When};
use crate::{Expectation, Link, MeanFieldBernoulli, Real, Result, Statistic, check};

config! {
    /// Bayesian binary neural network.
    ///
    /// Row of the table: Bernoulli; the straight-through estimator ([`Ste`](crate::Ste)) without the delta method.
    ///
    /// The posterior is q(w) ∝ exp(λw) over w ∈ {-1, 1}, independently for each weight: mean μ = tanh λ, mode sign λ
    /// ([`MeanFieldBernoulli`]). The rule λ ← (1-α)λ + α(λ₀ - N ∇_μ E_q\[L\]) needs a gradient with respect to μ, which
    /// a relaxation of the samples provides (Gumbel-softmax, also called concrete):
    ///
    /// ```text
    /// d = ½ ln(u/(1-u))                  u uniform on (0, 1)
    /// w = tanh((λ+d)/τ)                  τ → 0: a sample of q
    /// ĝ = ∇L(w)
    /// s = (1-w²+ε)/(τ(1-μ²+ε))           averaged as sĝ over samples
    /// b ← β₁ b + (1-β₁) (N s ĝ + κ(λ-λ₀))
    /// λ ← λ - α b/(1-β₁ᵗ)
    /// ```
    ///
    /// with N = ess and κ the weight of KL(q‖prior), 1 in Bayes' rule. Unlike the Gaussian rows, the loss is multiplied
    /// by N, so that α in (0, 1] is the ρ of the Bayesian learning rule.
    ///
    /// The variables hold the mean tanh λ ([`Link::Tanh`]): set them to ±1 (`w.sign()`) before the optimizer is built
    /// to start at λ = ±`natural_init` as the paper does, or leave small numbers in them to start near the uniform
    /// distribution. Samples and the mode are the posterior's: [`MeanFieldBernoulli::perturb`],
    /// [`MeanFieldBernoulli::perturb_to_mode`]. Give the optimizer binary weights only, by [`Params`](crate::Params) or
    /// a store of their own; a [`Prior`](crate::Prior) is an error.
    ///
    /// The gradient estimate is biased for τ > 0 and noisy for τ → 0 (at λ = 0 and τ = 1 the mean of 1-w² is 2/3 where
    /// an unbiased scale has 1).
    ///
    /// Source: Meng, Bachmann and Khan, *Training Binary Neural Networks using the Bayesian Learning Rule* (ICML 2020),
    /// algorithm 1. λ₀ ≠ 0 for continual learning is a number here, not a tensor.
    pub struct BayesBiNN {
        /// Effective sample size N > 0, usually the number of training examples (`docs/scales.md`). Must be set.
        ess: Option<f64> = None, via f64;
        /// Temperature τ > 0 of the relaxation; default 1.
        relaxation: f64 = 1.0;
        /// |λ| > 0 of the weights ±1 when the optimizer is built; default 10.
        natural_init: f64 = 10.0;
        /// λ₀, natural parameter of the prior; default 0, the uniform distribution.
        prior_natural: f64 = 0.0;
        /// κ ≥ 0, the weight of KL(q‖prior) against the data; default 1. The weight decay of other rows, to
        /// [`Optimizer::set_weight_decay`](crate::Optimizer::set_weight_decay) too.
        kl_weight: f64 = 1.0;
        /// β₁ in [0, 1), decay of the gradient average; default 0.9.
        beta1: f64 = 0.9;
        /// Divide the gradient average by 1-β₁ᵗ; default on.
        debias: bool = true;
        /// ε > 0 in the scale s, which keeps it finite where μ rounds to ±1; default 1e-10.
        eps: f64 = 1e-10;
        /// Where the gradient is evaluated, with samples; antithetic pairs are at u and at 1-u. Default one Monte-Carlo
        /// sample.
        expectation: Expectation = Expectation::MonteCarlo { samples: 1 };
    }
}

impl Row for BayesBiNN {
    const NAME: &'static str = "bayesbinn";
    const STATE: &'static [&'static str] = &["momentum"];
    const DECAY: Decay = Decay::Kl;
    type Arithmetic = Weights;
    type Posterior = MeanFieldBernoulli;
    fields!(ess expectation);

    fn isotropic_delta(&self) -> f64 {
        self.kl_weight
    }
    fn with_weight_decay(self, kappa: f64) -> Self {
        self.kl_weight(kappa)
    }
    fn validate(&self) -> Result<()> {
        check::ess(self.ess)?;
        check::positive("relaxation", self.relaxation)?;
        check::positive("natural_init", self.natural_init)?;
        check::that("prior_natural", self.prior_natural, self.prior_natural.is_finite(), "a finite number")?;
        check::non_negative("kl_weight", self.kl_weight)?;
        check::rate("beta1", self.beta1)?;
        check::positive("eps", self.eps)?;
        self.expectation.check_sampled()
    }
    fn statistic(&self) -> Statistic {
        Statistic::Relaxed
    }
}

samples!(BayesBiNN);

impl Rule for BayesBiNN {
    type State<T: Real> = [T; 1];
    type Coefficients<T: Real> = [T; 9];
    const FORMED: &'static [Statistic] = &[Statistic::Relaxed];

    fn link(&self) -> Link {
        Link::Tanh { largest: self.natural_init }
    }
    fn initial(&self, _: Start) -> [f64; 1] {
        [0.0]
    }
    fn keeps(&self, _: usize) -> bool {
        self.beta1 > 0.0
    }
    fn coefficients(&self, when: When) -> [f64; 9] {
        let debias = if self.debias { 1.0 - self.beta1.powf(when.t as f64) } else { 1.0 };
        // 1 and ½ are among the coefficients, because a constant in `update` would be converted at every weight.
        let (tau, ess) = (self.relaxation, self.ess.unwrap_or(f64::NAN));
        let rate = when.lr / debias;
        [1.0 / tau, ess / tau, self.eps, 1.0, 0.5, self.beta1, 1.0 - self.beta1, rate, self.prior_natural]
    }
    #[inline(always)]
    fn point<T: Real>(&self, [inverse_tau, ..]: [T; 9], lambda: T, d: T, sign: T, _: T, _: [T; 1]) -> T {
        // d is odd about u = ½, so the minus gives the noise of 1-u.
        ((lambda + sign * d) * inverse_tau).tanh()
    }
    #[inline(always)]
    fn update<T: Real>(&self, k: [T; 9], x: Site<T>, [b]: [T; 1]) -> (T, [T; 1]) {
        let [_, n_over_tau, eps, one, half, beta1, fresh, rate, lambda0] = k;
        // 1-μ² = sech²λ by the half angle, t = tanh(λ/2): where μ = tanh λ rounds to 1 in f32, t does not yet.
        let t = (half * x.mean).tanh();
        let sech = (one - t * t) / (one + t * t);
        // N s ĝ; the curvature statistic is (1-w²)ĝ.
        let g = n_over_tau * (x.curvature + eps * x.gradient) / (sech * sech + eps);
        let b = beta1 * b + fresh * (g + x.delta * (x.mean - lambda0));
        (x.mean - rate * b, [b])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ste;

    fn site(lambda: f64, gradient: f64, w: f64, delta: f64) -> Site<f64> {
        Site { mean: lambda, gradient, curvature: (1.0 - w * w) * gradient, prior_mean: 0.0, delta }
    }

    /// λ = ½ ln 3, so μ = ½ and 1-μ² = ¾; w = ½ as well, so with τ = ½ and ε = ¼: s = 1/(½·1) = 2 and N s ĝ = 4·2·3 =
    /// 24.
    #[test]
    fn one_step_by_hand() {
        let rule = BayesBiNN::default().ess(4.0).relaxation(0.5).eps(0.25).beta1(0.5).prior_natural(1.0);
        let lambda = 0.5 * 3f64.ln();
        let b = 0.5 * 2.0 + 0.5 * (24.0 + 2.0 * (lambda - 1.0));
        for (rule, debias) in [(rule, 0.75), (rule.debias(false), 1.0)] {
            let k = rule.coefficients(When { t: 2, lr: 0.05 });
            let (m, [momentum]) = rule.update(k, site(lambda, 3.0, 0.5, 2.0), [2.0]);
            assert!((momentum - b).abs() < 1e-14 && (m - (lambda - 0.05 * b / debias)).abs() < 1e-14, "{m}");
            // w = tanh((λ±d)/τ) with tanh(2x) = 2t/(1+t²), t = tanh x: at d = 0, 2·½/(1+¼).
            assert!((rule.point(k, lambda, 0.0, 1.0, 2.0, [2.0]) - 0.8).abs() < 1e-15);
            assert_eq!(rule.point(k, 0.0, 0.3, -1.0, 2.0, [2.0]), -(0.6f64.tanh()));
        }
    }

    /// s ≡ 1, no pull towards λ₀, the gradient at the mode: the straight-through estimator of learning rate αN.
    #[test]
    fn the_straight_through_estimator_is_a_special_case() {
        let rule = BayesBiNN::default().ess(50.0).beta1(0.0).kl_weight(0.0);
        let ste = Ste::default().clip_radius(f64::INFINITY);
        let when = |lr| When { t: 1, lr };
        for lambda in [-0.7, 0.1, 0.9] {
            // Where w = μ and τ = 1, s = 1 whatever ε is.
            let relaxed =
                rule.update(rule.coefficients(when(2e-3)), site(lambda, 0.3, f64::tanh(lambda), 0.0), [0.0]).0;
            let through = ste.update(ste.coefficients(when(0.1)), site(lambda, 0.3, 0.0, 0.0), [0.0]).0;
            assert!((relaxed - through).abs() < 1e-15, "{relaxed} {through}");
        }
    }

    /// Where μ rounds to 1 in f32, s is still what it is in f64.
    #[test]
    fn the_scale_keeps_its_digits_in_single_precision() {
        let rule = BayesBiNN::default().ess(1.0).beta1(0.0).kl_weight(0.0);
        let k = rule.coefficients(When { t: 1, lr: 1.0 });
        for lambda in [9.5f32, -11.0] {
            assert_eq!(lambda.abs().tanh(), 1.0);
            let site = Site { mean: lambda, gradient: 1.0, curvature: 1e-6, prior_mean: 0.0, delta: 0.0 };
            let step = f64::from(lambda - rule.update(k.map(|x| x as f32), site, [0.0]).0);
            let s = (1e-6 + 1e-10) / (f64::from(lambda).cosh().powi(-2) + 1e-10);
            assert!((step / s - 1.0).abs() < 5e-3, "{step} {s}");
        }
    }

    /// Meng, Bachmann and Khan (2020), algorithm 1 and appendix.
    #[test]
    fn defaults_are_those_of_the_paper() {
        let BayesBiNN { ess, relaxation, natural_init, prior_natural, kl_weight, .. } = BayesBiNN::default();
        assert_eq!((ess, relaxation, natural_init, prior_natural, kl_weight), (None, 1.0, 10.0, 0.0, 1.0));
        let BayesBiNN { beta1, debias, eps, expectation, .. } = BayesBiNN::default();
        assert_eq!((beta1, debias, eps, expectation), (0.9, true, 1e-10, Expectation::MonteCarlo { samples: 1 }));
    }
}
