//! What implementers of rows need: the traits of a row, and what its functions see.
//!
//! A row is its settings and a few pure functions. [`Row`] says what every row is; [`Rule`] adds the functions of one
//! weight (most rows), [`BlockRule`] those of one block of weights as tensors. [`Row::builder`] starts an optimizer of
//! any of them. `CONTRIBUTING.md` lists the places that a new row of this crate touches.
//!
//! Only re-exports belong here. What is needed to train is at the top of the crate, and options of rows are in
//! [`crate::rows`].

pub use crate::driver::{
    Block, BlockRule, Blocks, Decay, DeltaRule, Displaced, Evaluated, Learned, MaybePosterior, NoPosterior, OfWeights,
    Row, Rule, Site, Start, Weights, When,
};
pub use crate::kernel::{Pack, Real};
pub use crate::link::Link;
pub use crate::prior::{BlockPrior, Family};
