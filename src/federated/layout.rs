//! Parameters one after the other in a vector: names, shapes and kinds.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use tch::{Kind, Tensor};

/// Where each parameter lies in a vector of all weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Layout {
    pub(super) parts: Vec<Part>,
}

/// One parameter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Part {
    pub(super) name: String,
    pub(super) shape: Vec<i64>,
    /// Whether its kind is f64, and not f32.
    pub(super) double: bool,
}

impl Part {
    pub fn new(name: &str, like: &Tensor) -> Self {
        Part { name: name.to_owned(), shape: like.size(), double: like.kind() == Kind::Double }
    }

    pub fn kind(&self) -> Kind {
        if self.double { Kind::Double } else { Kind::Float }
    }

    /// Number of its weights; `None` for a shape that no tensor has, which only a file can hold.
    fn weights(&self) -> Option<i64> {
        self.shape.iter().try_fold(1i64, |n, d| n.checked_mul(*d).filter(|_| *d >= 0))
    }
}

impl Layout {
    /// Number of weights; `None` if there is no vector of that length, or two parameters share a name.
    pub fn checked_len(&self) -> Option<i64> {
        let names: std::collections::HashSet<_> = self.parts.iter().map(|p| &p.name).collect();
        let total = self.parts.iter().try_fold(0i64, |sum, p| sum.checked_add(p.weights()?));
        total.filter(|_| names.len() == self.parts.len() && !self.parts.is_empty())
    }

    pub fn len(&self) -> i64 {
        self.places().last().map_or(0, |(_, first, n)| first + n)
    }

    /// Every parameter with its first weight and its number of weights.
    pub fn places(&self) -> impl Iterator<Item = (&Part, i64, i64)> {
        self.parts.iter().scan(0, |first, p| {
            let (start, n) = (*first, p.weights().expect("a tensor's shape"));
            *first += n;
            Some((p, start, n))
        })
    }

    pub fn place(&self, name: &str) -> Option<(&Part, i64, i64)> {
        self.places().find(|(p, ..)| p.name == name)
    }

    /// The name of the parameter that has the weight of this number.
    pub fn owner(&self, weight: i64) -> &str {
        self.places().find(|(_, first, n)| weight < first + n).map_or("", |(p, ..)| &p.name)
    }

    /// A vector as tensors in the parameters' shapes and kinds, which own their memory.
    pub fn split(&self, all: &Tensor) -> Result<Vec<(String, Tensor)>> {
        self.places()
            .map(|(p, first, n)| {
                let part = all.f_narrow(0, first, n)?.f_reshape(&p.shape[..])?.f_to_kind(p.kind())?;
                Ok((p.name.clone(), part.f_contiguous()?.copy()))
            })
            .collect()
    }

    /// For every weight of this layout its number in the other; `None` if the orders agree.
    ///
    /// # Errors
    /// A parameter that one of them does not have, or has in another shape.
    pub fn permutation(&self, other: &Layout, whose: &str) -> Result<Option<Tensor>> {
        let there: HashMap<&str, (&Part, i64, i64)> =
            other.places().map(|(p, first, n)| (p.name.as_str(), (p, first, n))).collect();
        if let Some(extra) = other.parts.iter().find(|p| !self.parts.iter().any(|q| q.name == p.name)) {
            return Err(Error::parameter(&extra.name, format!("{whose} has it and the server's prior does not")));
        }
        let mut index = Vec::with_capacity(self.len() as usize);
        for p in &self.parts {
            let Some((q, first, n)) = there.get(p.name.as_str()) else {
                return Err(Error::parameter(&p.name, format!("the server's prior has it and {whose} does not")));
            };
            if p.shape != q.shape {
                let problem = format!("the server's prior has shape {:?} and {whose} {:?}", p.shape, q.shape);
                return Err(Error::parameter(&p.name, problem));
            }
            index.extend(*first..first + n);
        }
        let same = index.iter().zip(0..).all(|(i, j)| *i == j);
        Ok((!same).then(|| Tensor::from_slice(&index)))
    }
}
