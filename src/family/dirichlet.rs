//! The Dirichlet distribution.

use super::numbers::{inside, positive_tensor, tensor, trigamma};
use super::random::Stream;
use super::{ConjugatePrior, ExponentialFamily};
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// Dirichlet with concentrations α on probability vectors of length K ≥ 2; P = K.
///
/// ```text
/// λ = α - 1        T(x) = ln x        μₖ = ψ(αₖ) - ψ(Σα)        A = Σ ln Γ(αₖ) - ln Γ(Σα)
/// ```
///
/// Draws: `[n, K]`; the density is over the first K-1 of their numbers. Conjugate to classes x ~ Categorical(θ):
/// α_x ← α_x + 1.
#[derive(Debug)]
pub struct Dirichlet {
    concentration: Tensor,
}

impl Dirichlet {
    /// From α `[K]`, all above 0.
    ///
    /// # Errors
    /// Any other, or K < 2.
    pub fn new(concentration: &Tensor) -> Result<Self> {
        let concentration = positive_tensor(Self::NAME, "the concentrations α", concentration, &[-1])?;
        if concentration.numel() < 2 {
            return Err(Error::family(Self::NAME, "one class: expected two or more"));
        }
        Ok(Dirichlet { concentration })
    }

    /// α, `[K]`
    pub fn concentration(&self) -> &Tensor {
        &self.concentration
    }

    /// α/Σα, `[K]`
    pub fn mean(&self) -> Tensor {
        &self.concentration / self.concentration.sum(Kind::Double)
    }
}

/// α with ψ(αₖ) - ψ(Σα) = μₖ: the minimum of the convex A(α) - ⟨α, μ⟩, by Newton's method with steps of 1/(1+δ) where
/// δ² = gᵀH⁻¹g, which keep α positive. H = diag ψ′(α) - ψ′(Σα) 11ᵀ is inverted by the formula of Sherman and
/// Morrison.
pub(super) fn concentration(family: &'static str, mu: &Tensor) -> Result<Tensor> {
    // By Jensen's inequality Σ exp E[ln xₖ] < Σ E[xₖ] = 1: no α has any other μ, and the iteration would run off.
    let mass = mu.exp().sum(Kind::Double).double_value(&[]);
    if mass.partial_cmp(&1.0) != Some(std::cmp::Ordering::Less) {
        let problem = format!("Σ exp μ = {mass}: expected a number < 1, as E[ln x] lies below ln E[x]");
        return Err(Error::family(family, problem));
    }
    let total = |t: &Tensor| t.sum(Kind::Double);
    let mut alpha = mu.ones_like();
    // Damped steps are short far from the minimum; from there on, convergence is quadratic.
    for _ in 0..1000 {
        let sum = total(&alpha);
        let gradient = alpha.digamma() - sum.digamma() - mu;
        let inverse = trigamma(&alpha).reciprocal();
        let shared = total(&(&gradient * &inverse)) / (trigamma(&sum).reciprocal() - total(&inverse));
        let newton = (&gradient + shared) * &inverse;
        let decrement = total(&(&gradient * &newton)).double_value(&[]).max(0.0).sqrt();
        // Full steps close to the minimum, where the damping would only make the convergence linear.
        let step = newton / (1.0 + if decrement < 0.1 { 0.0 } else { decrement });
        let change = (&step / &alpha).abs().max().double_value(&[]);
        // Rounding can take even a damped step below zero; a tenth of the last value is still inside.
        alpha = (&alpha - step).maximum(&(alpha * 0.1));
        // Some 50 units of the last digit, relative to each α: what is left is rounding of ψ.
        if change < 1e-14 {
            break;
        }
    }
    positive_tensor(family, "the concentrations α", &alpha, &[-1])
}

impl ExponentialFamily for Dirichlet {
    const NAME: &'static str = "Dirichlet";

    fn from_natural(lambda: &Tensor) -> Result<Self> {
        Self::new(&(tensor(Self::NAME, "λ", lambda, &[-1])? + 1.0))
    }

    fn natural(&self) -> Tensor {
        &self.concentration - 1.0
    }

    fn from_expectation(mu: &Tensor) -> Result<Self> {
        Self::new(&concentration(Self::NAME, &tensor(Self::NAME, "μ", mu, &[-1])?)?)
    }

    fn expectation(&self) -> Tensor {
        self.concentration.digamma() - self.concentration.sum(Kind::Double).digamma()
    }

    fn log_partition(&self) -> f64 {
        let sum = self.concentration.sum(Kind::Double);
        (self.concentration.lgamma().sum(Kind::Double) - sum.lgamma()).double_value(&[])
    }

    fn statistics(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor(Self::NAME, "x", x, &[-1, self.concentration.size()[0]])?;
        // Rounding of a division by the sum, for any K that fits into memory, and far below what a wrong vector
        // misses by.
        let sums = (x.sum_dim_intlist(1, false, Kind::Double) - 1.0).abs().lt(1e-9);
        let ok = x.gt(0.0).all_dim(1, false).logical_and(&sums);
        inside(Self::NAME, x.log(), &ok, "of positive numbers that sum to 1")
    }

    fn sample(&self, n: usize, seed: u64) -> Tensor {
        let mut stream = Stream::new(seed);
        let alpha: Vec<f64> =
            (0..self.concentration.size()[0]).map(|k| self.concentration.double_value(&[k])).collect();
        let x: Vec<f64> = (0..n).flat_map(|_| alpha.iter().map(|a| stream.gamma(*a)).collect::<Vec<_>>()).collect();
        let x = Tensor::from_slice(&x).reshape([n as i64, -1]);
        // A gamma draw of a small α may underflow when it is divided, and ln 0 is infinite.
        (&x / x.sum_dim_intlist(1, true, Kind::Double)).clamp_min(f64::MIN_POSITIVE)
    }
}

impl ConjugatePrior for Dirichlet {
    /// x ~ Categorical(θ), x in {0, …, K-1}: t(x) = the unit vector of x
    fn likelihood(&self, x: &Tensor) -> Result<Tensor> {
        let x = tensor("Categorical", "x", x, &[-1])?;
        let classes = Tensor::arange(self.concentration.size()[0], (Kind::Double, x.device()));
        let one_hot = x.unsqueeze(1).eq_tensor(&classes).to_kind(Kind::Double);
        let known = one_hot.sum_dim_intlist(1, false, Kind::Double).eq(1.0);
        inside("Categorical", one_hot, &known, "{0, …, K-1}")
    }
}
