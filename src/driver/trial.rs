//! Updates that could leave the range of the numbers are tried out before anything is written: finite gradients and
//! settings can have products that are not, and an error has to leave everything as it was.

use super::arithmetic::{Step, Unit};
use super::rule::Rule;
use crate::kernel::{self, Elementwise, Job};
use crate::params::Leaf;
use crate::{Error, Result};
use arrayvec::ArrayVec;
use tch::Kind;

impl<R: Rule> Unit<R> {
    /// Whether an update could leave the range of the numbers, so that it is tried out before anything is written.
    pub(super) fn may_overflow(&self, leaf: &Leaf, step: Step, largest_norm: f64) -> bool {
        let ess = self.row.effective_sample_size().unwrap_or(1.0);
        let scale = ess.max(1.0) * self.when(1, step.lr_factor).lr.max(1.0);
        // A NaN: nobody has looked, because nobody wants to know (`check_finite`).
        !largest_norm.is_nan() && (self.kept.untried || largest_norm * scale > large(leaf))
    }
}

/// Computes an update without writing it, a piece at a time. Whether some of its results are large.
///
/// # Errors
/// One has an element that is not finite, and what it would replace has none.
pub(super) fn try_out(job: &Job<impl Elementwise + Copy + Sync>, leaf: &Leaf, step: Step) -> Result<bool> {
    let mut squares: ArrayVec<f64, { 1 + kernel::MAX_STATES }> = job.outputs.iter().map(|_| 0.0).collect();
    job.try_out(|i, new| {
        // The mean also as the variable will hold it.
        let new = if i == 0 { new.to_kind(leaf.tensor.kind()) } else { new.shallow_clone() };
        squares[i] += kernel::sum_of_squares([&new])?;
        if !squares[i].is_finite()
            && let Some(value) = kernel::first_non_finite(&new)
            && job.outputs[i].is_some_and(|old| kernel::first_non_finite(old).is_none())
        {
            let what = if i == 0 { "updated mean" } else { "updated precision or momentum" };
            return Err(Error::NonFiniteGradient { what, name: leaf.name().to_owned(), value, step: step.number });
        }
        Ok(())
    })?;
    // Or a NaN, of an element that was one before.
    Ok(squares.iter().any(|sum| sum.is_nan() || sum.sqrt() >= large(leaf)))
}

/// About the third root of the largest number: a statistic is the square of a gradient, times a factor.
fn large(leaf: &Leaf) -> f64 {
    if leaf.state_kind() == Kind::Double { 1e100 } else { 1e12 }
}
