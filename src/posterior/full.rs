//! A Gaussian with one precision matrix over all weights.

use super::diagonal::{DiagonalGaussian, OUTSIDE_OF_TRAINING, form};
use super::predictive::in_a_model;
use crate::kernel::{self, Draw, Field};
use crate::storage::checkpoint;
use crate::{Error, Params, Result, linalg};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::{Kind, Tensor};

/// q(θ) = N(m, P⁻¹) over all P weights of the named parameters together: the posterior of the rows with a full covariance.
///
/// θ is the parameters' elements one after the other, in order, each parameter's in row-major order. Everything is held
/// and computed in f64; n weights take 16n² bytes and a factorization n³/3 operations, so this is for small models.
///
/// Samples come from a counter-based generator: sample k of one seed is always the same
/// ([`FullGaussian::with_seed`], default 0).
#[derive(Debug)]
pub struct FullGaussian {
    parameters: Vec<Named>,
    /// `[n]`
    mean: Tensor,
    /// P `[n, n]`
    precision: Tensor,
    /// L with P = L Lᵀ
    factor: Tensor,
    seed: u64,
}

/// A parameter's place in the vector.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    name: String,
    shape: Vec<i64>,
}

impl Named {
    fn weights(&self) -> i64 {
        self.shape.iter().product()
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    seed: u64,
    parameters: Vec<Named>,
}

const FORM: &str = "full Gaussian posterior";

/// How far from symmetric a precision may be, relative to its largest element: rounding of products of matrices.
const ASYMMETRY: f64 = 1e-6;

in_a_model!(FullGaussian);

impl FullGaussian {
    /// A posterior from (name, mean) of each parameter and the precision `[n, n]` of all, which it copies in f64.
    ///
    /// # Errors
    /// No parameter, a name twice, kinds other than f32 and f64, a mean that is not finite, a precision of another shape,
    /// that is not symmetric up to rounding, or not positive definite.
    pub fn new<S: Into<String>>(means: impl IntoIterator<Item = (S, Tensor)>, precision: &Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let (mut parameters, mut parts): (Vec<Named>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for (name, mean) in means {
            let name = name.into();
            if parameters.iter().any(|p| p.name == name) {
                return Err(Error::parameter(&name, "it is given twice"));
            }
            check(&name, "mean", &mean)?;
            parts.push(mean.detach().to_kind(Kind::Double).contiguous().view([-1]));
            parameters.push(Named { name, shape: mean.size() });
        }
        if parameters.is_empty() {
            return Err(Error::Posterior("it has no parameter".to_owned()));
        }
        let mean = Tensor::f_cat(&parts, 0)?;
        let n = mean.size()[0];
        if !precision.defined() || precision.size() != [n, n] {
            return Err(Error::Posterior(format!(
                "its precision is {}: expected [{n}, {n}] for {n} weights",
                form(precision)
            )));
        }
        check("all", "precision", precision)?;
        let precision = precision.detach().to_kind(Kind::Double).to_device(mean.device());
        if n > 0 {
            let skew = (&precision - precision.tr()).abs().max().double_value(&[]);
            let scale = precision.abs().max().double_value(&[]);
            if skew > ASYMMETRY * scale {
                return Err(Error::Posterior(format!("its precision differs from its transpose by {skew:e}")));
            }
        }
        Self::symmetric(parameters, mean, linalg::symmetric(&precision)?)
    }

    fn symmetric(parameters: Vec<Named>, mean: Tensor, precision: Tensor) -> Result<Self> {
        let factor = linalg::cholesky("the precision of the posterior", &precision)?;
        Ok(FullGaussian { parameters, mean, precision, factor, seed: 0 })
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|p| p.name.as_str())
    }

    /// Number of weights n.
    pub fn weights(&self) -> usize {
        self.mean.numel()
    }

    /// m of one parameter, in its shape.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.means().into_iter().find_map(|(n, mean)| (n == name).then_some(mean))
    }

    /// m of all weights, `[n]`.
    pub fn mean_vector(&self) -> Tensor {
        self.mean.copy()
    }

    /// P `[n, n]`
    pub fn precision(&self) -> &Tensor {
        &self.precision
    }

    /// P⁻¹ `[n, n]`
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn covariance(&self) -> Result<Tensor> {
        linalg::inverse(&self.factor)
    }

    /// L with P = LLᵀ
    pub(super) fn factor(&self) -> &Tensor {
        &self.factor
    }

    fn means(&self) -> Vec<(String, Tensor)> {
        self.split(&self.mean)
    }

