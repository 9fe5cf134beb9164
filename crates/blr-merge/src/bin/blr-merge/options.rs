//! Options that several subcommands share.

use crate::Outcome;
use crate::request::{Kind, Part, Request, size};
use crate::settings::Settings;
use clap::Args;
use std::path::PathBuf;

/// What is merged and how: by options, or by a recipe file.
#[derive(Args)]
pub struct What {
    /// Read everything from a recipe file (TOML) instead of options; of these, --out, --dtype and --max-shard-size
    /// prevail over the file.
    #[arg(long, conflicts_with_all = ["Settings", "Models", "Which", "Bases"])]
    recipe: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
    #[command(flatten)]
    bases: Bases,
    #[command(flatten)]
    models: Models,
    #[command(flatten)]
    which: Which,
}

#[derive(Args)]
struct Bases {
    /// The model that the others were fine-tuned from.
    #[arg(long)]
    base: Option<PathBuf>,
    /// The file with the base's curvature.
    #[arg(long, requires = "base")]
    base_fisher: Option<PathBuf>,
}

#[derive(Args)]
struct Models {
    /// The models.
    #[arg(value_name = "MODELS", required_unless_present = "recipe")]
    paths: Vec<PathBuf>,
    /// One weight per model, in the order of the models; repeat or separate by commas [default: 1 each].
    #[arg(long, short, value_delimiter = ',', allow_negative_numbers = true)]
    weight: Vec<f64>,
    /// One name per model, in the order of the models, for errors and for what dare keeps; repeat or separate by commas
    /// [default: the end of the path that tells it from the others].
    #[arg(long, value_delimiter = ',')]
    name: Vec<String>,
    /// The file with a model's curvature (diagonal Fisher or Hessian of the summed loss, under the weights' names);
    /// repeat for each model, in the order of the models. Without this option the models must be posteriors.
    #[arg(long)]
    fisher: Vec<PathBuf>,
    /// The low-rank adapter (PEFT's file or folder) that is added to a model; repeat for each model, in the order of
    /// the models.
    #[arg(long)]
    adapter: Vec<PathBuf>,
    /// The adapter's α; repeat for each model or separate by commas [default: lora_alpha of the adapter_config.json
    /// beside it].
    #[arg(long, value_delimiter = ',')]
    alpha: Vec<f64>,
}

/// Which tensors.
#[derive(Args)]
struct Which {
    /// Merge only tensors whose whole name fits this pattern (* for any characters, ? for one, [0-3] for one of these)
    /// and copy the others from the base or the first model; repeat or separate by commas. They may differ between the
    /// models.
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
}

/// The form of what is written.
#[derive(Args)]
pub struct Form {
    /// Write a folder of shards, each with at most this many bytes of tensors (5GB, 1.5gb, 500MiB, 1000000), and their
    /// index.
    #[arg(long, value_parser = size)]
    max_shard_size: Option<u64>,
    /// Kind of the result's floating-point numbers [default: for each tensor, the narrowest that holds those of all
    /// models].
    #[arg(long)]
    dtype: Option<Kind>,
}

/// Parses `NAME=OTHER`.
fn pair(text: &str) -> Result<(String, String), String> {
    let (name, other) = text.split_once('=').ok_or("expected NAME=OTHER")?;
    Ok((name.to_owned(), other.to_owned()))
}

impl What {
    pub fn request(self, form: Form) -> Outcome<Request> {
        let mut request = if let Some(path) = self.recipe {
            Request::read(&path)?
        } else {
            let Bases { base, base_fisher } = self.bases;
            let base = base.map(|path| Part { path, fisher: base_fisher, ..Part::default() });
            let request = Request { method: self.settings, base, models: self.models.parts()?, ..Request::default() };
            self.which.of(request)
        };
        form.of(&mut request);
        Ok(request)
    }
}

impl Which {
    fn of(self, request: Request) -> Request {
        let Which { include, exclude, factors, tied } = self;
        Request { include, exclude, factors, tied: tied.into_iter().collect(), ..request }
    }
}

impl Form {
    pub fn of(self, request: &mut Request) {
        request.max_shard_size = self.max_shard_size.or(request.max_shard_size);
        request.dtype = self.dtype.or(request.dtype);
    }
}

impl Models {
    fn parts(self) -> Outcome<Vec<Part>> {
        let count = self.paths.len();
        for (option, given) in [
            ("--weight", self.weight.len()),
            ("--fisher", self.fisher.len()),
            ("--name", self.name.len()),
            ("--adapter", self.adapter.len()),
            ("--alpha", self.alpha.len()),
        ] {
            if given != 0 && given != count {
                return Err(format!("{option} is given {given} times for {count} models; give one for each").into());
            }
        }
        let part = |(k, path)| Part {
            path,
            name: self.name.get(k).cloned(),
            weight: self.weight.get(k).copied(),
            fisher: self.fisher.get(k).cloned(),
            adapter: self.adapter.get(k).cloned(),
            alpha: self.alpha.get(k).copied(),
        };
        Ok(self.paths.into_iter().enumerate().map(part).collect())
    }
}
