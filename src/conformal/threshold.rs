//! The one number that calibration finds.

use crate::Result;
use crate::metrics::inputs::{open_unit, rank, scores};
use tch::Tensor;

/// q, the ⌈(n+1)(1-α)⌉-th smallest of n calibration scores `[n]`: an answer with a score ≤ q belongs to the set.
/// ∞ if that is beyond the n-th, for n < 1/α - 1.
///
/// # Errors
/// See the [module](crate::conformal#errors). Infinite scores are fine.
pub fn threshold(calibration: &Tensor, alpha: f64) -> Result<f64> {
    let mut scores = scores("scores", calibration)?;
    let k = rank((scores.len() + 1) as f64 * (1.0 - open_unit("alpha", alpha)?));
    scores.sort_unstable_by(f64::total_cmp);
    Ok(scores.get(k - 1).copied().unwrap_or(f64::INFINITY))
}
