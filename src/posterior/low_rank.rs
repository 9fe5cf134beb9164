//! A Gaussian whose covariance is a diagonal and a few directions.

use super::any::{OUTSIDE_OF_TRAINING, check_sample, posterior};
use super::in_model::{self, in_model};
use super::low_rank_parameter::{Entry, total, variance, wide};
use super::named::Named;
use super::valid::{Stored, no_parameter};
use super::{DiagonalGaussian, FullGaussian, temperature};
use crate::kernel::{self, Draw, Elementwise, Field, Job, Real};
use crate::storage::checkpoint;
use crate::{Error, Params, Result, check, linalg};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// q(θ) = N(m, diag(d) + Σₖ uₖuₖᵀ), k = 1 … K: independent weights, and K directions in which all of them move
/// together.
///
/// What the iterates of a training span ([`Swag`](crate::Swag)), where a full covariance would not fit into memory: it
/// takes (K+2)n numbers for n weights. Nothing larger than `[K, n]` is formed, and densities and divergences factor one
/// matrix `[K, K]` (Woodbury's identity), in f64:
///
/// ```text
/// C = I + U D⁻¹ Uᵀ             U `[K, n]` with the rows uₖ, D = diag(d)
/// ln det Σ = Σ ln d + ln det C
/// xᵀΣ⁻¹x = ‖D^-½(x - Uᵀy)‖² + ‖y‖²     y = C⁻¹ U D⁻¹ x
/// ```
///
/// K = 0 is a diagonal Gaussian ([`DiagonalGaussian::low_rank`]); K may be larger than n, and directions may be zero or
/// depend on each other. d must be positive: without it there is no density.
///
/// The sum of natural parameters of two of these is not of this form. For [`combine`](crate::combine), merges and as
/// a prior take [`marginals`](Self::marginals) or [`diagonal`](Self::diagonal), on a scale of your choice
/// ([`temper`](DiagonalGaussian::temper)), or [`full`](Self::full) of a small model.
///
/// Samples come from a counter-based generator: sample k of one seed is always the same
/// ([`LowRankGaussian::with_seed`], default 0).
///
/// ```
/// use tch::Tensor;
/// use tch_blr::LowRankGaussian;
/// # fn main() -> tch_blr::Result<()> {
/// let t = |x: &[f64]| Tensor::from_slice(x);
/// // Two weights of variance 1 + 4 and 1 + 1, whose covariance is 2·1.
/// let q = LowRankGaussian::new([("w", t(&[0.0, 3.0]), t(&[1.0, 1.0]), t(&[2.0, 1.0]).reshape([1, 2]))])?;
/// assert_eq!((q.rank(), q.variance("w").unwrap()), (1, t(&[5.0, 2.0])));
/// assert_eq!(q.sample(0)?.len(), 1);
/// // det Σ = 5·2 - 2²
/// let entropy = 1.0 + (2.0 * std::f64::consts::PI).ln() + 0.5 * 6f64.ln();
/// assert!((q.entropy() - entropy).abs() < 1e-14);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct LowRankGaussian {
    parameters: Named<Entry>,
    /// L `[K, K]` with C = LLᵀ, in f64 on the CPU.
    inner: Tensor,
    seed: u64,
}

/// (m, d, x, z) → m + x + z√d
struct Sample;

impl Elementwise for Sample {
    const OUTPUTS: usize = 1;
    #[inline(always)]
    fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        write(0, read(0) + read(2) + read(3) * read(1).sqrt());
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    seed: u64,
    /// In order; the file sorts its tensors.
    names: Vec<String>,
}

const FORM: &str = "low-rank Gaussian posterior";

posterior!(LowRankGaussian);

