//! The Bayesian learning rule, for every exponential family.

use super::ExponentialFamily;
use super::numbers::tensor;
use crate::{Error, Result, check};
use tch::{Kind, Tensor};

/// One step of the Bayesian learning rule (Khan and Rue, 2023, equation 3):
///
/// ```text
/// λ ← (1-ρ) λ - ρ ∇_μ E_q[ ℓ(θ) ]            ℓ = -ln p(data|θ) - ln prior(θ)
/// ```
///
/// `gradient` is ∇_μ E_q\[ℓ\], `[P]`, ρ > 0 the learning rate. A conjugate ℓ has a constant gradient -(λ₀ + Σ t(xᵢ)),
/// so ρ = 1 is Bayes' rule:
///
/// ```
/// use tch::Tensor;
/// use tch_blr::family::{Beta, ExponentialFamily, rule_step};
/// # fn main() -> tch_blr::Result<()> {
/// // A coin with prior Beta(2, 2) shows 7 heads and 3 tails.
/// let prior = Beta::new(2.0, 2.0)?;
/// let gradient = -(prior.natural() + Tensor::from_slice(&[7.0, 3.0]));
/// let q = rule_step(&Beta::new(0.5, 4.0)?, 1.0, &gradient)?; // from anywhere
/// assert_eq!((q.a(), q.b()), (9.0, 5.0));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// ρ that is not positive, a gradient of another length or not finite, and [`Error::Step`], with the largest ρ that
/// would do, if the step leaves the family.
pub fn rule_step<F: ExponentialFamily>(q: &F, rho: f64, gradient: &Tensor) -> Result<F> {
    check::positive("rho", rho)?;
    let lambda = q.natural();
    let gradient = tensor(F::NAME, "∇_μ E_q[ℓ]", gradient, &lambda.size())?;
    // As (1-ρ)λ - ρ∇ and not λ - ρ(λ + ∇): with ρ = 1, Bayes' rule is exact to the last bit.
    let step = |rho: f64| F::from_natural(&((1.0 - rho) * &lambda - rho * &gradient));
    step(rho).map_err(|e| leaves(rho, &e, |rho| step(rho).is_ok()))
}

/// The error of a step that ends outside. Natural parameters are a convex set, so that everything up to the largest
/// admissible ρ is inside, and bisection finds it.
pub(super) fn leaves(rho: f64, problem: &Error, inside: impl Fn(f64) -> bool) -> Error {
    let (mut largest, mut outside) = (0.0, rho);
    // To three digits, as the message shows; the second limit ends it when no ρ is inside.
    while outside - largest > 5e-4 * outside && outside > 1e-12 * rho {
        let middle = 0.5 * (largest + outside);
        *(if inside(middle) { &mut largest } else { &mut outside }) = middle;
    }
    Error::Step { rho, largest, problem: problem.to_string() }
}

/// ∇_μ of an expected loss that is written as a function of μ, `[P]`, by libtorch's differentiation.
///
/// # Errors
/// A loss that is not one finite number, or has no finite gradient.
pub fn gradient_mu<F: ExponentialFamily>(q: &F, expected_loss: impl FnOnce(&Tensor) -> Tensor) -> Result<Tensor> {
    let mu = q.expectation().set_requires_grad(true);
    // Also where the caller has switched gradients off.
    let loss = tch::with_grad(|| expected_loss(&mu));
    _ = tensor(F::NAME, "the expected loss", &loss, &[])?;
    if !loss.requires_grad() {
        return Ok(mu.detach().zeros_like()); // a constant
    }
    let gradient = Tensor::f_run_backward(&[&loss], &[&mu], false, false)?.remove(0);
    let gradient = if gradient.defined() { gradient } else { mu.zeros_like() };
    tensor(F::NAME, "∇_μ E_q[ℓ]", &gradient, &mu.size())
}

/// The posterior of a conjugate model: one step of the rule with ρ = 1, λ = λ₀ + Σ t(xᵢ).
///
/// `likelihood` is `[n, P]`, from [`ConjugatePrior::likelihood`](super::ConjugatePrior::likelihood) or
/// [`Gaussian::linear_likelihood`](super::Gaussian::linear_likelihood).
///
/// # Errors
/// Another shape, or a sum outside of the family.
pub fn conjugate_posterior<F: ExponentialFamily>(prior: &F, likelihood: &Tensor) -> Result<F> {
    let lambda = prior.natural();
    let likelihood = tensor(F::NAME, "the likelihood", likelihood, &[-1, lambda.size()[0]])?;
    rule_step(prior, 1.0, &-(lambda + likelihood.sum_dim_intlist(0, false, Kind::Double)))
}

/// Repeats a step until no natural parameter moves by more than `tolerance` times the largest of them.
///
/// # Errors
/// The step's, or [`Error::NotConverged`] after `max_steps`.
pub fn converge<F: ExponentialFamily>(
    start: F,
    tolerance: f64,
    max_steps: usize,
    mut step: impl FnMut(&F) -> Result<F>,
) -> Result<F> {
    let mut q = start;
    let mut change = f64::INFINITY;
    for _ in 0..max_steps {
        let next = step(&q)?;
        let lambda = next.natural();
        // Against the largest, because single parameters may go to zero.
        change = ((&lambda - q.natural()).abs().max() / lambda.abs().max()).double_value(&[]);
        q = next;
        if change <= tolerance {
            return Ok(q);
        }
    }
    Err(Error::NotConverged { steps: max_steps, change })
}
