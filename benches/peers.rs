//! This crate's optimizers beside others, in one run: `make bench-peers`, or, once that has installed the peers,
//! `cargo bench --bench peers [-- PART]` for the cases whose name contains PART.
//!
//! Peers: PyTorch's fused and foreach Adam and `ivon-opt`, which `benches/peers.py` runs in a child process, and the
//! optimizers of `tch::nn`, which run in this one. Both processes use the same version of libtorch and the same number of
//! threads: one per core, but at most 2, or `TCH_BLR_THREADS`. Learning rates are the same, and defaults else, which
//! agree.
//!
//! What one step is:
//!
//! * `resnet18/…`: the optimizer alone, on the 62 parameters (11,689,512 weights) of torchvision's ResNet-18, gradients
//!   given. Ours is the complete cycle `perturbed`, then `step` of the given derivatives (for VOGN with squares); that of
//!   `ivon-opt` is entering and leaving `sampled_params`, then `step`; everyone else's is `step`. Ours makes sure that
//!   the gradients are finite, which no peer does, and `…-unchecked` does not.
//! * `mlp251/…`: loss, gradient and update of a perceptron 10-15-5-1 (251 weights), batch 32.
//! * `epoch-mnist-H/…`: the choice of a batch of 128 from 60,000 images, loss, gradient and update of a perceptron
//!   784-H-H-10. Reported is an epoch of 469 steps, which is not run: it is 469/24 of what 24 steps take. The images are
//!   MNIST's if `TCH_BLR_DATA` is set, else uniform noise, which costs the same.
//!
//! How it is timed: a case and its peers take turns, for 24 repetitions each. Every repetition first rests until the
//! threads of the last one no longer hold a core (those of libtorch's OpenMP spin for some milliseconds after their last
//! work; its wait policy is left alone, since sleeping threads would cost all of them time), then warms up, and then
//! times several steps together. Reported are medians of the repetitions in milliseconds, ratio = ours/peer, and the
//! spread: the larger of the two interquartile ranges, in percent of its median. Where that is large, other processes
//! were busy, and the row is worth nothing.
//!
//! Results: a table, and `target/bench/peers.json`, a list of `{case, peer, ours_ms, peer_ms, ratio}`.

use serde_json::{Value, json};
use std::error::Error;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};
use tch::nn::{self, Module, OptimizerConfig, VarStore};
use tch::{Device, Kind, Reduction, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Adam, Derivatives, Ivon, Labels, RmsProp, Sgd, Statistic, Von};
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::digits::Digits;

const REPETITIONS: usize = 24;
/// OpenMP's threads were seen to spin for 8 ms.
const REST: Duration = Duration::from_millis(50);
const FOLDER: &str = "target/bench";
/// `scripts/peers.sh` puts it there.
const PYTHON: &str = "target/bench/venv/bin/python";

// As in `peers.py`.
const LR: f64 = 1e-3;
const IVON_LR: f64 = 0.1;
const ESS: f64 = 60_000.0;
const HESS_INIT: f64 = 0.1;
const BATCH: usize = 128;
const EXAMPLES: usize = 60_000;

type Outcome<T> = Result<T, Box<dyn Error>>;
/// A step, with all that it works on.
type Step = Box<dyn FnMut() -> tch_blr::Result<()>>;

#[derive(Clone, Copy)]
enum Peer<'a> {
    /// Of the child process, by this name.
    Python(&'static str),
    /// Of this process.
    Here(&'static str, &'a dyn Fn() -> Outcome<Step>),
}
use Peer::{Here, Python};

fn main() -> Outcome<()> {
    // cargo itself passes `--bench`.
    let part = env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default();
    let threads = threads()?;
    tch::set_num_threads(threads);
    fs::create_dir_all(FOLDER)?;
    let (images, labels, source) = data()?;
    let libtorch = libtorch_version().unwrap_or_else(|| "of unknown version".to_owned());
    println!("{}; {threads} threads; libtorch {libtorch}; images: {source}", cpu());
    let child = Interpreter::start(threads, &images, &labels);
    match &child {
        Ok(child) => println!("child process: {}", child.versions),
        Err(e) => println!("no peers in Python: {e}; `make bench-peers` installs and measures them"),
    }
    println!("medians of {REPETITIONS} repetitions, ms per step; epoch-…: of {} steps, times {}/{0}", EPOCH.1, EPOCH.2);
    println!("\n{:<26} {:<18} {:>11} {:>11} {:>7} {:>7}", "case", "peer", "ours", "peer", "ratio", "spread");

    let mut bench = Bench { part, child: child.ok(), rows: Vec::new() };
    cases(&mut bench, &images, &labels)?;
    let path = Path::new(FOLDER).join("peers.json");
    fs::write(&path, serde_json::to_string_pretty(&bench.rows)? + "\n")?;
    println!("\n{} rows in {}", bench.rows.len(), path.display());
    Ok(())
}

