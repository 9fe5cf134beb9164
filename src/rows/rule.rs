//! What a row of the table has to say; the driver ([`Optimizer`](crate::Optimizer)) does the rest.

use crate::{Builder, Curvature, Expectation, Link, Noise, Optimizer, Params, Prior, Real, Result, kernel::Pack};
use serde::{Serialize, de::DeserializeOwned};

/// What an update sees of one weight, beside the row's own state. All on the scale of the mean loss L.
#[derive(Debug, Clone, Copy)]
pub struct Site<T> {
    /// m, the weight itself: the mean of the posterior.
    pub mean: T,
    /// ĝ, the gradient of the loss (without the prior), averaged over samples and micro-batches.
    pub gradient: T,
    /// The statistic of the row's [`Curvature`], averaged likewise; 0 for [`Curvature::Unused`].
    pub curvature: T,
    /// m₀, the mean of the prior.
    pub prior_mean: T,
    /// δ = prior precision / ess, also known as weight decay.
    pub delta: T,
}

/// When an update happens.
#[derive(Debug, Clone, Copy)]
pub struct When {
    /// How many times this parameter has been updated, this time included: t = 1, 2, … Zero before the first update.
    pub t: u64,
    /// The schedule's factor on the learning rate.
    pub lr_factor: f64,
}

/// A row of the table of the Bayesian learning rule: its configuration, and its update as pure functions of numbers.
///
/// The update is written once over [`Real`] and runs on raw memory and on tensors alike. Implement this trait to add a
/// row of your own; everything else (samples, curvature, groups, priors, checkpoints, errors) comes with the driver.
///
/// `State<T>` is `[T; N]` with one element per name in [`Rule::STATE`], `Coefficients<T>` likewise holds what is the
/// same for all weights of a parameter: computed in f64 once a step and rounded once.
///
/// A row that limits each weight's step:
///
/// ```
/// use serde::{Deserialize, Serialize};
/// use tch_blr::{DeltaRule, Real, Result, Rule, Site, When};
///
/// #[derive(Debug, Clone, Copy, Serialize, Deserialize)]
/// struct Limited {
///     lr: f64,
/// }
///
/// impl Rule for Limited {
///     const NAME: &'static str = "limited";
///     const STATE: &'static [&'static str] = &[];
///     type State<T: Real> = [T; 0];
///     type Coefficients<T: Real> = [T; 1];
///
///     fn learning_rate(&self) -> f64 {
///         self.lr
///     }
///     fn with_learning_rate(self, lr: f64) -> Self {
///         Limited { lr }
///     }
///     fn isotropic_delta(&self) -> f64 {
///         0.0
///     }
///     fn with_weight_decay(self, _: f64) -> Self {
///         self
///     }
///     fn validate(&self) -> Result<()> {
///         Ok(())
///     }
///     fn initial(&self, _: bool) -> [f64; 0] {
///         []
///     }
///     fn coefficients(&self, when: When) -> [f64; 1] {
///         [self.lr * when.lr_factor]
///     }
///     fn update<T: Real>(&self, [lr]: [T; 1], x: Site<T>, _: [T; 0]) -> (T, [T; 0]) {
///         (x.mean - lr * x.gradient.min(T::real(1.0)).max(T::real(-1.0)), [])
///     }
/// }
/// impl DeltaRule for Limited {}
///
/// # fn main() -> Result<()> {
/// let vs = tch::nn::VarStore::new(tch::Device::Cpu);
/// let w = vs.root().zeros("w", &[1]);
/// Limited { lr: 0.1 }.build(&vs, 0.5)?.step(|| (&w * 7.0).sum(tch::Kind::Float))?;
/// assert_eq!(w.double_value(&[0]), -0.5);
/// # Ok(())
/// # }
/// ```
pub trait Rule: Copy + std::fmt::Debug + Send + Sync + Serialize + DeserializeOwned + 'static {
    /// Name of the row, as in checkpoints.
    const NAME: &'static str;
    /// Names of the state tensors kept for each parameter.
    const STATE: &'static [&'static str];
    /// `[T; N]`, one element per name in [`Rule::STATE`]; N is at most 8.
    type State<T: Real>: Pack<T>;
    /// `[T; K]`: what [`Rule::coefficients`] computes; K is at most 16.
    type Coefficients<T: Real>: Pack<T>;

    /// The learning rate α.
    fn learning_rate(&self) -> f64;
    /// The same configuration with another learning rate.
    fn with_learning_rate(self, lr: f64) -> Self;
    /// δ of the isotropic prior N(0, 1/(ess·δ)).
    fn isotropic_delta(&self) -> f64;
    /// The same configuration with another isotropic δ (AdamW: with another decoupled decay).
    fn with_weight_decay(self, delta: f64) -> Self;
    /// Effective sample size λ of the posterior, where one was given.
    fn effective_sample_size(&self) -> Option<f64> {
        None
    }
    /// Checks every hyper-parameter; the error names the field.
    ///
    /// # Errors
    /// [`Error::HyperParameter`](crate::Error::HyperParameter)
    fn validate(&self) -> Result<()>;
    /// Where E_q\[∇ℓ\] is evaluated.
    fn expectation(&self) -> Expectation {
        Expectation::Delta
    }
    /// How E_q\[∇²ℓ\] is estimated.
    fn curvature(&self) -> Curvature {
        Curvature::Unused
    }
    /// What the variables hold: the mean that is learned itself, or binary weights.
    fn link(&self) -> Link {
        Link::Identity
    }
    /// State before the first update; `posterior_prior` says that the prior is a posterior with a precision of its own.
    fn initial(&self, posterior_prior: bool) -> Self::State<f64>;
    /// Whether this configuration keeps the state `STATE[state]`. A state that is not kept costs no memory: an update reads
    /// its initial value, and what it makes of it is dropped.
    fn keeps(&self, state: usize) -> bool {
        let _ = state;
        true
    }
    /// What all weights of a parameter share in its t-th update.
    fn coefficients(&self, when: When) -> Self::Coefficients<f64>;
    /// The new mean and state of one weight.
    fn update<T: Real>(&self, k: Self::Coefficients<T>, x: Site<T>, state: Self::State<T>) -> (T, Self::State<T>);
    /// Precision 1/σ² of the posterior at one weight. Rows without a posterior are a point mass.
    fn precision<T: Real>(&self, k: Self::Coefficients<T>, delta: T, state: Self::State<T>) -> T {
        let _ = (k, delta, state);
        T::real(f64::INFINITY)
    }
    /// Where the loss is evaluated: from the mean (of binary rows, λ), the noise z of the row's [`Link`] and its sign, ±1.
    fn point<T: Real>(&self, k: Self::Coefficients<T>, mean: T, z: T, sign: T, delta: T, state: Self::State<T>) -> T {
        mean + sign * z / self.precision(k, delta, state).sqrt()
    }

    /// ε of [`Expectation::Adversarial`] at one weight: by how much the second evaluation takes place beside the mean.
    /// `gradient` is ĝ₁, that of the first evaluation, and `norm` is ‖ĝ₁‖₂ over all trainable parameters, or infinite if it
    /// vanishes, so that ĝ₁/‖ĝ₁‖ is then 0. Rows with another expectation are not asked.
    fn adversarial<T: Real>(
        &self,
        k: Self::Coefficients<T>,
        gradient: T,
        norm: T,
        delta: T,
        state: Self::State<T>,
    ) -> T {
        let _ = (k, gradient, norm, delta, state);
        T::real(0.0)
    }

    /// Builds the optimizer for these parameters, as `tch::nn::Adam::default().build(&vs, lr)` does: `lr` is the learning
    /// rate of all parameters without an override, whatever the configuration's was.
    ///
    /// Without [`Rule::noise`] the seed of the noise is drawn from libtorch's generator, which moves on by that.
    ///
    /// # Errors
    /// A hyper-parameter out of range, no trainable parameter, parameters on several devices.
    fn build(self, params: impl Into<Params>, lr: f64) -> Result<Optimizer<Self>> {
        Builder::new(self).build(params, lr)
    }
    /// Uses this prior instead of the isotropic one of the weight decay: `.prior(&posterior)`, or a [`Prior`]. Needs the
    /// row's `ess`, to put the prior's precision on the scale of the mean loss (δ = P₀/ess). See [`Builder::prior`].
    fn prior(self, prior: impl Into<Prior>) -> Builder<Self> {
        Builder::new(self).prior(prior)
    }
    /// Draws from this noise, for example `Philox { seed: 0 }`. See [`Builder::noise`].
    fn noise(self, noise: impl Into<Noise>) -> Builder<Self> {
        Builder::new(self).noise(noise)
    }
    /// Starts a [`Builder`], for groups, schedules, clipping and several of these at once.
    fn builder(self) -> Builder<Self> {
        Builder::new(self)
    }
}

