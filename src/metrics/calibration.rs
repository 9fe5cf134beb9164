//! Calibration: confidence against accuracy in bins of confidence.

use super::inputs::{check, top};
use crate::{Error, Result};
use tch::Tensor;

/// Expected calibration error with `bins` equal-width bins: [`Reliability::ece`] of [`reliability`].
///
/// Of N predictions that are calibrated it is not 0 but of the order of √(B/N): report N and B beside it, and compare
/// numbers of the same two. [`Reliability::debiased_square`] has that part taken out.
///
/// # Errors
/// See the [module](crate::metrics#errors); `bins` = 0 is an error too.
pub fn ece(probs: &Tensor, labels: &Tensor, bins: usize) -> Result<f64> {
    Ok(reliability(probs, labels, bins)?.ece())
}

/// Expected calibration error with `bins` bins that hold equally many examples: [`Reliability::ece`] of
/// [`adaptive_reliability`]. Confidences near 1, where most of a network's are, do not all fall into one bin.
///
/// # Errors
/// See the [module](crate::metrics#errors); `bins` = 0 is an error too.
pub fn adaptive_ece(probs: &Tensor, labels: &Tensor, bins: usize) -> Result<f64> {
    Ok(adaptive_reliability(probs, labels, bins)?.ece())
}

/// Mean over the classes c of the calibration error of pₙ(c) as a probability of yₙ = c, in `bins` equal-width bins
/// (Kull et al. 2019, *Beyond Temperature Scaling*): it also sees the classes that are not predicted.
///
/// # Errors
/// See the [module](crate::metrics#errors); `bins` = 0 is an error too.
pub fn classwise_ece(probs: &Tensor, labels: &Tensor, bins: usize) -> Result<f64> {
    let (p, y) = check(probs, labels)?;
    let of_class = |c: usize| Ok(equal_width(p.rows().zip(&y).map(|(row, &y)| (row[c], y == c)), bins)?.ece());
    Ok((0..p.classes()).map(of_class).sum::<Result<f64>>()? / p.classes() as f64)
}

/// Sorts the examples into `bins` (B) equal-width bins of confidence and compares confidence with accuracy in each.
///
/// Bin b = 0, …, B-1 is open on the left and closed on the right: b/B < pₙ(ĉₙ) ≤ (b+1)/B (Guo et al. 2017, "On
/// Calibration of Modern Neural Networks", section 2); codes that take ⌊B pₙ(ĉₙ)⌋ put a confidence on an edge into the
/// next bin. Usual choices of B are 10, 15 and 20.
///
/// # Errors
/// See the [module](crate::metrics#errors); `bins` = 0 is an error too.
pub fn reliability(probs: &Tensor, labels: &Tensor, bins: usize) -> Result<Reliability> {
    equal_width(predicted(probs, labels)?, bins)
}

/// The same with bins of equally many examples, from the least confident on (Nguyen and O'Connor 2015): an example with
/// r others below its confidence is in bin ⌊B r/N⌋. So equal confidences stay together, and the order of the examples
/// does not matter; bins that are left empty by that are left out.
///
/// # Errors
/// See the [module](crate::metrics#errors); `bins` = 0 is an error too.
pub fn adaptive_reliability(probs: &Tensor, labels: &Tensor, bins: usize) -> Result<Reliability> {
    equal_mass(predicted(probs, labels)?.collect(), bins)
}

/// Confidence, and whether the prediction is right.
fn predicted(probs: &Tensor, labels: &Tensor) -> Result<impl Iterator<Item = (f64, bool)>> {
    let (p, y) = check(probs, labels)?;
    let each = p.rows().zip(&y).map(|(row, &y)| (top(row).1, top(row).0 == y));
    Ok(each.collect::<Vec<_>>().into_iter())
}