fn cases(bench: &mut Bench, images: &Tensor, labels: &Tensor) -> Outcome<()> {
    let ivon = Ivon::default().ess(ESS).hess_init(HESS_INIT);
    let (fused, foreach, ivon_opt) = (Python("torch-fused-adam"), Python("torch-foreach-adam"), Python("ivon-opt"));
    let tch_adam = Here("tch-adam", &|| tch_given(nn::Adam::default()));
    let tch_sgd = Here("tch-sgd", &|| tch_given(nn::Sgd::default()));
    let tch_rmsprop = Here("tch-rmsprop", &|| tch_given(nn::RmsProp::default()));
    bench.case("resnet18/adam", &|| given(Adam::default(), LR, true), &[fused, foreach, tch_adam])?;
    bench.case("resnet18/adam-unchecked", &|| given(Adam::default(), LR, false), &[fused])?;
    bench.case("resnet18/sgd", &|| given(Sgd::default(), LR, true), &[tch_sgd])?;
    bench.case("resnet18/sgd-unchecked", &|| given(Sgd::default(), LR, false), &[tch_sgd])?;
    bench.case("resnet18/rmsprop", &|| given(RmsProp::default(), LR, true), &[tch_rmsprop])?;
    bench.case("resnet18/rmsprop-unchecked", &|| given(RmsProp::default(), LR, false), &[tch_rmsprop])?;
    bench.case("resnet18/ivon", &|| given(ivon, IVON_LR, true), &[fused, tch_adam, ivon_opt])?;
    bench.case("resnet18/vogn", &|| given(Von::default().ess(ESS), LR, true), &[fused])?;

    let small_tch_adam = Here("tch-adam", &small_tch_adam);
    bench.case("mlp251/adam", &small_adam, &[small_tch_adam])?;
    bench.case("mlp251/ivon", &|| small_ivon(ivon), &[small_tch_adam])?;

    for width in [1024, 256] {
        let adam = || training(Adam::default(), LR, width, images, labels);
        let ivon = || training(ivon, IVON_LR, width, images, labels);
        bench.case(&format!("epoch-mnist-{width}/adam"), &adam, &[fused])?;
        bench.case(&format!("epoch-mnist-{width}/ivon"), &ivon, &[ivon_opt, Here("ours-adam", &adam)])?;
    }
    Ok(())
}

// --- Timing ---

/// Steps of a repetition before the clock starts, steps on the clock, steps of which the time is reported.
#[derive(Clone, Copy)]
struct Steps(usize, usize, usize);

const RESNET18: Steps = Steps(2, 5, 1);
const MLP251: Steps = Steps(50, 500, 1);
const EPOCH: Steps = Steps(3, 24, EXAMPLES.div_ceil(BATCH));

struct Bench {
    part: String,
    child: Option<Interpreter>,
    rows: Vec<Value>,
}

impl Bench {
    /// Measures a case in turns with its peers, if it is asked for.
    fn case(&mut self, name: &str, ours: &dyn Fn() -> Outcome<Step>, peers: &[Peer]) -> Outcome<()> {
        if !name.contains(&self.part) {
            return Ok(());
        }
        let (workload, _) = name.split_once('/').expect("WORKLOAD/ROW");
        let steps = match workload {
            "resnet18" => RESNET18,
            "mlp251" => MLP251,
            _ => EPOCH,
        };
        let mut runs = vec![(Here("ours", ours), Some(ours()?), Vec::new())];
        for peer in peers {
            match peer {
                Here(_, build) => runs.push((*peer, Some(build()?), Vec::new())),
                Python(_) if self.child.is_some() => runs.push((*peer, None, Vec::new())),
                Python(_) => {}
            }
        }
        for _ in 0..REPETITIONS {
            for (peer, step, times) in &mut runs {
                thread::sleep(REST);
                let ms = match (peer, step, &mut self.child) {
                    (Python(peer), _, Some(child)) => child.time(workload, peer, steps)?,
                    (_, Some(step), _) => time(step, steps)?,
                    _ => unreachable!("a peer in Python without a child process"),
                };
                times.push(ms * steps.2 as f64 / steps.1 as f64);
            }
        }
        let mut results = runs.into_iter().map(|(peer, _, times)| (peer, quartiles(times)));
        let (_, ours) = results.next().expect("ours is the first");
        for (Python(peer) | Here(peer, _), theirs) in results {
            let (ours_ms, peer_ms) = (ours[1], theirs[1]);
            let ratio = ours_ms / peer_ms;
            let spread = [ours, theirs].map(|q| 100.0 * (q[2] - q[0]) / q[1]).into_iter().fold(0.0, f64::max);
            println!("{name:<26} {peer:<18} {ours_ms:>11.4} {peer_ms:>11.4} {ratio:>7.3} {spread:>6.0}%");
            self.rows.push(json!({"case": name, "peer": peer, "ours_ms": ours_ms, "peer_ms": peer_ms, "ratio": ratio}));
        }
        Ok(())
    }
}

