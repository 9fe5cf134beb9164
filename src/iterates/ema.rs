//! A moving average of weights, beside a model for its evaluation.

use super::moments::{Moments, check_some, gaussian};
use super::watched::{Part, Watched};
use crate::params::{Params, Perturbed};
use crate::storage::{AVERAGE, checkpoint};
use crate::{DiagonalGaussian, Error, Result, check};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch::Tensor;

/// An exponential moving average of a model's weights.
///
/// ```text
/// e ← e + r (w - e),   r = (1-β)/(1-βᵗ) in update t     e = Σᵢ βᵗ⁻ⁱ wᵢ / Σᵢ βᵗ⁻ⁱ, i = 1 … t
/// ```
///
/// The early rates are larger than 1-β, so that the average is one of the weights that were visited and of nothing else
/// (debiased). With [`Ema::debias`]`(false)`, r = 1-β from the start, and the weights that the model has when the
/// average is made count as one of them forever.
///
/// With [`Ema::with_variance`] it also keeps the variance of the weights about it, of the same shares aᵢ = rβᵗ⁻ⁱ:
///
/// ```text
/// v = Σ aᵢ (wᵢ - e)²          biased; v / (1 - Σ aᵢ²) is not      Σ aᵢ² → (1-β)/(1+β)
/// ```
///
/// which gives a posterior. Of a training with IVON take its own: average the mean only, and keep the precision of the
/// last step.
///
/// Averages are kept in f32 beside half-precision weights. Buffers (batch-norm statistics) are not averaged, and stay
/// those of the weights themselves: compute them again with the average in the variables, or use layers without.
/// Variables that are created later are picked up, and count as if they had always been at their first value; those
/// that are frozen are averaged like others.
///
/// ```
/// use tch::{Device, Kind, nn};
/// use tch_blr::{Adam, Ema};
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let w = vs.root().zeros("w", &[3]);
/// # let loss = || (&w - 1.0).square().mean(Kind::Float);
/// let mut opt = Adam::default().build(&vs, 1e-2)?;
/// let mut ema = Ema::new(&vs, 0.999)?;
/// for _ in 0..10 {
///     opt.step(loss)?;
///     ema.update()?;
/// }
/// {
///     let _guard = ema.swap_in()?; // the variables hold the average
///     println!("{}", tch::no_grad(loss));
/// } // … and the weights again
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Ema {
    watched: Watched<Moments>,
    decay: f64,
    debias: bool,
    with_variance: bool,
    updates: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    decay: f64,
    debias: bool,
    updates: u64,
    /// In order; the file sorts its tensors.
    names: Vec<String>,
}

/// That of [`AVERAGE`] is a file of weights, to which variances do not belong.
const WITH_VARIANCE: &str = "moving average of weights with variances";
const VARIANCE: &str = ".variance";

impl Ema {
    /// An average of these parameters with decay β = `decay` in [0, 1), which starts at their present values: about the
    /// last 1/(1-β) updates count.
    ///
    /// # Errors
    /// A decay out of range, or no parameter.
    pub fn new(params: impl Into<Params>, decay: f64) -> Result<Self> {
        check::rate("decay", decay)?;
        let watched = Watched::new(params, start(false))?;
        Ok(Ema { watched, decay, debias: true, with_variance: false, updates: 0 })
    }

    /// Whether the average is that of the weights at updates only, default on. Choose it before the first update.
    #[must_use]
    pub fn debias(mut self, debias: bool) -> Self {
        self.debias = debias;
        self
    }

    /// Keeps the variance, too: one more number for each weight. Choose it before the first update.
    #[must_use]
    pub fn with_variance(mut self) -> Self {
        self.with_variance = true;
        self.watched.all_mut().for_each(|moments| moments.variance = Some(moments.mean.zeros_like()));
        self
    }

    /// Takes the present weights into the average: call it after each step of the optimizer.
    ///
    /// # Errors
    /// A parameter of another shape than when its average was started. Nothing has changed then.
    pub fn update(&mut self) -> Result<()> {
        let present = self.watched.look()?;
        let t = self.updates as f64 + 1.0;
        let rate = if self.debias { (1.0 - self.decay) / (1.0 - self.decay.powf(t)) } else { 1.0 - self.decay };
        self.watched.take_in(&present, start(self.with_variance), |moments, weights| moments.take_in(weights, rate));
        self.updates = self.updates.saturating_add(1);
        Ok(())
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The average of one parameter, in its shape: the average's own tensor, so copy it before you write to it.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.watched.get(name).map(|moments| moments.mean.shallow_clone())
    }

