//! Two fine-tunes of one base, merged in eight ways: what each merge knows, how far its gradients are from those of the
//! fine-tunes, and what the weight of the merge changes.
//!
//! `cargo run --release --example merging [-- [OUTPUT_FOLDER] [--seeds N] [--base-beta2 B]]`
//!
//! The base learns centred digits with IVON. One fine-tune sees shifted 0-4 and the other shifted 5-9, each with the
//! base's posterior as prior; wanted is a network for all shifted digits, as close as possible to the fine-tune on both
//! together, which is trained for comparison. Weights are 1, or chosen on shifted training digits that no network has
//! seen; densities are not tuned.
//!
//! `networks.rs` trains and merges, `measure.rs` looks at the merges, `report.rs` prints and draws what was seen.

mod measure;
mod networks;
mod report;

use clap::Parser;
use measure::Run;
use networks::{BASE, Task};
use report::over;
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::{Outcome, output};

/// Two fine-tunes of one base, merged in eight ways: what each merge knows, how far its gradients are from those of the
/// fine-tunes, and what the weight of the merge changes.
///
/// Prints means and standard deviations over the seeds; writes two pictures and report.json. Takes 80 s on one core. The digits
/// are MNIST's if $TCH_BLR_DATA/mnist has its IDX files, otherwise drawn by the example.
#[derive(Parser)]
struct Arguments {
    /// Where pictures and report go
    #[arg(default_value = "target/merging")]
    output_folder: PathBuf,
    /// Runs from different initial weights
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// β₂ of the base's IVON
    #[arg(long, value_name = "B", default_value_t = BASE.beta2)]
    base_beta2: f64,
}

fn main() -> Outcome {
    let Arguments { output_folder: folder, seeds, base_beta2 } = Arguments::parse();
    let base = networks::Training { beta2: base_beta2, ..BASE };
    output::create(&folder)?;
    let started = Instant::now();
    let data = Digits::load()?;
    println!("Data: {}, {seeds} seeds\n", data.source);
    let task = Task::new(&data);
    let runs = (0..seeds).map(|seed| Run::new(&task, &base, seed)).collect::<Outcome<Vec<_>>>()?;

    let precision = [0, 1].map(|k| over(&runs, |r| r.precision[k])[0]);
    let left = base.beta2.powf(base.steps as f64);
    println!(
        "\n  Mean precision of the base: {:.1} by IVON, {:.1} by the exact Fisher information; β₂^{} = {left:.1e} of \
         IVON's start is left",
        precision[0], precision[1], base.steps
    );
    let report = json!({
        "data": data.source,
        "seeds": seeds,
        "base_beta2": base.beta2,
        "mean_precision_of_base": precision,
        "models": report::table(&runs),
        "sweep": report::sweep(&runs, &folder.join("weights.svg"))?,
        "line": report::line(&runs, &folder.join("line.svg"))?,
        "seconds": started.elapsed().as_secs_f64(),
    });
    output::report(&folder, &report)?;
    println!(
        "\nweights.svg, line.svg and report.json are in {} ({:.0} s)",
        folder.display(),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
