//! What any posterior can do, whatever its family.

use crate::{Error, Result};
use std::any::Any;
use std::fmt::Debug;
use std::path::Path;
use tch::Tensor;

/// The step of a posterior's noise: one that no optimizer of the same seed reaches.
pub(super) const OUTSIDE_OF_TRAINING: u64 = u64::MAX;

/// Errors if a seed has no sample of this number: a counter has 32 bits for it, and more would repeat earlier noise.
pub(super) fn check_sample(k: u64) -> Result<u64> {
    if u32::try_from(k).is_ok() {
        return Ok(k);
    }
    let problem = "a seed has the samples 0 to 2³²-1; take another seed with .with_seed(…)";
    Err(Error::Posterior(format!("sample {k} was asked for: {problem}")))
}

/// A posterior over the weights of a model, of a family that need not be known when the program is compiled: a function
/// takes `&dyn Posterior`, and a row chosen at run time gives a `Box<dyn Posterior>`.
///
/// The weights are grouped in named parameters, each with the shape that it has in the model. The families have these
/// methods, and those that are generic ([`perturb`](#method.perturb), [`predict`](#method.predict), …), as their own:
/// with a [`DiagonalGaussian`](crate::DiagonalGaussian) at hand there is no need to import the trait.
///
/// ```
/// use tch::{Tensor, nn};
/// use tch_blr::{DiagonalGaussian, MeanFieldBernoulli, Posterior};
/// # fn main() -> tch_blr::Result<()> {
/// let vs = nn::VarStore::new(tch::Device::Cpu);
/// let w = vs.root().zeros("w", &[2]);
/// let t = |x: [f32; 2]| Tensor::from_slice(&x);
/// let either: [Box<dyn Posterior>; 2] = [
///     Box::new(DiagonalGaussian::new([("w", t([1.0, 2.0]), t([4.0, 4.0]))])?),
///     Box::new(MeanFieldBernoulli::new([("w", t([0.5, -0.5]))])?),
/// ];
/// for q in either {
///     assert_eq!((q.len(), q.variance("w").unwrap().size()), (2, vec![2]));
///     let outputs = q.predict_samples(&vs, 10, || &w * 3.0)?;
///     assert_eq!(outputs.size(), [10, 2]);
/// }
/// # Ok(())
/// # }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a posterior",
    label = "there is no posterior here",
    note = "SGD, SAM and STE have none, because their covariance is fixed by assumption; train with `Ivon`, `Von` or another \
            row that has one"
)]
pub trait Posterior: Any + Debug + Send {
    /// Names of the parameters, in order.
    fn names(&self) -> Box<dyn Iterator<Item = &str> + '_>;

    /// Number of weights in all parameters together.
    fn len(&self) -> usize;

    /// Whether there is no weight; the parameters may still have names.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// E_q\[w\] of one parameter, in its shape. It may be the posterior's own tensor, so copy it before you write to
    /// it.
    fn mean(&self, name: &str) -> Option<Tensor>;

    /// Var_q\[w\] of every weight of one parameter by itself, in the parameter's shape.
    fn variance(&self, name: &str) -> Option<Tensor>;

    /// Chooses other samples; the seed of a new posterior is 0.
    fn set_seed(&mut self, seed: u64);

    /// Sample `k` = 0, 1, … of every parameter, in order and in its shape. Sample k of one seed is always the same.
    ///
    /// # Errors
    /// A number that the family cannot draw, or if libtorch fails.
    fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>>;

    /// Weights, with the sum 1, of the parts of the posterior from which averages take the same number of samples each:
    /// the components of a mixture. By default the whole is the only part.
    fn strata(&self) -> Vec<f64> {
        vec![1.0]
    }

    /// Sample `k` of one of the [`strata`](Posterior::strata); by default that of the whole.
    ///
    /// # Errors
    /// As [`Posterior::sample`].
    fn sample_stratum(&self, stratum: usize, k: u64) -> Result<Vec<(String, Tensor)>> {
        let _ = stratum;
        self.sample(k)
    }

    /// Writes one safetensors file, which the family's `load` reads; it is replaced atomically. [`save`](#method.save)
    /// takes any kind of path.
    ///
    /// # Errors
    /// If the file cannot be written.
    fn save_to(&self, path: &Path) -> Result<()>;
}

