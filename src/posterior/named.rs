//! The parameters of a posterior: in order, and found by their names.

use super::valid::given_twice;
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Deref;
use tch::Tensor;

/// What has the name of a parameter, and its shape.
pub(super) trait Parameter {
    fn name(&self) -> &str;
    fn size(&self) -> Vec<i64>;
}

impl Parameter for (String, Tensor) {
    fn name(&self) -> &str {
        &self.0
    }
    fn size(&self) -> Vec<i64> {
        self.1.size()
    }
}

/// A list without two of one name. With a map beside it: models have thousands of parameters, and a search through all
/// of them for each is quadratic.
#[derive(Debug)]
pub(super) struct Named<T> {
    all: Vec<T>,
    places: HashMap<String, usize>,
}

impl<T: Parameter> Named<T> {
    pub fn new() -> Self {
        Named { all: Vec::new(), places: HashMap::new() }
    }

    /// Errors if there is one of that name.
    pub fn push(&mut self, parameter: T) -> Result<()> {
        if self.places.insert(parameter.name().to_owned(), self.all.len()).is_some() {
            return Err(given_twice(parameter.name()));
        }
        self.all.push(parameter);
        Ok(())
    }

    pub fn get(&self, name: &str) -> Option<&T> {
        self.place(name).map(|i| &self.all[i])
    }

    pub fn place(&self, name: &str) -> Option<usize> {
        self.places.get(name).copied()
    }

    /// Others under the same names.
    pub fn map(&self, f: impl FnMut(&T) -> T) -> Self {
        Named { all: self.all.iter().map(f).collect(), places: self.places.clone() }
    }

    /// Each in turn, to be changed in all but its name.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.all.iter_mut()
    }

    /// Errors unless both have the same names, in any order, and shapes.
    pub fn same(&self, other: &Self) -> Result<()> {
        let missing = |a: &Self, b: &Self| a.iter().find(|p| b.get(p.name()).is_none()).map(|p| p.name().to_owned());
        if let Some(name) = missing(self, other).or_else(|| missing(other, self)) {
            let problem = "one posterior has it and the other does not; align them with select(..)";
            return Err(Error::parameter(&name, problem));
        }
        for p in self.iter() {
            let (ours, theirs) = (p.size(), other.get(p.name()).map(T::size));
            if theirs.as_ref() != Some(&ours) {
                let theirs = theirs.unwrap_or_default();
                return Err(Error::parameter(p.name(), format!("shapes {ours:?} and {theirs:?} differ")));
            }
        }
        Ok(())
    }
}

impl<T> Deref for Named<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.all
    }
}

impl<T> IntoIterator for Named<T> {
    type Item = T;
    type IntoIter = std::vec::IntoIter<T>;
    fn into_iter(self) -> Self::IntoIter {
        self.all.into_iter()
    }
}
