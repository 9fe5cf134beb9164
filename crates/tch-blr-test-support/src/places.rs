//! Where the tensors of a test live, and tensors to start from: the same numbers in every run.

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};

/// Where and in which kind the weights of a test live; what tch calls the options of a tensor.
pub type Place = (Kind, Device);

pub const F64: Place = (Kind::Double, Device::Cpu);
pub const F32: Place = (Kind::Float, Device::Cpu);

/// Says once that the running test, or a part of it, is left out; past the capture of the test's output.
#[allow(clippy::explicit_write)] // `eprintln!` is captured
pub fn skipped(what: &str, why: &str) {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let line = format!("skipped: {what}, {why}");
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(line.clone()) {
        writeln!(std::io::stderr(), "{line}").unwrap();
    }
}

/// Name of the running test.
pub(crate) fn this_test() -> String {
    std::thread::current().name().unwrap_or("?").to_owned()
}

/// Says once that the running test leaves out CUDA.
pub fn skipped_on_cuda() {
    skipped(&format!("{} on CUDA", this_test()), "which is not available");
}

/// The CPU with weights in f64, f32 and bf16, and the first CUDA device where there is one.
pub fn places() -> Vec<Place> {
    let at = |device| move |kind| (kind, device);
    let mut places: Vec<Place> = [Kind::Double, Kind::Float, Kind::BFloat16].map(at(Device::Cpu)).into();
    if tch::Cuda::is_available() {
        places.extend([Kind::Double, Kind::Float, Kind::BFloat16].map(at(Device::Cuda(0))));
    } else {
        skipped_on_cuda();
    }
    places
}

fn count(shape: &[i64]) -> Tensor {
    Tensor::arange(shape.iter().product::<i64>(), F64)
}

/// Numbers between -1 and 1 without a pattern: sin(1.7 i + phase), f64.
pub fn wave(shape: &[i64], phase: f64) -> Tensor {
    (count(shape) * 1.7 + phase).sin().reshape(shape)
}

/// [`wave`], elsewhere.
pub fn wave_at(shape: &[i64], phase: f64, (kind, device): Place) -> Tensor {
    wave(shape, phase).to_kind(kind).to_device(device)
}

/// Numbers between -1 and 1 whose frequency differs rather than their phase: sin(frequency (i + 0.3)), f64.
pub fn ripple(shape: &[i64], frequency: f64) -> Tensor {
    ((count(shape) + 0.3) * frequency).sin().reshape(shape)
}

/// Numbers between -1 and 1 of full rank, where shifted sines alone are of rank two: sin(0.37 i² + 1.1 i + phase), f64.
pub fn chirp(shape: &[i64], phase: f64) -> Tensor {
    (count(shape).square() * 0.37 + count(shape) * 1.1 + phase).sin().reshape(shape)
}

/// An orthogonal matrix without a pattern.
pub fn orthogonal(n: i64, phase: f64) -> Tensor {
    Tensor::linalg_qr(&chirp(&[n, n], phase), "reduced").0
}

/// Seeds libtorch's generator, which all threads share, and keeps it for the caller while the guard lives: tests that
/// draw side by side would otherwise take each other's numbers.
pub fn seeded(seed: i64) -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed);
    turn
}

/// Standard normals, f64, the same for the same seed.
pub fn randn(size: &[i64], seed: i64) -> Tensor {
    let _turn = seeded(seed);
    Tensor::randn(size, F64)
}

/// A store whose variables are created in this kind and on this device.
pub fn store((kind, device): Place) -> VarStore {
    let mut vs = VarStore::new(device);
    vs.set_kind(kind);
    vs
}

/// A new trainable variable with given values.
pub fn variable(vs: &VarStore, path: &str, group: usize, value: &Tensor) -> Tensor {
    let mut parts: Vec<&str> = path.split('.').collect();
    let name = parts.pop().unwrap();
    let folder = parts.into_iter().fold(vs.root(), |p, part| p.sub(part)).set_group(group);
    let mut w = folder.zeros(name, &value.size());
    tch::no_grad(|| w.copy_(value));
    w
}
