//! VON: where the expectation is taken and how the Hessian is estimated are free, and OGN and VOGN are two choices.

use super::auto::{self, StepLength};
use super::common::{config, fields, retracted_share, samples};
use crate::driver::{Row, Rule, Site, Start, Weights, When};
use crate::{Builder, DiagonalGaussian, Expectation, Labels, Real, Result, Statistic, check};

/// How [`Von`] averages gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Momentum {
    /// b ← β₁ b + (1-β₁) u
    Average,
    /// b ← β₁ b + u
    HeavyBall,
}

/// Which precision divides [`Von`]'s step of the mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum PrecisionInStep {
    /// The updated one, as the natural-gradient derivation has it.
    New,
    /// The one that the samples were drawn with.
    Old,
}

config! {
    /// Variational online Newton with a diagonal covariance; [`Von::ogn`] and [`Von::vogn`] are two settings of it.
    ///
    /// ```text
    /// λ = ess·ρ/τ,  δ_τ = τ δ              τ: temperature (KL weight), ρ: data-augmentation factor
    /// e ~ N(0, 1/(λ(h+δ_τ+γ)))            e = 0 for the delta method
    /// ĝ = ∇L(m+e), f: see `hessian`        averaged over samples
    /// u = ĝ [+ δ_τ(m-m₀)]
    /// b ← β₁ b + (1-β₁) u                  heavy ball: b ← β₁ b + u
    /// h ← h + r(f-h)                       r = 1-β₂; signed f: + ½ r²(f-h)²/(h+δ_τ+γ)
    /// m ← m - α (b/(1-β₁ᵗ) [+ δ_τ(m-m₀)]) / (h+δ_τ+γ)
    /// ```
    ///
    /// The prior's pull stands in one of the two brackets. With [`StepLength::Adam`] d takes the place of h+δ_τ+γ in
    /// the last line. The posterior is N(m, 1/(λ(h+δ_τ))). The damping γ limits noise and step, but is nothing that is
    /// known of the weights: the posterior keeps λγ beside its precision and draws its samples with it
    /// ([`DiagonalGaussian::damping`]). The KL weight rises linearly from `warmup_from`·τ in the first step to τ after
    /// `warmup_steps` steps.
    ///
    /// With a prior built from a posterior, h starts at 0, so that q starts with the precision of the prior; with
    /// `relative_noise` it starts at that all the same.
    ///
    /// [`Default`] is [`Von::vogn`]. Per-example gradients need tapped layers ([`crate::nn`]) or per-example losses.
    ///
    /// Sources: Khan et al., *Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam* (ICML 2018);
    /// Osawa et al., *Practical Deep Learning with Bayesian Principles* (NeurIPS 2019); Khan and Rue (2023), section
    /// 4.4.
    pub struct Von {
        /// Effective sample size > 0, usually the number of training examples (`docs/scales.md`), before `augmentation`
        /// and `temperature`. Must be set.
        ess: Option<f64> = None, via f64;
        /// δ = prior precision/(ess·ρ) ≥ 0: the prior is N(0, 1/(ess·ρ·δ)), at any temperature; default 1e-4.
        weight_decay: f64 = 1e-4;
        /// Initial Hessian h₀ ≥ 0, with h₀+δ+γ > 0; default 1.
        hess_init: f64 = 1.0;
        /// r > 0, in place of h₀: for each parameter, h₀ such that the noise 1/√(λh₀) is r · rms(w), its weights' root
        /// mean square when the optimizer first sees them, or 0.01 if that is larger. Prior and damping make σ₀ smaller
        /// yet. Default: off.
        relative_noise: Option<f64> = None, via f64;
        /// Let the first mini-batch's f replace h₀, which then only sets the noise of the first step.
        /// Needs δ+γ > 0. Default off.
        hess_from_first_batch: bool = false;
        /// β₁ in [0, 1), decay of the gradient average; default 0.9.
        beta1: f64 = 0.9;
        /// β₂ in [0, 1), decay of the Hessian average; default 0.999.
        beta2: f64 = 0.999;
        /// External damping γ ≥ 0; default 0.
        damping: f64 = 0.0;
        /// Where E_q\[∇L\] is evaluated; default one Monte-Carlo sample.
        expectation: Expectation = Expectation::MonteCarlo { samples: 1 };
        /// How E_q\[∇²L\] is estimated, by f:
        ///
        /// * [`Statistic::Fisher`] of the observed labels, (1/B) Σᵢ (∇ℓᵢ)²: the Gauss-Newton matrix by per-example
        ///   gradients as the papers of VOGN have it. Never negative. The default.
        /// * [`Statistic::Fisher`] of exact or sampled labels: the generalized Gauss-Newton matrix. Never negative; the
        ///   Hessian itself where the model is linear, so that a linear regression gets its exact precision. The
        ///   closure computes its loss with [`nn::cross_entropy`](crate::nn::cross_entropy),
        ///   [`nn::binary_cross_entropy`](crate::nn::binary_cross_entropy) or
        ///   [`nn::squared_error`](crate::nn::squared_error).
        /// * [`Statistic::Price`], f = e·ĝ·λ(h+δ+γ): unbiased, of either sign, hence updated along the positive
        ///   retraction.
        hessian: Statistic = Statistic::Fisher(Labels::Observed);
        /// Average or heavy ball; default average.
        momentum: Momentum = Momentum::Average;
        /// Divide the gradient average by 1-β₁ᵗ; default on; not for the heavy ball.
        debias: bool = true;
        /// Whether the prior's pull goes through the momentum; default no.
        prior_in_momentum: bool = false;
        /// Which precision divides the step; default the new one.
        precision_in_step: PrecisionInStep = PrecisionInStep::New;
        /// What divides the step of the mean; default [`StepLength::Newton`]: a precision.
        step_length: StepLength = StepLength::Newton;
        /// Temperature τ > 0, the weight of KL(q‖prior) against the data; default 1.
        temperature: f64 = 1.0;
        /// Fraction in (0, 1] of the temperature at which the warm-up of the KL weight starts; default 1. Without
        /// `warmup_steps` it does nothing.
        warmup_from: f64 = 1.0;
        /// Steps of that warm-up; default 0.
        warmup_steps: u64 = 0;
        /// Data-augmentation factor ρ > 0: how many times augmentation enlarges the data; default 1.
        augmentation: f64 = 1.0;
    }
}

