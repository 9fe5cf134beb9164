//! Watches over what a model keeps beside its parameters: it must not move while the model's curvature is computed, or
//! while it predicts.

use super::Params;
use crate::{Error, Result};
use tch::Tensor;

/// The tensors of a store that are not trained, with copies of what they held.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Vec<(String, Tensor, Tensor)>);

impl Buffers {
    pub(crate) fn new(params: &Params) -> Self {
        let _no_grad = tch::no_grad_guard();
        Buffers(
            params
                .buffers()
                .into_iter()
                .map(|(name, t)| {
                    // A copy, because batch normalization updates its statistics in place.
                    let before = t.detach().copy();
                    (name, t, before)
                })
                .collect(),
        )
    }

    /// Gives those that have moved their values back, and names the first of them.
    pub(crate) fn restored(self) -> Option<String> {
        let _no_grad = tch::no_grad_guard();
        // Tolerances of zero, but a NaN equals itself: it has not changed.
        let same = |a: &Tensor, b: &Tensor| a.size() == b.size() && a.allclose(b, 0.0, 0.0, true);
        let changed = self.0.iter().position(|(_, now, before)| !same(now, before))?;
        for (_, now, before) in &self.0 {
            // All of them, not only the first that changed: an error leaves the model as it was.
            now.shallow_clone().copy_(before);
        }
        Some(self.0[changed].0.clone())
    }

    /// Runs what only looks at a model. Buffers that it moves get their values back, also if it fails, and are an
    /// error.
    pub(crate) fn unmoved<T>(params: &Params, look: impl FnOnce() -> Result<T>) -> Result<T> {
        let buffers = Buffers::new(params);
        let seen = look();
        let Some(name) = buffers.restored() else { return seen };
        Err(Error::parameter(
            &name,
            "the closure changed this buffer, as batch normalization in training mode does; what only looks at a model \
             must leave it as it is: run it with train = false",
        ))
    }

    /// Batch normalization in training mode moves its statistics; per-example gradients do not exist then, because each
    /// example's loss depends on the whole batch. The buffers get their values back before the error.
    pub(crate) fn unchanged(self) -> Result<()> {
        let Some(name) = self.restored() else { return Ok(()) };
        Err(Error::PerExample(format!(
            "the closure changed the buffer `{name}`, as batch normalization in training mode does; each example's \
             loss then depends on the whole batch, so per-example gradients do not exist. Use group or layer \
             normalization (tch_blr::nn), run batch normalization with train = false, or choose Ivon, which needs no \
             per-example gradients"
        )))
    }
}
