//! Variational online Newton with a full covariance.

use super::newton::{full_posterior, structured_fields, with_prior};
use super::rule::{When, config};
use super::von::PrecisionInStep;
use crate::posterior::FullGaussian;
use crate::structured::{Block, Evaluated, Learned, SecondDerivatives, StructuredRule};
use crate::{Expectation, Result, check, linalg};
use tch::{Kind, Tensor};

/// How [`FullVon`] estimates the Hessian E_q\[∇²L\].
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum FullHessian {
    /// F = ½(λS e ĝᵀ + ĝ eᵀ λS): Price's theorem from gradients alone. Unbiased and noisy; antithetic samples take out what
    /// the gradient at the mean adds to the noise.
    Price,
    /// F = ∇²L(m+e), by a backward pass for each weight.
    Exact,
}

config! {
    /// Variational online Newton with a full covariance, for small models.
    ///
    /// Row of the table: Gaussian with full covariance; nothing but the stochastic approximation is left out.
    ///
    /// ```text
    /// S = H + δI,  e ~ N(0, (λS)⁻¹)      λ = ess
    /// ĝ = ∇L(m+e), F: see FullHessian     averaged over samples
    /// R = S + r(F - H)                   r = 1-β₂: S ← (1-r)S + r(F+δI)
    /// S ← ½(S + R S⁻¹ R)                 improved; plain: S ← R
    /// m ← m - α S⁻¹ (ĝ + δm)
    /// ```
    ///
    /// The improved rule adds ½r²(F-H)S⁻¹(F-H) to the plain one, so S never falls below half of itself and stays positive
    /// definite whatever F is; both have the fixed points of E\[F\] = H. Where the plain rule's S is not positive
    /// definite, the step is an error. With S = LLᵀ the second term is ½UᵀU, U = L⁻¹R. The posterior is N(m, (λS)⁻¹).
    ///
    /// With α = r = 1, the plain rule, and exact expectations, one step gives the exact posterior of a linear regression.
    ///
    /// Sources: Khan and Rue, *The Bayesian Learning Rule* (2023), section 1.3; Lin, Schmidt and Khan, *Handling the
    /// Positive-Definite Constraint in the Bayesian Learning Rule* (ICML 2020) for the improved rule.
    pub struct FullVon {
        /// Learning rate α ≥ 0; default 0.1. The argument of `build` takes its place.
        lr: f64 = 0.1;
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
        /// How E_q\[∇²L\] is estimated; default Price.
        hessian: FullHessian = FullHessian::Price;
        /// Whether the precision follows the improved rule; default on.
        improved: bool = true;
        /// Which precision divides the step of the mean; default the new one.
        precision_in_step: PrecisionInStep = PrecisionInStep::New;
    }
}

impl FullVon {
    fn precision(&self, hess: &Tensor) -> Tensor {
        with_prior(hess, self.weight_decay)
    }

    /// L with S = LLᵀ.
    fn factor(&self, hess: &Tensor) -> Result<Tensor> {
        linalg::cholesky("the precision", &self.precision(hess))
    }
}