impl Von {
    /// Online Gauss-Newton (row OGN): per-example squares at the mean, i.e. VOGN with the delta method.
    pub fn ogn() -> Self {
        Von::default().expectation(Expectation::Delta)
    }

    /// Variational online Gauss-Newton (row VOGN): "remove the delta method from OGN". The same as [`Von::icml2018`].
    pub fn vogn() -> Self {
        Von::default()
    }

    /// VOGN as in Khan et al. (ICML 2018): one sample, bias-corrected gradient average, the prior's pull outside of it.
    pub fn icml2018() -> Self {
        Von::default()
    }

    /// VOGN as in Osawa et al. (NeurIPS 2019): heavy ball that includes the prior's pull, h from the first mini-batch,
    /// β₂ = 0.99, damping 1e-3, KL weight from a tenth once `warmup_steps` is set (0 by default: no warm-up). Set also
    /// `augmentation` and the number of samples as the problem asks.
    pub fn neurips2019() -> Self {
        Von::default()
            .momentum(Momentum::HeavyBall)
            .debias(false)
            .prior_in_momentum(true)
            .hess_from_first_batch(true)
            .beta2(0.99)
            .damping(1e-3)
            .warmup_from(0.1)
    }

    /// VOGN where `lr` means what Adam's does and nothing else has to be found, as [`Ivon::auto`](crate::Ivon::auto):
    /// `ess` is the number of training examples, `steps` the number of updates planned.
    ///
    /// Noise that starts at 3 % of each parameter's scale, [`StepLength::Adam`] with β 0.99, β₂ = 1-1/steps, the
    /// prior N(0, 1), a warm-up over a tenth of the steps and a cosine to 0.
    pub fn auto(ess: f64, steps: u64) -> Builder<Self> {
        auto::settings!(Von::vogn(), ess, steps).schedule(auto::schedule(steps))
    }

    /// τ in the t-th step.
    fn kl_weight(&self, t: u64) -> f64 {
        // t = 0 is the posterior before the first step, which has the first step's weight.
        let done = t.saturating_sub(1);
        // Also without a warm-up, where the quotient would be 0/0.
        let progress = if done >= self.warmup_steps { 1.0 } else { done as f64 / self.warmup_steps as f64 };
        self.temperature * (self.warmup_from + (1.0 - self.warmup_from) * progress)
    }

    /// λ at a temperature, which enters by λ/τ and τδ alone: tempering is a change of these two.
    fn lambda(&self, tau: f64) -> f64 {
        self.effective_sample_size().unwrap_or(f64::NAN) / tau
    }
}