impl LowRankGaussian {
    /// A posterior from (name, m, d, U) of each parameter, which it copies: d > 0 in the parameter's shape, and U `[K,
    /// …]`, the K directions one after the other, each in the parameter's shape. K is that of all parameters.
    ///
    /// # Errors
    /// No parameter, a name twice, shapes that do not fit, another K than before, kinds other than f32 and f64,
    /// elements that are not finite, a d that is not positive, variances beyond the range of their kind;
    /// [`Error::NotPositiveDefinite`] where d is so small beside U that rounding leaves no covariance.
    pub fn new<S: Into<String>>(entries: impl IntoIterator<Item = (S, Tensor, Tensor, Tensor)>) -> Result<Self> {
        // An undefined tensor cannot be copied, and is refused by name below.
        let own = |t: Tensor| if t.defined() { t.detach().copy() } else { t };
        Self::sharing(entries.into_iter().map(|(name, m, d, u)| (name, own(m), own(d), own(u))))
    }

    /// As [`LowRankGaussian::new`], with tensors that nobody else writes to.
    pub(crate) fn sharing<S: Into<String>>(
        entries: impl IntoIterator<Item = (S, Tensor, Tensor, Tensor)>,
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let mut parameters: Named<Entry> = Named::new();
        for (name, mean, variance, directions) in entries {
            let entry = Entry { name: name.into(), mean, variance, directions };
            entry.check()?;
            if let Some(first) = parameters.first().filter(|first| first.rank() != entry.rank()) {
                let (k, of, first) = (entry.rank(), first.rank(), &first.name);
                return Err(Error::parameter(
                    &entry.name,
                    format!("it has {k} directions and `{first}` {of}: expected as many, with zeros where it stays"),
                ));
            }
            // Detached: a graph behind the mean would be kept alive by the posterior.
            parameters.push(entry.map(Tensor::detach))?;
        }
        let Some(first) = parameters.first() else { return Err(no_parameter()) };
        let mut inner = Tensor::f_eye(first.rank(), (Kind::Double, Device::Cpu))?;
        for p in parameters.iter() {
            let w = p.u() / p.d().sqrt();
            inner += w.f_matmul(&w.f_tr()?)?.f_to_device(Device::Cpu)?;
        }
        let inner = linalg::cholesky("the covariance of the posterior", &inner)?;
        Ok(LowRankGaussian { parameters, inner, seed: 0 })
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parameters.iter().map(|p| p.name.as_str())
    }

    /// Number of weights n.
    pub fn len(&self) -> usize {
        self.parameters.iter().map(|p| p.mean.numel()).sum()
    }

    /// Number of directions K.
    pub fn rank(&self) -> usize {
        self.inner.size()[0] as usize
    }

