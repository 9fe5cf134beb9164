//! A diagonal Gaussian some of whose weights are zero for certain.

use super::DiagonalGaussian;
use super::any::{check_sample, posterior};
use super::diagonal::{self, Entry};
use crate::{Error, Result};
use std::collections::HashMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// A [`DiagonalGaussian`] in which pruned weights are 0 with σ = 0, and the others as they were: made by
/// [`Mask::posterior`](crate::pruning::Mask::posterior).
///
/// A weight that is only put to zero in the mean comes back as noise in every sample; these do not. Samples of the
/// other weights are those of the Gaussian before, number by number. It predicts, and is saved and loaded, as any
/// posterior; as a prior, or to be merged, take the Gaussian that it comes from, since a weight that is known for
/// certain has no density to add.
#[derive(Debug)]
pub struct PrunedGaussian {
    /// With m = 0 and s = ∞ where a weight is pruned. Its own constructors refuse such a precision, so that it does not
    /// leave this type.
    q: DiagonalGaussian,
    seed: u64,
}

const FORM: &str = "pruned Gaussian posterior";

posterior!(PrunedGaussian);

impl PrunedGaussian {
    /// `pruned`: true where a weight of the parameter of this name is; parameters without one are kept entirely.
    pub(crate) fn new(q: &DiagonalGaussian, pruned: Vec<(String, Tensor)>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        for (name, mask) in &pruned {
            let Some(mean) = q.mean(name) else {
                let problem = "the mask has it and the posterior does not; rank the weights of this posterior";
                return Err(Error::parameter(name, problem));
            };
            if mean.size() != mask.size() {
                let (theirs, ours) = (mask.size(), mean.size());
                return Err(Error::parameter(
                    name,
                    format!("the mask has shape {theirs:?} and the posterior {ours:?}"),
                ));
            }
        }
        let pruned: HashMap<String, Tensor> = pruned.into_iter().collect();
        let without = |e: &Entry| {
            let fill = |t: &Tensor, x: f64| match pruned.get(&e.name) {
                Some(mask) => t.masked_fill(&mask.to_device(t.device()), x),
                None => t.shallow_clone(),
            };
            let (mean, precision) = (fill(&e.mean, 0.0), fill(&e.precision, f64::INFINITY));
            Entry { name: e.name.clone(), mean, precision, damping: e.damping }
        };
        let mut without_them = q.shallow_clone();
        without_them.entries = q.entries.map(without);
        Ok(PrunedGaussian { seed: q.seed, q: without_them })
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.q.names()
    }

    /// Number of weights, with the pruned ones.
    pub fn len(&self) -> usize {
        self.q.len()
    }

    /// Number of weights that are pruned.
    pub fn pruned(&self) -> usize {
        let each = self.q.entries.iter().map(|e| e.precision.isposinf().sum(Kind::Int64).int64_value(&[]));
        each.sum::<i64>() as usize
    }

    /// m of one parameter, 0 where it is pruned.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.q.mean(name)
    }

    /// σ² = 1/s of one parameter, 0 where it is pruned.
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        self.q.variance(name)
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: m + z/√(s+d), and 0 where it is pruned.
    ///
    /// # Errors
    /// A sample beyond the 2³² that a seed has.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        // z/∞ is 0, so that these need no pass of their own.
        self.q.sample_of(self.seed, check_sample(k)?)
    }

    fn write(&self, path: &Path) -> Result<()> {
        self.q.write_as(FORM, self.seed, path)
    }

    /// Reads what [`PrunedGaussian::save`] wrote, onto the CPU: tensor `<name>` is the mean, `<name>.precision` the
    /// precision, infinite where a weight is pruned.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let _no_grad = tch::no_grad_guard();
        let (entries, content) = diagonal::read(FORM, path)?;
        let (mut finite, mut pruned) = (Vec::new(), Vec::new());
        for (name, mean, precision) in entries {
            let mask = precision.isposinf();
            if mean.size() == mask.size() && mean.masked_select(&mask).count_nonzero(None::<i64>).int64_value(&[]) != 0
            {
                let e = Error::parameter(&name, "a weight of infinite precision has a mean other than 0");
                return Err(Error::file(path, e));
            }
            // Everything else about them is checked as it is for any diagonal Gaussian.
            finite.push((name.clone(), mean, precision.masked_fill(&mask, 1.0)));
            pruned.push((name, mask));
        }
        let q = DiagonalGaussian::of_file(path, finite, content)?;
        Self::new(&q, pruned).map_err(|e| Error::file(path, e))
    }
}