impl Row for Von {
    const NAME: &'static str = "von";
    const STATE: &'static [&'static str] = &["momentum", "hess", "square"];
    type Arithmetic = Weights;
    type Posterior = DiagonalGaussian;
    fields!(weight_decay damping expectation);

    fn effective_sample_size(&self) -> Option<f64> {
        self.ess.map(|ess| ess * self.augmentation)
    }
    fn validate(&self) -> Result<()> {
        check::ess(self.ess)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        check::non_negative("hess_init", self.hess_init)?;
        check::rate("beta1", self.beta1)?;
        check::rate("beta2", self.beta2)?;
        check::non_negative("damping", self.damping)?;
        // What remains of the precision where every example's gradient vanishes, and f with it, once h₀ is forgotten.
        if self.hess_from_first_batch || self.beta2 == 0.0 {
            check::positive("weight_decay + damping", self.weight_decay + self.damping)?;
        }
        check::positive("hess_init + weight_decay + damping", self.hess_init + self.weight_decay + self.damping)?;
        auto::validate(self.relative_noise, self.step_length)?;
        self.expectation.validate()?;
        let noisy = !self.expectation.is_adversarial();
        check::that("expectation", self.expectation, noisy, "Delta, MonteCarlo or Antithetic: it has no perturbation")?;
        let known = matches!(self.hessian, Statistic::Fisher(_) | Statistic::Price);
        check::that("hessian", self.hessian, known, "Fisher or Price")?;
        let sampled = self.hessian != Statistic::Price || self.expectation != Expectation::Delta;
        let expected = "an expectation with samples: Price's estimate is zero at the mean";
        check::that("hessian", self.hessian, sampled, expected)?;
        let averaged = !self.debias || self.momentum == Momentum::Average;
        check::that("debias", self.debias, averaged, "no bias correction with Momentum::HeavyBall: .debias(false)")?;
        check::positive("temperature", self.temperature)?;
        let start = self.warmup_from;
        check::that("warmup_from", start, start > 0.0 && start <= 1.0, "a number in (0, 1]")?;
        check::positive("augmentation", self.augmentation)
    }
    fn initial_share(&self, t: u64) -> Option<f64> {
        Some(match self.hessian {
            _ if self.hess_from_first_batch && t > 0 => 0.0,
            Statistic::Price => retracted_share(self.beta2, t),
            _ => self.beta2.powf(t as f64),
        })
    }
    fn statistic(&self) -> Statistic {
        self.hessian
    }
}

samples!(Von);

impl Rule for Von {
    type State<T: Real> = [T; 3];
    type Coefficients<T: Real> = [T; 13];
    const FORMED: &'static [Statistic] = &[Statistic::Price];

