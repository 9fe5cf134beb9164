//! Optimizers of the Bayesian learning rule over libtorch tensors, and the posteriors over weights that they learn.
//!
//! For programs that train with [`tch`] today: two changed lines keep the training loop, and the variational rows
//! also give uncertainty, and a posterior that can be saved, merged, and used as the prior of the next task.
//!
//! # The rule
//!
//! Learning is the search for a distribution q over the weights θ that has a low expected loss and stays wide:
//!
//! ```text
//! min over q of  E_q[ ℓ(θ) ] - H(q)              ℓ(θ) = Σᵢ ℓᵢ(θ) - ln prior(θ)
//! ```
//!
//! For an exponential family with natural parameters λ and expectation parameters μ, a step along the natural
//! gradient is
//!
//! ```text
//! λ ← (1-ρ) λ - ρ ∇_μ E_q[ ℓ(θ) ]
//! ```
//!
//! and for a Gaussian N(m, S⁻¹), by the theorems of Bonnet and Price, that is
//!
//! ```text
//! S ← (1-ρ) S + ρ E_q[ ∇²ℓ ]
//! m ←    m    - ρ S⁻¹ E_q[ ∇ℓ ]
//! ```
//!
//! An algorithm is a choice of the family and of approximations to the two expectations (Khan and Rue, *The Bayesian
//! Learning Rule*, 2023). Here these choices are types, and everything else is one driver, [`Optimizer`].
//!
//! | row | family | E_q\[∇ℓ\] | E_q\[∇²ℓ\] |
//! |---|---|---|---|
//! | [`Sgd`] | Gaussian, fixed covariance | at the mean (delta method) | 1 |
//! | [`RmsProp`] | Gaussian, diagonal | at the mean | root of averaged squared gradients |
//! | [`Adam`], [`AdamW`] | Gaussian, diagonal | at the mean, averaged | root of averaged squared gradients |
//! | [`Vadam`], [`Vadam::vprop`], [`Vadam::noisy_adam`] | Gaussian, diagonal | at samples | averaged squares |
//! | OGN, [`Von::ogn`] | Gaussian, diagonal | at the mean | Gauss-Newton, per-example squares |
//! | VOGN, [`Von::vogn`] | Gaussian, diagonal | at samples | Gauss-Newton, per-example squares |
//! | VON, [`Von`] with [`Statistic::Price`] | Gaussian, diagonal | at samples | Price's theorem |
//! | [`Ivon`] | Gaussian, diagonal | at samples | Price's theorem, kept positive |
//! | [`Sam`] | Gaussian, fixed covariance | at the worst point near the mean | 1 |
//! | [`SamRmsProp`] | Gaussian, diagonal | at the worst point near the mean | root of averaged squared gradients |
//! | [`BayesianSam`] | Gaussian, diagonal | at the worst point, found at a sample | √precision · size of the gradient |
//! | [`Newton`], [`DiagonalNewton`] | Gaussian, full or diagonal | at the mean | exact; Hutchinson |
//! | [`FullVon`] | Gaussian, full | at samples | Price's theorem or exact, kept positive |
//! | [`Evon`] | Gaussian, diagonal in a Kronecker basis | at samples | Price's theorem in the basis, kept positive |
//! | [`Soap`] | Gaussian, diagonal in a Kronecker basis | at the mean, averaged | as RMSprop, in the basis |
//! | [`NoisyKfac`] | Gaussian, Kronecker-factored precision | at samples | Kronecker-factored Fisher information |
//! | [`Ste`] | Bernoulli | at the mode (delta method) | none |
//! | [`BayesBiNN`] | Bernoulli | at relaxed samples | none |
//! | [`MixtureOfGaussians`] | mixture of diagonal Gaussians | at samples, nodes or the means | exact |
//!
//! [`Von::icml2018`] and [`Von::neurips2019`] are VOGN as in those papers. To add a row, implement [`Rule`](rule::Rule)
//! or, if its posterior is not a product over the weights, [`BlockRule`](rule::BlockRule); [`Optimizer`] drives either.
//!
//! # Train, ask, predict
//!
//! ```
//! use tch::{Device, Kind, Tensor, nn, nn::Module};
//! use tch_blr::{Ivon, metrics};
//!
//! # fn main() -> tch_blr::Result<()> {
//! # tch::manual_seed(0);
//! let x = Tensor::randn([200, 4], (Kind::Float, Device::Cpu));
//! let y = x.argmax(-1, false);
//! let vs = nn::VarStore::new(Device::Cpu);
//! let net = nn::linear(vs.root(), 4, 4, Default::default());
//!
//! let mut opt = Ivon::default().ess(200.0).hess_init(0.1).build(&vs, 1.0)?; // ess: number of training examples
//! for _ in 0..100 {
//!     opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))?; // mean loss of the batch
//! }
//!
//! let q = opt.posterior()?; // owned: independent of the optimizer from here on
//! let p = q.predict(&vs, 32, || net.forward(&x).softmax(-1, Kind::Float))?;
//! assert!(metrics::accuracy(&p.mean, &y)? > 0.8);
//! assert_eq!(p.mutual_information.size(), [200]); // what more data could resolve, in nats
//! # Ok(())
//! # }
//! ```
//!
//! Outside of a step the variables hold the mean, so evaluating and saving need no ceremony.
//!
//! # Posterior as prior
//!
//! ```
//! # use tch::{Device, Kind, Tensor, nn};
//! # use tch_blr::{Ivon, combine};
//! # fn main() -> tch_blr::Result<()> {
//! # let vs = nn::VarStore::new(Device::Cpu);
//! # let w = vs.root().zeros("w", &[3]);
//! # let loss = |target: f64| (&w - target).square().mean(Kind::Float);
//! # let mut opt = Ivon::default().ess(1000.0).build(&vs, 0.1)?;
//! # opt.step(|| loss(1.0))?;
//! # let folder = tempfile::tempdir().unwrap();
//! # let path = folder.path().join("task1.safetensors");
//! let q1 = opt.posterior()?;
//! q1.save(&path)?;
//!
//! // The next task, of another size: yesterday's posterior is today's prior.
//! let q1 = tch_blr::DiagonalGaussian::load(&path)?;
//! let mut opt = Ivon::default().ess(500.0).prior(&q1).build(&vs, 0.1)?;
//! opt.step(|| loss(2.0))?;
//! let q2 = opt.posterior()?;
//!
//! // Natural parameters add: two continuations of q1 merged, with q1 counted once.
//! # let mut opt = Ivon::default().ess(500.0).prior(&q1).build(&vs, 0.1)?;
//! # opt.step(|| loss(3.0))?;
//! # let q3 = opt.posterior()?;
//! let merged = combine(&[(1.0, &q2), (1.0, &q3), (-1.0, &q1)])?;
//! # assert_eq!(merged.len(), 3);
//! # Ok(())
//! # }
//! ```
//!
//! # More
//!
//! * Every quantity is on the scale of the **mean** loss, and `weight_decay` is δ = prior precision / ess:
//!   `docs/scales.md`, with the numbers of other codes in ours.
//! * `docs/from_adam.md`: which row to start with, and five steps to IVON. `docs/tuning.md`: the start without a
//!   search, and what to look at. `docs/porting.md`: every other loop, from tch and PyTorch. `docs/table.md`: all
//!   settings of every row. `docs/tch.md`: hazards of tch, threads, linking libtorch. `docs/design.md`: architecture
//!   and file formats.
//! * `docs/posteriors.md`: which posterior for what.
//! * [`fisher`]: the curvature at a trained solution, and Laplace's approximation from it. [`laplace`]: its evidence,
//!   the prior precision and noise that are most likely, its predictions; of all weights, a layer or some.
//!   `docs/laplace.md`.
//! * [`iterates`]: averages and posteriors of the weights that any optimizer passes through: EMA, LAWA, SWAG.
//! * [`family`]: exponential families, the rule on them, and the classical algorithms that are its special cases.
//! * [`merge`]: several models into one, with curvature or without; the command `blr-merge` does it to files.
//!   `docs/merging.md`.
//! * [`federated`]: clients that keep their data, and a server that holds a posterior and a dual for each.
//!   `docs/federated.md`.
//! * [`continual`]: what stands for the data of earlier tasks: weights, functions, memory. [`selection`]: which
//!   examples to keep.
//! * [`sensitivity`]: how far the model would move without an example; leave-one-out losses. `docs/sensitivity.md`.
//!   [`pruning`]: which weights a model can do without.
//! * [`parallel`]: several processes or threads that train one model and keep the same bits. `docs/scale.md`.
//! * [`nn`]: layers for the rows that need per-example gradients, and adapters of low rank (`docs/adapters.md`).
//!   [`Diagnostics`]: how a training run is going, and advice.
//! * [`metrics`]: calibration and other measures of predictions, of classes and of numbers. [`conformal`]: sets and
//!   intervals that hold the truth as often as they say. `docs/uncertainty.md`.

