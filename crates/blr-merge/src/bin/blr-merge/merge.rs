//! `blr-merge merge` and `blr-merge remove`: options, and what they say about the method.

use crate::Outcome;
use crate::output::{report, with_progress};
use blr_merge::{Destination, FileModel, Keep, Method, Recipe, Rescale, TaskVectors, merge_files, remove_files};
use clap::{Args, ValueEnum};
use safetensors::Dtype;
use std::path::PathBuf;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// The mean of the models.
    Average,
    /// The mean, weighted by --weight.
    Linear,
    /// base + lambda · sum of weight · (model - base).
    TaskArithmetic,
    /// Task arithmetic with the largest differences, where their signs agree.
    Ties,
    /// Task arithmetic with randomly chosen, rescaled differences.
    Dare,
    /// TIES with randomly chosen, rescaled differences.
    DareTies,
    /// From the first model to the second at constant angular speed.
    Slerp,
    /// The mean, weighted by --weight and curvature.
    Fisher,
    /// Task arithmetic that accounts for curvature (Daheim et al. 2024).
    GradientMatching,
    /// The sum of posteriors' natural parameters, weighted by --weight, which may be negative.
    Combine,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scale {
    /// By 1/density, which is unbiased.
    Density,
    /// By what keeps the L1 norm of each tensor's difference.
    L1,
}

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

  Plain weights, with Fisher diagonals in separate files:
    blr-merge merge --method fisher a.safetensors b.safetensors --fisher a.fisher.safetensors \\
      --fisher b.fisher.safetensors --out m.safetensors";

#[derive(Args)]
#[command(after_help = MERGE_EXAMPLES)]
pub struct Merge {
    /// How to merge.
    #[arg(long, short)]
    method: Name,
    /// The model that the others were fine-tuned from.
    #[arg(long)]
    base: Option<PathBuf>,
    /// The models.
    #[arg(required = true)]
    models: Vec<PathBuf>,
    #[command(flatten)]
    out: Target,
    /// One weight per model, in the order of the models; repeat or separate by commas [default: 1 each].
    #[arg(long, short, value_delimiter = ',', allow_negative_numbers = true)]
    weight: Vec<f64>,
    /// One name per model, in the order of the models, for errors and for what dare keeps; repeat or separate by commas
    /// [default: the end of the path that tells it from the others].
    #[arg(long, value_delimiter = ',')]
    name: Vec<String>,
    /// Merge only tensors whose whole name fits this pattern (* for any characters, ? for one) and copy the others from
    /// the base or the first model; repeat or separate by commas. They may differ between the models.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    include: Vec<String>,
    /// Copy tensors whose whole name fits this pattern, instead of merging them; repeat or separate by commas.
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    exclude: Vec<String>,
    /// Merge the factors of low-rank adapters (lora_A, lora_B, …) one by one, though the product of their averages is
    /// not the average of their products.
    #[arg(long)]
    factors: bool,
    /// In files that lack the tensor NAME, take OTHER for it: a head tied to the embedding that was not written again.
    #[arg(long, value_name = "NAME=OTHER", value_parser = pair)]
    tied: Vec<(String, String)>,
    /// Factor on the sum of differences [default: 1].
    #[arg(long, allow_negative_numbers = true)]
    lambda: Option<f64>,
    /// Fraction of each difference that is kept, in (0, 1]; required by ties, dare and dare-ties.
    #[arg(long)]
    density: Option<f64>,
    /// How dare rescales what it keeps, to make up for what it drops [default: density].
    #[arg(long)]
    rescale: Option<Scale>,
    /// Decides, together with the names of tensors and models, what dare keeps [default: 0].
    #[arg(long)]
    seed: Option<u64>,
    /// Where slerp stops, 0 for the first model and 1 for the second [default: 0.5].
    #[arg(short, allow_negative_numbers = true)]
    t: Option<f64>,
    /// Do not divide by the sum of weights (linear, ties, dare-ties).
    #[arg(long)]
    no_normalize: bool,
    /// The file with a model's curvature (diagonal Fisher or Hessian of the summed loss, under the weights' names);
    /// repeat for each model, in the order of the models. Without this option the models must be posteriors.
    #[arg(long)]
    fisher: Vec<PathBuf>,
    /// The file with the base's curvature.
    #[arg(long)]
    base_fisher: Option<PathBuf>,
    /// Added to the curvature of the base [default: 1e-12].
    #[arg(long)]
    delta: Option<f64>,
    /// Take the information that a posterior has beyond its base as at least 0, in each weight (gradient-matching of
    /// posteriors); without it, a merged precision that is not positive is an error.
    #[arg(long)]
    clamp: bool,
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
    #[command(flatten)]
    out: Target,
}

