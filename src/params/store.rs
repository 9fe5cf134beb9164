//! A store that parameters come from: its variables in order, by name, and what else it holds.

use super::Leaf;
use super::memory::{address, is_same};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::Tensor;
use tch::nn::{VarStore, Variables};

/// Another handle to the variables of a [`VarStore`].
#[derive(Debug, Clone)]
pub(super) struct Store {
    variables: Arc<Mutex<Variables>>,
    /// What its names begin with among the parameters: empty, or a name and a dot.
    pub prefix: String,
    /// Trainable variables that have been looked at.
    seen: usize,
}

impl Store {
    pub fn new(vs: &VarStore, prefix: String) -> Self {
        Store { variables: vs.variables_.clone(), prefix, seen: 0 }
    }

    /// The trainable variables that were created since the last call, with the store's prefix. A leaf may have no name.
    pub fn new_variables(&mut self) -> Vec<(String, Leaf)> {
        let variables = lock(&self.variables);
        // tch only ever appends to this list, so that its length tells whether there is anything new.
        if variables.trainable_variables.len() == self.seen {
            return Vec::new();
        }
        // A variable carries no name; the store's names are found by the memory they point at.
        let mut by_memory: HashMap<usize, Vec<(&String, &Tensor)>> = HashMap::new();
        for (name, tensor) in &variables.named_variables {
            by_memory.entry(address(tensor)).or_default().push((name, tensor));
        }
        let new = variables.trainable_variables[self.seen..].iter().map(|variable| {
            let tensor = &variable.tensor;
            // An address alone is not enough: empty tensors may share one, and a view can start where its base does.
            let candidates = by_memory.get(&address(tensor)).into_iter().flatten();
            // Of those without plain memory the shape has to do, for the error that they are.
            let like = |t: &Tensor| address(t) == 0 && t.numel() > 0 && t.size() == tensor.size();
            let named = candidates.filter(|(_, t)| is_same(t, tensor) || like(t));
            let mut names: Vec<String> = named.map(|(name, _)| format!("{}{name}", self.prefix)).collect();
            names.sort();
            (self.prefix.clone(), Leaf::new(names, tensor.shallow_clone(), variable.group))
        });
        let new = new.collect();
        self.seen = variables.trainable_variables.len();
        new
    }

    /// Its tensors that are no weights (batch-norm statistics), by name.
    pub fn buffers(&self) -> Vec<(String, Tensor)> {
        let variables = lock(&self.variables);
        // Weights of the store that are no parameters here are none, either.
        let mut trainable: HashMap<usize, Vec<&Tensor>> = HashMap::new();
        for variable in &variables.trainable_variables {
            trainable.entry(address(&variable.tensor)).or_default().push(&variable.tensor);
        }
        let trained = |t: &Tensor| trainable.get(&address(t)).is_some_and(|there| there.iter().any(|v| is_same(v, t)));
        let buffers = variables.named_variables.iter().filter(|(_, t)| !trained(t));
        buffers.map(|(name, t)| (format!("{}{name}", self.prefix), t.shallow_clone())).collect()
    }
}

fn lock(variables: &Mutex<Variables>) -> MutexGuard<'_, Variables> {
    // Variables are only ever appended, so a panic elsewhere has left nothing half done.
    variables.lock().unwrap_or_else(PoisonError::into_inner)
}
