//! Steps on a GPU: the same bits as on the CPU, for every row whose arithmetic is of one weight.
//!
//! The gradients are given, so that no kernel of libtorch takes part: a loss that is linear in the weights has its own
//! coefficients for a gradient, exactly. `conformance.rs` and `golden.rs` run on a GPU too, with networks.

use std::process::Command;
use support::rows::{self, Case};
use support::{F32, F64, Place, Snapshot, assert_close, skipped, store, variable, wave, wave_at};
use tch::nn::VarStore;
use tch::{Cuda, Device, Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Derivatives, Labels, Optimizer, Statistic};

const STEPS: usize = 5;
/// Ragged; the last but one is longer than what a block of a kernel takes at a time.
const SHAPES: [&[i64]; 5] = [&[7], &[33, 5], &[1], &[70_001], &[64, 3, 3, 3]];
/// In the environment of [`child`].
const WITHOUT: &str = "TCH_BLR_TEST_WITHOUT_NVRTC";

/// So many GPUs, or says that the test is left out.
fn gpus(count: i64) -> Option<Vec<Device>> {
    let name = std::thread::current().name().unwrap_or("?").to_owned();
    let found = Cuda::device_count();
    let why = match () {
        () if !cfg!(feature = "cuda") => "built without the feature `cuda`".to_owned(),
        () if !Cuda::is_available() => "no GPU".to_owned(),
        () if found < count => format!("{found} GPU and not {count}"),
        () => return Some((0..count as usize).map(Device::Cuda).collect()),
    };
    skipped(&name, &why);
    None
}

/// A model and its optimizer on one device.
struct Run<R: Row> {
    vs: VarStore,
    weights: Vec<Tensor>,
    opt: Optimizer<R>,
    place: Place,
}

impl<R: Row> Run<R> {
    fn new(row: &Case<R>, place: Place) -> Self {
        let vs = store(place);
        let weights = SHAPES.iter().enumerate();
        let weights = weights.map(|(i, shape)| variable(&vs, &format!("w{i}"), 0, &wave(shape, i as f64))).collect();
        let opt = row.builder(&vs).build(&vs, row.lr).unwrap();
        Run { vs, weights, opt, place }
    }

    /// Gradients of a step, rounded to the weights' kind on the CPU; small, so that their norm is not clipped, whose
    /// last bit depends on the order of a sum.
    fn gradients(&self, t: usize) -> Vec<Tensor> {
        let gradient = |(i, shape): (usize, &&[i64])| {
            (wave(shape, 3.0 + (7 * t + i) as f64) * 0.01).to_kind(self.place.0).to_device(self.place.1)
        };
        SHAPES.iter().enumerate().map(gradient).collect()
    }

    fn step(&mut self, t: usize) {
        let gradients = self.gradients(t);
        if self.opt.config().statistic() == Statistic::Fisher(Labels::Observed) {
            // Squared on the CPU, as a kernel of libtorch need not.
            let squared = |g: &Tensor| Some(g.to_device(Device::Cpu).square().to_device(self.place.1));
            let squares = gradients.iter().map(squared).collect();
            let gradients = gradients.into_iter().map(Some).collect();
            let given = Derivatives { loss: 1.0, examples: None, gradients, squares };
            self.opt.perturbed().unwrap().step(given).unwrap();
        } else {
            let weights = &self.weights;
            let loss = || weights.iter().zip(&gradients).map(|(w, g)| (w * g).sum(Kind::Float)).sum::<Tensor>();
            self.opt.step(loss).unwrap();
        }
    }
}

fn same_bits<R: Row>(row: &Case<R>) {
    let Some(gpus) = gpus(1) else { return };
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let mut runs = [Device::Cpu, gpus[0]].map(|device| Run::new(row, (kind, device)));
        for t in 0..STEPS {
            let [cpu, gpu] = runs.each_mut().map(|run| {
                run.step(t);
                Snapshot::of(&run.opt, &run.vs).values()
            });
            // In order of what says more.
            for (i, (ours, theirs)) in cpu.1.iter().zip(&gpu.1).enumerate() {
                let different = ours.iter().zip(theirs).filter(|(a, b)| a != b).count();
                assert!(different == 0, "{kind:?}, step {t}: {different} bytes of w{i} of {}", ours.len());
            }
            assert!(cpu.0 == gpu.0, "{kind:?}, step {t}: the state");
        }
    }
}

