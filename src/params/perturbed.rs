//! Weights that are perturbed for a while: the only place where a variable is put back. What the perturbed values are
//! belongs to the driver and the posteriors.

use super::held::{self, Place, place};
use crate::kernel::{self, Elementwise, Field, Job, Real};
use crate::{Error, Result};
use std::borrow::Borrow;
use std::collections::HashMap;
use std::marker::PhantomData;
use tch::Tensor;

/// Holds variables at perturbed values; dropping it brings the original values back, bit by bit, also while a panic
/// unwinds. Guards over the same variables may be dropped in any order (`guard = q.perturb(..)?` drops the earlier one
/// last): the variables are at the values of the latest one that lives.
///
/// The values stand in the variables' own memory, so that everything that shares it sees them: views of a weight,
/// `detach`ed handles, a TorchScript module. Copy what is to outlive the guard. Evaluate and differentiate while the
/// guard lives: libtorch refuses to differentiate a graph that needs weights that have changed since it was recorded.
///
/// While a guard lives, other threads that want to perturb or to update the same variables get [`Error::InUse`], and so
/// does an optimizer of the same thread that wants to train, save or load them. tch's own readers are not stopped: a
/// forward pass on another thread finds the perturbed values, or a mixture. And a variable is known by where its memory
/// begins: of two views that overlap in part, perturb one after the other, on one thread.
#[must_use = "the weights go back to their mean as soon as this is dropped"]
pub struct Perturbed {
    guard: u64,
    held: HashMap<Place, Held>,
    /// Of one thread, because the holds on a variable are.
    _not_send: PhantomData<*const ()>,
}

struct Held {
    variable: Tensor,
    /// Its memory, also if a closure gives it another.
    memory: Tensor,
    /// The values that it had, once it has others.
    original: Option<Tensor>,
}

impl std::fmt::Debug for Perturbed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Perturbed").field("variables", &self.held.len()).finish_non_exhaustive()
    }
}

impl Perturbed {
    /// A guard of nothing.
    pub(crate) fn none() -> Self {
        Perturbed { guard: held::guard(), held: HashMap::new(), _not_send: PhantomData }
    }

    /// Puts new values into variables, each of the variable's shape, kind and device and in memory that nobody else
    /// holds.
    pub(crate) fn enter(changes: impl IntoIterator<Item = (impl Borrow<Tensor>, Tensor)>) -> Result<Self> {
        let (variables, values): (Vec<_>, Vec<_>) = changes.into_iter().unzip();
        let mut guard = Perturbed::none();
        guard.claim(variables.iter().map(Borrow::borrow))?;
        guard.put(variables.iter().map(Borrow::borrow).zip(&values))?;
        Ok(guard)
    }

