//! Published and promised numbers, run again: `make reproduce`, or
//! `cargo run --release --example reproduce [-- TABLE.. --seeds N --epochs N]`.
//!
//! Without names all tables are run; some take hours on two cores. Each run of a row and seed is kept in
//! `target/reproduce/runs/`, so an interrupted job goes on where it stopped (delete the file to run it again).
//! `target/reproduce/TABLE.json` holds the figures, `docs/results.md` the rendered tables. The data (MNIST, USPS, ..) are
//! read from `$TCH_BLR_DATA`.

#[path = "../common/digits.rs"]
mod digits;
#[path = "../common/four_moons.rs"]
mod four_moons;
#[path = "../common/libsvm.rs"]
mod libsvm;
#[path = "../common/logistic.rs"]
mod logistic;
#[path = "../common/model.rs"]
mod model;
#[path = "../common/tasks.rs"]
mod tasks;
#[path = "../common/usps.rs"]
mod usps;

mod d1;
mod d2;
mod d4;
mod d5;
mod d6;
mod merging;
mod mnist;
mod permuted;
mod report;
mod sequence;
mod split;
mod three_five;
mod toy;

use report::{Job, Outcome, Section};

type Table = (&'static str, fn(&Job) -> Outcome<Section>);

const TABLES: &[Table] = &[
    ("mnist", mnist::table),
    ("d1", d1::table),
    ("d2", d2::table),
    ("d4", merging::table),
    ("d5", d5::table),
    ("d6", d6::table),
    ("usps", three_five::table),
    ("toy", toy::table),
    ("split", split::task_incremental),
    ("split-classes", split::class_incremental),
    ("permuted", permuted::table),
];

fn main() -> Outcome<()> {
    let names: Vec<&str> = TABLES.iter().map(|(name, _)| *name).collect();
    let (mut wanted, mut seeds, mut epochs) = (Vec::new(), None, None);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        if let Some(table) = TABLES.iter().find(|(name, _)| *name == argument) {
            wanted.push(table);
            continue;
        }
        let option = match argument.as_str() {
            "--seeds" => &mut seeds,
            "--epochs" => &mut epochs,
            _ => {
                return Err(
                    format!("unknown argument {argument}: expected --seeds N, --epochs N, or of {names:?}").into()
                );
            }
        };
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a number"))?;
        let number = value.parse().ok().filter(|n| *n > 0);
        *option = Some(number.ok_or_else(|| format!("{argument} {value}: expected a number of at least 1"))?);
    }
    if wanted.is_empty() {
        wanted.extend(TABLES);
    }
    for (name, table) in wanted {
        let job = Job::new(name, seeds, epochs)?;
        let section = table(&job)?;
        job.write(&section)?;
        println!("\n{}", section.markdown());
    }
    println!("Written: docs/results.md, target/reproduce/");
    Ok(())
}
