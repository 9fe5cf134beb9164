//! A network for upright digits adapted to rotated ones by factors of rank 4, with a posterior over those alone: 2 % of the
//! weights. `cargo run --release --example lora`
//!
//! Learning rate, epochs and the test-time scale that is called the best were chosen on the validation forms
//! (`--validation`); the table is of the test forms, which nothing was chosen on.

use clap::Parser;
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::nn::{Linear, LoraConfig, LoraLinear, linear, lora_linear};
use tch_blr::{Adam, DiagonalGaussian, Ivon, Philox, Schedule, metrics, pruning};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::digits::rotate90;
use tch_blr_examples::handwritten::{Examples, Forms};

/// Trains a network on upright digits, freezes it, and adapts it to digits that are rotated by 90° with low-rank factors
/// and IVON. Prints accuracy, NLL and ECE before, at the mean, averaged over samples at several test-time scales, and
/// with adapter weights pruned. The digits are part of the program. Takes half a minute.
#[derive(Parser)]
struct Arguments {
    /// Score on the digits on which the settings were chosen, and leave those for the test alone
    #[arg(long)]
    validation: bool,
    /// Learning rate of the adapters
    #[arg(long, default_value_t = 0.01)]
    lr: f64,
    /// Passes over the digits that adapt
    #[arg(long, default_value_t = 100)]
    epochs: u64,
    /// Factors of ess at which predictions are averaged
    #[arg(long, value_delimiter = ',', default_values_t = [0.1, 0.3, 1.0, 3.0, 10.0, 100.0])]
    scales: Vec<f64>,
    /// Shares of the adapters' weights that are pruned, those of the lowest |m|/σ
    #[arg(long, value_delimiter = ',', default_values_t = [0.1, 0.3, 0.5, 0.7, 0.9])]
    pruned: Vec<f64>,
}

const WIDTHS: [i64; 4] = [64, 768, 768, 10];
const RANK: LoraConfig = LoraConfig { rank: 4, alpha: 4.0 };
const BATCH: usize = 50;
const SAMPLES: usize = 32;
const BINS: usize = 15;

/// Class probabilities of layers with ReLU between them, `[N, 10]`.
fn logits<L: Module>(layers: &[L], x: &Tensor) -> Tensor {
    let (last, others) = layers.split_last().expect("a layer");
    last.forward(&others.iter().fold(x.shallow_clone(), |x, layer| layer.forward(&x).relu()))
}

fn probabilities<L: Module>(layers: &[L], x: &Tensor) -> Tensor {
    tch::no_grad(|| logits(layers, x).softmax(-1, Kind::Float))
}

fn row(name: &str, p: &Tensor, labels: &Tensor) -> tch_blr::Result<()> {
    let (accuracy, nll) = (metrics::accuracy(p, labels)?, metrics::nll(p, labels)?);
    println!("{name:<44} {:>8.1} {nll:>8.3} {:>8.3}", 100.0 * accuracy, metrics::ece(p, labels, BINS)?);
    Ok(())
}

/// The base, learned from upright digits.
fn base(train: &Examples) -> Outcome<(VarStore, Vec<Linear>)> {
    let mut vs = VarStore::new(Device::Cpu);
    let layer = |i: usize| linear(vs.root() / format!("fc{}", i + 1), WIDTHS[i], WIDTHS[i + 1], LinearConfig::default());
    let layers: Vec<Linear> = (0..3).map(layer).collect();
    let total = 8 * 30;
    let schedule = Schedule::Cosine { warmup: 0, total, end: 0.0 };
    let mut opt = Adam::default().schedule(schedule).build(&vs, 1e-3)?;
    for epoch in 0..30 {
        for (x, y) in batches(&train.images, &train.labels, BATCH, epoch, Last::Keep) {
            opt.step(|| logits(&layers, &x).cross_entropy_for_logits(&y))?;
        }
    }
    vs.freeze();
    Ok((vs, layers))
}

/// Adapters, learned from rotated digits, and their posterior.
fn adapt(layers: &[Linear], train: &Examples, arguments: &Arguments) -> Outcome<(VarStore, Vec<LoraLinear>, DiagonalGaussian)> {
    let adapters = VarStore::new(Device::Cpu);
    let of = |(i, layer)| lora_linear(adapters.root() / format!("fc{}", i + 1), layer, RANK);
    let adapted = layers.iter().enumerate().map(of).collect::<tch_blr::Result<Vec<_>>>()?;
    let steps = arguments.epochs * train.len().div_ceil(BATCH) as u64;
    let ivon = Ivon::auto(train.len() as f64, steps).noise(Philox { seed: 1 });
    let mut opt = ivon.build(&adapters, arguments.lr)?;
    for epoch in 0..arguments.epochs {
        for (x, y) in batches(&train.images, &train.labels, BATCH, 100 + epoch, Last::Keep) {
            opt.step(|| logits(&adapted, &x).cross_entropy_for_logits(&y))?;
        }
    }
    let q = opt.posterior()?;
    Ok((adapters, adapted, q))
}

fn main() -> Outcome {
    let arguments = Arguments::parse();
    tch::set_num_threads(1);
    tch::manual_seed(0);
    let Forms { train, validation, test } = Forms::new()?;
    let (upright, name) = if arguments.validation { (validation, "validation") } else { (test, "test") };
    let (vs, layers) = base(&train)?;
    let rotated = upright.with(rotate90);
    let (x, y) = (&rotated.images, &rotated.labels);

    let (adapters, adapted, q) = adapt(&layers, &train.with(rotate90), &arguments)?;
    let weights: usize = vs.variables().values().map(Tensor::numel).sum();
    let share = 100.0 * q.len() as f64 / weights as f64;
    println!("Base: {weights} weights, fixed. Posterior: {} weights of adapters, {share:.2} % of them.", q.len());
    println!("{} digits of the {name} forms\n", y.numel());
    println!("{:<44} {:>8} {:>8} {:>8}", "", "acc. (%)", "NLL", "ECE");
    row("base, upright", &probabilities(&layers, &upright.images), y)?;
    row("base, rotated", &probabilities(&layers, x), y)?;
    row("adapted, rotated, at the mean", &probabilities(&adapted, x), y)?;
    for t in &arguments.scales {
        let p = q.temper(1.0 / t)?.predict(&adapters, SAMPLES, || probabilities(&adapted, x))?;
        row(&format!("adapted, {SAMPLES} samples at {t} ess"), &p.mean, y)?;
    }
    println!();
    let importance = q.signal_to_noise();
    for share in &arguments.pruned {
        let mask = pruning::prune(&importance, *share)?;
        let without = mask.posterior(&q)?;
        let p = without.predict(&adapters, SAMPLES, || probabilities(&adapted, x))?;
        row(&format!("{:.0} % pruned, {SAMPLES} samples", 100.0 * share), &p.mean, y)?;
    }
    println!("\nPrior precision of each matrix, in closed form:");
    for (name, p) in q.prior_precisions(None)? {
        println!("  {name:<20} {p:.1}");
    }
    Ok(())
}
