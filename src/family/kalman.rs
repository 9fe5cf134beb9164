//! The Kalman filter: conjugate Bayes with a prior that moves.

use super::numbers::{cholesky, symmetric, tensor};
use super::{Gaussian, conjugate_posterior};
use crate::Result;
use tch::Tensor;

/// A linear dynamical system and its filter.
///
/// ```text
/// xₜ = F xₜ₋₁ + N(0, Q)            state, d numbers
/// yₜ = H xₜ   + N(0, R)            observation, k numbers
///
/// predict    m ← F m, P ← F P Fᵀ + Q                                  the prior of step t
/// update     λ ← λ + ( HᵀR⁻¹y, -½ HᵀR⁻¹H )                            the rule with ρ = 1
/// ```
///
/// The update is the Kalman filter's in natural parameters: that is its information form, and the gain appears when
/// it is written in m and P.
///
/// ```
/// use tch::Tensor;
/// use tch_blr::family::{Gaussian, Kalman};
/// # fn main() -> tch_blr::Result<()> {
/// let one = |x: f64| Tensor::from_slice(&[x]).reshape([1, 1]);
/// let level = Kalman::new(&one(1.0), &one(0.5), &one(1.0), &one(1.0))?; // a random walk, observed with noise
/// let start = Gaussian::from_covariance(&Tensor::from_slice(&[0.0]), &one(1.0))?;
/// let tracked = level.filter(&start, &[1.0, 2.0, 0.0].map(|y| Tensor::from_slice(&[y])))?;
/// assert!((tracked[1].mean().double_value(&[0]) - 4.0 / 3.0).abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Kalman {
    transition: Tensor,
    process_noise: Tensor,
    /// L⁻¹H, with R = L Lᵀ
    observation: Tensor,
    /// L
    noise_root: Tensor,
}

const NAME: &str = "Kalman filter";

impl Kalman {
    /// From F `[d, d]`, Q `[d, d]`, H `[k, d]` and R `[k, k]`.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite, Q or R not symmetric, R not positive definite.
    pub fn new(transition: &Tensor, process_noise: &Tensor, observation: &Tensor, noise: &Tensor) -> Result<Self> {
        let observation = tensor(NAME, "H", observation, &[-1, -1])?;
        let [k, d] = [0, 1].map(|i| observation.size()[i]);
        let noise_root = cholesky(NAME, "R", &symmetric(NAME, "R", noise, k)?)?;
        Ok(Kalman {
            transition: tensor(NAME, "F", transition, &[d, d])?,
            process_noise: symmetric(NAME, "Q", process_noise, d)?,
            // Whitened once, so that no step has to factor R.
            observation: noise_root.linalg_solve_triangular(&observation, false, true, false),
            noise_root,
        })
    }

    /// The distribution of xₜ from that of xₜ₋₁.
    ///
    /// # Errors
    /// Another dimension, or F P Fᵀ + Q that is not positive definite.
    pub fn predict(&self, q: &Gaussian) -> Result<Gaussian> {
        let f = &self.transition;
        // Checked by name first: the matrix products below would panic.
        _ = tensor(NAME, "the mean of the state", q.mean(), &[f.size()[0]])?;
        // In moments, as noise adds covariances; the update adds precisions, in natural parameters.
        Gaussian::from_covariance(&f.mv(q.mean()), &(f.matmul(&q.covariance()).matmul(&f.tr()) + &self.process_noise))
    }

    /// The distribution of xₜ given yₜ too, `[k]`. Steps without an observation leave this out.
    ///
    /// # Errors
    /// Another dimension, numbers that are not finite.
    pub fn update(&self, q: &Gaussian, y: &Tensor) -> Result<Gaussian> {
        // In units of the noise, L⁻¹y = L⁻¹H x + N(0, 1) are k independent observations.
        let y = tensor(NAME, "y", y, &[self.noise_root.size()[0]])?.unsqueeze(1);
        let y = self.noise_root.linalg_solve_triangular(&y, false, true, false).squeeze_dim(1);
        conjugate_posterior(q, &Gaussian::linear_likelihood(&self.observation, &y, 1.0)?)
    }

    /// The distribution of x₁, x₂, … given y₁, …, yₜ each, from that of x₀.
    ///
    /// # Errors
    /// As [`Kalman::predict`] and [`Kalman::update`].
    pub fn filter(&self, start: &Gaussian, ys: &[Tensor]) -> Result<Vec<Gaussian>> {
        let mut tracked: Vec<Gaussian> = Vec::with_capacity(ys.len());
        for y in ys {
            let prior = self.predict(tracked.last().unwrap_or(start))?;
            tracked.push(self.update(&prior, y)?);
        }
        Ok(tracked)
    }
}
