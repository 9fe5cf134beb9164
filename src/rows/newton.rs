//! Newton's method, and its running average: the Gaussian rows of the delta method.

use super::rule::{When, config};
use crate::posterior::{DiagonalGaussian, FullGaussian};
use crate::structured::{Block, Evaluated, Learned, SecondDerivatives, StructuredRule};
use crate::{Error, Result, check, linalg};
use tch::{Kind, Tensor};

config! {
    /// Newton's method with the full Hessian, for small models.
    ///
    /// Row of the table: Gaussian with full covariance; delta method.
    ///
    /// ```text
    /// ĝ = ∇L(m)
    /// H ← β₂ H + (1-β₂) ∇²L(m)
    /// S = H + δI
    /// m ← m - α S⁻¹ (ĝ + δm)
    /// ```
    ///
    /// With the defaults α = 1 and β₂ = 0 (a step of size ρ = 1) a quadratic loss is solved in one step. At the minimum the
    /// posterior N(m, (λS)⁻¹) is Laplace's approximation; it has the Hessian of the point that the last step started
    /// from. Where S is not positive definite the step is an error; raise δ, or take [`FullVon`](crate::FullVon), whose
    /// improved rule keeps it positive.
    ///
    /// The Hessian takes a backward pass for each weight, and its factorization n³/3 operations.
    ///
    /// Source: Khan and Rue, *The Bayesian Learning Rule* (2023), section 1.3.
    pub struct Newton {
        /// Learning rate α ≥ 0; default 1. The argument of `build` takes its place.
        lr: f64 = 1.0;
        /// Effective sample size λ > 0, usually the number of training examples; only needed for a posterior. Default: none.
        ess: Option<f64> = None, via f64;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 0.
        weight_decay: f64 = 0.0;
        /// H before the first step is this ≥ 0 times the identity; default 0. It counts where β₂ > 0.
        hess_init: f64 = 0.0;
        /// β₂ in [0, 1), decay of the Hessian average; default 0.
        beta2: f64 = 0.0;
    }
}

/// The fields that all rows of this kind have.
macro_rules! structured_fields {
    () => {
        fn learning_rate(&self) -> f64 {
            self.lr
        }
        fn with_learning_rate(self, lr: f64) -> Self {
            self.lr(lr)
        }
        fn effective_sample_size(&self) -> Option<f64> {
            self.ess
        }
        fn with_weight_decay(self, delta: f64) -> Self {
            self.weight_decay(delta)
        }
    };
}
pub(super) use structured_fields;

/// S = H + δI
pub(super) fn with_prior(hess: &Tensor, delta: f64) -> Tensor {
    hess + Tensor::eye(hess.size()[0], (hess.kind(), hess.device())) * delta
}

/// N(m, (λ(H + δI))⁻¹)
pub(super) fn full_posterior<R: StructuredRule>(
    delta: impl Fn(R) -> f64,
    blocks: Vec<Learned<R>>,
) -> Result<FullGaussian> {
    let Some(Learned { config, means, state }) = blocks.into_iter().next() else {
        return Err(Error::Posterior("it has no parameter".to_owned()));
    };
    let ess = check::ess(config.effective_sample_size())?;
    FullGaussian::new(means, &(with_prior(&state[0], delta(config)) * ess))
}

