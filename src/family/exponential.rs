//! What an exponential family is.

use super::numbers::tensor;
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// q(x) = exp( ⟨λ, T(x)⟩ - A(λ) ), a family of distributions in natural parameters λ.
///
/// ```text
/// T(x)          sufficient statistics
/// A(λ)          log-partition, ln ∫ exp⟨λ, T(x)⟩ dx
/// μ = E_q[T] = ∇A(λ)                        expectation parameters; λ ↔ μ is one to one
/// H(q)     = A(λ) - ⟨λ, μ⟩
/// KL(q‖p)  = ⟨λ_q - λ_p, μ_q⟩ - A(λ_q) + A(λ_p)
/// ```
///
/// λ, μ and ∇_μ are f64 vectors `[P]` on the CPU, in a layout that each family documents. The base measure is 1
/// throughout, as the rule needs it (`T` and `A` are chosen so). Draws come in batches, counted by the first
/// dimension; logarithms are natural, entropies in nats.
pub trait ExponentialFamily: Sized {
    /// Name for messages.
    const NAME: &'static str;

    /// The distribution with natural parameters λ, `[P]`.
    ///
    /// # Errors
    /// λ that the family does not have, naming the parameter at fault.
    fn from_natural(lambda: &Tensor) -> Result<Self>;

    /// λ, `[P]`
    fn natural(&self) -> Tensor;

    /// The distribution with expectation parameters μ, `[P]`: the most likely one for draws whose statistics average
    /// to μ.
    ///
    /// # Errors
    /// μ that the family does not have, naming the parameter at fault.
    fn from_expectation(mu: &Tensor) -> Result<Self>;

    /// μ, `[P]`
    fn expectation(&self) -> Tensor;

    /// A(λ)
    fn log_partition(&self) -> f64;

    /// T(x) of each of n draws, `[n, P]`.
    ///
    /// # Errors
    /// Another shape than this distribution's draws have, numbers outside of the support.
    fn statistics(&self, x: &Tensor) -> Result<Tensor>;

    /// n independent draws, always the same ones for the same seed.
    fn sample(&self, n: usize, seed: u64) -> Tensor;

    /// ln q(x) of each draw, `[n]`.
    ///
    /// # Errors
    /// As [`ExponentialFamily::statistics`].
    fn log_density(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.statistics(x)?.mv(&self.natural()) - self.log_partition())
    }

    /// H(q) = -E_q[ln q]; differential where x is continuous.
    fn entropy(&self) -> f64 {
        // A closed form only because the base measure is 1.
        self.log_partition() - dot(&self.natural(), &self.expectation())
    }

    /// KL(self ‖ p), zero only for equal parameters; exact to the rounding of the terms above.
    ///
    /// # Errors
    /// If p has another dimension.
    fn kl(&self, p: &Self) -> Result<f64> {
        let (lambda, prior) = (self.natural(), p.natural());
        let prior = tensor(Self::NAME, "λ of the other distribution", &prior, &lambda.size())?;
        let kl = dot(&(lambda - prior), &self.expectation()) - self.log_partition() + p.log_partition();
        // Rounding can take it a little below zero, which no caller expects.
        Ok(if kl < 0.0 { 0.0 } else { kl })
    }
}

/// A prior whose posterior stays in the family: ln p(x|θ) = ⟨t(x), T(θ)⟩ + const.
///
/// [`conjugate_posterior`](super::conjugate_posterior) builds on it.
pub trait ConjugatePrior: ExponentialFamily {
    /// t(x) of each of n data, `[n, P]`: what it adds to the natural parameters.
    ///
    /// # Errors
    /// Another shape, or data outside of the likelihood's support.
    fn likelihood(&self, x: &Tensor) -> Result<Tensor>;
}

pub(super) fn dot(a: &Tensor, b: &Tensor) -> f64 {
    (a * b).sum(Kind::Double).double_value(&[])
}

/// The length of λ of which `size(d)` numbers make a distribution of dimension d.
pub(super) fn dimension(family: &'static str, lambda: &Tensor, size: impl Fn(i64) -> i64) -> Result<i64> {
    let n = if lambda.defined() { lambda.numel() as i64 } else { 0 };
    (1..=n)
        .find(|d| size(*d) >= n)
        .filter(|d| size(*d) == n)
        .ok_or_else(|| Error::family(family, format!("{n} parameters are not of the layout of this family")))
}

/// Checks that a mixture has as many components as classes, all of one dimension.
pub(super) fn components<F: ExponentialFamily>(mixture: &'static str, classes: usize, components: &[F]) -> Result<()> {
    let sizes: Vec<usize> = components.iter().map(|q| q.natural().numel()).collect();
    if sizes.len() != classes {
        let problem = format!("{} components: expected {classes}, one for each weight", sizes.len());
        return Err(Error::family(mixture, problem));
    }
    if sizes.iter().any(|n| *n != sizes[0]) {
        return Err(Error::family(mixture, format!("components have {sizes:?} parameters: expected as many in each")));
    }
    Ok(())
}
