//! A Gaussian per parameter whose precision is diagonal in a Kronecker-factored basis.

use super::diagonal::{DiagonalGaussian, OUTSIDE_OF_TRAINING, form};
use super::full::FullGaussian;
use super::predictive::in_a_model;
use crate::kernel::{self, Draw, Field};
use crate::storage::checkpoint;
use crate::{Error, Params, Result, linalg};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::{Kind, Tensor};

/// q(θ) = Π N(W | M, …) over the parameters, each a matrix: the posterior of the rows that work in an eigenbasis.
///
/// A parameter of shape `[r, …]` is the matrix W `[r, c]` of its rows; one of fewer than two dimensions is a row `[1, n]`.
/// With orthogonal Q_L `[r, r]` and Q_R `[c, c]` (either may be the identity) and precisions s `[r, c]`:
///
/// ```text
/// Q_Lᵀ (W - M) Q_R has independent elements of variance 1/s
/// precision of vec(W) = (Q_L ⊗ Q_R) diag(vec s) (Q_L ⊗ Q_R)ᵀ          vec: row by row
/// ```
///
/// The matrix normal with precision A ⊗ B (K-FAC) is the case s = a bᵀ of the factors' eigenvalues
/// ([`KroneckerParameter::from_factors`]). Different parameters are independent.
///
/// Samples come from a counter-based generator: sample k of one seed is always the same
/// ([`KroneckerGaussian::with_seed`], default 0).
#[derive(Debug)]
pub struct KroneckerGaussian {
    parameters: Vec<KroneckerParameter>,
    seed: u64,
}

/// One parameter of a [`KroneckerGaussian`]. All tensors have the kind (f32 or f64) and device of the mean.
#[derive(Debug)]
pub struct KroneckerParameter {
    /// Name of the parameter.
    pub name: String,
    /// M, in the parameter's shape.
    pub mean: Tensor,
    /// Q_L `[r, r]`, orthogonal; `None` for the identity.
    pub left: Option<Tensor>,
    /// Q_R `[c, c]`, orthogonal; `None` for the identity.
    pub right: Option<Tensor>,
    /// s > 0, in the parameter's shape: the precisions in the basis.
    pub precision: Tensor,
}

/// Rows and columns of a parameter as a matrix.
pub(crate) fn matrix_shape(shape: &[i64]) -> [i64; 2] {
    match shape {
        [] => [1, 1],
        [n] => [1, *n],
        [r, rest @ ..] => [*r, rest.iter().product()],
    }
}

/// Q_L X Q_Rᵀ: from the basis to the weights.
pub(crate) fn out_of_basis(x: &Tensor, left: Option<&Tensor>, right: Option<&Tensor>) -> Result<Tensor> {
    let x = left.map_or_else(|| Ok(x.shallow_clone()), |q| q.f_matmul(x))?;
    Ok(right.map_or_else(|| Ok(x.shallow_clone()), |q| x.f_matmul(&q.f_tr()?))?)
}

/// Q_Lᵀ X Q_R: from the weights to the basis.
pub(crate) fn into_basis(x: &Tensor, left: Option<&Tensor>, right: Option<&Tensor>) -> Result<Tensor> {
    let x = left.map_or_else(|| Ok(x.shallow_clone()), |q| q.f_tr()?.f_matmul(x))?;
    Ok(right.map_or_else(|| Ok(x.shallow_clone()), |q| x.f_matmul(q))?)
}

