//! A loss that rises although it is finite.

use crate::{Error, Result};

/// Of the average; it is over some 50 updates.
const BETA: f64 = 0.98;

/// How far the average of the loss may be above the lowest that it has been.
#[derive(Debug, Clone, Copy)]
pub(super) struct Divergence {
    margin: f64,
    /// BETA-weighted sums of the losses and of ones.
    sum: f64,
    weight: f64,
    lowest: f64,
}

impl Divergence {
    pub(super) fn new(margin: f64) -> Self {
        Divergence { margin, sum: 0.0, weight: 0.0, lowest: f64::INFINITY }
    }

    /// Before the first loss.
    pub(super) fn anew(self) -> Self {
        Divergence::new(self.margin)
    }

    /// With the loss of one more update, or an error.
    pub(super) fn with(self, loss: f64, step: u64) -> Result<Self> {
        let sum = BETA * self.sum + loss;
        let weight = BETA * self.weight + 1.0;
        let average = sum / weight;
        let lowest = self.lowest.min(average);
        // Not `>`: a NaN of infinite losses is no progress, either.
        if average - lowest <= self.margin {
            Ok(Divergence { sum, weight, lowest, ..self })
        } else {
            Err(Error::Diverged { average, lowest, margin: self.margin, step })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Averages 4, (3.92 + 1)/1.98, (0.98·4.92 + 9)/2.9404.
    #[test]
    fn averages_by_hand() {
        let first = Divergence::new(2.0).with(4.0, 0).unwrap().with(1.0, 1).unwrap();
        assert!((first.lowest - 4.92 / 1.98).abs() < 1e-15);
        let Err(Error::Diverged { average, lowest, step, .. }) = first.with(9.0, 2) else { panic!("{first:?}") };
        assert!((average - (0.98 * 4.92 + 9.0) / 2.9404).abs() < 1e-15);
        assert!((lowest, step) == (first.lowest, 2));
        assert!(first.with(8.0, 2).is_ok() && first.with(-1e9, 2).is_ok());
    }
}
