//! Previews of weighted training: every task trained once, and the loss of each at every weighting, beside what
//! training on that weighting would have given.
//!
//! `cargo run --release --example previews [-- OUTPUT_FOLDER]`, with USPS in $TCH_BLR_DATA. The problem and the figures
//! are those of the table `previews` of `--example reproduce`; here are its pictures.

use clap::Parser;
use std::path::PathBuf;
use tch_blr_examples::pictures::{Curves, training_curves};
use tch_blr_examples::tables::previews::{FAMILIES, Front, Loss, Previews, STEPS, TASKS};
use tch_blr_examples::{Outcome, data, output};

/// Previews of weighted training, and the front that training on each weighting gives.
///
/// Prints the area under each front and draws the loss of each task against that of each other. Takes a minute.
/// Needs USPS in $TCH_BLR_DATA.
#[derive(Parser)]
struct Arguments {
    /// Where the pictures go
    #[arg(default_value = "target/previews")]
    output_folder: PathBuf,
}

fn main() -> Outcome {
    let Arguments { output_folder: folder } = Arguments::parse();
    output::create(&folder)?;
    let data = data::folder_with("usps")?;
    for (file, loss) in [("squares.svg", Loss::Squared), ("logistic.svg", Loss::Logistic)] {
        let previews = Previews::load(&data, loss)?;
        println!("{loss:?} losses: area under the front in nats");
        let mut fronts = Vec::new();
        for (name, family) in FAMILIES {
            let front = previews.front(family, STEPS)?;
            println!("  {name:<28}{:>10.3}", front.area);
            fronts.push((name, front));
        }
        let panels: Vec<Curves> = [[0, 1], [0, 2], [1, 2]].into_iter().map(|pair| panel(&fronts, pair)).collect();
        training_curves(&folder.join(file), "loss of the first task (nats)", &panels)?;
    }
    println!("squares.svg and logistic.svg are in {}", folder.display());
    Ok(())
}

/// The edge of the simplex between two tasks, where no other has weight.
fn panel(fronts: &[(&str, Front)], [i, j]: [usize; 2]) -> Curves {
    let digits = |t: usize| TASKS[t].map(|d| d.to_string()).join("/");
    let curve = |front: &Front| {
        let between = front.trials.iter().filter(|trial| (trial.alpha[i] + trial.alpha[j] - 1.0).abs() < 1e-9);
        between.map(|trial| (trial.losses[i], trial.losses[j])).collect()
    };
    Curves {
        y_label: format!("loss on {}, against {} (nats)", digits(j), digits(i)),
        series: fronts.iter().map(|(name, front)| ((*name).to_owned(), curve(front))).collect(),
    }
}
