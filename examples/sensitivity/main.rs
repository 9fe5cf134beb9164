//! Which examples a network depends on, which labels are wrong, what the test loss will be, and which weights it can do
//! without: all from the posterior that IVON learns anyway, without training again.
//!
//! `cargo run --release --example sensitivity [-- --examples N --epochs N --hess-init H --output FOLDER]`
//!
//! `network.rs` has the network and its sensitivities; each of the other files is one of the questions.

mod digits;
mod labels;
mod losses;
mod network;
mod pruning;

use clap::Parser;
use labels::NOISE;
use losses::{LATE, Point};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::{Outcome, output};

/// Which examples a network depends on, which labels are wrong, what the test loss will be, and which weights it can do
/// without: all from the posterior that IVON learns anyway, without training again.
///
/// Writes pictures, and report.json with every number. Fails if the estimated leave-one-out loss does not follow the
/// test loss (correlation 0.95), or if fewer than 75 % of the wrong labels are found. Takes minutes on two cores. The digits are
/// MNIST's if $TCH_BLR_DATA/mnist has its IDX files, otherwise drawn by the example.
#[derive(Parser)]
struct Arguments {
    /// Training examples, at most
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(i64).range(1..))]
    examples: i64,
    /// Epochs of training
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    epochs: u64,
    /// Start of IVON's Hessian
    #[arg(long, value_name = "H", default_value_t = 0.05)]
    hess_init: f64,
    /// Where pictures and report go
    #[arg(long, value_name = "FOLDER", default_value = "target/sensitivity")]
    output: PathBuf,
}

fn main() -> Outcome {
    let Arguments { examples, epochs, hess_init, output: folder } = Arguments::parse();
    output::create(&folder)?;
    let started = Instant::now();
    let mut data = Digits::load()?;
    let n = examples.min(data.train_labels.numel() as i64);
    data.train_images = data.train_images.narrow(0, 0, n);
    data.train_labels = data.train_labels.narrow(0, 0, n);
    println!("Data: {} ({n} training and {} test images)\n", data.source, data.test_labels.numel());

    println!("1. The test loss from training data alone: 784-32-16-10, IVON");
    let (net, opt, curve, ranked) = losses::follow(&data, (epochs, hess_init))?;
    let (correlation, late) = (losses::correlation(&curve, 0.0), losses::correlation(&curve, LATE));
    println!(
        "   correlation of the leave-one-out estimate with the test loss: {correlation:.3}; after epoch {LATE}: \
         {late:.3}"
    );
    losses::draw(&curve, &folder)?;

    println!("\n2. Which digits does it depend on?");
    digits::sheet(&data, &net, &opt, &folder)?;
    let ranked = digits::ranked(&ranked, &folder)?;
    let kinds = digits::kinds(&data, &net, &opt, &folder)?;

    println!("\n3. Which weights can it do without?");
    let pruned = pruning::prune(&data, &net, &opt, hess_init, &folder)?;

    println!("\n4. Which labels are wrong? {:.0} % are, at random", 100.0 * NOISE);
    let found = labels::wrong_labels(&data, (epochs, hess_init), &folder)?;
    let last = found.last().ok_or("no epoch")?;
    labels::print(&found);

    let report = json!({
        "data": data.source, "examples": n, "epochs": epochs, "hess_init": hess_init,
        "losses": curve.iter().map(Point::json).collect::<Vec<_>>(),
        "correlation": correlation, "correlation_late": late,
        "sensitivity_by_rank": ranked, "kinds": kinds,
        "wrong_labels_found": found.iter().map(labels::json).collect::<Vec<_>>(),
        "pruning": pruned,
        "seconds": started.elapsed().as_secs_f64(),
    });
    output::report(&folder, &report)?;
    println!("\nPictures and report in {} ({:.0} s)", folder.display(), started.elapsed().as_secs_f64());
    if correlation < 0.95 || last.1[0][0] < 0.75 {
        return Err("the correlation is below 0.95, or fewer than 75 % of the wrong labels were found".into());
    }
    Ok(())
}
