//! What the files of rows share: the macros that make the settings of a row, and pieces of rows with a full covariance.
//!
//! Arithmetic that a paper states stays in the file of its row, even where two rows agree.

use crate::driver::{BlockRule, Learned};
use crate::posterior::FullGaussian;
use crate::prior::BlockPrior;
use crate::{Error, Result, check};
use tch::{Kind, Tensor};

/// The settings of a row: plain data with defaults, a setter per field that carries the field's documentation, and what
/// starts an optimizer.
macro_rules! config {
    ($(#[$meta:meta])* pub struct $Name:ident {
        $($(#[$doc:meta])* $field:ident : $type:ty = $default:expr $(, via $arg:ty)?;)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
        // A setting left out of a configuration has its default; a misspelt one must not.
        #[serde(default, deny_unknown_fields)]
        pub struct $Name {
            $($(#[$doc])* pub $field: $type,)*
        }
        impl Default for $Name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
        impl $Name {
            $($(#[$doc])*
            #[must_use]
            // `into` is for the `via` fields, where it wraps a number into an option.
            #[allow(clippy::useless_conversion)]
            pub fn $field(mut self, $field: $crate::rows::common::config!(@arg $type $(, $arg)?)) -> Self {
                self.$field = $field.into();
                self
            })*

            /// Builds the optimizer for these parameters with this learning rate α ≥ 0, as
            /// `tch::nn::Adam::default().build(&vs, lr)` does.
            ///
            /// Without [`noise`](Self::noise) the seed of the noise is drawn from libtorch's generator, which advances
            /// it.
            ///
            /// # Errors
            /// As [`Builder::build`](crate::Builder::build).
            pub fn build(self, params: impl Into<crate::Params>, lr: f64) -> crate::Result<crate::Optimizer<Self>> {
                self.builder().build(params, lr)
            }
            /// Uses this prior instead of the isotropic one of the weight decay: `.prior(&posterior)`, or a
            /// [`Prior`](crate::Prior). Needs the row's `ess`, to put the prior's precision on the scale of the mean
            /// loss (δ = P₀/ess). As [`Builder::prior`](crate::Builder::prior).
            pub fn prior(self, prior: impl Into<crate::Prior>) -> crate::Builder<Self> {
                self.builder().prior(prior)
            }
            /// Draws from this noise, for example `Philox { seed: 0 }`. As [`Builder::noise`](crate::Builder::noise).
            pub fn noise(self, noise: impl Into<crate::Noise>) -> crate::Builder<Self> {
                self.builder().noise(noise)
            }
            /// Changes settings for the variables of one group. As [`Builder::group`](crate::Builder::group).
            pub fn group(self, group: usize, change: impl Fn(Self) -> Self + Send + 'static) -> crate::Builder<Self> {
                self.builder().group(group, change)
            }
            /// Changes settings for the variables whose name passes. As [`Builder::named`](crate::Builder::named).
            pub fn named(
                self,
                applies: impl Fn(&str) -> bool + Send + 'static,
                change: impl Fn(Self) -> Self + Send + 'static,
            ) -> crate::Builder<Self> {
                self.builder().named(applies, change)
            }
            /// Multiplies the learning rate by a function of the step count. As
            /// [`Builder::schedule`](crate::Builder::schedule).
            pub fn schedule(self, schedule: crate::Schedule) -> crate::Builder<Self> {
                self.builder().schedule(schedule)
            }
            /// Starts a [`Builder`](crate::Builder), for several of these at once, clipping and more.
            pub fn builder(self) -> crate::Builder<Self> {
                $crate::driver::Row::builder(self)
            }
        }
    };
    (@arg $type:ty) => { $type };
    (@arg $type:ty, $arg:ty) => { $arg };
}
pub(super) use config;

/// The accessors of [`Row`](crate::rule::Row) for the fields that a row calls `weight_decay` (an isotropic δ), `ess`,
/// `damping` where the noise has it, and `beta2` where that is the decay of an average of Hessians; and what has the
/// driver of the row compiled in this crate, so that every row uses it.
macro_rules! fields {
    (@ weight_decay) => {
        fn isotropic_delta(&self) -> f64 {
            self.weight_decay
        }
        fn with_weight_decay(self, delta: f64) -> Self {
            self.weight_decay(delta)
        }
    };
    (@ ess) => {
        fn effective_sample_size(&self) -> Option<f64> {
            self.ess
        }
    };
    (@ beta2) => {
        fn initial_share(&self, t: u64) -> Option<f64> {
            Some(self.beta2.powf(t as f64))
        }
    };
    (@ damping) => {
        fn undamped(self) -> Self {
            self.damping(0.0)
        }
    };
    (@ expectation) => {
        fn expectation(&self) -> $crate::Expectation {
            self.expectation
        }
    };
    ($($field:ident)*) => {
        // The default, once more: not being generic, this one is compiled in this crate, and with it the driver of the
        // row (`driver/compiled.rs`). Inlined elsewhere, it would take the driver along.
        #[inline(never)]
        fn builder(self) -> $crate::Builder<Self> {
            $crate::Builder::new(self)
        }
        $($crate::rows::common::fields!(@ $field);)*
    };
}
pub(super) use fields;

/// Share of h₀ in h after t updates with the retraction, if they find no curvature: h ← h - rh + ½r²h²/S, where S is
/// little more than h.
pub(super) fn retracted_share(beta2: f64, t: u64) -> f64 {
    (beta2 + 0.5 * (1.0 - beta2).powi(2)).powf(t as f64)
}

/// `.samples(n)` for rows with a field `expectation`.
macro_rules! samples {
    ($Row:ident) => {
        impl $Row {
            /// Number of samples per step, or of pairs where the expectation is antithetic; at least 1. Short for
            /// [`expectation`](Self::expectation).
            #[must_use]
            pub fn samples(self, n: usize) -> Self {
                Self { expectation: self.expectation.with_samples(n), ..self }
            }
        }
    };
}
pub(super) use samples;

/// x in every element; infinite if the kind has no such number, with which libtorch does not fill a tensor.
pub(super) fn filled(like: &Tensor, x: f64) -> Tensor {
    let one = Tensor::from(x).to_kind(like.kind()).to_device(like.device());
    one.expand_as(like).contiguous()
}

/// x with every element between -limit and limit. A limit that the kind does not have is none.
pub(super) fn clipped(x: &Tensor, limit: Option<f64>) -> Tensor {
    let there = |limit: &f64| x.kind() == Kind::Double || (*limit as f32).is_finite();
    limit.filter(there).map_or_else(|| x.shallow_clone(), |limit| x.clamp(-limit, limit))
}

/// h₀ I, the Hessian before the first update of a full-covariance row; zero under a prior from a posterior, so that q
/// starts with the precision of the prior.
pub(super) fn initial_hessian(mean: &Tensor, prior: &BlockPrior, hess_init: f64) -> Tensor {
    let h = if prior.delta().is_some() { hess_init } else { 0.0 };
    Tensor::eye(mean.size()[0], (Kind::Double, mean.device())) * h
}

/// N(m, (λ(H + Δ))⁻¹)
pub(super) fn full_posterior<R: BlockRule>(blocks: Vec<Learned<R>>) -> Result<FullGaussian> {
    // A joint row has one block.
    let Some(Learned { row, means, state, prior, .. }) = blocks.into_iter().next() else {
        return Err(Error::Posterior("it has no parameter".to_owned()));
    };
    let ess = check::ess(row.effective_sample_size())?;
    FullGaussian::new(means, &(prior.add_to(&state[0], 1.0)? * ess))
}

/// What the tests of block rows share.
#[cfg(test)]
pub(super) mod testing {
    use crate::driver::Row;
    use tch::Tensor;

    /// Equal to rounding, elements in row-major order.
    #[track_caller]
    pub fn close(a: &Tensor, b: &[f64]) {
        let error = (a.reshape([-1]) - Tensor::from_slice(b)).abs().max().double_value(&[]);
        assert!(error < 1e-15, "{a} and not {b:?}");
    }

    /// Each configuration is refused, and the error names the field.
    #[track_caller]
    pub fn refused<R: Row, const N: usize>(all: [(R, &str); N]) {
        for (bad, field) in all {
            let e = bad.validate().unwrap_err().to_string();
            assert!(e.contains(&format!("`{field}`")), "{e}");
        }
    }
}
