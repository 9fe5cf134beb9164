//! A weighted sum of posteriors.

use super::DiagonalGaussian;
use super::any::{OUTSIDE_OF_TRAINING, check_sample, posterior};
use super::valid::Stored;
use crate::kernel::{self, Draw};
use crate::storage::checkpoint;
use crate::{Error, Params, Result};
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
    mixing: Vec<f64>,
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
    /// Of every component, one per name or none for zeros; absent if all are 0.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    damping: Vec<Vec<f64>>,
}

const FORM: &str = "mixture posterior";

posterior!(Mixture {
    fn strata(&self) -> Vec<f64> {
        self.mixing.clone()
    }

    fn sample_stratum(&self, stratum: usize, k: u64) -> Result<Vec<(String, Tensor)>> {
        self.components[stratum].sample_of(self.seed, self.number(k, stratum)?)
    }
});

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
        // Finite weights can have an infinite sum, by which none of them could be divided.
        let total: f64 = weights.iter().sum();
        if let Some(w) = weights.iter().find(|w| !(w.is_finite() && **w > 0.0 && total.is_finite())) {
            return Err(Error::Posterior(format!("the weight {w} of a component: expected a finite number > 0")));
        }
        Ok(Mixture { mixing: weights.iter().map(|w| w / total).collect(), components, seed: 0 })
    }

    /// A mixture of equal weights.
    ///
    /// # Errors
    /// As [`Mixture::new`].
    pub fn equal(components: impl IntoIterator<Item = DiagonalGaussian>) -> Result<Self> {
        Self::new(components.into_iter().map(|q| (1.0, q)))
    }

    /// π_c, in order.
    pub fn mixing(&self) -> &[f64] {
        &self.mixing
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.components[0].names()
    }

    /// Number of weights of one component.
    pub fn len(&self) -> usize {
        self.components[0].len()
    }

    /// The Gaussians, in order.
    pub fn components(&self) -> &[DiagonalGaussian] {
        &self.components
    }

    fn total(&self, f: impl Fn(&DiagonalGaussian) -> Option<Tensor>) -> Option<Tensor> {
        let mut terms = self.mixing.iter().zip(&self.components).map(|(w, q)| Some(f(q)? * *w));
        let first = terms.next()??;
        terms.try_fold(first, |sum, term| Some(sum + term?))
    }

    /// Σ π_c m_c of one parameter.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.total(|q| q.mean(name))
    }

    /// Σ π_c (1/s_c + (m_c - m)²) of one parameter, where m is the mean of the mixture.
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        let mean = self.mean(name)?;
        self.total(|q| Some(q.variance(name)? + (q.mean(name)? - &mean).square()))
    }

    /// The component of sample `k`: where Φ(z) ∈ (0, 1) falls among the sums of the weights.
    fn component(&self, k: u64) -> Result<usize> {
        // Behind the noise of any parameter: groups have 48 - 4 bits, as each has 16 counters. No model has so many
        // weights.
        let at = Draw { step: OUTSIDE_OF_TRAINING, sample: k, parameter: 0, group: (1 << 44) - 1 };
        let z = kernel::normals(self.seed, at, &Tensor::zeros([1], (Kind::Double, Device::Cpu)))?;
        // From the posterior's own noise, so that sample k needs no second generator.
        let mut u = z.special_ndtr().double_value(&[0]);
        let found = self.mixing.iter().position(|w| {
            u -= w;
            u < 0.0
        });
        // Rounding can leave u above the sum of all weights.
        Ok(found.unwrap_or(self.mixing.len() - 1))
    }

    /// Number of a component's sample that no other sample of the mixture has.
    fn number(&self, k: u64, component: usize) -> Result<u64> {
        check_sample(k.saturating_mul(self.components.len() as u64).saturating_add(component as u64))
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: of a component that is drawn by the weights.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        let c = self.component(check_sample(k)?)?;
        self.components[c].sample_of(self.seed, self.number(k, c)?)
    }

    /// ln q(θ) at the current values of a model's variables, in nats.
    ///
    /// # Errors
    /// As [`DiagonalGaussian::perturb`].
    pub fn log_prob(&self, params: impl Into<Params>) -> Result<f64> {
        let params = Params::separate(params)?;
        let terms = self.mixing.iter().zip(&self.components).map(|(w, q)| Ok(w.ln() + q.log_prob_at(&params)?));
        let terms = terms.collect::<Result<Vec<f64>>>()?;
        // The largest is taken out: a density of a million weights is far below the smallest f64.
        let largest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Ok(largest + terms.iter().map(|t| (t - largest).exp()).sum::<f64>().ln())
    }

    /// Tensor `<c>.mean.<name>` is the mean of component c = 0, 1, …, `<c>.precision.<name>` its precision.
    fn write(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::new();
        let names: Vec<String> = self.names().map(str::to_owned).collect();
        for (c, q) in self.components.iter().enumerate() {
            for name in &names {
                let entry = q.entry(name).expect("new() has seen to it");
                tensors.push((format!("{c}.mean.{name}"), entry.mean.shallow_clone()));
                tensors.push((format!("{c}.precision.{name}"), entry.precision.shallow_clone()));
            }
        }
        let mut damping: Vec<Vec<f64>> = self.components.iter().map(|q| q.dampings(self.names())).collect();
        if damping.iter().all(Vec::is_empty) {
            damping.clear();
        }
        let content = Content { seed: self.seed, weights: self.mixing.clone(), names, damping };
        checkpoint::save(path, FORM, &tensors, &content)
    }

    /// Reads what [`Mixture::save`] wrote, onto the CPU: tensor `<c>.mean.<name>` is the mean of component c = 0, 1, …,
    /// `<c>.precision.<name>` its precision.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (tensors, content): (_, Content) = checkpoint::load(path, FORM)?;
        let mut stored = Stored { path, tensors };
        let mut components = Vec::new();
        let (dampings, n) = (content.damping.len(), content.weights.len());
        if dampings != 0 && dampings != n {
            return Err(Error::file(path, format!("has dampings of {dampings} components, of which there are {n}")));
        }
        for (c, weight) in content.weights.into_iter().enumerate() {
            let mut entries = Vec::new();
            for name in &content.names {
                let (mean, precision) =
                    (stored.take(&format!("{c}.mean.{name}"))?, stored.take(&format!("{c}.precision.{name}"))?);
                entries.push((name.clone(), mean, precision));
            }
            let damping = content.damping.get(c).cloned().unwrap_or_default();
            let q = DiagonalGaussian::sharing(entries).and_then(|q| q.with_stored_dampings(damping));
            components.push((weight, q.map_err(|e| Error::file(path, e))?));
        }
        stored.finish("component")?;
        Ok(Self::new(components).map_err(|e| Error::file(path, e))?.with_seed(content.seed))
    }
}
