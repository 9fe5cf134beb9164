//! Two moons in the plane.

use crate::random::Rng;
use std::f64::consts::PI;
use tch::Tensor;

/// Two interleaving half circles of radius 1: points `[n, 2]` f32 and classes `[n]` i64, alternating 0 and 1.
///
/// Class 0 is (cos t, sin t), class 1 is (1 - cos t, ½ - sin t), t evenly spaced over [0, π], plus normal noise of
/// standard deviation `noise`.
pub fn moons(n: usize, noise: f64, seed: u64) -> (Tensor, Tensor) {
    let mut rng = Rng::new(seed, 50);
    let last = (n.div_ceil(2).max(2) - 1) as f64;
    let mut points = Vec::with_capacity(2 * n);
    for i in 0..n {
        let (sin, cos) = (PI * (i / 2) as f64 / last).sin_cos();
        let (x, y) = if i % 2 == 0 { (cos, sin) } else { (1.0 - cos, 0.5 - sin) };
        points.push((x + noise * rng.normal()) as f32);
        points.push((y + noise * rng.normal()) as f32);
    }
    let classes: Vec<i64> = (0..n as i64).map(|i| i % 2).collect();
    (Tensor::from_slice(&points).view([-1, 2]), Tensor::from_slice(&classes))
}
