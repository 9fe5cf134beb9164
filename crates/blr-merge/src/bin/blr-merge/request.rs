//! What a merge is asked to do: read from a recipe file, or from options.

use crate::Outcome;
use crate::settings::{Name, Settings, unused};
use blr_merge::{Destination, FileModel, Recipe};
use clap::ValueEnum;
use safetensors::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A recipe file is this in TOML; options make the same.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", default, deny_unknown_fields)]
pub struct Request {
    pub method: Settings,
    pub base: Option<Part>,
    pub models: Vec<Part>,
    /// Later ones prevail.
    pub tensors: Vec<Rule>,
    pub include: Vec<String>,
    pub exclude: Vec<String>,
    pub factors: bool,
    pub tied: BTreeMap<String, String>,
    pub out: Option<PathBuf>,
    #[serde(deserialize_with = "size_text")]
    pub max_shard_size: Option<u64>,
    pub dtype: Option<Kind>,
}

/// A model, or the base, which has neither name nor weight.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Part {
    pub path: PathBuf,
    pub name: Option<String>,
    pub weight: Option<f64>,
    pub fisher: Option<PathBuf>,
    pub adapter: Option<PathBuf>,
    pub alpha: Option<f64>,
}

/// What is different for the tensors of some names.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Rule {
    #[serde(rename = "match")]
    pattern: String,
    weights: Option<Vec<f64>>,
    method: Option<Settings>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    F64,
    F32,
    F16,
    Bf16,
}

/// What the library takes.
#[derive(Debug)]
pub struct Order {
    pub recipe: Recipe,
    pub base: Option<FileModel>,
    pub models: Vec<FileModel>,
}

impl Request {
    /// Reads a recipe file. Its paths are relative to the folder that it is in.
    pub fn read(path: &Path) -> Outcome<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: cannot be read: {e}", path.display()))?;
        let mut request: Request = toml::from_str(&text).map_err(|e| {
            let lines = |span: std::ops::Range<usize>| text.bytes().take(span.start).filter(|c| *c == b'\n').count();
            let line = e.span().map(|span| lines(span) + 1);
            let line = line.map(|line| format!(", line {line}")).unwrap_or_default();
            format!("{}{line}: {}", path.display(), e.message().replace('\n', ", "))
        })?;
        let folder = path.parent().unwrap_or(Path::new(""));
        let parts = request.base.iter_mut().chain(&mut request.models);
        let paths =
            parts.flat_map(|part| std::iter::once(&mut part.path).chain(&mut part.fisher).chain(&mut part.adapter));
        paths.chain(&mut request.out).for_each(|path| *path = folder.join(&*path));
        Ok(request)
    }

    /// Checks that everything asked for has a part in what is done.
    pub fn order(&self) -> Outcome<Order> {
        let fishers = self.models.iter().any(|part| part.fisher.is_some());
        let ruled = |rule: &Rule| rule.method.as_ref().map(|own| (rule.pattern.clone(), own.over(&self.method)));
        let ruled: Vec<(String, Settings)> = self.tensors.iter().filter_map(ruled).collect();
        let names = || ruled.iter().map(|(_, own)| own).chain([&self.method]).filter_map(|settings| settings.name);
        let weighted = self.models.iter().any(|part| part.weight.is_some());
        let weighted = weighted || self.tensors.iter().any(|rule| rule.weights.is_some());
        let base_fisher = self.base.as_ref().is_some_and(|part| part.fisher.is_some());
        for (what, given, used) in [
            ("base", self.base.is_some(), names().any(Name::uses_base)),
            ("weight", weighted, names().any(Name::uses_weights)),
            ("fisher", fishers, names().any(Name::uses_curvature)),
            ("base-fisher", base_fisher, names().any(|name| name.uses_curvature() && name.uses_base())),
        ] {
            // Without a method there is an error that says so.
            if given && !used && names().next().is_some() {
                return Err(unused(what).into());
            }
        }
        if let Some(what) = self.base.as_ref().and_then(Part::not_for_a_base) {
            return Err(format!("the base has a {what}, which only models have").into());
        }
        let mut recipe = Recipe::new(self.method.method(fishers)?).factors(self.factors);
        recipe = self.include.iter().fold(recipe, Recipe::include);
        recipe = self.exclude.iter().fold(recipe, Recipe::exclude);
        recipe = self.tied.iter().fold(recipe, |recipe, (name, of)| recipe.tied(name, of));
        for (pattern, own) in ruled {
            let method = own.method(fishers).map_err(|e| format!("for `{pattern}`: {e}"))?;
            recipe = recipe.method_for(pattern, method);
        }
        for rule in &self.tensors {
            if let Some(weights) = &rule.weights {
                recipe = recipe.weights_for(&rule.pattern, weights.clone());
            } else if rule.method.is_none() {
                return Err(format!("the rule for `{}` has neither weights nor a method", rule.pattern).into());
            }
        }
        let models = self.models.iter().map(Part::model).collect();
        Ok(Order { recipe, base: self.base.as_ref().map(Part::model), models })
    }

    /// Where the result goes, the option prevailing over the file.
    pub fn place(&self, option: Option<PathBuf>) -> Outcome<PathBuf> {
        Ok(option.or_else(|| self.out.clone()).ok_or("there is no place for the result: give it (out)")?)
    }

    /// The result at a path, of the kind and in the shards that are asked for.
    pub fn destination(&self, path: &Path) -> Destination {
        let out = match self.max_shard_size {
            Some(most) => Destination::shards(path, most),
            None => Destination::from(path),
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

impl Part {
    fn not_for_a_base(&self) -> Option<&'static str> {
        self.name.as_ref().map(|_| "name").or(self.weight.map(|_| "weight"))
    }

    fn model(&self) -> FileModel {
        let mut model = FileModel::new(&self.path).weight(self.weight.unwrap_or(1.0));
        if let Some(name) = &self.name {
            model = model.name(name);
        }
        if let Some(fisher) = &self.fisher {
            model = model.curvature(fisher);
        }
        if let Some(adapter) = &self.adapter {
            model = model.adapter(adapter);
        }
        if let Some(alpha) = self.alpha {
            model = model.alpha(alpha);
        }
        model
    }
}

fn size_text<'de, D: Deserializer<'de>>(text: D) -> Result<Option<u64>, D::Error> {
    size(&String::deserialize(text)?).map(Some).map_err(D::Error::custom)
}

/// Parses a number of bytes: a decimal number with or without a unit, in which small letters are as good as large ones.
pub fn size(text: &str) -> Result<u64, String> {
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
