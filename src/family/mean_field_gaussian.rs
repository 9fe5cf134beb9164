//! The Gaussian with a diagonal covariance.

use super::ExponentialFamily;
use super::exponential::dimension;
use super::numbers::{positive_tensor, tensor};
use super::random::Stream;
use crate::Result;
use tch::{Kind, Tensor};

/// N(m, diag(s)⁻¹) on ℝᵈ; P = 2d.
///
/// ```text
/// λ = ( s m, -½ s )        T(x) = ( x, x² )        μ = ( m, 1/s + m² )        elementwise
/// A = ½ Σ ( s m² - ln s + ln 2π )
/// ```
///
/// Draws: `[n, d]`. For a Gaussian over a model's named parameters see [`DiagonalGaussian`](crate::DiagonalGaussian).
#[derive(Debug)]
pub struct MeanFieldGaussian {
    mean: Tensor,
    precision: Tensor,
}

impl MeanFieldGaussian {
    /// From m and s, `[d]`.
    ///
    /// # Errors
    /// Shapes that differ, numbers that are not finite, a precision that is not positive.
    pub fn new(mean: &Tensor, precision: &Tensor) -> Result<Self> {
        let mean = tensor(Self::NAME, "the mean", mean, &[-1])?;
        let precision = positive_tensor(Self::NAME, "the precision s", precision, &mean.size())?;
        Ok(MeanFieldGaussian { mean, precision })
    }

    /// m, `[d]`
    pub fn mean(&self) -> &Tensor {
        &self.mean
    }

    /// s, `[d]`
    pub fn precision(&self) -> &Tensor {
        &self.precision
    }

    /// ∇_μ E_q\[ℓ\] from E_q\[∇ℓ\] and the diagonal of E_q\[∇²ℓ\], both `[d]`, by the theorems of Bonnet and Price:
    /// ( E\[∇ℓ\] - E\[∇²ℓ\] m, ½ E\[∇²ℓ\] ).
    ///
    /// # Errors
    /// Shapes that do not fit, numbers that are not finite.
    pub fn gradient_mu(&self, gradient: &Tensor, hessian: &Tensor) -> Result<Tensor> {
        let gradient = tensor(Self::NAME, "E[∇ℓ]", gradient, &self.mean.size())?;
        let hessian = tensor(Self::NAME, "the diagonal of E[∇²ℓ]", hessian, &self.mean.size())?;
        Ok(Tensor::cat(&[gradient - &hessian * &self.mean, hessian * 0.5], 0))
    }
}

fn halves(what: &str, flat: &Tensor) -> Result<(Tensor, Tensor)> {
    let d = dimension(MeanFieldGaussian::NAME, flat, |d| 2 * d)?;
    let flat = tensor(MeanFieldGaussian::NAME, what, flat, &[2 * d])?;
    Ok((flat.narrow(0, 0, d), flat.narrow(0, d, d)))
}

impl ExponentialFamily for MeanFieldGaussian {
    const NAME: &'static str = "mean-field Gaussian";

    fn from_natural(lambda: &Tensor) -> Result<Self> {
        let (precision_mean, half) = halves("λ", lambda)?;
        let precision = positive_tensor(Self::NAME, "the precision s = -2 λ⁽²⁾", &(half * -2.0), &[-1])?;
        Self::new(&(precision_mean / &precision), &precision)
    }

    fn natural(&self) -> Tensor {
        Tensor::cat(&[&self.precision * &self.mean, &self.precision * -0.5], 0)
    }

    fn from_expectation(mu: &Tensor) -> Result<Self> {
        let (mean, second) = halves("μ", mu)?;
        // A difference: digits are lost where the mean is large against the deviation.
        let variance = positive_tensor(Self::NAME, "the variance μ⁽²⁾ - m²", &(second - mean.square()), &[-1])?;
        Self::new(&mean, &variance.reciprocal())
    }

    fn expectation(&self) -> Tensor {
        Tensor::cat(&[&self.mean, &(self.precision.reciprocal() + self.mean.square())], 0)
    }

    fn log_partition(&self) -> f64 {
        let terms = &self.precision * self.mean.square() - self.precision.log() + std::f64::consts::TAU.ln();
        0.5 * terms.sum(Kind::Double).double_value(&[])
    }

    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor(Self::NAME, "x", x, &[-1, self.mean.size()[0]])?;
        Ok(Tensor::cat(&[&x, &x.square()], 1))
    }

    fn sample(&self, n: usize, seed: u64) -> Tensor {
        let mut stream = Stream::new(seed);
        let z: Vec<f64> = (0..n * self.mean.numel()).map(|_| stream.normal()).collect();
        Tensor::from_slice(&z).reshape([n as i64, -1]) / self.precision.sqrt() + &self.mean
    }
}
