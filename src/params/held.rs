//! Which variables of this process are held by guards: at other values than their own, or while they are updated.
//!
//! tch lets any thread have a handle to a variable, so only a list of the whole process can tell that two of them would
//! write to one variable.

use crate::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use tch::Tensor;

/// Where a variable's memory begins.
pub(super) type Place = usize;

pub(super) fn place(variable: &Tensor) -> Place {
    variable.data_ptr() as usize
}

fn layout(variable: &Tensor) -> Vec<i64> {
    if variable.is_contiguous() { Vec::new() } else { variable.stride() }
}

/// One guard's hold on one variable. The guard has a handle to the memory ([`Perturbed`](super::Perturbed), which takes it
/// along if it is leaked; a [`Claim`] lives shorter than the parameters), so that the address means the same tensor.
#[derive(Debug)]
struct Hold {
    guard: u64,
    thread: ThreadId,
    /// Empty for a contiguous one, whose size says all.
    stride: Vec<i64>,
    /// The values that the variable had before, once it has others.
    original: Option<Tensor>,
    /// libtorch's count of writes to it then.
    version: Option<i64>,
}

/// Those of one variable in the order of their guards, which are all of one thread.
type Holds = HashMap<Place, Vec<Hold>>;

static HELD: LazyLock<Mutex<Holds>> = LazyLock::new(Mutex::default);

fn held() -> MutexGuard<'static, Holds> {
    // No change of the list is made in steps that a panic could leave half done.
    HELD.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Errors if a guard holds one of these variables.
pub(super) fn check_free<'a>(named: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Result<()> {
    check(&held(), named)
}

fn check<'a>(held: &Holds, named: impl Iterator<Item = (&'a str, &'a Tensor)>) -> Result<()> {
    if held.is_empty() {
        return Ok(());
    }
    for (name, variable) in named {
        if let Some(hold) = held.get(&place(variable)).and_then(|holds| holds.last()) {
            let whose = if hold.thread == thread::current().id() {
                "a guard (of perturb, swap_in, perturbed or a step that takes place) holds it: drop that before"
            } else {
                "another thread evaluates or updates it at this moment: give each thread a model of its own, or let them take \
                 turns (a Mutex around the model)"
            };
            return Err(Error::InUse(format!("`{name}` is not at its own values; {whose}")));
        }
    }
    Ok(())
}

/// A hold on variables that are at their own values, to read them or to write to them for good.
#[derive(Debug)]
pub(crate) struct Claim {
    guard: u64,
    places: Vec<Place>,
}

impl Claim {
    /// Errors if a guard holds one of these variables.
    pub(super) fn new<'a>(named: impl Iterator<Item = (&'a str, &'a Tensor)> + Clone) -> Result<Self> {
        // One lock for both, so that nobody comes in between.
        let mut held = held();
        check(&held, named.clone())?;
        let (guard, thread) = (guard(), thread::current().id());
        let places: Vec<Place> = named.map(|(_, variable)| place(variable)).collect();
        for place in &places {
            let hold = Hold { guard, thread, stride: Vec::new(), original: None, version: None };
            held.entry(*place).or_default().push(hold);
        }
        Ok(Claim { guard, places })
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut held = held();
        self.places.iter().for_each(|at| remove(&mut held, self.guard, *at));
    }
}

/// A number for a new guard.
pub(super) fn guard() -> u64 {
    static GUARDS: AtomicU64 = AtomicU64::new(0);
    GUARDS.fetch_add(1, Ordering::Relaxed)
}

/// Takes hold of all variables or of none.
///
/// # Errors
/// One that another thread holds, or that is held in another layout.
pub(super) fn take<'a>(guard: u64, variables: impl Iterator<Item = (Place, &'a Tensor)> + Clone) -> Result<()> {
    let mut held = held();
    let thread = thread::current().id();
    for (place, variable) in variables.clone().filter(|_| !held.is_empty()) {
        let Some(last) = held.get(&place).and_then(|holds| holds.last()) else { continue };
        if last.thread != thread {
            return Err(Error::InUse(format!(
                "another thread evaluates or updates a variable of shape {:?} at this moment: give each thread a model of its \
                 own, or let them take turns (a Mutex around the model)",
                variable.size()
            )));
        }
        let other = last.original.as_ref().map(Tensor::size);
        if other.as_ref().is_some_and(|other| *other != variable.size() || last.stride != layout(variable)) {
            return Err(Error::InUse(format!(
                "a guard holds a variable of shape {:?} in the memory of this one of shape {:?}, or in another layout: \
                 drop it before",
                other.unwrap_or_default(),
                variable.size()
            )));
        }
    }
    for (place, variable) in variables {
        let stride = layout(variable);
        held.entry(place).or_default().push(Hold { guard, thread, stride, original: None, version: None });
    }
    Ok(())
}

/// Says what the values were that the guard has replaced, just now.
pub(super) fn replaced(guard: u64, variable: &Tensor, original: &Tensor) {
    let mut held = held();
    let hold = held.get_mut(&place(variable)).and_then(|holds| holds.iter_mut().find(|hold| hold.guard == guard));
    if let Some(hold) = hold {
        (hold.original, hold.version) = (Some(original.shallow_clone()), variable.f_internal_version().ok());
    }
}

/// Writes to variables that may be held, which their guards then know of. They go on to find out about other writes, also
/// about earlier ones.
pub(super) fn write<T>(variables: &[&Tensor], write: impl FnOnce() -> T) -> T {
    let version = |variable: &Tensor| variable.f_internal_version().ok();
    let before: Vec<_> = variables.iter().map(|variable| version(variable)).collect();
    let written = write();
    let mut held = held();
    for (variable, before) in variables.iter().zip(before) {
        if let Some(holds) = held.get_mut(&place(variable)) {
            let now = version(variable);
            holds.iter_mut().filter(|hold| hold.version == before).for_each(|hold| hold.version = now);
        }
    }
    written
}

/// Whether a held variable was written to by someone else.
pub(super) fn is_written(guard: u64, variable: &Tensor) -> bool {
    let held = held();
    let hold = held.get(&place(variable)).and_then(|holds| holds.iter().find(|hold| hold.guard == guard));
    hold.and_then(|hold| hold.version).is_some_and(|then| variable.f_internal_version().is_ok_and(|now| now != then))
}

/// Whether a later guard holds the variable.
pub(super) fn is_covered(guard: u64, at: Place) -> bool {
    held().get(&at).and_then(|holds| holds.last()).is_some_and(|last| last.guard != guard)
}

/// Lets a variable go. If a later guard has replaced its values, the original ones are now those that this guard has
/// replaced.
pub(super) fn let_go(guard: u64, at: Place) {
    remove(&mut held(), guard, at);
}

fn remove(held: &mut Holds, guard: u64, at: Place) {
    let Some(holds) = held.get_mut(&at) else { return };
    let Some(i) = holds.iter().position(|hold| hold.guard == guard) else { return };
    let gone = holds.remove(i);
    if let (Some(mine), Some(theirs)) = (gone.original, holds.get_mut(i).and_then(|later| later.original.as_mut())) {
        // Copied: the memory of ours belongs to its owner, who will use it again.
        _ = theirs.f_copy_(&mine);
    }
    if holds.is_empty() {
        held.remove(&at);
    }
}