/// What is generic over its arguments, and so cannot be in an object-safe trait, as inherent methods of the type.
macro_rules! generic_methods {
    ($Posterior:ty) => {
        impl $Posterior {
            /// Puts sample `k` into the variables of a model until the guard is dropped. Variables that the posterior
            /// does not know stay as they are.
            ///
            /// # Errors
            /// A parameter of the posterior that the model does not have, or has in another shape.
            pub fn perturb(&self, params: impl Into<$crate::Params>, k: u64) -> $crate::Result<$crate::Perturbed> {
                $crate::posterior::in_model::enter(&$crate::Params::separate(params)?, self.sample(k)?)
            }

            /// Puts the mean into the variables of a model, for good.
            ///
            /// # Errors
            /// As [`perturb`](#method.perturb).
            pub fn copy_mean_to(&self, params: impl Into<$crate::Params>) -> $crate::Result<()> {
                $crate::posterior::in_model::write(
                    &$crate::Params::separate(params)?,
                    $crate::posterior::in_model::means(self),
                )
            }

            /// Monte-Carlo prediction: `probabilities` (shape `[B, C]`, after the softmax) is called with samples 0, 1,
            /// … in the model's variables one after the other, without gradients; afterwards the variables are as they
            /// were. Variables that the posterior does not know keep their values. Two calls use the same samples;
            /// another seed gives others.
            ///
            /// A mixture takes `samples` of each component, which count by the component's weight, so that what the
            /// components disagree about is in the mutual information.
            ///
            /// Call the model as for any evaluation, with `train` = false. A dropout that is left on adds its own noise
            /// to that of the samples.
            ///
            /// # Errors
            /// No samples, an output that is not `[B, C]` or not probabilities, the closure's own error, a posterior
            /// that does not fit the model, or batch normalization in training mode: a buffer of the store that moves
            /// is put back, and named.
            pub fn predict<L: $crate::IntoTensor>(
                &self,
                params: impl Into<$crate::Params>,
                samples: usize,
                probabilities: impl FnMut() -> L,
            ) -> $crate::Result<$crate::Predictive> {
                $crate::posterior::predictive::predict(self, &$crate::Params::separate(params)?, samples, probabilities)
            }

            /// [`predict`](#method.predict) for examples that come in batches, in memory for one batch and the
            /// probabilities of all examples. For each sample in turn `batches` gives all batches, always in the same
            /// order, and `probabilities` is called with each:
            ///
            /// ```
            /// # use tch::{Device, Kind, Tensor, nn, nn::Module};
            /// # use tch_blr::Ivon;
            /// # fn main() -> tch_blr::Result<()> {
            /// # let vs = nn::VarStore::new(Device::Cpu);
            /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
            /// # let q = Ivon::default().ess(1000.0).build(&vs, 0.1)?.posterior()?;
            /// let x = Tensor::randn([50, 4], (Kind::Float, Device::Cpu));
            /// let mut passes = 0;
            /// let batches = || {
            ///     passes += 1; // a place to say how far it is
            ///     x.split(16, 0)
            /// };
            /// let p = q.predict_batches(&vs, 8, batches, |x| net.forward(&x).softmax(-1, Kind::Float))?;
            /// assert_eq!((p.mean.size(), passes), (vec![50, 3], 8));
            /// # Ok(())
            /// # }
            /// ```
            ///
            /// # Errors
            /// No batches, and as [`predict`](#method.predict).
            pub fn predict_batches<B: IntoIterator, L: $crate::IntoTensor>(
                &self,
                params: impl Into<$crate::Params>,
                samples: usize,
                mut batches: impl FnMut() -> B,
                mut probabilities: impl FnMut(B::Item) -> L,
            ) -> $crate::Result<$crate::Predictive> {
                self.predict(params, samples, || {
                    $crate::posterior::predictive::joined(batches().into_iter().map(&mut probabilities))
                })
            }

            /// Monte-Carlo prediction of numbers: `gaussian` is called with samples 0, 1, … in the model's variables,
            /// as by [`predict`](#method.predict), and gives the mean of y and the variance of its noise, `(mean,
            /// variance)`; the mean in any shape, the variance in the same one, or a number for all.
            ///
            /// ```
            /// # use tch::{Device, Kind, Tensor, nn, nn::Module};
            /// # use tch_blr::Ivon;
            /// # fn main() -> tch_blr::Result<()> {
            /// # let (x, sigma) = (Tensor::randn([50, 4], (Kind::Float, Device::Cpu)), 0.1_f64);
            /// # let y = x.narrow(1, 0, 1);
            /// # let vs = nn::VarStore::new(Device::Cpu);
            /// # let net = nn::linear(vs.root(), 4, 1, Default::default());
            /// # let q = Ivon::default().ess(1000.0).build(&vs, 0.1)?.posterior()?;
            /// let f = q.predict_regression(&vs, 32, || (net.forward(&x), sigma * sigma))?;
            /// let (mean, epistemic, noise) = (f.mean()?, f.epistemic()?, f.noise()?); // each [50, 1], as the output
            /// let interval = f.interval(0.9)?; // of the mixture of the samples, noise included
            /// println!("CRPS {}, coverage {}", f.crps(&y)?, interval.coverage(&y)?);
            /// # assert_eq!((mean.size(), epistemic.size(), noise.size()), (vec![50, 1], vec![50, 1], vec![50, 1]));
            /// # Ok(())
            /// # }
            /// ```
            ///
            /// The result is the mixture of what the samples say, [`Forecast`](crate::metrics::Forecast), in f64 on the
            /// CPU: 16 bytes for each sample and number.
            ///
            /// # Errors
            /// No samples, outputs of another shape than before, numbers that are not finite, a variance that is
            /// negative or of another shape than the mean, and as [`predict`](#method.predict).
            pub fn predict_regression<G: $crate::IntoGaussian>(
                &self,
                params: impl Into<$crate::Params>,
                samples: usize,
                gaussian: impl FnMut() -> G,
            ) -> $crate::Result<$crate::metrics::Forecast> {
                let params = $crate::Params::separate(params)?;
                $crate::posterior::regression::predict_regression(self, &params, samples, gaussian)
            }

            /// [`predict_regression`](#method.predict_regression) for examples that come in batches, as in
            /// [`predict_batches`](#method.predict_batches).
            ///
            /// # Errors
            /// No batches, and as [`predict_regression`](#method.predict_regression).
            pub fn predict_regression_batches<B: IntoIterator, G: $crate::IntoGaussian>(
                &self,
                params: impl Into<$crate::Params>,
                samples: usize,
                mut batches: impl FnMut() -> B,
                mut gaussian: impl FnMut(B::Item) -> G,
            ) -> $crate::Result<$crate::metrics::Forecast> {
                self.predict_regression(params, samples, || {
                    $crate::posterior::regression::joined(batches().into_iter().map(&mut gaussian))
                })
            }

            /// The means of all parameters, by name: what [`merge`](crate::merge::merge) and
            /// [`sweep`](crate::merge::sweep) take. They may be the posterior's own tensors, so copy them before you
            /// write to them.
            pub fn means(&self) -> std::collections::BTreeMap<String, tch::Tensor> {
                $crate::posterior::in_model::means(self).into_iter().collect()
            }

            /// The outputs of `samples` samples one by one, stacked to `[K, …]`; any output will do (logits,
            /// regressions).
            ///
            /// # Errors
            /// As [`predict`](#method.predict), but for the shape, which must only be the same each time.
            pub fn predict_samples<L: $crate::IntoTensor>(
                &self,
                params: impl Into<$crate::Params>,
                samples: usize,
                outputs: impl FnMut() -> L,
            ) -> $crate::Result<tch::Tensor> {
                $crate::posterior::predictive::predict_samples(
                    self,
                    &$crate::Params::separate(params)?,
                    samples,
                    outputs,
                )
            }

            /// Writes one safetensors file, which the family's `load` reads. The file is replaced atomically.
            ///
            /// # Errors
            /// If the file cannot be written, or two tensors would have the same name in it.
            pub fn save(&self, path: impl AsRef<std::path::Path>) -> $crate::Result<()> {
                $crate::posterior::Posterior::save_to(self, path.as_ref())
            }
        }
    };
}
pub(super) use generic_methods;

