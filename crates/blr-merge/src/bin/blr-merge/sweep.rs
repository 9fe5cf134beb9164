//! `blr-merge sweep`: merges by every weighting on a grid, to look at before one is chosen.

use crate::Outcome;
use crate::options::{Form, What};
use crate::output::print;
use blr_merge::storage::Draft;
use blr_merge::{evaluate, merge_files, simplex};
use clap::{Args, ValueEnum};
use serde_json::json;
use std::fs;
use std::path::PathBuf;

/// More files than anybody wants to look at.
const MOST: usize = 10_000;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Csv,
    Json,
}

#[derive(Args)]
#[command(after_help = "\
Examples:
  The five merges of two tasks with the weights (0, 1), (0.25, 0.75), … (1, 0), as previews/0-1.safetensors and so on:
    blr-merge sweep --method task-arithmetic --base base.safetensors a.safetensors b.safetensors --steps 4 --out previews

  What a command says of each, as previews/scores.csv, without the files:
    blr-merge sweep --method gradient-matching --base q0.safetensors q1.safetensors q2.safetensors --steps 10 \\
      --evaluate 'python loss.py' --out previews")]
pub struct Sweep {
    #[command(flatten)]
    what: What,
    /// The weights are all multiples of 1/STEPS that are ≥ 0 and sum to 1.
    #[arg(long)]
    steps: usize,
    /// A new or empty folder for the merged files, each named by its weights, and the table. It appears when all is
    /// done.
    #[arg(long, short)]
    out: PathBuf,
    /// A line for the shell that scores a merge: it is run with the path of the merge as its last argument, and prints
    /// one number. The scores go into a table, and the files are deleted.
    #[arg(long, value_name = "COMMAND")]
    evaluate: Option<String>,
    /// Keep the files that have been scored.
    #[arg(long, requires = "evaluate")]
    keep: bool,
    /// Of the table: scores.csv with a column for each model's weight, or scores.json.
    #[arg(long, requires = "evaluate", default_value = "csv")]
    format: Format,
    #[command(flatten)]
    form: Form,
}

impl Sweep {
    pub fn run(self) -> Outcome<()> {
        let Sweep { what, steps, out, evaluate: command, keep, format, form } = self;
        let request = what.request(form)?;
        if request.method.name.is_some_and(|name| !name.uses_weights()) {
            return Err("this method has no weights to vary".into());
        }
        if let Some(part) = request.models.iter().find(|part| part.weight.is_some()) {
            let path = part.path.display();
            return Err(format!("{path} has a weight, and the sweep gives each model all of them; leave it out").into());
        }
        let order = request.order()?;
        let count = simplex(order.models.len(), steps).take(MOST + 1).count();
        if count == 0 || count > MOST {
            let (models, found) = (order.models.len(), if count == 0 { "no" } else { "more than 10000" });
            return Err(format!("there are {found} weightings of {models} models in {steps} steps").into());
        }
        let folder = Draft::of_folder(&out)?;
        let mut rows = Vec::new();
        for alpha in simplex(order.models.len(), steps) {
            let models: Vec<_> = order.models.iter().zip(&alpha).map(|(m, w)| m.clone().weight(*w)).collect();
            let text: Vec<String> = alpha.iter().map(f64::to_string).collect();
            let mut file = text.join("-");
            // A folder of shards has no ending.
            file += if request.max_shard_size.is_some() { "" } else { ".safetensors" };
            let path = folder.path().join(&file);
            merge_files(order.recipe.clone(), order.base.as_ref(), &models, request.destination(&path), &mut |_, _| ())
                .map_err(|e| format!("with the weights {}: {e}", text.join(", ")))?;
            let score = command.as_ref().map(|command| evaluate(command, &path)).transpose()?;
            if score.is_some() && !keep {
                if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) }?;
            }
            let said = score.map(|score| format!(": {score}")).unwrap_or_default();
            print(&[format!("{}{said}", text.join(", "))])?;
            rows.push((alpha, score));
        }
        if command.is_some() {
            let names: Vec<String> = request
                .models
                .iter()
                .map(|part| part.name.clone().unwrap_or_else(|| part.path.display().to_string()))
                .collect();
            let (name, text) = match format {
                Format::Csv => ("scores.csv", csv(&names, &rows)),
                Format::Json => {
                    let row = |(alpha, score): &(Vec<f64>, Option<f64>)| json!({"weights": alpha, "score": score});
                    let rows: Vec<_> = rows.iter().map(row).collect();
                    ("scores.json", format!("{:#}\n", json!({"models": names, "rows": rows})))
                }
            };
            fs::write(folder.path().join(name), text)?;
        }
        folder.commit()?;
        print(&[format!("{}: {count} weightings of {} models", out.display(), order.models.len())])
    }
}

/// A table with a column for each model and one for the score.
fn csv(names: &[String], rows: &[(Vec<f64>, Option<f64>)]) -> String {
    let quoted = |text: &String| format!("\"{}\"", text.replace('"', "\"\""));
    let mut table = names.iter().map(quoted).collect::<Vec<_>>().join(",") + ",score\n";
    for (alpha, score) in rows {
        let cells: Vec<String> = alpha.iter().chain(score).map(f64::to_string).collect();
        table += &(cells.join(",") + "\n");
    }
    table
}
