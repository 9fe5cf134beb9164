//! The Gaussian with any covariance.

use super::exponential::dimension;
use super::numbers::{cholesky, positive, symmetric, tensor};
use super::random::Stream;
use super::{ExponentialFamily, exponential::dot};
use crate::Result;
use tch::{Kind, Tensor};

/// N(m, S⁻¹) on ℝᵈ; P = d + d².
///
/// ```text
/// λ = ( S m, -½ vec S )        T(x) = ( x, vec x xᵀ )        μ = ( m, vec(S⁻¹ + m mᵀ) )
/// A = ½ mᵀS m - ½ ln det S + ½ d ln 2π
/// ```
///
/// vec goes row by row. Of a d×d part only the symmetric half counts, so a gradient need not be symmetric. Draws:
/// `[n, d]`.
#[derive(Debug)]
pub struct Gaussian {
    mean: Tensor,
    precision: Tensor,
    /// L of S = L Lᵀ
    cholesky: Tensor,
}

impl Gaussian {
    /// From m `[d]` and S `[d, d]`.
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite, S not symmetric or not positive definite.
    pub fn new(mean: &Tensor, precision: &Tensor) -> Result<Self> {
        let mean = tensor(Self::NAME, "the mean", mean, &[-1])?;
        let precision = symmetric(Self::NAME, "the precision S", precision, mean.size()[0])?;
        let cholesky = cholesky(Self::NAME, "the precision S", &precision)?;
        Ok(Gaussian { mean, precision, cholesky })
    }

    /// From m `[d]` and the covariance S⁻¹ `[d, d]`, for example a kernel matrix (with a little added to its diagonal
    /// where inputs are close to each other, since S has to be formed).
    ///
    /// # Errors
    /// As [`Gaussian::new`].
    pub fn from_covariance(mean: &Tensor, covariance: &Tensor) -> Result<Self> {
        let mean = tensor(Self::NAME, "the mean", mean, &[-1])?;
        let covariance = symmetric(Self::NAME, "the covariance", covariance, mean.size()[0])?;
        Self::new(&mean, &cholesky(Self::NAME, "the covariance", &covariance)?.cholesky_inverse(false))
    }

    /// m, `[d]`
    pub fn mean(&self) -> &Tensor {
        &self.mean
    }

    /// S, `[d, d]`
    pub fn precision(&self) -> &Tensor {
        &self.precision
    }

    /// S⁻¹, `[d, d]`
    pub fn covariance(&self) -> Tensor {
        self.cholesky.cholesky_inverse(false)
    }

    /// d
    pub fn dim(&self) -> i64 {
        self.mean.size()[0]
    }

    /// Means and variances `[n]` of the linear functions Φθ, Φ `[n, d]`.
    ///
    /// # Errors
    /// Another number of columns.
    pub fn project(&self, features: &Tensor) -> Result<(Tensor, Tensor)> {
        let phi = tensor(Self::NAME, "Φ", features, &[-1, self.dim()])?;
        // φᵀS⁻¹φ = ‖L⁻¹φ‖², which cannot round below zero as a product with S⁻¹ can.
        let root = self.cholesky.linalg_solve_triangular(&phi.tr(), false, true, false);
        Ok((phi.mv(&self.mean), root.square().sum_dim_intlist(0, false, Kind::Double)))
    }

    /// ∇_μ E_q\[ℓ\] from E_q\[∇ℓ\] `[d]` and E_q\[∇²ℓ\] `[d, d]`, by the theorems of Bonnet and Price:
    ///
    /// ```text
    /// ( E[∇ℓ] - E[∇²ℓ] m,  ½ vec E[∇²ℓ] )
    /// ```
    ///
    /// With it a step of the rule is S ← (1-ρ) S + ρ E\[∇²ℓ\], m ← m - ρ S⁻¹ E\[∇ℓ\].
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite.
    pub fn gradient_mu(&self, gradient: &Tensor, hessian: &Tensor) -> Result<Tensor> {
        let d = self.dim();
        let gradient = tensor(Self::NAME, "E[∇ℓ]", gradient, &[d])?;
        let hessian = tensor(Self::NAME, "E[∇²ℓ]", hessian, &[d, d])?;
        Ok(flat(&(gradient - hessian.mv(&self.mean)), &(hessian * 0.5)))
    }

