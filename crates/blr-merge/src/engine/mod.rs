//! The arithmetic of every [`Method`], on one tensor at a time and a chunk of it at a time.
//!
//! Here belong formulas over slices. Where the numbers come from and go to is the caller's business: files implement
//! [`Inputs`] and [`Output`] in this crate, tensors in tch-blr, and anything else can.
//!
//! ```text
//! merge  →  the method                linear.rs  angles.rs  task_vectors.rs (+ select.rs)  sce.rs  natural.rs
//!           ranks of whole tensors:   rank.rs
//!           for each chunk:           job.rs
//!             read and check the inputs  →  formula, in parallel over blocks  →  check and write
//! ```
//!
//! What a method must know of the whole tensor (the thresholds of TIES and others, the angles of slerp and others, the
//! norms of DARE) takes earlier passes over all chunks. Chunks and blocks have fixed sizes and sums over blocks are
//! added in order, so a result depends neither on the number of threads nor on where the numbers lie.
//!
//! ```
//! use blr_merge::engine::{Input, Inputs, Output, Plan, merge};
//! use blr_merge::{Method, Result};
//!
//! struct Slices<'a>(&'a [&'a [f32]]);
//! impl Inputs<f32> for Slices<'_> {
//!     fn read(&mut self, input: Input, at: usize, x: &mut [f32]) -> Result<()> {
//!         let Input::Model(k) = input else { unreachable!("an average needs neither base nor curvature") };
//!         x.copy_from_slice(&self.0[k][at..at + x.len()]);
//!         Ok(())
//!     }
//! }
//! struct Collect(Vec<f32>);
//! impl Output<f32> for Collect {
//!     fn values(&mut self, _at: usize, x: &[f32]) -> Result<()> {
//!         self.0.extend_from_slice(x);
//!         Ok(())
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! let plan = Plan { method: Method::linear(), models: vec![("a", 1.0), ("b", 3.0)], posteriors: false };
//! plan.method.validate(&plan.models)?;
//! let mut merged = Collect(Vec::new());
//! merge(&plan, "w", 2, &mut Slices(&[&[1.0, 2.0], &[5.0, 2.0]]), &mut merged)?;
//! assert_eq!(merged.0, [4.0, 2.0]);
//! # Ok(())
//! # }
//! ```

mod angles;
mod job;
mod linear;
mod natural;
mod rank;
mod sce;
mod select;
mod task_vectors;

pub use crate::number::{Number, part_of};
pub(crate) use natural::smallest_ratio;

use crate::{Error, Method};
use job::Job;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// One of the tensors that a merged tensor is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// θ₀
    Base,
    /// H₀
    BaseCurvature,
    /// θ_k of the model of this index.
    Model(usize),
    /// H_k of the model of this index, or s_k if the models are posteriors.
    Curvature(usize),
}

/// Where the inputs of one merged tensor come from. `E` is the error that reading may end with.
pub trait Inputs<T, E = Error> {
    /// Fills `x` with the elements `at`, `at + 1`, … of an input. Only inputs that the method needs are asked for.
    ///
    /// # Errors
    /// Whatever keeps the elements from being read; it ends the merge.
    fn read(&mut self, input: Input, at: usize, x: &mut [T]) -> Result<(), E>;
}

/// Where one merged tensor goes.
pub trait Output<T, E = Error> {
    /// Takes the elements `at`, `at + 1`, … of the merged tensor, in order and without gaps.
    ///
    /// # Errors
    /// Whatever keeps the elements from being written; it ends the merge.
    fn values(&mut self, at: usize, x: &[T]) -> Result<(), E>;

    /// Takes the elements `at`, `at + 1`, … of its precision, after the values of the same place. Called by the methods
    /// with curvature; by default the precision is dropped.
    ///
    /// # Errors
    /// As [`Output::values`].
    fn precision(&mut self, _at: usize, _s: &[T]) -> Result<(), E> {
        Ok(())
    }
}

/// A method with the models that it merges.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan<'a> {
    /// What is computed.
    pub method: Method,
    /// Name and weight w_k of each model.
    pub models: Vec<(&'a str, f64)>,
    /// Whether curvatures are precisions of posteriors, s_k = H₀ + H_k, rather than H_k.
    pub posteriors: bool,
}

impl Plan<'_> {
    /// The average of the same models by those of their weights that are positive, or of all alike if none is: what
    /// becomes of statistics. Slerp has the weights 1-t and t.
    #[must_use]
    pub fn average(&self) -> Self {
        let weights: Vec<f64> = match self.method {
            Method::Slerp { t } => vec![1.0 - t, t],
            _ => self.models.iter().map(|(_, w)| *w).collect(),
        };
        let any = weights.iter().any(|w| *w > 0.0);
        let weights = weights.iter().map(|w| if any { w.max(0.0) } else { 1.0 });
        let models = self.models.iter().zip(weights).map(|((name, _), w)| (*name, w)).collect();
        Plan { method: Method::linear(), models, posteriors: false }
    }
}

/// Merges one tensor of `len` elements. The `name` appears in errors and decides, with the names of the models, what
/// DARE keeps.
///
/// The plan must have passed [`Method::validate`].
///
/// # Errors
/// Those of the inputs and the output; [`Error::Parameter`] for numbers that are not finite, curvature < 0, a merged
/// precision that is not positive, and merged numbers that overflow.
pub fn merge<T: Number, E: From<Error>>(
    plan: &Plan,
    name: &str,
    len: usize,
    inputs: &mut dyn Inputs<T, E>,
    output: &mut dyn Output<T, E>,
) -> Result<(), E> {
    let mut job = Job { plan, name, len, inputs, output };
    match plan.method {
        Method::Linear { normalize } => {
            let sum = if normalize { plan.models.iter().map(|(_, w)| w).sum() } else { 1.0 };
            job.linear(&plan.models.iter().map(|(_, w)| w / sum).collect::<Vec<_>>())
        }
        Method::Slerp { t } => {
            let weights = job.arc(t)?;
            job.linear(&weights)
        }
        Method::Karcher => job.karcher(),
        Method::TaskVectors(v) => job.task_vectors(&v),
        Method::ModelStock => job.model_stock(),
        Method::Sce { density } => job.sce(density),
        Method::Fisher | Method::GradientMatching { .. } | Method::Combine => job.natural(),
    }
}

/// Checks that two models, each a name with the shapes of its tensors, have tensors of the same names and shapes.
///
/// # Errors
/// [`Error::Parameter`] with the first tensor that only one of them has, or that has another shape.
pub fn same_tensors<D: PartialEq + Debug>(
    first: (&str, &BTreeMap<&str, D>),
    other: (&str, &BTreeMap<&str, D>),
) -> Result<(), Error> {
    let missing = |(a, shapes): (&str, &BTreeMap<&str, D>), (b, others): (&str, &BTreeMap<&str, D>)| {
        shapes.keys().find(|name| !others.contains_key(*name)).map_or(Ok(()), |name| {
            let problem = format!(
                "model `{a}` has it and model `{b}` does not; only models of one architecture can be merged. If it is \
                 another one's head, leave it out (exclude); if it is tied to another tensor there, say to which (tied)"
            );
            Err(Error::parameter(name, problem))
        })
    };
    missing(first, other)?;
    missing(other, first)?;
    for (name, shape) in first.1 {
        let theirs = &other.1[name];
        if shape != theirs {
            let problem =
                format!("its shape is {shape:?} in model `{}` and {theirs:?} in model `{}`", first.0, other.0);
            return Err(Error::parameter(name, problem));
        }
    }
    Ok(())
}
