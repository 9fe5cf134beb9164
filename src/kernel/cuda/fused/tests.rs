//! The host's side of passes, over the CPU as a device.

use super::super::super::{Constants, Draw, Elementwise, Field, GROUP, Job, Real, run};
use super::super::emulated::Emulated;
use super::super::{CHUNK, emulation, table};
use super::*;
use crate::Error;
use std::sync::{Arc, Mutex};
use table::Word;
use tch::Device as At;

/// Every operation, a constant, a number and noise, with two results.
struct Everything;

impl Elementwise for Everything {
    const OUTPUTS: usize = 2;
    fn constants(&self) -> Constants {
        let mut k = Constants::default();
        k[1] = 0.3;
        k
    }
    #[inline(always)]
    fn eval<T: Real>(&self, constant: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        let (x, y, c, z) = (read(0), read(1), read(2), read(3));
        write(0, (x + z / (y.abs() + c).sqrt()) * T::real(1.1));
        write(1, (x * constant(1) - y).min(c).max(-z) + y.tanh());
    }
}

const AT: Draw = Draw { step: 7 << 33 | 3, sample: 9, parameter: 0, group: (1 << 28) - 1 };

fn line(first: f64, n: i64, kind: Kind) -> Tensor {
    Tensor::linspace(first, 3.0, n, (kind, At::Cpu))
}

fn job<'a>(x: &'a Tensor, y: &'a Tensor) -> Job<'a, Everything> {
    let noise = Field::Noise { seed: 3 << 40 | 5, at: AT };
    Job::new(Everything, [Field::Tensor(x), Field::Tensor(y), Field::Number(0.7), noise], [Some(x), Some(y)])
}

#[test]
fn kernels_give_the_bits_of_the_lanes() {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half] {
        for n in [0, 1, 63, 64, 65, 4097, 70_000, 140_000] {
            let (x, y) = (line(1.0, n, kind), line(-2.0, n, kind));
            let wide = Tensor::zeros([n], (if kind == Kind::Double { kind } else { Kind::Float }, At::Cpu));
            let mut both = job(&x, &y);
            both.also.push((1, &wide));
            emulation::compare(|| {
                run([both]).unwrap();
                // Numbers that are not finite too.
                _ = wide.view(-1).narrow(0, n / 2, n.min(1)).fill_(f64::NAN);
                super::super::super::sum_of_squares([&x, &y, &wide]).unwrap();
                super::super::super::sum_of_squares([&x, &line(0.0, 9, Kind::Double)]).unwrap();
            });
        }
    }
    assert_eq!(emulation::compared(), (32, 64));
}

#[test]
fn chunks_cover_every_position_once() {
    let all = |lengths: &[usize]| table::chunks(lengths.iter().copied(), CHUNK).collect::<Vec<_>>();
    assert!(all(&[]).is_empty());
    assert_eq!(all(&[0, 1, CHUNK, CHUNK + 1, 0, 5]), [1 << 32, 2 << 32, 3 << 32, 3 << 32 | 1, 5 << 32]);
    let long = all(&[3, (1 << 33) + 1]);
    assert_eq!((long.len(), long[1], long[long.len() - 1]), ((1 << 17) + 2, 1 << 32, 1 << 32 | 1 << 17));
}

/// Positions beyond 2³²: the first ones are missing, and an address that much lower stands for the tensor.
#[test]
fn positions_have_64_bits() {
    const FAR: u64 = 1 << 32;
    let (x, y) = (line(1.0, 100, Kind::Float), line(-2.0, 100, Kind::Float));
    let (far_x, far_y) = (x.copy(), y.copy());
    let far = job(&far_x, &far_y);
    let traced = Traced::of(&far);
    let mut tables = Tables::default();
    let place = tables.pass(&[&traced]).unwrap();
    tables.0[place.chunks] = FAR / CHUNK as u64;
    for (word, value) in table::words(&traced.program).into_iter().zip(&mut tables.0[place.entries..]) {
        match word {
            Word::Length => *value += FAR,
            Word::Input(_) | Word::Output(_) => *value = value.wrapping_sub(FAR * 4),
            Word::Group(_) => *value -= FAR / GROUP as u64,
            _ => {}
        }
    }
    let mut device = Emulated::default();
    let kernel = device.compile(&source::source(&traced.program)).unwrap();
    let base = device.upload(&tables.bytes()).unwrap();
    let at = |word: usize| base + 8 * word as u64;
    device.launch(kernel, place.blocks, &[at(place.chunks), at(place.entries)]).unwrap();
    run([job(&x, &y)]).unwrap();
    assert_eq!((&far_x, &far_y), (&x, &y));
}

/// What is asked of a device; it fails at the call that is named.
struct Watched {
    inner: Emulated,
    seen: Arc<Mutex<Vec<&'static str>>>,
    fails: &'static str,
}

impl Watched {
    fn call<T>(&mut self, name: &'static str, f: impl FnOnce(&mut Emulated) -> Result<T>) -> Result<T> {
        if name == self.fails {
            return Err(Error::Device(format!("{name}: out of memory")));
        }
        self.seen.lock().unwrap().push(name);
        f(&mut self.inner)
    }
}

