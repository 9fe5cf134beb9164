//! A Gaussian with a mean and a precision for every weight.

use super::BlockPrecision;
use super::any::{OUTSIDE_OF_TRAINING, check_sample, posterior};
use super::in_model::{self, in_model};
use super::named::{Named, Parameter};
use super::temperature;
use super::valid::{Stored, finite_float, form, no_parameter, smallest};
use crate::kernel::{self, Draw, Elementwise, Field, Job, Real};
use crate::linalg::matrix_shape;
use crate::storage::{POSTERIOR, PRECISION, checkpoint};
use crate::{Error, Params, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::{Kind, Tensor};

/// q(θ) = N(m, diag(s)⁻¹): the posterior that the diagonal rows of the table learn.
///
/// One mean m and one precision s = 1/σ² > 0 for every weight, by the name of the parameter; s is the posterior's
/// own, not divided by ess (`docs/scales.md`). A posterior owns its tensors, so it neither follows the optimizer it
/// came from nor needs it; it can be saved, become a prior ([`Prior`](crate::Prior)), be merged
/// ([`combine`](crate::combine)) and predict.
///
/// Samples come from a counter-based generator: sample k of one seed is always the same
/// ([`DiagonalGaussian::with_seed`], default 0), and posteriors of one seed and the same shapes share their noise.
///
/// **Damping.** Rows with a damping γ (`Von`, `BayesianSam`) train with less noise than 1/s, for stability's sake.
/// Their posterior keeps d = λγ beside s, and its samples are N(m, 1/(s+d)), the noise that the model was trained with:
/// wider ones would be predictions of weights that no loss has seen. But d is nothing that is known of the weights, so
/// precision, variance, entropy, KL and log density are those of s, and so is what goes on as a prior, into [`combine`]
/// and merges, and to sensitivities. [`DiagonalGaussian::undamped`] samples with s alone. Everything else has d = 0.
///
/// [`combine`]: crate::combine
#[derive(Debug)]
pub struct DiagonalGaussian {
    pub(super) entries: Named<Entry>,
    pub(super) seed: u64,
    learned: Option<f64>,
}

/// Mean and precision of one parameter: same shape, kind (f32 or f64) and device.
#[derive(Debug)]
pub(crate) struct Entry {
    pub name: String,
    pub mean: Tensor,
    pub precision: Tensor,
    /// d ≥ 0, by which the samples' precision is larger.
    pub damping: f64,
}

impl Entry {
    fn shallow_clone(&self) -> Self {
        let (mean, precision) = (self.mean.shallow_clone(), self.precision.shallow_clone());
        Entry { name: self.name.clone(), mean, precision, damping: self.damping }
    }
}

impl Parameter for Entry {
    fn name(&self) -> &str {
        &self.name
    }
    fn size(&self) -> Vec<i64> {
        self.mean.size()
    }
}

/// (m, s, d, z) → m + z/√(s+d)
struct Sample;

impl Elementwise for Sample {
    const OUTPUTS: usize = 1;
    #[inline(always)]
    fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        write(0, read(0) + read(3) / (read(1) + read(2)).sqrt());
    }
}

/// Natural parameters of one weight tensor: η₁ = s·m and s (η₂ = -s/2).
#[derive(Debug)]
pub struct Natural {
    /// Name of the parameter.
    pub name: String,
    /// s·m
    pub precision_mean: Tensor,
    /// s
    pub precision: Tensor,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Content {
    seed: u64,
    /// In order; the file sorts its tensors.
    names: Vec<String>,
    /// Absent if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    learned: Option<f64>,
    /// One per name; absent if all are 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    damping: Vec<f64>,
}

const FORM: &str = POSTERIOR;

posterior!(DiagonalGaussian);

impl DiagonalGaussian {
    /// A posterior from (name, mean, precision) of each parameter, which it copies: the mean may be a variable that is
    /// trained further.
    ///
    /// # Errors
    /// No entry, a name twice, shapes that differ, a kind other than f32 and f64, means that are not finite,
    /// precisions that are not finite and positive.
    pub fn new<S: Into<String>>(entries: impl IntoIterator<Item = (S, Tensor, Tensor)>) -> Result<Self> {
        // An undefined tensor cannot be copied, and is refused by name below.
        let own = |t: Tensor| if t.defined() { t.detach().copy() } else { t };
        Self::sharing(entries.into_iter().map(|(name, mean, precision)| (name, own(mean), own(precision))))
    }