/// Of events with the probabilities that were given to them.
fn equal_width(events: impl Iterator<Item = (f64, bool)>, bins: usize) -> Result<Reliability> {
    let mut sums = vec![Sum::default(); at_least_one(bins)?];
    for event in events {
        sums[bin_of(event.0, bins)].add(event);
    }
    let edge = |b: usize| b as f64 / bins as f64;
    Ok(Reliability { bins: sums.iter().enumerate().map(|(b, sum)| sum.bin(edge(b), edge(b + 1))).collect() })
}

fn equal_mass(mut events: Vec<(f64, bool)>, bins: usize) -> Result<Reliability> {
    at_least_one(bins)?;
    // By the hit as well, so that sums are added up in an order that is not that of the examples.
    events.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let (n, mut below, mut lower) = (events.len() as u128, 0, 0.0);
    let mut found: Vec<(u128, Sum)> = Vec::new();
    for tied in events.chunk_by(|a, b| a.0 == b.0) {
        let b = below * bins as u128 / n;
        let mut sum = found.pop_if(|(last, _)| *last == b).map_or_else(Sum::default, |(_, sum)| sum);
        for event in tied {
            sum.add(*event);
        }
        found.push((b, sum));
        below += tied.len() as u128;
    }
    let bins = found.iter().map(|(_, sum)| {
        let bin = sum.bin(lower, sum.largest);
        lower = sum.largest;
        bin
    });
    Ok(Reliability { bins: bins.collect() })
}

fn at_least_one(bins: usize) -> Result<usize> {
    if bins == 0 { Err(Error::Metric("bins = 0: expected at least one bin".into())) } else { Ok(bins) }
}

/// The events of a bin, added up.
#[derive(Debug, Clone, Default)]
struct Sum {
    count: usize,
    confidence: f64,
    hits: usize,
    largest: f64,
}

impl Sum {
    fn add(&mut self, (confidence, hit): (f64, bool)) {
        self.count += 1;
        self.confidence += confidence;
        self.hits += usize::from(hit);
        self.largest = self.largest.max(confidence);
    }

    fn bin(&self, lower: f64, upper: f64) -> Bin {
        // An empty bin has no mean, and 0 takes no part in the sums, where its count weighs it.
        let mean = |sum: f64| if self.count == 0 { 0.0 } else { sum / self.count as f64 };
        let (confidence, accuracy) = (mean(self.confidence), mean(self.hits as f64));
        Bin { lower, upper, count: self.count, confidence, accuracy }
    }
}

/// A reliability diagram as a table: one row per bin of confidence. Comes from [`reliability`] or
/// [`adaptive_reliability`].
#[derive(Debug, Clone, PartialEq)]
pub struct Reliability {
    /// The bins, from the lowest confidence to the highest; of equal width, also the empty ones.
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

    /// Mean confidence less accuracy, in (-1, 1), 0 without examples: above 0 the predictions are surer than right,
    /// below 0 less sure, as of a posterior that is too wide
    /// ([`DiagonalGaussian::fit_temperature`](crate::DiagonalGaussian::fit_temperature)).
    pub fn overconfidence(&self) -> f64 {
        let sum: f64 = self.bins.iter().map(|b| b.count as f64 * (b.confidence - b.accuracy)).sum();
        sum / self.examples().max(1) as f64
    }

    /// The squared calibration error of the bins, `Σ_b (n_b / N) (acc_b - conf_b)²`, less what chance adds to it:
    /// `acc_b (1 - acc_b) / (n_b - 1)` of each gap (Kumar et al. 2019, *Verified Uncertainty Calibration*). So it is 0
    /// on average where the bins are calibrated, and can be negative. Bins of one example, whose chance cannot be
    /// estimated, are left out, and N counts the others; 0 without any.
    pub fn debiased_square(&self) -> f64 {
        let several = || self.bins.iter().filter(|b| b.count > 1);
        let of_bin = |b: &Bin| {
            let n = b.count as f64;
            n * ((b.accuracy - b.confidence).powi(2) - b.accuracy * (1.0 - b.accuracy) / (n - 1.0))
        };
        several().map(of_bin).sum::<f64>() / several().map(|b| b.count).sum::<usize>().max(1) as f64
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
