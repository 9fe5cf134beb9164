//! One error type for the whole crate. A new variant belongs here only if a caller would handle it differently from
//! all others; what went wrong is for the message to say.
//!
//! Each message says what was wrong, where (the name of the parameter or hyper-parameter and its value) and what to
//! do. A function that returns an error has left weights, optimizer state, noise position and files as they were.

use std::path::PathBuf;

/// What went wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A hyper-parameter is missing, out of range or not a number.
    #[error("hyper-parameter `{name}` = {value}: expected {expected}")]
    HyperParameter {
        /// Name of the field, as in the configuration.
        name: &'static str,
        /// The value given.
        value: String,
        /// The values that are allowed.
        expected: &'static str,
    },
    /// A set of parameters cannot be optimized as a whole: empty, nothing trainable, on several devices.
    #[error("parameters: {0}")]
    Parameters(String),
    /// One parameter is not as the optimizer, posterior, prior or checkpoint expects it.
    #[error("parameter `{name}`: {problem}")]
    Parameter {
        /// Name of the variable.
        name: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// Variables are held at other values by a guard, or are evaluated or updated by another thread.
    #[error("in use: {0}; nothing was changed")]
    InUse(String),
    /// A GPU could not do what was asked: it has no memory left, or a kernel was not compiled.
    #[error("device: {0}; nothing was changed")]
    Device(String),
    /// What connects the ranks of a data-parallel training is broken ([`Collective`](crate::parallel::Collective)): one of
    /// them has left, or they do not agree. Build all of them anew, from the last checkpoint.
    #[error("ranks: {0}")]
    Collective(String),
    /// One of the ranks of a data-parallel training could not take part in a call, or differs from rank 0. All ranks have
    /// this same error, and none has changed anything.
    #[error("rank {rank}: {problem}")]
    Rank {
        /// The lowest of those ranks.
        rank: usize,
        /// Its own error, or in what it differs.
        problem: String,
    },
    /// The closure's loss is unusable: neither 0-dim nor `[B]`, or without a graph.
    #[error("loss: {0}")]
    Loss(String),
    /// A model's outputs, targets or active outputs do not fit its likelihood, or the loss does not say which it is.
    #[error("likelihood: {0}")]
    Likelihood(String),
    /// The loss is NaN or infinite.
    #[error("the loss is {value} in step {step}; nothing was changed (lower the learning rate, or look at the batch)")]
    NonFiniteLoss {
        /// The offending value.
        value: f64,
        /// Number of steps taken before this one.
        step: u64,
    },
    /// The average of the loss rises ([`Builder::check_divergence`](crate::Builder::check_divergence)).
    #[error(
        "the loss is {average:.4} on average in step {step}, more than {margin} above the {lowest:.4} that it has been; \
         nothing was changed (lower the learning rate, clip the gradient, or go back to a checkpoint)"
    )]
    Diverged {
        /// Over some 50 updates.
        average: f64,
        /// The lowest of such averages.
        lowest: f64,
        /// By how much it may rise.
        margin: f64,
        /// Number of steps taken before this one.
        step: u64,
    },
    /// A gradient or a curvature estimate is NaN or infinite, or an update by finite ones would leave the range of the
    /// numbers.
    #[error(
        "the {what} of parameter `{name}` is not finite ({value}) in step {step}; nothing was changed \
         (clip the gradient, lower the learning rate, or look at the batch)"
    )]
    NonFiniteGradient {
        /// A gradient, a statistic of the curvature, or what an update would have made of a finite gradient.
        what: &'static str,
        /// Name of the variable.
        name: String,
        /// The first offending element.
        value: f64,
        /// Number of steps taken before this one.
        step: u64,
    },
    /// The closure returned an error of its own.
    #[error("the closure failed: {0}")]
    Closure(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Per-example gradients cannot be computed for this model and loss.
    #[error("per-example gradients: {0}")]
    PerExample(String),
    /// The curvature at a solution cannot be computed from this model, these data or these settings.
    #[error("curvature: {0}")]
    Curvature(String),
    /// A precision, or a Hessian that takes its place, has no inverse that is a covariance.
    #[error(
        "{what} is not positive definite ({problem}); nothing was changed (raise the weight decay or the damping, \
         lower the rate of the precision, or choose a rule that keeps it positive)"
    )]
    NotPositiveDefinite {
        /// Which matrix.
        what: String,
        /// How it shows.
        problem: String,
    },
    /// What was asked of a posterior or prior does not exist.
    #[error("posterior: {0}")]
    Posterior(String),
    /// Models, weights and a method of merging do not fit together.
    #[error("merge: {0}")]
    Merge(String),
    /// More of a part would be taken out of a posterior than the posterior holds.
    #[error(
        "removing {weight} of the other posterior leaves {what} without a positive precision: weights below \
         {largest:e} can be removed{}", rounding(*weight / *largest)
    )]
    Removal {
        /// Which parameter or matrix.
        what: String,
        /// The weight given.
        weight: f64,
        /// Every weight below this leaves a posterior.
        largest: f64,
    },
    /// A sum of posteriors takes more precision away than it adds.
    #[error(
        "combining leaves {short} of {of} precisions not positive, the least in {what}: with all negative weights times \
         a factor below {largest:e} there would be none; or combine clamp_information(&q, &prior) in place of each q, \
         whose information beyond its prior is never negative{}", rounding(1.0 / *largest)
    )]
    Combine {
        /// Which parameter or matrix.
        what: String,
        /// How many elements, or directions of a matrix.
        short: usize,
        /// Number of weights.
        of: usize,
        /// Every factor below this on the negative weights leaves a posterior.
        largest: f64,
    },
    /// Noise was asked for at a position where none was given.
    #[error("noise: {0}")]
    Noise(String),
    /// Parameters, draws or data that an exponential family cannot have.
    #[error("{family}: {problem}")]
    Family {
        /// The family, or the algorithm on it.
        family: &'static str,
        /// What is wrong, and what was expected.
        problem: String,
    },
    /// A step of the rule ends at natural parameters that the family does not have.
    #[error("a step of ρ = {rho} leaves the family; nothing was changed; ρ up to {largest:.3e} would not. {problem}")]
    Step {
        /// The ρ given.
        rho: f64,
        /// The largest ρ ≤ the one given for which this step stays inside, to three digits.
        largest: f64,
        /// What is wrong with the natural parameters after the step.
        problem: String,
    },
    /// An iteration was still moving after the steps that it was allowed.
    #[error(
        "after {steps} steps the parameters still move by {change:e} of their size: allow more, or damp with a smaller \
         ρ"
    )]
    NotConverged {
        /// Steps taken.
        steps: usize,
        /// Largest change in the last step, relative to the largest parameter.
        change: f64,
    },
    /// A memory of past examples does not fit the model, or lacks what is asked of it.
    #[error("memory: {0}")]
    Memory(String),
    /// Inputs of a metric do not fit together.
    #[error("metric: {0}")]
    Metric(String),
    /// A file cannot be read or written, or does not hold what is expected.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// libtorch refused an operation.
    #[error("libtorch: {0}")]
    Torch(String),
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl From<tch::TchError> for Error {
    /// Keeps libtorch's message and drops the C++ backtrace below it.
    fn from(e: tch::TchError) -> Self {
        let text = e.to_string();
        Error::Torch(text.lines().next().unwrap_or_default().to_owned())
    }
}

