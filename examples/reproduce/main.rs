//! Published and promised numbers, run again: `make reproduce`, or
//! `cargo run --release --example reproduce [-- TABLE.. --seeds N --epochs N]`.
//!
//! Tables that have exact answers, and so are tests too, are in `crates/tch-blr-examples/src/tables`.

mod few_labels;
mod mnist;
mod permuted;
mod sequence;
mod split;
mod three_five;
mod toy;

use clap::Parser;
use clap::builder::PossibleValuesParser;
use tch_blr_examples::Outcome;
use tch_blr_examples::tables::{Job, Section, d1, d2, d4, d5, d6, previews};

type Table = (&'static str, fn(&Job) -> Outcome<Section>);

const TABLES: [Table; 15] = [
    ("mnist", mnist::table),
    ("few-labels", few_labels::table),
    ("d1", d1::table),
    ("d2", d2::table),
    ("d4", d4::table),
    ("d5", d5::table),
    ("d6", d6::table),
    ("previews", previews::table),
    ("usps", three_five::table),
    ("toy", toy::table),
    ("split", split::task_incremental),
    ("split-classes", split::class_incremental),
    ("permuted", permuted::table),
    ("permuted-gamma", permuted::choice_of_gamma),
    ("permuted-ivon", permuted::continual_ivon_table),
];

/// Published and promised numbers, run again.
///
/// Each run of a row and seed is kept in target/reproduce/runs/, so that an interrupted job goes on where it stopped
/// (delete the file to run it again). target/reproduce/TABLE.json holds the figures, docs/results.md the rendered
/// tables. The data (MNIST, USPS, ..) are read from $TCH_BLR_DATA; only `toy` needs none. d1, d2, d4, d5, d6 and
/// previews take seconds to minutes, the others up to hours on two cores.
#[derive(Parser)]
struct Arguments {
    /// What to run [default: all]
    #[arg(value_name = "TABLE", value_parser = PossibleValuesParser::new(TABLES.map(|(name, _)| name)))]
    tables: Vec<String>,
    /// Runs of each row [default: the table's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Epochs of each training [default: the row's]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    epochs: Option<u64>,
}

fn main() -> Outcome {
    let Arguments { tables, seeds, epochs } = Arguments::parse();
    let all = || TABLES.iter();
    let known = |name: &String| all().find(|(table, _)| table == name);
    let wanted: Vec<&Table> =
        if tables.is_empty() { all().collect() } else { tables.iter().filter_map(known).collect() };
    for (name, table) in wanted {
        let job = Job::new(name, seeds, epochs)?;
        let section = table(&job)?;
        job.write(&section)?;
        println!("\n{}", section.markdown());
    }
    println!("Written: docs/results.md, target/reproduce/");
    Ok(())
}
