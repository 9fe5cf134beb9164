//! Weights that are perturbed for a while: the only place where a variable's memory is exchanged. What the perturbed
//! values are belongs to the driver and the posteriors.

use crate::kernel;
use std::borrow::Borrow;
use tch::Tensor;

/// Holds variables at perturbed values; dropping it brings the original values back, bit by bit, also while a panic
/// unwinds. Guards over the same variables may be dropped latest first or oldest first (`guard = q.perturb(..)?` does
/// the latter): the variables are at the values of the latest one that lives.
///
/// The variables' memory is exchanged, not written to, so evaluate and differentiate while the guard lives: libtorch
/// refuses to differentiate a graph that was recorded before the exchange, or before the way back.
#[derive(Debug, Default)]
#[must_use = "the weights go back to their mean as soon as this is dropped"]
pub struct Perturbed {
    exchanged: Vec<Exchanged>,
}

#[derive(Debug)]
struct Exchanged {
    variable: Tensor,
    /// Its own storage.
    original: Tensor,
    /// The storage that it was given.
    value: Tensor,
}

impl Perturbed {
    /// Gives each variable the storage of its new value.
    pub(crate) fn enter(changes: impl IntoIterator<Item = (impl Borrow<Tensor>, Tensor)>) -> crate::Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let mut guard = Perturbed::default();
        for (variable, value) in changes {
            // `detach` is a second tensor on the same storage. It keeps the original memory when `set_data` gives the
            // variable another.
            let (mut variable, original) = (variable.borrow().shallow_clone(), variable.borrow().detach());
            variable.f_set_data(&value)?;
            kernel::note_write(&variable);
            // One at a time: if a later exchange fails, dropping the guard takes back those before it.
            guard.exchanged.push(Exchanged { variable, original, value });
        }
        Ok(guard)
    }
}

impl Drop for Perturbed {
    fn drop(&mut self) {
        let _no_grad = tch::no_grad_guard();
        for Exchanged { variable, original, value } in &mut self.exchanged {
            let place = |t: &Tensor| (t.kind(), t.device());
            // Shape, kind and device are the variable's own, so there is nothing for libtorch to refuse; and a panic
            // here, during another one, would end the process.
            if variable.data_ptr() != value.data_ptr() && place(variable) == place(value) {
                // A later guard holds the variable, and `value` is the storage that it will bring back.
                _ = value.f_copy_(original);
            } else {
                // Exchanged back and not copied, which would cost a pass over the weights.
                _ = variable.f_set_data(original);
                kernel::note_write(variable);
            }
        }
    }
}
