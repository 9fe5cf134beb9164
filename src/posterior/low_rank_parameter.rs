//! One parameter of a Gaussian of a diagonal and a few directions.

use super::named::Parameter;
use super::valid::{finite_float, form, smallest};
use crate::{Error, Result};
use tch::{Kind, Tensor};

/// One parameter: all of one kind (f32 or f64) and device.
#[derive(Debug)]
pub(super) struct Entry {
    pub name: String,
    pub mean: Tensor,
    /// d, in the parameter's shape.
    pub variance: Tensor,
    /// U `[K, …]`, each row in the parameter's shape.
    pub directions: Tensor,
}

impl Parameter for Entry {
    fn name(&self) -> &str {
        &self.name
    }
    fn size(&self) -> Vec<i64> {
        self.mean.size()
    }
}

impl Entry {
    pub fn rank(&self) -> i64 {
        self.directions.size()[0]
    }

    /// d in f64, of all weights one after the other.
    pub fn d(&self) -> Tensor {
        wide(&self.variance)
    }

    /// U `[K, n]` in f64.
    pub fn u(&self) -> Tensor {
        // Not `[K, -1]`, which libtorch refuses where there is no element.
        self.directions.to_kind(Kind::Double).reshape([self.rank(), self.mean.numel() as i64])
    }

    pub fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        let Entry { name, mean, variance, directions } = self;
        Entry { name: name.clone(), mean: f(mean), variance: f(variance), directions: f(directions) }
    }

    /// Errors unless the tensors are those of a covariance.
    pub fn check(&self) -> Result<()> {
        let Entry { name, mean: m, variance: d, directions: u } = self;
        let refuse = |problem: String| Err(Error::parameter(name, problem));
        for (what, t) in [("mean", m), ("variance", d), ("directions", u)] {
            finite_float(name, what, t)?;
        }
        let place = |t: &Tensor| (t.kind(), t.device());
        if place(d) != place(m) || d.size() != m.size() {
            return refuse(format!("its mean is {} and its variance {}: expected the same", form(m), form(d)));
        }
        if place(u) != place(m) || u.dim() != m.dim() + 1 || u.size()[1..] != m.size()[..] {
            return refuse(format!(
                "its mean is {} and its directions {}: expected K of the mean's shape, one after the other [K, …]",
                form(m),
                form(u)
            ));
        }
        if smallest(d) <= 0.0 {
            return refuse(format!(
                "its smallest variance is {:e}: expected a number > 0 beside the directions (clamp it at a tiny one \
                 where a weight does not move)",
                smallest(d)
            ));
        }
        finite_float(name, "variance with its directions", &variance(self))
    }
}

/// d + Σₖ uₖ²
pub(super) fn variance(p: &Entry) -> Tensor {
    &p.variance + p.directions.square().sum_dim_intlist(0, false, p.mean.kind())
}

/// `[n]` in f64.
pub(super) fn wide(t: &Tensor) -> Tensor {
    t.to_kind(Kind::Double).reshape([-1])
}

pub(super) fn total(t: &Tensor) -> f64 {
    t.sum(Kind::Double).double_value(&[])
}