    /// A vector as parameters.
    pub(super) fn split(&self, all: &Tensor) -> Vec<(String, Tensor)> {
        let mut first = 0;
        let parts = self.parameters.iter().map(|p| {
            let part = all.narrow(0, first, p.weights()).copy().view(&p.shape[..]);
            first += p.weights();
            (p.name.clone(), part)
        });
        parts.collect()
    }

    /// The marginals of the single weights, N(mᵢ, (P⁻¹)ᵢᵢ).
    ///
    /// Of all diagonal Gaussians this has the smallest KL(self ‖ ·); the diagonal of P instead, which mean-field inference
    /// finds, has the smallest KL(· ‖ self).
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn marginals(&self) -> Result<DiagonalGaussian> {
        let precision = self.split(&self.covariance()?.f_diagonal(0, 0, 1)?.f_reciprocal()?);
        let entries = self.means().into_iter().zip(precision).map(|((name, mean), (_, s))| (name, mean, s));
        Ok(DiagonalGaussian::sharing(entries)?.with_seed(self.seed))
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: m + L⁻ᵀz with P = LLᵀ, in f64.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let at = Draw { step: OUTSIDE_OF_TRAINING, sample: k, parameter: 0, group: 0 };
        let z = kernel::tensor(Field::Noise { seed: self.seed, at }, &self.mean);
        Ok(self.split(&(linalg::spread(&self.factor, &z)? + &self.mean)))
    }

    /// ln q(θ) at the current values of a model's variables: ½ ( ln det P - n ln 2π - (θ-m)ᵀP(θ-m) ), in nats.
    ///
    /// # Errors
    /// As [`FullGaussian::perturb`].
    pub fn log_prob(&self, params: impl Into<Params>) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let pairs = DiagonalGaussian::in_model(&params.into(), self.means())?;
        let parts = pairs.iter().map(|(theta, _)| theta.detach().to_kind(Kind::Double).contiguous().view([-1]));
        let theta = Tensor::f_cat(&parts.collect::<Vec<_>>(), 0)?.to_device(self.mean.device());
        let n = self.weights() as f64;
        Ok(0.5 * (linalg::log_det(&self.factor) - n * std::f64::consts::TAU.ln() - self.distance(&theta)?))
    }

    /// (θ-m)ᵀP(θ-m)
    fn distance(&self, theta: &Tensor) -> Result<f64> {
        let d = theta - &self.mean;
        Ok(d.f_dot(&self.precision.f_mv(&d)?)?.double_value(&[]))
    }

    /// Differential entropy ½ ( n + n ln 2π - ln det P ), in nats.
    pub fn entropy(&self) -> f64 {
        0.5 * (self.weights() as f64 * (1.0 + std::f64::consts::TAU.ln()) - linalg::log_det(&self.factor))
    }

    /// KL(self ‖ p) = ½ ( tr(P_p P⁻¹) - n + (m-m_p)ᵀP_p(m-m_p) + ln det P - ln det P_p ), in nats.
    ///
    /// # Errors
    /// If the two do not have the same parameters in the same order.
    pub fn kl(&self, p: &FullGaussian) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        self.same_parameters(p)?;
        let device = p.mean.device();
        // tr(P_p P⁻¹) = ‖L⁻¹L_p‖²
        let ratio = linalg::forward(&self.factor.to_device(device), &p.factor)?;
        let trace = ratio.f_square()?.f_sum(Kind::Double)?.double_value(&[]);
        let distance = p.distance(&self.mean.to_device(device))?;
        let log_det = linalg::log_det(&self.factor) - linalg::log_det(&p.factor);
        Ok(0.5 * (trace - self.weights() as f64 + distance + log_det))
    }

    fn same_parameters(&self, other: &FullGaussian) -> Result<()> {
        if self.parameters == other.parameters {
            return Ok(());
        }
        let list = |q: &FullGaussian| {
            let each = q.parameters.iter().map(|p| format!("{} {:?}", p.name, p.shape));
            each.collect::<Vec<_>>().join(", ")
        };
        Err(Error::Posterior(format!(
            "the parameters differ: ({}) and ({}); they must be the same in the same order",
            list(self),
            list(other)
        )))
    }

    /// Adds natural parameters with weights, as [`combine`](crate::combine) does for diagonal posteriors:
    /// P = Σ wₖPₖ, Pm = Σ wₖPₖmₖ. Has the seed of the first.
    ///
    /// # Errors
    /// No posterior, different parameters, a weight that is not finite, a sum that is not positive definite.
    pub fn combine(weighted: &[(f64, &FullGaussian)]) -> Result<FullGaussian> {
        let _no_grad = tch::no_grad_guard();
        let Some((_, first)) = weighted.first() else {
            return Err(Error::Posterior("combine needs at least one".to_owned()));
        };
        let mut precision = first.precision.zeros_like();
        let mut precision_mean = first.mean.zeros_like();
        for (w, q) in weighted {
            first.same_parameters(q)?;
            if !w.is_finite() {
                return Err(Error::Posterior(format!("the weight {w} is not finite")));
            }
            let scaled = q.precision.to_device(first.mean.device()) * *w;
            precision_mean += scaled.f_mv(&q.mean.to_device(first.mean.device()))?;
            precision += scaled;
        }
        let factor = linalg::cholesky("the combined precision", &precision)?;
        let mean = linalg::solve(&factor, &precision_mean)?;
        Ok(FullGaussian { parameters: first.parameters.clone(), mean, precision, factor, seed: first.seed })
    }

    /// Writes one safetensors file with the tensors `mean` `[n]` and `precision` `[n, n]`; its description lists names and
    /// shapes. The file is replaced atomically.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let tensors = [("mean", &self.mean), ("precision", &self.precision)];
        let tensors = tensors.map(|(name, t)| (name.to_owned(), t.shallow_clone()));
        let content = Content { seed: self.seed, parameters: self.parameters.clone() };
        checkpoint::save(path.as_ref(), FORM, &tensors, &content)
    }

    /// Reads what [`FullGaussian::save`] wrote, onto the CPU.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (mut tensors, content): (_, Content) = checkpoint::load(path, FORM)?;
        let mut take =
            |name: &str| tensors.remove(name).ok_or_else(|| Error::file(path, format!("has no tensor `{name}`")));
        let (mean, precision) = (take("mean")?, take("precision")?);
        if let Some(extra) = tensors.keys().next() {
            return Err(Error::file(path, format!("has a tensor `{extra}` that does not belong to it")));
        }
        let sizes = content.parameters.iter().map(|p| p.shape.iter().try_fold(1i64, |n, d| n.checked_mul(*d)));
        let sizes = sizes.map(|n| n.filter(|n| *n >= 0)).collect::<Option<Vec<_>>>();
        let total = sizes.and_then(|sizes| sizes.into_iter().try_fold(0i64, i64::checked_add));
        if mean.dim() != 1 || total != Some(mean.numel() as i64) {
            let problem = format!("has a mean of shape {:?} that does not fit its parameters", mean.size());
            return Err(Error::file(path, problem));
        }
        let mut first = 0;
        let parts = content.parameters.iter().map(|p| {
            let part = mean.narrow(0, first, p.weights()).view(&p.shape[..]);
            first += p.weights();
            (p.name.clone(), part)
        });
        let q = Self::new(parts.collect::<Vec<_>>(), &precision).map_err(|e| Error::file(path, e))?;
        Ok(q.with_seed(content.seed))
    }
}

