//! What several test binaries share.
#![allow(dead_code)] // Each binary takes the part it needs.

pub mod rows;

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_blr::rule::Rule;
use tch_blr::Optimizer;

/// Where and in which kind the weights of a test live.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Place {
    pub kind: Kind,
    pub device: Device,
}

pub const F64: Place = Place { kind: Kind::Double, device: Device::Cpu };

/// Says once that the running test leaves out CUDA; past the capture of the test's output.
#[allow(clippy::explicit_write)] // `eprintln!` is captured
pub fn skipped_on_cuda() {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    if SAID.lock().unwrap().insert(test.clone()) {
        writeln!(std::io::stderr(), "skipped: {test} on CUDA, which is not available").unwrap();
    }
}

/// The CPU with weights in f64, f32 and bf16, and the first CUDA device where there is one.
pub fn places() -> Vec<Place> {
    let at = |device| move |kind| Place { kind, device };
    let mut places: Vec<Place> = [Kind::Double, Kind::Float, Kind::BFloat16].map(at(Device::Cpu)).into();
    if tch::Cuda::is_available() {
        places.extend([Kind::Double, Kind::Float, Kind::BFloat16].map(at(Device::Cuda(0))));
    } else {
        skipped_on_cuda();
    }
    places
}

/// The memory of a tensor.
pub fn bits(t: &Tensor) -> Vec<u8> {
    let t = t.detach().to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
    t.copy_data_u8(&mut bytes, t.numel());
    bytes
}

/// ‖a - b‖ ≤ rtol ‖b‖
#[track_caller]
pub fn assert_close(a: &Tensor, b: &Tensor, rtol: f64) {
    let wide = |t: &Tensor| t.detach().to_device(Device::Cpu).to_kind(Kind::Double);
    assert_eq!(a.size(), b.size());
    let norm = |t: Tensor| t.square().sum(Kind::Double).double_value(&[]).sqrt();
    let (error, scale) = (norm(wide(a) - wide(b)), norm(wide(b)));
    assert!(error <= rtol * scale, "relative error {:e} > {rtol:e}\n{a}\n{b}", error / scale);
}

/// Numbers between -1 and 1 without a pattern, the same in every run.
pub fn wave(shape: &[i64], phase: f64, place: Place) -> Tensor {
    let n: i64 = shape.iter().product();
    let t = (Tensor::arange(n, (Kind::Double, Device::Cpu)) * 1.7 + phase).sin();
    t.reshape(shape).to_kind(place.kind).to_device(place.device)
}