mod check;
pub mod conformal;
pub mod continual;
mod curvature;
mod driver;
mod error;
mod expectation;
pub mod family;
pub mod federated;
pub mod fisher;
mod gradient;
pub mod iterates;
mod kernel;
pub mod laplace;
mod likelihood;
mod linalg;
mod link;
pub mod merge;
pub mod metrics;
pub mod nn;
mod outputs;
pub mod parallel;
mod params;
mod posterior;
mod prior;
pub mod pruning;
pub mod rows;
pub mod rule;
mod schedule;
pub mod selection;
pub mod sensitivity;
mod statistic;
mod storage;

pub use blr_merge;
pub use driver::{
    Advice, Builder, Derivatives, Diagnostics, Evaluation, Fallback, LrRange, Optimizer, Outcome, Sigma, Spread, Train,
};
pub use error::{Error, Result};
pub use expectation::Expectation;
pub use gradient::{IntoTensor, WithOutput};
pub use iterates::{Ema, Lawa, Swag, soft_update};
pub(crate) use kernel::Real;
#[cfg(feature = "cuda-emulation")]
#[doc(hidden)]
pub use kernel::emulation;
pub use kernel::{Given, Noise, Philox};
pub use likelihood::Labels;
pub(crate) use link::Link;
pub use outputs::GaussianPosterior;
pub use params::{Params, Perturbed};
pub use posterior::{
    DiagonalGaussian, FullGaussian, IntoGaussian, KroneckerGaussian, KroneckerParameter, LowRankGaussian,
    MeanFieldBernoulli, Mixture, Natural, NaturalSum, Posterior, Predictive, PrunedGaussian, clamp_information,
    combine,
};
pub use prior::Prior;
pub use rows::{
    Adam, AdamW, AnyRow, BayesBiNN, BayesianSam, BuildOptions, DiagonalNewton, Evon, FullVon, Ivon, MixtureOfGaussians,
    MultiIvon, Newton, NoisyKfac, RmsProp, Sam, SamRmsProp, Sgd, Soap, Ste, Vadam, Von,
};
pub use schedule::Schedule;
pub use statistic::Statistic;
// Re-exported, because a program must use the same version of tch as this crate: its tensors are in the interface.
pub use tch;

