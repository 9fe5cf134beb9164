//! IVON: improved variational online Newton.

use super::auto::{self, StepLength};
use super::common::{config, fields, retracted_share, samples};
use crate::driver::{Row, Rule, Site, Start, Weights, When};
use crate::{Builder, DiagonalGaussian, Expectation, Real, Result, Statistic, check};

config! {
    /// Improved variational online Newton.
    ///
    /// Row of the table: Gaussian with diagonal covariance; nothing but the stochastic approximation is left out, and
    /// the precision is updated along a retraction that keeps it positive (the improved rule of Lin et al. 2020).
    ///
    /// ```text
    /// e ~ N(0, 1/(λ(h+δ)))               λ = ess
    /// ĝ = ∇L(m+e)                        averaged over samples
    /// f = e ĝ λ(h+δ)                     averaged over samples
    /// b ← β₁ b + (1-β₁) ĝ
    /// h ← h + r(f-h) + ½ r²(f-h)²/(h+δ)  r = 1-β₂; so h+δ never falls below half its value
    /// h+δ ≤ max_growth · (h+δ of before) if set
    /// m ← m - α c · clip( (b/(1-β₁ᵗ) + δ(m-m₀)) / (h+δ), ±ξ )
    /// ```
    ///
    /// with c = h₀+δ if the learning rate is rescaled (default), else 1; with [`StepLength::Adam`] d takes the place of
    /// h+δ there, and c is 1. The posterior is N(m, 1/(λ(h+δ))).
    /// With a prior built from a posterior, δ and m₀ are its tensors, h starts at 0 (so q starts with the precision of
    /// the prior; with `relative_noise` h starts at that all the same) and c keeps the scalars h₀ and `weight_decay`,
    /// so that stiff directions stay stable.
    ///
    /// [`Ivon::auto`] starts without a search. Starting values of the plain row (Shen et al. 2024, appendix A): ess =
    /// number of examples; h₀ from 0.01 to 1, and small enough together with ess that σ₀ = 1/√(λ(h₀+δ)) is not
    /// negligible; lr as large as stays stable, with linear warm-up and cosine decay; β₂ so close to 1 that noise in f
    /// averages out, yet 1/(1-β₂) shorter than the training, or h never leaves h₀ (see
    /// [`Diagnostics`](crate::Diagnostics)). Avoid batch normalization.
    ///
    /// Sources: Shen et al., *Variational Learning is Effective for Large Deep Networks* (ICML 2024), algorithm 1;
    /// Lin, Schmidt and Khan (ICML 2020) for the retraction.
    pub struct Ivon {
        /// Effective sample size λ > 0, usually the number of training examples (`docs/scales.md`). Must be set.
        ess: Option<f64> = None, via f64;
        /// Initial Hessian h₀ > 0; default 1.
        hess_init: f64 = 1.0;
        /// r > 0, in place of h₀: for each parameter, h₀ such that the noise 1/√(λh₀) is r · rms(w), its weights' root
        /// mean square when the optimizer first sees them, or 0.01 if that is larger. Prior and damping make σ₀ smaller
        /// yet. Default: off.
        relative_noise: Option<f64> = None, via f64;
        /// β₁ in [0, 1), decay of the gradient average; default 0.9.
        beta1: f64 = 0.9;
        /// β₂ in [0, 1), decay of the Hessian average; default 0.99999.
        beta2: f64 = 0.99999;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 1e-4.
        weight_decay: f64 = 1e-4;
        /// Where the expectations are evaluated, with samples: [`Expectation::MonteCarlo`], or
        /// [`Expectation::Antithetic`] at twice the cost and without noise from the gradient at the mean in f. Default
        /// one Monte-Carlo sample.
        expectation: Expectation = Expectation::MonteCarlo { samples: 1 };
        /// How E_q\[∇²L\] is estimated: by [`Statistic::Price`], without bias and of either sign, the default; or by
        /// [`Statistic::SquaredGradient`], f = κ·ĝ², which is biased.
        hessian: Statistic = Statistic::Price;
        /// κ > 0, factor on squared gradients; default ess, as in the published code. 1 is Adam's second moment, the
        /// batch size an estimate of the empirical Fisher information.
        square_scale: Option<f64> = None, via f64;
        /// Clip radius ξ > 0 on the preconditioned step, so that no weight moves by more than α c ξ; default: none.
        clip_radius: Option<f64> = None, via f64;
        /// Divide the gradient average by 1-β₁ᵗ; default on.
        debias: bool = true;
        /// Multiply the learning rate by h₀+δ, which makes it comparable to SGD's; default on. Nothing to multiply with
        /// [`StepLength::Adam`].
        rescale_lr: bool = true;
        /// Factor > 1 by which h+δ may at most grow in one step, beside the half to which it may at most fall: a single
        /// large f then cannot end a run. Default: none.
        max_growth: Option<f64> = None, via f64;
        /// What divides the step of the mean; default [`StepLength::Newton`].
        step_length: StepLength = StepLength::Newton;
        /// What pulls the mean towards the prior's; default [`PriorPull::Precision`], as Bayes has it.
        prior_pull: PriorPull = PriorPull::Precision;
    }
}

