//! An optimizer that a file names: any row of the crate, its settings, learning rate and schedule, without a generic.
//!
//! `cargo run --release --example configured [-- FILE | --list]`

use clap::Parser;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tch::{Kind, Tensor};
use tch_blr::{AnyRow, BuildOptions, Philox, Posterior, Result, Schedule, Train, nn};
use tch_blr_examples::Outcome;
use tch_blr_examples::model::Mlp;
use tch_blr_examples::moons::moons;

/// Any row, chosen by a file: trains a small network on two moons, and asks how sure it is.
///
/// The file is JSON. `row` and `lr` must be there, the rest may be: `schedule`, `clip_grad_norm`, `steps`, `seed`.
/// Without a file a built-in one is used and printed. Takes seconds.
#[derive(Parser)]
struct Arguments {
    /// The configuration
    file: Option<PathBuf>,
    /// Print every row with its settings at their defaults
    #[arg(long)]
    list: bool,
}

const SAMPLE: &str = r#"{
  "row": {"ivon": {"ess": 200.0, "hess_init": 0.5, "weight_decay": 0.005, "beta2": 0.999}},
  "lr": 0.2,
  "schedule": {"Cosine": {"warmup": 50, "total": 1000}},
  "steps": 1000,
  "seed": 0
}"#;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Configuration {
    /// `"adam"`, or `{"adam": {"beta2": 0.99}}`.
    row: AnyRow,
    lr: f64,
    #[serde(default)]
    schedule: Schedule,
    #[serde(default)]
    clip_grad_norm: Option<f64>,
    #[serde(default = "thousand")]
    steps: u64,
    #[serde(default)]
    seed: u64,
}

fn thousand() -> u64 {
    1000
}

impl Configuration {
    fn read(file: Option<&Path>) -> Outcome<Self> {
        let Some(path) = file else {
            println!("{SAMPLE}\n");
            return Ok(serde_json::from_str(SAMPLE)?);
        };
        let at_file = |problem: String| format!("{}: {problem}", path.display());
        let text = std::fs::read_to_string(path).map_err(|e| at_file(e.to_string()))?;
        Ok(serde_json::from_str(&text).map_err(|e| at_file(e.to_string()))?)
    }
}

/// A network and its optimizer. The row is not part of the type.
struct Training {
    net: Mlp,
    opt: Box<dyn Train>,
}

impl Training {
    fn new(configuration: &Configuration) -> Result<Self> {
        let Configuration { row, lr, schedule, clip_grad_norm, seed, .. } = *configuration;
        tch::manual_seed(seed as i64);
        // So small that Newton's method can have its whole Hessian.
        let net = Mlp::new(&[2, 8, 2]);
        let noise = Some(Philox { seed }.into());
        let options = BuildOptions { noise, schedule, clip_grad_norm, ..BuildOptions::default() };
        let opt = row.build_with(options, &net.vs, lr)?;
        Ok(Training { net, opt })
    }

    /// The loss is one of the crate's, from which rows can take the Fisher information.
    fn step(&mut self, x: &Tensor, y: &Tensor) -> Result<f64> {
        let net = &self.net;
        self.opt.step(&mut || nn::cross_entropy(&net.logits(x), y))
    }

    /// Probability of class 1 and mutual information of every point.
    fn averaged(&self, q: &dyn Posterior, x: &Tensor) -> Result<[Vec<f64>; 2]> {
        let p = q.predict(&self.net.vs, 100, || self.net.probabilities(x))?;
        Ok([numbers(&p.mean.select(1, 1))?, numbers(&p.mutual_information)?])
    }
}

fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::try_from(t.to_kind(Kind::Double).contiguous())?)
}

fn run(file: Option<&Path>) -> Outcome {
    let configuration = Configuration::read(file)?;
    let mut training = Training::new(&configuration)?;
    let (x, y) = moons(200, 0.1, 0);
    let every = (configuration.steps / 5).max(1);
    for step in 1..=configuration.steps {
        let loss = training.step(&x, &y)?;
        if step % every == 0 {
            println!("{}, step {step}: loss {loss:.4}", training.opt.name());
        }
    }

    let places = ["on moon 0", "on moon 1", "between them", "far away"];
    let at = Tensor::from_slice2(&[[0.0f32, 1.0], [1.0, -0.5], [0.5, 0.25], [10.0, 8.0]]);
    match training.opt.posterior() {
        Ok(q) => {
            let [p, doubt] = training.averaged(&*q, &at)?;
            for (i, place) in places.iter().enumerate() {
                println!("{place:<13} class 1 with {:.2}, {:.3} nats of doubt that data could resolve", p[i], doubt[i]);
            }
        }
        // Some rows have none, and some only with `ess`.
        Err(why) => {
            println!("No uncertainty: {why}");
            let p = numbers(&training.net.probabilities(&at).select(1, 1))?;
            places.iter().zip(p).for_each(|(place, p)| println!("{place:<13} class 1 with {p:.2}"));
        }
    }
    Ok(())
}

fn main() -> ExitCode {
    let Arguments { file, list } = Arguments::parse();
    if list {
        for row in AnyRow::NAMES.iter().filter_map(|name| AnyRow::named(name)) {
            println!("{}", serde_json::to_string(&row).expect("plain numbers"));
        }
        return ExitCode::SUCCESS;
    }
    match run(file.as_deref()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}
