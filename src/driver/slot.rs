//! What an elementwise row keeps of one parameter, and where its mean and the point of an evaluation are.
//!
//! A point stands in the variable, whose views then see it, and the mean is kept beside; but for weights that are not
//! what is learned (half precision, binary ones), whose mean is apart for good.

use crate::Result;
use crate::params::{Leaf, Perturbed};
use tch::Tensor;

/// What is kept of one parameter.
#[derive(Debug)]
pub struct Slot {
    /// The mean in f32, for weights of less precision; the λ of binary weights.
    pub(super) mean: Option<Tensor>,
    /// One tensor per name in [`Row::STATE`] that the row keeps.
    pub(super) state: Vec<Option<Tensor>>,
    /// δ of a prior that consists of tensors.
    pub(super) delta: Option<Tensor>,
    /// Memory for evaluations away from the mean, kept for the next one: the mean, while the point stands in the
    /// variable; or the point, where the mean is kept apart.
    pub(super) beside: Option<Tensor>,
    /// Whether the next update is tried out whatever the gradient: its settings were never used, or the last one has left
    /// numbers so large that their squares may leave the range.
    pub(super) untried: bool,
    /// Of a frozen parameter that the prior does not know, and need not.
    pub(super) without_prior: bool,
}

impl Slot {
    /// The tensor that holds the mean.
    pub(super) fn mean<'a>(&'a self, leaf: &'a Leaf) -> &'a Tensor {
        self.mean.as_ref().unwrap_or(&leaf.tensor)
    }

    pub(super) fn make_beside(&mut self, leaf: &Leaf) {
        if leaf.trainable() && self.beside.is_none() {
            self.beside = Some(self.mean(leaf).detach().empty_like());
        }
    }

    /// Where mean and point of an evaluation are: the same for a variable that was at its mean.
    pub(super) fn mean_and_point<'a>(&'a self, leaf: &'a Leaf, at: &'a Perturbed) -> (&'a Tensor, &'a Tensor) {
        let original = at.original(&leaf.tensor);
        match &self.mean {
            Some(mean) => (mean, self.beside.as_ref().filter(|_| original.is_some()).unwrap_or(mean)),
            None => (original.unwrap_or(&leaf.tensor), &leaf.tensor),
        }
    }

    /// Where a pass puts a new point, and where it keeps the mean unless that is safe already.
    pub(super) fn point_and_mean<'a>(&'a self, leaf: &'a Leaf, at: &Perturbed) -> [Option<&'a Tensor>; 2] {
        match &self.mean {
            Some(_) => [self.beside.as_ref(), None],
            None => [Some(&leaf.tensor), self.beside.as_ref().filter(|_| at.original(&leaf.tensor).is_none())],
        }
    }

    /// Tells the guard of the variable that a pass has made a point for it.
    pub(super) fn moved(&self, leaf: &Leaf, at: &mut Perturbed) -> Result<()> {
        let Some(beside) = &self.beside else { return Ok(()) };
        if self.mean.is_some() {
            // A copy also where there is nothing to round: the variable's old values go where the new ones come from.
            let point = Tensor::f_empty_like(&leaf.tensor.detach())?;
            point.shallow_clone().f_copy_(beside)?;
            return at.put(&leaf.tensor, &point);
        }
        at.moved(&leaf.tensor, beside);
        Ok(())
    }
}
