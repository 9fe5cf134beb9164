//! Sums of natural parameters: Gaussians of one family with weights.

use super::diagonal::Entry;
use super::kronecker_parameter::same_basis;
use super::valid::smallest;
use super::{DiagonalGaussian, FullGaussian, KroneckerGaussian, KroneckerParameter, Posterior};
use crate::kernel::{self, Elementwise, Field, Job, Real};
use crate::linalg::into_basis;
use crate::{Error, Result, linalg};
use tch::{Kind, Tensor};

/// Gaussians whose natural parameters add within their family: what [`combine`] takes, and what merging and removal are
/// made of. [`DiagonalGaussian`], [`FullGaussian`] and [`KroneckerGaussian`]; it cannot be implemented elsewhere.
pub trait NaturalSum: Posterior + Sized + sealed::Sealed {
    /// [`combine`] of at least one, with weights that are finite.
    #[doc(hidden)]
    fn natural_sum(first: &Self, weighted: &[(f64, &Self)]) -> Result<Self>;

    /// How much of S', the precision of `part`, can be taken from S. The two must have a sum.
    #[doc(hidden)]
    fn limit(&self, part: &Self) -> Result<Limit>;

    /// [`clamp_information`] of this posterior.
    #[doc(hidden)]
    fn clamped(&self, prior: &Self) -> Result<Self>;
}

/// Where S - w S' stops being positive definite.
#[doc(hidden)]
#[derive(Debug)]
pub struct Limit {
    /// The supremum of the w for which it is; infinite if every w will do, and at least 0.
    pub largest: f64,
    /// What becomes singular there.
    pub what: String,
    /// In how many elements, or directions of a matrix, S - S' is not positive.
    pub short: usize,
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::DiagonalGaussian {}
    impl Sealed for super::FullGaussian {}
    impl Sealed for super::KroneckerGaussian {}
}

/// Adds natural parameters with weights: S = Σ wₖ Sₖ, S m = Σ wₖ Sₖ mₖ, where S is the precision.
///
/// Damping is no information, and neither counts here nor is it in the result ([`DiagonalGaussian::damping`]).
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
/// A precision that was learned by an estimate of either sign, such as IVON's, may end below that of its prior in some
/// elements, and then this sum may have no positive precision there: [`clamp_information`] is for that.
///
/// # Errors
/// No posterior, no weight > 0, different parameters (for [`FullGaussian`]s also in another order) or bases, a weight
/// that is not finite; [`Error::Combine`] if the sum's precision is not positive definite.
pub fn combine<Q: NaturalSum>(weighted: &[(f64, &Q)]) -> Result<Q> {
    let Some((_, first)) = weighted.first() else {
        return Err(Error::Posterior("combine needs at least one".to_owned()));
    };
    if let Some((w, _)) = weighted.iter().find(|(w, _)| !w.is_finite()) {
        return Err(Error::Posterior(format!("the weight {w} is not finite")));
    }
    if weighted.iter().all(|(w, _)| *w <= 0.0) {
        return Err(Error::Posterior("combine needs a weight > 0".to_owned()));
    }
    let _no_grad = tch::no_grad_guard();
    Q::natural_sum(first, weighted).map_err(|e| match e {
        Error::NotPositiveDefinite { .. } => shortage(weighted).unwrap_or(e),
        e => e,
    })
}

/// Why a sum has no positive precision: the positive terms, and how much of the negative ones can be taken from them.
fn shortage<Q: NaturalSum>(weighted: &[(f64, &Q)]) -> Option<Error> {
    let of_sign = |sign: f64| {
        let terms: Vec<(f64, &Q)> =
            weighted.iter().filter(|(w, _)| w * sign > 0.0).map(|(w, q)| (w * sign, *q)).collect();
        Q::natural_sum(terms.first()?.1, &terms).ok()
    };
    let (added, taken) = (of_sign(1.0)?, of_sign(-1.0)?);
    let Limit { largest, what, short } = added.limit(&taken).ok()?;
    Some(Error::Combine { what, short, of: added.len(), largest })
}

