//! The number that an update is written over, and the short arrays of them that it returns. An operation belongs here
//! if some row needs it.

use std::ops::{Add, Div, Mul, Neg, Sub};

/// A real number as an update rule sees it: `f32` or `f64` when the rule runs over raw memory, a handle to a whole
/// tensor when it runs through libtorch. Coefficients enter by [`Real::real`], rounded once from `f64`.
pub trait Real:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self>
{
    /// The number nearest to `x`.
    fn real(x: f64) -> Self;
    /// √x
    fn sqrt(self) -> Self;
    /// |x|
    fn abs(self) -> Self;
    /// tanh x
    fn tanh(self) -> Self;
    /// The smaller of two numbers; a NaN in `self` stays.
    fn min(self, other: Self) -> Self;
    /// The larger of two numbers; a NaN in `self` stays.
    fn max(self, other: Self) -> Self;
}

macro_rules! float {
    ($t:ty) => {
        impl Real for $t {
            #[inline(always)]
            fn real(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$t>::sqrt(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$t>::abs(self)
            }
            #[inline(always)]
            fn tanh(self) -> Self {
                <$t>::tanh(self)
            }
            #[inline(always)]
            fn min(self, other: Self) -> Self {
                // Not `f32::min`, which drops a NaN: a clamp would hide it from the check that follows an update.
                if other < self { other } else { self }
            }
            #[inline(always)]
            fn max(self, other: Self) -> Self {
                if other > self { other } else { self }
            }
        }
    };
}
float!(f32);
float!(f64);

mod sealed {
    pub trait Sealed {}
    impl<T, const N: usize> Sealed for [T; N] {}
}

/// A short array of numbers (state, coefficients) whose length an update rule fixes by its type: `[T; N]`, and nothing
/// else, because the lanes trust its indices with raw memory.
pub trait Pack<T>: Copy + sealed::Sealed {
    /// Number of elements.
    const LEN: usize;
    /// Builds the array element by element.
    fn from_fn(f: impl FnMut(usize) -> T) -> Self;
    /// Element `i`.
    fn get(&self, i: usize) -> T;
}

impl<T: Copy, const N: usize> Pack<T> for [T; N] {
    const LEN: usize = N;
    #[inline(always)]
    fn from_fn(f: impl FnMut(usize) -> T) -> Self {
        std::array::from_fn(f)
    }
    #[inline(always)]
    fn get(&self, i: usize) -> T {
        self[i]
    }
}
