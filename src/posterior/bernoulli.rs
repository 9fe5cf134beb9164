//! Binary weights, independent of each other.

use super::any::{OUTSIDE_OF_TRAINING, check_sample, posterior};
use super::in_model;
use super::named::Named;
use super::valid::{Stored, finite_float, no_parameter};
use crate::kernel::{self, Draw};
use crate::link::{half_logistic, sign};
use crate::params::Perturbed;
use crate::storage::checkpoint;
use crate::{Error, Params, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::{Kind, Tensor};

/// q(w) = Πᵢ exp(λᵢwᵢ)/(2 cosh λᵢ) over w ∈ {-1, 1}: the posterior that [`BayesBiNN`](crate::BayesBiNN) learns.
///
/// One natural parameter λ for every weight, by the name of the parameter:
///
/// ```text
/// P(w = 1) = 1/(1 + exp(-2λ)),  mean tanh λ,  mode sign λ (1 for λ = 0)
/// ```
///
/// It owns its tensors, can be saved and can predict. Sample k of one seed is always the same
/// ([`MeanFieldBernoulli::with_seed`], default 0).
#[derive(Debug)]
pub struct MeanFieldBernoulli {
    /// (name, λ); λ in f32 or f64.
    entries: Named<(String, Tensor)>,
    seed: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    seed: u64,
    /// In order; the file sorts its tensors.
    names: Vec<String>,
}

const FORM: &str = "mean-field Bernoulli posterior";

posterior!(MeanFieldBernoulli);

impl MeanFieldBernoulli {
    /// A posterior from (name, λ) of each parameter, which it copies.
    ///
    /// # Errors
    /// No entry, a name twice, a kind other than f32 and f64, a λ that is not finite.
    pub fn new<S: Into<String>>(entries: impl IntoIterator<Item = (S, Tensor)>) -> Result<Self> {
        let mut q = MeanFieldBernoulli { entries: Named::new(), seed: 0 };
        for (name, natural) in entries {
            let name = name.into();
            finite_float(&name, "natural parameter", &natural)?;
            // A copy, because λ may be an optimizer's state that goes on moving.
            q.entries.push((name, natural.detach().copy()))?;
        }
        if q.entries.is_empty() {
            return Err(no_parameter());
        }
        Ok(q)
    }

    /// Names of the parameters, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|(name, _)| name.as_str())
    }

    /// Number of weights.
    pub fn len(&self) -> usize {
        self.entries.iter().map(|(_, natural)| natural.numel()).sum()
    }

    /// λ of one parameter.
    pub fn natural(&self, name: &str) -> Option<&Tensor> {
        self.entries.get(name).map(|(_, natural)| natural)
    }

    /// tanh λ of one parameter.
    pub fn mean(&self, name: &str) -> Option<Tensor> {
        self.natural(name).map(Tensor::tanh)
    }

    /// 1 - tanh² λ = 1/cosh² λ of one parameter, which loses no digits where λ is large.
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        // cosh overflows to infinity for large λ, and its reciprocal is then the right 0.
        self.natural(name).map(|natural| natural.cosh().reciprocal().square())
    }

    /// sign λ of one parameter: its most probable weights.
    pub fn mode(&self, name: &str) -> Option<Tensor> {
        self.natural(name).map(sign)
    }

    fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Vec<(String, Tensor)> {
        self.entries.iter().map(|(name, natural)| (name.clone(), f(natural))).collect()
    }

    /// Sample `k` = 0, 1, … of every parameter, in order: sign(λ+d) with d half a standard logistic, the relaxed
    /// samples of the training for τ → 0.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sample(&self, k: u64) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = tch::no_grad_guard();
        let k = check_sample(k)?;
        let mut group = 0;
        let samples = self.entries.iter().enumerate().map(|(parameter, (name, natural))| {
            let at = Draw { step: OUTSIDE_OF_TRAINING, sample: k, parameter, group };
            group += kernel::groups(natural.numel());
            let z = kernel::normals(self.seed, at, natural)?;
            Ok((name.clone(), sign(&(natural + half_logistic(&z)))))
        });
        samples.collect()
    }

    /// As [`MeanFieldBernoulli::perturb`] with the mode.
    ///
    /// # Errors
    /// As [`MeanFieldBernoulli::perturb`].
    pub fn perturb_to_mode(&self, params: impl Into<Params>) -> Result<Perturbed> {
        in_model::enter(&Params::separate(params)?, self.map(sign))
    }

    /// Puts the mode into the variables of a model, for good.
    ///
    /// # Errors
    /// As [`MeanFieldBernoulli::perturb`].
    pub fn copy_mode_to(&self, params: impl Into<Params>) -> Result<()> {
        in_model::write(&Params::separate(params)?, self.map(sign))
    }

    fn sum(&self, f: impl Fn(&Tensor) -> Tensor) -> f64 {
        let terms = self.entries.iter().map(|(_, natural)| f(&natural.to_kind(Kind::Double)));
        terms.map(|t| t.sum(Kind::Double).double_value(&[])).sum()
    }

    /// Entropy Σ ( ln(1 + exp(-2|λ|)) + |λ| (1 - tanh|λ|) ), in nats.
    pub fn entropy(&self) -> f64 {
        self.sum(|natural| {
            let l = natural.abs();
            // In |λ|: the function is even, and exp(2λ) would overflow.
            (&l * -2.0).exp().log1p() + &l * (-l.tanh() + 1.0)
        })
    }

    /// KL(self ‖ p) = Σ ( (λ - λ_p) tanh λ - ln cosh λ + ln cosh λ_p ), in nats.
    ///
    /// # Errors
    /// If the two do not have the same parameters.
    pub fn kl(&self, p: &MeanFieldBernoulli) -> Result<f64> {
        self.entries.same(&p.entries)?;
        // ln cosh x = |x| + ln(1 + exp(-2|x|)) - ln 2, whose last term cancels.
        let ln_cosh = |x: &Tensor| x.abs() + (x.abs() * -2.0).exp().log1p();
        let terms = self.entries.iter().map(|(name, natural)| {
            let (a, b) = (natural.to_kind(Kind::Double), p.natural(name).expect("same() has seen to it"));
            // The other posterior may have been loaded, and is then on the CPU.
            let b = b.to_device(a.device()).to_kind(Kind::Double);
            let terms = (&a - &b) * a.tanh() - ln_cosh(&a) + ln_cosh(&b);
            terms.sum(Kind::Double).double_value(&[])
        });
        Ok(terms.sum())
    }

    /// Tensor `<name>` is λ.
    fn write(&self, path: &Path) -> Result<()> {
        let names = self.names().map(str::to_owned).collect();
        checkpoint::save(path, FORM, &self.map(Tensor::shallow_clone), &Content { seed: self.seed, names })
    }

    /// Reads what [`MeanFieldBernoulli::save`] wrote, onto the CPU: tensor `<name>` is λ.
    ///
    /// # Errors
    /// If the file cannot be read, is broken, or holds something else.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let (tensors, content): (_, Content) = checkpoint::load(path, FORM)?;
        let mut stored = Stored { path, tensors };
        let mut entries = Vec::new();
        for name in content.names {
            let natural = stored.take(&name)?;
            entries.push((name, natural));
        }
        stored.finish("parameter")?;
        Ok(Self::new(entries).map_err(|e| Error::file(path, e))?.with_seed(content.seed))
    }
}
