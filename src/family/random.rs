//! Draws from a counter: the same seed gives the same draws, whatever else runs.

use crate::kernel::{self, words};

/// Random numbers read in sequence.
pub(super) struct Stream {
    seed: u64,
    counter: u64,
}

impl Stream {
    pub fn new(seed: u64) -> Self {
        Stream { seed, counter: 0 }
    }

    /// Uniform on the open interval (0, 1), 52 bits.
    pub fn uniform(&mut self) -> f64 {
        let [high, low, ..] = words(self.seed, kernel::Stream::Family, self.counter);
        self.counter += 1;
        // 52 bits and a half: with 53, the ½ below would be rounded away, and 1 could come out.
        let bits = (u64::from(high) << 32 | u64::from(low)) >> 12;
        (bits as f64 + 0.5) / (1u64 << 52) as f64
    }

    /// N(0, 1) by Box and Muller's transform.
    pub fn normal(&mut self) -> f64 {
        // Only the cosine: keeping the sine for the next call would need a state of its own.
        (-2.0 * self.uniform().ln()).sqrt() * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// Gamma(shape, 1) by the method of Marsaglia and Tsang (2000): x = d(1+cz)³ is nearly right, the rest is
    /// rejected. Shapes below one come from the shape above by U^(1/shape), where the smallest positive number stands
    /// for all below.
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            let above = self.gamma(shape + 1.0);
            return (above * self.uniform().powf(1.0 / shape)).max(f64::MIN_POSITIVE);
        }
        // ⅓ and 9d are the constants of the paper, which match the gamma's cube root to a normal.
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let z = self.normal();
            // Not positive for z < -1/c, where the transform has no inverse.
            let v = (1.0 + c * z).powi(3);
            if v > 0.0 && self.uniform().ln() < 0.5 * z * z + d * (1.0 - v + v.ln()) {
                return d * v;
            }
        }
    }
}
