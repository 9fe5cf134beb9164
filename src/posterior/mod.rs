//! Posteriors over weights.

mod bernoulli;
mod diagonal;
mod full;
mod kronecker;
mod mixture;
mod outputs;
mod predictive;

pub use bernoulli::MeanFieldBernoulli;
pub use diagonal::{DiagonalGaussian, Natural, combine};
pub use full::FullGaussian;
pub use kronecker::{KroneckerGaussian, KroneckerParameter};
pub(crate) use kronecker::{into_basis, matrix_shape, out_of_basis};
pub use mixture::Mixture;
pub use outputs::GaussianPosterior;
pub use predictive::Predictive;

use tch::Tensor;

/// Placeholder until the posterior branch is merged.
pub trait Posterior: std::fmt::Debug + Send {
    /// Names.
    fn names(&self) -> Vec<&str>;
    /// Mean.
    fn mean(&self, name: &str) -> Option<Tensor>;
    /// Variance.
    fn variance(&self, name: &str) -> Option<Tensor>;
    /// Number.
    fn len(&self) -> usize;
    /// Entropy.
    fn entropy(&self) -> Option<f64>;
}
macro_rules! stub { ($($Q:ty)*) => { $(impl Posterior for $Q {
    fn names(&self) -> Vec<&str> { Vec::new() }
    fn mean(&self, _: &str) -> Option<Tensor> { None }
    fn variance(&self, _: &str) -> Option<Tensor> { None }
    fn len(&self) -> usize { 0 }
    fn entropy(&self) -> Option<f64> { None }
})* } }
stub!(DiagonalGaussian FullGaussian KroneckerGaussian MeanFieldBernoulli Mixture);

impl KroneckerGaussian {
    pub(crate) fn parameters(&self) -> impl Iterator<Item = &KroneckerParameter> {
        self.names().filter_map(|n| self.parameter(n))
    }
}
impl KroneckerParameter {
    pub(crate) fn shallow_clone(&self) -> Self {
        KroneckerParameter {
            name: self.name.clone(),
            mean: self.mean.shallow_clone(),
            left: self.left.as_ref().map(Tensor::shallow_clone),
            right: self.right.as_ref().map(Tensor::shallow_clone),
            precision: self.precision.shallow_clone(),
        }
    }
}
impl FullGaussian {
    pub(crate) fn shallow_clone(&self) -> Self {
        FullGaussian::new(self.names().map(|n| (n.to_owned(), self.mean(n).unwrap())), self.precision()).unwrap()
    }
    pub(crate) fn block(&self, a: &str, b: &str) -> Option<Tensor> {
        let mut start = 0;
        let mut at = [None, None];
        for n in self.names() {
            let len = self.mean(n)?.numel() as i64;
            if n == a { at[0] = Some((start, len)); }
            if n == b { at[1] = Some((start, len)); }
            start += len;
        }
        let [(i, n), (j, m)] = [at[0]?, at[1]?];
        Some(self.precision().narrow(0, i, n).narrow(1, j, m))
    }
}