    /// m of one parameter, the posterior's own tensor: copy it before you write to it.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.parameters.get(name).map(|p| p.mean.shallow_clone())
    }

    /// d of one parameter, in its shape: the part of its variances that no other weight shares. The posterior's own
    /// tensor, as [`LowRankGaussian::mean`].
    pub fn independent(&self, name: &str) -> Option<Tensor> {
        self.parameters.get(name).map(|p| p.variance.shallow_clone())
    }

    /// U `[K, …]` of one parameter. The posterior's own tensor, as [`LowRankGaussian::mean`].
    pub fn directions(&self, name: &str) -> Option<Tensor> {
        self.parameters.get(name).map(|p| p.directions.shallow_clone())
    }

    /// d + Σₖ uₖ² of one parameter, in its shape.
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        let _no_grad = tch::no_grad_guard();
        self.parameters.get(name).map(variance)
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: m + z√d + Σₖ zₖuₖ with n + K standard normals, in the shape
    /// and kind of the mean. z is the noise that a diagonal posterior of the same shapes and seed has.
    ///
    /// # Errors
    /// A sample beyond the 2³² that a seed has, or if libtorch fails.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let sample = check_sample(k)?;
        let at = |parameter, group| Draw { step: OUTSIDE_OF_TRAINING, sample, parameter, group };
        let behind = self.parameters.iter().map(|p| kernel::groups(p.mean.numel())).sum();
        let like = Tensor::f_zeros([self.rank() as i64], (Kind::Double, Device::Cpu))?;
        let z = kernel::normals(self.seed, at(self.parameters.len(), behind), &like)?;
        let together = self.parameters.iter().map(|p| {
            let u = p.directions.f_reshape([p.rank(), p.mean.numel() as i64])?;
            let z = z.f_to_kind(u.kind())?.f_to_device(u.device())?;
            Ok((p.name.clone(), u.f_tr()?.f_mv(&z)?.f_reshape(p.mean.size())?))
        });
        // What comes out of the pass is written over what goes in.
        let samples = together.collect::<Result<Vec<_>>>()?;
        let mut group = 0;
        kernel::run(self.parameters.iter().zip(&samples).enumerate().map(|(i, (p, (_, theta)))| {
            let noise = Field::Noise { seed: self.seed, at: at(i, group) };
            group += kernel::groups(p.mean.numel());
            let inputs = [Field::Tensor(&p.mean), Field::Tensor(&p.variance), Field::Tensor(theta), noise];
            Job::new(Sample, inputs, [Some(theta)])
        }))?;
        Ok(samples)
    }

    /// ln q(θ) at the current values of a model's variables: -½ ( n ln 2π + ln det Σ + (θ-m)ᵀΣ⁻¹(θ-m) ), in nats, in
    /// f64.
    ///
    /// # Errors
    /// As [`LowRankGaussian::perturb`].
    pub fn log_prob(&self, params: impl Into<Params>) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let pairs = in_model(&Params::separate(params)?, in_model::means(self))?;
        let apart = self.parameters.iter().zip(pairs).map(|(p, (theta, _))| {
            // In f64 before the difference: a weight of f32 and its mean agree in most of their digits.
            (wide(&theta.detach().to_device(p.mean.device())) - wide(&p.mean)).unsqueeze(0)
        });
        let distance = self.squares(&apart.collect::<Vec<_>>())?;
        Ok(-0.5 * (self.len() as f64 * std::f64::consts::TAU.ln() + self.log_det() + distance))
    }

    /// Differential entropy ½ ( n + n ln 2π + ln det Σ ), in nats.
    pub fn entropy(&self) -> f64 {
        0.5 * (self.len() as f64 * (1.0 + std::f64::consts::TAU.ln()) + self.log_det())
    }

    /// KL(self ‖ p) = ½ ( tr(Σ_p⁻¹Σ) - n + (m-m_p)ᵀΣ_p⁻¹(m-m_p) + ln det Σ_p - ln det Σ ), in nats, in f64. The ranks
    /// may differ: that to a diagonal Gaussian is `q.kl(&p.low_rank()?)`, and that from one the other way round.
    ///
    /// # Errors
    /// If the two do not have the same parameters.
    pub fn kl(&self, p: &LowRankGaussian) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        self.parameters.same(&p.parameters)?;
        let (mut terms, mut rows) = (0.0, Vec::new());
        for theirs in p.parameters.iter() {
            let here = |t: &Tensor| t.to_device(theirs.mean.device());
            let ours = self.parameters.get(&theirs.name).expect("same() has seen to it").map(here);
            let ratio = ours.d() / theirs.d();
            // Together in one sum of small terms, which the differences of large sums would not be.
            terms += total(&(&ratio * (1.0 - p.leverage(theirs)?) - 1.0 - ratio.log()));
            let apart = (wide(&ours.mean) - wide(&theirs.mean)).unsqueeze(0);
            rows.push(Tensor::f_cat(&[ours.u(), apart], 0)?);
        }
        // tr(Σ_p⁻¹ UᵀU) is a sum of squares in the metric of p, as the distance of the means is.
        let squares = p.squares(&rows)?;
        Ok(0.5 * (terms + squares + linalg::log_det(&p.inner) - linalg::log_det(&self.inner)))
    }

    /// The posterior at temperature τ > 0, with the covariance τΣ. It is also the scale of a posterior of iterates,
    /// whose spread belongs to the training's step size ([`Swag`](crate::Swag)).
    ///
    /// # Errors
    /// τ that is not finite and positive, or so extreme that a variance is not either.
    pub fn temper(&self, tau: f64) -> Result<Self> {
        check::positive("tau", tau)?;
        let _no_grad = tch::no_grad_guard();
        let tempered = self.parameters.iter().map(|p| {
            let (d, u) = (&p.variance * tau, &p.directions * tau.sqrt());
            (p.name.clone(), p.mean.shallow_clone(), d, u)
        });
        Ok(Self::sharing(tempered)?.with_seed(self.seed))
    }

    /// Tries temperatures, and returns the one with the lowest `score` and the posterior at it, as
    /// [`DiagonalGaussian::fit_temperature`]: choose it on validation data.
    ///
    /// # Errors
    /// Those of [`LowRankGaussian::temper`] and of the score; no temperature whose score is a number.
    pub fn fit_temperature(
        &self,
        temperatures: impl IntoIterator<Item = f64>,
        score: impl FnMut(&Self) -> Result<f64>,
    ) -> Result<(f64, Self)> {
        temperature::best(temperatures, |tau| self.temper(tau), score)
    }

    /// The marginals of the single weights, N(m, d + Σₖuₖ²): of all diagonal Gaussians this has the smallest
    /// KL(self ‖ ·). [`LowRankGaussian::diagonal`] has the smallest KL(· ‖ self).
    ///
    /// # Errors
    /// A variance whose inverse is beyond the range of its kind.
    pub fn marginals(&self) -> Result<DiagonalGaussian> {
        self.with_precisions(|p| Ok(variance(p).reciprocal()))
    }

    /// The mean with the diagonal of the precision, (Σ⁻¹)ᵢᵢ = (1-hᵢ)/dᵢ with 0 ≤ hᵢ < 1: the precision of each weight
    /// if all others are known, as [`FullGaussian::diagonal`].
    ///
    /// # Errors
    /// A precision beyond the range of its kind.
    pub fn diagonal(&self) -> Result<DiagonalGaussian> {
        self.with_precisions(|p| {
            // 1 - h is positive, but rounds to zero where other weights determine this one to 16 digits.
            let free: Tensor = 1.0 - self.leverage(p)?;
            let s = free.f_clamp_min(f64::EPSILON)? / p.d();
            Ok(s.f_to_kind(p.mean.kind())?.f_reshape(p.mean.size())?)
        })
    }

    fn with_precisions(&self, precision: impl Fn(&Entry) -> Result<Tensor>) -> Result<DiagonalGaussian> {
        let _no_grad = tch::no_grad_guard();
        let entries = self.parameters.iter().map(|p| Ok((p.name.clone(), p.mean.copy(), precision(p)?)));
        Ok(DiagonalGaussian::sharing(entries.collect::<Result<Vec<_>>>()?)?.with_seed(self.seed))
    }

    /// The same Gaussian with its precision written out, in f64 and with the parameters in order: n weights take 16n²
    /// bytes and a factorization, so this is for small models.
    ///
    /// # Errors
    /// If libtorch fails, for example for want of memory.
    pub fn full(&self) -> Result<FullGaussian> {
        let _no_grad = tch::no_grad_guard();
        let join =
            |part: fn(&Entry) -> Tensor, dim| Tensor::f_cat(&self.parameters.iter().map(part).collect::<Vec<_>>(), dim);
        let (d, u) = (join(Entry::d, 0)?, join(Entry::u, 1)?);
        let covariance = d.f_diag(0)? + u.f_tr()?.f_matmul(&u)?;
        let factor = linalg::cholesky("the covariance of the posterior", &covariance)?;
        Ok(FullGaussian::new(in_model::means(self), &linalg::inverse(&factor)?)?.with_seed(self.seed))
    }

    /// ln det Σ
    fn log_det(&self) -> f64 {
        self.parameters.iter().map(|p| total(&p.d().log())).sum::<f64>() + linalg::log_det(&self.inner)
    }

    /// Σ xᵀΣ⁻¹x over vectors x, the rows of `[R, n]` of each parameter in turn.
    fn squares(&self, rows: &[Tensor]) -> Result<f64> {
        let all = || self.parameters.iter().zip(rows);
        let mut b = Tensor::f_zeros([self.rank() as i64, rows[0].size()[0]], (Kind::Double, Device::Cpu))?;
        for (p, x) in all() {
            b += p.u().f_matmul(&(x / p.d()).f_tr()?)?.f_to_device(Device::Cpu)?;
        }
        let y = if self.rank() == 0 { b } else { b.f_cholesky_solve(&self.inner, false)? };
        // Two sums of squares, where xᵀD⁻¹x - bᵀC⁻¹b would lose all digits if d is small.
        let mut sum = total(&y.square());
        for (p, x) in all() {
            let rest = x - y.f_to_device(x.device())?.f_tr()?.f_matmul(&p.u())?;
            sum += total(&(rest.square() / p.d()));
        }
        Ok(sum)
    }

    /// hᵢ = (W ᵀC⁻¹W)ᵢᵢ `[n]` with W = U D^-½.
    fn leverage(&self, p: &Entry) -> Result<Tensor> {
        let w = p.u() / p.d().sqrt();
        let half = linalg::forward(&self.inner.f_to_device(w.device())?, &w)?;
        Ok(half.f_square()?.f_sum_dim_intlist(0, false, Kind::Double)?)
    }

    /// Tensor `<name>` is m, `<name>.variance` d, `<name>.directions` U.
    fn write(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        for p in self.parameters.iter() {
            for (suffix, t) in [("", &p.mean), (VARIANCE, &p.variance), (DIRECTIONS, &p.directions)] {
                // A parameter may itself be called `x.variance`: writing the file refuses two tensors of one name.
                tensors.push((format!("{}{suffix}", p.name), t.shallow_clone()));
            }
        }
        let names = self.names().map(str::to_owned).collect();
        checkpoint::save(path, FORM, &tensors, &Content { seed: self.seed, names })
    }

    /// Reads what [`LowRankGaussian::save`] wrote, onto the CPU: tensor `<name>` is m, `<name>.variance` d,
    /// `<name>.directions` U.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (tensors, content): (_, Content) = checkpoint::load(path, FORM)?;
        let mut stored = Stored { path, tensors };
        let mut entries = Vec::new();
        for name in content.names {
            let mut take = |suffix| stored.take(&format!("{name}{suffix}"));
            let (mean, variance, directions) = (take("")?, take(VARIANCE)?, take(DIRECTIONS)?);
            entries.push((name, mean, variance, directions));
        }
        stored.finish("parameter")?;
        Ok(Self::sharing(entries).map_err(|e| Error::file(path, e))?.with_seed(content.seed))
    }
}

const VARIANCE: &str = ".variance";
const DIRECTIONS: &str = ".directions";

impl DiagonalGaussian {
    /// The same Gaussian with no direction, K = 0: for [`LowRankGaussian::kl`] between the two families.
    ///
    /// # Errors
    /// A precision whose inverse is beyond the range of its kind.
    pub fn low_rank(&self) -> Result<LowRankGaussian> {
        let _no_grad = tch::no_grad_guard();
        let entries = self.entries.iter().map(|e| {
            let size = [&[0], &e.mean.size()[..]].concat();
            let none = Tensor::f_zeros(size, (e.mean.kind(), e.mean.device()))?;
            Ok((e.name.clone(), e.mean.copy(), e.precision.reciprocal(), none))
        });
        Ok(LowRankGaussian::sharing(entries.collect::<Result<Vec<_>>>()?)?.with_seed(self.seed))
    }
}
