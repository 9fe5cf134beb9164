//! Variational online Newton with a full covariance.

use super::common::{config, fields, full_posterior, initial_hessian, samples};
use super::von::PrecisionInStep;
use crate::driver::{Block, BlockRule, Blocks, Displaced, Evaluated, Learned, Row, When};
use crate::posterior::FullGaussian;
use crate::prior::{BlockPrior, Family};
use crate::{Expectation, Result, Statistic, check, linalg};
use tch::Tensor;

config! {
    /// Variational online Newton with a full covariance, for small models.
    ///
    /// Row of the table: Gaussian with full covariance; nothing but the stochastic approximation is left out.
    ///
    /// ```text
    /// S = H + Δ,  e ~ N(0, (λS)⁻¹)       λ = ess; Δ = δI, or P₀/λ of a posterior as prior
    /// ĝ = ∇L(m+e), F: see `hessian`       averaged over samples
    /// R = S + r(F - H)                   r = 1-β₂: S ← (1-r)S + r(F+Δ)
    /// S ← ½(S + R S⁻¹ R)                 improved; plain: S ← R
    /// m ← m - α S⁻¹ (ĝ + Δ(m-m₀))
    /// ```
    ///
    /// The improved rule adds ½r²(F-H)S⁻¹(F-H) to the plain one, so S never falls below half of itself and stays
    /// positive definite whatever F is; both have the fixed points of E\[F\] = H. Where the plain rule's S is not
    /// positive definite, the step is an error. With S = LLᵀ the second term is ½UᵀU, U = L⁻¹R. The posterior is N(m,
    /// (λS)⁻¹).
    ///
    /// With α = r = 1, the plain rule, and exact expectations, one step gives the exact posterior of a linear
    /// regression.
    ///
    /// Sources: Khan and Rue, *The Bayesian Learning Rule* (2023), section 1.3; Lin, Schmidt and Khan, *Handling the
    /// Positive-Definite Constraint in the Bayesian Learning Rule* (ICML 2020) for the improved rule.
    pub struct FullVon {
        /// Effective sample size λ > 0, usually the number of training examples (`docs/scales.md`). Must be set.
        ess: Option<f64> = None, via f64;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 1e-4.
        weight_decay: f64 = 1e-4;
        /// H before the first step is this ≥ 0 times the identity, with hess_init + δ > 0; default 1.
        hess_init: f64 = 1.0;
        /// β₂ in [0, 1), decay of the Hessian average; default 0.9.
        beta2: f64 = 0.9;
        /// Where the expectations are evaluated; default one Monte-Carlo sample.
        expectation: Expectation = Expectation::MonteCarlo { samples: 1 };
        /// How E_q\[∇²L\] is estimated: by [`Statistic::Price`], F = ½(λS e ĝᵀ + ĝ eᵀ λS) from gradients alone,
        /// unbiased and noisy (antithetic samples take out what the gradient at the mean adds to the noise), the
        /// default; or by [`Statistic::Hessian`], F = ∇²L(m+e) by a backward pass for each weight.
        hessian: Statistic = Statistic::Price;
        /// Whether the precision follows the improved rule; default on.
        improved: bool = true;
        /// Which precision divides the step of the mean; default the new one.
        precision_in_step: PrecisionInStep = PrecisionInStep::New;
    }
}

samples!(FullVon);

impl Row for FullVon {
    const NAME: &'static str = "full_von";
    const STATE: &'static [&'static str] = &["hess"];
    type Arithmetic = Blocks;
    type Posterior = FullGaussian;
    fields!(weight_decay ess expectation beta2);

    fn validate(&self) -> Result<()> {
        check::ess(self.ess)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        check::non_negative("hess_init", self.hess_init)?;
        check::positive("hess_init + weight_decay", self.hess_init + self.weight_decay)?;
        check::rate("beta2", self.beta2)?;
        self.expectation.validate()?;
        let known = matches!(self.hessian, Statistic::Price | Statistic::Hessian);
        check::that("hessian", self.hessian, known, "Price or Hessian")?;
        let sampled = self.hessian != Statistic::Price || self.expectation != Expectation::Delta;
        let expected = "an expectation with samples: Price's estimate is zero at the mean";
        check::that("hessian", self.hessian, sampled, expected)
    }
    fn statistic(&self) -> Statistic {
        self.hessian
    }
}

impl BlockRule for FullVon {
    const JOINT: bool = true;
    const PRIOR: Family = Family::Full;

