//! A Gaussian with one precision matrix over all weights.

use super::DiagonalGaussian;
use super::any::{OUTSIDE_OF_TRAINING, check_sample, posterior};
use super::diagonal::Entry;
use super::in_model::{self, in_model};
use super::named::{Named, Parameter};
use super::valid::{Stored, finite_float, form, no_parameter};
use crate::kernel::{self, Draw, Field};
use crate::storage::checkpoint;
use crate::{Error, Params, Result, linalg};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::{Kind, Tensor};

/// q(θ) = N(m, P⁻¹) over all P weights of the named parameters together: the posterior of the rows with a full
/// covariance.
///
/// θ is the parameters' elements one after the other, in order, each parameter's in row-major order. Everything is held
/// and computed in f64; n weights take 16n² bytes and a factorization n³/3 operations, so this is for small models.
///
/// Samples come from a counter-based generator: sample k of one seed is always the same
/// ([`FullGaussian::with_seed`], default 0).
#[derive(Debug)]
pub struct FullGaussian {
    pub(super) parameters: Named<Placed>,
    /// `[n]`
    pub(super) mean: Tensor,
    /// P `[n, n]`
    pub(super) precision: Tensor,
    /// L with P = L Lᵀ
    pub(super) factor: Tensor,
    pub(super) seed: u64,
}

/// A parameter's place in the vector.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Placed {
    name: String,
    shape: Vec<i64>,
    /// Its first weight.
    first: i64,
    /// Number of its weights.
    weights: i64,
}

impl Parameter for Placed {
    fn name(&self) -> &str {
        &self.name
    }
    fn size(&self) -> Vec<i64> {
        self.shape.clone()
    }
}

/// Places one after the other.
fn placed(shapes: impl IntoIterator<Item = (String, Vec<i64>)>) -> Result<Named<Placed>> {
    let mut parameters = Named::new();
    let mut first = 0;
    for (name, shape) in shapes {
        let weights = shape.iter().product();
        parameters.push(Placed { name, shape, first, weights })?;
        first += weights;
    }
    Ok(parameters)
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    seed: u64,
    parameters: Vec<Saved>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    name: String,
    shape: Vec<i64>,
}

const FORM: &str = "full Gaussian posterior";

/// How far from symmetric a precision may be, relative to its largest element: rounding of products of matrices.
const ASYMMETRY: f64 = 1e-6;

posterior!(FullGaussian);

impl FullGaussian {
    /// A posterior from (name, mean) of each parameter and the precision `[n, n]` of all, which it copies in f64.
    ///
    /// # Errors
    /// No parameter, a name twice, kinds other than f32 and f64, a mean that is not finite, a precision of another
    /// shape, that is not symmetric up to rounding, or not positive definite.
    pub fn new<S: Into<String>>(means: impl IntoIterator<Item = (S, Tensor)>, precision: &Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let (mut shapes, mut parts): (Vec<(String, Vec<i64>)>, Vec<Tensor>) = (Vec::new(), Vec::new());
        for (name, mean) in means {
            let name = name.into();
            finite_float(&name, "mean", &mean)?;
            // `view` needs rows one after the other, which a transposed variable does not have.
            parts.push(mean.detach().to_kind(Kind::Double).contiguous().view([-1]));
            shapes.push((name, mean.size()));
        }
        if shapes.is_empty() {
            return Err(no_parameter());
        }
        let parameters = placed(shapes)?;
        let mean = Tensor::f_cat(&parts, 0)?;
        let n = mean.size()[0];
        if !precision.defined() || precision.size() != [n, n] {
            return Err(Error::Posterior(format!(
                "its precision is {}: expected [{n}, {n}] for {n} weights",
                form(precision)
            )));
        }
        finite_float("all", "precision", precision)?;
        let precision = precision.detach().to_kind(Kind::Double).to_device(mean.device());
        if n > 0 {
            let skew = (&precision - precision.tr()).abs().max().double_value(&[]);
            let scale = precision.abs().max().double_value(&[]);
            if skew > ASYMMETRY * scale {
                return Err(Error::Posterior(format!("its precision differs from its transpose by {skew:e}")));
            }
        }
        // The mean of both triangles, because every later use reads just one of them.
        Self::symmetric(parameters, mean, linalg::symmetric(&precision)?)
    }

