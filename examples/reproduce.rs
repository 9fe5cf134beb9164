//! Published and promised numbers, run again: `make reproduce`, or
//! `cargo run --release --example reproduce [-- --epochs N] [--seeds N]`.
//!
//! MNIST, MLP 784-256-256-10, batch 128, 10 epochs, 3 seeds: Adam against VOGN and IVON under the same schedule (one
//! epoch of linear warm-up, then cosine), at the mean and averaged over 64 samples of the posterior. Needs MNIST's IDX
//! files in `$TCH_BLR_DATA/mnist`. Each run is kept in `target/reproduce/runs/`, so an interrupted job goes on where it
//! stopped; `target/reproduce/mnist.json` and `docs/results.md` hold the table.

#[path = "common/digits.rs"]
mod digits;
#[path = "common/model.rs"]
mod model;

use digits::{Digits, letters};
use model::{Mlp, Scores, averaged, train};
use serde_json::{Value, json};
use std::error::Error;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::Tensor;
use tch_blr::{Adam, DiagonalGaussian, Ivon, Optimizer, Rule, Schedule, Von};

const BATCH: usize = 128;
const SAMPLES: usize = 64;
const ROWS: [(&str, &str); 3] = [
    ("Adam", "lr 1e-3"),
    ("VOGN", "lr 0.03, h₀ 0.01, damping 0.01, δ 2e-5, β₂ 0.999"),
    ("IVON", "lr 0.5, h₀ 0.1, δ 2e-5, β₂ 0.9999"),
];

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let (mut epochs, mut seeds) = (10, 3);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a number"))?;
        let number = value.parse().map_err(|_| format!("{name} {value}: expected a number"))?;
        match name.as_str() {
            "--epochs" => epochs = number,
            "--seeds" => seeds = number,
            _ => return Err(format!("unknown option {name}; there are --epochs N and --seeds N").into()),
        }
    }
    let data = Digits::load()?;
    if data.source != "MNIST" {
        return Err("these numbers are MNIST's: put its four IDX files into $TCH_BLR_DATA/mnist".into());
    }
    let folder = PathBuf::from("target/reproduce");
    std::fs::create_dir_all(folder.join("runs"))?;
    let mut runs = Vec::new();
    for (name, _) in ROWS {
        for seed in 0..seeds {
            let path = folder.join(format!("runs/mnist-{name}-{epochs}-epochs-seed-{seed}.json"));
            let run = if let Ok(text) = std::fs::read_to_string(&path) {
                serde_json::from_str(&text)?
            } else {
                let run = run(name, &data, epochs, seed)?;
                let draft = path.with_extension("tmp");
                std::fs::write(&draft, run.to_string())?;
                std::fs::rename(&draft, &path)?;
                run
            };
            runs.push(run);
        }
    }
    report(&runs, epochs, seeds, &folder)
}

fn run(name: &str, data: &Digits, epochs: u64, seed: u64) -> Outcome<Value> {
    let n = data.train_labels.numel();
    let steps = n.div_ceil(BATCH) as u64;
    let schedule = Schedule::WarmupCosine { warmup: steps, total: epochs * steps };
    tch::manual_seed(seed as i64);
    let net = Mlp::new(&[784, 256, 256, 10]);
    let ess = n as f64;
    match name {
        "Adam" => {
            let opt = Adam::default().builder().schedule(schedule).build(&net.vs, 1e-3)?;
            trained(name, data, &net, opt, (epochs, seed), |_| Ok(None))
        }
        "VOGN" => {
            let vogn = Von::vogn().ess(ess).hess_init(0.01).damping(0.01).weight_decay(2e-5);
            let opt = vogn.builder().schedule(schedule).build(&net.vs, 0.03)?;
            trained(name, data, &net, opt, (epochs, seed), |opt| opt.posterior().map(Some))
        }
        _ => {
            let ivon = Ivon::default().ess(ess).hess_init(0.1).weight_decay(2e-5).beta2(0.9999);
            let opt = ivon.builder().schedule(schedule).build(&net.vs, 0.5)?;
            trained(name, data, &net, opt, (epochs, seed), |opt| opt.posterior().map(Some))
        }
    }
}

