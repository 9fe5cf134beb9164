//! Gradients of a backward pass that the loop has made itself: from `.grad` to what an evaluation takes.

use super::arithmetic::Arithmetic;
use super::row::Row;
use super::rule::DeltaRule;
use super::step::{Outcome, dense};
use super::{Derivatives, Evaluation, Optimizer};
use crate::{Error, Result, check};
use tch::Tensor;

impl<R: Row> Optimizer<R> {
    /// Sets every parameter's `.grad` to zero, for loops that call `loss.backward()` themselves. The steps
    /// `.._from_grad` do so too, so it is only needed for gradients that are not to be used.
    pub fn zero_grad(&mut self) {
        self.params.leaves().iter().for_each(|leaf| leaf.tensor.shallow_clone().zero_grad());
    }

    /// Updates the weights from the parameters' `.grad`, computed at the current weights by the loop's own
    /// `loss.backward()`: [`Evaluation::step_from_grad`] for rows that evaluate the loss at the mean.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::Adam;
    /// # fn main() -> tch_blr::Result<()> {
    /// # let x = Tensor::randn([8, 4], (Kind::Float, Device::Cpu));
    /// # let y = Tensor::zeros([8], (Kind::Int64, Device::Cpu));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// # let mut opt = Adam::default().build(&vs, 0.1)?;
    /// let loss = net.forward(&x).cross_entropy_for_logits(&y);
    /// loss.backward();
    /// opt.step_from_grad(loss.double_value(&[]), 1.0)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Evaluation::step_from_grad`].
    pub fn step_from_grad(&mut self, loss: f64, scale: f64) -> Result<f64>
    where
        R: DeltaRule,
    {
        self.perturbed()?.step_from_grad(loss, scale)
    }

    /// Every trained parameter's `.grad` divided by `scale`, and those tensors themselves.
    fn gradients_left(&self, loss: f64, scale: f64) -> Result<(Derivatives, Grads)> {
        check::positive("scale", scale)?;
        let statistic = self.config.statistic();
        if statistic.is_tapped() || statistic.is_second_order() {
            return Err(Error::Loss(format!(
                "{} needs {statistic:?}, which a backward pass of your own does not leave in .grad; hand over the loss \
                 instead: evaluation.step(loss)",
                R::NAME
            )));
        }
        let _no_grad = tch::no_grad_guard();
        let (mut gradients, mut grads) = (Vec::new(), Vec::new());
        for leaf in self.params.leaves() {
            let grad = leaf.tensor.f_grad()?;
            gradients.push(if leaf.trainable() && grad.defined() {
                grads.push(grad.shallow_clone());
                // In the state's kind before the division, which would bring half precision back to where it
                // underflows. The quotient has memory of its own, also for a scale of 1: `.grad` goes on to change.
                Some(dense(grad, R::Arithmetic::kind(leaf)) / scale)
            } else {
                None
            });
        }
        if grads.is_empty() {
            let problem = "no parameter has a gradient in .grad; call loss.backward() before, with a loss that was \
                           computed from the variables";
            return Err(Error::Loss(problem.to_owned()));
        }
        Ok((Derivatives { loss, examples: None, gradients, squares: Vec::new() }, Grads(grads)))
    }
}

/// The `.grad` of parameters.
#[must_use]
pub(super) struct Grads(Vec<Tensor>);

impl Grads {
    /// They are spent: the next backward pass would add to them.
    pub(super) fn clear(self) {
        let _no_grad = tch::no_grad_guard();
        self.0.into_iter().for_each(|mut grad| _ = grad.zero_());
    }
}

impl<R: Row> Evaluation<'_, R> {
    /// As [`Evaluation::step`], with the gradients that the loop's own `backward()` has left in `.grad`, for loops that
    /// change them first: sum them over processes, or scale the loss.
    ///
    /// `loss` is the value of the mean loss, unscaled; `scale` > 0 is what it was multiplied by before the backward
    /// pass (1 if by nothing), and what the gradients are divided by, in the kind of the optimizer's state.
    ///
    /// Each `.grad` is zero afterwards, so that the next backward pass starts anew. A parameter without a `.grad` is
    /// not used by the loss and stays as it is. One that has had a gradient once has a `.grad` from then on, which tch
    /// cannot take away: a loss that does not depend on it is then one whose gradient is zero, and weight decay and
    /// momentum go on. Gradients must have been computed while this evaluation lives: an earlier backward pass was not
    /// at its weights.
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
    /// let scale = 1024.0;
    /// let evaluation = opt.perturbed()?;
    /// let loss = net.forward(&x).cross_entropy_for_logits(&y);
    /// (&loss * scale).backward();
    /// evaluation.step_from_grad(loss.double_value(&[]), scale)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// No `.grad` at all, a scale that is not finite and positive, a row that needs more than the gradient (per-example
    /// squares, Kronecker factors, second derivatives), and as [`Evaluation::step`]. Nothing has changed then, `.grad`
    /// included.
    pub fn step_from_grad(self, loss: f64, scale: f64) -> Result<f64> {
        match self.optimizer().gradients_left(loss, scale) {
            Ok((derivatives, grads)) => self.step(derivatives).inspect(|_| grads.clear()),
            // By the same way as a loss, so that other ranks hear of it.
            Err(e) => self.step(Outcome::Loss(Err(e))),
        }
    }

    /// As [`Evaluation::backward`], from `.grad` as [`Evaluation::step_from_grad`]: for rows of several samples.
    /// Micro-batches at one sample need no more than several backward passes, which add up in `.grad`, and their number
    /// in the scale.
    ///
    /// # Errors
    /// As [`Evaluation::step_from_grad`].
    pub fn backward_from_grad(self, loss: f64, scale: f64) -> Result<f64> {
        match self.optimizer().gradients_left(loss, scale) {
            Ok((derivatives, grads)) => self.backward(derivatives).inspect(|_| grads.clear()),
            // By the same way as a loss, so that other ranks hear of it.
            Err(e) => self.backward(Outcome::Loss(Err(e))),
        }
    }

    /// As [`Evaluation::ascend`], from `.grad` as [`Evaluation::step_from_grad`].
    ///
    /// # Errors
    /// As [`Evaluation::ascend`] and [`Evaluation::step_from_grad`].
    pub fn ascend_from_grad(self, loss: f64, scale: f64) -> Result<Self> {
        match self.optimizer().gradients_left(loss, scale) {
            Ok((derivatives, grads)) => self.ascend(derivatives).inspect(|_| grads.clear()),
            // By the same way as a loss, so that other ranks hear of it.
            Err(e) => self.ascend(Outcome::Loss(Err(e))),
        }
    }
}
