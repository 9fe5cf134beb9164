//! Sums of natural parameters: Gaussians of one family with weights.

use super::diagonal::Entry;
use super::kronecker_parameter::{matrix, same_basis};
use super::valid::smallest;
use super::{DiagonalGaussian, FullGaussian, KroneckerGaussian, KroneckerParameter, Posterior};
use crate::linalg::into_basis;
use crate::{Error, Result, linalg};
use tch::{Kind, Tensor};

/// Gaussians whose natural parameters add within their family: what [`combine`] takes, and what merging and removal are
/// made of. [`DiagonalGaussian`], [`FullGaussian`] and [`KroneckerGaussian`]; it cannot be implemented elsewhere.
pub trait NaturalSum: Posterior + Sized + sealed::Sealed {
    /// [`combine`] of at least one, with weights that are finite.
    #[doc(hidden)]
    fn natural_sum(first: &Self, weighted: &[(f64, &Self)]) -> Result<Self>;

    /// The supremum of the w for which S - w S' is positive definite, with S' from `part`, and what becomes singular
    /// there; infinite if every w will do, and at least 0. The two must have a sum.
    #[doc(hidden)]
    fn limit(&self, part: &Self) -> Result<(f64, String)>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::DiagonalGaussian {}
    impl Sealed for super::FullGaussian {}
    impl Sealed for super::KroneckerGaussian {}
}

/// Adds natural parameters with weights: S = Σ wₖ Sₖ, S m = Σ wₖ Sₖ mₖ, where S is the precision.
///
/// Negative weights take information away. Sequential learning, federated rounds, merging with uncertainty and the
/// removal of data are all this sum: `combine(&[(1.0, &a), (1.0, &b), (-1.0, &prior)])` is the posterior of the data of
/// a and of b, both learned with that prior. Computed in f64, returned in the kind, order and seed of the first.
///
/// [`KroneckerGaussian`]s have a sum of their form only in the same bases; for others, combine
/// [`KroneckerGaussian::full`] of each.
///
/// ```
/// use tch::Tensor;
/// use tch_blr::{DiagonalGaussian, combine};
/// # fn main() -> tch_blr::Result<()> {
/// let q = |m: f64, s: f64| DiagonalGaussian::new([("w", Tensor::from_slice(&[m]), Tensor::from_slice(&[s]))]);
/// // Precisions add: 3 + 5 - 2. So do s·m: 3·1 + 5·2 - 2·0.5.
/// let merged = combine(&[(1.0, &q(1.0, 3.0)?), (1.0, &q(2.0, 5.0)?), (-1.0, &q(0.5, 2.0)?)])?;
/// assert_eq!(merged.precision("w").unwrap().double_value(&[0]), 6.0);
/// assert_eq!(merged.mean("w").unwrap().double_value(&[0]), 2.0);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// No posterior, different parameters (for [`FullGaussian`]s also in another order) or bases, a weight that is not
/// finite, a precision that is not positive definite in the end: [`Error::Parameter`] with the name of the parameter
/// for [`DiagonalGaussian`]s, [`Error::NotPositiveDefinite`] otherwise.
pub fn combine<Q: NaturalSum>(weighted: &[(f64, &Q)]) -> Result<Q> {
    let Some((_, first)) = weighted.first() else {
        return Err(Error::Posterior("combine needs at least one".to_owned()));
    };
    if let Some((w, _)) = weighted.iter().find(|(w, _)| !w.is_finite()) {
        return Err(Error::Posterior(format!("the weight {w} is not finite")));
    }
    let _no_grad = tch::no_grad_guard();
    Q::natural_sum(first, weighted)
}

/// The smallest of the elementwise s/s', over parameters.
fn smallest_ratio<'a>(pairs: impl Iterator<Item = (&'a str, &'a Tensor, &'a Tensor)>) -> (f64, String) {
    let ratios = pairs.filter(|(_, s, _)| s.numel() > 0).map(|(name, s, part)| {
        let part = part.to_device(s.device()).to_kind(Kind::Double);
        (smallest(&(s.to_kind(Kind::Double) / part)), format!("parameter `{name}`"))
    });
    ratios.min_by(|a, b| a.0.total_cmp(&b.0)).unwrap_or((f64::INFINITY, String::new()))
}

