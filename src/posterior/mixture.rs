//! A weighted sum of posteriors.

use super::diagonal::{DiagonalGaussian, OUTSIDE_OF_TRAINING};
use super::predictive::{self, Predictive};
use crate::params::Perturbed;
use crate::gradient::IntoTensor;
use crate::kernel::{self, Draw};
use crate::storage::checkpoint;
use crate::{Error, Params, Result, check};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// q(θ) = Σ_c π_c N(m_c, diag(s_c)⁻¹): several Gaussians over the same parameters, for posteriors of several modes.
///
/// From independent runs ([`MultiIvon`](crate::MultiIvon), or [`Mixture::equal`] of any posteriors), or learned
/// together ([`MixtureOfGaussians`](crate::MixtureOfGaussians)). It owns its tensors, can be saved and can predict.
/// Sample k of one seed is always the same ([`Mixture::with_seed`], default 0).
#[derive(Debug)]
pub struct Mixture {
    /// π_c > 0; their sum is 1.
    weights: Vec<f64>,
    components: Vec<DiagonalGaussian>,
    seed: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    seed: u64,
    weights: Vec<f64>,
    /// Parameters of every component, in order.
    names: Vec<String>,
}

const FORM: &str = "mixture posterior";

impl Mixture {
    /// A mixture from (weight, component); the weights are divided by their sum.
    ///
    /// # Errors
    /// No component, a weight that is not finite and positive, components of different parameters or shapes.
    pub fn new(components: impl IntoIterator<Item = (f64, DiagonalGaussian)>) -> Result<Self> {
        let (weights, components): (Vec<f64>, Vec<_>) = components.into_iter().unzip();
        let Some((first, others)) = components.split_first() else {
            return Err(Error::Posterior("a mixture needs at least one component".to_owned()));
        };
        for other in others {
            first.same_parameters(other)?;
        }
        let total: f64 = weights.iter().sum();
        if let Some(w) = weights.iter().find(|w| !(w.is_finite() && **w > 0.0 && total.is_finite())) {
            return Err(Error::Posterior(format!("the weight {w} of a component: expected a finite number > 0")));
        }
        Ok(Mixture { weights: weights.iter().map(|w| w / total).collect(), components, seed: 0 })
    }

    /// A mixture of equal weights.
    ///
    /// # Errors
    /// As [`Mixture::new`].
    pub fn equal(components: impl IntoIterator<Item = DiagonalGaussian>) -> Result<Self> {
        Self::new(components.into_iter().map(|q| (1.0, q)))
    }

    /// The same mixture with other samples; default seed 0.
    #[must_use]
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// π_c, in order.
    pub fn weights(&self) -> &[f64] {
        &self.weights
    }

    /// The Gaussians, in order.
    pub fn components(&self) -> &[DiagonalGaussian] {
        &self.components
    }

    fn total(&self, f: impl Fn(&DiagonalGaussian) -> Option<Tensor>) -> Option<Tensor> {
        let mut terms = self.weights.iter().zip(&self.components).map(|(w, q)| Some(f(q)? * *w));
        let first = terms.next()??;
        terms.try_fold(first, |sum, term| Some(sum + term?))
    }