impl StructuredRule for Newton {
    const NAME: &'static str = "newton";
    const STATE: &'static [&'static str] = &["hess"];
    const JOINT: bool = true;
    type Posterior = FullGaussian;
    structured_fields!();

    fn validate(&self) -> Result<()> {
        check::non_negative("lr", self.lr)?;
        self.ess.map_or(Ok(()), |ess| check::positive("ess", ess))?;
        check::non_negative("weight_decay", self.weight_decay)?;
        check::non_negative("hess_init", self.hess_init)?;
        check::rate("beta2", self.beta2)
    }
    fn second_derivatives(&self) -> SecondDerivatives {
        SecondDerivatives::Hessian
    }
    fn initial(&self, mean: &Tensor) -> Vec<Tensor> {
        vec![with_prior(&Tensor::zeros([mean.size()[0]; 2], (Kind::Double, mean.device())), self.hess_init)]
    }
    fn statistics(&self, x: &Evaluated, _: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(x.second.iter().map(Tensor::shallow_clone).collect())
    }
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let hess = &state[0] * self.beta2 + &x.statistics[0] * (1.0 - self.beta2);
        let l = linalg::cholesky("the Hessian with the prior", &with_prior(&hess, self.weight_decay))?;
        let step = linalg::solve(&l, &(x.gradient + x.mean * self.weight_decay))?;
        Ok((x.mean - step * (self.lr * when.lr_factor), vec![hess]))
    }
    fn posterior(_: When, blocks: Vec<Learned<Self>>) -> Result<FullGaussian> {
        full_posterior(|c: Self| c.weight_decay, blocks)
    }
}

/// How [`DiagonalNewton`] finds the diagonal of the Hessian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum HessianDiagonal {
    /// Exactly, by a backward pass for each weight.
    Exact,
    /// Hutchinson's estimate, the mean of v ⊙ (∇²L v) over vectors of random signs, one backward pass each: unbiased, and
    /// exact where the Hessian is diagonal.
    Hutchinson {
        /// Number of vectors, 1 to 1024.
        probes: usize,
    },
}

config! {
    /// Online Newton with the diagonal of the Hessian.
    ///
    /// Row of the table: Gaussian with diagonal covariance; delta method.
    ///
    /// ```text
    /// ĝ = ∇L(m)
    /// h ← β₂ h + (1-β₂) diag ∇²L(m)
    /// m ← m - α (ĝ + δm)/(h + δ)
    /// ```
    ///
    /// The posterior is N(m, 1/(λ(h+δ))). Where an element of h+δ is not positive the step is an error.
    ///
    /// Sources: Khan and Rue, *The Bayesian Learning Rule* (2023), section 4.4; Hutchinson (1989) for the estimate.
    pub struct DiagonalNewton {
        /// Learning rate α ≥ 0; default 1. The argument of `build` takes its place.
        lr: f64 = 1.0;
        /// Effective sample size λ > 0, usually the number of training examples; only needed for a posterior. Default: none.
        ess: Option<f64> = None, via f64;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 0.
        weight_decay: f64 = 0.0;
        /// h before the first step, ≥ 0; default 0. It counts where β₂ > 0.
        hess_init: f64 = 0.0;
        /// β₂ in [0, 1), decay of the Hessian average; default 0.
        beta2: f64 = 0.0;
        /// How the diagonal is found; default exactly.
        hessian: HessianDiagonal = HessianDiagonal::Exact;
    }
}