    /// v of one parameter, in its shape; `None` without [`Ema::with_variance`]. The average's own tensor, as
    /// [`Ema::get`].
    pub fn variance(&self, name: &str) -> Option<Tensor> {
        self.watched.get(name)?.variance.as_ref().map(Tensor::shallow_clone)
    }

    /// 1 - Σ aᵢ², by which v is too small on average; 0 before the first update.
    pub fn bias(&self) -> f64 {
        if self.updates == 0 {
            return 0.0;
        }
        let (b, bt) = (self.decay, self.decay.powf(self.updates as f64));
        // The squared shares are a geometric series; without debiasing the first weights have the share βᵗ.
        let shares =
            if self.debias { (1.0 + bt) / (1.0 - bt) } else { bt * bt * (1.0 + b) / (1.0 - b) + 1.0 - bt * bt };
        1.0 - shares * (1.0 - b) / (1.0 + b)
    }

    /// N(e, v / (1 - Σ aᵢ²)): the average, with the spread of the iterates about it (unbiased;
    /// `temper(ema.`[`bias()`](Ema::bias)`)` of it has v itself). Not less than
    /// [`SMALLEST_VARIANCE`](crate::iterates::SMALLEST_VARIANCE).
    ///
    /// # Errors
    /// Without [`Ema::with_variance`]; fewer than two updates; averages that are not finite; a decay of 0, by which
    /// only one iterate counts.
    pub fn posterior(&self) -> Result<DiagonalGaussian> {
        if !self.with_variance {
            let problem = "the average keeps no variance: make it by Ema::new(..)?.with_variance()";
            return Err(Error::Posterior(problem.to_owned()));
        }
        check_some("the average is one of", self.updates)?;
        check::positive("decay", self.decay)?;
        gaussian(self.watched.all(), 1.0 / self.bias())
    }

    /// Puts the averages into the variables until the guard is dropped, which brings the weights back bit by bit. Drop
    /// it before the next step, which is refused as long as it lives.
    ///
    /// # Errors
    /// A variable of another shape than when its average was started; [`Error::InUse`] if another thread perturbs one.
    pub fn swap_in(&self) -> Result<Perturbed> {
        self.watched.swap_in(|moments| moments.mean.shallow_clone())
    }

    /// Writes averages, decay and number of updates to one safetensors file, which is replaced atomically. Its tensors
    /// have the variables' names, so [`VarStore::load`](tch::nn::VarStore::load) reads it too; variances are
    /// `<name>.variance`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let Ema { decay, debias, updates, .. } = *self;
        let content = |names| Content { decay, debias, updates, names };
        self.watched.save(path.as_ref(), self.form(), content, |Moments { mean, variance }| {
            let variance = variance.as_ref().map(|v| (VARIANCE, v.shallow_clone()));
            [("", mean.shallow_clone())].into_iter().chain(variance).collect()
        })
    }

    fn form(&self) -> &'static str {
        if self.with_variance { WITH_VARIANCE } else { AVERAGE }
    }

    /// Goes on where [`Ema::save`] left it, with the file's decay: of the same parameters, in any order. The model's
    /// variables stay as they are.
    ///
    /// # Errors
    /// A file that cannot be read, is broken or holds something else, as an average with a variance for one without;
    /// parameters that are missing, extra or of another shape. Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let (path, with_variance) = (path.as_ref(), self.with_variance);
        let (tensors, Content { decay, debias, updates, names }) = checkpoint::load(path, self.form())?;
        check::rate("decay", decay).map_err(|e| Error::file(path, e))?;
        let moments = |part: &mut Part| {
            let variance = with_variance.then(|| part.take_variance(VARIANCE)).transpose()?;
            Ok(Moments { mean: part.take("", &[])?, variance })
        };
        let all = self.watched.read(path, tensors, names, start(with_variance), moments)?;
        self.watched.put(all);
        (self.decay, self.debias, self.updates) = (decay, debias, updates);
        Ok(())
    }
}

