//! The three elementwise passes of a row, for the kernel.

use crate::kernel::{self, Elementwise, Field, Pack, Real};
use crate::optim::{Rule, Site, When};

const MAX_COEFFICIENTS: usize = 16;

/// A row's rule with the coefficients of one parameter in one step.
#[derive(Debug)]
pub(super) struct Pass<R: Rule> {
    rule: R,
    /// As many as `R::Coefficients` has.
    coefficients: [f64; MAX_COEFFICIENTS],
}

impl<R: Rule> Pass<R> {
    pub(super) fn new(rule: R, when: When) -> Self {
        const {
            assert!(R::State::<f64>::LEN == R::STATE.len(), "Rule::State and Rule::STATE differ in length");
            assert!(R::STATE.len() <= kernel::MAX_STATES, "a rule has at most 8 states");
            assert!(R::Coefficients::<f64>::LEN <= MAX_COEFFICIENTS, "a rule has at most 16 coefficients");
        }
        let given = rule.coefficients(when);
        let mut coefficients = [0.0; MAX_COEFFICIENTS];
        for (i, c) in coefficients.iter_mut().enumerate().take(R::Coefficients::<f64>::LEN) {
            *c = given.get(i);
        }
        Pass { rule, coefficients }
    }

    #[inline(always)]
    fn coefficients<T: Real>(&self) -> R::Coefficients<T> {
        R::Coefficients::<T>::from_fn(|i| T::real(self.coefficients[i]))
    }
}

/// (m, ĝ, curvature, m₀, δ, state…) → (m, state…)
pub(super) struct Update<R: Rule>(pub Pass<R>);

impl<R: Rule> Elementwise for Update<R> {
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
pub(super) struct Perturb<R: Rule>(pub Pass<R>);

impl<R: Rule> Elementwise for Perturb<R> {
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
pub(super) struct Precision<R: Rule>(pub Pass<R>);

impl<R: Rule> Elementwise for Precision<R> {
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
