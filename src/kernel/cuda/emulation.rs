//! Switches, for tests, by which this thread's passes over the CPU's memory take the route of a GPU, or both routes.

use super::super::trace::{Program, Traced};
use super::super::{Field, Job};
use super::emulated::Emulated;
use super::fused::Fused;
use super::{locked, source};
use crate::Result;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};
use tch::{Kind, Tensor};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Off,
    Emulate,
    Compare,
}

thread_local! {
    static MODE: Cell<Mode> = const { Cell::new(Mode::Off) };
    static DEVICE: RefCell<Option<Arc<Mutex<Fused>>>> = const { RefCell::new(None) };
    /// Programs compared so far.
    static COMPARED: RefCell<HashSet<Arc<Program>>> = RefCell::default();
    /// Jobs and sums of squares compared so far.
    static COUNTS: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

pub(super) fn emulates() -> bool {
    MODE.get() == Mode::Emulate
}

/// This thread's.
pub(super) fn device() -> Arc<Mutex<Fused>> {
    DEVICE.with_borrow_mut(|device| {
        device.get_or_insert_with(|| Arc::new(Mutex::new(Fused::new(Box::<Emulated>::default())))).clone()
    })
}

fn with<T>(mode: Mode, f: impl FnOnce() -> T) -> T {
    /// Puts the mode back, after a panic too.
    struct Back(Mode);
    impl Drop for Back {
        fn drop(&mut self) {
            MODE.set(self.0);
        }
    }
    let _back = Back(MODE.replace(mode));
    f()
}

/// Runs `f`, whose passes over contiguous tensors of the CPU are those of a GPU.
pub fn emulate<T>(f: impl FnOnce() -> T) -> T {
    with(Mode::Emulate, f)
}

/// Runs `f`, whose passes over contiguous tensors of the CPU are computed by both routes.
///
/// # Panics
/// If they differ in a bit.
pub fn compare<T>(f: impl FnOnce() -> T) -> T {
    with(Mode::Compare, f)
}

/// How many tensors of passes this thread has compared so far, and how many sums of squares.
pub fn compared() -> (usize, usize) {
    COUNTS.get()
}

/// Launches of kernels by this thread so far.
pub fn launches() -> u64 {
    super::LAUNCHES.get()
}

/// Sources of the programs that this thread has compared, and of the sums of squares.
pub fn sources() -> Vec<String> {
    let sums = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half].map(source::squares);
    let passes: Vec<String> = COMPARED.with_borrow(|all| all.iter().map(|program| source::source(program)).collect());
    passes.into_iter().chain(sums).chain([source::folded()]).collect()
}

/// How a source has to be compiled for a GPU.
pub fn options() -> &'static [&'static str] {
    &source::OPTIONS
}

/// Whether two tensors are the same to the bit, but for which NaN it is.
fn same(a: &Tensor, b: &Tensor) -> bool {
    let bits = |t: &Tensor| {
        let whole = match t.kind() {
            Kind::Double => Kind::Int64,
            Kind::Float => Kind::Int,
            _ => Kind::Int16,
        };
        t.detach().view(-1).view_dtype(whole)
    };
    let equal = bits(a).eq_tensor(&bits(b)).logical_or(&a.isnan().logical_and(&b.isnan()).view(-1));
    equal.all().int64_value(&[]) != 0
}

/// Runs the passes of the lanes by `lanes`; in [`compare`], on copies of their tensors by kernels too.
pub(in super::super) fn checked<'a, E: super::super::Elementwise>(
    jobs: Vec<Job<'a, E>>,
    lanes: impl FnOnce(Vec<Job<'a, E>>) -> Result<()>,
) -> Result<()> {
    if MODE.get() != Mode::Compare {
        return lanes(jobs);
    }
    let traced: Vec<Traced> = jobs.iter().filter(|job| job.lanes().is_some()).map(Traced::of).collect();
    // The same memory is the same copy.
    let key = |t: &Tensor| (t.data_ptr().addr(), t.numel());
    let copies: BTreeMap<_, Tensor> =
        traced.iter().flat_map(Traced::tensors).map(|t| (key(t), t.detach().copy())).collect();
    let copied = |t: &Tensor| &copies[&key(t)];
    let twins = traced.iter().map(|job| Traced {
        program: job.program.clone(),
        constants: job.constants,
        inputs: job
            .inputs
            .iter()
            .map(|x| if let Field::Tensor(t) = x { Field::Tensor(copied(t)) } else { *x })
            .collect(),
        outputs: job.outputs.iter().map(|t| t.map(copied)).collect(),
        also: job.also.iter().map(|(o, t)| (*o, copied(t))).collect(),
    });
    let twins: Vec<Traced> = twins.collect();
    // Jobs that write to each other's memory are not for kernels.
    let mut left = 0;
    emulate(|| {
        super::run(twins, |others| {
            left = others.len();
            Ok(())
        })
    })?;
    lanes(jobs)?;
    if left > 0 {
        return Ok(());
    }
    for job in &traced {
        for t in job.written() {
            let other = copied(t);
            assert!(same(t, other), "{:#?}\n\nlanes {t:?}\nkernel {other:?}\n{t}\n{other}", job.program);
        }
        COMPARED.with_borrow_mut(|all| all.insert(job.program.clone()));
    }
    let (passes, sums) = COUNTS.get();
    COUNTS.set((passes + traced.len(), sums));
    Ok(())
}

/// In [`compare`], asserts that a sum of squares is that of kernels.
pub(in super::super) fn check_sum(tensors: &[&Tensor], sum: f64) {
    let all = || tensors.iter().copied().filter(|t| super::super::lanes(t).is_some());
    if MODE.get() != Mode::Compare || all().count() < tensors.len() || tensors.is_empty() {
        return;
    }
    let other = locked(&device()).sum_of_squares(tensors).expect("an emulated device does not fail");
    assert!(
        sum.to_bits() == other.to_bits() || (sum.is_nan() && other.is_nan()),
        "Σ x²: lanes {sum:e}, kernel {other:e}"
    );
    let (passes, sums) = COUNTS.get();
    COUNTS.set((passes, sums + 1));
}