/// Rows whose curvature makes a diagonal Gaussian posterior; everything but SGD and SAM. They implement [`Rule::precision`].
pub trait GaussianRule: Rule {}

/// Rows that evaluate the loss once, at the mean (delta method), and need nothing but its gradient, so that tch's own
/// `backward_step(&loss)` suffices: SGD, RMSprop, Adam, AdamW.
pub trait DeltaRule: Rule {}

/// A configuration: plain data with defaults and a setter per field that carries the field's documentation.
macro_rules! config {
    ($(#[$meta:meta])* pub struct $Name:ident {
        $($(#[$doc:meta])* $field:ident : $type:ty = $default:expr $(, via $arg:ty)?;)*
    }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
        #[serde(default)]
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
            #[allow(clippy::useless_conversion)]
            pub fn $field(mut self, $field: $crate::rows::rule::config!(@arg $type $(, $arg)?)) -> Self {
                self.$field = $field.into();
                self
            })*
        }
    };
    (@arg $type:ty) => { $type };
    (@arg $type:ty, $arg:ty) => { $arg };
}
pub(crate) use config;

/// The accessors of [`Rule`] for the fields that a configuration calls `lr`, `weight_decay` (an isotropic δ) and `ess`.
macro_rules! fields {
    (@ lr) => {
        fn learning_rate(&self) -> f64 {
            self.lr
        }
        fn with_learning_rate(self, lr: f64) -> Self {
            self.lr(lr)
        }
    };
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
    ($($field:ident)*) => { $($crate::rows::rule::fields!(@ $field);)* };
}
pub(crate) use fields;
