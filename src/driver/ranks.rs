//! How the ranks of a data-parallel training agree: whether all are at the same call, of the same optimizer, and none has
//! failed. What a step does with them is in `together.rs`.
//!
//! Every call that can fail begins or ends with a meeting, a sum of a few numbers whose length is always the same. So ranks
//! that do not agree, and may be waiting for different things, find out about each other there, and end with the same
//! error; no sum whose length depends on the model comes before.

use super::together::Known;
use crate::kernel;
use crate::parallel::Collective;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use tch::{Device, Kind, Tensor};

/// Of more than one rank.
#[derive(Debug)]
pub(super) struct Ranks {
    collective: Box<dyn Collective>,
    /// After how many updates each the ranks compare what they hold.
    pub compare: Option<u64>,
    /// Parameters that have begun at the values of rank 0.
    pub parameters: usize,
    /// What is worked out of the optimizer's settings and parameters, until they change.
    pub known: RefCell<Option<Arc<Known>>>,
    /// Where sums over the ranks are taken, by kind: kept, because memory of this size costs its first use.
    buffers: [RefCell<Option<Tensor>>; 2],
}

/// The optimizer's methods at which ranks meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Call {
    Build,
    Built,
    NewVariables,
    Step,
    Accumulate,
    Save,
    Saved,
    Load,
    Compare,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Call::Build | Call::Built => "build",
            Call::NewVariables => "taking up a new variable",
            Call::Step => "step or update",
            Call::Accumulate => "accumulate",
            Call::Save | Call::Saved => "save",
            Call::Load => "load",
            Call::Compare => "comparing the ranks",
        })
    }
}

/// Numbers that a meeting adds up.
pub(super) const NUMBERS: usize = 8;
/// What is the same on all ranks, by name and value.
pub(super) type Description = Vec<(String, String)>;

/// A print is compared in this many pieces of 20 bits: the sum of their squares over 2¹³ ranks is exact in f64.
const PIECES: usize = 3;

/// An error on its way to other ranks. Those that a caller tells apart arrive as they are.
#[derive(Serialize, Deserialize)]
enum Told {
    // By their bits: JSON has neither NaN nor infinity.
    Loss { value: u64, step: u64 },
    Gradient { what: String, name: String, value: u64, step: u64 },
    Other(String),
}

impl Told {
    fn new(e: &Error) -> Self {
        match e {
            Error::NonFiniteLoss { value, step } => Told::Loss { value: value.to_bits(), step: *step },
            Error::NonFiniteGradient { what, name, value, step } => {
                Told::Gradient { what: (*what).to_owned(), name: name.clone(), value: value.to_bits(), step: *step }
            }
            other => Told::Other(other.to_string()),
        }
    }

    fn error(self, rank: usize) -> Error {
        match self {
            Told::Loss { value, step } => Error::NonFiniteLoss { value: f64::from_bits(value), step },
            Told::Gradient { what, name, value, step } => {
                let value = f64::from_bits(value);
                match ["gradient", "per-example square", "Fisher information", "Hessian"]
                    .into_iter()
                    .find(|w| *w == what)
                {
                    Some(what) => Error::NonFiniteGradient { what, name, value, step },
                    None => Error::Rank { rank, problem: format!("the {what} of `{name}` is {value}") },
                }
            }
            Told::Other(problem) => Error::Rank { rank, problem },
        }
    }
}

/// Whether R whole numbers are equal, by their sum and that of their squares: (Σp)² ≤ RΣp², with equality only then.
fn all_equal(ranks: usize, sum: f64, squares: f64) -> bool {
    let (sum, squares) = (sum as u128, squares as u128);
    sum * sum == ranks as u128 * squares
}

