//! One step of an optimizer on a GPU, gradients given, beside PyTorch's fused Adam and copies of as many bytes:
//! `make bench-cuda`, or `cargo bench --features cuda --bench cuda [-- PART]` for the cases whose name contains PART.
//!
//! A case is MODEL/KIND/ROW: the parameters of ResNet-18 (62, 11,689,512 weights) or of the smallest GPT-2 (148,
//! 124,439,808 weights), with weights and gradients in f32 or bf16. A step is the complete cycle `perturbed`, then `step`
//! of given derivatives, all checks included; of VOGN with squares.
//!
//! How it is timed: after some steps, as many as take half a second, between two reads of one number from the GPU, which
//! wait for it. Reported is the median of seven such times, by step. `of a copy` is the time that the GPU takes to copy
//! as many bytes from one place to another as the step has to read and write at least (counted in `BYTES`); `launches`
//! are those of our kernels in a step. The peers, PyTorch's, are timed in the same way by `benches/cuda_peers.py`.
//!
//! Without a GPU everything runs all the same, of a perceptron of 251 weights, and kernels are those that the C++ compiler
//! makes of the same source: a test of the benchmark.
//!
//! Results: a table, and `target/bench/cuda.json`.

mod common;

use common::Shapes;
use serde_json::{Value, json};
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use tch::{Cuda, Device, Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Adam, Ivon, Labels, Params, Philox, Sgd, Statistic, Von, emulation};

const REPETITIONS: usize = 7;
/// Of a repetition.
const SECONDS: f64 = 0.5;

/// How often a step has to touch a weight in the kind of the weights (the weights themselves, gradients, squares), and
/// in f32 (moments, precisions, the mean that is kept while a sample lies in the weights). The check reads gradients once
/// more.
const BYTES: [(&str, i64, i64); 4] = [
    ("sgd", 4, 0),  // check ĝ; read θ, ĝ, write θ
    ("adam", 4, 4), // check ĝ; read θ, ĝ, m, v, write θ, m, v
    ("ivon", 6, 7), // check ĝ; read m, h, write θ, copy; read copy, ĝ, θ, b, h, write m, b, h
    ("vogn", 7, 7), // check ĝ, s; as IVON, but s for θ
];

struct Bench {
    part: String,
    device: Device,
    rows: Vec<Value>,
}

fn main() -> Result<(), Box<dyn Error>> {
    // cargo itself passes `--bench`.
    let part = std::env::args().skip(1).find(|a| !a.starts_with("--")).unwrap_or_default();
    let device = Device::cuda_if_available();
    let there = device.is_cuda();
    if !there {
        println!("skipped: no GPU; small, emulated on the CPU: a test of the benchmark, whose times mean nothing");
    } else if !cfg!(feature = "cuda") {
        println!("built without the feature `cuda`: libtorch computes");
    }
    let mut bench = Bench { part, device, rows: Vec::new() };
    println!("{:<22} {:>8} {:>9} {:>10} {:>10} {:>9}", "case", "launches", "ms", "a copy, ms", "of a copy", "GB/s");
    let models = if there {
        vec![("resnet18", common::resnet18()), ("gpt2", common::gpt2())]
    } else {
        vec![("mlp", common::small_mlp())]
    };
    for (model, shapes) in &models {
        for (kind, name) in [(Kind::Float, "f32"), (Kind::BFloat16, "bf16")] {
            let case = |row: &str| format!("{model}/{name}/{row}");
            bench.case(&case("sgd"), shapes, kind, Sgd::default(), 1e-3)?;
            bench.case(&case("adam"), shapes, kind, Adam::default(), 1e-4)?;
            bench.case(&case("ivon"), shapes, kind, Ivon::default().ess(1e4), 1e-2)?;
            bench.case(&case("vogn"), shapes, kind, Von::vogn().ess(1e4), 1e-3)?;
        }
    }
    bench.peers(&models);
    let folder = std::env::var_os("OUT").map_or_else(|| PathBuf::from("target/bench"), PathBuf::from);
    fs::create_dir_all(&folder)?;
    let path = folder.join("cuda.json");
    let device = if there { "cuda" } else { "none" };
    let report = json!({"device": device, "fused": cfg!(feature = "cuda"), "cases": bench.rows});
    fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")?;
    println!("\n{} cases in {}", bench.rows.len(), path.display());
    Ok(())
}

