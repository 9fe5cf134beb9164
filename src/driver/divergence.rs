//! A loss that rises although it is finite.

use super::average::Average;
use crate::{Error, Result};

/// Decay of the average, which is over some 50 updates.
const BETA: f64 = 0.98;
/// Losses behind an average that counts as one: a single batch may be an easy one.
const LEAST: f64 = 10.0;

/// How far the average of the loss may be above the lowest that it has been.
#[derive(Debug, Clone, Copy)]
pub(super) struct Divergence {
    margin: f64,
    average: Average,
    lowest: f64,
}

impl Divergence {
    pub(super) fn new(margin: f64) -> Self {
        Divergence { margin, average: Average::new(BETA), lowest: f64::INFINITY }
    }

    /// Before the first loss.
    pub(super) fn anew(self) -> Self {
        Divergence::new(self.margin)
    }

    /// With the loss of one more update, or an error.
    pub(super) fn with(self, loss: f64, step: u64) -> Result<Self> {
        let average = self.average.with(loss);
        if average.count() < LEAST {
            return Ok(Divergence { average, ..self });
        }
        let (value, margin) = (average.value(), self.margin);
        let lowest = self.lowest.min(value);
        // Not `>`: a NaN of infinite losses is no progress, either.
        if value - lowest <= margin {
            Ok(Divergence { average, lowest, ..self })
        } else {
            Err(Error::Diverged { average: value, lowest, margin, step })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Twelve ones, of which the last two are enough to count; then x: the average is 1 + (x-1)/w, with w the weight of
    /// thirteen numbers.
    #[test]
    fn averages_by_hand() {
        let mut watch = Divergence::new(2.0);
        for step in 0..12 {
            watch = watch.with(1.0, step).unwrap();
        }
        assert!((watch.lowest - 1.0).abs() < 1e-14);
        let weight = (1.0 - 0.98_f64.powi(13)) / 0.02;
        assert!(watch.with(1.0 + 1.99 * weight, 12).is_ok() && watch.with(-1e9, 12).is_ok());
        let Err(Error::Diverged { average, lowest, step, .. }) = watch.with(1.0 + 2.01 * weight, 12) else {
            panic!("{watch:?}")
        };
        assert!((average - 3.01).abs() < 1e-12 && (lowest, step) == (watch.lowest, 12));
        // The first few may do what they like.
        let mut start = Divergence::new(2.0).with(-1e3, 0).unwrap();
        for step in 1..9 {
            start = start.with(100.0, step).unwrap();
        }
        assert_eq!(start.lowest, f64::INFINITY);
    }
}
