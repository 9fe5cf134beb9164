//! Weights that are perturbed for a while.

use tch::Tensor;

/// Holds variables at perturbed values; dropping it brings the original storage back, bit by bit, also while a panic
/// unwinds.
///
/// The variables' memory is exchanged, not written to, so evaluate and differentiate while the guard lives: a graph
/// recorded at the perturbed values must not be differentiated afterwards.
#[derive(Debug)]
#[must_use = "the weights go back to their mean as soon as this is dropped"]
pub struct Perturbed {
    /// Variable and its own storage.
    originals: Vec<(Tensor, Tensor)>,
}

impl Perturbed {
    /// Gives each variable the storage of its new value.
    pub(crate) fn enter(changes: impl IntoIterator<Item = (Tensor, Tensor)>) -> crate::Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let mut guard = Perturbed { originals: Vec::new() };
        for (mut variable, value) in changes {
            let original = variable.detach();
            variable.f_set_data(&value)?;
            guard.originals.push((variable, original));
        }
        Ok(guard)
    }
}

impl Drop for Perturbed {
    fn drop(&mut self) {
        let _no_grad = tch::no_grad_guard();
        for (variable, original) in &mut self.originals {
            // Shape, kind and device are the variable's own, so there is nothing for libtorch to refuse; and a panic
            // here, during another one, would end the process.
            _ = variable.f_set_data(original);
        }
    }
}
