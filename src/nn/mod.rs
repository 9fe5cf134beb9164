//! Layers whose per-example gradients one backward pass gives.
//!
//! Here belong the layers, how the gradients of their parameters follow from inputs and outputs, and losses that name
//! their likelihood. Sums of such gradients over a batch belong to `curvature`.
//!
//! The constructors have the names, arguments, variable names and initial values of [`tch::nn`], and the layers compute
//! bit for bit what tch's do, but for the padding token of [`embedding()`], which is zero; to tap a model, take
//! `linear`, `conv2d`, `embedding`, `layer_norm` and `group_norm` from here. What has no parameters (activations,
//! pooling, [`tch::nn::seq`] itself) stays as it is. [`lora_linear`] adapts a layer, of either crate, by factors of low
//! rank.
//!
//! ```
//! use tch::nn::Module;
//! use tch_blr::nn;
//!
//! let vs = tch::nn::VarStore::new(tch::Device::Cpu);
//! let net = tch::nn::seq()
//!     .add(nn::linear(vs.root() / "hidden", 784, 256, Default::default()))
//!     .add_fn(|x| x.relu())
//!     .add(nn::linear(vs.root() / "out", 256, 10, Default::default()));
//! # let x = tch::Tensor::zeros([2, 784], (tch::Kind::Float, tch::Device::Cpu));
//! assert_eq!(net.forward(&x).size(), [2, 10]);
//! ```
//!
//! While an optimizer that asks for per-example curvature evaluates its closure, each layer keeps its input aᵢ and its
//! output zᵢ. With δᵢ = ∂L/∂zᵢ from the backward pass that the gradient needs anyway, the gradient of example i is a
//! function of (aᵢ, δᵢ) alone, for instance δᵢ aᵢᵀ for a linear layer (Goodfellow 2015, arXiv:1510.01799). At all other
//! times, and under `no_grad`, nothing is kept.
//!
//! # What counts as an example
//! The entries of the **leading dimension** of a layer's input, which therefore must be the batch in every tapped
//! layer: `[B, T, D]` is B examples of T positions, whose gradients are added before they are squared, and `[B·T, D]`
//! is B·T examples (`docs/scales.md` has the numbers). Time-major sequences `[T, B, D]` would take time steps for
//! examples. Example i's loss must depend on row i only: batch normalization in training mode has no per-example
//! gradients, and a memory that passes through the layers beside the batch has examples of its own. The first step
//! looks at the graph: with losses `[B]` it always tells, and such parameters cost a backward pass for every example;
//! with a mean, layers that were called more than once are refused unless their calls depend on each other, row by row.
//! The Gauss-Newton matrix follows each set of examples by itself.
//!
//! Inputs without a batch dimension are not tapped, nor are embeddings with `sparse` or `scale_grad_by_freq` (whose
//! gradients are not sums over examples), nor frozen parameters.

mod conv2d;
mod embedding;
mod group_norm;
mod layer_norm;
mod linear;
mod lora;
mod loss;
pub(crate) mod tape;

pub use crate::likelihood::Likelihood;
pub use conv2d::{Conv2D, conv2d};
pub use embedding::{Embedding, embedding};
pub use group_norm::{GroupNorm, group_norm};
pub use layer_norm::{LayerNorm, layer_norm};
pub use linear::{Linear, linear};
pub use lora::{LoraConfig, LoraLinear, lora_linear};
pub use loss::{binary_cross_entropy, cross_entropy, squared_error};