impl Device for Watched {
    fn compile(&mut self, source: &str) -> Result<Kernel> {
        self.call("compile", |device| device.compile(source))
    }
    fn upload(&mut self, bytes: &[u8]) -> Result<u64> {
        self.call("upload", |device| device.upload(bytes))
    }
    fn results(&mut self, bytes: usize) -> Result<u64> {
        self.call("results", |device| device.results(bytes))
    }
    fn launch(&mut self, kernel: Kernel, blocks: u32, arguments: &[u64]) -> Result<()> {
        self.call("launch", |device| device.launch(kernel, blocks, arguments))
    }
    fn download(&mut self, address: u64, to: &mut [u8]) -> Result<()> {
        self.call("download", |device| device.download(address, to))
    }
}

fn watched(fails: &'static str) -> (Fused, Arc<Mutex<Vec<&'static str>>>) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    (Fused::new(Box::new(Watched { inner: Emulated::default(), seen: seen.clone(), fails })), seen)
}

/// Three tensors each of two programs: what is new is compiled, and there is one upload and one launch of each.
#[test]
fn jobs_of_a_program_share_a_launch_and_a_kernel() {
    let (mut fused, seen) = watched("");
    let tensors: Vec<[Tensor; 2]> = (0..6)
        .map(|i| {
            let kind = if i % 2 == 0 { Kind::Float } else { Kind::Double };
            [line(1.0, 70 * i, kind), line(-2.0, 70 * i, kind)]
        })
        .collect();
    let jobs: Vec<_> = tensors.iter().map(|[x, y]| job(x, y)).collect();
    let traced: Vec<_> = jobs.iter().map(Traced::of).collect();
    let mut pass = || {
        let launches = fused.prepared(&traced).unwrap();
        fused.launch(&launches).unwrap();
        std::mem::take(&mut *seen.lock().unwrap())
    };
    assert_eq!(pass(), ["compile", "compile", "upload", "launch", "launch"]);
    assert_eq!(pass(), ["upload", "launch", "launch"]);
    // Nothing is asked of a device for tensors without elements.
    assert_eq!(tensors[0][0].numel(), 0);
    fused.prepared(&traced[..1]).unwrap();
    assert!(seen.lock().unwrap().is_empty());
    assert_eq!(fused.sum_of_squares(&[&tensors[0][0]]).unwrap(), 0.0);
    let x = line(1.0, 3 * SUMMED as i64 + 1, Kind::Float);
    fused.sum_of_squares(&[&x]).unwrap();
    let sum = ["results", "compile", "compile", "upload", "launch", "launch", "download"];
    assert_eq!(std::mem::take(&mut *seen.lock().unwrap()), sum);
}

#[test]
fn what_fails_fails_before_anything_is_written() {
    for fails in ["compile", "upload"] {
        let (mut fused, seen) = watched(fails);
        let (x, y) = (line(1.0, 70, Kind::Float), line(-2.0, 70, Kind::Float));
        let before = (x.copy(), y.copy());
        let error = fused.prepared(&[Traced::of(&job(&x, &y))]).unwrap_err();
        assert!(matches!(&error, Error::Device(e) if e.contains(fails)), "{error}");
        assert!(!seen.lock().unwrap().contains(&"launch"));
        assert_eq!((x, y), before);
    }
    for fails in ["results", "compile", "upload", "download"] {
        let (mut fused, _) = watched(fails);
        assert!(matches!(fused.sum_of_squares(&[&line(1.0, 70, Kind::Float)]), Err(Error::Device(_))), "{fails}");
    }
}

/// What kernels do not take goes elsewhere, and comes out the same.
#[test]
fn other_layouts_kinds_and_overlaps_are_left() {
    let left = |jobs: Vec<Job<Everything>>| {
        let mut left = 0;
        emulation::emulate(|| {
            super::super::run(jobs.iter().map(Traced::of).collect(), |others| {
                left = others.len();
                Ok(())
            })
        })
        .unwrap();
        left
    };
    let (x, y) = (line(1.0, 70, Kind::Float), line(-2.0, 70, Kind::Float));
    assert_eq!(left(vec![job(&x, &y)]), 0);
    let [wide, tall] = [&x, &y].map(|t| t.reshape([7, 10]).tr());
    assert_eq!(left(vec![job(&wide, &tall), job(&x, &y)]), 1);
    let whole = Tensor::zeros([70], (Kind::Int64, At::Cpu));
    assert_eq!(left(vec![job(&whole, &whole)]), 1);
    // Two outputs in one place; a job that reads what another writes.
    assert_eq!(left(vec![job(&x, &x)]), 1);
    assert_eq!(left(vec![job(&x, &y), job(&y, &x)]), 2);
    let (half, rest) = (x.narrow(0, 0, 40), x.narrow(0, 30, 40));
    let (a, b) = (y.narrow(0, 0, 40).copy(), y.narrow(0, 0, 40).copy());
    assert_eq!(left(vec![job(&half, &a), job(&rest, &b)]), 2);
    let later = x.narrow(0, 40, 30);
    let c = y.narrow(0, 0, 30).copy();
    assert_eq!(left(vec![job(&half, &a), job(&later, &c)]), 0);
}

#[cfg(not(feature = "cuda"))]
#[test]
fn without_the_feature_it_says_so() {
    let why = super::super::unavailable(At::Cuda(0)).unwrap();
    assert!(why.contains("feature `cuda`"), "{why}");
    assert_eq!(super::super::unavailable(At::Cpu), None);
}