/// f32 or f64, and finite.
fn check(name: &str, what: &str, t: &Tensor) -> Result<()> {
    if !t.defined() || !matches!(t.kind(), Kind::Float | Kind::Double) {
        return Err(Error::parameter(name, format!("its {what} is {}: expected f32 or f64", form(t))));
    }
    kernel::first_non_finite(t)
        .map_or(Ok(()), |value| Err(Error::parameter(name, format!("its {what} is not finite ({value})"))))
}

/// With the diagonal matrix of its precisions.
impl From<&DiagonalGaussian> for FullGaussian {
    fn from(q: &DiagonalGaussian) -> Self {
        let _no_grad = tch::no_grad_guard();
        let names: Vec<String> = q.names().map(str::to_owned).collect();
        let entries: Vec<_> = names.iter().filter_map(|name| q.entry(name)).collect();
        let flat = |t: &Tensor| t.to_kind(Kind::Double).contiguous().view([-1]);
        let join = |part: fn(&super::diagonal::Entry) -> &Tensor| {
            Tensor::cat(&entries.iter().map(|e| flat(part(e))).collect::<Vec<_>>(), 0)
        };
        let (mean, precision) = (join(|e| &e.mean), join(|e| &e.precision));
        let parameters = entries.iter().map(|e| Named { name: e.name.clone(), shape: e.mean.size() });
        FullGaussian {
            parameters: parameters.collect(),
            mean,
            factor: precision.sqrt().diag(0),
            precision: precision.diag(0),
            seed: q.seed(),
        }
    }
}