/// The posterior `q`, learned with `prior`, whose information beyond that prior is taken as at least 0.
///
/// A task adds the information Λ = S - S₀ to its prior N(m₀, S₀⁻¹). The curvature of a loss, or a noisy estimate of it,
/// can be negative, and then Λ < 0: the task would take away what the prior knows. Here Λ⁺ = max(Λ, 0) stands in for
/// it, and the mean m stays:
///
/// ```text
/// S⁺ = S₀ + Λ⁺            m⁺ = m
/// ```
///
/// A [`combine`] of tasks k and their prior, with weights a_k ≥ 0 and 1 - Σ a_k, then always has a precision:
///
/// ```text
/// S = S₀ + Σ a_k Λ_k⁺     S m = S₀ m₀ + Σ a_k [ Λ_k⁺ m_k + S₀ (m_k - m₀) ]
/// ```
///
/// The bracket is what task k adds to the natural parameter. The loss of a task is seen as a parabola around m_k whose
/// slope there, -S₀(m_k - m₀), is what held m_k against the prior. Where Λ_k⁺ = 0 only the slope is left: the element
/// weighs nothing, and moves as in task arithmetic. A single task of weight 1 keeps its mean, and the result is
/// continuous in S. (This is gradient matching with H_k = Λ_k⁺, see [`crate::merge`].)
///
/// * [`DiagonalGaussian`]: element by element.
/// * [`KroneckerGaussian`]: element by element in the basis, which must be the same.
/// * [`FullGaussian`]: by the eigenvalues λ of L₀⁻¹ Λ L₀⁻ᵀ = U diag(λ) Uᵀ with S₀ = L₀L₀ᵀ, the information in units of
///   the prior's: Λ⁺ = L₀ U diag(max(λ, 0)) Uᵀ L₀ᵀ, in whatever units the weights are.
///
/// Where nothing is negative, the result is `q` in every bit.
///
/// ```
/// use tch::Tensor;
/// use tch_blr::{DiagonalGaussian, Error, clamp_information, combine};
/// # fn main() -> tch_blr::Result<()> {
/// let t = |x: [f64; 2]| Tensor::from_slice(&x);
/// let q = |m, s| DiagonalGaussian::new([("w", t(m), t(s))]);
/// // In the second element both tasks have less precision than their prior.
/// let (q0, a, b) = (q([0.0, 0.0], [2.0, 2.0])?, q([1.0, 0.5], [3.0, 0.5])?, q([2.0, 0.25], [5.0, 1.0])?);
/// let e = combine(&[(1.0, &a), (1.0, &b), (-1.0, &q0)]).unwrap_err();
/// assert!(matches!(e, Error::Combine { short: 1, of: 2, largest: 0.75, .. }));
///
/// let (a, b) = (clamp_information(&a, &q0)?, clamp_information(&b, &q0)?);
/// let merged = combine(&[(1.0, &a), (1.0, &b), (-1.0, &q0)])?;
/// assert_eq!(merged.precision("w").unwrap(), t([6.0, 2.0]));
/// assert_eq!(merged.mean("w").unwrap(), t([13.0 / 6.0, 0.75]));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Different parameters, or bases that differ.
pub fn clamp_information<Q: NaturalSum>(q: &Q, prior: &Q) -> Result<Q> {
    let _no_grad = tch::no_grad_guard();
    q.clamped(prior)
}

/// By the elementwise s/s', over parameters.
fn limit<'a>(pairs: impl Iterator<Item = (&'a str, &'a Tensor, &'a Tensor)>) -> Limit {
    let mut limit = Limit { largest: f64::INFINITY, what: String::new(), short: 0 };
    for (name, s, part) in pairs {
        let ratio = s.to_kind(Kind::Double) / part.to_device(s.device()).to_kind(Kind::Double);
        limit.short += usize::try_from(ratio.le(1.0).sum(Kind::Int64).int64_value(&[])).expect("a count");
        let smallest = smallest(&ratio);
        if smallest < limit.largest {
            (limit.largest, limit.what) = (smallest, format!("parameter `{name}`"));
        }
    }
    limit
}

/// A sum that is not positive in an element.
fn not_positive(name: &str, least: f64) -> Error {
    let problem = format!("an element becomes {least:e}");
    Error::NotPositiveDefinite { what: format!("the combined precision of `{name}`"), problem }
}

/// (Σ S, Σ S m, S, m, w) → the sums with w S and w S m
struct AddNatural;

impl Elementwise for AddNatural {
    const OUTPUTS: usize = 2;
    #[inline(always)]
    fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let weighted = read(2) * read(4);
        write(0, read(0) + weighted);
        write(1, read(1) + weighted * read(3));
    }
}

/// (S, S m) → (m, S)
struct FromNatural;

