//! What a closure may return, and what the driver makes of it: the checks of a loss that can be made before it is
//! differentiated.

use crate::{Error, Result};
use tch::{Kind, Tensor};

/// What a closure may return: a [`Tensor`], or a `Result<Tensor, E>` whose error ends the call.
#[diagnostic::on_unimplemented(
    message = "the closure must return a tensor, and not `{Self}`",
    note = "a `Tensor`, or a `Result<Tensor, E>` if it may fail; to have more than the loss out of a step, return \
            `(loss, output)` from the closure of `step_with_output`"
)]
pub trait IntoTensor {
    /// The tensor, or the closure's own error as [`Error::Closure`].
    ///
    /// # Errors
    /// [`Error::Closure`]
    fn into_tensor(self) -> Result<Tensor>;
}

impl IntoTensor for Tensor {
    fn into_tensor(self) -> Result<Tensor> {
        Ok(self)
    }
}

impl<E: Into<Box<dyn std::error::Error + Send + Sync>>> IntoTensor for std::result::Result<Tensor, E> {
    fn into_tensor(self) -> Result<Tensor> {
        self.map_err(|e| of_closure(e.into()))
    }
}

/// An error that a closure returned, which may itself have been handed one by another closure.
fn of_closure(e: Box<dyn std::error::Error + Send + Sync>) -> Error {
    match e.downcast::<Error>().map(|ours| *ours) {
        // Once is enough: "the closure failed: the closure failed: .." says no more.
        Ok(closure @ Error::Closure(_)) => closure,
        Ok(other) => Error::Closure(Box::new(other)),
        Err(e) => Error::Closure(e),
    }
}

/// What the closure of [`Optimizer::step_with_output`](crate::Optimizer::step_with_output) may return: `(loss, output)`,
/// or a `Result` of it. The loss is what a step's closure returns, the output anything at all.
#[diagnostic::on_unimplemented(
    message = "the closure must return `(loss, output)`, and not `{Self}`",
    note = "`(Tensor, T)`, or a `Result<(Tensor, T), E>` if it may fail; with nothing beside the loss, call `step`"
)]
pub trait WithOutput {
    /// What comes beside the loss.
    type Output;

    /// Loss and output, or the closure's own error as [`Error::Closure`].
    ///
    /// # Errors
    /// [`Error::Closure`]
    fn into_parts(self) -> Result<(Tensor, Self::Output)>;
}

impl<L: IntoTensor, T> WithOutput for (L, T) {
    type Output = T;

    fn into_parts(self) -> Result<(Tensor, T)> {
        Ok((self.0.into_tensor()?, self.1))
    }
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> WithOutput for std::result::Result<(Tensor, T), E> {
    type Output = T;

    fn into_parts(self) -> Result<(Tensor, T)> {
        self.map_err(|e| of_closure(e.into()))
    }
}

/// The mean loss of a batch, and the losses it is the mean of if the closure returned them.
#[derive(Debug)]
pub(crate) struct Loss {
    /// 0-dim, with a graph.
    pub mean: Tensor,
    /// `[B]`
    pub per_example: Option<Tensor>,
    pub value: f64,
}

impl Loss {
    /// Accepts a finite mean loss, which is 0-dim or has one element in two or more dimensions, as a mean that keeps
    /// them gives it; or a 1-D tensor of B per-example losses.
    pub(crate) fn new(loss: Tensor, step: u64) -> Result<Self> {
        if !loss.defined() {
            return Err(Error::Loss("the tensor is undefined".to_owned()));
        }
        // Before the graph: integers never have one, and the message should name the cause.
        if !matches!(loss.kind(), Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half) {
            return Err(Error::Loss(format!("its kind is {:?}: expected a floating-point loss", loss.kind())));
        }
        let size = loss.size();
        if size == [0] || size.len() > 1 && loss.numel() != 1 {
            return Err(Error::Loss(format!(
                "its shape is {size:?}: expected a 0-dim mean loss or a 1-D tensor of at least one per-example loss"
            )));
        }
        if !loss.requires_grad() {
            return Err(Error::Loss(
                "it has no graph, so it has no gradient; compute it from the variables with gradients enabled (not \
                 inside no_grad, not detached)"
                    .to_owned(),
            ));
        }
        let (mean, per_example) = match size.len() {
            0 => (loss, None),
            // One example; where that is told from a mean, see `examples`.
            1 => (loss.f_mean(None)?, Some(loss)),
            _ => (loss.f_reshape([0i64; 0])?, None),
        };
        let value = mean.double_value(&[]);
        // Before the backward pass, which would spread a NaN over every gradient and hide where it came from.
        if !value.is_finite() {
            return Err(Error::NonFiniteLoss { value, step });
        }
        Ok(Loss { mean, per_example, value })
    }
}

/// How many examples the mean is over: as many as there are losses, if the closure returned them, or rows in the layers.
///
/// # Errors
/// One loss, of shape `[1]`, for several rows: it may be a mean of that shape, or the loss of one example of several
/// positions, and the squares of the two are far apart.
pub(crate) fn examples(losses: Option<&Tensor>, rows: i64) -> Result<i64> {
    let examples = losses.map_or(rows, |losses| losses.size()[0]);
    if examples == 1 && rows > 1 {
        return Err(Error::Loss(format!(
            "its shape is [1], which is the loss of one example, and the layers of `tch_blr::nn` saw {rows} rows: if it \
             is the mean of {rows} examples, return it 0-dim (loss.squeeze()); if it is one example of {rows} positions, \
             keep the batch as the leading dimension in every layer: [1, {rows}, ..]"
        )));
    }
    Ok(examples)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    #[test]
    fn takes_a_mean_or_per_example_losses_and_nothing_else() {
        let w = Tensor::from_slice(&[1.0, 2.0, 6.0]).set_requires_grad(true);
        let per_example = Loss::new(w.shallow_clone(), 0).unwrap();
        assert_eq!((per_example.value, per_example.per_example.unwrap().size()[0]), (3.0, 3));
        let mean = Loss::new(w.sum(Kind::Double), 0).unwrap();
        assert!(mean.value == 9.0 && mean.per_example.is_none());

        let refused = |t: Tensor| Loss::new(t, 7).unwrap_err().to_string();
        assert!(refused(Tensor::new()).contains("undefined"));
        assert!(refused(w.reshape([1, 3])).contains("[1, 3]"));
        // What a mean that keeps its dimensions leaves.
        for shape in [&[1i64, 1][..], &[1, 1, 1]] {
            let mean = Loss::new(w.mean(Kind::Double).reshape(shape), 0).unwrap();
            assert!(mean.value == 3.0 && mean.per_example.is_none() && mean.mean.dim() == 0);
        }
        assert_eq!(examples(None, 32).unwrap(), 32);
        assert_eq!(examples(Some(&w), 32).unwrap(), 3);
        let one = w.narrow(0, 0, 1);
        assert_eq!((examples(Some(&one), 1).unwrap(), examples(Some(&one), 0).unwrap()), (1, 1));
        let e = examples(Some(&one), 32).unwrap_err().to_string();
        assert!(e.contains("[1]") && e.contains("32 rows") && e.contains("squeeze"), "{e}");
        assert!(refused(w.narrow(0, 0, 0)).contains("[0]"));
        assert!(refused(w.detach().sum(Kind::Double)).contains("no graph"));
        assert!(refused(Tensor::zeros([], (Kind::Int64, Device::Cpu))).contains("Int64"));
        let nan = refused((&w - &w).sum(Kind::Double).log() * 0.0);
        assert!(nan.contains("NaN") && nan.contains("step 7"), "{nan}");
    }
}
