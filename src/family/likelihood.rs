//! What a datum says about a function value: losses, and their expectations under a Gaussian.

use super::numbers::{inside, positive};
use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// ℓ(f, y) = -ln p(y|f) for a function value f and a target y, elementwise.
///
/// To add a likelihood, implement `loss`, in operations that libtorch can differentiate twice; the rest follows from
/// it.
pub trait Likelihood {
    /// ℓ(f, y), for f and y of shapes that broadcast.
    fn loss(&self, f: &Tensor, y: &Tensor) -> Tensor;

    /// Refuses targets outside of the likelihood's support.
    ///
    /// # Errors
    /// Naming the targets that it has.
    fn check(&self, _y: &Tensor) -> Result<()> {
        Ok(())
    }

    /// E\[ℓ\], E\[ℓ′\] and E\[ℓ″\] under f ~ N(mean, variance), all `[n]`. By [`normal_quadrature`] unless there is a
    /// closed form, for the logistic loss to 10⁻¹² up to a standard deviation of 4, to 10⁻⁶ up to 10.
    ///
    /// # Errors
    /// If libtorch cannot differentiate the loss twice.
    fn expected(&self, y: &Tensor, mean: &Tensor, variance: &Tensor) -> Result<[Tensor; 3]> {
        let (nodes, weights) = normal_quadrature();
        // A leaf at all nodes of all data, so that one backward pass gives every derivative.
        let f = (variance.sqrt().outer(&nodes) + mean.unsqueeze(1)).detach().set_requires_grad(true);
        // Also where the caller has switched gradients off.
        let values = tch::with_grad(|| {
            let loss = self.loss(&f, &y.unsqueeze(1));
            let gradient = derivative(&loss, &f)?;
            let hessian = derivative(&gradient, &f)?;
            Ok::<_, Error>([loss, gradient, hessian])
        })?;
        Ok(values.map(|x| x.detach().mv(&weights)))
    }
}

/// Of each element by the element of f in its place; zero where f does not occur.
fn derivative(of: &Tensor, f: &Tensor) -> Result<Tensor> {
    // Each element depends on its own f only, so the gradient of the sum is all derivatives at once.
    let of = of.sum(Kind::Double);
    let d =
        if of.requires_grad() { Tensor::f_run_backward(&[&of], &[f], true, true)?.remove(0) } else { Tensor::new() };
    Ok(if d.defined() { d } else { f.detach().zeros_like() })
}

/// Points z and weights w with E\[g(z)\] ≈ Σ w g(z) for z ~ N(0, 1): the trapezoidal rule in steps of ⅛ for |z| ≤ 10.
///
/// Under a normal density that rule converges geometrically, and poles of g close to the line (those of the logistic
/// function under a wide Gaussian) disturb it less than Gauss and Hermite's. Polynomials are integrated to rounding.
pub fn normal_quadrature() -> (Tensor, Tensor) {
    // In steps h = ⅛ the error falls as exp(-2π²/h²) for polynomials. Beyond 10 the density is below 10⁻²².
    let z = Tensor::arange_start(-80, 81, (Kind::Double, Device::Cpu)) / 8.0;
    let w = (z.square() * -0.5).exp() / (8.0 * std::f64::consts::TAU.sqrt());
    (z, w)
}

/// y = f + N(0, σ²): ℓ = (y-f)²/2σ² + ½ ln 2πσ².
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GaussianLikelihood {
    variance: f64,
}

impl GaussianLikelihood {
    /// From σ² > 0.
    ///
    /// # Errors
    /// Any other.
    pub fn new(variance: f64) -> Result<Self> {
        positive("Gaussian likelihood", "the variance σ²", variance)?;
        Ok(GaussianLikelihood { variance })
    }
}

impl Likelihood for GaussianLikelihood {
    fn loss(&self, f: &Tensor, y: &Tensor) -> Tensor {
        (y - f).square() / (2.0 * self.variance) + 0.5 * (std::f64::consts::TAU * self.variance).ln()
    }

    fn expected(&self, y: &Tensor, mean: &Tensor, variance: &Tensor) -> Result<[Tensor; 3]> {
        // Closed forms, exact for any variance, which the quadrature is not.
        let loss = self.loss(mean, y) + variance / (2.0 * self.variance);
        Ok([loss, (mean - y) / self.variance, y.full_like(1.0 / self.variance)])
    }
}

/// y ∈ {0, 1}, P(y = 1) = 1/(1 + e^-f): ℓ = ln(1 + e^f) - y f.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogisticLikelihood;

impl Likelihood for LogisticLikelihood {
    fn loss(&self, f: &Tensor, y: &Tensor) -> Tensor {
        // Not softplus, which in libtorch is f itself from 20 on.
        -(-f).log_sigmoid() - y * f
    }

    fn check(&self, y: &Tensor) -> Result<()> {
        let ok = y.eq(0.0).logical_or(&y.eq(1.0));
        inside("logistic likelihood", y.shallow_clone(), &ok, "{0, 1}").map(drop)
    }
}

/// y ∈ {0, 1, …}, a Poisson count of rate e^f: ℓ = e^f - y f + ln y!.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoissonLikelihood;

impl Likelihood for PoissonLikelihood {
    fn loss(&self, f: &Tensor, y: &Tensor) -> Tensor {
        f.exp() - y * f + (y + 1.0).lgamma()
    }

    fn check(&self, y: &Tensor) -> Result<()> {
        let ok = y.ge(0.0).logical_and(&y.eq_tensor(&y.floor()));
        inside("Poisson likelihood", y.shallow_clone(), &ok, "{0, 1, …}").map(drop)
    }

    /// E\[e^f\] = e^(m + v/2)
    fn expected(&self, y: &Tensor, mean: &Tensor, variance: &Tensor) -> Result<[Tensor; 3]> {
        let rate = (mean + variance * 0.5).exp();
        Ok([&rate - y * mean + (y + 1.0).lgamma(), &rate - y, rate])
    }
}