    /// As [`DiagonalGaussian::new`], with tensors that nobody else writes to.
    pub(crate) fn sharing<S: Into<String>>(entries: impl IntoIterator<Item = (S, Tensor, Tensor)>) -> Result<Self> {
        let mut q = DiagonalGaussian { entries: Named::new(), seed: 0, learned: None };
        for (name, mean, precision) in entries {
            let name = name.into();
            let refuse = |problem: String| Err(Error::parameter(&name, problem));
            finite_float(&name, "mean", &mean)?;
            finite_float(&name, "precision", &precision)?;
            if (mean.size(), mean.kind(), mean.device()) != (precision.size(), precision.kind(), precision.device()) {
                return refuse(format!(
                    "its mean is {} and its precision {}: expected the same",
                    form(&mean),
                    form(&precision)
                ));
            }
            if smallest(&precision) <= 0.0 {
                return refuse(format!(
                    "its smallest precision is {:e}: expected a number > 0 (take a step first, or set a weight decay)",
                    smallest(&precision)
                ));
            }
            // Detached: a graph behind the mean would be kept alive by the posterior.
            q.entries.push(Entry { name, mean: mean.detach(), precision: precision.detach(), damping: 0.0 })?;
        }
        if q.entries.is_empty() {
            return Err(no_parameter());
        }
        Ok(q)
    }

    /// The share of its precision that a training has learned; the rest is where that started, `hess_init`. 1-β₂ᵗ after
    /// t updates, as in [`Diagnostics`](crate::Diagnostics): below a tenth, σ says little about the data. `None` if the
    /// posterior does not come from such a training ([`DiagonalGaussian::new`], [`combine`](crate::combine), Laplace,
    /// [`Optimizer::learned_posterior`](crate::Optimizer::learned_posterior)).
    pub fn learned(&self) -> Option<f64> {
        self.learned
    }

    pub(crate) fn with_learned(self, learned: Option<f64>) -> Self {
        DiagonalGaussian { learned, ..self }
    }

    /// d of one parameter, by which its samples are more precise than it is: λγ of a training with damping.
    pub fn damping(&self, name: &str) -> Option<f64> {
        self.entry(name).map(|e| e.damping)
    }

    /// The same posterior with samples from N(m, 1/s) itself, d = 0.
    #[must_use]
    pub fn undamped(mut self) -> Self {
        self.entries.iter_mut().for_each(|e| e.damping = 0.0);
        self
    }

    /// One for each parameter, in order.
    pub(crate) fn with_dampings(mut self, dampings: impl IntoIterator<Item = f64>) -> Self {
        self.entries.iter_mut().zip(dampings).for_each(|(e, damping)| e.damping = damping);
        self
    }

    /// Of these parameters; none if all are 0.
    pub(super) fn dampings<'a>(&self, names: impl Iterator<Item = &'a str>) -> Vec<f64> {
        let all: Vec<f64> = names.filter_map(|name| self.damping(name)).collect();
        if all.iter().all(|d| *d == 0.0) { Vec::new() } else { all }
    }

    /// With those of a file, which may come from anyone; none at all are zeros.
    pub(super) fn with_stored_dampings(self, dampings: Vec<f64>) -> Result<Self> {
        let fits = dampings.is_empty() || dampings.len() == self.entries.len();
        if !fits || dampings.iter().any(|d| !(d.is_finite() && *d >= 0.0)) {
            let (found, n) = (dampings.len(), self.entries.len());
            let problem =
                format!("it has {found} dampings for {n} parameters: expected as many, finite and ≥ 0, or none");
            return Err(Error::Posterior(problem));
        }
        Ok(self.with_dampings(dampings))
    }

