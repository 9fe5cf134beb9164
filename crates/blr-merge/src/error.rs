//! One error type for the library and the command.
//!
//! A message says what was wrong, where (the tensor, the setting with its value, or the file) and what to do. A
//! function that returns an error has left the files as they were.

use std::fmt::{Debug, Display};
use std::path::{Path, PathBuf};

/// What went wrong, where, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting is out of range or not a number.
    #[error("hyper-parameter `{name}` = {value}: expected {expected}")]
    HyperParameter {
        /// Name of the setting.
        name: &'static str,
        /// The value given.
        value: String,
        /// The values that are allowed.
        expected: &'static str,
    },
    /// One tensor differs between the models, or has numbers that cannot be merged.
    #[error("parameter `{name}`: {problem}")]
    Parameter {
        /// Name of the tensor.
        name: String,
        /// What is wrong with it, and what to do.
        problem: String,
    },
    /// Models, weights and a method of merging that do not fit together.
    #[error("merge: {0}")]
    Merge(String),
    /// The posterior holds less of a part than was to be removed.
    #[error(
        "removing {weight} of the other posterior leaves {what} without a positive precision: \
         weights below {largest:e} can be removed"
    )]
    Removal {
        /// Which tensor.
        what: String,
        /// The weight given.
        weight: f64,
        /// Every weight below this leaves a posterior.
        largest: f64,
    },
    /// The user's command that scores models failed, or gave no score.
    #[error("the evaluation `{command}` {problem}")]
    Evaluation {
        /// The command.
        command: String,
        /// What happened, with what it wrote on standard error.
        problem: String,
    },
    /// A file cannot be read or written, or does not hold what is expected.
    #[error("{path}: {problem}")]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        problem: String,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Refuses a setting that is out of range.
    pub(crate) fn unless(ok: bool, name: &'static str, value: impl Debug, expected: &'static str) -> Result<()> {
        if ok { Ok(()) } else { Err(Error::HyperParameter { name, value: format!("{value:?}"), expected }) }
    }

    pub(crate) fn parameter(name: &str, problem: impl Into<String>) -> Self {
        Error::Parameter { name: name.to_owned(), problem: problem.into() }
    }

    pub(crate) fn file(path: &Path, problem: impl Display) -> Self {
        Error::File { path: path.to_owned(), problem: problem.to_string() }
    }
}
