//! Variational message passing, conjugate or not.

use super::{ExponentialFamily, gradient_mu, rule_step};
use crate::Result;
use tch::Tensor;

/// One node's update in variational message passing: the rule for the factor q of a mean-field posterior, with E\[ℓ\]
/// written as a function of the factor's expectation parameters μ.
///
/// ```text
/// q(θ) = Πⱼ qⱼ(θⱼ)           λⱼ ← (1-ρ) λⱼ - ρ ∇_μⱼ E_q[ ℓ(θ) ]
/// ```
///
/// In a conjugate-exponential model E\[ℓ\] is linear in each μⱼ, the gradient is the sum of the messages from the
/// node's neighbours, and ρ = 1 is the exact minimum over qⱼ: variational message passing (Winn and Bishop, 2005).
/// Where E\[ℓ\] is not linear, ρ = 1 is non-conjugate variational message passing (Knowles and Minka, 2011), which
/// need not converge; ρ < 1 damps it. The graph is the closures:
///
/// ```
/// use tch::Tensor;
/// use tch_blr::family::{ExponentialFamily, Gamma, MeanFieldGaussian, vmp_step};
/// # fn main() -> tch_blr::Result<()> {
/// // x = 1, 2, 3, 4 from N(m, 1/τ) with flat priors on m and ln τ:
/// // ℓ = ½τ Σ(xᵢ-m)² - 2 ln τ + ln τ, with E[Σ(xᵢ-m)²] = 30 - 20 E[m] + 4 E[m²]
/// let squares = |m: &Tensor| m.get(1) * 4.0 - m.get(0) * 20.0 + 30.0;
/// let mut mean = MeanFieldGaussian::new(&Tensor::from_slice(&[0.0]), &Tensor::from_slice(&[1.0]))?; // μ = E[m], E[m²]
/// let mut precision = Gamma::new(1.0, 1.0)?; // μ = E[ln τ], E[τ]
/// for _ in 0..100 {
///     let tau = precision.expectation();
///     mean = vmp_step(&mean, 1.0, |m| tau.get(1) * squares(m) * 0.5)?;
///     let m = mean.expectation();
///     precision = vmp_step(&precision, 1.0, |tau| tau.get(1) * squares(&m) * 0.5 - tau.get(0) * (2.0 - 1.0))?;
/// }
/// assert!((precision.mean() - 0.6).abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`gradient_mu`] and [`rule_step`].
pub fn vmp_step<F: ExponentialFamily>(q: &F, rho: f64, expected_loss: impl FnOnce(&Tensor) -> Tensor) -> Result<F> {
    rule_step(q, rho, &gradient_mu(q, expected_loss)?)
}
