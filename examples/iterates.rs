//! Uncertainty from a training that exists already: tch's own SGD, and SWAG, EMA and LAWA that watch it.
//!
//! `cargo run --release --example iterates [-- --cost]`

use clap::Parser;
use std::time::Instant;
use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};
use tch_blr::{Ema, Lawa, Perturbed, Swag, metrics};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::handwritten::{Examples, Forms, PIXELS};
use tch_blr_examples::model::Mlp;

/// Trains a small network on 386 handwritten digits with tch's own SGD, lets SWAG, EMA and LAWA watch, and asks about
/// digits by other hands: one set of weights, averages of them, and predictions averaged over SWAG's posterior. Its
/// temperature is chosen on the validation part. Takes seconds, and the digits are part of the program.
#[derive(Parser)]
struct Arguments {
    /// Only measure what SWAG costs beside an epoch of 60,000 images of 28×28 pixels
    #[arg(long)]
    cost: bool,
}

const SEEDS: i64 = 3;
const EPOCHS: u64 = 120;
/// From here on the learning rate stays, and the weights of every epoch are collected.
const COLLECT: u64 = 60;
const SAMPLES: usize = 64;
const TEMPERATURES: [f64; 7] = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0];

/// Accuracy and calibration error in percent, negative log-likelihood in nats.
type Scores = [f64; 3];

fn scores(probabilities: &Tensor, data: &Examples) -> tch_blr::Result<Scores> {
    Ok([
        100.0 * metrics::accuracy(probabilities, &data.labels)?,
        100.0 * metrics::ece(probabilities, &data.labels, 15)?,
        metrics::nll(probabilities, &data.labels)?,
    ])
}

fn run(seed: i64, data: &Forms) -> Outcome<Vec<(&'static str, Scores)>> {
    tch::manual_seed(seed);
    let net = Mlp::new(&[PIXELS as i64, 64, 10]);
    let mut opt = nn::sgd(0.9, 0.0, 1e-3, false).build(&net.vs, 0.05)?;
    let (mut swag, mut ema, mut lawa) = (Swag::new(&net.vs, 20)?, Ema::new(&net.vs, 0.99)?, Lawa::new(&net.vs, 6, 13)?);
    for epoch in 0..EPOCHS {
        let seed = 1000 * seed as u64 + epoch;
        for (x, y) in batches(&data.train.images, &data.train.labels, 32, seed, Last::Keep) {
            opt.backward_step(&net.logits(&x).cross_entropy_for_logits(&y));
            ema.update()?;
            lawa.update()?;
        }
        if epoch >= COLLECT {
            swag.collect()?;
        }
    }
    let (test, validation) = (&data.test, &data.validation);
    let here = || scores(&net.probabilities(&test.images), test);
    let mut all = vec![("the last weights", here()?)];
    // One after the other: of several guards the latest counts.
    let mut at = |name, guard: tch_blr::Result<Perturbed>| {
        let _guard = guard?;
        all.push((name, here()?));
        Ok::<_, tch_blr::Error>(())
    };
    at("EMA", ema.swap_in())?;
    at("LAWA", lawa.swap_in())?;
    at("SWAG's mean", swag.swap_in())?;
    let q = swag.posterior()?;
    let p = q.predict(&net.vs, SAMPLES, || net.probabilities(&test.images))?;
    all.push(("SWAG", scores(&p.mean, test)?));
    let (tau, q) = q.fit_temperature(TEMPERATURES, |q| {
        let p = q.predict(&net.vs, SAMPLES, || net.probabilities(&validation.images))?;
        metrics::nll(&p.mean, &validation.labels)
    })?;
    println!("seed {seed}: temperature {tau} on the validation part");
    let p = q.predict(&net.vs, SAMPLES, || net.probabilities(&test.images))?;
    all.push(("SWAG, tempered", scores(&p.mean, test)?));
    Ok(all)
}

/// Seconds of an epoch, and of what SWAG does in it once all K deviations are there.
fn cost() -> Outcome {
    let net = Mlp::new(&[784, 256, 256, 10]);
    let x = Tensor::rand([60_000, 784], (Kind::Float, Device::Cpu));
    let y = Tensor::randint(10, [60_000], (Kind::Int64, Device::Cpu));
    let mut opt = nn::Sgd::default().build(&net.vs, 1e-3)?;
    let mut swag = Swag::new(&net.vs, 20)?;
    for _ in 0..20 {
        swag.collect()?;
    }
    let started = Instant::now();
    for (x, y) in batches(&x, &y, 100, 0, Last::Drop) {
        opt.backward_step(&net.logits(&x).cross_entropy_for_logits(&y));
    }
    let epoch = started.elapsed();
    let started = Instant::now();
    swag.collect()?;
    let collect = started.elapsed();
    let percent = 100.0 * collect.as_secs_f64() / epoch.as_secs_f64();
    println!("An epoch of 600 steps: {epoch:.2?}; collect(): {collect:.2?}, {percent:.2} %");
    Ok(())
}

fn main() -> Outcome {
    // Tensors are so small that threads would wait for each other most of the time.
    tch::set_num_threads(1);
    if Arguments::parse().cost {
        return cost();
    }
    let data = Forms::new()?;
    let runs = (0..SEEDS).map(|seed| run(seed, &data)).collect::<Outcome<Vec<_>>>()?;
    println!("\n{} digits by other hands, mean of {SEEDS} seeds", data.test.len());
    println!("{:<18}{:>10}{:>10}{:>10}", "", "accuracy %", "ECE %", "NLL");
    for (i, (name, _)) in runs[0].iter().enumerate() {
        let mean = |score: usize| runs.iter().map(|run| run[i].1[score]).sum::<f64>() / runs.len() as f64;
        println!("{name:<18}{:>10.1}{:>10.2}{:>10.3}", mean(0), mean(1), mean(2));
    }
    Ok(())
}
