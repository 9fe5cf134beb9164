//! The main job: train a network with Adam, VOGN and IVON, see what the posterior knows, learn a second task without
//! forgetting the first, and merge two fine-tunes.
//!
//! `make demo`, or `cargo run --release --example demo [-- OUTPUT_FOLDER]`

mod claims;
mod merging;
mod moons;
mod second_task;
mod settings;
mod uncertainty;

use clap::Parser;
use std::path::PathBuf;
use std::time::Instant;
use tch_blr_examples::handwritten::Forms;
use tch_blr_examples::{Outcome, output};

/// The main job: train a network with Adam, VOGN and IVON, see what the posterior knows, learn a second task without
/// forgetting the first, and merge two fine-tunes.
///
/// The data, 1,797 handwritten digits of 8×8 pixels, are part of the program. Writes pictures, and
/// report.json with every number. Fails, with a line that says why, if what it is there to show does not show. Takes
/// a minute.
#[derive(Parser)]
struct Arguments {
    /// Where pictures and report go
    #[arg(default_value = "target/demo")]
    output_folder: PathBuf,
    /// Score on the digits on which the settings were chosen, and leave those for the test alone
    #[arg(long)]
    validation: bool,
}

fn main() -> Outcome {
    let Arguments { output_folder: folder, validation } = Arguments::parse();
    output::create(&folder)?;
    // Tensors are so small that threads would wait for each other most of the time.
    tch::set_num_threads(1);
    let started = Instant::now();
    let data = Forms::new()?;
    let (train, test) = (data.train, if validation { data.validation } else { data.test });
    println!("Data: {} handwritten digits to learn from, {} of other forms to test on;", train.len(), test.len());
    println!("mean ± standard deviation over {} seeds\n", settings::SEEDS);

    println!("1. One network, three optimizers, the same number of gradients each");
    let (uncertainty, mut claims, posteriors) = uncertainty::run(&train, &test, &folder)?;
    println!("\n2. The same digits rotated by 90° as second task, learned from where IVON's first ended");
    let (second_task, more) = second_task::run(&train, &test, &posteriors, &folder)?;
    claims.extend(more);
    println!("\n3. Two fine-tunes of IVON's first network, merged");
    let (merging, more) = merging::run(&train, &test, &posteriors)?;
    claims.extend(more);
    println!("\n4. Where is the network sure? Two moons");
    let moons = moons::run(&folder)?;

    let report = serde_json::json!({
        "uncertainty": uncertainty,
        "second_task": second_task,
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
    claims::check(&claims)
}