macro_rules! same_bits {
    ($($row:ident)*) => {
        $(#[test]
        fn $row() {
            same_bits(&rows::$row());
        })*
    };
}

same_bits! {
    sgd sgd_nesterov sgd_prior rmsprop adam adam_amsgrad adam_prior adamw
    vadam vprop noisy_adam ogn vogn von_price
    ivon ivon_gradsq ivon_antithetic ivon_prior ivon_auto ivon_auto_prior
    sam sam_prior sam_rmsprop bsam bsam_released bsam_prior bsam_auto ste
}

/// Trains on all these devices in turns, and compares the weights with those of the CPU.
fn close<R: Row>(row: &Case<R>, devices: &[Device]) {
    for (kind, tolerance) in [(F64.0, 1e-12), (F32.0, 1e-4)] {
        let mut cpu = Run::new(row, (kind, Device::Cpu));
        let mut there: Vec<_> = devices.iter().map(|device| Run::new(row, (kind, *device))).collect();
        for t in 0..STEPS {
            cpu.step(t);
            for run in &mut there {
                run.step(t);
                for (a, b) in run.weights.iter().zip(&cpu.weights) {
                    assert_close(a, b, tolerance);
                }
            }
        }
    }
}

/// The hyperbolic tangent is not among the operations that have one right result.
#[test]
fn bayesbinn_is_close() {
    let Some(gpus) = gpus(1) else { return };
    close(&rows::bayesbinn(), &gpus);
    close(&rows::bayesbinn_antithetic(), &gpus);
}

/// A learning rate, a frozen parameter, a write from outside and a checkpoint, all while samples lie in the weights.
#[test]
fn what_happens_between_steps_is_the_same() {
    let Some(gpus) = gpus(1) else { return };
    for (kind, device) in [(Kind::Float, gpus[0]), (Kind::BFloat16, gpus[0])] {
        let row = rows::ivon();
        let mut runs = [Device::Cpu, device].map(|device| Run::new(&row, (kind, device)));
        let folder = tempfile::tempdir().unwrap();
        for t in 0..8 {
            let [cpu, gpu] = runs.each_mut().map(|run| {
                match t {
                    1 => run.opt.set_lr(0.05).unwrap(),
                    3 => tch::no_grad(|| run.weights[1].copy_(&wave_at(SHAPES[1], 0.5, run.place))),
                    4 => run.opt.save(folder.path().join("state")).unwrap(),
                    6 => run.opt.load(folder.path().join("state")).unwrap(),
                    _ => {}
                }
                run.step(t);
                Snapshot::of(&run.opt, &run.vs).values()
            });
            assert!(cpu == gpu, "{kind:?}, step {t}");
        }
    }
}

#[test]
fn two_gpus_give_the_same() {
    let Some(gpus) = gpus(2) else { return };
    close(&rows::ivon(), &gpus);
    let row = rows::ivon();
    let mut runs = [gpus[0], gpus[1]].map(|device| Run::new(&row, (Kind::Float, device)));
    for t in 0..STEPS {
        let [one, other] = runs.each_mut().map(|run| {
            run.step(t);
            Snapshot::of(&run.opt, &run.vs).values()
        });
        assert!(one == other, "step {t}");
    }
}

/// Without its compiler libtorch computes the same to rounding, in a process of its own: what is loaded stays loaded.
#[test]
fn without_the_compiler_libtorch_computes() {
    if gpus(1).is_none() {
        return;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--ignored", "--exact", "child", "--nocapture"]);
    let output = child.env(WITHOUT, "").env("TCH_BLR_NVRTC", "/dev/null").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
#[ignore = "without_the_compiler_libtorch_computes runs it"]
fn child() {
    if std::env::var_os(WITHOUT).is_some() {
        let gpus = gpus(1).expect("the parent has one");
        close(&rows::adam(), &gpus);
        close(&rows::ivon(), &gpus);
        close(&rows::vogn(), &gpus);
        close(&rows::bsam(), &gpus);
    }
}
