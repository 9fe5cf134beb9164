//! What an elementwise row keeps of one parameter, and where its mean and the point of an evaluation are.
//!
//! A point stands in the variable, whose views then see it, and the mean is kept beside; but for weights that are not
//! what is learned (half precision, binary ones), whose mean is apart for good.

use crate::kernel::Also;
use crate::params::{Leaf, Perturbed};
use crate::{Link, Result};
use tch::Tensor;

/// A variable's memory, and libtorch's count of writes to it: the same as long as nobody has written, but through
/// `Tensor::data`, which libtorch does not count.
#[derive(Debug)]
pub(super) struct Seen {
    /// A handle, so that no other memory gets the same address meanwhile.
    memory: Tensor,
    version: i64,
}

impl Seen {
    /// `None` if libtorch does not count.
    pub(super) fn of(t: &Tensor) -> Option<Self> {
        Some(Seen { version: t.f_internal_version().ok()?, memory: t.detach() })
    }

    pub(super) fn is_still(&self, t: &Tensor) -> bool {
        self.memory.data_ptr() == t.data_ptr() && t.f_internal_version().is_ok_and(|version| version == self.version)
    }
}

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
    /// Memory for the variable's own values during an evaluation, where it holds the mean in half precision.
    pub(super) rounded: Option<Tensor>,
    /// The variable, where the mean is kept apart, as it was last found or left in agreement with it.
    pub(super) agreed: Option<Seen>,
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

    /// Whether the variable is the mean in half precision: a pass rounds what it writes to one of them for the other.
    fn is_rounded(&self, link: Link) -> bool {
        self.mean.is_some() && link == Link::Identity
    }

    pub(super) fn make_beside(&mut self, leaf: &Leaf, link: Link) -> Result<()> {
        if leaf.trainable() && self.beside.is_none() {
            self.beside = Some(self.mean(leaf).detach().f_empty_like()?);
            if self.is_rounded(link) {
                self.rounded = Some(leaf.tensor.detach().f_empty_like()?);
            }
        }
        Ok(())
    }

    /// Where mean and point of an evaluation are: the same for a variable that was at its mean.
    pub(super) fn mean_and_point<'a>(&'a self, leaf: &'a Leaf, at: &'a Perturbed) -> (&'a Tensor, &'a Tensor) {
        let original = at.original(&leaf.tensor);
        match &self.mean {
            Some(mean) => (mean, self.beside.as_ref().filter(|_| original.is_some()).unwrap_or(mean)),
            None => (original.unwrap_or(&leaf.tensor), &leaf.tensor),
        }
    }

    /// Where a pass puts a new point, and where it keeps the mean unless that is safe already; the point in half
    /// precision goes to a second place.
    pub(super) fn point_and_mean<'a>(
        &'a self,
        leaf: &'a Leaf,
        link: Link,
        at: &Perturbed,
    ) -> ([Option<&'a Tensor>; 2], Also<'a>) {
        let own = |kept: &'a Option<Tensor>| kept.as_ref().filter(|_| at.original(&leaf.tensor).is_none());
        if self.mean.is_none() {
            return ([Some(&leaf.tensor), own(&self.beside)], Also::new());
        }
        ([self.beside.as_ref(), own(&self.rounded)], self.in_variable(leaf, link))
    }

    /// Second places of a pass whose first result is to be in the variable as well.
    pub(super) fn in_variable<'a>(&self, leaf: &'a Leaf, link: Link) -> Also<'a> {
        self.is_rounded(link).then_some((0, &leaf.tensor)).into_iter().collect()
    }

    /// Tells the guard of the variable that a pass has made a point for it; or returns that, as the variable is to have it.
    pub(super) fn moved(&self, leaf: &Leaf, link: Link, at: &mut Perturbed) -> Result<Option<Tensor>> {
        let Some(beside) = &self.beside else { return Ok(None) };
        match (&self.mean, &self.rounded) {
            (None, _) => at.moved(&leaf.tensor, beside),
            (Some(_), Some(rounded)) if self.is_rounded(link) => at.moved(&leaf.tensor, rounded),
            (Some(_), _) => {
                // A copy, because `put` leaves the old values in the memory of the new ones.
                let point = Tensor::f_empty_like(&leaf.tensor.detach())?;
                point.shallow_clone().f_copy_(beside)?;
                return Ok(Some(point));
            }
        }
        Ok(None)
    }
}
