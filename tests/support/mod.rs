//! What several test files share.
// Each test file is a crate of its own and uses its part of this.
#![allow(dead_code)]

use tch::{Kind, Tensor};
use tch_blr::rule::{Rule, Site, When};
use tch_blr::{Optimizer, Params};

/// A trainable f64 vector.
pub fn weight(values: &[f64]) -> Tensor {
    Tensor::from_slice(values).set_requires_grad(true)
}

/// It as the model's only parameter, `w`.
pub fn params(w: &Tensor) -> Params {
    Params::named([("w", w.shallow_clone())]).unwrap()
}

pub fn values(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.detach().to_kind(Kind::Double).contiguous().flatten(0, -1)).unwrap()
}

/// One state tensor of `w`.
pub fn state<R: Rule>(opt: &Optimizer<R>, name: &str) -> Vec<f64> {
    values(&opt.state("w", name).unwrap())
}

/// The same standard normals, `noise[sample][weight]`, in each of `steps` steps.
pub fn given(steps: usize, noise: &[&[f64]]) -> tch_blr::Given {
    let step = || noise.iter().map(|z| vec![Tensor::from_slice(z)]).collect();
    tch_blr::Given((0..steps).map(|_| step()).collect())
}

#[track_caller]
pub fn close(ours: f64, expected: f64, tolerance: f64) {
    assert!((ours - expected).abs() <= tolerance, "{ours} and not {expected} (tolerance {tolerance:e})");
}

#[track_caller]
pub fn all_close(ours: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), expected.len());
    assert!(
        ours.iter().zip(expected).all(|(a, b)| (a - b).abs() <= tolerance),
        "{ours:?} and not {expected:?} (tolerance {tolerance:e})"
    );
}

/// Mean and standard error of independent numbers.
pub fn mean_and_error(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// Solves h' = h + r(f-h) + ½ r²(f-h)²/S for f, on the branch r(f-h) > -S where the retraction is invertible.
pub fn retracted(h: f64, new: f64, s: f64, r: f64) -> f64 {
    h + s * ((1.0 + 2.0 * (new - h) / s).sqrt() - 1.0) / r
}

/// Kolmogorov-Smirnov statistic against N(0, 1).
pub fn kolmogorov_smirnov(mut z: Vec<f64>) -> f64 {
    let n = z.len() as f64;
    z.sort_by(f64::total_cmp);
    let cdf = values(&((Tensor::from_slice(&z) / 2f64.sqrt()).erf() * 0.5 + 0.5));
    cdf.iter().enumerate().map(|(i, p)| (p - i as f64 / n).max((i as f64 + 1.0) / n - p)).fold(0.0, f64::max)
}

/// Gauss-Hermite quadrature for N(0, 1): the roots of Heₙ by Newton's method, from its sign changes on a grid.
pub struct Quadrature(Vec<(f64, f64)>);

impl Quadrature {
    pub fn new(n: usize) -> Self {
        // Orthonormal polynomials: √(k+1) pₖ₊₁ = x pₖ - √k pₖ₋₁, so pₙ' = √n pₙ₋₁ and the weights are 1/(n pₙ₋₁²).
        let polynomials = |x: f64| {
            (0..n)
                .fold((0.0, 1.0), |(before, p), k| (p, (x * p - (k as f64).sqrt() * before) / (k as f64 + 1.0).sqrt()))
        };
        let edge = (4.0 * n as f64 + 2.0).sqrt();
        let grid: Vec<f64> = (0..=4999).map(|i| edge * (f64::from(i) / 2499.5 - 1.0)).collect();
        let nodes: Vec<_> = grid
            .windows(2)
            .filter(|x| (polynomials(x[0]).1 > 0.0) != (polynomials(x[1]).1 > 0.0))
            .map(|x| {
                let root = (0..20).fold(0.5 * (x[0] + x[1]), |x, _| {
                    let (before, p) = polynomials(x);
                    x - p / ((n as f64).sqrt() * before)
                });
                (root, 1.0 / (n as f64 * polynomials(root).0.powi(2)))
            })
            .collect();
        assert_eq!(nodes.len(), n, "a root was missed");
        Quadrature(nodes)
    }

    /// Nodes z and their weights, as tensors `[n, 1]` and `[n]`.
    pub fn nodes(&self) -> (Tensor, Tensor) {
        let (z, weights): (Vec<f64>, Vec<f64>) = self.0.iter().copied().unzip();
        (Tensor::from_slice(&z).unsqueeze(1), Tensor::from_slice(&weights))
    }

    /// E\[f(z)\], z ~ N(0, 1)
    pub fn expect(&self, f: impl Fn(f64) -> f64) -> f64 {
        self.0.iter().map(|(z, w)| w * f(*z)).sum()
    }
}

/// Mean and precision of a one-weight problem with loss gradient `gradient`, under a rule that is given exact
/// expectations, after `steps` steps from 0.
pub fn with_exact_expectations<R: Rule>(rule: R, lr: f64, steps: u64, gradient: impl Fn(f64) -> f64) -> (f64, f64) {
    let quadrature = Quadrature::new(60);
    let delta = rule.isotropic_delta();
    let (mut mean, mut state) = (0.0, rule.initial(false));
    for t in 1..=steps {
        let k = rule.coefficients(When { t, lr });
        let sigma = 1.0 / rule.precision(k, delta, state).sqrt();
        let site = Site {
            mean,
            gradient: quadrature.expect(|z| gradient(mean + sigma * z)),
            curvature: quadrature.expect(|z| sigma * z * gradient(mean + sigma * z)),
            prior_mean: 0.0,
            delta,
        };
        (mean, state) = rule.update(k, site, state);
    }
    (mean, rule.precision(rule.coefficients(When { t: steps, lr }), delta, state))
}
