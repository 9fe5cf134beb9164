//! An exponential average of numbers, without a bias towards its start.

/// Σ βᵏxₖ / Σ βᵏ, over the numbers from the latest on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Average {
    beta: f64,
    sum: f64,
    weight: f64,
}

impl Average {
    /// Of some 1/(1-β) numbers.
    pub(super) fn new(beta: f64) -> Self {
        Average { beta, sum: 0.0, weight: 0.0 }
    }

    #[must_use]
    pub(super) fn with(self, x: f64) -> Self {
        Average { sum: self.beta * self.sum + x, weight: self.beta * self.weight + 1.0, ..self }
    }

    /// NaN without a number.
    pub(super) fn value(self) -> f64 {
        self.sum / self.weight
    }

    /// Of how many numbers it is, nearly.
    pub(super) fn count(self) -> f64 {
        self.weight
    }
}
