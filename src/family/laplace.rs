//! Laplace's method: the rule under the delta method.

use super::numbers::tensor;
use super::{Gaussian, converge, rule_step};
use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// N(m, S⁻¹) at a minimum m of ℓ with S = ∇²ℓ(m).
///
/// It is the fixed point of the rule for a [`Gaussian`] when both expectations are taken at the mean:
///
/// ```text
/// E_q[∇ℓ] ≈ ∇ℓ(m),  E_q[∇²ℓ] ≈ ∇²ℓ(m)
/// S ← (1-ρ) S + ρ ∇²ℓ(m),   m ← m - ρ S⁻¹ ∇ℓ(m)
/// ```
///
/// ρ = 1 is Newton's method. `loss` is ℓ(θ) = -ln p(data|θ) - ln prior(θ) as one number, for θ `[d]`; it is
/// differentiated twice. `start` is the first mean. Ends when no natural parameter moves by more than 10⁻¹³ of the
/// largest.
///
/// ```
/// use tch::{Kind, Tensor};
/// use tch_blr::family::laplace;
/// # fn main() -> tch_blr::Result<()> {
/// // A Poisson rate e^θ with prior N(0, 1) on θ, after a count of 3.
/// let loss = |theta: &Tensor| (theta.exp() - theta * 3.0 + theta.square() * 0.5).sum(Kind::Double);
/// let q = laplace(&Tensor::from_slice(&[0.0]), 1.0, 50, loss)?;
/// assert!((q.mean().double_value(&[0]) - 0.79206).abs() < 1e-5);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// A loss that is not one finite number; [`Error::Step`] where ∇²ℓ is not positive definite (start
/// closer, or use a smaller ρ); [`Error::NotConverged`].
pub fn laplace(start: &Tensor, rho: f64, max_steps: usize, loss: impl Fn(&Tensor) -> Tensor) -> Result<Gaussian> {
    let start = tensor("Laplace", "the start", start, &[-1])?;
    // Any precision will do: with ρ = 1 the first step replaces it, with ρ < 1 it fades.
    let unit = Tensor::eye(start.size()[0], (Kind::Double, Device::Cpu));
    converge(Gaussian::new(&start, &unit)?, 1e-13, max_steps, |q| {
        let (gradient, hessian) = derivatives(q.mean(), &loss)?;
        rule_step(q, rho, &q.gradient_mu(&gradient, &hessian)?)
    })
}

/// ∇ℓ(θ) `[d]` and ∇²ℓ(θ) `[d, d]`.
fn derivatives(theta: &Tensor, loss: impl Fn(&Tensor) -> Tensor) -> Result<(Tensor, Tensor)> {
    // A leaf of its own: the mean of q must not start to require gradients.
    let theta = theta.copy().set_requires_grad(true);
    let differentiate = |f: &Tensor| {
        // A constant has no graph, and what does not depend on θ an undefined derivative.
        let g = if f.requires_grad() {
            Tensor::f_run_backward(&[f], &[&theta], true, true)?.remove(0)
        } else {
            Tensor::new()
        };
        Ok::<_, Error>(if g.defined() { g } else { theta.detach().zeros_like() })
    };
    // Also where the caller has switched gradients off.
    tch::with_grad(|| {
        let loss = loss(&theta);
        _ = tensor("Laplace", "the loss", &loss, &[])?;
        let gradient = differentiate(&loss)?;
        let rows = (0..theta.size()[0]).map(|i| differentiate(&gradient.get(i))).collect::<Result<Vec<_>>>()?;
        Ok((gradient.detach(), Tensor::stack(&rows, 0).detach()))
    })
}
