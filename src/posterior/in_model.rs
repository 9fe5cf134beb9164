//! Values of a posterior's parameters in the variables of a model: paired by name, exchanged for a while or written
//! for good.

use super::Posterior;
use crate::params::Perturbed;
use crate::{Error, Params, Result};
use tch::Tensor;

/// Pairs each value with the model's variable of that name, in the variable's kind and on its device.
///
/// # Errors
/// A name that the model does not have, or has in another shape.
pub(crate) fn in_model(
    params: &Params,
    values: impl IntoIterator<Item = (String, Tensor)>,
) -> Result<Vec<(Tensor, Tensor)>> {
    let _no_grad = tch::no_grad_guard();
    let paired = values.into_iter().map(|(name, value)| {
        let variable = &params.find(&name).ok_or_else(|| {
            Error::parameter(&name, "the posterior has it and the model does not; leave it out with select(..)")
        })?;
        let variable = variable.tensor.shallow_clone();
        if variable.size() != value.size() {
            let (q, model) = (value.size(), variable.size());
            return Err(Error::parameter(&name, format!("the posterior has shape {q:?} and the model {model:?}")));
        }
        let value = value.to_kind(variable.kind()).to_device(variable.device());
        Ok((variable, value))
    });
    paired.collect()
}

/// Puts the values into the variables until the guard is dropped, and the originals into the values' memory, so the
/// values must be tensors that nobody else holds.
pub(super) fn enter(params: &Params, values: Vec<(String, Tensor)>) -> Result<Perturbed> {
    Perturbed::enter(in_model(params, values)?)
}

/// Writes the values into the variables, for good.
pub(super) fn write(params: &Params, values: Vec<(String, Tensor)>) -> Result<()> {
    let _claim = params.claim()?;
    // All pairs before the first write: a name that does not fit leaves every variable as it was.
    let changes = in_model(params, values)?;
    let _no_grad = tch::no_grad_guard();
    // Copied in place, which moves the version counter on: libtorch then refuses to differentiate graphs of the old
    // weights.
    changes.into_iter().try_for_each(|(mut variable, value)| Ok(variable.f_copy_(&value)?))
}

/// The mean of every parameter, in order.
pub(super) fn means(q: &dyn Posterior) -> Vec<(String, Tensor)> {
    q.names().filter_map(|name| Some((name.to_owned(), q.mean(name)?))).collect()
}
