//! Newton's method, with the full Hessian and with its diagonal: the Gaussian rows of the delta method.

use super::common::{config, fields, full_posterior, initial_hessian};
use crate::driver::{Block, BlockRule, Blocks, Learned, Row, When};
use crate::posterior::{DiagonalGaussian, FullGaussian};
use crate::prior::{BlockPrior, Family};
use crate::{Error, Result, Statistic, check, linalg};
use tch::Tensor;

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
    /// With the defaults α = 1 and β₂ = 0 (a step of size ρ = 1) a quadratic loss is solved in one step. At the minimum
    /// the posterior N(m, (λS)⁻¹) is Laplace's approximation; its Hessian is that of the point where the last step
    /// started. Where S is not positive definite the step is an error; raise δ, or take [`FullVon`](crate::FullVon),
    /// whose improved rule keeps it positive.
    ///
    /// The Hessian takes a backward pass for each weight, and its factorization n³/3 operations.
    ///
    /// Source: Khan and Rue, *The Bayesian Learning Rule* (2023), section 1.3.
    pub struct Newton {
        /// Effective sample size λ > 0, usually the number of training examples; only needed for a posterior. Default:
        /// none.
        ess: Option<f64> = None, via f64;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 0.
        weight_decay: f64 = 0.0;
        /// H before the first step is this ≥ 0 times the identity; default 0. It counts where β₂ > 0.
        hess_init: f64 = 0.0;
        /// β₂ in [0, 1), decay of the Hessian average; default 0.
        beta2: f64 = 0.0;
    }
}

impl Row for Newton {
    const NAME: &'static str = "newton";
    const STATE: &'static [&'static str] = &["hess"];
    type Arithmetic = Blocks;
    type Posterior = FullGaussian;
    fields!(weight_decay ess);

    fn validate(&self) -> Result<()> {
        self.ess.map_or(Ok(()), |ess| check::positive("ess", ess))?;
        check::non_negative("weight_decay", self.weight_decay)?;
        check::non_negative("hess_init", self.hess_init)?;
        check::rate("beta2", self.beta2)
    }
    fn statistic(&self) -> Statistic {
        Statistic::Hessian
    }
}

impl BlockRule for Newton {
    const JOINT: bool = true;
    const PRIOR: Family = Family::Full;

    fn initial(&self, _: &[i64], mean: &Tensor, prior: &BlockPrior) -> Result<Vec<Tensor>> {
        Ok(vec![initial_hessian(mean, prior, self.hess_init)])
    }
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let hess = &state[0] * self.beta2 + &x.statistics[0] * (1.0 - self.beta2);
        let l = linalg::cholesky("the Hessian with the prior", &x.prior.add_to(&hess, 1.0)?)?;
        let step = linalg::solve(&l, &(x.gradient + x.prior.pull(x.mean)?))?;
        Ok((x.mean - step * when.lr, vec![hess]))
    }
    fn posterior(blocks: Vec<Learned<Self>>) -> Result<FullGaussian> {
        full_posterior(blocks)
    }
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
        /// Effective sample size λ > 0, usually the number of training examples; only needed for a posterior. Default:
        /// none.
        ess: Option<f64> = None, via f64;
        /// δ = prior precision/λ ≥ 0: the prior is N(0, 1/(λδ)); default 0.
        weight_decay: f64 = 0.0;
        /// h before the first step, ≥ 0; default 0. It counts where β₂ > 0.
        hess_init: f64 = 0.0;
        /// β₂ in [0, 1), decay of the Hessian average; default 0.
        beta2: f64 = 0.0;
        /// How the diagonal is found: [`Statistic::HessianDiagonal`], exactly by a backward pass for each weight, the
        /// default; or [`Statistic::Hutchinson`], an unbiased estimate by a backward pass for each probe.
        hessian: Statistic = Statistic::HessianDiagonal;
    }
}

impl DiagonalNewton {
    /// h + δ, if it is positive.
    fn precision(h: &Tensor, prior: &BlockPrior) -> Result<Tensor> {
        let precision = h + prior.in_basis(None, None, &h.size())?;
        // libtorch refuses the minimum of an empty tensor.
        if precision.numel() > 0 && precision.min().double_value(&[]) <= 0.0 {
            let problem = format!("its smallest element is {:e}", precision.min().double_value(&[]));
            let what = "the Hessian's diagonal with the prior".to_owned();
            return Err(Error::NotPositiveDefinite { what, problem });
        }
        Ok(precision)
    }
}

