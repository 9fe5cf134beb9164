//! The elementwise computation on a GPU: one launch for each different program of a step, whatever its number of tensors,
//! and the bits of the lanes.
//!
//! A program is printed (`source.rs`), compiled once per device and process, and run over a table of tensors
//! (`table.rs`, `fused.rs`). What touches a device is behind a trait (`device.rs`), so that all the rest is tested where
//! there is none: `emulated.rs` compiles the same source for the CPU.
#![cfg_attr(not(any(feature = "cuda", feature = "cuda-emulation")), allow(dead_code))] // no device to run on

#[cfg(feature = "cuda")]
mod cache;
mod device;
#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda-emulation")]
mod emulated;
#[cfg(feature = "cuda-emulation")]
pub mod emulation;
mod fused;
#[cfg(feature = "cuda")]
mod nvrtc;
#[cfg(feature = "cuda")]
mod search;
mod source;
mod table;

use super::trace::Traced;
use crate::Result;
use fused::Fused;
use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tch::{Kind, Tensor};

/// Threads of a block.
pub(super) const BLOCK: u32 = 512;
/// Positions of a block, at most.
pub(super) const CHUNK: usize = 1 << 16;

/// A device that was opened, or why it cannot be.
type Opened = std::result::Result<Arc<Mutex<Fused>>, String>;

/// Every device that was asked for, by its number.
static DEVICES: Mutex<BTreeMap<usize, Opened>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// Launches by this thread so far.
    static LAUNCHES: Cell<u64> = const { Cell::new(0) };
}

/// A panic elsewhere leaves nothing half done that would matter: kernels and devices are added whole.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(feature = "cuda")]
fn open(ordinal: usize) -> Opened {
    let mut fused = Fused::new(Box::new(driver::open(ordinal)?));
    // A compiler that lacks a part of its own, or is newer than the driver, shows only now.
    fused.folded().map_err(|e| e.to_string())?;
    Ok(Arc::new(Mutex::new(fused)))
}

#[cfg(not(feature = "cuda"))]
fn open(_: usize) -> Opened {
    Err("this program was built without the feature `cuda`".to_owned())
}

/// The device that a tensor is on; `None` for the CPU.
fn opened(device: tch::Device) -> Option<Opened> {
    match device {
        tch::Device::Cuda(n) => Some(locked(&DEVICES).entry(n).or_insert_with(|| open(n)).clone()),
        #[cfg(feature = "cuda-emulation")]
        tch::Device::Cpu if emulation::emulates() => Some(Ok(emulation::device())),
        _ => None,
    }
}

/// Why no kernel can run on this GPU, so that steps there take many launches of libtorch's; `None` if it can, or it is no
/// GPU.
pub(crate) fn unavailable(device: tch::Device) -> Option<String> {
    opened(device)?.err()
}

/// Whether the CPU's memory is to be treated as a GPU's.
pub(super) fn emulates() -> bool {
    #[cfg(feature = "cuda-emulation")]
    return emulation::emulates();
    #[cfg(not(feature = "cuda-emulation"))]
    false
}

/// What kernels can read and write.
fn fits(t: &Tensor) -> bool {
    matches!(t.kind(), Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half) && t.is_contiguous() && !t.is_neg()
}

/// Runs jobs: those that a kernel can take by kernels, and before those `others`, by what else there is. What can fail of
/// the kernels has been done when `others` begins.
pub(super) fn run<'a>(jobs: Vec<Traced<'a>>, others: impl FnOnce(&[Traced<'a>]) -> Result<()>) -> Result<()> {
    let here = |job: &Traced| matches!(opened(job.like().device()), Some(Ok(_))).then(|| job.like().device());
    // All tensors of an optimizer are on one device.
    let Some(device) = jobs.iter().find_map(here) else { return others(&jobs) };
    let takes = |job: &Traced| {
        let n = job.like().numel();
        // Addresses are trusted for as many elements from here on.
        job.tensors().all(|t| t.device() == device && fits(t) && t.numel() == n)
    };
    let (taken, left): (Vec<_>, Vec<_>) = jobs.into_iter().partition(takes);
    if !disjoint(&taken) {
        return others(&taken.into_iter().chain(left).collect::<Vec<_>>());
    }
    let Some(Ok(fused)) = opened(device) else { return others(&left) };
    let mut fused = locked(&fused);
    let launches = fused.prepared(&taken)?;
    others(&left)?;
    fused.launch(&launches)
}

/// Whether no two jobs, and no two outputs of one, write to the same memory, and none reads what another writes: blocks
/// run in any order.
fn disjoint(jobs: &[Traced]) -> bool {
    let range = |t: &Tensor, n: usize| {
        let start = table::address(t);
        start..start + (n * t.kind().elt_size_in_bytes()) as u64
    };
    let lengths = jobs.iter().map(|job| job.like().numel());
    let jobs: Vec<_> = jobs.iter().zip(lengths).filter(|(_, n)| *n > 0).collect();
    let of = |(i, (job, n)): (usize, &(&Traced, usize))| job.written().map(|t| (range(t, *n), i)).collect::<Vec<_>>();
    let mut written: Vec<_> = jobs.iter().enumerate().flat_map(of).collect();
    written.sort_unstable_by_key(|(range, _)| range.start);
    // Sorted by their start, ranges overlap only if two neighbours do.
    if !written.windows(2).all(|w| w[0].0.end <= w[1].0.start) {
        return false;
    }
    jobs.iter().enumerate().all(|(i, (job, n))| {
        job.read().all(|t| {
            let read = range(t, *n);
            let first = written.partition_point(|(range, _)| range.end <= read.start);
            let met = written[first..].iter().take_while(|(range, _)| range.start < read.end);
            // In place, a position is read before it is written.
            met.into_iter().all(|(range, job)| *job == i && *range == read)
        })
    })
}

/// Σ x² of the tensors that kernels can take, with the bits of the lanes, and the tensors that are left.
pub(super) fn sum_of_squares(tensors: Vec<&Tensor>) -> (f64, Vec<&Tensor>) {
    let mut places: HashMap<tch::Device, Vec<&Tensor>> = HashMap::new();
    let mut left = Vec::new();
    for t in tensors {
        match opened(t.device()) {
            Some(Ok(_)) if fits(t) => places.entry(t.device()).or_default().push(t),
            _ => left.push(t),
        }
    }
    let mut total = 0.0;
    for (device, tensors) in places {
        let Some(Ok(fused)) = opened(device) else { unreachable!("a device stays open") };
        match locked(&fused).sum_of_squares(&tensors) {
            Ok(sum) => total += sum,
            // libtorch may still find the memory, or says why not.
            Err(_) => left.extend(tensors),
        }
    }
    (total, left)
}