    fn symmetric(parameters: Named<Placed>, mean: Tensor, precision: Tensor) -> Result<Self> {
        let factor = linalg::cholesky("the precision of the posterior", &precision)?;
        Ok(FullGaussian { parameters, mean, precision, factor, seed: 0 })
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|p| p.name.as_str())
    }

    /// Number of weights n.
    pub fn len(&self) -> usize {
        self.mean.numel()
    }

    /// First weight, number of weights and shape of one parameter.
    fn place(&self, name: &str) -> Option<(i64, i64, &[i64])> {
        self.parameters.get(name).map(|p| (p.first, p.weights, &p.shape[..]))
    }

    /// m of one parameter, in its shape.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        let (first, n, shape) = self.place(name)?;
        // A copy: a view would let its owner write into the posterior.
        Some(self.mean.narrow(0, first, n).copy().view(shape))
    }

    /// m of all weights, `[n]`.
    pub fn mean_vector(&self) -> Tensor {
        self.mean.copy()
    }

    /// The block `[k, k]` of P that belongs to one parameter of k weights: the precision of its weights if all others
    /// are known.
    pub fn precision(&self, name: &str) -> Option<Tensor> {
        let (first, n, _) = self.place(name)?;
        Some(self.precision.narrow(0, first, n).narrow(1, first, n).copy())
    }

    /// P `[n, n]`
    pub fn precision_matrix(&self) -> &Tensor {
        &self.precision
    }

    /// (P⁻¹)ᵢᵢ of the weights of one parameter, in its shape.
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let (first, n, shape) = self.place(name)?;
        let columns = Tensor::eye(self.mean.size()[0], (Kind::Double, self.mean.device())).narrow(1, first, n);
        // (P⁻¹)ᵢᵢ = ‖L⁻¹eᵢ‖²: no inverse of the whole for one parameter.
        let half = linalg::forward(&self.factor, &columns).ok()?;
        Some(half.square().sum_dim_intlist(0, false, Kind::Double).view(shape))
    }

    /// P⁻¹ `[n, n]`
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn covariance_matrix(&self) -> Result<Tensor> {
        linalg::inverse(&self.factor)
    }

    /// L with P = LLᵀ
    pub(crate) fn factor(&self) -> &Tensor {
        &self.factor
    }

    /// A vector as parameters.
    pub(crate) fn split(&self, all: &Tensor) -> Vec<(String, Tensor)> {
        let part = |p: &Placed| all.narrow(0, p.first, p.weights).copy().view(&p.shape[..]);
        self.parameters.iter().map(|p| (p.name.clone(), part(p))).collect()
    }

    /// The marginals of the single weights, N(mᵢ, (P⁻¹)ᵢᵢ): of all diagonal Gaussians this has the smallest
    /// KL(self ‖ ·). [`FullGaussian::diagonal`] has the smallest KL(· ‖ self).
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn marginals(&self) -> Result<DiagonalGaussian> {
        self.with_precisions(&self.covariance_matrix()?.f_diagonal(0, 0, 1)?.f_reciprocal()?)
    }

    /// The mean with the diagonal of the precision, N(m, diag(P₁₁, …, Pₙₙ)⁻¹): of all diagonal Gaussians q this has the
    /// smallest KL(q ‖ self), which is what mean-field inference minimizes. For q = N(μ, diag(s)⁻¹)
    ///
    /// ```text
    /// KL(q ‖ self) = ½ Σᵢ ( Pᵢᵢ/sᵢ - 1 + ln sᵢ ) + ½ (μ-m)ᵀP(μ-m) - ½ ln det P
    /// ```
    ///
    /// is least at μ = m and sᵢ = Pᵢᵢ. Pᵢᵢ is the precision of weight i if all others are known, so the variances are
    /// too small, never too large; [`FullGaussian::marginals`] has the true ones.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn diagonal(&self) -> Result<DiagonalGaussian> {
        self.with_precisions(&self.precision.f_diagonal(0, 0, 1)?)
    }

    /// The mean with these precisions `[n]`.
    fn with_precisions(&self, s: &Tensor) -> Result<DiagonalGaussian> {
        let entries = self.split(&self.mean).into_iter().zip(self.split(s));
        let entries = entries.map(|((name, mean), (_, s))| (name, mean, s));
        Ok(DiagonalGaussian::sharing(entries)?.with_seed(self.seed))
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: m + L⁻ᵀz with P = LLᵀ, in f64.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let at = Draw { step: OUTSIDE_OF_TRAINING, sample: check_sample(k)?, parameter: 0, group: 0 };
        let z = kernel::tensor(Field::Noise { seed: self.seed, at }, &self.mean)?;
        Ok(self.split(&(linalg::spread(&self.factor, &z)? + &self.mean)))
    }

    /// ln q(θ) at the current values of a model's variables: ½ ( ln det P - n ln 2π - (θ-m)ᵀP(θ-m) ), in nats.
    ///
    /// # Errors
    /// As [`FullGaussian::perturb`].
    pub fn log_prob(&self, params: impl Into<Params>) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let pairs = in_model(&Params::separate(params)?, in_model::means(self))?;
        let parts = pairs.iter().map(|(theta, _)| theta.detach().to_kind(Kind::Double).contiguous().view([-1]));
        let theta = Tensor::f_cat(&parts.collect::<Vec<_>>(), 0)?.to_device(self.mean.device());
        let n = self.len() as f64;
        Ok(0.5 * (linalg::log_det(&self.factor) - n * std::f64::consts::TAU.ln() - self.distance(&theta)?))
    }

    /// (θ-m)ᵀP(θ-m)
    fn distance(&self, theta: &Tensor) -> Result<f64> {
        // With P itself: no root or inverse is needed, and no digits are lost to one.
        let d = theta - &self.mean;
        Ok(d.f_dot(&self.precision.f_mv(&d)?)?.double_value(&[]))
    }

    /// Differential entropy ½ ( n + n ln 2π - ln det P ), in nats.
    pub fn entropy(&self) -> f64 {
        0.5 * (self.len() as f64 * (1.0 + std::f64::consts::TAU.ln()) - linalg::log_det(&self.factor))
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
        Ok(0.5 * (trace - self.len() as f64 + distance + log_det))
    }

    pub(super) fn same_parameters(&self, other: &FullGaussian) -> Result<()> {
        if self.parameters[..] == other.parameters[..] {
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

    /// Tensors `mean` `[n]` and `precision` `[n, n]`; the description lists names and shapes.
    fn write(&self, path: &Path) -> Result<()> {
        let tensors = [("mean", &self.mean), ("precision", &self.precision)];
        let tensors = tensors.map(|(name, t)| (name.to_owned(), t.shallow_clone()));
        let saved = |p: &Placed| Saved { name: p.name.clone(), shape: p.shape.clone() };
        let content = Content { seed: self.seed, parameters: self.parameters.iter().map(saved).collect() };
        checkpoint::save(path, FORM, &tensors, &content)
    }

    /// Reads what [`FullGaussian::save`] wrote, onto the CPU: tensors `mean` `[n]` and `precision` `[n, n]`, and a
    /// description with names and shapes.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (tensors, content): (_, Content) = checkpoint::load(path, FORM)?;
        let mut stored = Stored { path, tensors };
        let (mean, precision) = (stored.take("mean")?, stored.take("precision")?);
        stored.finish("part of it")?;
        // Checked arithmetic: the shapes come from a file. Two negative sizes have a product, but not a tensor.
        let weights =
            |p: &Saved| -> Option<i64> { p.shape.iter().try_fold(1i64, |n, d| n.checked_mul(*d).filter(|_| *d >= 0)) };
        let sizes = content.parameters.iter().map(weights).collect::<Option<Vec<_>>>();
        let total = sizes.as_ref().and_then(|sizes| sizes.iter().try_fold(0i64, |sum, n| sum.checked_add(*n)));
        let (Some(sizes), 1, true) = (sizes, mean.dim(), total == Some(mean.numel() as i64)) else {
            let problem = format!("has a mean of shape {:?} that does not fit its parameters", mean.size());
            return Err(Error::file(path, problem));
        };
        let parts = mean.f_split_with_sizes(&sizes, 0)?.into_iter().zip(content.parameters);
        let parts = parts.map(|(part, p)| Ok((p.name, part.f_view(&p.shape[..])?))).collect::<Result<Vec<_>>>();
        let q = parts.and_then(|parts| Self::new(parts, &precision)).map_err(|e| Error::file(path, e))?;
        Ok(q.with_seed(content.seed))
    }
}

impl DiagonalGaussian {
    /// The same Gaussian with its precision written out, in f64 and with the parameters in order: n weights take 16n²
    /// bytes.
    ///
    /// # Errors
    /// If libtorch fails, for example for want of memory.
    pub fn full(&self) -> Result<FullGaussian> {
        let _no_grad = tch::no_grad_guard();
        let flat = |t: &Tensor| t.to_kind(Kind::Double).contiguous().view([-1]);
        let join = |part: fn(&Entry) -> &Tensor| {
            Tensor::f_cat(&self.entries.iter().map(|e| flat(part(e))).collect::<Vec<_>>(), 0)
        };
        let (mean, precision) = (join(|e| &e.mean)?, join(|e| &e.precision)?);
        let parameters = placed(self.entries.iter().map(|e| (e.name.clone(), e.mean.size())))?;
        Ok(FullGaussian {
            parameters,
            mean,
            // The factor of a diagonal matrix is known: no factorization of n³/3 operations.
            factor: precision.f_sqrt()?.f_diag(0)?,
            precision: precision.f_diag(0)?,
            seed: self.seed,
        })
    }
}