impl Row for DiagonalNewton {
    const NAME: &'static str = "diagonal_newton";
    const STATE: &'static [&'static str] = &["hess"];
    type Arithmetic = Blocks;
    type Posterior = DiagonalGaussian;
    fields!(weight_decay ess);

    fn validate(&self) -> Result<()> {
        let Self { ess, weight_decay, hess_init, beta2, .. } = *self;
        // The fields that both have, with the same ranges.
        Newton { ess, weight_decay, hess_init, beta2 }.validate()?;
        match self.hessian {
            Statistic::HessianDiagonal => Ok(()),
            Statistic::Hutchinson { probes } => {
                check::that("probes", probes, (1..=1024).contains(&probes), "a number from 1 to 1024")
            }
            other => check::that("hessian", other, false, "HessianDiagonal or Hutchinson"),
        }
    }
    fn statistic(&self) -> Statistic {
        self.hessian
    }
}

impl BlockRule for DiagonalNewton {
    const JOINT: bool = true;
    const PRIOR: Family = Family::Diagonal;

    fn initial(&self, _: &[i64], mean: &Tensor, prior: &BlockPrior) -> Result<Vec<Tensor>> {
        Ok(vec![mean.full_like(if prior.delta().is_some() { self.hess_init } else { 0.0 })])
    }
    fn update(&self, when: When, x: &Block, state: &[Tensor]) -> Result<(Tensor, Vec<Tensor>)> {
        let hess = &state[0] * self.beta2 + &x.statistics[0] * (1.0 - self.beta2);
        let step = (x.gradient + x.prior.pull(x.mean)?) / Self::precision(&hess, x.prior)?;
        Ok((x.mean - step * when.lr, vec![hess]))
    }
    fn posterior(blocks: Vec<Learned<Self>>) -> Result<DiagonalGaussian> {
        let mut entries = Vec::new();
        for Learned { row, means, state, prior, .. } in blocks {
            let precision = Self::precision(&state[0], prior)? * check::ess(row.ess)?;
            let sizes: Vec<i64> = means.iter().map(|(_, mean)| mean.numel() as i64).collect();
            for ((name, mean), s) in means.into_iter().zip(precision.split_with_sizes(sizes, 0)) {
                let s = s.reshape(mean.size());
                entries.push((name, mean, s));
            }
        }
        DiagonalGaussian::new(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::super::common::testing::{close, refused};
    use super::*;

    fn row(x: &[f64]) -> Tensor {
        Tensor::from_slice(x)
    }

    /// H ← ½·2I + ½[[3, 1], [1, 3]] = [[2.5, ½], [½, 2.5]], S = H + ½I = [[3, ½], [½, 3]], u = (1, 2) + ½(2, -2) = (2,
    /// 1), S⁻¹u = (5.5, 2)/8.75.
    #[test]
    fn one_step_by_hand() {
        let rule = Newton::default().weight_decay(0.5).hess_init(2.0).beta2(0.5);
        let (mean, gradient) = (row(&[2.0, -2.0]), row(&[1.0, 2.0]));
        let statistics = [row(&[3.0, 1.0, 1.0, 3.0]).reshape([2, 2])];
        let prior = &BlockPrior::isotropic(0.5);
        let x = Block { mean: &mean, gradient: &gradient, statistics: &statistics, prior };
        let when = When { t: 1, lr: 0.25 };
        let (m, state) = rule.update(when, &x, &rule.initial(&mean.size(), &mean, prior).unwrap()).unwrap();
        close(&m, &[2.0 - 0.25 * 5.5 / 8.75, -2.0 - 0.25 * 2.0 / 8.75]);
        close(&state[0], &[2.5, 0.5, 0.5, 2.5]);

        let rule = DiagonalNewton::default().weight_decay(0.5).hess_init(2.0).beta2(0.5);
        let x = Block { statistics: &[row(&[3.0, 1.0])], ..x };
        let (m, state) = rule.update(when, &x, &rule.initial(&mean.size(), &mean, prior).unwrap()).unwrap();
        close(&m, &[2.0 - 0.25 * 2.0 / 3.0, -2.0 - 0.25 * 1.0 / 2.0]);
        close(&state[0], &[2.5, 1.5]);
    }

    #[test]
    fn values_out_of_range_are_named() {
        refused([
            (Newton::default().ess(0.0), "ess"),
            (Newton::default().weight_decay(f64::NAN), "weight_decay"),
            (Newton::default().hess_init(-1.0), "hess_init"),
            (Newton::default().beta2(1.0), "beta2"),
        ]);
        let none = DiagonalNewton::default().hessian(Statistic::Hutchinson { probes: 0 });
        assert!(none.validate().unwrap_err().to_string().contains("`probes`"));
        assert!(DiagonalNewton::default().beta2(1.0).validate().is_err());
    }
}
