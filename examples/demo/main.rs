//! The main job: train a network with Adam, VOGN and IVON, see what the posterior knows, learn a second task without
//! forgetting the first, and merge two fine-tunes.
//!
//! `make demo`, or `cargo run --release --example demo [-- OUTPUT_FOLDER]`

mod continual;
mod merging;
mod moons;
mod uncertainty;

use clap::Parser;
use std::path::PathBuf;
use std::time::Instant;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::{Outcome, output};

/// The main job: train a network with Adam, VOGN and IVON, see what the posterior knows, learn a second task without
/// forgetting the first, and merge two fine-tunes.
///
/// Writes pictures, and report.json with every number. Fails if the posterior as prior does not keep the first task.
/// Takes 30 s on two cores. The digits are MNIST's if $TCH_BLR_DATA/mnist has its IDX files, otherwise drawn by the example.
#[derive(Parser)]
struct Arguments {
    /// Where pictures and report go
    #[arg(default_value = "target/demo")]
    output_folder: PathBuf,
}

fn main() -> Outcome {
    let folder = Arguments::parse().output_folder;
    output::create(&folder)?;
    let started = Instant::now();
    let data = Digits::load()?;
    println!(
        "Data: {} ({} training and {} test images)\n",
        data.source,
        data.train_labels.numel(),
        data.test_labels.numel()
    );

    println!("1. One network, three optimizers: 784-256-256-10, ReLU");
    let uncertainty = uncertainty::run(&data, &folder)?;
    println!("\n2. Upright digits first, then the same rotated by 90°, with one head");
    let continual = continual::run(&data)?;
    println!("\n3. Two fine-tunes of one base, on shifted digits 0-4 and on shifted 5-9, merged");
    let merging = merging::run(&data)?;
    println!("\n4. Where is the network sure? Two moons");
    let moons = moons::run(&folder)?;

    let report = serde_json::json!({
        "data": data.source,
        "uncertainty": uncertainty,
        "continual": continual,
        "merging": merging,
        "moons": moons,
        "seconds": started.elapsed().as_secs_f64(),
    });
    output::report(&folder, &report)?;
    println!("\nPictures and report ({:.0} s):", started.elapsed().as_secs_f64());
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)?.map(|f| f.map(|f| f.path())).collect::<Result<_, _>>()?;
    files.sort();
    for file in files {
        println!("  {}", file.display());
    }
    continual::check(&report["continual"])
}