impl From<blr_merge::Error> for Error {
    /// The variant of the same name, with the same message.
    fn from(e: blr_merge::Error) -> Self {
        use blr_merge::Error as Of;
        match e {
            Of::HyperParameter { name, value, expected } => Error::HyperParameter { name, value, expected },
            Of::Parameter { name, problem } => Error::Parameter { name, problem },
            Of::Removal { what, weight, largest } => Error::Removal { what, weight, largest },
            Of::File { path, problem } => Error::File { path, problem },
            Of::Merge(problem) => Error::Merge(problem),
            // That enum is non_exhaustive, too; a variant that is new there still has its message.
            other => Error::Merge(other.to_string()),
        }
    }
}

/// What is taken from a precision over what there is: where the two agree to the digits of f32, rounding is the cause.
fn rounding(taken: f64) -> &'static str {
    if (taken - 1.0).abs() < 4.0 * f64::from(f32::EPSILON) {
        ". The two agree to the seven digits of an f32, so what was learned may have been lost in rounding beside a \
         prior ten million times as precise: train weights of f64, whose posterior is in f64, or take a wider prior"
    } else {
        ""
    }
}

impl Error {
    pub(crate) fn parameter(name: &str, problem: impl Into<String>) -> Self {
        Error::Parameter { name: name.to_owned(), problem: problem.into() }
    }

    pub(crate) fn family(family: &'static str, problem: impl Into<String>) -> Self {
        Error::Family { family, problem: problem.into() }
    }

    pub(crate) fn file(path: &std::path::Path, problem: impl std::fmt::Display) -> Self {
        Error::File { path: path.to_owned(), problem: problem.to_string() }
    }
}
