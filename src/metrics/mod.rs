//! How good predictions are: of classes, of numbers, of what is foreign.
//!
//! A number belongs here if it can be computed from predictions and labels. What needs a model, a posterior or an
//! optimizer does not. Sets and intervals that are made to hold the truth are in [`conformal`](crate::conformal).
//!
//! | question | answer |
//! |---|---|
//! | how often right, how surprised by the label | [`accuracy`], [`nll`], [`brier`] |
//! | is the confidence the share of right answers | [`ece`], [`adaptive_ece`], [`classwise_ece`], [`Reliability`] |
//! | one number that repairs it | [`Temperature`] |
//! | which answers to withhold | [`selective`], [`RiskCoverage`]: AURC, AUGRC |
//! | what is foreign | [`entropy`], [`auroc`], [`fpr_at`] |
//! | what is said of a number | [`Forecast`]: mean, variances, quantiles; NLL, CRPS, PIT |
//! | are intervals as wide as they should be | [`Interval`]: coverage, width, interval score; [`ks_uniform`] |
//! | what a sequence of tasks does to each | [`AccuracyMatrix`] |
//!
//! Functions of class probabilities take what a predictive distribution gives, whichever optimizer or posterior it came
//! from:
//!
//! | symbol | argument | shape and kind |
//! |---|---|---|
//! | pₙ(c) | `probs` | `[N, C]`, any floating kind and device: *after* softmax and averaging over samples |
//! | yₙ | `labels` | `[N]`, `i64`, any device, 0 ≤ yₙ < C |
//!
//! Sums run in f64 on the CPU. The predicted class is `ĉₙ = argmax_c pₙ(c)` (the first one among ties) and its
//! probability pₙ(ĉₙ) is the *confidence*.
//!
//! # Errors
//! [`Error::Metric`](crate::Error::Metric) says which argument is wrong and what was expected: a shape or kind other
//! than the table's, no examples, a label outside of `0..C`, a value that is NaN or not in [0, 1], a row that does
//! not sum to one (within 10⁻³; 10⁻² for half and bfloat16), which is what logits look like.

mod calibration;
mod classes;
mod detection;
mod forecast;
pub(crate) mod inputs;
mod interval;
mod numbers;
mod selective;
mod temperature;
mod transfer;

pub use calibration::{Bin, Reliability, adaptive_ece, adaptive_reliability, classwise_ece, ece, reliability};
pub(crate) use classes::entropy_in_f64;
pub use classes::{NLL_CLAMP, accuracy, brier, entropy, nll};
pub use detection::{auroc, fpr_at, threshold_at};
pub use forecast::Forecast;
pub use interval::Interval;
pub use numbers::{VARIANCE_FLOOR, ks_uniform, rmse};
pub use selective::{RiskCoverage, selective, selective_by};
pub use temperature::Temperature;
pub use transfer::AccuracyMatrix;

#[cfg(test)]
mod tests;
