//! Means over the evaluations of one step: samples, micro-batches, and those of other ranks.
//!
//! Kept as weighted sums, which are divided once, before the update: so it does not matter whether they were added up by
//! one process or by several.

use crate::kernel;
use crate::params::Leaf;
use crate::{Error, Result};
use tch::Tensor;

/// What evaluations have given so far. Two of them merge to what one run over both would have given.
#[derive(Debug, Default)]
pub struct Sums {
    /// Σ of the evaluations' weights: examples if the losses came per example, else evaluations.
    pub weight: f64,
    /// Whether loss and tensors are sums of several evaluations, each times its weight. Those of a single one are as they
    /// were found.
    pub merged: bool,
    /// Number of evaluations, which is the position in the step's noise.
    pub evaluations: u64,
    /// Σ of the losses.
    pub loss: f64,
    /// Global L2 norm of the last evaluation's gradient.
    pub gradient_norm: f64,
    /// The largest of all evaluations, of both points of a pair; NaN if they were not looked at.
    pub largest_norm: f64,
    /// Whether the limit of its norm has cut it.
    pub cut: bool,
    /// Whether weights count examples.
    pub per_example: bool,
    /// Σ of the gradients of each parameter; `None` where no loss has depended on it yet. One alone may be of half precision.
    pub gradients: Vec<Option<Tensor>>,
    /// Σ of the statistics of each unit; none where the loss has not depended on it.
    pub statistics: Vec<Vec<Tensor>>,
    /// Σ of |ĝ| before clipping, 0 where all evaluations had a gradient of 0: gradients of either sign may cancel.
    /// Empty unless such elements are to be left alone.
    pub sizes: Vec<Option<Tensor>>,
}

impl Sums {
    /// Evaluations that count for nothing but their place in the noise.
    pub(super) fn left_out(evaluations: u64) -> Self {
        Sums { evaluations, loss: f64::NAN, ..Sums::default() }
    }

    /// Whether no evaluation has any weight.
    pub(super) fn is_empty(&self) -> bool {
        self.weight == 0.0
    }

    /// What makes sums of loss and tensors.
    pub(super) fn factor(&self) -> f64 {
        if self.merged { 1.0 } else { self.weight }
    }

    pub(super) fn mean_loss(&self) -> f64 {
        if self.merged { self.loss / self.weight } else { self.loss }
    }

    /// With means in place of sums.
    pub(super) fn into_means(mut self) -> Self {
        self.loss = self.mean_loss();
        if std::mem::take(&mut self.merged) {
            let (_no_grad, weight) = (tch::no_grad_guard(), self.weight);
            self.tensors().for_each(|t| *t = &*t / weight);
        }
        self
    }

    fn tensors(&mut self) -> impl Iterator<Item = &mut Tensor> {
        let gradients = self.gradients.iter_mut().chain(&mut self.sizes).flatten();
        gradients.chain(self.statistics.iter_mut().flatten())
    }

    /// The gradient of a parameter that is trained.
    pub(super) fn gradient(&self, i: usize, leaf: &Leaf) -> Option<&Tensor> {
        self.gradients.get(i)?.as_ref().filter(|_| leaf.trainable())
    }

    /// The same tensors; a merge makes new ones.
    pub(super) fn shallow_clone(&self) -> Self {
        let share = |all: &[Tensor]| all.iter().map(Tensor::shallow_clone).collect();
        Sums {
            gradients: self.gradients.iter().map(|g| g.as_ref().map(Tensor::shallow_clone)).collect(),
            statistics: self.statistics.iter().map(|s| share(s)).collect(),
            sizes: self.sizes.iter().map(|g| g.as_ref().map(Tensor::shallow_clone)).collect(),
            ..*self
        }
    }

