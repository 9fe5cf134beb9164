//! Mean and variance of one parameter's iterates, as they come.

use crate::{DiagonalGaussian, Error, Result};
use tch::Tensor;

/// What a posterior of iterates takes for a variance that is smaller, as that of a weight that has not moved: 10⁻³⁰.
pub const SMALLEST_VARIANCE: f64 = 1e-30;

#[derive(Debug)]
pub(super) struct Moments {
    pub mean: Tensor,
    /// About the mean, in the iterates' own weights (biased); `None` where it is not asked for.
    pub variance: Option<Tensor>,
}

impl Moments {
    /// Of iterates that are all here. The tensor is written to.
    pub fn at(mean: Tensor, with_variance: bool) -> Self {
        let variance = with_variance.then(|| mean.zeros_like());
        Moments { mean, variance }
    }

    /// With r the share of these weights: m ← m + rδ, v ← (1-r)(v + rδ²), δ = θ - m.
    pub fn take_in(&mut self, weights: &Tensor, rate: f64) {
        let _no_grad = tch::no_grad_guard();
        if rate >= 1.0 {
            // Not by products with 0, which are NaN where what was there is not finite.
            self.mean.copy_(weights);
            self.variance.iter_mut().for_each(|v| _ = v.zero_());
            return;
        }
        if let Some(v) = &mut self.variance {
            let apart = weights - &self.mean;
            _ = v.addcmul_(&apart, &(&apart * rate)).g_mul_scalar_(1.0 - rate);
        }
        // libtorch's form of it, in which a weight that stays is its own average to the bit.
        _ = self.mean.lerp_(weights, rate);
    }
}

/// N(m, factor·v), v at least [`SMALLEST_VARIANCE`].
pub(super) fn gaussian<'a>(
    moments: impl IntoIterator<Item = (String, &'a Moments)>,
    factor: f64,
) -> Result<DiagonalGaussian> {
    let _no_grad = tch::no_grad_guard();
    let entries = moments.into_iter().map(|(name, Moments { mean, variance })| {
        let Some(v) = variance else { return Err(Error::parameter(&name, "it has no variance")) };
        Ok((name, mean.copy(), (clamped(v) * factor).reciprocal()))
    });
    DiagonalGaussian::sharing(entries.collect::<Result<Vec<_>>>()?)
}

pub(super) fn clamped(variance: &Tensor) -> Tensor {
    variance.clamp_min(SMALLEST_VARIANCE)
}

/// Errors for fewer than two iterates.
pub(super) fn check_some(what: &str, iterates: u64) -> Result<()> {
    if iterates >= 2 {
        return Ok(());
    }
    let few =
        format!("{what} iterates: it has {iterates}, and a variance needs at least 2; train on, and take in more");
    Err(Error::Posterior(few))
}
