//! Scores that tell what is foreign: a high one means out of distribution.

use super::inputs::{rank, scores};
use crate::{Error, Result};
use tch::Tensor;

/// Area under the ROC curve of "a high score means out of distribution": P(out > in) + ½ P(out = in).
///
/// `in_scores` is `[N]` and `out_scores` `[M]`, of any floating kind and device, for instance the
/// [`entropy`](crate::metrics::entropy) of the predictions on the test set and on foreign inputs. 1 separates
/// perfectly, ½ is chance. By ranks (Mann-Whitney U, equal scores share a rank), counted in integers:
/// O((N+M) log(N+M)) and `auroc(x, y) + auroc(y, x) = 1`.
///
/// # Errors
/// [`Error::Metric`](crate::Error::Metric) if either is not a 1-D floating tensor, is empty or holds a NaN. Infinite
/// scores are fine.
pub fn auroc(in_scores: &Tensor, out_scores: &Tensor) -> Result<f64> {
    let inside = scores("in_scores", in_scores)?;
    let outside = scores("out_scores", out_scores)?;
    let mut all: Vec<(f64, bool)> =
        inside.iter().map(|&s| (s, false)).chain(outside.iter().map(|&s| (s, true))).collect();
    // total_cmp, as infinities are allowed. It puts -0 before 0, but they are equal below and share a rank.
    all.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    // Twice the number of pairs with out > in, plus the number of pairs with out = in.
    // Integers: doubled, a tie counts 1, and no rounding keeps the two directions from adding up to 1.
    let (mut twice_u, mut inside_below) = (0_u128, 0_u128);
    for tied in all.chunk_by(|a, b| a.0 == b.0) {
        let outs = tied.iter().filter(|(_, out)| *out).count() as u128;
        let ins = tied.len() as u128 - outs;
        twice_u += outs * (2 * inside_below + ins);
        inside_below += ins;
    }
    Ok(twice_u as f64 / (2.0 * inside.len() as f64 * outside.len() as f64))
}

/// The score up to which a share `level` of the inside lies: the ⌈level·N⌉-th smallest of `in_scores`. Whoever calls
/// everything above it foreign keeps at least that share of what is not; all of it if N < 1/(1-level).
///
/// # Errors
/// As [`auroc`]; a level that is not in (0, 1].
pub fn threshold_at(in_scores: &Tensor, level: f64) -> Result<f64> {
    let mut inside = scores("in_scores", in_scores)?;
    if !(level > 0.0 && level <= 1.0) {
        return Err(Error::Metric(format!("level = {level}: expected a number in (0, 1]")));
    }
    inside.sort_unstable_by(f64::total_cmp);
    Ok(inside[rank(level * inside.len() as f64) - 1])
}

/// False positives where a share `level` of the inside passes: the share of `out_scores` that are not above
/// [`threshold_at`]. FPR@95, as it is called, is that at level 0.95; 0 is best.
///
/// Scores are those of [`auroc`]: a high one means out of distribution. Take the negative of one that means the
/// opposite.
///
/// # Errors
/// As [`threshold_at`].
pub fn fpr_at(in_scores: &Tensor, out_scores: &Tensor, level: f64) -> Result<f64> {
    let outside = scores("out_scores", out_scores)?;
    let threshold = threshold_at(in_scores, level)?;
    Ok(outside.iter().filter(|s| **s <= threshold).count() as f64 / outside.len() as f64)
}
