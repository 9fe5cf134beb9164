//! bSAM: SAM whose radius is the uncertainty of each weight.

use super::auto::{self, StepLength};
use super::common::{config, fields};
use super::von::PrecisionInStep;
use crate::driver::{Row, Rule, Site, Start, Weights, When};
use crate::{Builder, DiagonalGaussian, Expectation, Real, Result, Statistic, check};

config! {
    /// Bayesian sharpness-aware minimization: SAM with a perturbation and a step that follow the posterior's variance.
    ///
    /// Row of the table: Gaussian with diagonal covariance; stochastic approximation, the expectation of the loss
    /// relaxed to its best concave upper bound (the maximum of SAM), Hessian by √s·|ĝ₁| at a sample, slow-moving
    /// averages.
    ///
    /// ```text
    /// e ~ N(0, 1/(λs))                   λ = ess, s = h+δ+γ
    /// ĝ₁ = ∇L(m+e)
    /// ε = ρ ĝ₁/s
    /// ĝ = ∇L(m+ε)                        at the mean, not at the sample; on the same batch
    /// b ← β₁ b + (1-β₁) (ĝ + δ(m-m₀))
    /// h ← β₂ h + (1-β₂) √s |ĝ₁|          the same as  s ← β₂ s + (1-β₂) (√s |ĝ₁| + δ + γ)
    /// m ← m - α b/s                      released code: the old s; StepLength::Adam: d in place of s
    /// ```
    ///
    /// The posterior is N(m, 1/(λ(h+δ))). The damping γ limits noise and step, but is nothing that is known of the
    /// weights: the posterior keeps λγ beside its precision and draws its samples with it
    /// ([`DiagonalGaussian::damping`]). Over the chunks of [`Optimizer::step_chunks`](crate::Optimizer::step_chunks)
    /// (m-sharpness) and over micro-batches ĝ and |ĝ₁| are averaged, each with an e of its own. There is no bias
    /// correction.
    ///
    /// With ρ = 0 it is OGN ([`Von::ogn`](crate::Von::ogn)) with √s·|ĝ₁| at a sample in place of squared gradients at
    /// the mean. With a prior built from a posterior, h starts at 0, so that q starts with the precision of the prior;
    /// with `relative_noise` it starts at that all the same.
    ///
    /// Two forms: [`BayesianSam::iclr2023`], the algorithm of the paper, which is the default, and
    /// [`BayesianSam::released`], that of its code.
    ///
    /// Source: Möllenhoff and Khan, *SAM as an Optimal Relaxation of Bayes* (ICLR 2023), algorithm 1.
    pub struct BayesianSam {
        /// Effective sample size λ > 0, usually the number of training examples, times a factor for data augmentation
        /// (`docs/scales.md`). Must be set.
        ess: Option<f64> = None, via f64;
        /// ρ ≥ 0, the size of the perturbation; default 0.01.
        rho: f64 = 0.01;
        /// Initial Hessian h₀ ≥ 0; default 0.9. A published s₀ is h₀ = s₀-δ-γ.
        hess_init: f64 = 0.9;
        /// r > 0, in place of h₀: for each parameter, h₀ such that the noise 1/√(λh₀) is r · rms(w), its weights' root
        /// mean square when the optimizer first sees them, or 0.01 if that is larger. Prior and damping make σ₀ smaller
        /// yet. Default: off.
        relative_noise: Option<f64> = None, via f64;
        /// β₁ in [0, 1), decay of the gradient average; default 0.9.
        beta1: f64 = 0.9;
        /// β₂ in [0, 1), decay of the Hessian average; default 0.999.
        beta2: f64 = 0.999;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 1e-4.
        weight_decay: f64 = 1e-4;
        /// Damping γ ≥ 0 of noise, perturbation and step, with δ+γ > 0; default 0.1.
        damping: f64 = 0.1;
        /// Which s divides the step; default the new one.
        precision_in_step: PrecisionInStep = PrecisionInStep::New;
        /// What divides the step of the mean; default [`StepLength::Newton`]: s.
        step_length: StepLength = StepLength::Newton;
    }
}

impl BayesianSam {
    /// As in the paper: the new s divides the step. The default.
    pub fn iclr2023() -> Self {
        BayesianSam::default()
    }

    /// As in the code that was released with the paper: the s from before the update divides the step.
    pub fn released() -> Self {
        BayesianSam::default().precision_in_step(PrecisionInStep::Old)
    }

    /// Bayesian SAM where `lr` means what Adam's does and nothing else has to be found, as
    /// [`Ivon::auto`](crate::Ivon::auto): `ess` is the number of training examples, `steps` the number of updates
    /// planned.
    ///
    /// Noise that starts at 3 % of each parameter's scale, [`StepLength::Adam`] with β 0.99, β₂ = 1-1/steps, the
    /// prior N(0, 1), a warm-up over a tenth of the steps and a cosine to 0.
    pub fn auto(ess: f64, steps: u64) -> Builder<Self> {
        auto::settings!(BayesianSam::iclr2023(), ess, steps).schedule(auto::schedule(steps))
    }
}

