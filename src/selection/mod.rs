//! Which examples to keep.
//!
//! A score is a number per example, a selection is a list of positions for
//! [`Memory::select`](crate::continual::Memory::select), and any score goes with any selection. A minus in front of a
//! score gives its control (the least memorable).
//!
//! | score | from | |
//! |---|---|---|
//! | [`Memory::lambda`] | inputs | tr Λᵢ: how undecided the model is (FROMP, K-priors) |
//! | [`Memory::leverage`] | inputs, a posterior | tr(Λᵢvᵢ): how much of the example's prediction is its own doing |
//! | [`Memory::sensitivity`] | labels too | Σ \|e Λ v\|: how far the model would move without it |
//! | [`Memory::gradient_norm`] | labels | ‖pᵢ - yᵢ‖: EL2N |
//! | [`Memory::weight_gradient_norm`] | labels | ‖Jᵢᵀ(pᵢ - yᵢ)‖: GraNd |
//! | [`random_scores`] | nothing | |
//!
//! [`Memory::lambda`]: crate::continual::Memory::lambda
//! [`Memory::leverage`]: crate::continual::Memory::leverage
//! [`Memory::sensitivity`]: crate::continual::Memory::sensitivity
//! [`Memory::gradient_norm`]: crate::continual::Memory::gradient_norm
//! [`Memory::weight_gradient_norm`]: crate::continual::Memory::weight_gradient_norm
//!
//! | selection | |
//! |---|---|
//! | [`top`], [`class_balanced`] | the highest of all, or the same number of each class |
//! | [`TopK`] | the same from a stream |
//! | [`Reservoir`] | each of a stream with the same probability |
//! | [`Ring`] | the last of a stream, of each class |
//! | [`k_centre`], [`herding`] | by features: to cover them, or for their mean |
//!
//! [`compact()`] keeps weighted pseudo-examples instead of examples; together they have the curvature of the whole data
//! set.
//!
//! For a random class-balanced subset, pass [`random_scores`] to [`class_balanced`].
//!
//! **The score belongs to the loss.** λ and its relatives pick the examples near the boundary. With soft labels
//! ([`SoftLabels`](crate::continual::SoftLabels)) that is right, because those examples carry most of the past's
//! gradient. Replay of their *hard* labels sees nothing but hard cases and forgets the easy ones, and is better served
//! by random examples: on USPS with 10 % of the past, 71.8 % against 88.3 %, and soft labels on the hard cases 92.6 %
//! (`docs/results.md`, command `cargo run --release --example reproduce -- d2`).
//!
//! ```
//! # use tch::{Device, Kind, Tensor, nn::Module, nn::VarStore};
//! use tch_blr::continual::{Memory, SoftLabels};
//! use tch_blr::nn::{self, Likelihood};
//! use tch_blr::selection;
//! # fn main() -> tch_blr::Result<()> {
//! # let x = Tensor::randn([50, 4], (Kind::Float, Device::Cpu));
//! # let y = Tensor::randint(3, [50], (Kind::Int64, Device::Cpu));
//! # let vs = VarStore::new(Device::Cpu);
//! # let net = nn::linear(vs.root(), 4, 3, Default::default());
//! let past = Memory::new(&x, Likelihood::Categorical).targets(&y);
//! let scores = past.lambda(|x| net.forward(x))?;
//! let kept = past.select(&selection::class_balanced(&scores, &y, 12)?)?;
//! let functions = SoftLabels::of(kept, |x| net.forward(x))?;
//! # assert_eq!(functions.predictions().size(), [12, 3]);
//! # Ok(())
//! # }
//! ```
//!
//! What a score leaves out (how outputs, predictions and weights would change, and the leave-one-out loss that follows)
//! is in [`crate::sensitivity`]; the losses on what is kept are in [`crate::continual`], and so is
//! [`Memory`](crate::continual::Memory).
//!
//! Everything is a function of its arguments and seeds; among equal scores the earlier example comes first.

mod compact;
mod features;
mod score;
mod stream;

pub use compact::compact;
pub use features::{herding, k_centre};
pub use score::random_scores;
pub use stream::{Reservoir, Ring, TopK, class_balanced, top};

fn error(problem: impl Into<String>) -> crate::Error {
    crate::Error::Memory(problem.into())
}
