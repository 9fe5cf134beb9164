//! The main job: train a network with Adam, VOGN and IVON, see what the posterior knows, learn a second task without
//! forgetting the first, and merge two fine-tunes.
//!
//! `make demo`, or `cargo run --release --example demo [-- OUTPUT_FOLDER]` (default `target/demo`). Real digits if
//! `$TCH_BLR_DATA/mnist` holds MNIST's IDX files, else digits that the example draws itself. Writes pictures and
//! `report.json` with every number, and fails if the posterior as prior does not keep the first task.

#[path = "../common/digits.rs"]
mod digits;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/pictures.rs"]
mod pictures;

mod continual;
mod merging;
mod moons;
mod uncertainty;

use digits::Digits;
use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

type Outcome<T> = Result<T, Box<dyn Error>>;

fn main() -> Outcome<()> {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("target/demo"), PathBuf::from);
    std::fs::create_dir_all(&folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
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
    let path = folder.join("report.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")
        .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    println!("\nPictures and report ({:.0} s):", started.elapsed().as_secs_f64());
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)?.map(|f| f.map(|f| f.path())).collect::<Result<_, _>>()?;
    files.sort();
    for file in files {
        println!("  {}", file.display());
    }
    continual::check(&report["continual"])
}