    /// Σ π_c m_c of one parameter.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.total(|q| q.mean(name).map(Tensor::shallow_clone))
    }

    /// Σ π_c (1/s_c + (m_c - m)²) of one parameter, where m is the mean of the mixture.
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        let mean = self.mean(name)?;
        self.total(|q| Some(q.variance(name)? + (q.mean(name)? - &mean).square()))
    }

    /// The component of sample `k`: where Φ(z) ∈ (0, 1) falls among the sums of the weights.
    fn component(&self, k: u64) -> usize {
        // Behind the noise of any parameter.
        let at = Draw { step: OUTSIDE_OF_TRAINING, sample: k, parameter: 0, group: (1 << 44) - 1 };
        let z = kernel::normals(self.seed, at, &Tensor::zeros([1], (Kind::Double, Device::Cpu)));
        let mut u = z.special_ndtr().double_value(&[0]);
        let found = self.weights.iter().position(|w| {
            u -= w;
            u < 0.0
        });
        found.unwrap_or(self.weights.len() - 1)
    }

    /// Number of a component's sample that no other sample of the mixture has.
    fn number(&self, k: u64, component: usize) -> u64 {
        k * self.components.len() as u64 + component as u64
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: of a component that is drawn by the weights.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        let c = self.component(k);
        Ok(self.components[c].sample_of(self.seed, self.number(k, c)))
    }

    /// Puts sample `k` into the variables of a model until the guard is dropped; as [`DiagonalGaussian::perturb`].
    ///
    /// # Errors
    /// As [`DiagonalGaussian::perturb`].
    pub fn perturb(&self, params: impl Into<Params>, k: u64) -> Result<Perturbed> {
        Perturbed::enter(DiagonalGaussian::in_model(&params.into(), self.sample(k)?)?)
    }

    /// ln q(θ) at the current values of a model's variables, in nats.
    ///
    /// # Errors
    /// As [`DiagonalGaussian::perturb`].
    pub fn log_prob(&self, params: impl Into<Params>) -> Result<f64> {
        let params = params.into();
        let terms = self.weights.iter().zip(&self.components).map(|(w, q)| Ok(w.ln() + q.log_prob_at(&params)?));
        let terms = terms.collect::<Result<Vec<f64>>>()?;
        let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Ok(largest + terms.iter().map(|t| (t - largest).exp()).sum::<f64>().ln())
    }

    /// Monte-Carlo prediction with `samples` samples of each component, which count by the component's weight; else as
    /// [`DiagonalGaussian::predict`]. What the components disagree about is in the mutual information.
    ///
    /// # Errors
    /// As [`DiagonalGaussian::predict`].
    pub fn predict<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        samples: usize,
        probabilities: impl FnMut() -> L,
    ) -> Result<Predictive> {
        check::count("samples", samples)?;
        let weights: Vec<f64> = self.weights.iter().flat_map(|w| std::iter::repeat_n(*w, samples)).collect();
        let sample = |i: usize| {
            let c = i / samples;
            Ok(self.components[c].sample_of(self.seed, self.number((i % samples) as u64, c)))
        };
        predictive::predict(&params.into(), &weights, sample, probabilities)
    }

    /// The outputs of `samples` samples of the mixture, stacked to `[K, …]`; as [`DiagonalGaussian::predict_samples`].
    ///
    /// # Errors
    /// As [`DiagonalGaussian::predict_samples`].
    pub fn predict_samples<L: IntoTensor>(
        &self,
        params: impl Into<Params>,
        samples: usize,
        outputs: impl FnMut() -> L,
    ) -> Result<Tensor> {
        check::count("samples", samples)?;
        predictive::predict_samples(&params.into(), samples, |k| self.sample(k as u64), outputs)
    }

    /// Writes one safetensors file: tensor `<c>.mean.<name>` is the mean of component c = 0, 1, …, `<c>.precision.<name>` its
    /// precision. The file is replaced atomically.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let mut tensors = Vec::new();
        let names: Vec<String> = self.components[0].names().map(str::to_owned).collect();
        for (c, q) in self.components.iter().enumerate() {
            for name in &names {
                let entry = q.entry(name).expect("new() has seen to it");
                tensors.push((format!("{c}.mean.{name}"), entry.mean.shallow_clone()));
                tensors.push((format!("{c}.precision.{name}"), entry.precision.shallow_clone()));
            }
        }
        let content = Content { seed: self.seed, weights: self.weights.clone(), names };
        checkpoint::save(path.as_ref(), FORM, &tensors, &content)
    }

    /// Reads what [`Mixture::save`] wrote, onto the CPU.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (mut tensors, content): (_, Content) = checkpoint::load(path, FORM)?;
        let mut take =
            |name: String| tensors.remove(&name).ok_or_else(|| Error::file(path, format!("has no tensor `{name}`")));
        let mut components = Vec::new();
        for (c, weight) in content.weights.into_iter().enumerate() {
            let mut entries = Vec::new();
            for name in &content.names {
                entries.push((name.clone(), take(format!("{c}.mean.{name}"))?, take(format!("{c}.precision.{name}"))?));
            }
            components.push((weight, DiagonalGaussian::sharing(entries).map_err(|e| Error::file(path, e))?));
        }
        if let Some(extra) = tensors.keys().next() {
            return Err(Error::file(path, format!("has a tensor `{extra}` that belongs to no component")));
        }
        Ok(Self::new(components).map_err(|e| Error::file(path, e))?.with_seed(content.seed))
    }
}
