//! Statistics of random numbers.

use crate::compare::values;
use tch::Tensor;

/// Mean and standard error of independent numbers.
pub fn mean_and_error(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// Kolmogorov-Smirnov statistic against N(0, 1).
pub fn kolmogorov_smirnov(mut z: Vec<f64>) -> f64 {
    let n = z.len() as f64;
    z.sort_by(f64::total_cmp);
    let cdf = values(&((Tensor::from_slice(&z) / 2f64.sqrt()).erf() * 0.5 + 0.5));
    cdf.iter().enumerate().map(|(i, p)| (p - i as f64 / n).max((i as f64 + 1.0) / n - p)).fold(0.0, f64::max)
}
