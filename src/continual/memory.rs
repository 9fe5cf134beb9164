//! Examples that are kept: inputs, targets, weights, and which outputs are theirs.
//!
//! What is made of them is in `functions.rs`, `labels.rs` and `fromp.rs`; how they are chosen is in
//! [`crate::selection`].

use super::past::Forward;
use crate::likelihood::{Likelihood, Outputs, no_targets, rows};
use crate::{Error, Result, kernel};
use tch::{Kind, Tensor};

/// Examples of the past: inputs, what is known of their labels, and which outputs of the model are theirs.
#[derive(Debug)]
pub struct Memory {
    inputs: Tensor,
    likelihood: Likelihood,
    targets: Option<Tensor>,
    weights: Option<Tensor>,
    active: Option<Vec<i64>>,
}

impl Memory {
    /// Inputs, example by example in the first dimension, whose targets are not kept. The handle is shared, not copied.
    pub fn new(inputs: &Tensor, likelihood: Likelihood) -> Self {
        Memory { inputs: inputs.detach(), likelihood, targets: None, weights: None, active: None }
    }

    /// With targets: classes `[M]` of kind i64 (a categorical likelihood), or values in the shape of the outputs.
    #[must_use]
    pub fn targets(mut self, targets: &Tensor) -> Self {
        self.targets = Some(targets.detach());
        self
    }

    /// With a weight `[M]` for each example, the number of past examples that it stands for; default 1.
    #[must_use]
    pub fn weights(mut self, weights: &Tensor) -> Self {
        self.weights = Some(weights.detach());
        self
    }

    /// With the outputs that are this task's (a head, or the classes seen): the softmax is over these, and classes are
    /// given as labels of the whole model. Default: all.
    #[must_use]
    pub fn active(mut self, outputs: &[i64]) -> Self {
        self.active = Some(outputs.to_vec());
        self
    }

    /// Another handle to the same examples.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        let share = |t: &Option<Tensor>| t.as_ref().map(Tensor::shallow_clone);
        Memory {
            inputs: self.inputs.shallow_clone(),
            likelihood: self.likelihood,
            targets: share(&self.targets),
            weights: share(&self.weights),
            active: self.active.clone(),
        }
    }

    /// M
    pub fn len(&self) -> usize {
        self.inputs.size().first().map_or(0, |n| *n as usize)
    }

    /// Whether there are no examples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(crate) fn likelihood(&self) -> Likelihood {
        self.likelihood
    }

    /// The inputs, `[M, ..]`.
    pub fn inputs(&self) -> &Tensor {
        &self.inputs
    }

    /// The examples at these positions, in their order.
    ///
    /// # Errors
    /// A position outside.
    pub fn select(&self, positions: &[i64]) -> Result<Self> {
        let m = self.len() as i64;
        if let Some(bad) = positions.iter().find(|i| !(0..m).contains(*i)) {
            return Err(problem(format!("position {bad} of {m} examples: expected 0 to {}", m - 1)));
        }
        let at = Tensor::from_slice(positions).to_device(self.inputs.device());
        // libtorch wants the positions on the device of the tensor, and targets may be on another one than inputs.
        let pick = |t: &Tensor| t.f_index_select(0, &at.to_device(t.device()));
        Ok(Memory {
            inputs: pick(&self.inputs)?,
            likelihood: self.likelihood,
            targets: self.targets.as_ref().map(pick).transpose()?,
            weights: self.weights.as_ref().map(pick).transpose()?,
            active: self.active.clone(),
        })
    }

    pub(crate) fn active_outputs(&self) -> Option<&[i64]> {
        self.active.as_deref()
    }

    /// Errors if there are no examples.
    pub(crate) fn check_some(&self) -> Result<()> {
        if self.is_empty() {
            return Err(problem("it is empty: leave it out of the sum, or select at least one example"));
        }
        Ok(())
    }

    /// Errors unless there is an output for each example.
    pub(crate) fn check_rows(&self, outputs: &Outputs) -> Result<()> {
        let (rows, m) = (outputs.examples(), self.len());
        if rows == m as i64 {
            return Ok(());
        }
        Err(problem(format!("the outputs on {m} examples have {rows} rows: expected a row for each")))
    }

    /// The model's outputs on the memory, of this task.
    pub(crate) fn outputs(&self, forward: Forward) -> Result<Outputs> {
        self.check_some()?;
        let outputs = Outputs::new(self.likelihood, &forward(&self.inputs)?, self.active.as_deref())?;
        self.check_rows(&outputs)?;
        Ok(outputs)
    }

    /// The same in a constructor, which looks at what training would run into: weights in their shape, outputs that are
    /// finite.
    pub(crate) fn checked_outputs(&self, forward: Forward) -> Result<Outputs> {
        let outputs = self.outputs(forward)?;
        outputs.check_finite()?;
        self.check_weights()?;
        Ok(outputs)
    }

    /// The targets in the form of predictions.
    pub(crate) fn hard(&self, outputs: &Outputs) -> Result<Tensor> {
        outputs.targets(self.targets.as_ref())
    }

    /// Errors if there are no targets.
    pub(super) fn check_targets(&self) -> Result<()> {
        self.targets.as_ref().map_or_else(|| Err(no_targets()), |_| Ok(()))
    }

    /// Σ wᵢ over the rows xᵢ, `[M]` or `[M, C]`.
    pub(super) fn weighted_sum(&self, each: &Tensor) -> Result<Tensor> {
        let each = rows(each)?;
        // Weights are usually made on the CPU in f64; the sum has the kind and device of the loss.
        let Some(weights) = &self.weights else { return Ok(each.f_sum(None::<Kind>)?) };
        Ok((&each * weights.to_kind(each.kind()).to_device(each.device())).f_sum(None::<Kind>)?)
    }

    /// wᵢ `[M]` in f64.
    pub(crate) fn weights_or_one(&self) -> Result<Tensor> {
        self.check_weights()?;
        match &self.weights {
            Some(weights) => Ok(weights.f_to_kind(Kind::Double)?),
            None => Ok(Tensor::f_ones([self.len() as i64], (Kind::Double, self.inputs.device()))?),
        }
    }

    pub(super) fn check_weights(&self) -> Result<()> {
        let Some(weights) = &self.weights else { return Ok(()) };
        if weights.size() != [self.len() as i64] {
            return Err(problem(format!("its weights are {:?}: expected [{}]", weights.size(), self.len())));
        }
        match kernel::first_non_finite(weights) {
            Some(value) => Err(problem(format!("its weights are not finite ({value})"))),
            None => Ok(()),
        }
    }
}

pub(super) fn problem(problem: impl Into<String>) -> Error {
    Error::Memory(problem.into())
}