/// A number that stands for what is hashed.
pub(super) fn print(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

impl Ranks {
    /// `None` for a rank that is alone.
    pub fn new(collective: Box<dyn Collective>, compare: Option<u64>) -> Option<Self> {
        let several = collective.size() > 1;
        let known = RefCell::default();
        several.then(|| Ranks { collective, compare, parameters: 0, known, buffers: Default::default() })
    }

    pub fn rank(&self) -> usize {
        self.collective.rank()
    }

    pub fn size(&self) -> usize {
        self.collective.size()
    }

    pub fn collective(&self) -> &dyn Collective {
        &*self.collective
    }

    /// Sums of the ranks' numbers, if all have come with the same description and none with an error; else one error for
    /// all. `print` stands for the description.
    pub fn meet(
        &self,
        own: std::result::Result<[f64; NUMBERS], &Error>,
        print: u64,
        describe: &dyn Fn() -> Description,
    ) -> Result<[f64; NUMBERS]> {
        let mut sums = [0.0; 1 + 2 * PIECES + NUMBERS];
        sums[0] = f64::from(u8::from(own.is_err()));
        for i in 0..PIECES {
            let piece = (print >> (20 * i) & 0xF_FFFF) as f64;
            (sums[1 + 2 * i], sums[2 + 2 * i]) = (piece, piece * piece);
        }
        sums[1 + 2 * PIECES..].copy_from_slice(&own.unwrap_or_default());
        self.collective.sum_f64(&mut sums)?;
        if sums[0] > 0.0 {
            return Err(self.told(own.err())?);
        }
        if !(0..PIECES).all(|i| all_equal(self.size(), sums[1 + 2 * i], sums[2 + 2 * i])) {
            return Err(self.difference(&describe())?);
        }
        let mut numbers = [0.0; NUMBERS];
        numbers.copy_from_slice(&sums[1 + 2 * PIECES..]);
        Ok(numbers)
    }

    /// Tells the others that this rank cannot come; gives the error that all have then.
    pub fn tell(&self, e: &Error) -> Error {
        self.meet(Err(e), 0, &Vec::new).err().unwrap_or_else(|| Error::Collective("an error got lost".to_owned()))
    }

    /// The error of the lowest rank that has one.
    fn told(&self, own: Option<&Error>) -> Result<Error> {
        let Some(rank) = self.lowest(own.is_some())? else {
            return Err(Error::Collective("a rank has failed without an error".to_owned()));
        };
        let text = self.text(rank, || own.and_then(|e| serde_json::to_string(&Told::new(e)).ok()))?;
        Ok(serde_json::from_str(&text).unwrap_or(Told::Other(text)).error(rank))
    }

    /// In what the lowest rank that differs from rank 0 does so.
    fn difference(&self, own: &Description) -> Result<Error> {
        let first = self.text(0, || serde_json::to_string(own).ok())?;
        let first: Description = serde_json::from_str(&first).unwrap_or_default();
        let [here, there]: [HashMap<&String, &String>; 2] =
            [own, &first].map(|all| all.iter().map(|(k, v)| (k, v)).collect());
        let mut names = own.iter().chain(&first).map(|(name, _)| name);
        let problem = names.find(|name| here.get(name) != there.get(name)).map(|name| {
            let [own, first] = [&here, &there].map(|all| all.get(name).map_or("missing", |value| value.as_str()));
            format!("{name} is {own}, and on rank 0 {first}")
        });
        let Some(rank) = self.lowest(problem.is_some())? else {
            return Err(Error::Collective("the ranks differ in nothing that they know of".to_owned()));
        };
        Ok(Error::Rank { rank, problem: self.text(rank, || problem)? })
    }

    /// The lowest rank for which this is true.
    fn lowest(&self, here: bool) -> Result<Option<usize>> {
        Ok(self.gather(f64::from(u8::from(here)))?.into_iter().position(|x| x > 0.0))
    }

    /// The number of every rank.
    pub fn gather(&self, own: f64) -> Result<Vec<f64>> {
        let mut all = vec![0.0; self.size()];
        all[self.rank()] = own;
        self.collective.sum_f64(&mut all)?;
        Ok(all)
    }

    /// A text that rank `from` has.
    fn text(&self, from: usize, own: impl FnOnce() -> Option<String>) -> Result<String> {
        let mut bytes = if self.rank() == from { own().unwrap_or_default().into_bytes() } else { Vec::new() };
        let mut length = (bytes.len() as u64).to_le_bytes();
        self.collective.broadcast(from, &mut length)?;
        bytes.resize(u64::from_le_bytes(length) as usize, 0);
        self.collective.broadcast(from, &mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// A number of rank 0.
    pub fn number(&self, own: u64) -> Result<u64> {
        let mut bytes = own.to_le_bytes();
        self.collective.broadcast(0, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// What rank 0 has in place of this tensor, whatever its kind.
    pub fn of_first(&self, t: &Tensor) -> Result<Tensor> {
        let (kind, size, device) = (t.kind(), t.size(), t.device());
        let mut all = bytes(t)?;
        self.collective.broadcast(0, &mut all)?;
        Ok(Tensor::from_slice(&all).f_view_dtype(kind)?.f_view(&size[..])?.f_to_device(device)?)
    }

    /// Memory for a sum of `n` numbers of this kind.
    pub fn buffer(&self, n: i64, kind: Kind, device: Device) -> Result<Tensor> {
        let mut kept = self.buffers[usize::from(kind == Kind::Double)].borrow_mut();
        let fits = kept.as_ref().is_some_and(|t| t.size() == [n] && t.device() == device);
        if !fits {
            *kept = Some(Tensor::f_empty([n], (kind, device))?);
        }
        Ok(kept.as_ref().map_or_else(Tensor::new, Tensor::shallow_clone))
    }

    /// Σ over the ranks, in place, of a contiguous tensor of f32 or f64.
    pub fn sum(&self, t: &mut Tensor) -> Result<()> {
        if t.device() == Device::Cpu {
            return self.sum_here(t);
        }
        // Pinned, so that the copies are not by way of a third memory.
        let mut host = Tensor::f_empty(t.size(), (t.kind(), Device::Cpu))?.f_pin_memory(t.device())?;
        host.f_copy_(t)?;
        self.sum_here(&mut host)?;
        t.f_copy_(&host)?;
        Ok(())
    }

    fn sum_here(&self, t: &mut Tensor) -> Result<()> {
        match t.kind() {
            Kind::Double => self.collective.sum_f64(kernel::elements(t)),
            _ => self.collective.sum_f32(kernel::elements(t)),
        }
    }
}

/// Its elements as they lie in memory.
pub(super) fn bytes(t: &Tensor) -> Result<Vec<u8>> {
    let flat = t.detach().f_to_device(Device::Cpu)?.f_contiguous()?.f_reshape([-1])?.f_view_dtype(Kind::Uint8)?;
    let mut all = vec![0; flat.numel()];
    flat.f_copy_data_u8(&mut all, flat.numel())?;
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_equal_by_their_sums() {
        let of = |all: &[u64]| {
            let all: Vec<f64> = all.iter().map(|x| *x as f64).collect();
            all_equal(all.len(), all.iter().sum(), all.iter().map(|x| x * x).sum())
        };
        assert!(of(&[5; 7]) && of(&[0xF_FFFF; 8192]) && of(&[0; 3]));
        let mut one = [0xF_FFFF; 8192];
        one[17] -= 1;
        assert!(!of(&one) && !of(&[0, 1]) && !of(&[3, 5, 4]));
    }

    #[test]
    fn elements_of_every_kind_are_copied() {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half, Kind::Int64, Kind::Bool] {
            let t = (Tensor::arange(6, (Kind::Double, Device::Cpu)) - 2.5).to_kind(kind).reshape([2, 3]).tr();
            let all = bytes(&t).unwrap();
            let back = Tensor::from_slice(&all).view_dtype(kind).view([3, 2]);
            assert!(back.equal(&t) && back.kind() == kind, "{kind:?}");
        }
        assert!(bytes(&Tensor::zeros([0], (Kind::Float, Device::Cpu))).unwrap().is_empty());
    }
}
