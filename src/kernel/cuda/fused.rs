//! Passes over all tensors of a step on one device: which programs there are, their tables, and when what is launched.

use super::super::squares::{SUMMED, SUMS};
use super::super::trace::{Program, Traced};
use super::device::{Device, Kernel};
use super::source::{self, FOLDED, SQUARES};
use super::table::{Place, Tables, address, chunks};
use super::{BLOCK, LAUNCHES};
use crate::Result;
use std::collections::HashMap;
use std::sync::Arc;
use tch::{Kind, Tensor};

/// A device with the kernels that were compiled for it.
pub(super) struct Fused {
    device: Box<dyn Device>,
    kernels: HashMap<Arc<Program>, Kernel>,
    squares: HashMap<Kind, Kernel>,
    folded: Option<Kernel>,
}

/// A launch whose kernel is compiled and whose tables are on the device, at these addresses.
#[derive(Debug)]
pub(super) struct Launch {
    kernel: Kernel,
    blocks: u32,
    arguments: [u64; 2],
}

impl std::fmt::Debug for Fused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Fused({} kernels)", self.kernels.len())
    }
}

/// Jobs by their programs, in the order of their first ones.
fn groups<'j, 'a>(jobs: &'j [Traced<'a>]) -> Vec<Vec<&'j Traced<'a>>> {
    let mut numbers: HashMap<&Program, usize> = HashMap::new();
    let mut groups: Vec<Vec<&Traced>> = Vec::new();
    let mut number = 0;
    for (i, job) in jobs.iter().enumerate() {
        // Most are the program of the job before, at the same place.
        if i == 0 || !Arc::ptr_eq(&job.program, &jobs[i - 1].program) {
            number = *numbers.entry(&job.program).or_insert(groups.len());
        }
        if number == groups.len() {
            groups.push(Vec::new());
        }
        groups[number].push(job);
    }
    groups
}

impl Fused {
    pub(super) fn new(device: Box<dyn Device>) -> Self {
        Fused { device, kernels: HashMap::new(), squares: HashMap::new(), folded: None }
    }

    /// Does all that can fail: compiles what is new, and uploads the tables.
    pub(super) fn prepared(&mut self, jobs: &[Traced]) -> Result<Vec<Launch>> {
        let mut tables = Tables::default();
        let mut launches = Vec::new();
        for jobs in groups(jobs) {
            let Some(place) = tables.pass(&jobs) else { continue };
            let program = &jobs[0].program;
            let kernel = if let Some(kernel) = self.kernels.get(program) {
                *kernel
            } else {
                let kernel = self.device.compile(&source::source(program))?;
                self.kernels.insert(program.clone(), kernel);
                kernel
            };
            launches.push((kernel, place));
        }
        self.uploaded(&tables, launches)
    }

    fn uploaded(&mut self, tables: &Tables, launches: Vec<(Kernel, Place)>) -> Result<Vec<Launch>> {
        if launches.is_empty() {
            return Ok(Vec::new());
        }
        let base = self.device.upload(&tables.bytes())?;
        let at = |word: usize| base + (word * size_of::<u64>()) as u64;
        let launch = |(kernel, Place { blocks, chunks, entries })| Launch {
            kernel,
            blocks,
            arguments: [at(chunks), at(entries)],
        };
        Ok(launches.into_iter().map(launch).collect())
    }

    pub(super) fn launch(&mut self, launches: &[Launch]) -> Result<()> {
        launches.iter().try_for_each(|Launch { kernel, blocks, arguments }| {
            LAUNCHES.set(LAUNCHES.get() + 1);
            self.device.launch(*kernel, *blocks, arguments)
        })
    }

    /// The kernel that adds sums. It is small, and so the one to find out by whether the device takes any.
    pub(super) fn folded(&mut self) -> Result<Kernel> {
        match self.folded {
            Some(kernel) => Ok(kernel),
            None => Ok(*self.folded.insert(self.device.compile(&source::folded())?)),
        }
    }

    /// Σ x², as `squares.rs` defines it: first of what is computed in f32, then of f64.
    pub(super) fn sum_of_squares(&mut self, tensors: &[&Tensor]) -> Result<f64> {
        let kinds = [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double];
        let pieces: Vec<u64> = tensors.iter().map(|t| t.numel().div_ceil(SUMMED) as u64).collect();
        let firsts: Vec<u64> = pieces
            .iter()
            .scan(0, |next, n| {
                *next += n;
                Some(*next - n)
            })
            .collect();
        let total = pieces.iter().sum::<u64>() as usize;
        if total == 0 {
            return Ok(0.0);
        }
        // The sums of all threads, then those of all pieces.
        let size = size_of::<f64>();
        let sums = self.device.results((SUMS + 1) * total * size)?;
        let results = sums + (SUMS * total * size) as u64;
        let mut tables = Tables::default();
        let mut launches = Vec::new();
        for kind in kinds {
            let own = || tensors.iter().zip(&firsts).filter(|(t, _)| t.kind() == kind && t.numel() > 0);
            if own().next().is_none() {
                continue;
            }
            let lengths = own().map(|(t, _)| t.numel());
            let entries =
                own().flat_map(|(t, first)| -> [u64; SQUARES] { [address(t), t.numel() as u64, sums, *first] });
            let kernel = match self.squares.get(&kind) {
                Some(kernel) => *kernel,
                None => *self.squares.entry(kind).or_insert(self.device.compile(&source::squares(kind))?),
            };
            launches.push((kernel, tables.add(chunks(lengths, SUMMED * BLOCK as usize / SUMS), entries)));
        }
        let entry: [u64; FOLDED] = [sums, total as u64, results];
        let place = tables.add(chunks(std::iter::once(total), BLOCK as usize), entry.into_iter());
        launches.push((self.folded()?, place));
        let launches = self.uploaded(&tables, launches)?;
        self.launch(&launches)?;
        let mut bytes = vec![0; total * size];
        self.device.download(results, &mut bytes)?;
        let found: Vec<f64> = bytes.as_chunks().0.iter().map(|x| f64::from_ne_bytes(*x)).collect();
        let of = |double: bool| {
            let own =
                tensors.iter().zip(&firsts).zip(&pieces).filter(|((t, _), _)| (t.kind() == Kind::Double) == double);
            own.flat_map(|((_, first), n)| &found[*first as usize..(first + n) as usize]).sum::<f64>()
        };
        Ok(of(false) + of(true))
    }
}

#[cfg(all(test, feature = "cuda-emulation"))]
mod tests;