impl StructuredRule for DiagonalNewton {
    const NAME: &'static str = "diagonal newton";
    const STATE: &'static [&'static str] = &["hess"];
    const JOINT: bool = true;
    type Posterior = DiagonalGaussian;
    structured_fields!();

    fn validate(&self) -> Result<()> {
        let Self { lr, ess, weight_decay, hess_init, beta2, .. } = *self;
        Newton { lr, ess, weight_decay, hess_init, beta2 }.validate()?;
        match self.hessian {
            HessianDiagonal::Exact => Ok(()),
            HessianDiagonal::Hutchinson { probes } => {
                check::that("probes", probes, (1..=1024).contains(&probes), "a number from 1 to 1024")
            }
        }
    }
    fn second_derivatives(&self) -> SecondDerivatives {
        match self.hessian {
            HessianDiagonal::Exact => SecondDerivatives::Diagonal,
            HessianDiagonal::Hutchinson { probes } => SecondDerivatives::Hutchinson { probes },
        }
    }
    fn initial(&self, mean: &Tensor) -> Vec<Tensor> {
        vec![mean.full_like(self.hess_init)]
    }
    fn statistics(&self, x: &Evaluated, _: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(x.second.iter().map(Tensor::shallow_clone).collect())
    }
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let hess = &state[0] * self.beta2 + &x.statistics[0] * (1.0 - self.beta2);
        let precision = &hess + self.weight_decay;
        if precision.numel() > 0 && precision.min().double_value(&[]) <= 0.0 {
            let problem = format!("its smallest element is {:e}", precision.min().double_value(&[]));
            return Err(Error::NotPositiveDefinite {
                what: "the Hessian's diagonal with the prior".to_owned(),
                problem,
            });
        }
        let step = (x.gradient + x.mean * self.weight_decay) / precision;
        Ok((x.mean - step * (self.lr * when.lr_factor), vec![hess]))
    }
    fn posterior(_: When, blocks: Vec<Learned<Self>>) -> Result<DiagonalGaussian> {
        let mut entries = Vec::new();
        for Learned { config, means, state } in blocks {
            let precision = (&state[0] + config.weight_decay) * check::ess(config.ess)?;
            let mut first = 0;
            let entry = move |(name, mean): (String, Tensor)| {
                let n = mean.numel() as i64;
                first += n;
                let s = precision.narrow(0, first - n, n).reshape(mean.size());
                (name, mean, s)
            };
            entries.extend(means.into_iter().map(entry));
        }
        DiagonalGaussian::new(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(x: &[f64]) -> Tensor {
        Tensor::from_slice(x)
    }

    /// H ← ½·2I + ½[[3, 1], [1, 3]] = [[2.5, ½], [½, 2.5]], S = H + ½I = [[3, ½], [½, 3]], u = (1, 2) + ½(2, -2) = (2, 1),
    /// S⁻¹u = (5.5, 2)/8.75.
    #[test]
    fn one_step_by_hand() {
        let rule = Newton::default().lr(0.5).weight_decay(0.5).hess_init(2.0).beta2(0.5);
        let (mean, gradient) = (row(&[2.0, -2.0]), row(&[1.0, 2.0]));
        let statistics = [row(&[3.0, 1.0, 1.0, 3.0]).reshape([2, 2])];
        let x = Block { mean: &mean, gradient: &gradient, statistics: &statistics };
        let when = When { t: 1, lr_factor: 0.5 };
        let (m, state) = rule.update(when, &x, &rule.initial(&mean)).unwrap();
        let close = |a: &Tensor, b: &[f64]| assert!((a.reshape([-1]) - row(b)).abs().max().double_value(&[]) < 1e-15);
        close(&m, &[2.0 - 0.25 * 5.5 / 8.75, -2.0 - 0.25 * 2.0 / 8.75]);
        close(&state[0], &[2.5, 0.5, 0.5, 2.5]);

        let rule = DiagonalNewton::default().lr(0.5).weight_decay(0.5).hess_init(2.0).beta2(0.5);
        let x = Block { statistics: &[row(&[3.0, 1.0])], ..x };
        let (m, state) = rule.update(when, &x, &rule.initial(&mean)).unwrap();
        close(&m, &[2.0 - 0.25 * 2.0 / 3.0, -2.0 - 0.25 * 1.0 / 2.0]);
        close(&state[0], &[2.5, 1.5]);
    }

    #[test]
    fn values_out_of_range_are_named() {
        for (bad, field) in [
            (Newton::default().lr(-1.0), "lr"),
            (Newton::default().ess(0.0), "ess"),
            (Newton::default().weight_decay(f64::NAN), "weight_decay"),
            (Newton::default().hess_init(-1.0), "hess_init"),
            (Newton::default().beta2(1.0), "beta2"),
        ] {
            let e = bad.validate().unwrap_err().to_string();
            assert!(e.contains(&format!("`{field}`")), "{e}");
        }
        let none = DiagonalNewton::default().hessian(HessianDiagonal::Hutchinson { probes: 0 });
        assert!(none.validate().unwrap_err().to_string().contains("`probes`"));
        assert!(DiagonalNewton::default().beta2(1.0).validate().is_err());
    }
}
