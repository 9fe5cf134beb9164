//! Other systems that learn one thing after the other, as small examples on this crate's optimizers and posteriors.
//!
//! `cargo run --release --example systems [-- NAME..]` runs all, or those named, and prints a table of what was checked and
//! shown; fails if a check does. Pictures go to `target/systems/`. The digits are MNIST's where `TCH_BLR_DATA` is set, and else
//! drawn by the example itself.
//!
//! | name | what carries over from task to task |
//! |---|---|
//! | progressive | features: columns that are frozen and read |
//! | superposition | all weights at once, told apart by a key per task |
//! | maml | an initialization from which a gradient step does much |
//! | matching | a distance (Siamese), or the examples themselves (nearest neighbour) |
//! | low_shot | the posterior of a head, as the prior for another domain |

#[path = "../common/digits.rs"]
mod digits;
#[path = "../common/pictures.rs"]
mod pictures;

mod low_shot;
mod maml;
mod matching;
mod progressive;
mod shared;
mod superposition;

use digits::Digits;
use shared::{Finding, Outcome, Setting};
use std::path::PathBuf;
use std::time::Instant;

type System = (&'static str, fn(&Setting) -> Outcome<Vec<Finding>>);

const SYSTEMS: [System; 5] = [
    ("progressive", progressive::run),
    ("superposition", superposition::run),
    ("maml", maml::run),
    ("matching", matching::run),
    ("low_shot", low_shot::run),
];

fn main() -> Outcome<()> {
    let named: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = named.iter().find(|name| SYSTEMS.iter().all(|(system, _)| system != name)) {
        let names: Vec<&str> = SYSTEMS.iter().map(|(name, _)| *name).collect();
        return Err(format!("no system {unknown}; there are {}", names.join(", ")).into());
    }
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
