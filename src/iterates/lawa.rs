//! The average of the latest checkpoints.

use super::moments::{Moments, check_some, gaussian};
use super::watched::{Part, Watched};
use crate::params::{Params, Perturbed};
use crate::storage::checkpoint;
use crate::{DiagonalGaussian, Error, Result, check};
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::path::Path;
use tch::Tensor;

/// Latest weight averaging: the uniform average of the last k of the weights after every n-th step (Kaddour 2022, *Stop
/// Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging*).
///
/// ```text
/// e = (1/k) Σ θ_j over the last k checkpoints j, at steps n, 2n, …       k ≈ 6, n: an epoch
/// ```
///
/// Unlike a moving average it forgets at once what is older than kn steps; it holds k copies of the weights. Fewer than
/// k checkpoints are averaged while there are no more. Kinds, buffers, late and frozen variables: as in
/// [`Ema`](crate::Ema).
///
/// ```
/// use tch::{Device, Kind, nn, nn::OptimizerConfig};
/// use tch_blr::Lawa;
/// # fn main() -> tch_blr::Result<()> {
/// # let vs = nn::VarStore::new(Device::Cpu);
/// # let w = vs.root().zeros("w", &[3]);
/// # let loss = || (&w - 1.0).square().mean(Kind::Float);
/// let mut opt = nn::Adam::default().build(&vs, 1e-2)?; // tch's own
/// let mut lawa = Lawa::new(&vs, 6, 10)?;
/// for _ in 0..100 {
///     opt.backward_step(&loss());
///     lawa.update()?;
/// }
/// let _guard = lawa.swap_in()?; // the variables hold the average of steps 50, 60, … 100
/// println!("{}", tch::no_grad(loss));
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Lawa {
    watched: Watched<Latest>,
    checkpoints: usize,
    every: u64,
    updates: u64,
}

/// Of one parameter, the oldest first.
type Latest = VecDeque<Tensor>;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Content {
    checkpoints: usize,
    every: u64,
    updates: u64,
    /// In order; the file sorts its tensors.
    names: Vec<String>,
}

const FORM: &str = "latest weights";
const CHECKPOINTS: &str = ".checkpoints";

impl Content {
    /// Checkpoints that there are.
    fn held(&self) -> usize {
        held(self.updates, self.every, self.checkpoints)
    }
}

fn held(updates: u64, every: u64, checkpoints: usize) -> usize {
    usize::try_from(updates / every).unwrap_or(usize::MAX).min(checkpoints)
}

impl Lawa {
    /// An average of the last k = `checkpoints` ≥ 1 of these parameters, taken `every` n ≥ 1 updates.
    ///
    /// # Errors
    /// A k or n of 0, or no parameter.
    pub fn new(params: impl Into<Params>, checkpoints: usize, every: u64) -> Result<Self> {
        check::count("checkpoints", checkpoints)?;
        check::that("every", every, every >= 1, "at least 1")?;
        Ok(Lawa { watched: Watched::new(params, |_| Latest::new())?, checkpoints, every, updates: 0 })
    }

    /// Counts a step, and takes every n-th one's weights: call it after each step of the optimizer.
    ///
    /// # Errors
    /// Weights that are not finite, a parameter of another shape than before. Nothing has changed then.
    pub fn update(&mut self) -> Result<()> {
        let next = self.updates.saturating_add(1);
        if !next.is_multiple_of(self.every) {
            self.updates = next;
            return Ok(());
        }
        let present = self.watched.look()?;
        present.check_finite()?;
        let (k, before) = (self.checkpoints, self.held());
        self.watched.take_in(&present, start(before), |latest, weights| {
            if latest.len() == k {
                latest.pop_front();
            }
            latest.push_back(weights.copy());
        });
        self.updates = next;
        Ok(())
    }

    /// Updates so far.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Checkpoints that are averaged at present.
    pub fn held(&self) -> usize {
        held(self.updates, self.every, self.checkpoints)
    }

    /// The average of one parameter, in its shape; `None` before the first checkpoint.
    pub fn get(&self, name: &str) -> Option<Tensor> {
        self.watched.get(name).filter(|latest| !latest.is_empty()).map(|latest| moments(latest).mean)
    }