impl Row for BayesianSam {
    const NAME: &'static str = "bsam";
    const STATE: &'static [&'static str] = &["momentum", "hess", "square"];
    type Arithmetic = Weights;
    type Posterior = DiagonalGaussian;
    fields!(weight_decay ess damping beta2);

    fn validate(&self) -> Result<()> {
        check::ess(self.ess)?;
        check::non_negative("rho", self.rho)?;
        check::non_negative("hess_init", self.hess_init)?;
        check::rate("beta1", self.beta1)?;
        check::rate("beta2", self.beta2)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        check::non_negative("damping", self.damping)?;
        auto::validate(self.relative_noise, self.step_length)?;
        // Where the gradient vanishes, h goes to zero, and s must not.
        check::positive("weight_decay + damping", self.weight_decay + self.damping)
    }
    fn expectation(&self) -> Expectation {
        Expectation::Adversarial { sampled: true }
    }
    fn statistic(&self) -> Statistic {
        Statistic::AbsoluteGradient
    }
}

impl Rule for BayesianSam {
    type State<T: Real> = [T; 3];
    type Coefficients<T: Real> = [T; 11];

    fn initial(&self, start: Start) -> [f64; 3] {
        let ess = self.ess.unwrap_or(f64::NAN);
        [0.0, auto::hess_init(self.hess_init, self.relative_noise, start, ess), 0.0]
    }
    fn keeps(&self, state: usize) -> bool {
        state < 2 || self.step_length.has_squares()
    }
    fn coefficients(&self, when: When) -> [f64; 11] {
        let ess = self.ess.unwrap_or(f64::NAN);
        let lr = when.lr;
        let [d0, d1, d2, d3] = self.step_length.coefficients(when.t);
        [ess, self.damping, lr, self.rho, self.beta1, 1.0 - self.beta1, 1.0 - self.beta2, d0, d1, d2, d3]
    }
    #[inline(always)]
    fn adversarial<T: Real>(&self, [_, gamma, _, rho, ..]: [T; 11], g: T, _: T, delta: T, [_, h, _]: [T; 3]) -> T {
        rho * g / (h + delta + gamma)
    }
    #[inline(always)]
    fn update<T: Real>(&self, k: [T; 11], x: Site<T>, [b, h, square]: [T; 3]) -> (T, [T; 3]) {
        let [ess, gamma, lr, _, beta1, fresh, r, divisor @ ..] = k;
        let old = h + x.delta + gamma;
        let b = beta1 * b + fresh * (x.gradient + x.delta * (x.mean - x.prior_mean));
        // √s with the s that the sample was drawn with, whichever one divides the step.
        let h = h + r * (old.sqrt() * x.curvature - h);
        let s = match self.precision_in_step {
            PrecisionInStep::New => h + x.delta + gamma,
            PrecisionInStep::Old => old,
        };
        let (d, square) = self.step_length.divisor(divisor, x, (ess, x.delta, s), square);
        (x.mean - lr * b / d, [b, h, square])
    }
    #[inline(always)]
    fn precision<T: Real>(&self, [ess, gamma, ..]: [T; 11], delta: T, [_, h, _]: [T; 3]) -> T {
        ess * (h + delta + gamma)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// s = h + δ + γ = 2 + 1 + 1 = 4, so ε = 0.5·3/4; u = 1 + 1·(3-1) = 3, b = ½·1 + ½·3 = 2; f = √4·3 = 6,
    /// h ← 2 + ¼·(6-2) = 3, s ← 5.
    #[test]
    fn one_step_by_hand() {
        let rule = BayesianSam::iclr2023().ess(8.0).rho(0.5).beta1(0.5).beta2(0.75).damping(1.0);
        for (rule, s) in [(rule, 5.0), (rule.precision_in_step(PrecisionInStep::Old), 4.0)] {
            let k = rule.coefficients(When { t: 2, lr: 0.1 });
            assert_eq!(rule.precision(k, 1.0, [1.0, 2.0, 0.0]), 8.0 * 4.0);
            assert_eq!(rule.adversarial(k, 3.0, 99.0, 1.0, [1.0, 2.0, 0.0]), 0.375);
            let site = Site { mean: 3.0, gradient: 1.0, curvature: 3.0, prior_mean: 1.0, delta: 1.0 };
            let (m, state) = rule.update(k, site, [1.0, 2.0, 0.0]);
            assert!((m - (3.0 - 0.1 * 2.0 / s)).abs() < 1e-15, "{m}");
            assert_eq!((state, rule.precision(k, 1.0, state)), ([2.0, 3.0, 0.0], 8.0 * 5.0));
        }
    }

    #[test]
    fn published_forms() {
        let paper = BayesianSam::iclr2023();
        assert_eq!(paper, BayesianSam::default());
        assert_eq!(paper.precision_in_step, PrecisionInStep::New);
        assert_eq!(BayesianSam::released(), paper.precision_in_step(PrecisionInStep::Old));
        assert_eq!((paper.rho, paper.beta1, paper.beta2, paper.damping), (0.01, 0.9, 0.999, 0.1));
        assert!((paper.hess_init + paper.damping - 1.0).abs() < 1e-15, "s starts at 1, up to δ");
    }
}
