//! A prior that moves slowly: at the end of a task it takes in a share of that task's posterior.

use crate::posterior::{NaturalSum, combine};
use crate::{DiagonalGaussian, Result, check};
use tch::Kind;

/// The prior p of the next task, into which the posterior of each task is merged (continual IVON; Paul et al. 2026).
///
/// With "the posterior becomes the prior", all that a task was wrong about is passed on as knowledge. A slow prior
/// takes the share γ of a posterior q, in natural parameters,
///
/// ```text
/// p' ∝ p^(1-γ) q^γ:      S_p' = (1-γ) S_p + γ S_q        S_p' m_p' = (1-γ) S_p m_p + γ S_q m_q
/// ```
///
/// q was learned with the prior p, and holds it once: η_q = η_p + λ_t with what the data of task t say, λ_t. So η_p' =
/// η_p + γ λ_t, and after T tasks the posterior is η₀ + γ Σ_{t<T} λ_t + λ_T: **every past task counts γ, and the
/// present one 1**. The past is tempered once, and not forgotten geometrically, as by `combine(&[(γ, &q), (1.0 - γ,
/// &q0)])`. γ = 1 is variational continual learning; γ = 0 a prior that never moves.
///
/// It is one call at the boundary between two tasks, for every row with a Gaussian posterior:
///
/// ```
/// # use tch::{Device, Kind, nn};
/// use tch_blr::{Ivon, continual::SlowPrior};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let w = vs.root().zeros("w", &[3]);
/// # let loss = |target: f64| (&w - target).square().mean(Kind::Float);
/// let mut slow = SlowPrior::new(0.8)?;
/// let mut opt = Ivon::default().ess(1000.0).build(&vs, 0.1)?;
/// opt.step(|| loss(1.0))?;
///
/// // The next task. A new optimizer has no momentum and no steps behind it; the variables stay where they are, at m_q.
/// let prior = slow.absorb(opt.posterior()?)?;
/// let mut opt = Ivon::default().ess(500.0).prior(prior).build(&vs, 0.1)?;
/// opt.step(|| loss(2.0))?;
/// # Ok(())
/// # }
/// ```
///
/// It holds two tensors per weight and no history. To go on in another program, save [`SlowPrior::prior`], and start
/// from it with [`SlowPrior::from_prior`].
///
/// The published optimizer pulls towards the mean of the prior with another force than the prior's, and counts mean and
/// precision at two rates: [`PriorPull::Unit`](crate::rows::PriorPull::Unit) and [`SlowPrior::absorb_at_rates`] do.
#[derive(Debug)]
pub struct SlowPrior<Q> {
    gamma: f64,
    prior: Option<Q>,
}

impl<Q: NaturalSum> SlowPrior<Q> {
    /// Flat before the first task, so that after it p' ∝ q^γ, with 0 < γ ≤ 1. What the first task had as its prior is
    /// then part of q, and counts γ; [`SlowPrior::from_prior`] keeps it whole.
    ///
    /// # Errors
    /// γ out of range.
    pub fn new(gamma: f64) -> Result<Self> {
        check::that("gamma", gamma, gamma > 0.0 && gamma <= 1.0, "a number > 0, and at most 1")?;
        Ok(SlowPrior { gamma, prior: None })
    }

    /// Starts from the prior of the first task, with 0 ≤ γ ≤ 1.
    ///
    /// # Errors
    /// γ out of range.
    pub fn from_prior(prior: Q, gamma: f64) -> Result<Self> {
        check::that("gamma", gamma, (0.0..=1.0).contains(&gamma), "a number from 0 to 1")?;
        Ok(SlowPrior { gamma, prior: Some(prior) })
    }

    /// γ
    pub fn gamma(&self) -> f64 {
        self.gamma
    }

    /// p; `None` before the first task, if it began flat.
    pub fn prior(&self) -> Option<&Q> {
        self.prior.as_ref()
    }