impl Elementwise for FromNatural {
    const OUTPUTS: usize = 2;
    #[inline(always)]
    fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let (precision, scaled) = (read(0), read(1));
        write(0, scaled / precision);
        write(1, precision);
    }
}

impl NaturalSum for DiagonalGaussian {
    fn natural_sum(first: &Self, weighted: &[(f64, &Self)]) -> Result<Self> {
        for (_, q) in weighted {
            first.same_parameters(q)?;
        }
        // Sums with weights of both signs cancel: in f64, and rounded once at the end.
        let zeros = |e: &Entry| Tensor::f_zeros(e.mean.size(), (Kind::Double, e.mean.device()));
        let sums = first.entries.iter().map(|e| Ok([zeros(e)?, zeros(e)?])).collect::<Result<Vec<[Tensor; 2]>>>()?;
        for (w, q) in weighted {
            let terms = first.entries.iter().map(|e| {
                let other = q.entry(&e.name).expect("same_parameters() has seen to it");
                let device = e.mean.device();
                Ok([other.precision.f_to_device(device)?, other.mean.f_to_device(device)?])
            });
            let terms = terms.collect::<Result<Vec<[Tensor; 2]>>>()?;
            kernel::run(sums.iter().zip(&terms).map(|(sum, term)| {
                let inputs = sum.iter().chain(term).map(Field::Tensor).chain([Field::Number(*w)]);
                Job::new(AddNatural, inputs, sum.each_ref().map(Some))
            }))?;
        }
        for (e, [precision, _]) in first.entries.iter().zip(&sums) {
            let least = smallest(precision);
            // Written so that a NaN fails, too.
            if least.partial_cmp(&0.0) != Some(std::cmp::Ordering::Greater) {
                return Err(not_positive(&e.name, least));
            }
        }
        let like = |e: &Entry| Ok([e.mean.f_empty_like()?, e.mean.f_empty_like()?]);
        let moments = first.entries.iter().map(like).collect::<Result<Vec<[Tensor; 2]>>>()?;
        kernel::run(sums.iter().zip(&moments).map(|(sum, moments)| {
            Job::new(FromNatural, sum.each_ref().map(Field::Tensor), moments.each_ref().map(Some))
        }))?;
        // The tensors are fresh, so that nothing needs to be copied.
        let entries = first.entries.iter().zip(moments).map(|(e, [mean, precision])| (e.name.clone(), mean, precision));
        Ok(DiagonalGaussian::sharing(entries)?.with_seed(first.seed))
    }

    fn limit(&self, part: &Self) -> Result<Limit> {
        let pair = |e: &Entry| part.entry(&e.name).map(|other| &other.precision);
        let pairs = self.entries.iter().filter_map(|e| Some((e.name.as_str(), &e.precision, pair(e)?)));
        Ok(limit(pairs))
    }

    fn clamped(&self, prior: &Self) -> Result<Self> {
        self.same_parameters(prior)?;
        let entries = self.entries.iter().map(|e| {
            let least = &prior.entry(&e.name).expect("same_parameters() has seen to it").precision;
            let least = least.to_device(e.mean.device()).to_kind(e.mean.kind());
            (e.name.clone(), e.mean.copy(), e.precision.maximum(&least))
        });
        let q = DiagonalGaussian::sharing(entries)?.with_dampings(self.entries.iter().map(|e| e.damping));
        Ok(q.with_seed(self.seed))
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
        Ok(FullGaussian { parameters: first.parameters.map(Clone::clone), mean, precision, factor, seed: first.seed })
    }

    /// 1 over the largest eigenvalue of L⁻¹ S' L⁻ᵀ.
    fn limit(&self, part: &Self) -> Result<Limit> {
        let what = "the precision matrix".to_owned();
        if self.is_empty() {
            return Ok(Limit { largest: f64::INFINITY, what, short: 0 });
        }
        let ratios = self.ratio(&part.precision)?.f_linalg_eigvalsh("L")?;
        // S - wS' = L(I - wR)Lᵀ is positive definite until w reaches 1 over R's largest eigenvalue.
        let short = ratios.ge(1.0).sum(Kind::Int64).int64_value(&[]);
        Ok(Limit {
            largest: 1.0 / ratios.max().double_value(&[]),
            what,
            short: usize::try_from(short).expect("a count"),
        })
    }