impl Bench {
    fn case<R: Row>(&mut self, name: &str, shapes: &Shapes, kind: Kind, row: R, lr: f64) -> Result<(), Box<dyn Error>> {
        if !name.contains(&self.part) {
            return Ok(());
        }
        let squared = row.statistic() == Statistic::Fisher(Labels::Observed);
        let leaf = |size: &Vec<i64>| Tensor::full(size, 0.02, (kind, self.device)).set_requires_grad(true);
        // In the order of their names, as derivatives are given.
        let mut shapes = shapes.clone();
        shapes.sort();
        let leaves: Vec<(String, Tensor)> = shapes.iter().map(|(name, size)| (name.clone(), leaf(size))).collect();
        let params = Params::named(leaves.iter().map(|(name, w)| (name, w.shallow_clone())))?;
        let weights: Vec<Tensor> = leaves.into_iter().map(|(_, w)| w).collect();
        let mut opt = row.builder().noise(Philox { seed: 0 }).build(params, lr)?;
        let gradients = common::all_like(&weights, 1e-3);
        let squares = if squared { common::all_like(&weights, 1e-6) } else { Vec::new() };
        let mut step = || {
            if self.device.is_cuda() {
                common::step_given(&mut opt, &gradients, &squares);
            } else {
                emulation::emulate(|| common::step_given(&mut opt, &gradients, &squares));
            }
        };
        step();
        let before = emulation::launches();
        step();
        let launches = emulation::launches() - before;
        let ms = timed(&weights[0], step);
        let row = name.rsplit('/').next().unwrap_or_default();
        let (_, narrow, wide) = BYTES.into_iter().find(|(r, ..)| *r == row).expect("a row of the list");
        let bytes = common::weights(&shapes) * (narrow * kind.elt_size_in_bytes() as i64 + wide * 4);
        drop((opt, gradients, squares, weights));
        let [from, mut to] = [0, 1].map(|_| Tensor::zeros([bytes / 2], (Kind::Uint8, self.device)));
        let last = to.shallow_clone();
        let copy = timed(&last, || to.copy_(&from));
        let rate = bytes as f64 / ms / 1e6;
        println!("{name:<22} {launches:>8} {ms:>9.4} {copy:>10.4} {:>10.2} {rate:>9.0}", ms / copy);
        self.rows.push(json!({"case": name, "launches": launches, "ms": ms, "bytes": bytes, "copy_ms": copy}));
        Ok(())
    }

    /// PyTorch's fused Adam, on the same shapes.
    fn peers(&mut self, models: &[(&str, Shapes)]) {
        let python = std::env::var("PYTHON").unwrap_or_else(|_| {
            let own = "target/bench/venv/bin/python";
            if Path::new(own).exists() { own.into() } else { "python3".into() }
        });
        let script = std::env::var("TCH_BLR_CUDA_PEERS").unwrap_or_else(|_| "benches/cuda_peers.py".into());
        for (model, shapes) in models {
            let sizes: Vec<&Vec<i64>> = shapes.iter().map(|(_, size)| size).collect();
            let request = json!({"model": model, "shapes": sizes, "seconds": SECONDS, "repetitions": REPETITIONS});
            let mut child = Command::new(&python);
            child.arg(&script).arg(request.to_string());
            // It loads what it needs itself.
            let answer = child.env_remove("LD_PRELOAD").output();
            let rows = answer.map_err(|e| e.to_string()).and_then(|output| {
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                serde_json::from_slice::<Vec<Value>>(&output.stdout)
                    .map_err(|_| text.lines().last().unwrap_or("it said nothing").to_owned())
            });
            match rows {
                Ok(rows) => {
                    for row in &rows {
                        let case = row["case"].as_str().unwrap_or_default();
                        println!("{case:<31} {:>9.4}", row["ms"].as_f64().unwrap_or(f64::NAN));
                    }
                    self.rows.extend(rows);
                }
                Err(why) => println!("skipped: PyTorch's Adam for {model}: {why}"),
            }
        }
    }
}

/// Milliseconds of a call. `last` is a tensor that it writes.
fn timed(last: &Tensor, mut call: impl FnMut()) -> f64 {
    let wait = || last.detach().view(-1).get(0).to_kind(Kind::Double).double_value(&[]);
    let mut run = |n: usize| {
        wait();
        let start = Instant::now();
        (0..n).for_each(|_| call());
        wait();
        start.elapsed().as_secs_f64()
    };
    // The first calls compile kernels.
    run(3);
    let one = run(5) / 5.0;
    let n = ((SECONDS / REPETITIONS as f64 / one) as usize).clamp(3, 10_000);
    let mut times: Vec<f64> = (0..REPETITIONS).map(|_| run(n) / n as f64).collect();
    times.sort_by(f64::total_cmp);
    if last.device().is_cuda() {
        Cuda::synchronize(0);
    }
    times[REPETITIONS / 2] * 1e3
}
