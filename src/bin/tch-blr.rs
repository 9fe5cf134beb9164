//! The command `tch-blr`: merges, compares and looks into weights in safetensors files.

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use tch_blr::merge::{
    Destination, Difference, FileModel, Keep, Merged, Method, Rescale, TaskVectors, WeightFile, diff_files,
    merge_files, remove_files,
};

/// Merge, compare and look into weights in safetensors files.
///
/// A model is a safetensors file, an index of shards (model.safetensors.index.json) or a folder with either. Files are streamed:
/// they may be larger than memory. Results are written under another name first and then renamed, so that an error or a crash
/// leaves an old file as it was.
#[derive(Parser)]
#[command(name = "tch-blr", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Merge models of one architecture into one.
    Merge(Merge),
    /// Take one posterior's information out of another.
    Remove(Remove),
    /// List the tensors of a model.
    Inspect {
        /// The model.
        model: PathBuf,
    },
    /// List the tensors in which two models differ; exits with 0 if there are none and with 1 otherwise.
    Diff {
        /// One model.
        a: PathBuf,
        /// The other.
        b: PathBuf,
    },
    /// Print the completions of a shell.
    ///
    /// For example: tch-blr completions bash > ~/.local/share/bash-completion/completions/tch-blr
    Completions {
        /// The shell.
        shell: Shell,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Name {
    /// The mean of the models.
    Average,
    /// The mean by --weight.
    Linear,
    /// base + lambda · sum of weight · (model - base).
    TaskArithmetic,
    /// Task arithmetic of the largest differences, where signs agree.
    Ties,
    /// Task arithmetic of randomly kept, rescaled differences.
    Dare,
    /// TIES of randomly kept, rescaled differences.
    DareTies,
    /// From the first model to the second at constant angular speed.
    Slerp,
    /// The mean by weight and curvature.
    Fisher,
    /// Task arithmetic that accounts for curvature (Daheim et al. 2024).
    GradientMatching,
    /// Posteriors' natural parameters added with --weight, negative ones too.
    Combine,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Scale {
    /// 1/density: unbiased.
    Density,
    /// So that the L1 norm of each tensor's difference stays.
    L1,
}

const MERGE_EXAMPLES: &str = "\
Examples:
  The mean of two fine-tunes:
    tch-blr merge --method average a.safetensors b.safetensors --out m.safetensors

  Two skills on top of one base, the second at half strength:
    tch-blr merge --method task-arithmetic --base base.safetensors a.safetensors b.safetensors \\
      --weight 1 --weight 0.5 --out m.safetensors

  The same with the largest fifth of each difference and elected signs:
    tch-blr merge --method ties --density 0.2 --base base.safetensors a.safetensors b.safetensors --out m.safetensors

  Posteriors saved by this crate (with <name>.precision), q0 the prior of both:
    tch-blr merge --method gradient-matching --base q0.safetensors q1.safetensors q2.safetensors --out q.safetensors

  In shards, with an index, as model hubs have large models:
    tch-blr merge --method average a.safetensors b.safetensors --max-shard-size 5GB --out merged

  Plain weights, with Fisher diagonals in files of their own:
    tch-blr merge --method fisher a.safetensors b.safetensors --fisher a.fisher.safetensors \\
      --fisher b.fisher.safetensors --out m.safetensors";

#[derive(Args)]
#[command(after_help = MERGE_EXAMPLES)]
struct Merge {
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
    out: Out,
    /// A weight for each model, in their order; repeat or separate by commas [default: 1 each].
    #[arg(long, short, value_delimiter = ',', allow_negative_numbers = true)]
    weight: Vec<f64>,
    /// Scale of the sum of differences [default: 1].
    #[arg(long, allow_negative_numbers = true)]
    lambda: Option<f64>,
    /// Fraction of each difference that is kept, in (0, 1]; ties, dare and dare-ties need it.
    #[arg(long)]
    density: Option<f64>,
    /// What makes up for the differences that dare drops [default: density].
    #[arg(long)]
    rescale: Option<Scale>,
    /// Decides, with the names of tensors and models, what dare keeps [default: 0].
    #[arg(long)]
    seed: Option<u64>,
    /// Where slerp stops, 0 for the first model and 1 for the second [default: 0.5].
    #[arg(short, allow_negative_numbers = true)]
    t: Option<f64>,
    /// Do not divide by the sum of weights (linear, ties, dare-ties).
    #[arg(long)]
    no_normalize: bool,
    /// A file with the curvature of each model (diagonal Fisher or Hessian of the summed loss, under the weights' names), in
    /// their order; repeat. Without: the models are posteriors.
    #[arg(long)]
    fisher: Vec<PathBuf>,
    /// The same for the base.
    #[arg(long)]
    base_fisher: Option<PathBuf>,
    /// Added to the curvature of the base [default: 1e-12].
    #[arg(long)]
    delta: Option<f64>,
}

#[derive(Args)]
#[command(after_help = "\
Example:
  Forget what client 3 contributed; the error says how much can be removed if that is too much:
    tch-blr remove server.safetensors client3.safetensors --out without3.safetensors")]
struct Remove {
    /// The posterior that holds both.
    posterior: PathBuf,
    /// What is taken out of it.
    part: PathBuf,
    /// How much of it.
    #[arg(long, short, default_value_t = 1.0)]
    weight: f64,
    #[command(flatten)]
    out: Out,
}

#[derive(Args)]
struct Out {
    /// Where the result goes: a file, or with --max-shard-size a new folder.
    #[arg(long, short)]
    out: PathBuf,
    /// Write shards of at most so many bytes of tensors each (5GB, 500MiB, 1000000), and their index, to a folder.
    #[arg(long, value_parser = size)]
    max_shard_size: Option<u64>,
}

impl Out {
    fn destination(&self) -> Destination {
        match self.max_shard_size {
            Some(most) => Destination::shards(&self.out, most),
            None => Destination::from(&self.out),
        }
    }
}

/// A number of bytes.
fn size(text: &str) -> Result<u64, String> {
    let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[number.len()..] {
        "" | "B" => 1,
        "KB" => 1_000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        _ => return Err("expected a unit of B, KB, MB, GB, KiB, MiB or GiB".to_owned()),
    };
    let bytes = number.trim_end().parse().ok().and_then(|n: u64| n.checked_mul(unit)).filter(|n| *n > 0);
    bytes.ok_or_else(|| "expected a whole number > 0, and a unit: 5GB".to_owned())
}

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

impl Merge {
    /// The method, and whether every option given has a part in it.
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
            GradientMatching => match self.delta {
                Some(delta) => Method::GradientMatching { delta },
                None => Method::gradient_matching(),
            },
            Combine => Method::Combine,
        })
    }

    fn run(&self) -> Outcome<()> {
        let method = self.method()?;
        let count = self.models.len();
        for (option, given) in [("--weight", self.weight.len()), ("--fisher", self.fisher.len())] {
            if given != 0 && given != count {
                return Err(format!("{option} is given {given} times for {count} models; give one for each").into());
            }
        }
        let models = self.models.iter().enumerate().map(|(k, path)| {
            let model = FileModel::new(path).weight(self.weight.get(k).copied().unwrap_or(1.0));
            match self.fisher.get(k) {
                Some(fisher) => model.curvature(fisher),
                None => model,
            }
        });
        let base = self.base.as_ref().map(|path| match &self.base_fisher {
            Some(fisher) => FileModel::new(path).curvature(fisher),
            None => FileModel::new(path),
        });
        let models: Vec<FileModel> = models.collect();
        let merged =
            with_progress(|progress| merge_files(method, base.as_ref(), &models, self.out.destination(), progress))?;
        report(&merged, &self.out.out)
    }
}

