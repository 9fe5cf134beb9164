//! Moving averages of weights: beside a model for its evaluation ([`Ema`]), or in another one ([`soft_update`], the
//! target networks of reinforcement learning).
//!
//! They know variables by name and nothing of how these are trained, so any optimizer will do, tch's too.

use crate::params::{Leaf, Params, Perturbed};
use crate::storage::{AVERAGE, checkpoint};
use crate::{Error, Result, check, kernel};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
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
/// Averages are kept in f32 beside half-precision weights. Buffers (batch-norm statistics) are not averaged, and stay
/// those of the weights themselves. Variables that are created later are picked up.
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
    params: Params,
    /// One per parameter.
    averages: Vec<Tensor>,
    decay: f64,
    debias: bool,
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

const FORM: &str = AVERAGE;

impl Ema {
    /// An average of these parameters with decay β = `decay` in [0, 1), which starts at their present values: about the
    /// last 1/(1-β) updates count.
    ///
    /// # Errors
    /// A decay out of range, or no parameter.
    pub fn new(params: impl Into<Params>, decay: f64) -> Result<Self> {
        check::rate("decay", decay)?;
        let params = Params::separate(params)?;
        if params.is_empty() {
            let problem = "there are none; create the model's variables (layers) before the average";
            return Err(Error::Parameters(problem.to_owned()));
        }
        params.check_free()?;
        let mut ema = Ema { params, averages: Vec::new(), decay, debias: true, updates: 0 };
        ema.extend();
        Ok(ema)
    }

    /// Whether the average is that of the weights at updates only, default on. Choose it before the first update.
    #[must_use]
    pub fn debias(mut self, debias: bool) -> Self {
        self.debias = debias;
        self
    }

    /// Gives every parameter that has none an average, at its present value.
    fn extend(&mut self) {
        let _no_grad = tch::no_grad_guard();
        let new = &self.params.leaves()[self.averages.len()..];
        self.averages.extend(new.iter().map(|leaf| leaf.tensor.detach().to_kind(leaf.state_kind()).copy()));
    }

    /// Takes the present weights into the average: call it after each step of the optimizer.
    ///
    /// # Errors
    /// A parameter of another shape than when its average was started. Nothing has changed then.
    pub fn update(&mut self) -> Result<()> {
        self.params.refresh();
        let _claim = self.params.claim()?;
        self.extend();
        let pairs = || self.params.leaves().iter().zip(&self.averages);
        pairs().try_for_each(|(leaf, average)| same_shape(leaf.name(), average, &leaf.tensor))?;
        let t = self.updates as f64 + 1.0;
        let rate = if self.debias { (1.0 - self.decay) / (1.0 - self.decay.powf(t)) } else { 1.0 - self.decay };
        pairs().for_each(|(leaf, average)| towards(average, &leaf.tensor, rate));
        self.updates += 1;
        Ok(())
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// The average of one parameter, in its shape: the average's own tensor, so copy it before you write to it.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.averages.get(self.params.number(name)?).map(Tensor::shallow_clone)
    }

    /// Puts the averages into the variables until the guard is dropped, which brings the weights back bit by bit. Drop
    /// it before the next step, which is refused as long as it lives.
    ///
    /// # Errors
    /// A variable of another shape than when its average was started; [`Error::InUse`] if another thread perturbs one.
    pub fn swap_in(&self) -> Result<Perturbed> {
        let value = |(leaf, average): (&Leaf, &Tensor)| {
            same_shape(leaf.name(), average, &leaf.tensor)?;
            // A copy, because writing to the variable would write to it.
            let place = (leaf.tensor.device(), leaf.tensor.kind());
            Ok((leaf.tensor.shallow_clone(), average.f_to_device(place.0)?.f_to_kind(place.1)?.copy()))
        };
        let pairs = self.params.leaves().iter().zip(&self.averages).map(value);
        Perturbed::enter(pairs.collect::<Result<Vec<_>>>()?)
    }

    /// Writes averages, decay and number of updates to one safetensors file, which is replaced atomically. Its tensors
    /// have the variables' names, so [`VarStore::load`](tch::nn::VarStore::load) reads it too.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let names: Vec<String> = self.params.names().map(str::to_owned).take(self.averages.len()).collect();
        let averages = self.averages.iter().map(Tensor::shallow_clone);
        let tensors: Vec<(String, Tensor)> = names.iter().cloned().zip(averages).collect();
        let Ema { decay, debias, updates, .. } = *self;
        checkpoint::save(path.as_ref(), FORM, &tensors, &Content { decay, debias, updates, names })
    }

    /// Goes on where [`Ema::save`] left it, with the file's decay: of the same parameters, in any order. The model's
    /// variables stay as they are.
    ///
    /// # Errors
    /// A file that cannot be read, is broken or holds something else; parameters that are missing, extra or of another
    /// shape. Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (mut tensors, Content { decay, debias, updates, names }) = checkpoint::load(path, FORM)?;
        let refused = |problem: String| Error::file(path, problem);
        check::rate("decay", decay).map_err(|e| Error::file(path, e))?;
        self.params.refresh();
        self.extend();
        let names: HashSet<String> = names.into_iter().collect();
        let mut averages = Vec::new();
        for (leaf, average) in self.params.leaves().iter().zip(&self.averages) {
            // By any of its names: a tied variable's first one depends on when it was tied.
            let name = leaf.names.iter().find(|name| names.contains(*name)).map_or(leaf.name(), String::as_str);
            let missing = || refused(format!("has no tensor `{name}`, which the model has"));
            let found = tensors.remove(name).ok_or_else(missing)?;
            same_shape(name, average, &found).map_err(|e| Error::file(path, e))?;
            if let Some(value) = kernel::first_non_finite(&found) {
                return Err(refused(format!("tensor `{name}` is not finite ({value})")));
            }
            averages.push(found.f_to_device(average.device())?.f_to_kind(average.kind())?);
        }
        if let Some(name) = tensors.keys().next() {
            return Err(refused(format!("has a tensor `{name}`, which the model does not have")));
        }
        (self.averages, self.decay, self.debias, self.updates) = (averages, decay, debias, updates);
        Ok(())
    }
}

