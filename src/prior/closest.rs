//! The isotropic prior that is closest to a posterior, parameter by parameter.

use super::Prior;
use crate::{DiagonalGaussian, Result, check};
use tch::Kind;

/// The largest precision unless another is given: σ = 10⁻⁴.
const LARGEST: f64 = 1e8;

impl DiagonalGaussian {
    /// p of every parameter, in order, for which the prior N(0, 1/p) of its P weights is closest to this posterior,
    /// where KL(q ‖ N(0, 1/p)) is least:
    ///
    /// ```text
    /// p = P / Σ ( m² + 1/s )          the same as MacKay's fixed point  p = (P - p Σ 1/s) / Σ m²
    /// ```
    ///
    /// It is the empirical-Bayes choice of a weight decay δ = p/ess for each matrix, without a search
    /// ([`Optimizer::set_weight_decay_group`](crate::Optimizer::set_weight_decay_group), or [`Prior::closest_to`]), and
    /// costs a pass over the posterior. For blocks of several parameters: [`DiagonalGaussian::prior_precision`].
    ///
    /// `largest` > 0 bounds p; default 10⁸. Without data in it a block agrees with whatever it is: at m = 0 and equal
    /// s, p = s, and a training in which p becomes the prior again and again makes s = ess·h + p grow without end.
    ///
    /// ```
    /// # use tch::Tensor;
    /// # use tch_blr::DiagonalGaussian;
    /// # fn main() -> tch_blr::Result<()> {
    /// let (m, s) = (Tensor::from_slice(&[1.0, -2.0]), Tensor::from_slice(&[4.0, 4.0]));
    /// let q = DiagonalGaussian::new([("w", m, s)])?;
    /// assert_eq!(q.prior_precisions(None)?, [("w".to_owned(), 2.0 / (1.0 + 4.0 + 0.25 + 0.25))]);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// Source: Graves 2011, *Practical Variational Inference for Neural Networks*, for a Gaussian prior's variance;
    /// MacKay 1992 for the fixed point.
    ///
    /// # Errors
    /// A bound that is not finite and positive.
    pub fn prior_precisions(&self, largest: impl Into<Option<f64>>) -> Result<Vec<(String, f64)>> {
        let largest = bound(largest)?;
        Ok(self.names().map(|name| (name.to_owned(), closest(&[self.spread(name)], largest))).collect())
    }

    /// The same of all parameters together, with P and the sum over all of their weights: one precision for a group of
    /// parameters, which [`DiagonalGaussian::select`] takes out of a posterior of more.
    ///
    /// # Errors
    /// A bound that is not finite and positive.
    pub fn prior_precision(&self, largest: impl Into<Option<f64>>) -> Result<f64> {
        let largest = bound(largest)?;
        Ok(closest(&self.names().map(|name| self.spread(name)).collect::<Vec<_>>(), largest))
    }

    /// P and Σ ( m² + 1/s ) of a parameter.
    fn spread(&self, name: &str) -> (f64, f64) {
        let _no_grad = tch::no_grad_guard();
        let (Some(mean), Some(precision)) = (self.mean(name), self.precision(name)) else { return (0.0, 0.0) };
        let [mean, precision] = [mean, precision].map(|t| t.to_kind(Kind::Double));
        let spread = mean.square() + precision.reciprocal();
        (mean.numel() as f64, spread.sum(Kind::Double).double_value(&[]))
    }
}

fn bound(largest: impl Into<Option<f64>>) -> Result<f64> {
    let largest = largest.into().unwrap_or(LARGEST);
    check::positive("largest", largest)?;
    Ok(largest)
}

fn closest(blocks: &[(f64, f64)], largest: f64) -> f64 {
    let (weights, spread) = blocks.iter().fold((0.0, 0.0), |(n, sum), (m, spread)| (n + m, sum + spread));
    // Of no weights it is 0/0, and `min` then takes the other number.
    f64::min(weights / spread, largest)
}

impl Prior {
    /// N(0, 1/p) with [`DiagonalGaussian::prior_precisions`] for p: one for every parameter of the posterior, which
    /// is forgotten but for its scale.
    ///
    /// As any prior that is a posterior it is for an optimizer to be built; rows that start at their prior's precision
    /// (`Ivon`) do so here. Between the steps of one that runs, [`Optimizer::set_weight_decay_group`] takes p/ess.
    ///
    /// [`Optimizer::set_weight_decay_group`]: crate::Optimizer::set_weight_decay_group
    ///
    /// # Errors
    /// As [`DiagonalGaussian::prior_precisions`].
    pub fn closest_to(q: &DiagonalGaussian, largest: impl Into<Option<f64>>) -> Result<Self> {
        let each = q.prior_precisions(largest)?.into_iter().filter_map(|(name, p)| {
            let mean = q.mean(&name)?.zeros_like();
            let precision = mean.full_like(p);
            Some((name, mean, precision))
        });
        Ok(Prior::from(&DiagonalGaussian::new(each)?))
    }
}