impl KroneckerParameter {
    /// The matrix normal N(M, (A ⊗ B)⁻¹): row precision A `[r, r]` and column precision B `[c, c]`, both symmetric and
    /// positive definite.
    ///
    /// # Errors
    /// Factors of another shape or kind, not finite, or not positive definite.
    pub fn from_factors(name: impl Into<String>, mean: Tensor, a: &Tensor, b: &Tensor) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let name = name.into();
        let [r, c] = matrix_shape(&mean.size());
        let eigen = |what: &str, x: &Tensor, n: i64| {
            let like = |t: &Tensor| (t.size(), t.kind(), t.device());
            if !x.defined() || like(x) != (vec![n, n], mean.kind(), mean.device()) {
                let expected = format!("{:?} [{n}, {n}] on {:?}", mean.kind(), mean.device());
                return Err(Error::parameter(&name, format!("its {what} factor is {}: expected {expected}", form(x))));
            }
            if let Some(value) = kernel::first_non_finite(x) {
                return Err(Error::parameter(&name, format!("its {what} factor is not finite ({value})")));
            }
            let (values, vectors) = linalg::eigen(x)?;
            let smallest = if n > 0 { values.min().double_value(&[]) } else { 1.0 };
            if smallest <= 0.0 {
                let what = format!("the {what} factor of `{name}`");
                return Err(Error::NotPositiveDefinite { what, problem: format!("an eigenvalue is {smallest:e}") });
            }
            Ok((values, vectors))
        };
        let ((a, left), (b, right)) = (eigen("left", a, r)?, eigen("right", b, c)?);
        let precision = a.f_outer(&b)?.f_reshape(mean.size())?;
        Ok(KroneckerParameter { name, mean, left: Some(left), right: Some(right), precision })
    }

    /// X `[r, c]` of a tensor of the parameter's shape.
    fn matrix(x: &Tensor) -> Tensor {
        x.reshape(matrix_shape(&x.size()))
    }

    /// Q_L X Q_Rᵀ in the parameter's shape.
    fn out(&self, x: &Tensor) -> Result<Tensor> {
        let x = out_of_basis(&Self::matrix(x), self.left.as_ref(), self.right.as_ref())?;
        Ok(x.f_reshape(self.mean.size())?)
    }

    /// All in f64, for sums.
    fn double(&self) -> Self {
        let wide = |t: &Tensor| t.to_kind(Kind::Double);
        KroneckerParameter {
            name: self.name.clone(),
            mean: wide(&self.mean),
            left: self.left.as_ref().map(wide),
            right: self.right.as_ref().map(wide),
            precision: wide(&self.precision),
        }
    }

    fn squared(q: Option<&Tensor>) -> Option<Tensor> {
        q.map(Tensor::square)
    }

    fn owned(self) -> Result<Self> {
        let KroneckerParameter { name, mean, left, right, precision } = self;
        let refuse = |problem: String| Err(Error::parameter(&name, problem));
        if !mean.defined() || !matches!(mean.kind(), Kind::Float | Kind::Double) {
            return refuse(format!("its mean is {}: expected f32 or f64", form(&mean)));
        }
        let shape = mean.size();
        let [r, c] = matrix_shape(&shape);
        let bases = [("left basis", left.as_ref(), r), ("right basis", right.as_ref(), c)];
        let bases = bases.map(|(what, q, n)| (what, q, vec![n, n]));
        let tensors = [("mean", Some(&mean), shape.clone()), ("precision", Some(&precision), shape)];
        for (what, t, size) in tensors.into_iter().chain(bases) {
            let Some(t) = t else { continue };
            if !t.defined() || (t.size(), t.kind(), t.device()) != (size.clone(), mean.kind(), mean.device()) {
                let expected = format!("{:?} {size:?} on {:?}", mean.kind(), mean.device());
                return refuse(format!("its {what} is {}: expected {expected}", form(t)));
            }
            if let Some(value) = kernel::first_non_finite(t) {
                return refuse(format!("its {what} is not finite ({value})"));
            }
        }
        if precision.numel() > 0 && precision.min().double_value(&[]) <= 0.0 {
            let smallest = precision.min().double_value(&[]);
            return refuse(format!("its smallest precision is {smallest:e}: expected a number > 0"));
        }
        for (what, q) in [("left basis", &left), ("right basis", &right)] {
            let Some(q) = q.as_ref().filter(|q| q.numel() > 0) else { continue };
            let wide = q.to_kind(Kind::Double);
            let identity = Tensor::eye(q.size()[0], (Kind::Double, q.device()));
            let error = (wide.tr().matmul(&wide) - identity).abs().max().double_value(&[]);
            // Rounding of a QR or eigenvalue decomposition, with room for large matrices.
            if error > if q.kind() == Kind::Double { 1e-9 } else { 1e-3 } {
                return refuse(format!("its {what} is not orthogonal: QᵀQ differs from the identity by {error:e}"));
            }
        }
        let own = |t: Tensor| t.detach().copy();
        let (left, right) = (left.map(own), right.map(own));
        Ok(KroneckerParameter { name, mean: own(mean), left, right, precision: own(precision) })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    seed: u64,
    /// In order; the file sorts its tensors.
    parameters: Vec<Saved>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    name: String,
    /// Whether the file has Q_L.
    left: bool,
    /// Whether the file has Q_R.
    right: bool,
}

