//! Steps in which some weights are not there. Which ones, and how they are held at zero, is in [`crate::pruning`].

use super::Optimizer;
use super::row::Row;
use crate::Result;
use crate::gradient::IntoTensor;
use tch::Tensor;

/// Ends the pruning of an optimizer, also while a panic of the closure unwinds.
struct Pruned<'a, R: Row>(&'a mut Optimizer<R>);

impl<R: Row> Drop for Pruned<'_, R> {
    fn drop(&mut self) {
        self.0.pruned.clear();
    }
}

impl<R: Row> Optimizer<R> {
    /// [`Optimizer::step`] with gradients of zero where `pruned`, a mask per parameter, is true: before they are
    /// measured or clipped, so that the others see no trace of these.
    pub(crate) fn step_without<L: IntoTensor>(
        &mut self,
        pruned: Vec<Option<Tensor>>,
        closure: impl FnMut() -> L,
    ) -> Result<f64> {
        self.pruned = pruned;
        let guard = Pruned(self);
        guard.0.step(closure)
    }

    /// A parameter's gradient without that of pruned weights.
    pub(super) fn of_the_rest(&self, parameter: usize, gradient: Tensor) -> Tensor {
        match self.pruned.get(parameter) {
            Some(Some(mask)) => gradient.masked_fill(mask, 0.0),
            _ => gradient,
        }
    }
}
