//! Other systems that learn one thing after the other, on this crate's optimizers and posteriors: the code is in
//! `crates/tch-blr-examples/src/systems`.
//!
//! `cargo run --release --example systems [-- NAME..]`

use clap::Parser;
use clap::builder::PossibleValuesParser;
use std::path::PathBuf;
use std::time::Instant;
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::systems::{Finding, SYSTEMS, Setting};

/// Progressive networks, superposition, MAML, matching and low-shot fine-tuning: checks what defines each, and shows
/// what it is for. Fails if a check does.
///
/// Prints a table of findings; pictures go to target/systems/. All of them take minutes on two cores. The digits
/// are MNIST's if TCH_BLR_DATA is set, otherwise drawn by the example.
#[derive(Parser)]
struct Arguments {
    /// What to run [default: all]
    #[arg(value_name = "NAME", value_parser = PossibleValuesParser::new(SYSTEMS.map(|(name, _)| name)))]
    systems: Vec<String>,
}

fn main() -> Outcome {
    let named = Arguments::parse().systems;
    let setting = Setting { data: Digits::load()?, folder: PathBuf::from("target/systems") };
    println!("Data: {}\n", setting.data.source);
    let mut failed = Vec::new();
    for (name, run) in SYSTEMS.iter().filter(|(name, _)| named.is_empty() || named.iter().any(|n| n == name)) {
        let started = Instant::now();
        let findings = run(&setting)?;
        println!("{name} ({:.0} s)", started.elapsed().as_secs_f64());
        for Finding { what, found, expected, holds } in &findings {
            let mark = if *holds { "✓" } else { "✗" };
            println!("  {mark} {what}: {found}  [{expected}]");
        }
        println!();
        failed.extend(findings.into_iter().filter(|f| !f.holds).map(|f| format!("{name}: {}", f.what)));
    }
    println!("Pictures are in {}.", setting.folder.display());
    if failed.is_empty() { Ok(()) } else { Err(format!("not as it should be: {}", failed.join("; ")).into()) }
}
