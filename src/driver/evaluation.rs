//! Loops that cannot hand over a closure: an evaluation as a guard, which takes the loss when it is known.
//!
//! A closure's evaluations, and what becomes of a loss, are in `step.rs`.

use super::Optimizer;
use super::row::Row;
use super::step::{Begun, Outcome};
use crate::{Error, Result};

/// Weights at a point of the row's [`Expectation`](crate::Expectation), waiting for the loss there; dropped without
/// one, nothing has happened.
#[must_use = "the weights go back to their mean as soon as this is dropped"]
pub struct Evaluation<'a, R: Row> {
    optimizer: &'a mut Optimizer<R>,
    /// Until its loss has come.
    begun: Option<Begun>,
}

impl<R: Row> std::fmt::Debug for Evaluation<'_, R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Evaluation").field("steps", &self.optimizer.steps).finish_non_exhaustive()
    }
}

impl<'a, R: Row> Evaluation<'a, R> {
    pub(super) fn new(optimizer: &'a mut Optimizer<R>, begun: Begun) -> Self {
        Evaluation { optimizer, begun: Some(begun) }
    }

    pub(super) fn optimizer(&self) -> &Optimizer<R> {
        self.optimizer
    }

    /// For the rows that evaluate the loss at two points ([`Sam`](crate::Sam) and its relatives): differentiates the
    /// first loss, and moves the weights to the second point, where they wait for the loss on the same batch.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::Sam;
    /// # fn main() -> tch_blr::Result<()> {
    /// # let x = Tensor::randn([8, 4], (Kind::Float, Device::Cpu));
    /// # let y = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// # let mut opt = Sam::default().build(&vs, 0.1)?;
    /// let evaluation = opt.perturbed()?;
    /// let loss = net.forward(&x).cross_entropy_for_logits(&y);
    /// let evaluation = evaluation.ascend(loss)?;
    /// let loss = net.forward(&x).cross_entropy_for_logits(&y);
    /// evaluation.step(loss)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// If the weights are not at the first of two points, and as [`Evaluation::step`]. Nothing has changed then.
    pub fn ascend(mut self, outcome: impl Into<Outcome>) -> Result<Self> {
        let outcome = outcome.into();
        let begun = self.begun_at_first(true, &outcome)?;
        self.begun = Some((self.optimizer.compiled.ascend)(self.optimizer, begun, outcome)?);
        Ok(self)
    }

    /// Errors unless the weights are (or are not) at the first of two points.
    fn begun_at_first(&mut self, expected: bool, outcome: &Outcome) -> Result<Begun> {
        let Some(begun) = self.begun.take() else { return Err(Error::Loss("it has come already".to_owned())) };
        if matches!(outcome, Outcome::Loss(Err(_))) {
            // There is no loss to be at the wrong point.
            return Ok(begun);
        }
        let problem = match (begun.is_first(), expected) {
            (true, false) => {
                "this row evaluates the loss at two points, and the weights are at the first: hand its loss to \
                 Evaluation::ascend, and the one at the second point here"
            }
            (false, true) => {
                "the weights are not at the first of two points: hand the loss to Evaluation::step or backward"
            }
            _ => return Ok(begun),
        };
        // First of all the mean comes back.
        drop(begun);
        self.optimizer.told(Err(Error::Loss(problem.to_owned())))
    }

    /// Takes the loss that was computed at the perturbed weights, or [`Derivatives`](crate::Derivatives) that were
    /// computed elsewhere; those in `.grad` go to [`Evaluation::step_from_grad`]. Brings the mean back, updates the weights (with what
    /// was accumulated before), and returns the mean loss.
    ///
    /// # Errors
    /// If the weights are at the first of two points ([`Evaluation::ascend`]), another number of derivatives or other
    /// shapes, and as [`Optimizer::step`]. Nothing has changed then.
    pub fn step(mut self, outcome: impl Into<Outcome>) -> Result<f64> {
        let outcome = outcome.into();
        let begun = self.begun_at_first(false, &outcome)?;
        (self.optimizer.compiled.step)(self.optimizer, begun, outcome)
    }

    /// As [`Evaluation::step`], but only keeps the gradients for [`Optimizer::update`]: for rows of several samples,
    /// and for micro-batches. Returns this loss.
    ///
    /// # Errors
    /// As [`Evaluation::step`].
    pub fn backward(mut self, outcome: impl Into<Outcome>) -> Result<f64> {
        let outcome = outcome.into();
        let begun = self.begun_at_first(false, &outcome)?;
        (self.optimizer.compiled.backward)(self.optimizer, begun, outcome)
    }
}

impl<R: Row> Drop for Evaluation<'_, R> {
    fn drop(&mut self) {
        if self.begun.take().is_some() {
            // Other ranks wait for it.
            let dropped = Error::Loss("an evaluation was dropped without one".to_owned());
            _ = self.optimizer.told::<()>(Err(dropped));
        }
    }
}
