//! Sets of classes and intervals that hold the truth with a chosen probability, whatever the model is: split conformal
//! prediction.
//!
//! Examples that the training has not seen are given scores, high where the model is wrong. Of n such scores
//! [`threshold`] takes the k-th smallest as q, k = ⌈(n+1)(1-α)⌉, and a set holds every answer whose score is at most q.
//! If the calibration examples and a new one are exchangeable (drawn alike), then
//!
//! ```text
//! 1-α ≤ P(the set holds the truth) ≤ 1-α + 1/(n+1)
//! ```
//!
//! on the left always, on the right if no two scores are equal (Vovk et al. 2005). This is an average over calibration
//! sets too: given one, the probability is itself distributed as Beta(k, n+1-k). With n < 1/α - 1 examples k is n+1, q
//! is ∞ and every set holds everything: no error, but the answer to too little data.
//!
//! | | score | |
//! |---|---|---|
//! | [`Score::Lac`] | 1 - p(y) | smallest sets on average; may be empty |
//! | [`Score::Aps`] | probability of the classes above y, and a part of y's | adapts to the example |
//! | [`Score::Raps`] | the same, with a price on late ranks | smaller sets for many classes |
//! | [`Cqr`] | how far y lies outside of an interval | intervals of any regression |
//!
//! A better model makes the sets smaller, not more honest: for the probabilities themselves see
//! [`metrics`](crate::metrics).
//!
//! ```
//! # use tch::{Kind, Tensor};
//! use tch_blr::conformal::{Score, Uniforms};
//! # fn main() -> tch_blr::Result<()> {
//! # let probs = Tensor::from_slice(&[0.5, 0.3, 0.2, 0.1, 0.8, 0.1, 0.2, 0.2, 0.6]).view([3, 3]).repeat([10, 1]);
//! # let labels = Tensor::from_slice(&[0_i64, 1, 2]).repeat([10]);
//! // Averaged probabilities [n, C] and labels [n] that the training has not seen.
//! let sets = Score::Aps.calibrate(&probs, &labels, 0.1, Uniforms::Ones)?.at_least_argmax();
//! let found = sets.sets(&probs, Uniforms::Ones)?; // of new examples
//! println!("{} of the labels, {} classes on average", found.coverage(&labels)?, found.mean_size()?);
//! # assert!(found.coverage(&labels)? >= 0.9);
//! # Ok(())
//! # }
//! ```
//!
//! # Errors
//! [`Error::Metric`](crate::Error::Metric): α that is not in (0, 1), no calibration examples, a score that is NaN, and
//! what [`metrics`](crate::metrics#errors) refuses of probabilities and labels.

mod classes;
mod intervals;
mod threshold;

pub use classes::{ClassSets, Score, Sets, Uniforms};
pub use intervals::Cqr;
pub use threshold::threshold;