/// A bar on stderr, where that is a terminal.
fn with_progress<T>(work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    let style = ProgressStyle::with_template("{bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}");
    let bar = ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let done = work(&mut |written, total| {
        bar.set_length(total);
        bar.set_position(written);
    });
    bar.finish_and_clear();
    done
}

fn report(merged: &Merged, out: &std::path::Path) -> Outcome<()> {
    let what = if merged.posterior { "a posterior" } else { "weights" };
    let mut lines =
        vec![format!("{}: {what} of {} tensors, {} elements", out.display(), merged.tensors, merged.weights)];
    if !merged.copied.is_empty() {
        lines.push(format!("copied, since they are not floating-point numbers: {}", merged.copied.join(", ")));
    }
    print(&lines)
}

fn print(lines: &[String]) -> Outcome<()> {
    let text: String = lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect();
    match io::stdout().lock().write_all(text.as_bytes()) {
        // Whoever reads may have had enough.
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        done => Ok(done?),
    }
}

fn inspect(path: &PathBuf) -> Outcome<()> {
    let file = WeightFile::open(path)?;
    let mut lines = Vec::new();
    let width = file.tensors().keys().map(|name| name.chars().count()).max().unwrap_or(0);
    let (mut elements, mut bytes) = (0, 0);
    for (name, t) in file.tensors() {
        lines.push(format!("{name:width$}  {:<5} {:?}", format!("{:?}", t.dtype), t.shape));
        elements += t.elements();
        bytes += t.bytes();
    }
    let tensors = file.tensors().len();
    lines.push(format!("{tensors} tensors, {elements} elements, {bytes} bytes, {} file(s)", file.shards().count()));
    let precisions = file.tensors().keys().filter(|name| file.is_precision(name)).count();
    if precisions > 0 {
        lines.push(format!("a posterior: {precisions} of the tensors are precisions of others"));
    }
    let mut metadata: Vec<_> = file.metadata().iter().collect();
    metadata.sort();
    for (key, value) in metadata {
        lines.push(format!("{key}: {value}"));
    }
    print(&lines)
}

/// Whether there are any.
fn diff(a: &PathBuf, b: &PathBuf) -> Outcome<bool> {
    let differences = diff_files(a, b)?;
    let mut lines = Vec::new();
    for (name, difference) in &differences {
        let line = match difference {
            Difference::OnlyInFirst => format!("only in {}", a.display()),
            Difference::OnlyInSecond => format!("only in {}", b.display()),
            Difference::Form(x, y) => format!("{:?} {:?} and {:?} {:?}", x.dtype, x.shape, y.dtype, y.shape),
            Difference::Numbers { largest, relative } => {
                format!("largest difference {largest:.3e}, norm of the difference {relative:.3e} of the first's")
            }
            _ => "differs".to_owned(),
        };
        lines.push(format!("{name}: {line}"));
    }
    print(&lines)?;
    Ok(!differences.is_empty())
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Merge(merge) => merge.run().map(|()| false),
        Command::Remove(Remove { posterior, part, weight, out }) => {
            with_progress(|progress| remove_files(posterior, part, weight, out.destination(), progress))
                .map_err(Into::into)
                .and_then(|merged| report(&merged, &out.out))
                .map(|()| false)
        }
        Command::Inspect { model } => inspect(&model).map(|()| false),
        Command::Diff { a, b } => diff(&a, &b),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tch-blr", &mut text);
            print(&[String::from_utf8_lossy(&text).into_owned()]).map(|()| false)
        }
    };
    match done {
        Ok(different) => ExitCode::from(u8::from(different)),
        Err(e) => {
            // Not eprintln!, which panics where stderr is closed.
            _ = writeln!(io::stderr(), "error: {e}");
            ExitCode::from(2)
        }
    }
}