impl Remove {
    pub fn run(self) -> Outcome<()> {
        let Remove { posterior, part, weight, out } = self;
        let merged = with_progress(|progress| remove_files(posterior, part, weight, out.destination(), progress))?;
        report(&merged, &out.out)
    }
}

#[derive(Args)]
struct Target {
    /// Where the result goes: a file or, with --max-shard-size, a new folder.
    #[arg(long, short)]
    out: PathBuf,
    /// Write a folder of shards, each with at most this many bytes of tensors (5GB, 1.5gb, 500MiB, 1000000), and their
    /// index.
    #[arg(long, value_parser = size)]
    max_shard_size: Option<u64>,
    /// Kind of the result's floating-point numbers [default: for each tensor, the narrowest that holds those of all
    /// models].
    #[arg(long)]
    dtype: Option<Kind>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    F64,
    F32,
    F16,
    Bf16,
}

impl Target {
    fn destination(&self) -> Destination {
        let out = match self.max_shard_size {
            Some(most) => Destination::shards(&self.out, most),
            None => Destination::from(&self.out),
        };
        match self.dtype {
            None => out,
            Some(Kind::F64) => out.dtype(Dtype::F64),
            Some(Kind::F32) => out.dtype(Dtype::F32),
            Some(Kind::F16) => out.dtype(Dtype::F16),
            Some(Kind::Bf16) => out.dtype(Dtype::BF16),
        }
    }
}

/// Parses a number of bytes: a decimal number with or without a unit, in which small letters are as good as large ones.
fn size(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    // Not B alone: in the name of a model it is a billion.
    let unit: u64 = match text[number.len()..].to_ascii_lowercase().as_str() {
        "" => 1,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err("expected a unit of KB, MB, GB, TB, KiB, MiB, GiB or TiB, or none for bytes".to_owned()),
    };
    let number = number.trim_end();
    // Whole numbers exactly.
    let whole = || number.parse().ok().and_then(|n: u64| n.checked_mul(unit));
    let plain = number.bytes().all(|c| c.is_ascii_digit() || c == b'.');
    let decimal = || number.parse().ok().map(|n: f64| n * unit as f64).filter(|n| plain && *n < u64::MAX as f64);
    let bytes = whole().or_else(|| decimal().map(|n| n as u64)).filter(|n| *n > 0);
    bytes.ok_or_else(|| "expected a number of bytes > 0, below 2⁶⁴: 5GB, 1.5GB, 500000000".to_owned())
}

/// Parses `NAME=OTHER`.
fn pair(text: &str) -> Result<(String, String), String> {
    let (name, other) = text.split_once('=').ok_or("expected NAME=OTHER")?;
    Ok((name.to_owned(), other.to_owned()))
}