fn trained<R: Rule>(
    name: &str,
    data: &Digits,
    net: &Mlp,
    mut opt: Optimizer<R>,
    (epochs, seed): (u64, u64),
    posterior: impl Fn(&Optimizer<R>) -> tch_blr::Result<Option<DiagonalGaussian>>,
) -> Outcome<Value> {
    let begin = Instant::now();
    let pair = (&data.train_images, &data.train_labels);
    train(&format!("{name}, seed {seed}"), net, &mut opt, pair, (epochs, BATCH), 1000 * seed)?;
    let training_seconds = begin.elapsed().as_secs_f64();
    let letters = letters(2000, 0);
    let scores = |p: &Tensor, out: &Tensor| Scores::of(p, &data.test_labels, out);
    let at_mean = scores(&net.probabilities(&data.test_images), &net.probabilities(&letters))?;
    let over_samples = match posterior(&opt)? {
        Some(q) => {
            let [test, out] = averaged(&q, net, SAMPLES, [&data.test_images, &letters])?;
            Some(scores(&test, &out)?.json())
        }
        None => None,
    };
    Ok(json!({
        "row": name, "seed": seed, "epochs": epochs, "training_seconds": training_seconds,
        "at_mean": at_mean.json(), "over_samples": over_samples,
    }))
}

/// Mean and standard deviation (n - 1) over seeds.
fn statistics(runs: &[&Value], form: &str, metric: &str) -> (f64, f64) {
    let values: Vec<f64> = runs.iter().filter_map(|r| r[form][metric].as_f64()).collect();
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, variance.sqrt())
}

fn report(runs: &[Value], epochs: u64, seeds: u64, folder: &Path) -> Outcome<()> {
    let command = format!("cargo run --release --example reproduce -- --epochs {epochs} --seeds {seeds}");
    let mut table = String::new();
    let mut rows = Vec::new();
    for (name, settings) in ROWS {
        let of_row: Vec<&Value> = runs.iter().filter(|r| r["row"] == name).collect();
        let seconds = of_row.iter().filter_map(|r| r["training_seconds"].as_f64()).sum::<f64>() / of_row.len() as f64;
        for (form, label) in [("at_mean", "at the mean".to_owned()), ("over_samples", format!("{SAMPLES} samples"))] {
            if of_row.iter().any(|r| r[form].is_null()) {
                continue;
            }
            write!(table, "| {name}, {label} |")?;
            for (metric, scale) in [("accuracy", 100.0), ("nll", 1.0), ("ece", 1.0), ("ood_auroc", 1.0)] {
                let (mean, sd) = statistics(&of_row, form, metric);
                let digits = if scale > 1.0 { 2 } else { 4 };
                write!(table, " {:.digits$} ± {:.digits$} |", scale * mean, scale * sd)?;
                rows.push(json!({
                    "table": "mnist-mlp", "row": format!("{name}, {label}: {metric}"), "published": null, "ours": mean,
                    "sd": sd, "seeds": seeds, "seconds": seconds, "command": command,
                }));
            }
            writeln!(table, " {settings} |")?;
        }
    }
    std::fs::write(folder.join("mnist.json"), serde_json::to_string_pretty(&rows)? + "\n")?;
    let page = format!(
        "# Results\n\nProduced by `{command}` (`make reproduce` for the standard form); this file is written by that \
         command.\n\n## MNIST, MLP 784-256-256-10\n\n{epochs} epochs, batch {BATCH}, one epoch of linear warm-up and \
         then cosine for every row, mean ± standard deviation over {seeds} seeds. ECE with {} bins; OOD: letters drawn \
         by the example, told from digits by predictive entropy.\n\n| | accuracy (%) | NLL | ECE | OOD AUROC | settings \
         |\n|---|---|---|---|---|---|\n{table}",
        Scores::BINS
    );
    std::fs::write("docs/results.md", &page)?;
    println!("{page}\nWritten: docs/results.md, {}", folder.join("mnist.json").display());
    Ok(())
}