impl StructuredRule for FullVon {
    const NAME: &'static str = "full von";
    const STATE: &'static [&'static str] = &["hess"];
    const JOINT: bool = true;
    type Posterior = FullGaussian;
    structured_fields!();

    fn validate(&self) -> Result<()> {
        check::non_negative("lr", self.lr)?;
        check::ess(self.ess)?;
        check::non_negative("weight_decay", self.weight_decay)?;
        check::non_negative("hess_init", self.hess_init)?;
        check::positive("hess_init + weight_decay", self.hess_init + self.weight_decay)?;
        check::rate("beta2", self.beta2)?;
        self.expectation.validate()?;
        let sampled = self.hessian != FullHessian::Price || self.expectation != Expectation::Delta;
        let expected = "an expectation with samples: Price's estimate is zero at the mean";
        check::that("hessian", self.hessian, sampled, expected)
    }
    fn expectation(&self) -> Expectation {
        self.expectation
    }
    fn second_derivatives(&self) -> SecondDerivatives {
        match self.hessian {
            FullHessian::Price => SecondDerivatives::Unused,
            FullHessian::Exact => SecondDerivatives::Hessian,
        }
    }
    fn initial(&self, mean: &Tensor) -> Vec<Tensor> {
        vec![with_prior(&Tensor::zeros([mean.size()[0]; 2], (Kind::Double, mean.device())), self.hess_init)]
    }
    fn displacement(&self, z: &Tensor, state: &[Tensor]) -> Result<Tensor> {
        Ok(linalg::spread(&self.factor(&state[0])?, z)? / check::ess(self.ess)?.sqrt())
    }
    /// e ĝᵀ, or the Hessian.
    fn statistics(&self, x: &Evaluated, _: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![match x.second.first() {
            Some(hessian) => hessian.shallow_clone(),
            None => x.displacement.f_outer(x.gradient)?,
        }])
    }
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let (hess, delta, r) = (&state[0], self.weight_decay, 1.0 - self.beta2);
        let s = self.precision(hess);
        let old = linalg::cholesky("the precision", &s)?;
        let f = match self.hessian {
            FullHessian::Exact => x.statistics[0].shallow_clone(),
            FullHessian::Price => linalg::symmetric(&s.f_matmul(&x.statistics[0])?)? * check::ess(self.ess)?,
        };
        let plain = &s + (f - hess) * r;
        let s = if self.improved {
            let u = linalg::forward(&old, &plain)?;
            (s + u.f_tr()?.f_matmul(&u)?) * 0.5
        } else {
            plain
        };
        let new = linalg::cholesky("the updated precision", &s)?;
        let l = match self.precision_in_step {
            PrecisionInStep::New => &new,
            PrecisionInStep::Old => &old,
        };
        let step = linalg::solve(l, &(x.gradient + x.mean * delta))?;
        Ok((x.mean - step * (self.lr * when.lr_factor), vec![with_prior(&s, -delta)]))
    }
    fn posterior(_: When, blocks: Vec<Learned<Self>>) -> Result<FullGaussian> {
        full_posterior(|c: Self| c.weight_decay, blocks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One weight, h = δ = 1, λ = 2, r = ½: f = 2·2·½ = 2, so R = 2 + ½ and S ← ½(2 + 2.5²/2) = 2.5625, as in Ivon;
    /// u = 3 + 1·2.
    #[test]
    fn one_step_by_hand() {
        let t = |x: f64| Tensor::from_slice(&[x]);
        let rule = FullVon::default().lr(0.5).ess(2.0).weight_decay(1.0).beta2(0.5);
        let statistics = [t(0.5).reshape([1, 1])];
        let (mean, gradient) = (t(2.0), t(3.0));
        let x = Block { mean: &mean, gradient: &gradient, statistics: &statistics };
        for (rule, s, divisor) in [
            (rule, 2.5625, 2.5625),
            (rule.improved(false), 2.5, 2.5),
            (rule.precision_in_step(PrecisionInStep::Old), 2.5625, 2.0),
            (rule.hessian(FullHessian::Exact), 2.0 - 0.25 + 0.5 * 0.25 * 0.25 / 2.0, 1.765_625),
        ] {
            let (m, state) = rule.update(When { t: 1, lr_factor: 1.0 }, &x, &rule.initial(&mean)).unwrap();
            let (m, h) = (m.double_value(&[0]), state[0].double_value(&[0, 0]));
            assert!((m - (2.0 - 0.5 * 5.0 / divisor)).abs() < 1e-15 && (h + 1.0 - s).abs() < 1e-15, "{m} {h}");
        }
    }

    #[test]
    fn values_out_of_range_are_named() {
        let rule = FullVon::default().ess(10.0);
        rule.validate().unwrap();
        for (bad, field) in [
            (rule.lr(f64::NAN), "lr"),
            (FullVon::default(), "ess"),
            (rule.weight_decay(-1.0), "weight_decay"),
            (rule.hess_init(-1.0), "hess_init"),
            (rule.hess_init(0.0).weight_decay(0.0), "hess_init + weight_decay"),
            (rule.beta2(1.0), "beta2"),
            (rule.expectation(Expectation::MonteCarlo { samples: 0 }), "samples"),
            (rule.expectation(Expectation::Delta), "hessian"),
        ] {
            let e = bad.validate().unwrap_err().to_string();
            assert!(e.contains(&format!("`{field}`")), "{e}");
        }
    }
}