    fn clamped(&self, prior: &Self) -> Result<Self> {
        self.same_parameters(prior)?;
        let with = |precision: Tensor, factor: Tensor| {
            let (parameters, mean) = (self.parameters.map(Clone::clone), self.mean.copy());
            Ok(FullGaussian { parameters, mean, precision, factor, seed: self.seed })
        };
        if !self.is_empty() {
            // L₀⁻¹ S L₀⁻ᵀ = I + U diag(λ) Uᵀ, and S⁺ adds L₀ U diag(max(-λ, 0)) Uᵀ L₀ᵀ to S.
            let (ratios, axes) = linalg::eigen(&prior.ratio(&self.precision)?)?;
            let missing = (-ratios + 1.0).clamp_min(0.0);
            // Not for zeros: a posterior that lacks nothing keeps its bits.
            if missing.max().double_value(&[]) > 0.0 {
                let out = prior.factor.f_matmul(&(axes * missing.f_sqrt()?))?.f_to_device(self.mean.device())?;
                let precision = &self.precision + out.f_matmul(&out.f_tr()?)?;
                let factor = linalg::cholesky("the precision with clamped information", &precision)?;
                return with(precision, factor);
            }
        }
        with(self.precision.copy(), self.factor.copy())
    }
}

impl FullGaussian {
    /// L⁻¹ S' L⁻ᵀ with S = L Lᵀ
    fn ratio(&self, part: &Tensor) -> Result<Tensor> {
        let half = linalg::forward(&self.factor, &part.f_to_device(self.factor.device())?)?;
        // Symmetric up to rounding, and LAPACK reads only one triangle.
        linalg::symmetric(&linalg::forward(&self.factor, &half.f_tr()?)?)
    }
}

impl KroneckerGaussian {
    /// The same parameters, in the same bases.
    fn same_bases(&self, other: &Self) -> Result<()> {
        self.same_parameters(other)?;
        for p in self.parameters.iter() {
            let other = other.parameter(&p.name).expect("same_parameters() has seen to it");
            if !same_basis(p.left.as_ref(), other.left.as_ref()) || !same_basis(p.right.as_ref(), other.right.as_ref())
            {
                return Err(Error::parameter(
                    &p.name,
                    "the bases of its precision differ, so that the result has no such form; take full() of each",
                ));
            }
        }
        Ok(())
    }
}

impl NaturalSum for KroneckerGaussian {
    fn natural_sum(first: &Self, weighted: &[(f64, &Self)]) -> Result<Self> {
        for (_, q) in weighted {
            first.same_bases(q)?;
        }
        let parameters = first.parameters.iter().map(|p| {
            // In the basis the elements are independent Gaussians.
            let mut precision = p.precision.zeros_like().to_kind(Kind::Double);
            let like = p.double();
            let mut precision_mean = like.matrix(&precision).copy();
            for (w, q) in weighted {
                let other = q.parameter(&p.name).expect("checked above").double();
                let s = other.precision.to_device(p.mean.device()) * *w;
                let mean = like.matrix(&other.mean.to_device(p.mean.device()));
                precision_mean += like.matrix(&s) * into_basis(&mean, like.left.as_ref(), like.right.as_ref())?;
                precision += s;
            }
            if smallest(&precision) <= 0.0 {
                return Err(not_positive(&p.name, smallest(&precision)));
            }
            let mean = like.out(&(precision_mean / like.matrix(&precision)))?;
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

    fn limit(&self, part: &Self) -> Result<Limit> {
        let pair = |p: &KroneckerParameter| part.parameter(&p.name).map(|other| &other.precision);
        let pairs = self.parameters.iter().filter_map(|p| Some((p.name.as_str(), &p.precision, pair(p)?)));
        Ok(limit(pairs))
    }

    fn clamped(&self, prior: &Self) -> Result<Self> {
        self.same_bases(prior)?;
        let parameters = self.parameters.iter().map(|p| {
            let least = &prior.parameter(&p.name).expect("same_bases() has seen to it").precision;
            let least = least.to_device(p.mean.device()).to_kind(p.mean.kind());
            KroneckerParameter {
                name: p.name.clone(),
                mean: p.mean.shallow_clone(),
                left: p.left.as_ref().map(Tensor::shallow_clone),
                right: p.right.as_ref().map(Tensor::shallow_clone),
                precision: p.precision.maximum(&least),
            }
        });
        Ok(Self::new(parameters)?.with_seed(self.seed))
    }
}
