//! The sum of all that stands for past data: the trait of its parts, and the objective beside a new task. The parts
//! have files of their own.

use crate::{Error, IntoTensor, Params, Result, check};
use tch::{Device, Kind, Tensor};

/// From inputs to outputs f (logits, not probabilities), with a graph.
pub(crate) type Forward<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;

/// A model as a [`Regularizer`] sees it.
#[derive(Clone, Copy)]
pub struct Model<'a> {
    /// The weights θ.
    pub params: &'a Params,
    /// From inputs to outputs f (logits, not probabilities), with a graph.
    pub forward: &'a dyn Fn(&Tensor) -> Result<Tensor>,
}

impl std::fmt::Debug for Model<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("params", self.params).finish_non_exhaustive()
    }
}

/// A function K(θ) that stands for the loss of past data, up to a constant.
pub trait Regularizer: std::fmt::Debug {
    /// K(θ), 0-dim with its graph, on the scale of the loss summed over examples.
    ///
    /// # Errors
    /// If the model is not the one that this was made for.
    fn value(&self, model: &Model) -> Result<Tensor>;
}

/// A sum of [`Regularizer`]s; zero without any, so that the first task needs no separate loop.
#[derive(Debug, Default)]
pub struct Past {
    parts: Vec<Box<dyn Regularizer>>,
}

impl Past {
    /// Nothing yet.
    pub fn new() -> Self {
        Past::default()
    }

    /// Plus one part.
    #[must_use]
    pub fn with(mut self, part: impl Regularizer + 'static) -> Self {
        self.parts.push(Box::new(part));
        self
    }

    /// K(θ) = Σ over the parts, as [`Regularizer::value`], for parameters and a closure from inputs to outputs. It is a
    /// sum over examples; beside the mean loss of a new task take [`Past::beside`], which knows what to divide by.
    ///
    /// # Errors
    /// Those of the parts, and the closure's.
    pub fn value<L: IntoTensor>(&self, params: impl Into<Params>, forward: impl Fn(&Tensor) -> L) -> Result<Tensor> {
        Regularizer::value(self, &Model { params: &Params::separate(params)?, forward: &|x| forward(x).into_tensor() })
    }

    /// The objective of the new task: its mean loss beside the past, L + K(θ)/N.
    ///
    /// * `loss`: the mean loss of a mini-batch, or the losses `[B]` that it is the mean of.
    /// * `examples`: N > 0, the number of all examples of the new task, not of the mini-batch.
    /// * `params`, `forward`: the model in training, from inputs to outputs.
    ///
    /// # Errors
    /// An N that is not positive and finite; those of the parts, and the closures'.
    pub fn beside<L: IntoTensor>(
        &self,
        loss: impl IntoTensor,
        examples: f64,
        params: impl Into<Params>,
        forward: impl Fn(&Tensor) -> L,
    ) -> Result<Tensor> {
        check::positive("examples", examples)?;
        Ok(loss.into_tensor()?.f_add(&(self.value(params, forward)? / examples))?)
    }

    /// How far K is from the past it stands for: ‖∇K - ∇L‖ / ‖∇L‖ at the present weights, with ∇L the gradient of
    /// `truth`, the loss of the past data (summed, with its prior) while they are still there. 0 is exact; the constant
    /// part of the gradient counts too, so L should include all that K includes.
    ///
    /// # Errors
    /// As [`Regularizer::value`]; a loss without a graph, or whose gradient is zero.
    pub fn reconstruction_error<L: IntoTensor, T: IntoTensor>(
        &self,
        params: impl Into<Params>,
        forward: impl Fn(&Tensor) -> L,
        truth: impl FnOnce() -> T,
    ) -> Result<f64> {
        let params = Params::separate(params)?;
        let (ours, theirs) =
            // Also inside of a caller's `no_grad`, as diagnostics often are.
            tch::with_grad(|| Ok::<_, Error>((self.value(&params, forward)?, truth().into_tensor()?)))?;
        let (ours, theirs) = (gradient(&ours, &params)?, gradient(&theirs, &params)?);
        let norm = |t: &Tensor| t.square().sum(Kind::Double).double_value(&[]);
        let (mut apart, mut size) = (0.0, 0.0);
        for (ours, theirs) in ours.iter().zip(&theirs) {
            apart += norm(&(ours - theirs));
            size += norm(theirs);
        }
        if size == 0.0 {
            let problem = "the gradient of the past data's loss is zero: there is nothing to compare";
            return Err(Error::Loss(problem.to_owned()));
        }
        Ok((apart / size).sqrt())
    }
}

impl Regularizer for Past {
    fn value(&self, model: &Model) -> Result<Tensor> {
        Ok(sum(self.parts.iter().map(|part| part.value(model)))?.unwrap_or_else(nothing))
    }
}

/// The sum, which keeps the kind of a single term; `None` without any.
pub(super) fn sum(terms: impl IntoIterator<Item = Result<Tensor>>) -> Result<Option<Tensor>> {
    terms.into_iter().reduce(|a, b| Ok(a? + b?)).transpose()
}

/// A sum of no parts: a 0-dim number, which adapts to the device and kind of what it is added to.
pub(super) fn nothing() -> Tensor {
    Tensor::zeros([], (Kind::Float, Device::Cpu))
}

/// ∇ of a 0-dim loss by each trained parameter, in f64; zero where it does not depend on it.
pub(crate) fn gradient(loss: &Tensor, params: &Params) -> Result<Vec<Tensor>> {
    if !loss.size().is_empty() {
        return Err(Error::Loss(format!("its shape is {:?}: expected a 0-dim sum", loss.size())));
    }
    let trained: Vec<&Tensor> = params.leaves().iter().filter(|l| l.trainable()).map(|l| &l.tensor).collect();
    let zero = |t: &Tensor| Tensor::zeros(t.size(), (Kind::Double, t.device()));
    if !loss.requires_grad() || trained.is_empty() {
        return Ok(trained.into_iter().map(zero).collect());
    }
    // Never without inputs: libtorch would then accumulate into every leaf's `.grad`.
    let gradients = Tensor::f_run_backward(&[loss], &trained, false, false)?;
    let wide = |(g, t): (Tensor, &Tensor)| if g.defined() { g.to_kind(Kind::Double) } else { zero(t) };
    Ok(gradients.into_iter().zip(trained).map(wide).collect())
}
