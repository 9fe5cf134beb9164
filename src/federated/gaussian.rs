//! The posteriors that a server can hold, in and out of the vectors that the methods calculate with.

use super::layout::{Layout, Part};
use super::moments::{Moments, joined};
use crate::posterior::NaturalSum;
use crate::{DiagonalGaussian, FullGaussian, Result};
use std::sync::Arc;

/// The posteriors that a [`Server`](super::Server) can hold: [`DiagonalGaussian`] and [`FullGaussian`]. It cannot be
/// implemented elsewhere.
pub trait Gaussian: NaturalSum {
    /// What its files are called.
    #[doc(hidden)]
    const FAMILY: &'static str;

    /// Dimensions of a precision: 1 for a diagonal, 2 for a matrix.
    #[doc(hidden)]
    const DIMENSIONS: usize;

    #[doc(hidden)]
    fn moments(&self) -> Result<Moments>;

    #[doc(hidden)]
    fn of_moments(moments: &Moments) -> Result<Self>;
}

impl Gaussian for DiagonalGaussian {
    const FAMILY: &'static str = "diagonal";
    const DIMENSIONS: usize = 1;

    fn moments(&self) -> Result<Moments> {
        let _no_grad = tch::no_grad_guard();
        let entries: Vec<_> = self.names().map(|name| self.entry(name).expect("its name")).collect();
        let parts = entries.iter().map(|e| Part::new(&e.name, &e.mean)).collect();
        Ok(Moments {
            layout: Arc::new(Layout { parts }),
            mean: joined(entries.iter().map(|e| &e.mean))?,
            precision: joined(entries.iter().map(|e| &e.precision))?,
        })
    }

    fn of_moments(moments: &Moments) -> Result<Self> {
        let Moments { layout, mean, precision } = moments;
        let pairs = layout.split(mean)?.into_iter().zip(layout.split(precision)?);
        Self::sharing(pairs.map(|((name, mean), (_, precision))| (name, mean, precision)))
    }
}

impl Gaussian for FullGaussian {
    const FAMILY: &'static str = "full";
    const DIMENSIONS: usize = 2;

    fn moments(&self) -> Result<Moments> {
        let _no_grad = tch::no_grad_guard();
        let part = |name: &str| Part::new(name, &self.mean(name).expect("its name"));
        Ok(Moments {
            layout: Arc::new(Layout { parts: self.names().map(part).collect() }),
            mean: self.mean_vector(),
            precision: self.precision_matrix().copy(),
        })
    }

    fn of_moments(moments: &Moments) -> Result<Self> {
        Self::new(moments.layout.split(&moments.mean)?, &moments.precision)
    }
}

/// Mean and precision of `q` in the order of the prior's parameters.
///
/// # Errors
/// Other parameters; `whose` says what `q` is.
pub(super) fn arranged<Q: Gaussian>(prior: &Moments, q: &Q, whose: &str) -> Result<Moments> {
    q.moments()?.arranged(&prior.layout, whose)
}