    /// What each observation yᵢ = xᵢᵀθ + N(0, σ²) adds to the natural parameters of θ: (xᵢyᵢ, -½ vec xᵢxᵢᵀ)/σ²,
    /// `[n, d + d²]`, for X `[n, d]` and y `[n]`.
    ///
    /// # Errors
    /// Shapes that do not fit, a variance that is not positive.
    pub fn linear_likelihood(x: &Tensor, y: &Tensor, variance: f64) -> Result<Tensor> {
        positive("linear likelihood", "the variance of the noise", variance)?;
        let y = tensor("linear likelihood", "y", y, &[-1])?;
        let x = tensor("linear likelihood", "X", x, &[y.size()[0], -1])?;
        let outer = x.unsqueeze(2) * x.unsqueeze(1);
        Ok(Tensor::cat(&[&x * y.unsqueeze(1), outer.flatten(1, 2) * -0.5], 1) / variance)
    }
}

fn flat(vector: &Tensor, matrix: &Tensor) -> Tensor {
    Tensor::cat(&[vector.shallow_clone(), matrix.flatten(0, 1)], 0)
}

/// The two parts of λ or μ, the second symmetric.
fn parts(what: &str, flat: &Tensor) -> Result<(Tensor, Tensor)> {
    let d = dimension(Gaussian::NAME, flat, |d| d + d * d)?;
    let flat = tensor(Gaussian::NAME, what, flat, &[d + d * d])?;
    let matrix = flat.narrow(0, d, d * d).reshape([d, d]);
    // Symmetric from here on: a gradient written by hand or by autograd may use one triangle only.
    Ok((flat.narrow(0, 0, d).copy(), (&matrix + matrix.tr()) * 0.5))
}

impl ExponentialFamily for Gaussian {
    const NAME: &'static str = "Gaussian";

    fn from_natural(lambda: &Tensor) -> Result<Self> {
        let (precision_mean, half) = parts("λ", lambda)?;
        let precision = half * -2.0;
        // The test of membership: a step of the rule that leaves the family fails here.
        let cholesky = cholesky(Self::NAME, "the precision S = -2 λ⁽²⁾", &precision)?;
        let mean = precision_mean.unsqueeze(1).cholesky_solve(&cholesky, false).squeeze_dim(1);
        let mean = tensor(Self::NAME, "the mean S⁻¹λ⁽¹⁾", &mean, &[-1])?;
        Ok(Gaussian { mean, precision, cholesky })
    }

    fn natural(&self) -> Tensor {
        flat(&self.precision.mv(&self.mean), &(&self.precision * -0.5))
    }

    fn from_expectation(mu: &Tensor) -> Result<Self> {
        let (mean, second) = parts("μ", mu)?;
        // A difference: digits are lost where the mean is large against the deviation.
        let covariance = second - mean.outer(&mean);
        Self::new(&mean, &cholesky(Self::NAME, "the covariance μ⁽²⁾ - m mᵀ", &covariance)?.cholesky_inverse(false))
    }

    fn expectation(&self) -> Tensor {
        flat(&self.mean, &(self.covariance() + self.mean.outer(&self.mean)))
    }

    fn log_partition(&self) -> f64 {
        let quadratic = dot(&self.mean, &self.precision.mv(&self.mean));
        let half_log_det = self.cholesky.diag(0).log().sum(Kind::Double).double_value(&[]);
        0.5 * (quadratic + self.dim() as f64 * std::f64::consts::TAU.ln()) - half_log_det
    }

    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor(Self::NAME, "x", x, &[-1, self.dim()])?;
        Ok(Tensor::cat(&[&x, &(x.unsqueeze(2) * x.unsqueeze(1)).flatten(1, 2)], 1))
    }

    fn sample(&self, n: usize, seed: u64) -> Tensor {
        let mut stream = Stream::new(seed);
        let z: Vec<f64> = (0..n * self.dim() as usize).map(|_| stream.normal()).collect();
        let z = Tensor::from_slice(&z).reshape([n as i64, self.dim()]);
        // x = m + L⁻ᵀz, in rows
        self.cholesky.linalg_solve_triangular(&z, false, false, false) + &self.mean
    }
}
