//! What the examples, tests and benchmarks of [`tch_blr`] share. Not published.
//!
//! * Data: [`handwritten`] digits that are part of the program; [`digits`], [`moons`], [`four_moons`], [`usps`],
//!   [`libsvm`], found by [`data`]; [`batches`] of them.
//! * Models: [`model`] (a multilayer perceptron, its training and scores), [`logistic`] (regression to its exact
//!   optimum), [`tasks`] (task after task, by every method).
//! * What comes out: [`pictures`], [`sheets`], [`output`].
//! * A model of many machines: [`ring`].
//! * What tests hold to reference values: [`tables`] of `--example reproduce`, [`systems`] of `--example systems`.
//!
//! Code that one example alone needs stays with that example; code that two need, or an example and a test, belongs
//! here.

// Errors end an example, with a line on the terminal: nobody has to tell them apart.
#![allow(clippy::missing_errors_doc)]

pub mod batches;
pub mod data;
pub mod digits;
pub mod four_moons;
pub mod handwritten;
pub mod libsvm;
pub mod logistic;
pub mod model;
pub mod moons;
pub mod output;
pub mod pictures;
pub mod random;
pub mod ring;
pub mod sheets;
pub mod systems;
pub mod tables;
pub mod tasks;
pub mod usps;

/// What examples return: errors are lines for the terminal.
pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;
