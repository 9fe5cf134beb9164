//! Which prior precision, and how wide a network? Laplace's evidence says so from the training data alone; held-out
//! data are asked only whether it is right.
//!
//! `cargo run --release --example laplace [-- --only curves|images --output FOLDER]`
//!
//! `curves.rs`: Snelson's regression and two moons, over a grid of prior precisions and of widths. `images.rs`: the
//! last layer of a network on 60,000 digits in seconds.

mod curves;
mod images;

use clap::{Parser, ValueEnum};
use serde_json::json;
use std::path::PathBuf;
use std::time::Instant;
use tch_blr_examples::{Outcome, output};

/// Which prior precision, and how wide a network? Laplace's evidence says so from the training data alone.
///
/// Writes precisions.svg, widths.svg and report.json, and says where evidence and held-out data disagree by more than a
/// step of the grid. Takes minutes on two cores. Data: $TCH_BLR_DATA/snelson and $TCH_BLR_DATA/mnist, otherwise drawn
/// by the example.
#[derive(Parser)]
struct Arguments {
    /// One part alone
    #[arg(long)]
    only: Option<Part>,
    /// Where pictures and report go
    #[arg(long, value_name = "FOLDER", default_value = "target/laplace")]
    output: PathBuf,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Part {
    Curves,
    Images,
}

fn main() -> Outcome {
    let Arguments { only, output: folder } = Arguments::parse();
    output::create(&folder)?;
    let started = Instant::now();
    let mut report = json!({});
    if only != Some(Part::Images) {
        report["curves"] = curves::run(&folder)?;
    }
    if only != Some(Part::Curves) {
        report["images"] = images::run()?;
    }
    output::report(&folder, &report)?;
    println!("\nReport and pictures in {} ({:.0} s)", folder.display(), started.elapsed().as_secs_f64());
    Ok(())
}
