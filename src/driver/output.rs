//! Steps that bring something out of the closure beside the loss: logits for the accuracy, the terms of a sum of losses.

use super::row::Row;
use super::{Optimizer, Train};
use crate::gradient::WithOutput;
use crate::{Error, Result};
use tch::Tensor;

impl<R: Row> Optimizer<R> {
    /// As [`Optimizer::step`], with a closure that returns `(loss, output)`: the mean loss, and the output of the last
    /// evaluation.
    ///
    /// The output may be anything: logits, a tuple of losses, a number. In a row that evaluates the loss several times
    /// it is that of the last sample, and in an adversarial row that of the second point, as the loss is; a closure
    /// that pushes to a `Vec` outside has them all. A tensor keeps its graph, and the memory of that, until it is
    /// dropped or detached.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::Ivon;
    /// # fn main() -> tch_blr::Result<()> {
    /// # let x = Tensor::randn([8, 4], (Kind::Float, Device::Cpu));
    /// # let y = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// # let mut opt = Ivon::default().ess(1000.0).build(&vs, 0.1)?;
    /// let (loss, logits) = opt.step_with_output(|| {
    ///     let logits = net.forward(&x);
    ///     (logits.cross_entropy_for_logits(&y), logits.detach())
    /// })?;
    /// println!("{loss:.3}, accuracy {:?}", logits.accuracy_for_logits(&y));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn step_with_output<O: WithOutput>(&mut self, closure: impl FnMut() -> O) -> Result<(f64, O::Output)> {
        with_output(closure, |loss| self.step(loss))
    }
}

impl dyn Train + '_ {
    /// As [`Optimizer::step_with_output`].
    ///
    /// # Errors
    /// As [`Optimizer::step`].
    pub fn step_with_output<O: WithOutput>(&mut self, closure: impl FnMut() -> O) -> Result<(f64, O::Output)> {
        with_output(closure, |loss| self.step(loss))
    }
}

/// Calls `step` with a closure of the loss alone, and keeps what the last call gave beside it.
fn with_output<O: WithOutput>(
    mut closure: impl FnMut() -> O,
    step: impl FnOnce(&mut dyn FnMut() -> Result<Tensor>) -> Result<f64>,
) -> Result<(f64, O::Output)> {
    let mut output = None;
    let loss = step(&mut || {
        // The one before goes first: a graph that it holds need not live beside the next.
        output = None;
        let (loss, beside) = closure().into_parts()?;
        output = Some(beside);
        Ok(loss)
    })?;
    // Every row evaluates the loss at least once, but a panic would be no way to say that one does not.
    let output = output.ok_or_else(|| Error::Loss("the row did not evaluate it".to_owned()))?;
    Ok((loss, output))
}