    fn initial(&self, _: &[i64], mean: &Tensor, prior: &BlockPrior) -> Result<Vec<Tensor>> {
        Ok(vec![initial_hessian(mean, prior, self.hess_init)])
    }
    fn displacement(&self, _: u64, z: &Tensor, state: &[Tensor], prior: &BlockPrior) -> Result<Displaced> {
        let l = linalg::cholesky("the precision", &prior.add_to(&state[0], 1.0)?)?;
        Ok((linalg::spread(&l, z)? / check::ess(self.ess)?.sqrt()).into())
    }
    /// e ĝᵀ, or the Hessian.
    fn statistics(&self, x: &Evaluated, _: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![match x.second.first() {
            Some(hessian) => hessian.shallow_clone(),
            None => x.displacement.f_outer(x.gradient)?,
        }])
    }
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let (hess, r) = (&state[0], 1.0 - self.beta2);
        let s = x.prior.add_to(hess, 1.0)?;
        let old = linalg::cholesky("the precision", &s)?;
        let f = match self.hessian {
            // One product for all samples: S is the same in each, so e ĝᵀ is averaged first.
            Statistic::Price => linalg::symmetric(&s.f_matmul(&x.statistics[0])?)? * check::ess(self.ess)?,
            _ => x.statistics[0].shallow_clone(),
        };
        // Both rules start from R = S + r(F-H).
        let plain = &s + (f - hess) * r;
        let s = if self.improved {
            // As a sum of two positive terms, which loses no digits where R is far from positive.
            let u = linalg::forward(&old, &plain)?;
            (s + u.f_tr()?.f_matmul(&u)?) * 0.5
        } else {
            plain
        };
        // Also where the old one divides: a precision that is not positive must never become the state.
        let new = linalg::cholesky("the updated precision", &s)?;
        let l = match self.precision_in_step {
            PrecisionInStep::New => &new,
            PrecisionInStep::Old => &old,
        };
        let step = linalg::solve(l, &(x.gradient + x.prior.pull(x.mean)?))?;
        // H without the prior, which may change between steps.
        Ok((x.mean - step * when.lr, vec![x.prior.add_to(&s, -1.0)?]))
    }
    fn posterior(blocks: Vec<Learned<Self>>) -> Result<FullGaussian> {
        full_posterior(blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::super::common::testing::refused;
    use super::*;

    /// One weight, h = δ = 1, λ = 2, r = ½: f = 2·2·½ = 2, so R = 2 + ½ and S ← ½(2 + 2.5²/2) = 2.5625, as in Ivon;
    /// u = 3 + 1·2.
    #[test]
    fn one_step_by_hand() {
        let t = |x: f64| Tensor::from_slice(&[x]);
        let rule = FullVon::default().ess(2.0).weight_decay(1.0).beta2(0.5);
        let statistics = [t(0.5).reshape([1, 1])];
        let (mean, gradient) = (t(2.0), t(3.0));
        let prior = &BlockPrior::isotropic(1.0);
        let x = Block { mean: &mean, gradient: &gradient, statistics: &statistics, prior };
        for (rule, s, divisor) in [
            (rule, 2.5625, 2.5625),
            (rule.improved(false), 2.5, 2.5),
            (rule.precision_in_step(PrecisionInStep::Old), 2.5625, 2.0),
            (rule.hessian(Statistic::Hessian), 2.0 - 0.25 + 0.5 * 0.25 * 0.25 / 2.0, 1.765_625),
        ] {
            let (m, state) =
                rule.update(When { t: 1, lr: 0.5 }, &x, &rule.initial(&mean.size(), &mean, prior).unwrap()).unwrap();
            let (m, h) = (m.double_value(&[0]), state[0].double_value(&[0, 0]));
            assert!((m - (2.0 - 0.5 * 5.0 / divisor)).abs() < 1e-15 && (h + 1.0 - s).abs() < 1e-15, "{m} {h}");
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        let rule = FullVon::default().ess(10.0);
        rule.validate().unwrap();
        refused([
            (FullVon::default(), "ess"),
            (rule.weight_decay(-1.0), "weight_decay"),
            (rule.hess_init(-1.0), "hess_init"),
            (rule.hess_init(0.0).weight_decay(0.0), "hess_init + weight_decay"),
            (rule.beta2(1.0), "beta2"),
            (rule.expectation(Expectation::MonteCarlo { samples: 0 }), "samples"),
            (rule.expectation(Expectation::Delta), "hessian"),
        ]);
    }
}
