//! Every row of the Bayesian learning rule on a problem so small that its answer is known.
//!
//! `cargo run --release --example learning_rule_table [-- --json FILE]`
//!
//! The table is that of the rule (Khan and Rue, *The Bayesian Learning Rule*, 2023, table 1), with the rows of this crate
//! that are not in it and one more group of columns: the exact answer, ours and the error.
//!
//! A new row is one entry in `optimization.rs`, `deep_learning.rs`, `sharpness.rs`, `posteriors.rs` or `inference.rs`.

mod deep_learning;
mod drawings;
mod inference;
mod optimization;
mod posteriors;
mod sharpness;
pub(crate) mod table;

use clap::Parser;
use std::path::{Path, PathBuf};
use table::{Checked, Outcome, Section};

pub(crate) const TABLE: [Section; 5] = [
    Section { title: "Optimization algorithms", rows: optimization::ROWS },
    Section { title: "Deep-learning algorithms", rows: deep_learning::ROWS },
    Section { title: "Deep-learning algorithms: sharpness-aware minimization", rows: sharpness::ROWS },
    Section { title: "Deep-learning algorithms: posteriors other than a diagonal Gaussian", rows: posteriors::ROWS },
    Section { title: "Approximate Bayesian inference algorithms", rows: inference::ROWS },
];

/// Every row of the Bayesian learning rule on a problem so small that its answer is known: prints the table of the rule
/// with the exact answer, ours and the error. Fails if a row does.
///
/// Draws trajectories, natural gradients and the two Fisher matrices into target/learning_rule_table/. Takes seconds.
#[derive(Parser)]
pub(crate) struct Arguments {
    /// Write an object per row: name, exact, ours, error, tolerance, passed, and the table's words
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
}

fn main() -> Outcome<()> {
    run(&TABLE, Arguments::parse().json.as_deref())?;
    let folder = Path::new("target/learning_rule_table");
    for picture in drawings::all(folder)? {
        println!("{}", picture.display());
    }
    Ok(())
}

/// Checks, prints and writes the table.
///
/// # Errors
/// If a row fails, after all is written.
pub(crate) fn run(table: &[Section], json: Option<&Path>) -> Outcome<()> {
    let rows: Vec<Checked> = table.iter().flat_map(|s| s.rows.iter().map(|row| table::check(s.title, row))).collect();
    println!("{}", table::text(&rows));
    if let Some(path) = json {
        std::fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")
            .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    }
    let failed: Vec<&str> = rows.iter().filter(|r| !r.passed).map(|r| r.name).collect();
    if !failed.is_empty() {
        return Err(format!("{} of {} rows failed: {}", failed.len(), rows.len(), failed.join(", ")).into());
    }
    println!("All {} rows passed.", rows.len());
    Ok(())
}

#[cfg(test)]
pub(crate) use drawings::all as draw;