    /// Takes in the share γ of the posterior of a task that was learned with this prior, and returns the prior of the
    /// next. Once per task; with γ = 1 the result is `posterior` itself.
    ///
    /// # Errors
    /// With γ < 1 those of [`combine`]: other parameters than the prior's ([`select`](crate::DiagonalGaussian::select)
    /// those that tasks share, and give others their own prior by [`Prior::elsewhere`](crate::Prior::elsewhere)),
    /// Kronecker factors in other bases. The prior then stays as it was.
    pub fn absorb(&mut self, posterior: Q) -> Result<&Q> {
        let merged = match &self.prior {
            None if self.gamma < 1.0 => combine(&[(self.gamma, &posterior)])?,
            Some(prior) if self.gamma < 1.0 => combine(&[(1.0 - self.gamma, prior), (self.gamma, &posterior)])?,
            _ => posterior,
        };
        Ok(self.prior.insert(merged))
    }
}

impl SlowPrior<DiagonalGaussian> {
    /// As [`SlowPrior::absorb`], where the mean is merged at a rate of its own, as in the published code: with γ_m for
    /// the mean and this prior's γ for the precision
    ///
    /// ```text
    /// S_p' = (1-γ) S_p + γ S_q        S_p' m_p' = (1-γ_m) S_p m_p + γ_m S_q m_q
    /// ```
    ///
    /// That is no product of powers of p and q unless γ_m = γ: a smaller γ_m also shrinks the mean towards 0. Before
    /// the first task there is no mean to merge with, and γ_m has no effect. The published code also leaves the first
    /// task's own prior out: absorb [`remove(&q, &p0, 1.0)`](crate::merge::remove).
    ///
    /// # Errors
    /// γ_m outside 0 to 1, and as [`SlowPrior::absorb`].
    pub fn absorb_at_rates(&mut self, posterior: DiagonalGaussian, gamma_m: f64) -> Result<&DiagonalGaussian> {
        check::that("gamma_m", gamma_m, (0.0..=1.0).contains(&gamma_m), "a number from 0 to 1")?;
        let Some(prior) = &self.prior else { return self.absorb(posterior) };
        let precisions = combine(&[(1.0 - self.gamma, prior), (self.gamma, &posterior)])?;
        let merged = precisions.names().map(|name| {
            let natural = |q: &DiagonalGaussian| {
                let (mean, precision) = q.mean(name).zip(q.precision(name)).expect("combine has seen to it");
                mean.to_kind(Kind::Double) * precision.to_kind(Kind::Double)
            };
            let precision = precisions.precision(name).expect("its own name");
            let sum = natural(prior) * (1.0 - gamma_m) + natural(&posterior).to_device(precision.device()) * gamma_m;
            (name.to_owned(), (sum / &precision).to_kind(precision.kind()), precision)
        });
        let merged = DiagonalGaussian::sharing(merged.collect::<Vec<_>>())?.with_seed(precisions.seed());
        Ok(self.prior.insert(merged))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Error, FullGaussian};
    use tch::{Device, Tensor};

    fn q(mean: f64, precision: f64) -> DiagonalGaussian {
        DiagonalGaussian::new([("w", Tensor::from_slice(&[mean]), Tensor::from_slice(&[precision]))]).unwrap()
    }

    /// Precision and mean.
    fn moments(q: &DiagonalGaussian) -> [f64; 2] {
        [q.precision("w").unwrap(), q.mean("w").unwrap()].map(|t| t.double_value(&[0]))
    }

    #[track_caller]
    fn close(ours: [f64; 2], exact: [f64; 2]) {
        assert!(ours.iter().zip(exact).all(|(a, b)| (a - b).abs() < 1e-15 * b.abs().max(1.0)), "{ours:?} {exact:?}");
    }

    /// s_p 2, m_p ½; ess 10, h 0.3 and m 1.2 make q = N(1.2, 1/5).
    #[test]
    fn the_boundary_by_hand() {
        for (gamma, expected) in [(1.0, [5.0, 1.2]), (0.8, [4.4, 5.0 / 4.4]), (0.0, [2.0, 0.5])] {
            let mut slow = SlowPrior::from_prior(q(0.5, 2.0), gamma).unwrap();
            close(moments(slow.absorb(q(1.2, 5.0)).unwrap()), expected);
        }
        let mut slow = SlowPrior::from_prior(q(0.5, 2.0), 0.8).unwrap();
        close(moments(slow.absorb_at_rates(q(1.2, 5.0), 0.6).unwrap()), [4.4, 4.0 / 4.4]);
        // Equal rates are one rate.
        let mut slow = SlowPrior::from_prior(q(0.5, 2.0), 0.8).unwrap();
        close(moments(slow.absorb_at_rates(q(1.2, 5.0), 0.8).unwrap()), [4.4, 5.0 / 4.4]);
        // Without a mean to merge with.
        let flat = || SlowPrior::new(0.8).unwrap();
        close(moments(flat().absorb(q(1.2, 5.0)).unwrap()), [4.0, 1.2]);
        close(moments(flat().absorb_at_rates(q(1.2, 5.0), 0.1).unwrap()), [4.0, 1.2]);
    }