    /// Takes hold of variables, whose values stay for now; of all of them or, with an error, of none.
    pub(crate) fn claim<'a>(&mut self, variables: impl IntoIterator<Item = &'a Tensor>) -> Result<()> {
        let mut new: HashMap<Place, &Tensor> = HashMap::new();
        for variable in variables {
            let at = place(variable);
            // A tensor without elements has nothing to hold, and its address may be that of others.
            if variable.numel() > 0 && !self.held.contains_key(&at) {
                new.insert(at, variable);
            }
        }
        held::take(self.guard, new.iter().map(|(at, variable)| (*at, *variable)))?;
        let hold = |t: &Tensor| Held { variable: t.shallow_clone(), memory: t.detach(), original: None };
        self.held.extend(new.into_iter().map(|(at, variable)| (at, hold(variable))));
        Ok(())
    }

    /// Puts values into variables that were claimed, and into the values' memory, where these are the first, what the
    /// variables were.
    pub(crate) fn put<'a>(&mut self, changes: impl IntoIterator<Item = (&'a Tensor, &'a Tensor)>) -> Result<()> {
        let held = |variable: &Tensor| self.held.get(&place(variable));
        let (mut new, mut again) = (Vec::new(), Vec::new());
        for (variable, value) in changes {
            let [is, given] = [variable, value].map(|t| (t.size(), t.kind(), t.device()));
            if is != given {
                return Err(Error::Parameters(format!("a value of {given:?} was given to a variable of {is:?}")));
            }
            match held(variable) {
                Some(Held { original: None, .. }) => new.push((variable, value)),
                Some(_) => again.push((variable, value)),
                None => {}
            }
        }
        let _no_grad = tch::no_grad_guard();
        for (variable, value) in again {
            held::write(&[variable], || variable.shallow_clone().f_copy_(value))?;
        }
        held::write(&new.iter().map(|(variable, _)| *variable).collect::<Vec<_>>(), || {
            kernel::run(new.iter().map(|(variable, value)| {
                let both = [*variable, *value];
                Job::new(Exchange, both.map(Field::Tensor), both.map(Some))
            }))?;
            for (variable, _) in &new {
                kernel::note_write(variable);
            }
            Ok::<_, Error>(())
        })?;
        for (variable, value) in new {
            self.replaced(variable, value);
        }
        Ok(())
    }

    /// Says that a variable that was claimed has other values now, and which memory holds the original ones.
    pub(crate) fn moved(&mut self, variable: &Tensor, original: &Tensor) {
        kernel::note_write(variable);
        self.replaced(variable, original);
    }

    fn replaced(&mut self, variable: &Tensor, original: &Tensor) {
        let Some(held) = self.held.get_mut(&place(variable)) else { return };
        held.original = Some(original.shallow_clone());
        held::replaced(self.guard, variable, original);
    }

    /// Whether it holds nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// The values that a variable had before this guard, if it has others now.
    pub(crate) fn original(&self, variable: &Tensor) -> Option<&Tensor> {
        self.held.get(&place(variable))?.original.as_ref()
    }

    /// After an evaluation: variables that were given other memory in it get theirs back, with the perturbed values.
    ///
    /// # Errors
    /// A later guard, which the closure has made and kept, say, is over one of the variables.
    pub(crate) fn settle(&mut self) -> Result<()> {
        for held in self.held.values_mut() {
            if held.variable.data_ptr() != held.memory.data_ptr() {
                held.variable.f_set_data(&held.memory)?;
            }
        }
        if self.held.keys().any(|at| held::is_covered(self.guard, *at)) {
            let problem = "a guard that was made in the evaluation still holds the weights: drop it before the loss is \
                           handed over";
            return Err(Error::InUse(problem.to_owned()));
        }
        Ok(())
    }

    /// A variable that was changed in place since it was perturbed, which is lost when it is put back.
    pub(crate) fn changed(&self) -> Option<&Tensor> {
        let moved = self.held.values().filter(|held| held.original.is_some());
        moved.map(|held| &held.memory).find(|memory| held::is_written(self.guard, memory))
    }

    /// Writes to a variable on purpose, whether or not a guard holds it: what is lost with the guard is written again after
    /// it.
    pub(crate) fn write<T>(variable: &Tensor, write: impl FnOnce() -> T) -> T {
        held::write(&[variable], write)
    }

    /// Lets a variable go as it is.
    pub(crate) fn release(&mut self, variable: &Tensor) {
        if self.held.remove(&place(variable)).is_some() {
            held::let_go(self.guard, place(variable));
        }
    }

    /// Lets a variable go at its original values.
    pub(crate) fn restore(&mut self, variable: &Tensor) {
        if let Some(held) = self.held.remove(&place(variable)) {
            put_back(self.guard, vec![(place(variable), held)]);
        }
    }
}

/// Also while a panic unwinds, when another one would end the process: shape, kind and device are the variables' own,
/// so that libtorch has nothing to refuse.
fn put_back(guard: u64, mut all: Vec<(Place, Held)>) {
    let _no_grad = tch::no_grad_guard();
    for (_, Held { variable, memory, .. }) in &mut all {
        if variable.data_ptr() != memory.data_ptr() {
            _ = variable.f_set_data(memory);
        }
    }
    let own = all.iter().filter(|(at, _)| !held::is_covered(guard, *at));
    let pairs: Vec<(&Tensor, &Tensor)> = own.filter_map(|(_, h)| Some((&h.memory, h.original.as_ref()?))).collect();
    held::write(&pairs.iter().map(|(memory, _)| *memory).collect::<Vec<_>>(), || {
        let fields = pairs.iter().map(|(memory, original)| (Field::Tensor(original), *memory));
        // What a device has no memory left for is done one after the other.
        if kernel::fill(fields).is_err() {
            for (memory, original) in &pairs {
                _ = memory.shallow_clone().f_copy_(original);
            }
        }
        for (memory, _) in &pairs {
            kernel::note_write(memory);
        }
    });
    for (at, _) in &all {
        held::let_go(guard, *at);
    }
}

impl Drop for Perturbed {
    fn drop(&mut self) {
        put_back(self.guard, self.held.drain().collect());
    }
}

/// Each of two tensors gets the values of the other.
struct Exchange;

impl Elementwise for Exchange {
    const OUTPUTS: usize = 2;
    #[inline(always)]
    fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let (a, b) = (read(0), read(1));
        write(0, b);
        write(1, a);
    }
}
