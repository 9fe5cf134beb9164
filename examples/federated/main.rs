//! Federated learning of ten clients with two digits each: accuracy and negative log likelihood over rounds, by FedAvg,
//! two ways of merging posteriors, partitioned variational inference and IVON-ADMM.
//!
//! `cargo run --release --example federated [-- [OUTPUT_FOLDER] [--seeds N] [--rounds N] [--tune]]`
//!
//! Client k has digits k and k+1, and no client has seen what most others see. Each trains a network of one hidden
//! layer for the same number of steps in every round, whatever the method. `plans.rs` has the settings, which `--tune`
//! chose on training digits that no client has; the experiment itself is in `tch_blr_examples::federation`.

mod plans;

use clap::Parser;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::federation::{Federation, Plan, Score};
use tch_blr_examples::pictures::{Curves, training_curves};
use tch_blr_examples::{Outcome, data, output};

/// Federated learning of ten clients with two digits each, by five methods.
///
/// Prints means and standard deviations over the seeds; writes federated.svg and report.json. Takes five minutes.
/// The digits are MNIST's if $TCH_BLR_DATA/mnist has its IDX files, otherwise 8×8 digits that are part of the program.
#[derive(Parser)]
struct Arguments {
    /// Where picture and report go
    #[arg(default_value = "target/federated")]
    output_folder: PathBuf,
    /// Runs from different initial weights
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// Rounds of the federation
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// Print what every setting of the grid reaches on the validation digits, and stop
    #[arg(long)]
    tune: bool,
}

/// The rounds of every seed.
type Runs = Vec<Vec<Score>>;

fn main() -> Outcome {
    let Arguments { output_folder: folder, seeds, rounds, tune } = Arguments::parse();
    output::create(&folder)?;
    let started = Instant::now();
    let federation = if data::folder().is_some_and(|data| data.join("mnist").is_dir()) {
        Federation::mnist(&Digits::load_mnist()?)
    } else {
        Federation::handwritten()?
    };
    let budget = plans::budget(&federation, rounds as usize);
    let examples: usize = federation.clients.iter().map(|(_, (_, y))| y.numel()).sum();
    println!("Data: {}, {examples} examples at 10 clients; {seeds} seeds; {budget:?}\n", federation.source);
    if tune {
        plans::tune(&federation, &budget);
        return Ok(());
    }
    let mut all = Vec::new();
    for plan in plans::PLANS {
        let runs =
            (0..seeds).map(|seed| plan.run(&federation, &federation.test, &budget, seed)).collect::<Outcome<Runs>>()?;
        all.push((plan, runs));
    }
    let report = json!({
        "data": federation.source,
        "seeds": seeds,
        "methods": table(&all, rounds as usize),
        "seconds": started.elapsed().as_secs_f64(),
    });
    draw(&all, &folder.join("federated.svg"))?;
    output::report(&folder, &report)?;
    println!("\nfederated.svg and report.json are in {} ({:.0} s)", folder.display(), started.elapsed().as_secs_f64());
    Ok(())
}

/// Mean and standard deviation over the seeds.
fn over(runs: &Runs, of: impl Fn(&[Score]) -> f64) -> [f64; 2] {
    let values: Vec<f64> = runs.iter().map(|run| of(run)).collect();
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
    [mean, if n > 1.0 { (squares / (n - 1.0)).sqrt() } else { 0.0 }]
}

fn table(all: &[(Plan, Runs)], rounds: usize) -> Value {
    println!("  {:<18}{:>46}  {:>17}{:>17}", "", "test accuracy in % after rounds", "NLL", "NLL");
    println!("  {:<18}{:>15}{:>15}{rounds:>16}  {:>17}{:>17}", "", 1, rounds.min(3), "at the mean", "of samples");
    let mut report = Map::new();
    for (plan, runs) in all {
        let accuracy = |round: usize| over(runs, |run| 100.0 * run[round].accuracy);
        let shown = |[mean, sd]: [f64; 2], digits: usize| format!("{mean:.digits$} ± {sd:.digits$}");
        let (nll, predictive) = (over(runs, |run| run[rounds].nll), over(runs, |run| run[rounds].predictive_nll));
        println!(
            "  {:<18}{:>15}{:>15}{:>16}  {:>17}{:>17}",
            plan.name,
            shown(accuracy(1), 1),
            shown(accuracy(rounds.min(3)), 1),
            shown(accuracy(rounds), 1),
            shown(nll, 3),
            if plan.is_point() { "-".to_owned() } else { shown(predictive, 3) },
        );
        let each = |of: fn(&Score) -> f64| (0..=rounds).map(|r| over(runs, |run| of(&run[r]))[0]).collect::<Vec<_>>();
        report.insert(
            plan.name.to_owned(),
            json!({
                "method": plan.method,
                "accuracy": each(|s| s.accuracy), "nll": each(|s| s.nll), "predictive_nll": each(|s| s.predictive_nll),
                "last_accuracy_percent": accuracy(rounds), "last_nll": nll, "last_predictive_nll": predictive,
            }),
        );
    }
    Value::Object(report)
}

fn draw(all: &[(Plan, Runs)], path: &Path) -> Outcome {
    let curves = |label: &str, highest: f64, of: fn(&Score) -> f64| Curves {
        y_label: label.to_owned(),
        series: all
            .iter()
            .map(|(plan, runs)| {
                // What is off the scale is left out: the lower curves are what one wants to tell apart.
                let shown = |x: f64| if x > highest { f64::NAN } else { x };
                let point = |r: usize| (r as f64, shown(over(runs, |run| of(&run[r]))[0]));
                // The network before the first round is the same for all, and would set the scale.
                (plan.name.to_owned(), (1..runs[0].len()).map(point).collect())
            })
            .collect(),
    };
    let panels =
        [curves("test accuracy (%)", 100.0, |s| 100.0 * s.accuracy), curves("test NLL up to 2 (nats)", 2.0, |s| s.nll)];
    training_curves(path, "round", &panels)
}