    /// N(e, Σ (θ_j - e)²/(k-1)) of the k checkpoints that are there: the average with their spread. Not less than
    /// [`SMALLEST_VARIANCE`](crate::iterates::SMALLEST_VARIANCE). Few checkpoints tell little of a variance: of six it
    /// is known within a factor of two.
    ///
    /// # Errors
    /// Fewer than two checkpoints.
    pub fn posterior(&self) -> Result<DiagonalGaussian> {
        let k = self.held();
        check_some("there are checkpoints of", k as u64)?;
        let all: Vec<(String, Moments)> = self.watched.all().map(|(name, latest)| (name, moments(latest))).collect();
        gaussian(all.iter().map(|(name, moments)| (name.clone(), moments)), k as f64 / (k as f64 - 1.0))
    }

    /// Puts the averages into the variables until the guard is dropped, as [`Ema::swap_in`](crate::Ema::swap_in).
    ///
    /// # Errors
    /// As there; no checkpoint yet.
    pub fn swap_in(&self) -> Result<Perturbed> {
        if self.held() == 0 {
            let (updates, n) = (self.updates, self.every);
            let problem = format!("there is no checkpoint after {updates} updates: the first is taken at update {n}");
            return Err(Error::Posterior(problem));
        }
        self.watched.swap_in(|latest| moments(latest).mean)
    }

    /// Writes the checkpoints that there are, k, n and the number of updates to one safetensors file, which is replaced
    /// atomically: of each parameter a tensor `<name>.checkpoints` `[k, …]`, the oldest first.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let Lawa { checkpoints, every, updates, .. } = *self;
        let content = |names| Content { checkpoints, every, updates, names };
        self.watched.save(path.as_ref(), FORM, content, |latest| {
            // libtorch stacks no empty list.
            if latest.is_empty() {
                Vec::new()
            } else {
                vec![(CHECKPOINTS, Tensor::stack(&latest.iter().collect::<Vec<_>>(), 0))]
            }
        })
    }

    /// Goes on where [`Lawa::save`] left it, with the file's k and n: of the same parameters, in any order. The model's
    /// variables stay as they are.
    ///
    /// # Errors
    /// As [`Ema::load`](crate::Ema::load). Nothing has changed then.
    pub fn load(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let (tensors, content): (_, Content) = checkpoint::load(path, FORM)?;
        let refused = |e: Error| Error::file(path, e);
        check::count("checkpoints", content.checkpoints).map_err(refused)?;
        check::that("every", content.every, content.every >= 1, "at least 1").map_err(refused)?;
        let k = content.held();
        let latest = |part: &mut Part| {
            if k == 0 {
                return Ok(Latest::new());
            }
            let all = part.take(CHECKPOINTS, &[k as i64])?;
            Ok(all.f_unbind(0)?.into_iter().map(|t| t.copy()).collect())
        };
        let all = self.watched.read(path, tensors, content.names, start(self.held()), latest)?;
        self.watched.put(all);
        (self.checkpoints, self.every, self.updates) = (content.checkpoints, content.every, content.updates);
        Ok(())
    }
}

/// A variable that is created later was always at its first value.
fn start(held: usize) -> impl Fn(Tensor) -> Latest {
    move |weights| (0..held).map(|_| weights.copy()).collect()
}

