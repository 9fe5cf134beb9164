//! `blr-merge soup`: the average of those models that make it better.

use crate::Outcome;
use crate::options::{Form, What};
use crate::output::{print, report};
use crate::request::Order;
use crate::settings::Name;
use blr_merge::{Better, evaluate, soup_files};
use clap::Args;
use std::path::{Path, PathBuf};

#[derive(Args)]
#[command(after_help = "\
Example:
  Of the runs of a search for hyper-parameters, the average of those that help; accuracy.py prints a number:
    blr-merge soup run*.safetensors --evaluate 'python accuracy.py' --higher-is-better --out soup.safetensors")]
pub struct Soup {
    #[command(flatten)]
    what: What,
    /// A line for the shell that scores a model: it is run with the path of a candidate as its last argument, and
    /// prints one number. N models take 2N - 1 runs.
    #[arg(long, value_name = "COMMAND")]
    evaluate: String,
    #[command(flatten)]
    sense: Sense,
    /// Where the result goes: a file or, with --max-shard-size, a new folder. Candidates are written beside it, one at
    /// a time.
    #[arg(long, short)]
    out: Option<PathBuf>,
    #[command(flatten)]
    form: Form,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Sense {
    /// The number is an accuracy or the like.
    #[arg(long)]
    higher_is_better: bool,
    /// The number is a loss or the like.
    #[arg(long)]
    lower_is_better: bool,
}

impl Soup {
    pub fn run(self) -> Outcome<()> {
        let Soup { what, evaluate: command, sense, out, form } = self;
        let mut request = what.request(form)?;
        request.method.name.get_or_insert(Name::Average);
        let Order { recipe, models, .. } = request.order()?;
        let out = request.place(out)?;
        let better = if sense.higher_is_better { Better::Higher } else { Better::Lower };
        let mut score = |path: &Path| evaluate(&command, path);
        let soup = soup_files(recipe, &models, better, &mut score, request.destination(&out))?;
        let mut lines: Vec<String> = soup.scores.iter().map(|(name, score)| format!("{name}: {score}")).collect();
        lines.push(format!("soup of {}: {}", soup.chosen.join(", "), soup.score));
        print(&lines)?;
        report(&soup.merged, &out)
    }
}