impl Merge {
    /// The method with its settings. An option that the method does not use is an error, not ignored: whoever gives it
    /// expects it to do something.
    fn method(&self) -> Outcome<Method> {
        use Name::{Average, Combine, Dare, DareTies, Fisher, GradientMatching, Linear, Slerp, TaskArithmetic, Ties};
        let sparse = matches!(self.method, Ties | Dare | DareTies);
        let random = matches!(self.method, Dare | DareTies);
        let differences = sparse || self.method == TaskArithmetic;
        let based = differences || self.method == GradientMatching;
        let curved = matches!(self.method, Fisher | GradientMatching | Combine);
        for (option, given, used) in [
            ("--base", self.base.is_some(), based),
            ("--weight", !self.weight.is_empty(), !matches!(self.method, Average | Slerp)),
            ("--lambda", self.lambda.is_some(), differences),
            ("--density", self.density.is_some(), sparse),
            ("--rescale", self.rescale.is_some(), random),
            ("--seed", self.seed.is_some(), random),
            ("-t", self.t.is_some(), self.method == Slerp),
            ("--no-normalize", self.no_normalize, matches!(self.method, Linear | Ties | DareTies)),
            ("--fisher", !self.fisher.is_empty(), curved),
            ("--base-fisher", self.base_fisher.is_some(), self.method == GradientMatching),
            ("--delta", self.delta.is_some(), self.method == GradientMatching),
            // Curvatures in files of their own are never negative.
            ("--clamp", self.clamp, self.method == GradientMatching && self.fisher.is_empty()),
        ] {
            if given && !used {
                return Err(format!("{option} has no part in this method; leave it out").into());
            }
        }
        let normalize = !self.no_normalize;
        let density = || self.density.ok_or("this method needs --density, a number in (0, 1]");
        let keep = match self.method {
            Ties => Keep::Largest { density: density()? },
            Dare | DareTies => {
                let rescale = if self.rescale == Some(Scale::L1) { Rescale::L1Norm } else { Rescale::Density };
                Keep::Random { density: density()?, rescale, seed: self.seed.unwrap_or(0) }
            }
            _ => Keep::All,
        };
        Ok(match self.method {
            Average => Method::linear(),
            Linear => Method::Linear { normalize },
            Slerp => Method::Slerp { t: self.t.unwrap_or(0.5) },
            TaskArithmetic | Ties | Dare | DareTies => {
                let elect_signs = matches!(self.method, Ties | DareTies);
                let lambda = self.lambda.unwrap_or(1.0);
                Method::TaskVectors(TaskVectors { lambda, keep, elect_signs, normalize: normalize && elect_signs })
            }
            Fisher => Method::Fisher,
            GradientMatching => Method::GradientMatching { delta: self.delta.unwrap_or(1e-12), clamp: self.clamp },
            Combine => Method::Combine,
        })
    }

    pub fn run(&self) -> Outcome<()> {
        let mut recipe = Recipe::new(self.method()?).factors(self.factors);
        recipe = self.include.iter().fold(recipe, Recipe::include);
        recipe = self.exclude.iter().fold(recipe, Recipe::exclude);
        recipe = self.tied.iter().fold(recipe, |recipe, (name, of)| recipe.tied(name, of));
        let count = self.models.len();
        let given = [("--weight", self.weight.len()), ("--fisher", self.fisher.len()), ("--name", self.name.len())];
        for (option, given) in given {
            if given != 0 && given != count {
                return Err(format!("{option} is given {given} times for {count} models; give one for each").into());
            }
        }
        let models = self.models.iter().enumerate().map(|(k, path)| {
            let mut model = FileModel::new(path).weight(self.weight.get(k).copied().unwrap_or(1.0));
            if let Some(name) = self.name.get(k) {
                model = model.name(name);
            }
            if let Some(fisher) = self.fisher.get(k) {
                model = model.curvature(fisher);
            }
            model
        });
        let base = self.base.as_ref().map(|path| match &self.base_fisher {
            Some(fisher) => FileModel::new(path).curvature(fisher),
            None => FileModel::new(path),
        });
        let models: Vec<FileModel> = models.collect();
        let merged =
            with_progress(|progress| merge_files(recipe, base.as_ref(), &models, self.out.destination(), progress))?;
        report(&merged, &self.out.out)
    }
}