/// Moves every variable of `target` a step towards the variable of the same name in `source`:
/// θ' ← θ' + τ (θ - θ'), 0 < τ ≤ 1, in place.
///
/// The target may be frozen and on another device. What `source` has beyond it, and buffers of either, are left alone.
/// Half-precision targets lose steps that are smaller than their last digit.
///
/// ```
/// # use tch::{Device, nn};
/// # fn main() -> tch_blr::Result<()> {
/// # let (online, mut target) = (nn::VarStore::new(Device::Cpu), nn::VarStore::new(Device::Cpu));
/// # let _nets = [&online, &target].map(|vs| nn::linear(vs.root(), 4, 2, Default::default()));
/// target.copy(&online)?;
/// target.freeze();
/// // … after each step of the optimizer over `online`:
/// tch_blr::soft_update(&target, &online, 0.005)?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// τ out of range; a variable of the target that the source does not have, or has in another shape. Nothing has changed
/// then.
pub fn soft_update(target: impl Into<Params>, source: impl Into<Params>, tau: f64) -> Result<()> {
    check::that("tau", tau, tau > 0.0 && tau <= 1.0, "a number in (0, 1]")?;
    let (target, source) = (Params::separate(target)?, Params::separate(source)?);
    source.check_free()?;
    let _claim = target.claim()?;
    let pair = |ours: &Leaf| {
        let theirs = ours.names.iter().find_map(|name| source.find(name));
        let theirs =
            theirs.ok_or_else(|| Error::parameter(ours.name(), "the target has it and the source does not"))?;
        same_shape(ours.name(), &ours.tensor, &theirs.tensor)?;
        Ok((ours.tensor.shallow_clone(), theirs.tensor.shallow_clone()))
    };
    let pairs = target.leaves().iter().map(pair).collect::<Result<Vec<_>>>()?;
    for (ours, theirs) in &pairs {
        towards(ours, theirs, tau);
    }
    Ok(())
}

fn same_shape(name: &str, average: &Tensor, weight: &Tensor) -> Result<()> {
    let (was, now) = (average.size(), weight.size());
    if was == now {
        return Ok(());
    }
    Err(Error::parameter(name, format!("its average has shape {was:?} and its weight {now:?}")))
}

/// e ← e + r (w - e), for tensors of one shape.
fn towards(average: &Tensor, weight: &Tensor, rate: f64) {
    let _no_grad = tch::no_grad_guard();
    let weight = weight.detach().to_device(average.device()).to_kind(average.kind());
    // libtorch's form of it, in which r = 1 is the weight to the bit, and a weight that stays is its own average.
    _ = average.shallow_clone().lerp_(&weight, rate);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::nn::VarStore;
    use tch::{Device, Kind};

    fn set(w: &Tensor, x: &[f64]) {
        tch::no_grad(|| w.shallow_clone().copy_(&Tensor::from_slice(x)));
    }

    fn values(t: &Tensor) -> Vec<f64> {
        Vec::try_from(t.to_kind(Kind::Double)).unwrap()
    }

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
            let before = (values(&ema.averages[0]), ema.updates);
            let e = ema.load(&path).unwrap_err().to_string();
            assert!(e.contains(what) && e.contains("ema.safetensors"), "{e}");
            assert_eq!((values(&ema.averages[0]), ema.updates), before);
        };
        let named = |name: &str, shape: &[i64]| (name.to_owned(), Tensor::zeros(shape, (Kind::Float, Device::Cpu)));
        let of = |parameters: Vec<(String, Tensor)>| Ema::new(Params::named(parameters).unwrap(), 0.5).unwrap();
        refused(&mut of(vec![named("a", &[2])]), "`b`");
        refused(&mut of(vec![named("a", &[2]), named("b", &[2]), named("c", &[2])]), "`c`");
        refused(&mut of(vec![named("a", &[3]), named("b", &[2])]), "[3]");
    }

    #[test]
    fn targets_follow() {
        let store = |x: [f64; 2]| {
            let vs = VarStore::new(Device::Cpu);
            let w = vs.root().sub("net").zeros("w", &[2]);
            set(&w, &x);
            (vs, w)
        };
        let ((mut target, w), (source, v)) = (store([0.0, 4.0]), store([8.0, 4.0]));
        let _more = source.root().zeros("head", &[1]);
        target.freeze();
        soft_update(&target, &source, 0.25).unwrap();
        soft_update(&target, &source, 0.25).unwrap();
        assert_eq!((values(&w), values(&v)), (vec![3.5, 4.0], vec![8.0, 4.0]));
        soft_update(&target, &source, 1.0).unwrap();
        assert_eq!(values(&w), [8.0, 4.0]);

        let e = soft_update(&source, &target, 0.5).unwrap_err().to_string();
        assert!(e.contains("`head`"), "{e}");
        for tau in [0.0, -0.1, 1.5, f64::NAN] {
            assert!(soft_update(&target, &source, tau).unwrap_err().to_string().contains("tau"));
        }
        let other = Params::named([("net.w", Tensor::zeros([3], (Kind::Float, Device::Cpu)))]).unwrap();
        assert!(soft_update(&target, other, 0.5).unwrap_err().to_string().contains("[3]"));
        assert_eq!(values(&w), [8.0, 4.0]);
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
}