    fn initial(&self, start: Start) -> [f64; 3] {
        let lambda = self.lambda(self.kl_weight(0));
        [0.0, auto::hess_init(self.hess_init, self.relative_noise, start, lambda), 0.0]
    }
    fn keeps(&self, state: usize) -> bool {
        state < 2 || self.step_length.has_squares()
    }
    fn coefficients(&self, when: When) -> [f64; 13] {
        let tau = self.kl_weight(when.t);
        // Infinite at t = 0, where only the precision is asked for.
        let debias = if self.debias { 1.0 / (1.0 - self.beta1.powf(when.t as f64)) } else { 1.0 };
        let fresh = if self.momentum == Momentum::HeavyBall { 1.0 } else { 1.0 - self.beta1 };
        let r = if self.hess_from_first_batch && when.t <= 1 { 1.0 } else { 1.0 - self.beta2 };
        let [d0, d1, d2, d3] = self.step_length.coefficients(when.t);
        let (lambda, half_r2) = (self.lambda(tau), 0.5 * r * r);
        [lambda, tau, self.damping, when.lr, self.beta1, fresh, debias, r, half_r2, d0, d1, d2, d3]
    }
    #[inline(always)]
    fn update<T: Real>(&self, k: [T; 13], x: Site<T>, [b, h, square]: [T; 3]) -> (T, [T; 3]) {
        let [lambda, tau, gamma, lr, beta1, fresh, debias, r, half_r2, divisor @ ..] = k;
        let (delta, old) = (tau * x.delta, h + tau * x.delta + gamma);
        let pull = delta * (x.mean - x.prior_mean);
        let u = if self.prior_in_momentum { x.gradient + pull } else { x.gradient };
        let b = beta1 * b + fresh * u;
        let h = match self.hessian {
            Statistic::Price => {
                // γ included, since it limited the noise as well. Any other factor would bias h.
                let f = x.curvature * (lambda * old);
                h + r * (f - h) + half_r2 * (f - h) * (f - h) / old
            }
            // Squares are never negative, so the plain average keeps h above 0.
            _ => h + r * (x.curvature - h),
        };
        let precision = match self.precision_in_step {
            PrecisionInStep::New => h + delta + gamma,
            PrecisionInStep::Old => old,
        };
        let g = if self.prior_in_momentum { b * debias } else { b * debias + pull };
        let (d, square) = self.step_length.divisor(divisor, x, (lambda, delta, precision), square);
        (x.mean - lr * g / d, [b, h, square])
    }
    #[inline(always)]
    fn precision<T: Real>(&self, [lambda, tau, gamma, ..]: [T; 13], delta: T, [_, h, _]: [T; 3]) -> T {
        lambda * (h + tau * delta + gamma)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// λ = 8·2/2 = 8, δ_τ = 2·½ = 1, S = h + δ_τ + γ = 1 + 1 + 1; r = ½.
    fn tempered() -> Von {
        Von::default().ess(8.0).augmentation(2.0).temperature(2.0).damping(1.0).beta1(0.5).beta2(0.5)
    }

    /// Second step from b = 1, h = 1 at m = 3, m₀ = 1, so that the prior pulls with 1·2; ĝ = 3.
    fn second(rule: Von, curvature: f64) -> (f64, [f64; 3], f64) {
        let site = Site { mean: 3.0, gradient: 3.0, curvature, prior_mean: 1.0, delta: 0.5 };
        let k = rule.coefficients(When { t: 2, lr: 0.1 });
        let (m, state) = rule.update(k, site, [1.0, 1.0, 0.0]);
        (m, state, rule.precision(k, 0.5, state))
    }

    #[test]
    fn one_step_by_hand() {
        let von = tempered();
        let heavy = von.momentum(Momentum::HeavyBall).debias(false).prior_in_momentum(true);
        for (rule, step, b) in [
            (von, (2.0 / 0.75 + 2.0) / 4.0, 2.0),
            (von.debias(false).precision_in_step(PrecisionInStep::Old), (2.0 + 2.0) / 3.0, 2.0),
            (von.prior_in_momentum(true), 3.0 / 0.75 / 4.0, 3.0),
            (heavy, 5.5 / 4.0, 5.5),
        ] {
            // f = 3: h ← 1 + ½·2
            let (m, state, precision) = second(rule, 3.0);
            assert!((m - (3.0 - 0.1 * step)).abs() < 1e-15, "{m}");
            assert_eq!((state, precision), ([b, 2.0, 0.0], 8.0 * 4.0));
        }
        // f = ⅛·8·3 = 3: h ← 1 + ½·2 + ⅛·4/3
        let (_, [_, h, _], _) = second(von.hessian(Statistic::Price), 0.125);
        assert!((h - (2.0 + 0.5 / 3.0)).abs() < 1e-15, "{h}");
    }

    #[test]
    fn the_first_batch_may_replace_the_initial_hessian() {
        let r = |rule: Von, t| rule.coefficients(When { t, lr: 0.1 })[7];
        assert_eq!([1, 2].map(|t| r(tempered(), t)), [0.5, 0.5]);
        assert_eq!([1, 2].map(|t| r(tempered().hess_from_first_batch(true), t)), [1.0, 0.5]);
    }

    #[test]
    fn the_kl_weight_rises_linearly() {
        let tau = |steps| [0, 1, 2, 3, 4, 5, 9].map(|t| tempered().warmup_from(0.25).warmup_steps(steps).kl_weight(t));
        assert_eq!(tau(3), [0.5, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]);
        assert_eq!(tau(0), [2.0; 7]);
    }

    #[test]
    fn published_forms() {
        assert_eq!((Von::vogn(), Von::icml2018()), (Von::default(), Von::default()));
        let vogn = Von::default();
        assert_eq!(
            (vogn.expectation, vogn.hessian),
            (Expectation::MonteCarlo { samples: 1 }, Statistic::Fisher(Labels::Observed))
        );
        assert_eq!((vogn.momentum, vogn.precision_in_step), (Momentum::Average, PrecisionInStep::New));
        assert!(vogn.debias && !vogn.prior_in_momentum && !vogn.hess_from_first_batch);
        assert_eq!((vogn.beta1, vogn.beta2, vogn.damping, vogn.temperature), (0.9, 0.999, 0.0, 1.0));
        assert_eq!(Von::ogn(), vogn.expectation(Expectation::Delta));
        let osawa = Von::neurips2019();
        assert_eq!((osawa.momentum, osawa.debias), (Momentum::HeavyBall, false));
        assert!(osawa.prior_in_momentum && osawa.hess_from_first_batch);
        assert_eq!((osawa.beta1, osawa.beta2, osawa.damping, osawa.warmup_from), (0.9, 0.99, 1e-3, 0.1));
        for rule in [Von::vogn(), Von::ogn(), osawa] {
            rule.ess(10.0).validate().unwrap();
        }
    }
}