generic_methods!(dyn Posterior + '_);

/// Makes a type with a field `seed` and inherent `names`, `len`, `mean`, `variance`, `sample` and `write` a
/// [`Posterior`], whose methods need no import. What comes after the type goes into the implementation of the trait.
macro_rules! posterior {
    ($Posterior:ident $({ $($more:tt)* })?) => {
        impl $crate::posterior::Posterior for $Posterior {
            fn names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
                Box::new(self.names())
            }

            fn len(&self) -> usize {
                self.len()
            }

            fn mean(&self, name: &str) -> Option<tch::Tensor> {
                self.mean(name)
            }

            fn variance(&self, name: &str) -> Option<tch::Tensor> {
                self.variance(name)
            }

            fn set_seed(&mut self, seed: u64) {
                self.seed = seed;
            }

            fn sample(&self, k: u64) -> $crate::Result<Vec<(String, tch::Tensor)>> {
                self.sample(k)
            }

            fn save_to(&self, path: &std::path::Path) -> $crate::Result<()> {
                self.write(path)
            }

            $($($more)*)?
        }

        impl $Posterior {
            /// The same posterior with other samples; default seed 0.
            #[must_use]
            pub fn with_seed(mut self, seed: u64) -> Self {
                self.seed = seed;
                self
            }

            /// Whether there is no weight; the parameters may still have names.
            pub fn is_empty(&self) -> bool {
                self.len() == 0
            }
        }

        $crate::posterior::any::generic_methods!($Posterior);
    };
}
pub(super) use posterior;