    /// Errors if one counts examples and the other evaluations.
    pub(super) fn check(&self, per_example: bool) -> Result<()> {
        if self.weight > 0.0 && self.per_example != per_example {
            return Err(Error::Loss(
                "it is a mean in one micro-batch and per example in another, so their weights cannot be compared; \
                 return the same form each time"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    pub(super) fn merge(&mut self, mut other: Sums) -> Result<()> {
        if other.weight == 0.0 {
            self.evaluations += other.evaluations;
            return Ok(());
        }
        let _no_grad = tch::no_grad_guard();
        // Not in half precision, in which the mean would lose the smaller ones.
        for g in other.gradients.iter_mut().chain(&mut other.sizes).flatten() {
            *g = g.to_kind(kernel::computed_in(g.kind()));
        }
        // Taken over as it is, so that one evaluation is not rounded by a mean of itself.
        if self.weight == 0.0 {
            let evaluations = self.evaluations;
            *self = other;
            self.evaluations += evaluations;
            return Ok(());
        }
        self.check(other.per_example)?;
        let factors = (self.factor(), other.factor());
        add(&mut self.gradients, other.gradients, factors);
        add(&mut self.sizes, other.sizes, factors);
        let units = self.statistics.len().max(other.statistics.len());
        self.statistics.resize_with(units, Vec::new);
        for (a, b) in self.statistics.iter_mut().zip(other.statistics) {
            let optional = |all: Vec<Tensor>| all.into_iter().map(Some).collect::<Vec<_>>();
            let mut both = optional(std::mem::take(a));
            add(&mut both, optional(b), factors);
            a.extend(both.into_iter().flatten());
        }
        self.loss = self.loss * factors.0 + other.loss * factors.1;
        self.weight += other.weight;
        self.merged = true;
        self.evaluations += other.evaluations;
        (self.gradient_norm, self.cut) = (other.gradient_norm, other.cut);
        // Or a NaN, which stays.
        if other.largest_norm > self.largest_norm || other.largest_norm.is_nan() {
            self.largest_norm = other.largest_norm;
        }
        Ok(())
    }
}

/// a ← factors.0·a + factors.1·b. What one of them lacks counts as zero, because a loss that does not depend on a parameter
/// has that gradient.
fn add(a: &mut Vec<Option<Tensor>>, mut b: Vec<Option<Tensor>>, factors: (f64, f64)) {
    // A variable may have been created between the two.
    let n = a.len().max(b.len());
    a.resize_with(n, || None);
    b.resize_with(n, || None);
    for (a, b) in a.iter_mut().zip(b) {
        let (x, y) = (a.take().map(|a| times(a, factors.0)), b.map(|b| times(b, factors.1)));
        *a = match (x, y) {
            // A new tensor: others may hold these.
            (Some(x), Some(y)) => Some(x + y),
            (x, y) => x.or(y),
        };
    }
}

fn times(t: Tensor, factor: f64) -> Tensor {
    if factor == 1.0 { t } else { t * factor }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(weight: f64, x: Option<f64>) -> Sums {
        let t = x.map(|x| Tensor::from_slice(&[x]));
        let statistics = vec![t.iter().map(Tensor::shallow_clone).collect()];
        let (gradients, loss) = (vec![t], x.unwrap_or(0.0));
        let sums = Sums { weight, evaluations: 1, loss, per_example: true, ..Sums::default() };
        Sums { gradients, statistics, ..sums }
    }

    #[test]
    fn halves_merge_to_the_whole() {
        let parts = [(3.0, Some(1.0)), (1.0, None), (4.0, Some(-2.0)), (2.0, Some(0.5))];
        let run = |order: &[usize]| {
            let mut s = Sums::default();
            for i in order {
                s.merge(one(parts[*i].0, parts[*i].1)).unwrap();
            }
            s
        };
        let (mut left, right) = (run(&[0, 1]), run(&[2, 3]));
        left.merge(right).unwrap();
        for s in [left, run(&[0, 1, 2, 3]), run(&[3, 1, 0, 2])].map(Sums::into_means) {
            let expected = (3.0 - 8.0 + 1.0) / 10.0;
            for t in [s.gradients[0].as_ref().unwrap(), &s.statistics[0][0]] {
                assert!((t.double_value(&[0]) - expected).abs() < 1e-15);
            }
            assert!((s.loss - expected).abs() < 1e-15 && s.evaluations == 4 && s.weight == 10.0);
        }
    }

    #[test]
    fn different_weights_do_not_mix() {
        let mut s = one(3.0, Some(1.0));
        assert!(s.merge(Sums { per_example: false, ..one(1.0, Some(2.0)) }).is_err());
        assert_eq!((s.weight, s.loss), (3.0, 1.0));
    }
}
