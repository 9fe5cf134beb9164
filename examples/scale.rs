//! What a step of many ranks costs, from a laptop to 1,024 nodes: the formula of `docs/scale.md` beside a simulation.
//!
//! `cargo run --release --example scale`

use clap::Parser;
use std::path::PathBuf;
use tch_blr_examples::Outcome;
use tch_blr_examples::pictures::{Curves, training_curves};
use tch_blr_examples::random::Rng;
use tch_blr_examples::ring::{Link, Step};

/// Simulates the ring by which many ranks add up their statistics; prints a table and draws how much of a step is spent
/// computing.
#[derive(Parser)]
struct Arguments {
    /// Weights of the model
    #[arg(long, default_value_t = 12_000_000)]
    weights: u64,
    /// Examples per rank and step
    #[arg(long, default_value_t = 128)]
    batch: u64,
    /// Speed of one rank in 10⁹ operations per second: two CPU cores by default
    #[arg(long, default_value_t = 100.0)]
    gigaflops: f64,
    /// Standard deviation of the time that a rank computes, relative to it
    #[arg(long, default_value_t = 0.05)]
    jitter: f64,
    /// Time from one rank to the next, of a message without length, in microseconds
    #[arg(long, default_value_t = 5.0)]
    latency: f64,
    /// Where the picture goes
    #[arg(long, default_value = "target/scale")]
    folder: PathBuf,
}

/// Bytes per weight that a step sums: the gradient, or gradient and curvature.
const ROWS: [(&str, f64); 2] = [("gradient (Adam, SGD)", 4.0), ("and curvature (IVON, VOGN)", 8.0)];

fn main() -> Outcome {
    let Arguments { weights, batch, gigaflops, jitter, latency, folder } = Arguments::parse();
    // A dense layer: a multiplication and an addition per weight and example forwards, and twice that backwards.
    let compute = 6.0 * (weights * batch) as f64 / (gigaflops * 1e9);
    println!("{weights} weights, {batch} examples per rank: {:.0} ms to compute\n", 1e3 * compute);
    println!(
        "{:<28} {:>9} {:>6} {:>11} {:>14} {:>11}",
        "summed", "Gbit/s", "ranks", "formula, ms", "simulation, ms", "computing"
    );
    let mut rng = Rng::new(0, 0);
    let mut panels = Vec::new();
    for gigabits in [10.0, 100.0] {
        let link = Link { bandwidth: gigabits * 1e9 / 8.0, latency: latency * 1e-6 };
        let mut series = Vec::new();
        for (name, bytes) in ROWS {
            let step = Step { compute, jitter, bytes: bytes * weights as f64 };
            let mut points = Vec::new();
            for doublings in 0..=10 {
                let ranks = 1 << doublings;
                let tries = if ranks > 100 { 5 } else { 50 };
                let found = (0..tries).map(|_| step.simulated(link, ranks, &mut rng)).sum::<f64>() / f64::from(tries);
                let share = compute / found;
                let expected = 1e3 * step.expected(link, ranks);
                println!(
                    "{name:<28} {gigabits:>9} {ranks:>6} {expected:>11.1} {:>14.1} {:>9.0} %",
                    1e3 * found,
                    100.0 * share
                );
                points.push((f64::from(doublings), 100.0 * share));
            }
            let examples = step.half(link) * gigaflops * 1e9 / (6.0 * weights as f64);
            println!("{:<28} half of it is computing at {examples:.0} examples per rank\n", "");
            series.push((name.to_owned(), points));
        }
        panels.push(Curves { y_label: format!("% of a step computing, {gigabits} Gbit/s"), series });
    }
    std::fs::create_dir_all(&folder)?;
    let path = folder.join("scale.svg");
    training_curves(&path, "log₂ of the number of ranks", &panels)?;
    println!("{}", path.display());
    Ok(())
}
