//! A Gaussian per parameter whose precision is diagonal in a Kronecker-factored basis.

use super::any::{OUTSIDE_OF_TRAINING, check_sample, posterior};
use super::in_model::{self, in_model};
use super::named::{Named, Parameter};
use super::valid::{Stored, no_parameter};
use super::{BlockPrecision, DiagonalGaussian, FullGaussian, KroneckerParameter};
use crate::kernel::{self, Draw, Field};
use crate::linalg::into_basis;
use crate::storage::checkpoint;
use crate::{Error, Params, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::{Kind, Tensor};

/// q(θ) = Π N(W | M, …) over the parameters, each a matrix: the posterior of the rows that work in an eigenbasis.
///
/// A parameter of shape `[r, …]` is the matrix W `[r, c]` of its rows, or of its first few dimensions together
/// ([`KroneckerParameter`]); one of fewer than two dimensions is a row `[1, n]`. With orthogonal Q_L `[r, r]` and Q_R
/// `[c, c]` (either may be the identity) and precisions s `[r, c]`:
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
    pub(super) parameters: Named<KroneckerParameter>,
    pub(super) seed: u64,
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

impl Parameter for KroneckerParameter {
    fn name(&self) -> &str {
        &self.name
    }
    fn size(&self) -> Vec<i64> {
        self.mean.size()
    }
}

const FORM: &str = "Kronecker Gaussian posterior";

posterior!(KroneckerGaussian);

impl KroneckerGaussian {
    /// A posterior from its parameters, whose tensors it copies.
    ///
    /// # Errors
    /// No parameter, a name twice, shapes or kinds that do not fit, elements that are not finite, precisions that are
    /// not positive, a basis that is not orthogonal.
    pub fn new(parameters: impl IntoIterator<Item = KroneckerParameter>) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let mut q = KroneckerGaussian { parameters: Named::new(), seed: 0 };
        for parameter in parameters {
            q.parameters.push(parameter.owned()?)?;
        }
        if q.parameters.is_empty() {
            return Err(no_parameter());
        }
        Ok(q)
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|p| p.name.as_str())
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.parameters.iter().map(|p| p.mean.numel()).sum()
    }

    /// Mean, basis and precisions of one parameter.
    pub fn parameter(&self, name: &str) -> Option<&KroneckerParameter> {
        self.parameters.get(name)
    }

    /// M of one parameter, the posterior's own tensor: copy it before you write to it.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.parameter(name).map(|p| p.mean.shallow_clone())
    }

    /// s of one parameter, in its shape: the precisions in the basis that [`KroneckerGaussian::parameter`] has, not
    /// those of the weights. The posterior's own tensor, as [`KroneckerGaussian::mean`].
    pub fn precision(&self, name: &str) -> Option<Tensor> {
        self.parameter(name).map(|p| p.precision.shallow_clone())
    }

    /// Variances of the single weights of one parameter, in its shape: (Q_L∘Q_L) (1/s) (Q_R∘Q_R)ᵀ.
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let p = self.parameter(name)?;
        // The covariance has the same basis, with 1/s in place of s.
        let covariance = BlockPrecision { precision: p.matrix(&p.precision).reciprocal(), ..p.block() };
        Some(covariance.diagonal_in(None, None).ok()?.reshape(p.mean.size()))
    }

    /// What a prior needs of one parameter as a matrix, and its mean.
    pub(crate) fn block(&self, name: &str) -> Option<(Tensor, BlockPrecision)> {
        self.parameter(name).map(|p| (p.matrix(&p.mean), p.block()))
    }

    /// The marginals of the single weights: of all diagonal Gaussians this has the smallest KL(self ‖ ·).
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

    /// The mean with the diagonal of the precision, s' = (Q_L∘Q_L) s (Q_R∘Q_R)ᵀ: of all diagonal Gaussians this has the
    /// smallest KL(· ‖ self), as [`FullGaussian::diagonal`] of the whole. Computed in f64, returned in the kind of the
    /// mean.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn diagonal(&self) -> Result<DiagonalGaussian> {
        let _no_grad = tch::no_grad_guard();
        let entry = |p: &KroneckerParameter| {
            let s = p.double().block().diagonal_in(None, None)?.f_reshape(p.mean.size())?;
            Ok((p.name.clone(), p.mean.copy(), s.to_kind(p.mean.kind())))
        };
        let entries = self.parameters.iter().map(entry).collect::<Result<Vec<_>>>()?;
        Ok(DiagonalGaussian::sharing(entries)?.with_seed(self.seed))
    }

    /// The same Gaussian with its precision written out, in f64 and with the parameters in order: n weights take 16n²
    /// bytes.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn full(&self) -> Result<FullGaussian> {
        let _no_grad = tch::no_grad_guard();
        let blocks = self.parameters.iter().map(|p| {
            let p = p.double();
            let [r, c] = p.sides();
            let basis = |q: &Option<Tensor>, n| {
                q.as_ref().map_or_else(|| Tensor::eye(n, (Kind::Double, p.mean.device())), Tensor::shallow_clone)
            };
            // Eigenvectors come column by column, and libtorch's product wants both row by row.
            let q = basis(&p.left, r).f_contiguous()?.f_kron(&basis(&p.right, c).f_contiguous()?)?;
            Ok((&q * p.precision.view([1, -1])).f_matmul(&q.f_tr()?)?)
        });
        let precision = Tensor::f_block_diag(&blocks.collect::<Result<Vec<_>>>()?)?;
        Ok(FullGaussian::new(in_model::means(self), &precision)?.with_seed(self.seed))
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: M + Q_L (z/√s) Q_Rᵀ, in the shape and kind of the mean.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let k = check_sample(k)?;
        let mut group = 0;
        let sample = |(parameter, p): (usize, &KroneckerParameter)| {
            let at = Draw { step: OUTSIDE_OF_TRAINING, sample: k, parameter, group };
            group += kernel::groups(p.mean.numel());
            // Normals in the basis: rotated, they would be normals again, but the variances belong to the basis.
            let z = kernel::tensor(Field::Noise { seed: self.seed, at }, &p.precision)?;
            Ok((p.name.clone(), p.out(&(z / p.precision.sqrt()))? + &p.mean))
        };
        self.parameters.iter().enumerate().map(sample).collect()
    }

    /// ln q(θ) at the current values of a model's variables: ½ Σ ( ln s - ln 2π - s x² ) with x = Q_Lᵀ(W-M)Q_R, in
    /// nats, summed in f64.
    ///
    /// # Errors
    /// As [`KroneckerGaussian::perturb`].
    pub fn log_prob(&self, params: impl Into<Params>) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let pairs = in_model(&Params::separate(params)?, in_model::means(self))?;
        let mut total = 0.0;
        for (p, (theta, _)) in self.parameters.iter().zip(pairs) {
            let p = p.double();
            let d = theta.detach().to_kind(Kind::Double).to_device(p.mean.device()) - &p.mean;
            // In the basis the elements are independent, and no matrix over all weights is formed.
            let x = into_basis(&p.matrix(&d), p.left.as_ref(), p.right.as_ref())?;
            let s = p.matrix(&p.precision);
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

    /// KL(self ‖ p), in nats, computed in f64. With P the precision of self and d = vec(M - M_p), summed over the
    /// parameters,
    ///
    /// ```text
    /// ½ ( tr(P_p P⁻¹) - n + dᵀP_p d + ln det P - ln det P_p )
    /// ```
    ///
    /// The bases may differ: P⁻¹ is diagonal in the basis of self, so the trace needs only the diagonal of P_p there,
    /// and no matrix is larger than the bases.
    ///
    /// # Errors
    /// If the two do not have the same parameters, or bases of different matrices.
    pub fn kl(&self, p: &KroneckerGaussian) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        self.same_parameters(p)?;
        let mut total = 0.0;
        for q in self.parameters.iter() {
            let q = q.double();
            let other = p.parameter(&q.name).expect("same_parameters() has seen to it").double();
            let (ours, theirs) = (q.block(), other.block().like(&q.mean));
            let d = q.matrix(&(&q.mean - other.mean.to_device(q.mean.device())));
            let ratio = theirs.diagonal_in(ours.left.as_ref(), ours.right.as_ref())? / &ours.precision;
            let terms = ratio - 1.0 + &d * theirs.times(&d)?;
            total += terms.sum(Kind::Double).double_value(&[]) + ours.log_det() - theirs.log_det();
        }
        Ok(0.5 * total)
    }

    pub(super) fn same_parameters(&self, other: &KroneckerGaussian) -> Result<()> {
        self.parameters.same(&other.parameters)
    }

    /// Tensor `<name>` is M, `<name>.precision` s, `<name>.left` and `<name>.right` the bases that are not the
    /// identity.
    fn write(&self, path: &Path) -> Result<()> {
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        let mut parameters = Vec::new();
        for p in self.parameters.iter() {
            let parts = [("", Some(&p.mean)), (".precision", Some(&p.precision))];
            let bases = [(".left", p.left.as_ref()), (".right", p.right.as_ref())];
            for (suffix, t) in parts.into_iter().chain(bases) {
                let Some(t) = t else { continue };
                let name = format!("{}{suffix}", p.name);
                // A parameter may itself be called `x.left`: writing the file refuses to have two tensors of one name.
                tensors.push((name, t.shallow_clone()));
            }
            parameters.push(Saved { name: p.name.clone(), left: p.left.is_some(), right: p.right.is_some() });
        }
        checkpoint::save(path, FORM, &tensors, &Content { seed: self.seed, parameters })
    }

    /// Reads what [`KroneckerGaussian::save`] wrote, onto the CPU: tensor `<name>` is M, `<name>.precision` s,
    /// `<name>.left` and `<name>.right` are the bases that are not the identity.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (tensors, content): (_, Content) = checkpoint::load(path, FORM)?;
        let mut stored = Stored { path, tensors };
        let mut parameters = Vec::new();
        for Saved { name, left, right } in content.parameters {
            let mut basis = |there: bool, side: &str| there.then(|| stored.take(&format!("{name}.{side}"))).transpose();
            let (left, right) = (basis(left, "left")?, basis(right, "right")?);
            let (mean, precision) = (stored.take(&name)?, stored.take(&format!("{name}.precision"))?);
            parameters.push(KroneckerParameter { name, mean, left, right, precision });
        }
        stored.finish("parameter")?;
        Ok(Self::new(parameters).map_err(|e| Error::file(path, e))?.with_seed(content.seed))
    }
}
