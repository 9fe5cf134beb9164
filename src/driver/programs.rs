//! The elementwise passes of a row, for the kernel: which of the row's functions is computed at a weight, from what.
//!
//! Which tensors a pass runs over is decided in `weights.rs`.

use super::row::When;
use super::rule::{Rule, Site};
use crate::kernel::{self, CONSTANTS, Constants, Elementwise, Pack, Real};

/// A row's rule with the coefficients of one parameter in one step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass<R: Rule> {
    rule: R,
    /// As many as `R::Coefficients` has.
    coefficients: Constants,
}

impl<R: Rule> Pass<R> {
    pub(super) fn new(rule: R, when: When) -> Self {
        const {
            // While compiling, for every row that is ever stepped.
            assert!(R::State::<f64>::LEN == R::STATE.len(), "Rule::State and Row::STATE differ in length");
            assert!(R::STATE.len() <= kernel::MAX_STATES, "a rule has at most 8 states");
            assert!(R::Coefficients::<f64>::LEN <= CONSTANTS, "a rule has at most 16 coefficients");
        }
        let given = rule.coefficients(when);
        let mut coefficients = Constants::default();
        for (i, c) in coefficients.iter_mut().enumerate().take(R::Coefficients::<f64>::LEN) {
            *c = given.get(i);
        }
        Pass { rule, coefficients }
    }
}

/// A rule's coefficients from the constants of its pass.
// Into the loop over the weights, which otherwise calls a function per weight and uses no vectors.
#[inline(always)]
fn coefficients<R: Rule, T: Real>(constant: impl Fn(usize) -> T) -> R::Coefficients<T> {
    R::Coefficients::<T>::from_fn(constant)
}

/// A curvature statistic of one evaluation, from ĝ and another tensor's c at one weight. A type, not a value: a choice
/// inside the loop over the weights would keep the compiler from using vectors.
pub(super) trait Formed: Copy + Sync {
    /// Whether c is the point of the evaluation.
    fn at_point(self) -> bool {
        false
    }
    fn of<T: Real>(self, mean: T, gradient: T, c: T) -> T;
}

/// c itself.
#[derive(Clone, Copy)]
pub(super) struct Given;
/// ĝ²
#[derive(Clone, Copy)]
pub(super) struct Square;
/// e·ĝ with e = c-m, where c is the point of the evaluation.
#[derive(Clone, Copy)]
pub(super) struct Displacement;

/// (1-w²)ĝ, where w = c is the point of the evaluation.
#[derive(Clone, Copy)]
pub(super) struct Relaxed;

impl Formed for Given {
    #[inline(always)]
    fn of<T: Real>(self, _: T, _: T, c: T) -> T {
        c
    }
}
impl Formed for Square {
    #[inline(always)]
    fn of<T: Real>(self, _: T, gradient: T, _: T) -> T {
        gradient * gradient
    }
}
impl Formed for Displacement {
    fn at_point(self) -> bool {
        true
    }
    #[inline(always)]
    fn of<T: Real>(self, mean: T, gradient: T, c: T) -> T {
        (c - mean) * gradient
    }
}

impl Formed for Relaxed {
    fn at_point(self) -> bool {
        true
    }
    #[inline(always)]
    fn of<T: Real>(self, _: T, gradient: T, w: T) -> T {
        // Not (1-w²)ĝ: that would take a constant, converted at every weight.
        gradient - w * w * gradient
    }
}

/// (m, ĝ, c) → the statistic
pub(super) struct Form<S>(pub S);

impl<S: Formed> Elementwise for Form<S> {
    const OUTPUTS: usize = 1;
    #[inline(always)]
    fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        write(0, self.0.of(read(0), read(1), read(2)));
    }
}

/// (m, ĝ, c, m₀, δ, state…) → (m, state…)
#[derive(Clone, Copy)]
pub(super) struct Update<R: Rule, S> {
    pub pass: Pass<R>,
    pub statistic: S,
}

impl<R: Rule, S: Formed> Elementwise for Update<R, S> {
    const OUTPUTS: usize = 1 + R::State::<f64>::LEN;
    fn constants(&self) -> Constants {
        self.pass.coefficients
    }
    #[inline(always)]
    fn eval<T: Real>(&self, constant: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let k = coefficients::<R, T>(constant);
        let (mean, gradient) = (read(0), read(1));
        let curvature = self.statistic.of(mean, gradient, read(2));
        let site = Site { mean, gradient, curvature, prior_mean: read(3), delta: read(4) };
        let state = R::State::<T>::from_fn(|i| read(5 + i));
        let (mean, state) = self.pass.rule.update(k, site, state);
        write(0, mean);
        for i in 0..R::State::<T>::LEN {
            write(1 + i, state.get(i));
        }
    }
}

/// (m, z, sign, δ, state…) → m+e with e = sign·z/√precision, or what the rule has in its place; and m
pub(super) struct Perturb<R: Rule>(pub Pass<R>);

impl<R: Rule> Elementwise for Perturb<R> {
    const OUTPUTS: usize = 2;
    fn constants(&self) -> Constants {
        self.0.coefficients
    }
    #[inline(always)]
    fn eval<T: Real>(&self, constant: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let k = coefficients::<R, T>(constant);
        let (mean, z, sign, delta) = (read(0), read(1), read(2), read(3));
        let state = R::State::<T>::from_fn(|i| read(4 + i));
        write(0, self.0.rule.point(k, mean, z, sign, delta, state));
        write(1, mean);
    }
}

/// (m, ĝ₁, ‖ĝ₁‖, δ, state…) → m+ε, m and |ĝ₁|
pub(super) struct Ascend<R: Rule>(pub Pass<R>);

impl<R: Rule> Elementwise for Ascend<R> {
    const OUTPUTS: usize = 3;
    fn constants(&self) -> Constants {
        self.0.coefficients
    }
    #[inline(always)]
    fn eval<T: Real>(&self, constant: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let k = coefficients::<R, T>(constant);
        let (mean, gradient, norm, delta) = (read(0), read(1), read(2), read(3));
        let state = R::State::<T>::from_fn(|i| read(4 + i));
        // From the mean, even where ĝ₁ was taken at a sample, as Bayesian SAM is published.
        write(0, mean + self.0.rule.adversarial(k, gradient, norm, delta, state));
        write(1, mean);
        write(2, gradient.abs());
    }
}

/// (δ, state…) → precision
pub(super) struct Precision<R: Rule>(pub Pass<R>);

impl<R: Rule> Elementwise for Precision<R> {
    const OUTPUTS: usize = 1;
    fn constants(&self) -> Constants {
        self.0.coefficients
    }
    #[inline(always)]
    fn eval<T: Real>(&self, constant: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let k = coefficients::<R, T>(constant);
        let state = R::State::<T>::from_fn(|i| read(1 + i));
        write(0, self.0.rule.precision(k, read(0), state));
    }
}