// The snippets of these pages are tests. Private types, as rustdoc only looks for snippets in documentation of items.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
#[cfg(doctest)]
#[doc = include_str!("../docs/porting.md")]
struct Porting;
#[cfg(doctest)]
#[doc = include_str!("../docs/from_adam.md")]
struct FromAdam;
#[cfg(doctest)]
#[doc = include_str!("../docs/tuning.md")]
struct Tuning;
#[cfg(doctest)]
#[doc = include_str!("../docs/scales.md")]
struct Scales;
#[cfg(doctest)]
#[doc = include_str!("../docs/posteriors.md")]
struct Posteriors;
#[cfg(doctest)]
#[doc = include_str!("../docs/merging.md")]
struct Merging;
#[cfg(doctest)]
#[doc = include_str!("../docs/continual.md")]
struct ContinualLearning;
#[cfg(doctest)]
#[doc = include_str!("../docs/federated.md")]
struct FederatedLearning;
#[cfg(doctest)]
#[doc = include_str!("../docs/sensitivity.md")]
struct SensitivityOfExamples;
#[cfg(doctest)]
#[doc = include_str!("../docs/laplace.md")]
struct LaplacesApproximation;
#[cfg(doctest)]
#[doc = include_str!("../docs/adapters.md")]
struct Adapters;
#[cfg(doctest)]
#[doc = include_str!("../docs/scale.md")]
struct Scale;
#[cfg(doctest)]
#[doc = include_str!("../docs/uncertainty.md")]
struct Uncertainty;