impl NaturalSum for DiagonalGaussian {
    fn natural_sum(first: &Self, weighted: &[(f64, &Self)]) -> Result<Self> {
        for (_, q) in weighted {
            first.same_parameters(q)?;
        }
        let entries = first.entries.iter().map(|e| {
            // Sums with weights of both signs cancel: in f64, and rounded once at the end.
            let (kind, device) = (e.mean.kind(), e.mean.device());
            let mut precision = Tensor::zeros(e.mean.size(), (Kind::Double, device));
            let mut precision_mean = precision.copy();
            for (w, q) in weighted {
                let other = q.entry(&e.name).expect("same_parameters() has seen to it");
                let s = other.precision.to_device(device).to_kind(Kind::Double) * *w;
                precision_mean += &s * other.mean.to_device(device);
                precision += s;
            }
            let least = smallest(&precision);
            // Written so that a NaN fails, too.
            if least.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater) {
                let problem = format!(
                    "combining gives it a precision of {least:e}, which is not positive; use smaller negative weights"
                );
                return Err(Error::parameter(&e.name, problem));
            }
            Ok((e.name.clone(), (precision_mean / &precision).to_kind(kind), precision.to_kind(kind)))
        });
        // The tensors are fresh, so that nothing needs to be copied.
        let entries = entries.collect::<Result<Vec<_>>>()?;
        Ok(DiagonalGaussian::sharing(entries)?.with_seed(first.seed))
    }

    fn limit(&self, part: &Self) -> Result<(f64, String)> {
        let pair = |e: &Entry| part.entry(&e.name).map(|other| &other.precision);
        let pairs = self.entries.iter().filter_map(|e| Some((e.name.as_str(), &e.precision, pair(e)?)));
        Ok(smallest_ratio(pairs))
    }
}

impl NaturalSum for FullGaussian {
    fn natural_sum(first: &Self, weighted: &[(f64, &Self)]) -> Result<Self> {
        let device = first.mean.device();
        let mut precision = first.precision.zeros_like();
        let mut precision_mean = first.mean.zeros_like();
        for (w, q) in weighted {
            first.same_parameters(q)?;
            let scaled = q.precision.to_device(device) * *w;
            precision_mean += scaled.f_mv(&q.mean.to_device(device))?;
            precision += scaled;
        }
        // The factorization is also the test that there is a Gaussian at all.
        let factor = linalg::cholesky("the combined precision", &precision)?;
        let mean = linalg::solve(&factor, &precision_mean)?;
        Ok(FullGaussian { parameters: first.parameters.clone(), mean, precision, factor, seed: first.seed })
    }

    /// 1 over the largest eigenvalue of L⁻¹ S' L⁻ᵀ with S = L Lᵀ.
    fn limit(&self, part: &Self) -> Result<(f64, String)> {
        let what = "the precision matrix".to_owned();
        if self.is_empty() {
            return Ok((f64::INFINITY, what));
        }
        let half = linalg::forward(&self.factor, &part.precision.f_to_device(self.factor.device())?)?;
        // Symmetric up to rounding, and eigvalsh reads only one triangle.
        let ratio = linalg::symmetric(&linalg::forward(&self.factor, &half.f_tr()?)?)?;
        let largest = ratio.f_linalg_eigvalsh("L")?.max().double_value(&[]);
        // S - wS' = L(I - wR)Lᵀ is positive definite until w reaches 1 over R's largest eigenvalue.
        Ok((1.0 / largest, what))
    }
}

impl NaturalSum for KroneckerGaussian {
    fn natural_sum(first: &Self, weighted: &[(f64, &Self)]) -> Result<Self> {
        for (_, q) in weighted {
            first.same_parameters(q)?;
            for p in &first.parameters {
                let other = q.parameter(&p.name).expect("same_parameters() has seen to it");
                if !same_basis(p.left.as_ref(), other.left.as_ref())
                    || !same_basis(p.right.as_ref(), other.right.as_ref())
                {
                    return Err(Error::parameter(
                        &p.name,
                        "the bases of its precision differ, so that the sum has no such form; combine full() of each",
                    ));
                }
            }
        }
        let parameters = first.parameters.iter().map(|p| {
            // In the basis the elements are independent Gaussians.
            let mut precision = p.precision.zeros_like().to_kind(Kind::Double);
            let mut precision_mean = matrix(&precision).copy();
            let like = p.double();
            for (w, q) in weighted {
                let other = q.parameter(&p.name).expect("checked above").double();
                let s = other.precision.to_device(p.mean.device()) * *w;
                let mean = matrix(&other.mean.to_device(p.mean.device()));
                precision_mean += matrix(&s) * into_basis(&mean, like.left.as_ref(), like.right.as_ref())?;
                precision += s;
            }
            if smallest(&precision) <= 0.0 {
                let problem = format!("an element in the basis becomes {:e}", smallest(&precision));
                let what = format!("the combined precision of `{}`", p.name);
                return Err(Error::NotPositiveDefinite { what, problem });
            }
            let mean = like.out(&(precision_mean / matrix(&precision)))?;
            let kind = p.mean.kind();
            Ok(KroneckerParameter {
                name: p.name.clone(),
                mean: mean.to_kind(kind),
                left: p.left.as_ref().map(Tensor::shallow_clone),
                right: p.right.as_ref().map(Tensor::shallow_clone),
                precision: precision.to_kind(kind),
            })
        });
        Ok(Self::new(parameters.collect::<Result<Vec<_>>>()?)?.with_seed(first.seed))
    }

    fn limit(&self, part: &Self) -> Result<(f64, String)> {
        let pair = |p: &KroneckerParameter| part.parameter(&p.name).map(|other| &other.precision);
        let pairs = self.parameters.iter().filter_map(|p| Some((p.name.as_str(), &p.precision, pair(p)?)));
        Ok(smallest_ratio(pairs))
    }
}