    /// Losses ½H(θ-c)², the prior N(0.2, 1/1.5), γ = 0.6.
    #[test]
    fn every_past_task_counts_gamma_and_the_present_one_1() {
        let tasks = [(2.0, 1.0), (3.0, -0.5), (1.0, 2.0)];
        let mut slow = SlowPrior::from_prior(q(0.2, 1.5), 0.6).unwrap();
        let mut last = [f64::NAN; 2];
        for (h, c) in tasks {
            let [s, m] = moments(slow.prior().unwrap());
            let posterior = q((s * m + h * c) / (s + h), s + h);
            last = moments(&posterior);
            slow.absorb(posterior).unwrap();
        }
        close(last, [5.5, (0.3 + 0.6 * (2.0 - 1.5) + 2.0) / 5.5]);
        close(moments(slow.prior().unwrap()), [5.1, (0.3 + 0.6 * (2.0 - 1.5 + 2.0)) / 5.1]);
    }

    /// Bit for bit what a chain of posteriors as priors is, in f32 too.
    #[test]
    fn gamma_1_is_the_posterior_itself() {
        let third = || Tensor::from_slice(&[1.0f32 / 3.0, 0.7]);
        let task = || DiagonalGaussian::new([("w", third(), third() * 7.1)]).unwrap();
        let mut slow = SlowPrior::new(1.0).unwrap();
        for _ in 0..2 {
            let p = slow.absorb(task()).unwrap();
            assert_eq!((p.mean("w").unwrap(), p.precision("w").unwrap()), (third(), third() * 7.1));
        }
    }

    #[test]
    fn a_full_covariance_is_merged_as_a_matrix() {
        let full = |m: [f64; 2], s: [f64; 4]| {
            FullGaussian::new([("w", Tensor::from_slice(&m))], &Tensor::from_slice(&s).view([2, 2])).unwrap()
        };
        let mut slow = SlowPrior::from_prior(full([1.0, 0.0], [2.0, 0.0, 0.0, 1.0]), 0.5).unwrap();
        let p = slow.absorb(full([0.0, 1.0], [4.0, 1.0, 1.0, 3.0])).unwrap();
        let precision = Tensor::from_slice(&[3.0, 0.5, 0.5, 2.0]).view([2, 2]);
        assert_eq!(p.precision_matrix(), &precision);
        // ½(2, 0) + ½(1, 3)
        let mean = precision.inverse().mv(&Tensor::from_slice(&[1.5, 1.5]));
        assert!(f64::try_from((p.mean_vector() - mean).abs().max()).unwrap() < 1e-15);
    }

    #[test]
    fn what_does_not_fit_leaves_the_prior_as_it_was() {
        for gamma in [0.0, -0.1, 1.1, f64::NAN] {
            let e = SlowPrior::<DiagonalGaussian>::new(gamma).unwrap_err().to_string();
            assert!(e.contains("`gamma`"), "{e}");
            assert_eq!(SlowPrior::from_prior(q(0.0, 1.0), gamma).is_ok(), gamma == 0.0);
        }
        let other = || {
            let one = Tensor::ones([1], (Kind::Double, Device::Cpu));
            DiagonalGaussian::new([("v", one.copy(), one)]).unwrap()
        };
        let mut slow = SlowPrior::from_prior(q(0.5, 2.0), 0.5).unwrap();
        assert!(matches!(slow.absorb(other()), Err(Error::Parameter { .. })));
        assert!(matches!(slow.absorb_at_rates(other(), 0.5), Err(Error::Parameter { .. })));
        assert!(slow.absorb_at_rates(q(1.0, 1.0), 1.5).unwrap_err().to_string().contains("`gamma_m`"));
        assert_eq!(moments(slow.prior().unwrap()), [2.0, 0.5]);
    }
}