const FORM: &str = "Kronecker Gaussian posterior";

in_a_model!(KroneckerGaussian);

impl KroneckerGaussian {
    /// A posterior from its parameters, whose tensors it copies.
    ///
    /// # Errors
    /// No parameter, a name twice, shapes or kinds that do not fit, elements that are not finite, precisions that are not
    /// positive, a basis that is not orthogonal.
    pub fn new(parameters: impl IntoIterator<Item = KroneckerParameter>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let mut q = KroneckerGaussian { parameters: Vec::new(), seed: 0 };
        for parameter in parameters {
            if q.parameter(&parameter.name).is_some() {
                return Err(Error::parameter(&parameter.name, "it is given twice"));
            }
            q.parameters.push(parameter.owned()?);
        }
        if q.parameters.is_empty() {
            return Err(Error::Posterior("it has no parameter".to_owned()));
        }
        Ok(q)
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|p| p.name.as_str())
    }

    /// Number of weights.
    pub fn weights(&self) -> usize {
        self.parameters.iter().map(|p| p.mean.numel()).sum()
    }

    /// Mean, basis and precisions of one parameter.
    pub fn parameter(&self, name: &str) -> Option<&KroneckerParameter> {
        self.parameters.iter().find(|p| p.name == name)
    }

    /// M of one parameter.
    pub fn mean(&self, name: &str) -> Option<&Tensor> {
        self.parameter(name).map(|p| &p.mean)
    }

    fn means(&self) -> Vec<(String, Tensor)> {
        self.parameters.iter().map(|p| (p.name.clone(), p.mean.shallow_clone())).collect()
    }

    /// Variances of the single weights of one parameter, in its shape: Q_L² (1/s) (Q_R²)ᵀ with elementwise squares.
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let p = self.parameter(name)?;
        let squares = [&p.left, &p.right].map(|q| KroneckerParameter::squared(q.as_ref()));
        let s = KroneckerParameter::matrix(&p.precision).reciprocal();
        let [left, right] = &squares;
        Some(out_of_basis(&s, left.as_ref(), right.as_ref()).ok()?.reshape(p.mean.size()))
    }

    /// The marginals of the single weights.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn marginals(&self) -> Result<DiagonalGaussian> {
        let entry = |p: &KroneckerParameter| {
            let variance = self.variance(&p.name).ok_or_else(|| Error::parameter(&p.name, "it has no variance"))?;
            Ok((p.name.clone(), p.mean.copy(), variance.reciprocal()))
        };
        let entries = self.parameters.iter().map(entry).collect::<Result<Vec<_>>>()?;
        Ok(DiagonalGaussian::sharing(entries)?.with_seed(self.seed))
    }

    /// The same Gaussian with its precision written out, in f64: for divergences and sums, [`FullGaussian::kl`] and
    /// [`FullGaussian::combine`].
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn to_full(&self) -> Result<FullGaussian> {
        let _no_grad = tch::no_grad_guard();
        let blocks = self.parameters.iter().map(|p| {
            let p = p.double();
            let [r, c] = matrix_shape(&p.mean.size());
            let basis = |q: &Option<Tensor>, n| {
                q.as_ref().map_or_else(|| Tensor::eye(n, (Kind::Double, p.mean.device())), Tensor::shallow_clone)
            };
            let q = basis(&p.left, r).f_kron(&basis(&p.right, c))?;
            Ok((&q * p.precision.view([1, -1])).f_matmul(&q.f_tr()?)?)
        });
        let precision = Tensor::f_block_diag(&blocks.collect::<Result<Vec<_>>>()?)?;
        Ok(FullGaussian::new(self.means(), &precision)?.with_seed(self.seed))
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: M + Q_L (z/√s) Q_Rᵀ, in the shape and kind of the mean.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let mut group = 0;
        let sample = |(parameter, p): (usize, &KroneckerParameter)| {
            let at = Draw { step: OUTSIDE_OF_TRAINING, sample: k, parameter, group };
            group += kernel::groups(p.mean.numel());
            let z = kernel::tensor(Field::Noise { seed: self.seed, at }, &p.precision);
            Ok((p.name.clone(), p.out(&(z / p.precision.sqrt()))? + &p.mean))
        };
        self.parameters.iter().enumerate().map(sample).collect()
    }

    /// ln q(θ) at the current values of a model's variables: ½ Σ ( ln s - ln 2π - s x² ) with x = Q_Lᵀ(W-M)Q_R, in nats,
    /// summed in f64.
    ///
    /// # Errors
    /// As [`KroneckerGaussian::perturb`].
    pub fn log_prob(&self, params: impl Into<Params>) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let pairs = DiagonalGaussian::in_model(&params.into(), self.means())?;
        let mut total = 0.0;
        for (p, (theta, _)) in self.parameters.iter().zip(pairs) {
            let p = p.double();
            let d = theta.detach().to_kind(Kind::Double).to_device(p.mean.device()) - &p.mean;
            let x = into_basis(&KroneckerParameter::matrix(&d), p.left.as_ref(), p.right.as_ref())?;
            let s = KroneckerParameter::matrix(&p.precision);
            let terms = s.log() - std::f64::consts::TAU.ln() - s * x.square();
            total += terms.sum(Kind::Double).double_value(&[]);
        }
        Ok(0.5 * total)
    }

    /// Differential entropy ½ Σ ( 1 + ln 2π - ln s ), in nats.
    pub fn entropy(&self) -> f64 {
        let constant = 1.0 + std::f64::consts::TAU.ln();
        let of = |p: &KroneckerParameter| (-p.precision.to_kind(Kind::Double).log() + constant).sum(Kind::Double);
        0.5 * self.parameters.iter().map(|p| of(p).double_value(&[])).sum::<f64>()
    }

    /// Adds natural parameters with weights, as [`combine`](crate::combine) does for diagonal posteriors. Only posteriors in
    /// the same bases have a sum of this form: for others, [`KroneckerGaussian::to_full`] and [`FullGaussian::combine`].
    /// Computed in f64, returned in the kind, order and seed of the first.
    ///
    /// # Errors
    /// No posterior, different parameters or bases, a weight that is not finite, a sum that is not positive definite.
    pub fn combine(weighted: &[(f64, &KroneckerGaussian)]) -> Result<KroneckerGaussian> {
        let _no_grad = tch::no_grad_guard();
        let Some((_, first)) = weighted.first() else {
            return Err(Error::Posterior("combine needs at least one".to_owned()));
        };
        for (w, q) in weighted {
            if !w.is_finite() {
                return Err(Error::Posterior(format!("the weight {w} is not finite")));
            }
            if let Some(p) = q.parameters.iter().find(|p| first.parameter(&p.name).is_none()) {
                return Err(Error::parameter(&p.name, "one posterior has it and the other has not"));
            }
            for p in &first.parameters {
                let other = q.parameter(&p.name);
                let other =
                    other.ok_or_else(|| Error::parameter(&p.name, "one posterior has it and the other has not"))?;
                if p.mean.size() != other.mean.size() {
                    let problem = format!("shapes {:?} and {:?} differ", p.mean.size(), other.mean.size());
                    return Err(Error::parameter(&p.name, problem));
                }
                let same = |a: &Option<Tensor>, b: &Option<Tensor>| match (a, b) {
                    (None, None) => true,
                    (Some(a), Some(b)) => a.to_kind(Kind::Double).equal(&b.to_device(a.device()).to_kind(Kind::Double)),
                    _ => false,
                };
                if !same(&p.left, &other.left) || !same(&p.right, &other.right) {
                    return Err(Error::parameter(
                        &p.name,
                        "the bases of its precision differ, so that the sum has no such form; combine to_full() of each",
                    ));
                }
            }
        }
        let parameters = first.parameters.iter().map(|p| {
            // In the basis every element is a Gaussian of its own.
            let mut precision = p.precision.zeros_like().to_kind(Kind::Double);
            let mut precision_mean = KroneckerParameter::matrix(&precision).copy();
            let like = p.double();
            for (w, q) in weighted {
                let other = q.parameter(&p.name).expect("checked above").double();
                let s = other.precision.to_device(p.mean.device()) * *w;
                let mean = KroneckerParameter::matrix(&other.mean.to_device(p.mean.device()));
                let mean = into_basis(&mean, like.left.as_ref(), like.right.as_ref())?;
                precision_mean += KroneckerParameter::matrix(&s) * mean;
                precision += s;
            }
            if precision.numel() > 0 && precision.min().double_value(&[]) <= 0.0 {
                let problem = format!("an element in the basis becomes {:e}", precision.min().double_value(&[]));
                let what = format!("the combined precision of `{}`", p.name);
                return Err(Error::NotPositiveDefinite { what, problem });
            }
            let mean = like.out(&(precision_mean / KroneckerParameter::matrix(&precision)))?;
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

    /// Writes one safetensors file: tensor `<name>` is M, `<name>.precision` s, `<name>.left` and `<name>.right` the bases
    /// that are not the identity. The file is replaced atomically.
    ///
    /// # Errors
    /// If the file cannot be written, or two tensors would have one name.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        let mut parameters = Vec::new();
        for p in &self.parameters {
            let parts = [("", Some(&p.mean)), (".precision", Some(&p.precision))];
            let bases = [(".left", p.left.as_ref()), (".right", p.right.as_ref())];
            for (suffix, t) in parts.into_iter().chain(bases) {
                let Some(t) = t else { continue };
                let name = format!("{}{suffix}", p.name);
                if tensors.iter().any(|(other, _)| *other == name) {
                    return Err(Error::parameter(
                        &p.name,
                        format!("two tensors would have the name `{name}` in the file"),
                    ));
                }
                tensors.push((name, t.shallow_clone()));
            }
            parameters.push(Saved { name: p.name.clone(), left: p.left.is_some(), right: p.right.is_some() });
        }
        checkpoint::save(path.as_ref(), FORM, &tensors, &Content { seed: self.seed, parameters })
    }

    /// Reads what [`KroneckerGaussian::save`] wrote, onto the CPU.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (mut tensors, content): (_, Content) = checkpoint::load(path, FORM)?;
        let mut take =
            |name: String| tensors.remove(&name).ok_or_else(|| Error::file(path, format!("has no tensor `{name}`")));
        let mut parameters = Vec::new();
        for Saved { name, left, right } in content.parameters {
            let mut basis = |there: bool, side: &str| there.then(|| take(format!("{name}.{side}"))).transpose();
            let (left, right) = (basis(left, "left")?, basis(right, "right")?);
            let (mean, precision) = (take(name.clone())?, take(format!("{name}.precision"))?);
            parameters.push(KroneckerParameter { name, mean, left, right, precision });
        }
        if let Some(extra) = tensors.keys().next() {
            return Err(Error::file(path, format!("has a tensor `{extra}` that belongs to no parameter")));
        }
        Ok(Self::new(parameters).map_err(|e| Error::file(path, e))?.with_seed(content.seed))
    }
}