/// The coefficient of m-m₀ in the step of [`Ivon`]'s mean, m₀ being the mean of the prior.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PriorPull {
    /// δ, the precision of the prior for each example: the gradient of -ln prior.
    #[default]
    Precision,
    /// 1, whatever the precision, as in the published code of continual IVON (Paul et al. 2026), where δ is far below 1
    /// and a `clip_radius` bounds the step. The precision of the posterior has δ all the same. The fixed point is that
    /// of another prior, so only compare with that code by it.
    Unit,
}

impl Ivon {
    /// IVON where `lr` means what Adam's does and nothing else has to be found: `ess` is the number of training
    /// examples (of labels, where the loss is a mean over several per example), `steps` the number of updates planned.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::Ivon;
    /// # fn main() -> tch_blr::Result<()> {
    /// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// let mut opt = Ivon::auto(60_000.0, 4_000).build(&vs, 0.01)?;
    /// opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Noise that starts at 3 % of each parameter's scale (`relative_noise` 0.03), [`StepLength::Adam`] with β
    /// 0.99, `max_growth` 2, β₂ = 1-1/steps, the prior N(0, 1) (`weight_decay` 1/ess), and the schedule: warm-up over a
    /// tenth of the steps, cosine to 0 at the last. [`Builder::map`] changes settings. The rule of the precision and
    /// the fixed points are IVON's. `docs/tuning.md` says where it comes from.
    pub fn auto(ess: f64, steps: u64) -> Builder<Self> {
        auto::settings!(Ivon::default(), ess, steps).max_growth(2.0).schedule(auto::schedule(steps))
    }
}

impl Row for Ivon {
    const NAME: &'static str = "ivon";
    const STATE: &'static [&'static str] = &["momentum", "hess", "square"];
    type Arithmetic = Weights;
    type Posterior = DiagonalGaussian;
    fields!(weight_decay ess expectation);

    fn validate(&self) -> Result<()> {
        check::ess(self.ess)?;
        check::positive("hess_init", self.hess_init)?;
        check::rate("beta1", self.beta1)?;
        check::rate("beta2", self.beta2)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        self.expectation.check_sampled()?;
        let known = matches!(self.hessian, Statistic::Price | Statistic::SquaredGradient);
        check::that("hessian", self.hessian, known, "Price or SquaredGradient")?;
        self.square_scale.map_or(Ok(()), |scale| check::positive("square_scale", scale))?;
        self.max_growth.map_or(Ok(()), auto::check_growth)?;
        auto::validate(self.relative_noise, self.step_length)?;
        self.clip_radius.map_or(Ok(()), |xi| check::positive("clip_radius", xi))
    }
    fn initial_share(&self, t: u64) -> Option<f64> {
        Some(retracted_share(self.beta2, t))
    }
    fn statistic(&self) -> Statistic {
        self.hessian
    }
}

