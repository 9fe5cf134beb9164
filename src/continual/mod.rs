//! Continual learning: yesterday's posterior as today's prior, with memory.
//!
//! Learning task 2 after task 1 needs the gradient of the past without its data. Every method rebuilds that
//! gradient from one or more of three sources (Daxberger et al. 2023; Khan and Swaroop 2021), and what they give adds
//! up:
//!
//! ```text
//! K(θ) = ½ (θ-m)ᵀ S (θ-m)  +  Σ_{i ∈ M₁} CE(pᵢ(m), pᵢ(θ))  +  Σ_{i ∈ M₂} (pᵢ(m) - yᵢ)ᵀ fᵢ(θ)
//!        weights              functions on a memory            noise of the labels in a memory
//! ```
//!
//! with m the weights that the past left, fᵢ the model's outputs and pᵢ what they predict. Each source is a
//! [`Regularizer`] here, and [`Past`] is their sum:
//!
//! | source | type | methods |
//! |---|---|---|
//! | weights | [`Quadratic`] | L2 to the previous weights, EWC (separate, online), a variational posterior |
//! | | | online Laplace (diagonal, Kronecker, full), [`SynapticIntelligence`], [`Mas`] |
//! | functions | [`SoftLabels`], [`Fromp`] | K-priors, functional regularization, distillation, LwF, FROMP |
//! | | [`StoredOutputs`] | DER, DER++ |
//! | labels | [`LabelNoise`], [`Replay`] | what functional regularization lacks to be exact; replay is both in one |
//! | all three | [`Quadratic`] of what no memory has + [`SoftLabels`] on M₁∖M₂ + [`Replay`] on M₂ | EWC + FR + Replay |
//!
//! The last row is the sum above: on M₂ soft labels and label noise together have the gradient of replay
//! (`docs/continual.md` has it written out).
//!
//! GEM and A-GEM add no term; they turn the gradient where it would raise the past's loss: [`gem`]. ER-ACE takes
//! another loss of the new examples beside replay: [`er_ace`]. Which examples to keep is decided in
//! [`crate::selection`].
//!
//! Here belongs what stands for past data in a loss or a gradient. Nothing here knows an optimizer: a loop adds the
//! term, or hands the gradient over. How well old tasks are remembered is measured in [`crate::metrics`].
//!
//! Everything is on the scale of a **sum** over examples, as precisions and Fisher informations are, so that parts can
//! be added without a coefficient. A loss is a mean: divide by the number of examples of the new task.
//!
//! ```
//! use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
//! use tch_blr::continual::{Memory, Past, Quadratic, SoftLabels};
//! use tch_blr::nn::{self, Likelihood};
//! use tch_blr::{Adam, Params};
//! # fn main() -> tch_blr::Result<()> {
//! # let inputs = |n: i64| Tensor::randn([n, 4], (Kind::Float, Device::Cpu));
//! # let data = |n: i64| (inputs(n), Tensor::randint(3, [n], (Kind::Int64, Device::Cpu)));
//! let vs = VarStore::new(Device::Cpu);
//! let net = nn::linear(vs.root(), 4, 3, Default::default());
//! let params = Params::from(&vs);
//! # let old = data(50);
//! // .. train on the first task, then keep some of its inputs and what the model says about them:
//! let memory = Memory::new(&old.0, Likelihood::Categorical);
//! let past = Past::new()
//!     .with(Quadratic::isotropic(&params, 1.0)?)
//!     .with(SoftLabels::of(memory, |x| net.forward(x))?);
//!
//! # let (x, y) = data(80);
//! let n = 80.0;
//! let mut opt = Adam::default().build(&vs, 1e-2)?;
//! for _ in 0..10 {
//!     opt.step(|| {
//!         let new = net.forward(&x).cross_entropy_for_logits(&y);
//!         past.beside(new, n, &params, |x| net.forward(x)) // new + past / n
//!     })?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! A loss term serves every optimizer, tch's own included. The weight part of a variational optimizer belongs in its
//! prior instead, where the expectation over the posterior is exact: [`Builder::prior`](crate::Builder::prior) takes
//! the last task's posterior and divides its precision by the new task's `ess`; `ess(n / τ)` tempers the likelihood,
//! [`temper`](crate::DiagonalGaussian::temper) inflates the prior, [`combine`](crate::combine) forgets: `combine(&[(γ,
//! &q), (1.0 - γ, &q0)])`, and a [`SlowPrior`] takes in a share of every task. Heads that no task has used yet are left
//! out of it by [`select`](crate::DiagonalGaussian::select), and get their own prior by
//! [`Prior::elsewhere`](crate::Prior::elsewhere).

mod er_ace;
mod fromp;
mod functions;
pub mod gem;
mod labels;
mod mas;
mod memory;
mod of_gaussian;
mod past;
mod quadratic;
mod slow;
mod synaptic;

pub use er_ace::er_ace;
pub use fromp::{Fromp, Kernel};
pub use functions::{SoftLabels, StoredOutputs};
pub use labels::{LabelNoise, Replay};
pub use mas::Mas;
pub use memory::Memory;
pub(crate) use past::Forward;
pub use past::{Model, Past, Regularizer};
pub use quadratic::Quadratic;
pub use slow::SlowPrior;
pub use synaptic::SynapticIntelligence;
