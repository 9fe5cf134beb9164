//! Steps of several ranks: each evaluates the loss of its own part of a batch at a sample of its own, and all make the same
//! update from the sum.
//!
//! ```text
//! evaluate, form      on each rank    products such as e·ĝ are formed before they are summed
//! meet                all             weights and losses; an error or a difference of one rank is one of all
//! sum                 all             gradients, statistics: one buffer per kind of number
//! finite? clip        on each rank    of the mean over all ranks, so that all decide alike
//! update              on each rank    the same numbers in, the same bits out
//! ```
//!
//! How ranks agree is in `ranks.rs`, and the memory of the sums in `packed.rs`; one process alone never comes here.

use super::Optimizer;
use super::arithmetic::Arithmetic;
use super::packed::Packed;
use super::ranks::{Call, Description, NUMBERS, Ranks, bytes, fingerprint};
use super::row::Row;
use super::step::Ended;
use super::sums::Sums;
use crate::gradient::Clip;
use crate::kernel::Noise;
use crate::parallel::{Alone, Collective};
use crate::params::Leaf;
use crate::prior::PriorOf;
use crate::{Error, Expectation, Result};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::Arc;
use tch::Tensor;

/// What is worked out once and holds until settings or parameters change.
#[derive(Debug)]
pub(super) struct Known {
    description: Description,
    fingerprint: u64,
    /// Shapes of each unit's statistics.
    pub statistics: Vec<Vec<Vec<i64>>>,
}

/// What a rank brings to a meeting, and the sum over all.
#[derive(Debug, Clone, Copy)]
pub(super) struct Brought {
    /// Weight of the evaluations that the call has made, and their number unless they are left out.
    pub new: (f64, f64),
    /// Σ of weights and of losses.
    pub weight: f64,
    pub loss: f64,
    /// Ranks with any weight, and those of them that count examples.
    pub filled: f64,
    pub per_example: f64,
    pub largest_norm: f64,
    pub evaluations: f64,
}

impl Brought {
    fn nothing() -> Self {
        Brought::of(&Sums::default(), &Sums::default())
    }

    fn of(new: &Sums, all: &Sums) -> Self {
        let filled = all.weight > 0.0;
        let flag = |x: bool| f64::from(u8::from(x));
        Brought {
            new: (new.weight, if new.loss.is_nan() { 0.0 } else { new.evaluations as f64 }),
            weight: all.weight,
            loss: if filled { all.loss * all.factor() } else { 0.0 },
            filled: flag(filled),
            per_example: flag(filled && all.per_example),
            largest_norm: all.largest_norm,
            evaluations: all.evaluations as f64,
        }
    }

    fn numbers(self) -> [f64; NUMBERS] {
        let Brought { new, weight, loss, filled, per_example, largest_norm, evaluations } = self;
        [new.0, new.1, weight, loss, filled, per_example, largest_norm, evaluations]
    }

    fn sum([a, b, weight, loss, filled, per_example, largest_norm, evaluations]: [f64; NUMBERS]) -> Self {
        Brought { new: (a, b), weight, loss, filled, per_example, largest_norm, evaluations }
    }

    /// Errors that only show when all are seen.
    fn check(self) -> Result<Self> {
        let problem = if self.new.0 == 0.0 && self.new.1 > 0.0 {
            "it is of no example on any rank: one of them at least needs a batch"
        } else if self.per_example > 0.0 && self.per_example < self.filled {
            "it is a mean on some ranks and per example on others, so their weights cannot be compared; return the same \
             form on all"
        } else {
            return Ok(self);
        };
        Err(Error::Loss(problem.to_owned()))
    }
}

impl<R: Row> Optimizer<R> {
    /// What connects the ranks of this training, for sums of your own, such as the errors on test data; of one rank alone
    /// without [`Builder::parallel`](crate::Builder::parallel). All ranks have to call it alike.
    pub fn collective(&self) -> &dyn Collective {
        self.ranks.as_ref().map_or(&Alone, |ranks| ranks.collective())
    }

    /// The number, among those of all ranks, of a draw of noise that this rank numbers so. With one evaluation each, R ranks
    /// draw what R evaluations of one process do.
    pub(super) fn among_ranks(&self, draw: u64) -> u64 {
        self.ranks.as_ref().map_or(draw, |ranks| draw * ranks.size() as u64 + ranks.rank() as u64)
    }

