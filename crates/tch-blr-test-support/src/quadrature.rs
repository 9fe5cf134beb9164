//! Expectations under a Gaussian, exact but for rounding.

use tch::Tensor;

/// Gauss-Hermite quadrature for N(0, 1): the roots of Heₙ by Newton's method, from its sign changes on a grid.
#[derive(Debug)]
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
