//! The three elementwise passes of a row, for the kernel.

use crate::kernel::{Elementwise, Field, Pack, Real};
use crate::optim::{Rule, Site};

/// A row's rule with the coefficients of one parameter in one step.
#[derive(Debug)]
pub(super) struct Pass<'a, R: Rule> {
    pub rule: &'a R,
    pub coefficients: R::Coefficients<f64>,
}

impl<R: Rule> Pass<'_, R> {
    fn coefficients<T: Real>(&self) -> R::Coefficients<T> {
        R::Coefficients::<T>::from_fn(|i| T::real(self.coefficients.get(i)))
    }
}

/// (m, ĝ, curvature, m₀, δ, state…) → (m, state…)
pub(super) struct Update<'a, R: Rule>(pub Pass<'a, R>);

impl<R: Rule> Elementwise for Update<'_, R> {
    #[inline(always)]
    fn eval<T: Real>(&self, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let site = Site { mean: read(0), gradient: read(1), curvature: read(2), prior_mean: read(3), delta: read(4) };
        let state = R::State::<T>::from_fn(|i| read(5 + i));
        let (mean, state) = self.0.rule.update(self.0.coefficients(), site, state);
        write(0, mean);
        for i in 0..R::State::<T>::LEN {
            write(1 + i, state.get(i));
        }
    }
}

/// (m, z, sign, δ, state…) → (m+e, e) with e = sign·z/√precision
pub(super) struct Perturb<'a, R: Rule>(pub Pass<'a, R>);

impl<R: Rule> Elementwise for Perturb<'_, R> {
    #[inline(always)]
    fn eval<T: Real>(&self, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let (mean, z, sign, delta) = (read(0), read(1), read(2), read(3));
        let state = R::State::<T>::from_fn(|i| read(4 + i));
        let precision = self.0.rule.precision(self.0.coefficients(), delta, state);
        let e = sign * z / precision.sqrt();
        write(0, mean + e);
        write(1, e);
    }
}

/// (δ, state…) → precision
pub(super) struct Precision<'a, R: Rule>(pub Pass<'a, R>);

impl<R: Rule> Elementwise for Precision<'_, R> {
    #[inline(always)]
    fn eval<T: Real>(&self, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let state = R::State::<T>::from_fn(|i| read(1 + i));
        write(0, self.0.rule.precision(self.0.coefficients(), read(0), state));
    }
}

/// The state tensors as inputs, after the given ones.
pub(super) fn with_state(mut inputs: Vec<Field>, state: &[tch::Tensor]) -> Vec<Field> {
    inputs.extend(state.iter().map(|t| Field::Tensor(t.shallow_clone())));
    inputs
}