fn start(with_variance: bool) -> impl Fn(Tensor) -> Moments {
    move |weights| Moments::at(weights, with_variance)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iterates::testing::{set, values};
    use tch::nn::VarStore;
    use tch::{Device, Kind};

    /// Powers of ½, so that every average is exact.
    #[test]
    fn averages() {
        let run = |debias: bool| {
            let w = Tensor::from_slice(&[8.0, -8.0]).set_requires_grad(true);
            let mut ema = Ema::new(Params::named([("w", w.shallow_clone())]).unwrap(), 0.5).unwrap().debias(debias);
            let visited = [[2.0, 4.0], [5.0, -2.0], [16.0, 0.0]].map(|x| {
                set(&w, &x);
                ema.update().unwrap();
                values(&ema.get("w").unwrap())
            });
            assert_eq!((ema.updates(), values(&w)), (3, vec![16.0, 0.0]));
            visited
        };
        // e₂ = (½·2 + 5)/(½ + 1), e₃ = (¼·2 + ½·5 + 16)/(¼ + ½ + 1)
        let [first, second, third] = run(true);
        assert_eq!(first, [2.0, 4.0]);
        for (ours, expected) in [(second, [4.0, 0.0]), (third, [76.0 / 7.0, 0.0])] {
            assert!(ours.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-14), "{ours:?} and not {expected:?}");
        }
        assert_eq!(run(false), [[5.0, -2.0], [5.0, -2.0], [10.5, -1.0]]);
    }

    /// The guard brings back what was there, bit by bit and in its own memory.
    #[test]
    fn swapped_in_and_out() {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            let w = Tensor::zeros([2], (kind, Device::Cpu)).set_requires_grad(true);
            let params = Params::named([("w", w.shallow_clone())]).unwrap();
            let mut ema = Ema::new(params, 0.5).unwrap().debias(false);
            set(&w, &[1.0, 3.0]);
            ema.update().unwrap();
            assert_eq!(ema.get("w").unwrap().kind(), if kind == Kind::Double { kind } else { Kind::Float });
            let address = w.data_ptr();
            let guard = ema.swap_in().unwrap();
            assert_eq!((values(&w), w.kind()), (vec![0.5, 1.5], kind));
            // Writing to the variable does not write to the average.
            set(&w, &[9.0, 9.0]);
            drop(guard);
            assert_eq!((values(&w), w.data_ptr()), (vec![1.0, 3.0], address));
            assert_eq!(values(&ema.get("w").unwrap()), [0.5, 1.5]);
        }
    }

    #[test]
    fn a_late_variable_starts_where_it_is() {
        let vs = VarStore::new(Device::Cpu);
        let a = vs.root().zeros("a", &[1]);
        let mut ema = Ema::new(&vs, 0.5).unwrap();
        ema.update().unwrap();
        let b = vs.root().ones("b", &[1]);
        set(&a, &[1.0]);
        ema.update().unwrap();
        assert!((ema.get("a").unwrap().double_value(&[0]) - 2.0 / 3.0).abs() < 1e-7);
        assert_eq!(ema.get("b").unwrap().double_value(&[0]), 1.0);
        drop(ema.swap_in().unwrap());
        assert_eq!(values(&b), [1.0]);
    }

    #[test]
    fn a_file_goes_on_where_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ema.safetensors");
        let store = || {
            let vs = VarStore::new(Device::Cpu);
            let [a, b] = ["a", "b"].map(|name| vs.root().zeros(name, &[2]));
            (vs, a, b)
        };
        let ((vs, a, _b), (mut other_vs, other_a, other_b)) = (store(), store());
        let mut ema = Ema::new(&vs, 0.5).unwrap();
        for x in [[1.0, 2.0], [4.0, 2.0]] {
            set(&a, &x);
            ema.update().unwrap();
        }
        ema.save(&path).unwrap();
        let mut resumed = Ema::new(&other_vs, 0.9).unwrap().debias(false);
        resumed.load(&path).unwrap();
        assert_eq!(values(&other_a), [0.0, 0.0], "the weights are no part of it");
        for (ema, w) in [(&mut ema, &a), (&mut resumed, &other_a)] {
            set(w, &[7.0, 7.0]);
            ema.update().unwrap();
        }
        assert_eq!(values(&ema.get("a").unwrap()), values(&resumed.get("a").unwrap()));
        assert_eq!(resumed.updates(), 3);
        // It is a file of weights as well.
        ema.save(&path).unwrap();
        other_vs.load(&path).unwrap();
        assert_eq!(values(&other_a), values(&ema.get("a").unwrap()));
        assert_eq!(values(&other_b), [0.0, 0.0]);

        let refused = |ema: &mut Ema, what: &str| {
            let before = (values(&ema.get("a").unwrap()), ema.updates);
            let e = ema.load(&path).unwrap_err().to_string();
            assert!(e.contains(what) && e.contains("ema.safetensors"), "{e}");
            assert_eq!((values(&ema.get("a").unwrap()), ema.updates), before);
        };
        let named = |name: &str, shape: &[i64]| (name.to_owned(), Tensor::zeros(shape, (Kind::Float, Device::Cpu)));
        let of = |parameters: Vec<(String, Tensor)>| Ema::new(Params::named(parameters).unwrap(), 0.5).unwrap();
        refused(&mut of(vec![named("a", &[2])]), "`b`");
        refused(&mut of(vec![named("a", &[2]), named("b", &[2]), named("c", &[2])]), "`c`");
        refused(&mut of(vec![named("a", &[3]), named("b", &[2])]), "[3]");
    }

    #[test]
    fn what_cannot_be_averaged_is_refused() {
        let vs = VarStore::new(Device::Cpu);
        assert!(Ema::new(&vs, 0.5).unwrap_err().to_string().contains("there are none"));
        let _w = vs.root().zeros("w", &[1]);
        for decay in [1.0, -0.1, f64::NAN] {
            assert!(Ema::new(&vs, decay).unwrap_err().to_string().contains("decay"));
        }
    }

    /// Shares 1/7, 2/7 and 4/7 of 1, 2 and 4, and without debiasing 1/8, 1/8, 1/4, 1/2 of 1, 1, 2 and 4.
    #[test]
    fn a_variance_of_the_same_shares() {
        let w = Tensor::from_slice(&[1.0]).set_requires_grad(true);
        let ema = |debias: bool| {
            set(&w, &[1.0]);
            let params = Params::named([("w", w.shallow_clone())]).unwrap();
            let mut ema = Ema::new(params, 0.5).unwrap().debias(debias).with_variance();
            for x in [1.0, 2.0, 4.0] {
                set(&w, &[x]);
                ema.update().unwrap();
            }
            ema
        };
        let near = |x: Tensor, y: f64| assert!((x.double_value(&[0]) - y).abs() < 1e-14, "{x:?} and not {y}");
        for (debias, mean, variance, shares) in [
            (true, 3.0, 10.0 / 7.0, 21.0 / 49.0),
            (false, 2.75, 1.0 / 4.0 + 4.0 / 4.0 + 16.0 / 2.0 - 2.75 * 2.75, 1.0 / 64.0 * 2.0 + 1.0 / 16.0 + 1.0 / 4.0),
        ] {
            let ema = ema(debias);
            near(ema.get("w").unwrap(), mean);
            near(ema.variance("w").unwrap(), variance);
            assert!((ema.bias() - (1.0 - shares)).abs() < 1e-15, "{}", ema.bias());
            let q = ema.posterior().unwrap();
            near(q.mean("w").unwrap(), mean);
            near(q.variance("w").unwrap(), variance / ema.bias());
            near(q.temper(ema.bias()).unwrap().variance("w").unwrap(), variance);
        }
        // 10/7 over 4/7
        near(ema(true).posterior().unwrap().variance("w").unwrap(), 2.5);
    }

    #[test]
    fn weights_that_stay_have_no_variance() {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().zeros("w", &[2]);
        set(&w, &[0.1, 0.1]);
        let mut ema = Ema::new(&vs, 0.9).unwrap().with_variance();
        for _ in 0..20 {
            ema.update().unwrap();
        }
        assert_eq!(values(&ema.variance("w").unwrap()), [0.0, 0.0]);
        let q = ema.posterior().unwrap();
        let smallest = crate::iterates::SMALLEST_VARIANCE / ema.bias();
        assert!((q.variance("w").unwrap() / smallest - 1.0).abs().max().double_value(&[]) < 1e-6);
        assert_eq!(values(&q.mean("w").unwrap()), values(&w));
    }

    #[test]
    fn a_posterior_needs_a_variance_and_two_updates() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ema.safetensors");
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().zeros("w", &[2]);
        let without = Ema::new(&vs, 0.5).unwrap();
        assert!(without.posterior().unwrap_err().to_string().contains("with_variance()"));
        let mut ema = Ema::new(&vs, 0.5).unwrap().with_variance();
        ema.update().unwrap();
        assert!(ema.posterior().unwrap_err().to_string().contains("it has 1, and"));
        set(&w, &[1.0, 2.0]);
        ema.update().unwrap();
        ema.save(&path).unwrap();
        let mut resumed = Ema::new(&vs, 0.9).unwrap().with_variance();
        resumed.load(&path).unwrap();
        for ema in [&mut ema, &mut resumed] {
            set(&w, &[-3.0, 2.5]);
            ema.update().unwrap();
        }
        assert_eq!(ema.posterior().unwrap().sample(0).unwrap(), resumed.posterior().unwrap().sample(0).unwrap());
        let e = Ema::new(&vs, 0.9).unwrap().load(&path).unwrap_err().to_string();
        assert!(e.contains("with variances"), "{e}");
        let mut last = Ema::new(&vs, 0.0).unwrap().with_variance();
        for _ in 0..2 {
            last.update().unwrap();
        }
        assert!(last.posterior().unwrap_err().to_string().contains("decay"));
    }
}