/// With equal shares, by increments: equal checkpoints are their own average to the bit.
fn moments(latest: &Latest) -> Moments {
    let mut moments = Moments::at(latest[0].copy(), true);
    latest.iter().enumerate().for_each(|(i, weights)| moments.take_in(weights, 1.0 / (i as f64 + 1.0)));
    moments
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::nn::VarStore;
    use tch::{Device, Kind};

    fn set(w: &Tensor, x: f64) {
        _ = tch::no_grad(|| w.shallow_clone().fill_(x));
    }

    fn store() -> (VarStore, Tensor) {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().zeros("w", &[1]);
        (vs, w)
    }

    fn value(t: Option<Tensor>) -> f64 {
        t.unwrap().double_value(&[0])
    }

    /// 1, 2, … 10 are visited, and 5, 7 and 9, or what there is of them, averaged.
    #[test]
    fn the_last_checkpoints_are_averaged() {
        let (vs, w) = store();
        let mut lawa = Lawa::new(&vs, 3, 2).unwrap();
        let mut averages = Vec::new();
        for x in 0..10 {
            set(&w, f64::from(x));
            lawa.update().unwrap();
            averages.push(lawa.get("w").map(|t| t.double_value(&[0])));
        }
        let expected = [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 5.0, 5.0, 7.0].map(Some);
        assert_eq!(averages, [&[None], &expected[..]].concat());
        assert_eq!((lawa.held(), lawa.updates(), w.double_value(&[0])), (3, 10, 9.0));
        // Of 5, 7, 9: 4
        let q = lawa.posterior().unwrap();
        assert!((value(q.mean("w")) - 7.0).abs() < 1e-6 && (value(q.variance("w")) - 4.0).abs() < 1e-6);
        {
            let _guard = lawa.swap_in().unwrap();
            assert_eq!(w.double_value(&[0]), 7.0);
        }
        assert_eq!(w.double_value(&[0]), 9.0);
    }

    /// In f32, of numbers that it does not have.
    #[test]
    fn weights_that_stay_are_their_own_average_and_late_ones_were_always_there() {
        let (vs, w) = store();
        set(&w, 0.1);
        let mut lawa = Lawa::new(&vs, 7, 1).unwrap();
        (0..5).for_each(|_| lawa.update().unwrap());
        let late = vs.root().zeros("late", &[2]);
        set(&late, 0.3);
        (0..3).for_each(|_| lawa.update().unwrap());
        for (name, w) in [("w", &w), ("late", &late)] {
            let moments = moments(lawa.watched.get(name).unwrap());
            assert_eq!((&moments.mean, moments.variance.unwrap().abs().max().double_value(&[])), (&w.detach(), 0.0));
        }
        assert_eq!(lawa.posterior().unwrap().variance("late").unwrap().kind(), Kind::Float);
    }

    #[test]
    fn a_file_goes_on_where_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lawa.safetensors");
        let ((vs, w), (other, other_w)) = (store(), store());
        let mut lawa = Lawa::new(&vs, 2, 2).unwrap();
        lawa.save(&path).unwrap();
        Lawa::new(&other, 5, 5).unwrap().load(&path).unwrap();
        for x in [1.0, 2.0, 3.0, 4.5, 5.0] {
            set(&w, x);
            lawa.update().unwrap();
        }
        lawa.save(&path).unwrap();
        let mut resumed = Lawa::new(&other, 5, 5).unwrap();
        resumed.load(&path).unwrap();
        for (lawa, w) in [(&mut lawa, &w), (&mut resumed, &other_w)] {
            assert_eq!((lawa.held(), value(lawa.get("w"))), (2, 3.25));
            set(w, 8.0);
            lawa.update().unwrap();
            assert_eq!(value(lawa.get("w")), 6.25);
        }
        let vs = VarStore::new(Device::Cpu);
        let _w = vs.root().zeros("w", &[2]);
        let e = Lawa::new(&vs, 2, 2).unwrap().load(&path).unwrap_err().to_string();
        assert!(e.contains("lawa.safetensors") && e.contains("`w.checkpoints`") && e.contains("[2, 2]"), "{e}");
    }

    #[test]
    fn what_cannot_be_averaged_is_refused() {
        let (vs, w) = store();
        for (k, n, what) in [(0, 1, "checkpoints"), (1, 0, "every")] {
            assert!(Lawa::new(&vs, k, n).unwrap_err().to_string().contains(what));
        }
        let mut lawa = Lawa::new(&vs, 3, 2).unwrap();
        assert!(lawa.swap_in().unwrap_err().to_string().contains("update 2"));
        lawa.update().unwrap();
        set(&w, f64::NAN);
        assert!(lawa.update().unwrap_err().to_string().contains("`w`"));
        assert_eq!((lawa.updates(), lawa.held()), (1, 0));
        set(&w, 1.0);
        lawa.update().unwrap();
        assert!(lawa.posterior().unwrap_err().to_string().contains("at least 2"));
    }
}