/// Milliseconds of the steps on the clock.
fn time(step: &mut Step, steps: Steps) -> Outcome<f64> {
    for _ in 0..steps.0 {
        step()?;
    }
    let start = Instant::now();
    for _ in 0..steps.1 {
        step()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// The middle one is the median.
fn quartiles(mut times: Vec<f64>) -> [f64; 3] {
    times.sort_by(f64::total_cmp);
    [1, 2, 3].map(|q| {
        let last = times.len() - 1;
        f64::midpoint(times[q * last / 4], times[(q * last).div_ceil(4)])
    })
}

/// The child process. A line `WORKLOAD PEER WARM_UP TIMED` asks for a repetition; the answer is its milliseconds.
struct Interpreter {
    child: Child,
    requests: ChildStdin,
    answers: BufReader<ChildStdout>,
    versions: String,
}

impl Interpreter {
    fn start(threads: i32, images: &Tensor, labels: &Tensor) -> Outcome<Interpreter> {
        if !Path::new(PYTHON).exists() {
            return Err(format!("there is no {PYTHON}").into());
        }
        let files = ["images.npy", "labels.npy"].map(|name| Path::new(FOLDER).join(name));
        images.write_npy(&files[0])?;
        labels.write_npy(&files[1])?;
        let mut command = Command::new(PYTHON);
        command.arg("benches/peers.py").arg(threads.to_string()).args(files);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let requests = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut this = Interpreter { child, requests, answers, versions: String::new() };
        this.versions = this.answer()?;
        Ok(this)
    }

    fn answer(&mut self) -> Outcome<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            return Err(format!("benches/peers.py ended ({}); what it said is above", self.child.wait()?).into());
        }
        Ok(line.trim_end().to_owned())
    }

    fn time(&mut self, workload: &str, peer: &str, steps: Steps) -> Outcome<f64> {
        writeln!(self.requests, "{workload} {peer} {} {}", steps.0, steps.1)?;
        Ok(self.answer()?.parse()?)
    }
}

// --- Gradients given: the optimizer alone ---

fn resnet18() -> VarStore {
    let mut shapes = Vec::new();
    // A convolution without bias and its batch normalization.
    let mut convolution = |to, from, side| shapes.extend([vec![to, from, side, side], vec![to], vec![to]]);
    convolution(64, 3, 7);
    let mut width = 64;
    for stage in [64, 128, 256, 512] {
        for _block in 0..2 {
            convolution(stage, width, 3);
            convolution(stage, stage, 3);
            if stage != width {
                convolution(stage, width, 1);
            }
            width = stage;
        }
    }
    shapes.extend([vec![1000, width], vec![1000]]);
    let vs = VarStore::new(Device::Cpu);
    for (i, shape) in shapes.iter().enumerate() {
        _ = vs.root().randn(&format!("w{i}"), shape, 0.0, 0.05);
    }
    assert_eq!((shapes.len(), count(&vs)), (62, 11_689_512));
    vs
}

fn count(vs: &VarStore) -> usize {
    vs.trainable_variables().iter().map(Tensor::numel).sum()
}

fn gradients(vs: &VarStore) -> Vec<Tensor> {
    vs.trainable_variables().iter().map(|w| Tensor::randn(w.size(), (Kind::Float, Device::Cpu)) * 0.01).collect()
}

fn given<R: Row>(row: R, lr: f64, check: bool) -> Outcome<Step> {
    let vs = resnet18();
    let gradients = gradients(&vs);
    let wanted = row.statistic() == Statistic::Fisher(Labels::Observed);
    let squares: Vec<Tensor> = gradients.iter().filter(|_| wanted).map(Tensor::square).collect();
    let mut opt = row.builder().check_finite(check).build(&vs, lr)?;
    let handles = |tensors: &[Tensor]| tensors.iter().map(|t| Some(t.shallow_clone())).collect();
    Ok(Box::new(move || {
        let (gradients, squares) = (handles(&gradients), handles(&squares));
        opt.perturbed()?.step(Derivatives { loss: 0.0, examples: None, gradients, squares })?;
        Ok(())
    }))
}

