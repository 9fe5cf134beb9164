//! What every posterior asks of the tensors that it is made of, with one wording; and of the file that it is read
//! from.

use crate::{Error, Result, kernel};
use std::collections::BTreeMap;
use std::path::Path;
use tch::{Kind, Tensor};

/// Kind, shape and device for a message.
pub(super) fn form(t: &Tensor) -> String {
    if t.defined() { format!("{:?} {:?} on {:?}", t.kind(), t.size(), t.device()) } else { "undefined".to_owned() }
}

/// f32 or f64, and finite.
pub(super) fn finite_float(name: &str, what: &str, t: &Tensor) -> Result<()> {
    if !t.defined() || !matches!(t.kind(), Kind::Float | Kind::Double) {
        return Err(Error::parameter(name, format!("its {what} is {}: expected f32 or f64", form(t))));
    }
    kernel::first_non_finite(t)
        .map_or(Ok(()), |value| Err(Error::parameter(name, format!("its {what} is not finite ({value})"))))
}

/// The smallest element; infinite if there is none.
pub(super) fn smallest(t: &Tensor) -> f64 {
    // libtorch has no minimum of no elements, and an empty parameter is positive everywhere.
    if t.numel() == 0 { f64::INFINITY } else { t.min().double_value(&[]) }
}

pub(super) fn given_twice(name: &str) -> Error {
    Error::parameter(name, "it is given twice")
}

pub(super) fn no_parameter() -> Error {
    Error::Posterior("it has no parameter".to_owned())
}

/// The tensors of a posterior's file, taken out one by one.
pub(super) struct Stored<'a> {
    pub path: &'a Path,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Stored<'_> {
    pub fn take(&mut self, name: &str) -> Result<Tensor> {
        self.tensors.remove(name).ok_or_else(|| Error::file(self.path, format!("has no tensor `{name}`")))
    }

    /// Errors if a tensor was not taken: `owner` is what it would have to belong to.
    pub fn finish(self, owner: &str) -> Result<()> {
        // A tensor that is left over means that the file is not what its description says.
        match self.tensors.keys().next() {
            Some(extra) => {
                Err(Error::file(self.path, format!("has a tensor `{extra}` that does not belong to any {owner}")))
            }
            None => Ok(()),
        }
    }
}
