//! Calibration: confidence against accuracy in bins of confidence.

use super::probabilities::{check, top};
use crate::{Error, Result};
use tch::Tensor;

/// Expected calibration error with `bins` equal-width bins: [`Reliability::ece`] of [`reliability`].
///
/// # Errors
/// See the [module](crate::metrics#errors); `bins` = 0 is an error too.
pub fn ece(probs: &Tensor, labels: &Tensor, bins: usize) -> Result<f64> {
    Ok(reliability(probs, labels, bins)?.ece())
}

/// Sorts the examples into `bins` (B) equal-width bins of confidence and compares confidence with accuracy in each.
///
/// Bin b = 0, …, B-1 is open on the left and closed on the right: b/B < pₙ(ĉₙ) ≤ (b+1)/B (Guo et al. 2017, "On
/// Calibration of Modern Neural Networks", section 2). Usual choices of B are 10, 15 and 20.
///
/// # Errors
/// See the [module](crate::metrics#errors); `bins` = 0 is an error too.
pub fn reliability(probs: &Tensor, labels: &Tensor, bins: usize) -> Result<Reliability> {
    if bins == 0 {
        return Err(Error::Metric("bins = 0: expected at least one bin".into()));
    }
    let (p, y) = check(probs, labels)?;
    let mut sums = vec![(0_usize, 0.0, 0_usize); bins];
    for (row, &y) in p.rows().zip(&y) {
        let (class, confidence) = top(row);
        let (count, sum, hits) = &mut sums[bin_of(confidence, bins)];
        *count += 1;
        *sum += confidence;
        *hits += usize::from(class == y);
    }
    // An empty bin has no mean, and 0 takes no part in the sums, where its count weighs it.
    let mean = |sum: f64, count: usize| if count == 0 { 0.0 } else { sum / count as f64 };
    let bins = sums
        .iter()
        .enumerate()
        .map(|(b, &(count, sum, hits))| Bin {
            lower: b as f64 / bins as f64,
            upper: (b + 1) as f64 / bins as f64,
            count,
            confidence: mean(sum, count),
            accuracy: mean(hits as f64, count),
        })
        .collect();
    Ok(Reliability { bins })
}

/// A reliability diagram as a table: one row per bin of confidence. Comes from [`reliability`].
#[derive(Debug, Clone, PartialEq)]
pub struct Reliability {
    /// The bins, from confidence 0 to 1; empty ones included.
    pub bins: Vec<Bin>,
}

/// The examples whose confidence lies in (`lower`, `upper`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bin {
    /// Lower edge, excluded.
    pub lower: f64,
    /// Upper edge, included.
    pub upper: f64,
    /// `n_b`: number of examples.
    pub count: usize,
    /// `conf_b`: mean confidence; 0 in an empty bin.
    pub confidence: f64,
    /// `acc_b`: share of correct predictions; 0 in an empty bin.
    pub accuracy: f64,
}

impl Reliability {
    /// Number of examples, `N = Σ_b n_b`.
    pub fn examples(&self) -> usize {
        self.bins.iter().map(|b| b.count).sum()
    }

    /// Expected calibration error: `Σ_b (n_b / N) |acc_b - conf_b|` (Guo et al. 2017, equation 3); 0 without examples.
    pub fn ece(&self) -> f64 {
        let sum: f64 = self.bins.iter().map(|b| b.count as f64 * (b.accuracy - b.confidence).abs()).sum();
        sum / self.examples().max(1) as f64
    }

    /// Mean confidence less accuracy, in (-1, 1), 0 without examples: above 0 the predictions are surer than right, below 0 less sure, as of
    /// a posterior that is too wide ([`DiagonalGaussian::fit_temperature`](crate::DiagonalGaussian::fit_temperature)).
    pub fn overconfidence(&self) -> f64 {
        let sum: f64 = self.bins.iter().map(|b| b.count as f64 * (b.confidence - b.accuracy)).sum();
        sum / self.examples().max(1) as f64
    }

    /// Maximum calibration error: `max_b |acc_b - conf_b|` over bins that hold examples (Guo et al. 2017, equation 5).
    pub fn mce(&self) -> f64 {
        self.bins.iter().filter(|b| b.count > 0).map(|b| (b.accuracy - b.confidence).abs()).fold(0.0, f64::max)
    }
}

/// The bin b with b/B < confidence ≤ (b+1)/B; confidences that rounding put outside of (0, 1] go into the end bins.
fn bin_of(confidence: f64, bins: usize) -> usize {
    let edge = |b: usize| b as f64 / bins as f64;
    let mut b = ((confidence * bins as f64).ceil().max(1.0) as usize).min(bins) - 1;
    // The product above rounds: 0.07 · 100 > 7, although 0.07 is not above 7/100.
    if b > 0 && confidence <= edge(b) {
        b -= 1;
    } else if b + 1 < bins && confidence > edge(b + 1) {
        b += 1;
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_edge_is_in_the_bin_to_its_left() {
        for bins in 1..=200 {
            for b in 0..bins {
                let upper = (b + 1) as f64 / bins as f64;
                assert_eq!(bin_of(upper, bins), b, "upper edge of bin {b} of {bins}");
                assert_eq!(bin_of(upper.next_up(), bins), (b + 1).min(bins - 1), "above bin {b} of {bins}");
            }
            assert_eq!(bin_of(0.0, bins), 0);
        }
    }
}
