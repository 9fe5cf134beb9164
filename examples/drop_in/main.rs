//! Programs of the kinds that users of tch run, each trained by optimizers chosen by name.
//!
//! `cargo run --release --example drop_in [-- --program NAME --optimizer NAME --seeds N ..]`
//!
//! What stays the same from program to program is here and in `optimizer.rs` (what a name means), `scores.rs` and
//! `table.rs`; `text.rs` is what the two models of characters share. Every other file is one program.

mod convnet;
mod gan;
mod gpt;
mod linear;
mod lstm;
pub(crate) mod optimizer;
mod policy;
pub(crate) mod program;
mod rates;
mod resnet;
pub(crate) mod scores;
mod seq2seq;
pub(crate) mod table;
mod tabular;
mod text;
mod vae;

use clap::Parser;
use clap::builder::PossibleValuesParser;
use optimizer::{Job, NAMES};
use program::Load;
use std::path::{Path, PathBuf};
use table::Run;
use tch_blr_examples::{Outcome, data, output};

pub(crate) const PROGRAMS: [(&str, Load); 10] = [
    ("linear", linear::load),
    ("convnet", convnet::load),
    ("resnet", resnet::load),
    ("lstm", lstm::load),
    ("gpt", gpt::load),
    ("seq2seq", |_| Ok(seq2seq::program())),
    ("vae", vae::load),
    ("gan", |_| Ok(gan::program())),
    ("policy", |_| Ok(policy::program())),
    ("tabular", tabular::load),
];

/// Programs of the kinds that users of tch run, each trained by optimizers chosen by name: prints one table.
///
/// An optimizer is told the number of examples and of steps; only Adam's learning rate is chosen for each program, from
/// four by the validation data. Data are read from $TCH_BLR_DATA: MNIST (otherwise digits are drawn), CIFAR-10, UCI and
/// Shakespeare (otherwise their programs are skipped).
#[derive(Parser)]
pub(crate) struct Arguments {
    /// What to train; may be repeated [default: all]
    #[arg(long = "program", value_name = "NAME")]
    #[arg(value_parser = PossibleValuesParser::new(PROGRAMS.map(|(name, _)| name)))]
    programs: Vec<String>,
    /// What to train it with; may be repeated [default: own, adam, ivon-auto, bsam-auto, vogn-auto,
    /// evon-auto]
    #[arg(long = "optimizer", value_name = "NAME", value_parser = PossibleValuesParser::new(NAMES))]
    optimizers: Vec<String>,
    /// Runs of each pair, with the seeds 0, 1, .., or with --validation 100, 101, ..
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Factor on Adam's learning rate, and on those that mean the same; may be repeated, and is then drawn
    #[arg(long = "lr-scale", value_name = "FACTOR", default_value = "1")]
    lr_scales: Vec<f64>,
    /// Score on the data that settings are chosen by, not on those of the table
    #[arg(long)]
    validation: bool,
    /// A few steps of each, to see that it runs
    #[arg(long)]
    quick: bool,
    /// Where a JSON file of each run and the table go
    #[arg(long, default_value = "target/drop_in")]
    folder: PathBuf,
}

fn main() -> Outcome {
    let arguments = Arguments::parse();
    // Times of a step are comparable, and two suites can run side by side.
    tch::set_num_threads(1);
    let runs = run(&arguments, data::folder().as_deref())?;
    let table = table::markdown(&runs);
    println!("\n{table}");
    output::write(&arguments.folder.join("table.md"), &table)?;
    if arguments.lr_scales.len() > 1 {
        rates::draw(&runs, &arguments.folder.join("rates.svg"))?;
    }
    Ok(())
}

/// Trains every pair, and leaves out programs that lack their data.
///
/// # Errors
/// If the files cannot be written. A training that fails is a result.
pub(crate) fn run(arguments: &Arguments, data: Option<&Path>) -> Outcome<Vec<Run>> {
    let default = || NAMES[..6].iter().map(ToString::to_string).collect();
    let optimizers = if arguments.optimizers.is_empty() { default() } else { arguments.optimizers.clone() };
    let asked = |name: &str| arguments.programs.is_empty() || arguments.programs.iter().any(|asked| asked == name);
    output::create(&arguments.folder)?;
    let mut runs = Vec::new();
    for (name, load) in PROGRAMS.into_iter().filter(|(name, _)| asked(name)) {
        let program = match load(data) {
            Ok(program) => program,
            Err(why) => {
                println!("{name}: skipped, {why}");
                continue;
            }
        };
        for optimizer in &optimizers {
            for &lr_scale in &arguments.lr_scales {
                for seed in 0..arguments.seeds {
                    let seed = if arguments.validation { 100 + seed } else { seed };
                    let (quick, validation) = (arguments.quick, arguments.validation);
                    let job = Job { optimizer, seed, lr_scale, quick, validation };
                    let run = Run::of(name, &*program, &job);
                    println!("{run}");
                    let file = arguments.folder.join(run.file());
                    output::write(&file, &(serde_json::to_string_pretty(&run)? + "\n"))?;
                    runs.push(run);
                }
            }
        }
    }
    Ok(runs)
}