    /// 1/(s+d), the variance of one parameter's samples.
    pub(crate) fn sampled_variance(&self, name: &str) -> Option<Tensor> {
        self.entry(name).map(|e| (&e.precision + e.damping).reciprocal())
    }

    /// A second handle to the same tensors.
    #[must_use]
    pub fn shallow_clone(&self) -> Self {
        DiagonalGaussian { entries: self.entries.map(Entry::shallow_clone), ..*self }
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|e| e.name.as_str())
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.entries.iter().map(|e| e.mean.numel()).sum()
    }

    /// m of one parameter, the posterior's own tensor: copy it before you write to it.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.entry(name).map(|e| e.mean.shallow_clone())
    }

    /// s of one parameter, in its shape; the posterior's own tensor, as [`DiagonalGaussian::mean`].
    pub fn precision(&self, name: &str) -> Option<Tensor> {
        self.entry(name).map(|e| e.precision.shallow_clone())
    }

    /// σ² = 1/s of one parameter.
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        self.entry(name).map(|e| e.precision.reciprocal())
    }

    /// What a prior needs of one parameter as a matrix, and its mean.
    pub(crate) fn block(&self, name: &str) -> Option<(Tensor, BlockPrecision)> {
        let e = self.entry(name)?;
        let matrix = |t: &Tensor| t.reshape(matrix_shape(&t.size()));
        Some((matrix(&e.mean), BlockPrecision { left: None, right: None, precision: matrix(&e.precision) }))
    }

    pub(crate) fn seed(&self) -> u64 {
        self.seed
    }

    pub(crate) fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// The posterior of the parameters whose name passes, for example all but an old head.
    ///
    /// # Errors
    /// If none passes.
    pub fn select(&self, keep: impl Fn(&str) -> bool) -> Result<Self> {
        let mut entries = Named::new();
        let mut kept = self.entries.iter().filter(|e| keep(&e.name)).map(Entry::shallow_clone);
        kept.try_for_each(|e| entries.push(e))?;
        if entries.is_empty() { Err(no_parameter()) } else { Ok(DiagonalGaussian { entries, ..*self }) }
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: m + z/√(s+d), in the shape and kind of the mean.
    ///
    /// # Errors
    /// A sample beyond the 2³² that a seed has.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        self.sample_of(self.seed, check_sample(k)?)
    }

    /// As [`DiagonalGaussian::sample`], of another seed.
    pub(super) fn sample_of(&self, seed: u64, k: u64) -> Result<Vec<(String, Tensor)>> {
        let mut group = 0;
        let samples: Vec<(String, Tensor)> =
            self.entries.iter().map(|e| (e.name.clone(), e.mean.empty_like())).collect();
        // One pass over all parameters, with the noise drawn inside.
        kernel::run(self.entries.iter().zip(&samples).enumerate().map(|(parameter, (e, (_, theta)))| {
            let at = Draw { step: OUTSIDE_OF_TRAINING, sample: k, parameter, group };
            group += kernel::groups(e.mean.numel());
            let damping = Field::Number(e.damping);
            let inputs = [Field::Tensor(&e.mean), Field::Tensor(&e.precision), damping, Field::Noise { seed, at }];
            Job::new(Sample, inputs, [Some(theta)])
        }))?;
        Ok(samples)
    }

    fn sum(&self, f: impl Fn(&Entry) -> Tensor) -> f64 {
        self.entries.iter().map(|e| f(e).sum(Kind::Double).double_value(&[])).sum()
    }

    /// ln q(θ) at the current values of a model's variables:
    /// ½ Σ ( ln s - ln 2π - s(θ-m)² ), in nats, summed in f64.
    ///
    /// # Errors
    /// As [`DiagonalGaussian::perturb`].
    pub fn log_prob(&self, params: impl Into<Params>) -> Result<f64> {
        self.log_prob_at(&Params::separate(params)?)
    }

    pub(super) fn log_prob_at(&self, params: &Params) -> Result<f64> {
        let pairs = in_model(params, in_model::means(self))?;
        let _no_grad = tch::no_grad_guard();
        let terms = self.entries.iter().zip(pairs).map(|(e, (theta, _))| {
            let s = e.precision.to_kind(Kind::Double);
            // In f64 before the difference: a weight of f32 and its mean agree in most of their digits.
            let d = theta.detach().to_kind(Kind::Double).to_device(s.device()) - &e.mean;
            (s.log() - std::f64::consts::TAU.ln() - s * d.square()).sum(Kind::Double).double_value(&[])
        });
        Ok(0.5 * terms.sum::<f64>())
    }

    /// Differential entropy ½ Σ ( 1 + ln 2π - ln s ), in nats.
    pub fn entropy(&self) -> f64 {
        let constant = 1.0 + std::f64::consts::TAU.ln();
        0.5 * self.sum(|e| -e.precision.to_kind(Kind::Double).log() + constant)
    }

    /// KL(self ‖ p) = ½ Σ ( s_p/s - 1 + s_p (m-m_p)² + ln s/s_p ), in nats.
    ///
    /// # Errors
    /// If the two do not have the same parameters.
    pub fn kl(&self, p: &DiagonalGaussian) -> Result<f64> {
        self.same_parameters(p)?;
        let terms = self.entries.iter().map(|e| {
            let other = p.entry(&e.name).expect("same_parameters() has seen to it");
            let here = |t: &Tensor| t.to_device(e.mean.device()).to_kind(Kind::Double);
            let (s, sp) = (here(&e.precision), here(&other.precision));
            let d = here(&e.mean) - here(&other.mean);
            let ratio = &sp / &s;
            // Together in one sum of terms that are not negative, which the differences of two large sums would not
            // be.
            (&ratio - 1.0 - ratio.log() + sp * d.square()).sum(Kind::Double).double_value(&[])
        });
        Ok(0.5 * terms.sum::<f64>())
    }

    /// The posterior at temperature τ > 0: precision s/τ, and d/τ, wider for τ > 1. As a prior it then counts 1/τ as
    /// much.
    ///
    /// **Test-time scale.** A posterior of IVON has s = ess·(h+δ), so that samples at `t` times the ess that it was
    /// trained with are those of `temper(1/t)`: narrower for t > 1 (in the limit the mean), wider for t < 1, around the
    /// same mean and by the same noise. Nothing is trained again. Choose t on validation data
    /// ([`DiagonalGaussian::fit_temperature`]).
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::Ivon;
    /// # fn main() -> tch_blr::Result<()> {
    /// # let x = Tensor::randn([8, 4], (Kind::Float, Device::Cpu));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// # let q = Ivon::default().ess(100.0).build(&vs, 0.01)?.posterior()?;
    /// let probabilities = || net.forward(&x).softmax(-1, Kind::Float);
    /// for t in [0.25, 1.0, 4.0] {
    ///     let p = q.temper(1.0 / t)?.predict(&vs, 32, probabilities)?;
    /// #   assert_eq!(p.mean.size(), [8, 3]);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// τ that is not finite and positive, or so extreme that a precision is not either.
    pub fn temper(&self, tau: f64) -> Result<Self> {
        crate::check::positive("tau", tau)?;
        let tempered = self.entries.iter().map(|e| (e.name.clone(), e.mean.copy(), &e.precision / tau));
        let q = Self::sharing(tempered)?.with_dampings(self.entries.iter().map(|e| e.damping / tau));
        Ok(q.with_seed(self.seed).with_learned(self.learned))
    }

    /// Tries temperatures, and returns the one with the lowest `score` and the posterior at it: how wide to predict,
    /// chosen on validation data. The training decides where the mean is and which weights are known better than
    /// others; what averages best is often wider (τ > 1) or narrower.
    ///
    /// ```
    /// # use tch::{nn, nn::Module, Device, Kind, Tensor};
    /// # use tch_blr::{Ivon, metrics};
    /// # fn main() -> tch_blr::Result<()> {
    /// # let (x, y) = (Tensor::randn([8, 4], (Kind::Float, Device::Cpu)), Tensor::zeros([8], (Kind::Int64, Device::Cpu)));
    /// # let vs = nn::VarStore::new(Device::Cpu);
    /// # let net = nn::linear(vs.root(), 4, 3, Default::default());
    /// # let opt = Ivon::auto(100.0, 10).build(&vs, 0.01)?;
    /// let probabilities = || net.forward(&x).softmax(-1, Kind::Float);
    /// let (tau, q) = opt.posterior()?.fit_temperature([1.0, 3.0, 10.0, 30.0, 100.0], |q| {
    ///     metrics::nll(&q.predict(&vs, 32, probabilities)?.mean, &y)
    /// })?;
    /// # assert!(tau >= 1.0 && q.names().count() == 2);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Those of [`DiagonalGaussian::temper`] and of the score; no temperature whose score is a number.
    pub fn fit_temperature(
        &self,
        temperatures: impl IntoIterator<Item = f64>,
        score: impl FnMut(&Self) -> Result<f64>,
    ) -> Result<(f64, Self)> {
        temperature::best(temperatures, |tau| self.temper(tau), score)
    }

    /// Natural parameters of every weight tensor, in order.
    pub fn natural(&self) -> Vec<Natural> {
        let natural = self.entries.iter().map(|e| Natural {
            name: e.name.clone(),
            precision_mean: &e.precision * &e.mean,
            precision: e.precision.copy(),
        });
        natural.collect()
    }

    pub(crate) fn same_parameters(&self, other: &DiagonalGaussian) -> Result<()> {
        self.entries.same(&other.entries)
    }

    fn write(&self, path: &Path) -> Result<()> {
        self.write_as(FORM, self.seed, path)
    }

    /// Tensor `<name>` is the mean, `<name>.precision` the precision.
    pub(super) fn write_as(&self, form: &str, seed: u64, path: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        for e in self.entries.iter() {
            // A parameter may itself be called `x.precision`, and would overwrite that of `x` in the file.
            if let Some(clash) = e.name.strip_suffix(PRECISION).and_then(|base| self.entry(base)) {
                return Err(Error::parameter(&e.name, format!("this is where the precision of `{}` goes", clash.name)));
            }
            tensors.push((e.name.clone(), e.mean.shallow_clone()));
            tensors.push((format!("{}{PRECISION}", e.name), e.precision.shallow_clone()));
        }
        let names = self.names().map(str::to_owned).collect();
        let damping = self.dampings(self.names());
        let content = Content { seed, names, learned: self.learned, damping };
        checkpoint::save(path, form, &tensors, &content)
    }

    /// Reads what [`DiagonalGaussian::save`] wrote (tensor `<name>` is the mean, `<name>.precision` the precision),
    /// onto the CPU.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (entries, content) = read(FORM, path)?;
        Self::of_file(path, entries, content)
    }

    /// From what [`read`] found.
    pub(super) fn of_file(path: &Path, entries: Vec<Tensors>, content: Content) -> Result<Self> {
        let q = Self::sharing(entries).and_then(|q| q.with_stored_dampings(content.damping));
        let q = q.map_err(|e| Error::file(path, e))?;
        Ok(q.with_seed(content.seed).with_learned(content.learned))
    }
}

/// Name, mean and precision of a parameter.
pub(super) type Tensors = (String, Tensor, Tensor);

/// What [`DiagonalGaussian::write_as`] wrote in this form, onto the CPU.
pub(super) fn read(form: &str, path: &Path) -> Result<(Vec<Tensors>, Content)> {
    let (tensors, mut content): (_, Content) = checkpoint::load(path, form)?;
    let mut stored = Stored { path, tensors };
    let mut entries = Vec::new();
    for name in std::mem::take(&mut content.names) {
        let (mean, precision) = (stored.take(&name)?, stored.take(&format!("{name}{PRECISION}"))?);
        entries.push((name, mean, precision));
    }
    stored.finish("parameter")?;
    Ok((entries, content))
}