    /// The limit on this rank's own gradient. That of the norm is for the mean over all ranks; one of each element is kept
    /// by the mean if all keep it, and a statistic that is a product with it is formed here.
    pub(super) fn clip_here(&self) -> Option<Clip> {
        self.clip.filter(|clip| self.ranks.is_none() || matches!(clip, Clip::Value(_)))
    }

    /// Runs this rank's part of a call. Others are told if it panics.
    pub(super) fn here<T>(&mut self, part: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.ranks.is_none() {
            return part(self);
        }
        catch_unwind(AssertUnwindSafe(|| part(self))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            let panicked = Error::Loss(format!("a panic: {}", text.unwrap_or("of the closure")));
            _ = self.told::<()>(Err(panicked));
            resume_unwind(panic)
        })
    }

    /// Of a part of a call after which ranks do not meet: others are told of its error, and all have the same.
    pub(crate) fn told<T>(&self, found: Result<T>) -> Result<T> {
        found.map_err(|e| match &self.ranks {
            Some(ranks) => ranks.tell(e),
            None => e,
        })
    }

    /// After the settings, parameters or priors have changed.
    pub(super) fn changed(&self) {
        _ = self.ranks.as_ref().map(|ranks| ranks.known.take());
    }

    pub(super) fn known(&self, ranks: &Ranks) -> Result<Arc<Known>> {
        if let Some(known) = &*ranks.known.borrow() {
            return Ok(Arc::clone(known));
        }
        let statistics = self.units.iter().map(|unit| R::Arithmetic::statistics(unit, &self.params));
        let (description, statistics) = (self.description()?, statistics.collect::<Result<_>>()?);
        let known = Arc::new(Known { fingerprint: fingerprint(&description), description, statistics });
        *ranks.known.borrow_mut() = Some(Arc::clone(&known));
        Ok(known)
    }

    /// What is the same on all ranks and seldom changes.
    fn description(&self) -> Result<Description> {
        let json = |row: &R| serde_json::to_string(row).unwrap_or_else(|e| e.to_string());
        let noise = match &self.noise {
            Noise::Philox(p) => format!("seeded by {}", p.seed),
            Noise::Given(_) => "given".to_owned(),
        };
        let mut all = vec![
            ("the row".to_owned(), format!("{} with {}", R::NAME, json(&self.config))),
            ("the noise".to_owned(), noise),
        ];
        for (i, leaf) in self.params.leaves().iter().enumerate() {
            let (kind, size) = (leaf.tensor.kind(), leaf.tensor.size());
            all.push((format!("parameter {i}"), format!("`{}`, {kind:?} {size:?}", leaf.name())));
        }
        for (name, t) in self.params.buffers() {
            all.push((format!("buffer `{name}`"), format!("{:?} {:?}", t.kind(), t.size())));
        }
        for unit in &self.units {
            let name = unit.name(&self.params);
            let prior = match &unit.prior {
                PriorOf::Isotropic(prior) => format!("{prior:?}"),
                PriorOf::Gaussian(prior) => {
                    let of = |(_, t): &(_, Tensor)| Ok(fingerprint(&bytes(t)?));
                    let all = prior.tensors().iter().map(of).collect::<Result<Vec<_>>>()?;
                    format!("a Gaussian with the fingerprints {all:x?}")
                }
            };
            all.push((format!("the settings of `{name}`"), json(&unit.row)));
            all.push((format!("the prior of `{name}`"), prior));
        }
        Ok(all)
    }

    /// That and what changes from call to call.
    fn described(&self, call: Call, known: &Description, more: &Description) -> Description {
        let mut all = vec![("the call".to_owned(), call.to_string())];
        all.extend(known.iter().cloned());
        all.push(("the number of updates".to_owned(), self.steps.to_string()));
        all.push(("what the builder sets".to_owned(), self.options()));
        for unit in &self.units {
            all.push((format!("the learning rate of `{}`", unit.name(&self.params)), unit.lr.to_string()));
        }
        for leaf in self.params.leaves() {
            let trained = if leaf.trainable() { "trained" } else { "frozen" };
            all.push((format!("parameter `{}`", leaf.name()), trained.to_owned()));
        }
        all.extend(more.iter().cloned());
        all
    }

    /// What is no number of the row, and cheap to tell; some of it may change for one step.
    fn options(&self) -> String {
        let Optimizer { schedule, clip, check_finite, skip_unseen, skips, divergence, .. } = self;
        let compare = self.ranks.as_ref().and_then(|ranks| ranks.compare);
        format!(
            "{schedule:?}, clip {clip:?}, check_finite {check_finite}, skip_unseen {skip_unseen}, skip_non_finite {}, \
             check_divergence {divergence:?}, compare_ranks {compare:?}",
            skips.on
        )
    }

    /// Brings this rank's part of a call to a meeting; gives the sum, or one error for all.
    fn agree(&self, call: Call, own: Result<Brought>, more: &Description) -> Result<Brought> {
        let Some(ranks) = &self.ranks else { return own };
        let known = self.known(ranks);
        let now = known.as_ref().map_or(0, |known| {
            let lrs: Vec<u64> = self.units.iter().map(|unit| unit.lr.to_bits()).collect();
            let trained: Vec<bool> = self.params.leaves().iter().map(Leaf::trainable).collect();
            fingerprint(&(call, self.steps, self.options(), lrs, trained, known.fingerprint, more))
        });
        let describe =
            || known.as_ref().map_or_else(|_| Vec::new(), |known| self.described(call, &known.description, more));
        let own = own.as_ref().and_then(|own| known.as_ref().map(|_| own.numbers()));
        ranks.meet(own, now, &describe).map(Brought::sum)
    }

    /// Takes up training with the others, from the weights and the seed of rank 0: before there are units.
    pub(super) fn start_together(&mut self, seed_given: bool) -> Result<()> {
        let given = if seed_given { "given" } else { "not given" };
        // Each has drawn one of its own, which may differ.
        let drawn = if let (Noise::Philox(p), false) = (&mut self.noise, seed_given) {
            Some(std::mem::replace(&mut p.seed, 0))
        } else {
            None
        };
        let mut values = Vec::new();
        let own = self.values(0).map(|all| values = all);
        let given = vec![("the seed".to_owned(), given.to_owned())];
        self.agree(Call::Build, own.map(|()| Brought::nothing()), &given)?;
        if let (Some(ranks), Some(own), Noise::Philox(p)) = (&self.ranks, drawn, &mut self.noise) {
            p.seed = ranks.number(own)?;
        }
        self.as_rank_0(values)
    }

    /// The optimizer is whole: whether all are the same.
    pub(super) fn started_together(&mut self, extended: Result<()>) -> Result<()> {
        self.changed();
        let nothing = extended.map(|()| Brought::nothing());
        self.agree(Call::Built, nothing, &Vec::new()).map(|_| ())
    }

    /// Variables that the closure has created since the last call begin where rank 0 has them.
    pub(super) fn welcome(&mut self) -> Result<()> {
        let Some(ranks) = &self.ranks else { return Ok(()) };
        self.params.refresh();
        let known = ranks.parameters;
        if self.params.len() == known {
            return Ok(());
        }
        self.changed();
        let mut values = Vec::new();
        let own = self.values(known).map(|all| values = all);
        self.agree(Call::NewVariables, own.map(|()| Brought::nothing()), &Vec::new())?;
        self.as_rank_0(values)
    }

    /// Parameters from this number on, and all buffers, with their bytes.
    fn values(&self, from: usize) -> Result<Vec<(Tensor, Vec<u8>)>> {
        // A guard would bring back what this rank had.
        self.params.check_free()?;
        let parameters = self.params.leaves()[from..].iter().map(|leaf| leaf.tensor.shallow_clone());
        let all = parameters.chain(self.params.buffers().into_iter().map(|(_, t)| t));
        all.map(|t| bytes(&t).map(|bytes| (t, bytes))).collect()
    }

    /// Gives these tensors the values that they have on rank 0.
    fn as_rank_0(&mut self, values: Vec<(Tensor, Vec<u8>)>) -> Result<()> {
        let Some(ranks) = &mut self.ranks else { return Ok(()) };
        let _no_grad = tch::no_grad_guard();
        let of_first = values.into_iter().map(|(t, own)| ranks.of_first(&t, own).map(|value| (t, value)));
        for (mut t, value) in of_first.collect::<Result<Vec<_>>>()? {
            t.copy_(&value);
        }
        ranks.parameters = self.params.len();
        self.changed();
        Ok(())
    }

    /// [`Optimizer::keep`] where there are several ranks.
    pub(super) fn keep_together(&mut self, found: Result<Ended>, evaluations: u64) -> Result<f64> {
        let mut merged = self.sums.shallow_clone();
        let brought = self.here(|this| {
            let new = this.formed(found?)?;
            let brought = Brought::of(&new, &new);
            merged.merge(new).map(|()| brought)
        });
        match self.agree(Call::Accumulate, brought, &self.without()) {
            Ok(all) => {
                let all = all.check()?;
                self.sums = merged;
                Ok(all.loss / all.weight)
            }
            Err(e) => {
                let left_out = self.skips.or_left_out(Err(e), evaluations)?;
                self.sums.merge(left_out.sums)?;
                Ok(f64::NAN)
            }
        }
    }

    /// [`Optimizer::finish`] where there are several ranks.
    pub(super) fn finish_together(&mut self, found: Result<Ended>, evaluations: u64) -> Result<f64> {
        let mut packed = None;
        let brought = self.here(|this| {
            let Some(ranks) = &this.ranks else { return Ok(Brought::nothing()) };
            let (mut ended, flats) = (found?, this.laid_out(ranks)?);
            if this.sums.is_empty() {
                this.form_in_place(&flats, &mut ended)?;
            }
            let new = this.formed(ended)?;
            let (mut all, before) = (this.sums.shallow_clone(), Brought::of(&new, &new));
            all.merge(new)?;
            let brought = Brought { new: before.new, ..Brought::of(&all, &all) };
            packed = Some(Packed::new(all, flats)?);
            // What the update would find out on this rank alone.
            this.params.check_free()?;
            Ok(brought)
        });
        let all = match self.agree(Call::Step, brought, &self.without()) {
            Ok(all) => all.check()?,
            Err(e) => {
                let left_out = self.skips.or_left_out(Err(e), evaluations)?;
                // Again, without: what was accumulated may be left.
                return self.finish_together(Ok(left_out), evaluations);
            }
        };
        let Some(packed) = packed else { return Ok(f64::NAN) };
        if all.weight == 0.0 {
            if all.evaluations == 0.0 {
                return Err(super::compiled::nothing_to_update());
            }
            self.sums = packed.sums;
            return Ok(f64::NAN);
        }
        let sums = self.decided(self.summed(packed, all)?)?;
        let loss = self.apply_merged(sums)?;
        self.sums = Sums::default();
        self.compare()?;
        Ok(loss)
    }

    /// Which weights are pruned in this step.
    fn without(&self) -> Description {
        let masks =
            self.pruned.iter().zip(self.params.leaves()).filter_map(|(mask, leaf)| Some((mask.as_ref()?, leaf)));
        let of = |mask: &Tensor| bytes(mask).map_or_else(|e| e.to_string(), |all| format!("{:x}", fingerprint(&all)));
        masks.map(|(mask, leaf)| (format!("the fingerprint of the mask of `{}`", leaf.name()), of(mask))).collect()
    }

    /// What one rank decides of its own evaluation, of the mean over all: whether it is finite, and how long it may be.
    fn decided(&self, mut sums: Sums) -> Result<Sums> {
        let _no_grad = tch::no_grad_guard();
        let name = |i: usize| self.params.leaves()[i].name();
        let gradients = sums.gradients.iter().enumerate().flat_map(|(i, g)| g.iter().map(move |g| (name(i), g)));
        sums.gradient_norm = self.finite("gradient", gradients)?;
        let of_units = self.units.iter().zip(&sums.statistics);
        let statistics = of_units.flat_map(|(unit, s)| s.iter().map(|t| (unit.name(&self.params), t)));
        self.finite(self.config.statistic().name(), statistics)?;
        if let Some(clip @ Clip::Norm(_)) = self.clip {
            let factor = clip.apply(&mut sums.gradients)?;
            sums.cut = factor < 1.0;
            let degree = |i| self.config.statistic().degree(i);
            let all = sums.statistics.iter_mut().flat_map(|all| all.iter_mut().enumerate());
            for (i, t) in all.filter(|(i, _)| sums.cut && degree(*i) > 0) {
                *t = &*t * factor.powi(degree(i));
            }
        }
        Ok(sums)
    }

    /// Whether all ranks hold the same bits, every so many updates.
    fn compare(&self) -> Result<()> {
        let every = self.ranks.as_ref().and_then(|ranks| ranks.compare);
        if every.is_none_or(|every| !self.steps.is_multiple_of(every)) {
            return Ok(());
        }
        let held = || {
            let mut all = Vec::new();
            for unit in &self.units {
                for (what, t) in R::Arithmetic::tensors(unit, &self.params)? {
                    let problem = format!(
                        "after {} updates, the fingerprint of {what} of `{}`",
                        self.steps,
                        unit.name(&self.params)
                    );
                    all.push((problem, format!("{:x}", fingerprint(&bytes(&t)?))));
                }
            }
            Ok::<_, Error>(all)
        };
        let nothing = Brought::nothing();
        let (own, more) = match held() {
            Ok(all) => (Ok(nothing), all),
            Err(e) => (Err(e), Vec::new()),
        };
        self.agree(Call::Compare, own, &more).map(|_| ())
    }

    /// [`Optimizer::save`] where there are several ranks: all come, and rank 0 writes.
    pub(super) fn save_together(&self, path: &Path) -> Result<()> {
        let Some(ranks) = &self.ranks else { return Ok(()) };
        let mut claim = None;
        let own = self.params.claim().map(|own| claim = Some(own));
        let all = self.agree(Call::Save, own.map(|()| Brought::of(&self.sums, &self.sums)), &Vec::new())?;
        // Where the noise of none has been yet, whatever the number of ranks that goes on.
        let made = ranks.gather(self.sums.evaluations as f64)?.into_iter().fold(0.0, f64::max) as u64;
        let mut sums = Sums { evaluations: made * ranks.size() as u64, ..Sums::default() };
        if all.weight > 0.0 {
            let mut packed = None;
            let own = self.laid_out(ranks).and_then(|flats| Packed::new(self.sums.shallow_clone(), flats));
            let own = own.map(|own| packed = Some(own));
            self.agree(Call::Save, own.map(|()| all), &Vec::new())?;
            if let Some(packed) = packed {
                sums = Sums { evaluations: sums.evaluations, ..self.summed(packed, all)? };
            }
        }
        let written = if ranks.rank() == 0 { self.write(path, &sums) } else { Ok(()) };
        self.agree(Call::Saved, written.map(|()| Brought::nothing()), &Vec::new())?;
        Ok(())
    }

    /// Whether all ranks can take up what they have read, and have read the same.
    pub(super) fn load_together<T>(&self, path: &Path, found: Result<T>) -> Result<T> {
        if self.ranks.is_none() {
            return found;
        }
        let mut read = None;
        let mut more = Vec::new();
        let own = found.and_then(|found| {
            let bytes = std::fs::read(path).map_err(|e| Error::file(path, e))?;
            more.push(("the fingerprint of the checkpoint".to_owned(), format!("{:x}", fingerprint(&bytes))));
            read = Some(found);
            Ok(Brought::nothing())
        });
        self.agree(Call::Load, own, &more)?;
        read.ok_or_else(|| Error::Collective("a checkpoint got lost".to_owned()))
    }

    /// What a checkpoint has accumulated, as this rank's part of it: all of it goes to rank 0.
    pub(super) fn own_part(&self, sums: Sums) -> Sums {
        let Some(ranks) = &self.ranks else { return sums };
        // Whole pairs, or one of the next would be without its other half.
        let pairs = if let Expectation::Antithetic { .. } = self.config.expectation() { 2 } else { 1 };
        let evaluations = sums.evaluations.div_ceil(ranks.size() as u64).next_multiple_of(pairs);
        if ranks.rank() == 0 { Sums { evaluations, ..sums } } else { Sums { evaluations, ..Sums::default() } }
    }
}