samples!(Ivon);

impl Rule for Ivon {
    type State<T: Real> = [T; 3];
    type Coefficients<T: Real> = [T; 14];
    const FORMED: &'static [Statistic] = &[Statistic::SquaredGradient, Statistic::Price];

    fn initial(&self, start: Start) -> [f64; 3] {
        let ess = self.ess.unwrap_or(f64::NAN);
        [0.0, auto::hess_init(self.hess_init, self.relative_noise, start, ess), 0.0]
    }
    fn keeps(&self, state: usize) -> bool {
        state < 2 || self.step_length.has_squares()
    }
    fn coefficients(&self, when: When) -> [f64; 14] {
        // `validate` has refused a row without it.
        let ess = self.ess.unwrap_or(f64::NAN);
        // A number for all weights, also under a prior of tensors, so that directions of high precision keep small
        // steps.
        let rescaled = self.rescale_lr && self.step_length == StepLength::Newton;
        let c = if rescaled { self.hess_init + self.weight_decay } else { 1.0 };
        // Infinite at t = 0, where only the precision is asked for.
        let debias = if self.debias { 1.0 / (1.0 - self.beta1.powf(when.t as f64)) } else { 1.0 };
        let r = 1.0 - self.beta2;
        let scale = self.square_scale.filter(|_| self.hessian == Statistic::SquaredGradient).unwrap_or(ess);
        let xi = self.clip_radius.unwrap_or(f64::INFINITY);
        let growth = self.max_growth.unwrap_or(f64::INFINITY);
        let [d0, d1, d2, d3] = self.step_length.coefficients(when.t);
        let lr = when.lr * c;
        [ess, scale, lr, self.beta1, 1.0 - self.beta1, debias, r, 0.5 * r * r, xi, growth, d0, d1, d2, d3]
    }
    #[inline(always)]
    fn update<T: Real>(&self, k: [T; 14], x: Site<T>, [b, h, square]: [T; 3]) -> (T, [T; 3]) {
        let [ess, scale, lr, beta1, fresh, debias, r, half_r2, xi, growth, divisor @ ..] = k;
        let f = match self.hessian {
            Statistic::SquaredGradient => x.curvature * scale,
            // The precision that e was drawn with. Any other would bias h.
            _ => x.curvature * (scale * (h + x.delta)),
        };
        let b = beta1 * b + fresh * x.gradient;
        // The last term makes h+δ at least half of what it was, for any f, since S(1 + x + x²/2) ≥ S/2.
        let old = h + x.delta;
        let h = h + r * (f - h) + half_r2 * (f - h) * (f - h) / old;
        let h = if self.max_growth.is_some() { h.min(growth * old - x.delta) } else { h };
        let (d, square) = self.step_length.divisor(divisor, x, (ess, x.delta, h + x.delta), square);
        let pull = match self.prior_pull {
            PriorPull::Precision => x.delta,
            PriorPull::Unit => T::real(1.0),
        };
        let v = (b * debias + pull * (x.mean - x.prior_mean)) / d;
        (x.mean - lr * v.min(xi).max(-xi), [b, h, square])
    }
    #[inline(always)]
    fn precision<T: Real>(&self, [ess, ..]: [T; 14], delta: T, [_, h, _]: [T; 3]) -> T {
        ess * (h + delta)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Second step at h = 1, δ = 1, r = ½: f = ½·2·(1+1) = 2 by Price's theorem (λ = 2) and by the scaled square, so
    /// h ← 1 + ½ + ⅛·1/2; b = ½·1 + ½·3 = 2, and the mean moves along 2/0.75 + 1·(2-1).
    #[test]
    fn one_step_by_hand() {
        let rule = Ivon::default().ess(2.0).hess_init(3.0).beta1(0.5).beta2(0.5).weight_decay(1.0);
        let site = Site { mean: 2.0, gradient: 3.0, curvature: 0.5, prior_mean: 1.0, delta: 1.0 };
        let v = (2.0 / 0.75 + 1.0) / 2.5625;
        for (rule, step) in [
            (rule, 0.4 * v),
            (rule.rescale_lr(false), 0.1 * v),
            (rule.debias(false).rescale_lr(false), 0.1 * 3.0 / 2.5625),
            (rule.clip_radius(1.25), 0.4 * 1.25),
            (rule.hessian(Statistic::SquaredGradient).square_scale(4.0), 0.4 * v),
        ] {
            let k = rule.coefficients(When { t: 2, lr: 0.1 });
            let (m, state) = rule.update(k, site, [1.0, 1.0, 0.0]);
            assert!((m - (2.0 - step)).abs() < 1e-15, "{m}");
            assert_eq!(state, [2.0, 1.5625, 0.0]);
            assert_eq!(rule.precision(k, 1.0, state), 2.0 * 2.5625);
        }
    }

    /// f = 50·2·2 = 200 would take h+δ from 2 to 101 + ½·99.5²·2 in one step; growth by 3 leaves 6. In the step of
    /// Adam's length d² = (½·0 + ½·4²)/¾ + 1/2.
    #[test]
    fn growth_and_step_length_by_hand() {
        let rule = Ivon::default().ess(2.0).beta1(0.5).beta2(0.5).max_growth(3.0);
        let rule = rule.step_length(StepLength::Adam { beta: 0.5 });
        let site = Site { mean: 2.0, gradient: 3.0, curvature: 50.0, prior_mean: 1.0, delta: 1.0 };
        let (m, state) = rule.update(rule.coefficients(When { t: 2, lr: 0.1 }), site, [1.0, 1.0, 0.0]);
        assert_eq!(state, [2.0, 5.0, 8.0]);
        let d = (8.0 / 0.75 + 0.5_f64).sqrt();
        assert!((m - (2.0 - 0.1 * (2.0 / 0.75 + 1.0) / d)).abs() < 1e-15, "{m}");
    }

    /// ess 100 and a prior of precision 20 around ½, h 0.3 and b 0.04: m = 0.8 moves by 0.1 (0.04 + δ·0.3)/0.5 with δ
    /// = 0.2, and with 1 in its place.
    #[test]
    fn pulls_towards_the_prior() {
        let rule = Ivon::default().ess(100.0).beta1(0.0).beta2(0.0).rescale_lr(false);
        // f = h, so that h stays.
        let site = Site { mean: 0.8, gradient: 0.04, curvature: 0.3 / 50.0, prior_mean: 0.5, delta: 0.2 };
        for (pull, expected) in [(PriorPull::Precision, 0.78), (PriorPull::Unit, 0.732)] {
            let rule = rule.prior_pull(pull);
            let (m, [_, h, _]) = rule.update(rule.coefficients(When { t: 1, lr: 0.1 }), site, [0.0, 0.3, 0.0]);
            assert!((m - expected).abs() < 1e-15 && (h - 0.3).abs() < 1e-15, "{m} {h}");
        }
    }

    /// Shen et al. (2024) and their `ivon-opt`, where learning rate and ess have no default.
    #[test]
    fn defaults_are_those_of_the_paper() {
        let Ivon { ess, hess_init, beta1, beta2, weight_decay, expectation, .. } = Ivon::default();
        assert_eq!((ess, hess_init, beta1, beta2, weight_decay), (None, 1.0, 0.9, 0.99999, 1e-4));
        assert_eq!(expectation, Expectation::MonteCarlo { samples: 1 });
        let Ivon {
            hessian, clip_radius, debias, rescale_lr, relative_noise, max_growth, step_length, prior_pull, ..
        } = Ivon::default();
        assert_eq!(prior_pull, PriorPull::Precision);
        assert_eq!((relative_noise, max_growth, step_length), (None, None, StepLength::Newton));
        assert_eq!((hessian, clip_radius), (Statistic::Price, None));
        assert!(debias && rescale_lr);
    }
}