/// A store whose variables are created in this kind and on this device.
pub fn store(place: Place) -> VarStore {
    let mut vs = VarStore::new(place.device);
    vs.set_kind(place.kind);
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

/// The kind in which losses are computed: not in half precision.
fn wide(t: &Tensor) -> Tensor {
    t.to_kind(if t.kind() == Kind::Double { Kind::Double } else { Kind::Float })
}

/// A regression with a tanh network of two layers; the second is in group 1.
#[derive(Debug)]
pub struct Net {
    pub vs: VarStore,
    pub weights: Vec<Tensor>,
    x: Tensor,
    y: Tensor,
}

pub const EXAMPLES: i64 = 12;

impl Net {
    pub fn new(place: Place) -> Self {
        Self::starting_at(place, 0.0)
    }

    /// `phase` chooses the initial weights, not the data.
    pub fn starting_at(place: Place, phase: f64) -> Self {
        let vs = store(place);
        let add = |name, group, shape: &[i64], p| variable(&vs, name, group, &(wave(shape, p + phase, place) * 0.7));
        let weights = vec![
            add("first.weight", 0, &[3, 5], 0.1),
            add("first.bias", 0, &[5], 0.2),
            add("second.weight", 1, &[5, 2], 0.3),
            add("second.bias", 1, &[2], 0.4),
        ];
        let x = wave(&[EXAMPLES, 3], 0.5, place);
        let y = wide(&(wave(&[EXAMPLES, 2], 0.5, place) * 0.8 + x.narrow(1, 0, 2) * 0.5));
        Net { vs, weights, x, y }
    }

    /// Losses of all examples.
    pub fn losses(&self) -> Tensor {
        self.losses_of(0, EXAMPLES)
    }

    /// Losses of `n` examples, `[n]`.
    pub fn losses_of(&self, first: i64, n: i64) -> Tensor {
        let [w1, b1, w2, b2] = &self.weights[..] else { unreachable!() };
        let output = (self.x.narrow(0, first, n).matmul(w1) + b1).tanh().matmul(w2) + b2;
        let error = wide(&output) - self.y.narrow(0, first, n);
        error.square().sum_dim_intlist(1, false, None::<Kind>)
    }

    pub fn loss(&self) -> f64 {
        tch::no_grad(|| self.losses().mean(None::<Kind>).double_value(&[]))
    }
}

/// Losses that are a sum over variables, so that the path of each variable does not depend on the others.
#[derive(Debug)]
pub struct Separable {
    pub vs: VarStore,
    place: Place,
    variables: Vec<(String, Tensor)>,
}

impl Separable {
    /// With variables `a` (group 0) and `b` (group 1).
    pub fn new(place: Place) -> Self {
        let mut s = Separable { vs: store(place), place, variables: Vec::new() };
        _ = s.add("a", 0);
        _ = s.add("b", 1);
        s
    }

    pub fn add(&mut self, name: &str, group: usize) -> Tensor {
        let w = variable(&self.vs, name, group, &(wave(&[2, 3], name.len() as f64, self.place) + 0.1));
        self.variables.push((name.to_owned(), w.shallow_clone()));
        w
    }

    pub fn get(&self, name: &str) -> Tensor {
        self.variables.iter().find(|(n, _)| n == name).unwrap().1.shallow_clone()
    }

    /// Three losses ℓᵢ = Σ ½ cⱼ (wⱼ - tᵢⱼ)² over the variables named.
    pub fn losses(&self, names: &[&str]) -> Tensor {
        let place =
            Place { kind: if self.place.kind == Kind::Double { Kind::Double } else { Kind::Float }, ..self.place };
        let targets = wave(&[3, 6], 0.7, place) * 2.0;
        let scales = wave(&[6], 0.9, place) * 0.5 + 1.0;
        let terms = names.iter().map(|name| {
            let d = wide(&self.get(name)).reshape([1, 6]) - &targets;
            (d.square() * &scales * 0.5).sum_dim_intlist(1, false, None::<Kind>)
        });
        terms.reduce(|a, b| a + b).unwrap()
    }
}

/// All that an optimizer may change, bit by bit: its checkpoint (weights, state, accumulated gradients, counts, noise),
/// the weights themselves and where they lie.
#[derive(PartialEq)]
pub struct Snapshot {
    pub file: Vec<u8>,
    pub weights: Vec<Vec<u8>>,
    addresses: Vec<usize>,
}

impl std::fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let header = u64::from_le_bytes(self.file[..8].try_into().unwrap()) as usize;
        let sum = |bytes: &[u8]| bytes.iter().fold(0u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(*b)));
        let weights: Vec<u64> = self.weights.iter().map(|w| sum(w)).collect();
        let header = String::from_utf8_lossy(&self.file[8..8 + header]);
        write!(f, "{header}\ntensors {:x}, weights {weights:x?}, at {:x?}", sum(&self.file), self.addresses)
    }
}

impl Snapshot {
    pub fn of<R: Rule>(opt: &Optimizer<R>, vs: &VarStore) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        opt.save(&path).unwrap();
        let variables = vs.trainable_variables();
        Snapshot {
            file: std::fs::read(path).unwrap(),
            weights: variables.iter().map(bits).collect(),
            addresses: variables.iter().map(|w| w.data_ptr() as usize).collect(),
        }
    }

    /// What can be compared between two models.
    pub fn values(self) -> (Vec<u8>, Vec<Vec<u8>>) {
        (self.file, self.weights)
    }
}