fn tch_given(row: impl OptimizerConfig) -> Outcome<Step> {
    let vs = resnet18();
    // tch cannot set a `.grad`; the gradient of Σ w·g is g.
    vs.trainable_variables()
        .iter()
        .zip(gradients(&vs))
        .map(|(w, g)| (w * g).sum(Kind::Float))
        .sum::<Tensor>()
        .backward();
    let mut opt = row.build(&vs, LR)?;
    Ok(Box::new(move || {
        opt.step();
        Ok(())
    }))
}

// --- Whole steps ---

/// Layers of tch, since nothing here needs ours, which record for VOGN.
fn mlp(sizes: &[i64]) -> (VarStore, nn::Sequential) {
    let (vs, mut net) = (VarStore::new(Device::Cpu), nn::seq());
    for (i, pair) in sizes.windows(2).enumerate() {
        if i > 0 {
            net = net.add_fn(Tensor::relu);
        }
        net = net.add(nn::linear(vs.root() / i, pair[0], pair[1], nn::LinearConfig::default()));
    }
    (vs, net)
}

fn small() -> (VarStore, impl Fn() -> Tensor) {
    let (vs, net) = mlp(&[10, 15, 5, 1]);
    assert_eq!(count(&vs), 251);
    let [x, y] = [10, 1].map(|columns| Tensor::randn([32, columns], (Kind::Float, Device::Cpu)));
    (vs, move || net.forward(&x).mse_loss(&y, Reduction::Mean))
}

fn small_adam() -> Outcome<Step> {
    let (vs, loss) = small();
    let mut opt = Adam::default().build(&vs, LR)?;
    Ok(Box::new(move || opt.backward_step(&loss()).map(|_| ())))
}

fn small_ivon(row: Ivon) -> Outcome<Step> {
    let (vs, loss) = small();
    let mut opt = row.build(&vs, IVON_LR)?;
    Ok(Box::new(move || opt.step(&loss).map(|_| ())))
}

fn small_tch_adam() -> Outcome<Step> {
    let (vs, loss) = small();
    let mut opt = nn::Adam::default().build(&vs, LR)?;
    Ok(Box::new(move || {
        opt.backward_step(&loss());
        Ok(())
    }))
}

fn training(row: impl Row, lr: f64, width: i64, images: &Tensor, labels: &Tensor) -> Outcome<Step> {
    let (vs, net) = mlp(&[784, width, width, 10]);
    let mut opt = row.builder().build(&vs, lr)?;
    let (x, y) = (images.shallow_clone(), labels.shallow_clone());
    let mut batches = (0..).flat_map(move |epoch| batches(&x, &y, BATCH, epoch, Last::Drop));
    Ok(Box::new(move || {
        let (x, y) = batches.next().expect("epochs without end");
        opt.step(|| net.forward(&x).cross_entropy_for_logits(&y)).map(|_| ())
    }))
}

// --- Circumstances ---

fn data() -> Outcome<(Tensor, Tensor, &'static str)> {
    if let Some(folder) = env::var_os("TCH_BLR_DATA") {
        let digits = Digits::mnist(&Path::new(&folder).join("mnist"))?;
        return Ok((digits.train_images, digits.train_labels, "MNIST"));
    }
    let images = Tensor::rand([EXAMPLES as i64, 784], (Kind::Float, Device::Cpu));
    let labels = Tensor::randint(10, [EXAMPLES as i64], (Kind::Int64, Device::Cpu));
    Ok((images, labels, "uniform noise (TCH_BLR_DATA is not set)"))
}

fn threads() -> Outcome<i32> {
    let Ok(text) = env::var("TCH_BLR_THREADS") else {
        return Ok(thread::available_parallelism()?.get().min(2) as i32);
    };
    let number = text.parse().ok().filter(|n| *n > 0);
    number.ok_or_else(|| format!("TCH_BLR_THREADS={text}: expected a number of threads, at least 1").into())
}

fn cpu() -> String {
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map_or(env::consts::ARCH, |(_, name)| name).to_owned()
}

/// Of the libtorch that this process has loaded: an unpacked archive's, or the one in a wheel.
fn libtorch_version() -> Option<String> {
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let library = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so"))?;
    let folder = Path::new(&library[library.find('/')?..]).parent()?.parent()?;
    if let Ok(version) = fs::read_to_string(folder.join("build-version")) {
        return Some(version.trim().to_owned());
    }
    let module = fs::read_to_string(folder.join("version.py")).ok()?;
    Some(module.split_once("__version__ = '")?.1.split_once('\'')?.0.to_owned())
}
