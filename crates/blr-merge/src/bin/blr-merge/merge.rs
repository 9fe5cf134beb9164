//! `blr-merge merge` and `blr-merge remove`.

use crate::Outcome;
use crate::options::{Form, What};
use crate::output::{print, report, with_progress};
use crate::request::{Order, Request};
use blr_merge::{Planned, merge_files, plan_files, remove_files};
use clap::Args;
use std::path::{Path, PathBuf};

const MERGE_EXAMPLES: &str = "\
Examples:
  The mean of two fine-tunes:
    blr-merge merge --method average a.safetensors b.safetensors --out m.safetensors

  Two skills on top of one base, the second at half strength:
    blr-merge merge --method task-arithmetic --base base.safetensors a.safetensors b.safetensors \\
      --weight 1 --weight 0.5 --out m.safetensors

  The same with the largest fifth of each difference and elected signs:
    blr-merge merge --method ties --density 0.2 --base base.safetensors a.safetensors b.safetensors --out m.safetensors

  Posteriors saved by tch-blr (with <name>.precision); q0 is the prior of both:
    blr-merge merge --method gradient-matching --base q0.safetensors q1.safetensors q2.safetensors --out q.safetensors

  All but the heads, which differ and are taken from the first model:
    blr-merge merge --method average a.safetensors b.safetensors --exclude 'head.*' --out m.safetensors

  Into shards with an index, as model hubs keep large models:
    blr-merge merge --method average a.safetensors b.safetensors --max-shard-size 5GB --out merged

  Two adapters of one base, which need not have the same rank:
    blr-merge merge --method ties --density 0.2 --base base.safetensors base.safetensors base.safetensors \\
      --adapter math --adapter code --out m.safetensors

  From a recipe file; first what it would do:
    blr-merge merge --recipe recipe.toml --dry-run
    blr-merge merge --recipe recipe.toml

  Plain weights, with Fisher diagonals in separate files:
    blr-merge merge --method fisher a.safetensors b.safetensors --fisher a.fisher.safetensors \\
      --fisher b.fisher.safetensors --out m.safetensors";

#[derive(Args)]
#[command(after_help = MERGE_EXAMPLES)]
pub struct Merge {
    #[command(flatten)]
    what: What,
    /// Where the result goes: a file or, with --max-shard-size, a new folder.
    #[arg(long, short)]
    out: Option<PathBuf>,
    #[command(flatten)]
    form: Form,
    /// Print what each tensor would get (method, weights, kind, shape, bytes), and write nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Merge {
    pub fn run(self) -> Outcome<()> {
        let Merge { what, out, form, dry_run } = self;
        let request = what.request(form)?;
        let Order { recipe, base, models } = request.order()?;
        if dry_run {
            // Which looks at the kind of numbers alone.
            let destination = request.destination(Path::new(""));
            return print(&planned(&plan_files(recipe, base.as_ref(), &models, destination)?));
        }
        let out = request.place(out)?;
        let destination = request.destination(&out);
        let merged = with_progress(|progress| merge_files(recipe, base.as_ref(), &models, destination, progress))?;
        report(&merged, &out)
    }
}

/// A line for each tensor.
fn planned(tensors: &[Planned]) -> Vec<String> {
    let width = tensors.iter().map(|t| t.name.chars().count()).max().unwrap_or(0);
    let line = |t: &Planned| {
        let merge = match &t.merge {
            None => "copied".to_owned(),
            Some((method, weights)) => format!("{method}; weights {weights:?}"),
        };
        let dtype = format!("{:?}", t.dtype);
        format!("{:width$}  {dtype:<5} {:?}  {} bytes  {merge}", t.name, t.shape, t.bytes)
    };
    let bytes: u64 = tensors.iter().map(|t| t.bytes).sum();
    let sum = format!("{} tensors, {bytes} bytes; nothing is written", tensors.len());
    tensors.iter().map(line).chain([sum]).collect()
}

#[derive(Args)]
#[command(after_help = "\
Example:
  Forget what client 3 contributed. If that is more than there is, the error says how much can be removed:
    blr-merge remove server.safetensors client3.safetensors --out without3.safetensors")]
pub struct Remove {
    /// The posterior that holds both.
    posterior: PathBuf,
    /// What is taken out of it.
    part: PathBuf,
    /// How much of the part, > 0.
    #[arg(long, short, default_value_t = 1.0)]
    weight: f64,
    /// Where the result goes: a file or, with --max-shard-size, a new folder.
    #[arg(long, short)]
    out: PathBuf,
    #[command(flatten)]
    form: Form,
}

impl Remove {
    pub fn run(self) -> Outcome<()> {
        let Remove { posterior, part, weight, out, form } = self;
        let mut request = Request::default();
        form.of(&mut request);
        let destination = request.destination(&out);
        let merged = with_progress(|progress| remove_files(posterior, part, weight, destination, progress))?;
        report(&merged, &out)
    }
}
