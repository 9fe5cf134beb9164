//! Continual learning in pictures: one task after the other, and what each method keeps.
//!
//! `cargo run --release --example continual [-- --quick] [OUTPUT_FOLDER]`

mod images;
mod page;
mod plane;

use clap::Parser;
use std::path::PathBuf;
use std::time::Instant;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::{Outcome, output};

/// Continual learning in pictures: one task after the other, and what each method keeps.
///
/// Writes pictures, report.json with every number, and index.html, which shows all of it. Takes minutes on two cores. The digits are
/// MNIST's if $TCH_BLR_DATA/mnist has its IDX files, otherwise drawn by the example.
#[derive(Parser)]
struct Arguments {
    /// Fewer images and tasks
    #[arg(long)]
    quick: bool,
    /// Where everything goes
    #[arg(default_value = "target/continual")]
    output_folder: PathBuf,
}

fn main() -> Outcome {
    let Arguments { quick, output_folder: folder } = Arguments::parse();
    output::create(&folder)?;
    let started = Instant::now();
    let mut page = page::Page::default();
    println!("1. Five tasks along the plane");
    plane::run(&folder, quick, &mut page)?;
    println!("\n2. Digits with their pixels in another order in each task");
    images::run(&Digits::load()?, &folder, quick, &mut page)?;
    page.write(&folder, started.elapsed().as_secs_f64())?;
    println!("\nPictures, report.json and index.html: {}", folder.display());
    Ok(())
}
