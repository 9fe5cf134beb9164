//! Low-rank adapters: what their files hold, checked against the weights that they change, and their products.

use crate::number::{BLOCK, Number};
use crate::storage::{StoredTensor, WeightFile, read_small};
use crate::{Error, Result};
use rayon::prelude::*;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The names that PEFT uses within an adapter's folder.
const WEIGHTS: &str = "adapter_model.safetensors";
const CONFIG: &str = "adapter_config.json";
/// Bytes of the longest configuration.
const LONGEST_CONFIG: u64 = 1_000_000;
/// What PEFT puts before the names of the model's modules.
const PREFIX: &str = "base_model.model.";

/// An adapter that is open.
pub(super) struct Adapter {
    file: WeightFile,
    /// By the name of the weight that it changes.
    pairs: BTreeMap<String, Pair>,
}

/// The factors A and B of one weight's change.
struct Pair {
    a: StoredTensor,
    b: StoredTensor,
    scale: f64,
    /// Whether the weight is added (BA)ᵀ instead of BA: embeddings, and layers that keep their weights so.
    transposed: bool,
}

/// Ways to start that take a part of each weight into its factors and leave the rest: their products are changes of
/// other weights than the model's. The names go on with numbers of steps.
const CHANGES_THE_BASE: [&str; 5] = ["pissa", "olora", "loftq", "corda", "lora_ga"];

/// PEFT's configuration, as far as it says what is computed.
#[derive(Default, Deserialize)]
struct Config {
    peft_type: Option<String>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    use_rslora: Option<bool>,
    use_dora: Option<bool>,
    fan_in_fan_out: Option<bool>,
    /// A way to start, or whether to start at all.
    init_lora_weights: Option<serde_json::Value>,
    rank_pattern: Option<HashMap<String, usize>>,
    alpha_pattern: Option<HashMap<String, f64>>,
}

impl Config {
    /// That beside an adapter's file, if there is one.
    fn beside(path: &Path) -> Result<Option<Self>> {
        let path = path.with_file_name(CONFIG);
        if !path.exists() {
            return Ok(None);
        }
        let config: Config = serde_json::from_slice(&read_small(&path, LONGEST_CONFIG)?)
            .map_err(|e| Error::file(&path, format!("is not an adapter's configuration: {e}")))?;
        let refused = match &config {
            Config { peft_type: Some(kind), .. } if kind != "LORA" => Some(format!("peft_type = {kind}")),
            Config { use_dora: Some(true), .. } => Some("use_dora".to_owned()),
            Config { alpha_pattern: Some(map), .. } if !map.is_empty() => Some("alpha_pattern".to_owned()),
            _ => None,
        };
        let start = config.init_lora_weights.as_ref().and_then(serde_json::Value::as_str).unwrap_or_default();
        if CHANGES_THE_BASE.iter().any(|name| start.to_lowercase().starts_with(name)) {
            return Err(Error::file(
                &path,
                format!(
                    "has init_lora_weights = {start}, which changes the base model: its products do not belong to the \
                     weights that it started from; have PEFT convert it (`path_initial_model_for_weight_conversion`)"
                ),
            ));
        }
        match refused {
            Some(what) => Err(Error::file(
                &path,
                format!("has {what}, which is not supported: merge the adapter with the program that it is from"),
            )),
            None => Ok(Some(config)),
        }
    }
}

/// Which of the two factors a tensor is, by its name, and of which module.
fn factor(name: &str) -> Option<(&str, bool, bool)> {
    for (part, is_b, embedding) in [
        (".lora_A", false, false),
        (".lora_B", true, false),
        (".lora_embedding_A", false, true),
        (".lora_embedding_B", true, true),
    ] {
        if let Some((module, rest)) = name.rsplit_once(part)
            && matches!(rest, ".weight" | ".default.weight" | "" | ".default")
        {
            return Some((module.strip_prefix(PREFIX).unwrap_or(module), is_b, embedding));
        }
    }
    None
}

/// Or what is wrong with a file.
type Told<T> = std::result::Result<T, String>;

/// A tensor of an adapter's file, with its name.
type Named<'a> = (&'a str, &'a StoredTensor);

/// The factors A and B of each module, by its name and whether it is an embedding.
type Modules<'a> = BTreeMap<(&'a str, bool), [Option<Named<'a>>; 2]>;

/// Sorts an adapter's tensors by what they are factors of.
fn modules(file: &WeightFile) -> Told<Modules<'_>> {
    let mut modules = Modules::new();
    for (name, tensor) in file.tensors() {
        let Some((module, is_b, embedding)) = factor(name) else {
            return Err(format!(
                "has `{name}`, which is no factor of a low-rank product (….lora_A.weight, ….lora_B.weight): biases, whole \
                 modules and adapters of other kinds are not merged"
            ));
        };
        let place = &mut modules.entry((module, embedding)).or_default()[usize::from(is_b)];
        if let Some((other, _)) = place.replace((name, tensor)) {
            return Err(format!("has `{other}` and `{name}`, which are one factor"));
        }
    }
    Ok(modules)
}

impl Pair {
    /// Checks that the two are a change of this weight.
    fn new(
        [(name_a, a), (name_b, b)]: [Named; 2],
        (target, weight): Named,
        embedding: bool,
        (alpha, config): (f64, &Config),
    ) -> Told<Self> {
        let (rank, rank_b) = (a.shape.first().copied().unwrap_or(0), b.shape.get(1).copied().unwrap_or(0));
        if rank != rank_b || rank == 0 {
            return Err(format!(
                "has `{name_a}` {:?} and `{name_b}` {:?}, whose ranks differ: expected [r, in] and [out, r]",
                a.shape, b.shape
            ));
        }
        let patterned = config.rank_pattern.as_ref().is_some_and(|ranks| !ranks.is_empty());
        if let Some(r) = config.r.filter(|r| *r != rank && !patterned) {
            return Err(format!("has `{name_a}` of rank {rank}, and {CONFIG} says r = {r}"));
        }
        let transposed = embedding || config.fan_in_fan_out == Some(true);
        let (out, inner) = (&b.shape[..1], &a.shape[1..]);
        let product = if transposed { [inner, out] } else { [out, inner] }.concat();
        let matrix = !transposed || inner.len() == 1;
        if product != weight.shape || !matrix || b.shape[2..].iter().any(|n| *n != 1) {
            return Err(format!(
                "changes `{target}` by a product of `{name_b}` {:?} and `{name_a}` {:?}, which does not fit its shape {:?}",
                b.shape, a.shape, weight.shape
            ));
        }
        for (name, t) in [(name_a, a), (name_b, b), (target, weight)] {
            if !t.is_floating() {
                return Err(format!("needs `{name}` as floating-point numbers, and it is {:?}", t.dtype));
            }
        }
        let divisor = if config.use_rslora == Some(true) { (rank as f64).sqrt() } else { rank as f64 };
        Ok(Pair { a: a.clone(), b: b.clone(), scale: alpha / divisor, transposed })
    }
}

impl Adapter {
    /// Opens PEFT's file or folder, for weights that are those of `base`.
    pub fn open(path: &Path, alpha: Option<f64>, base: &WeightFile) -> Result<Self> {
        let path = if path.is_dir() { &path.join(WEIGHTS) } else { path };
        let file = WeightFile::open(path)?;
        let error = |problem: String| Error::file(path, problem);
        let config = Config::beside(path)?;
        let there = config.is_some();
        let config = config.unwrap_or_default();
        let alpha = alpha.or(config.lora_alpha).ok_or_else(|| {
            let why = if there { "does not say it" } else { "is not there" };
            error(format!("needs α, and {CONFIG} beside it {why}: give it (alpha)"))
        })?;
        Error::unless(alpha.is_finite(), "alpha", alpha, "a finite number")?;
        let mut pairs = BTreeMap::new();
        for ((module, embedding), halves) in modules(&file).map_err(error)? {
            let pair = match halves {
                [Some(a), Some(b)] => [a, b],
                [None, Some((name, _))] => {
                    return Err(error(format!("has `{name}`, and no factor A to multiply it with")));
                }
                [one, _] => {
                    let name = one.map_or("", |(name, _)| name);
                    return Err(error(format!("has `{name}`, and no factor B to multiply it with")));
                }
            };
            let target = format!("{module}.weight");
            let Some(weight) = base.tensors().get(&target) else {
                return Err(error(format!("changes `{target}`, which {} does not have", base.path().display())));
            };
            let pair = Pair::new(pair, (&target, weight), embedding, (alpha, &config)).map_err(error)?;
            pairs.insert(target, pair);
        }
        if pairs.is_empty() {
            return Err(error("holds no factors".to_owned()));
        }
        Ok(Adapter { file, pairs })
    }

    pub fn file(&self) -> &WeightFile {
        &self.file
    }

    pub fn changes(&self, name: &str) -> bool {
        self.pairs.contains_key(name)
    }

    /// The change of a weight, if it changes it.
    pub fn change(&self, name: &str) -> Result<Option<Change>> {
        let Some(pair) = self.pairs.get(name) else { return Ok(None) };
        let read = |t: &StoredTensor| -> Result<Vec<f64>> {
            let mut x = vec![0.0; t.elements()];
            self.file.read(t, 0, &mut x, &mut Vec::new())?;
            Ok(x)
        };
        let rank = pair.a.shape[0];
        let (a, b) = (read(&pair.a)?, read(&pair.b)?);
        let (left, right) = if pair.transposed { (turned(&a, rank), turned(&b, b.len() / rank)) } else { (b, a) };
        let columns = right.len() / rank;
        Ok(Some(Change { left, right, rank, columns, scale: pair.scale }))
    }
}

/// The transpose of a matrix of so many rows.
fn turned(x: &[f64], rows: usize) -> Vec<f64> {
    let columns = x.len() / rows.max(1);
    (0..x.len()).map(|i| x[i % rows * columns + i / rows]).collect()
}

/// What an adapter adds to a weight: scale · left · right, with both factors in memory and their product never.
pub(super) struct Change {
    left: Vec<f64>,
    right: Vec<f64>,
    rank: usize,
    columns: usize,
    scale: f64,
}

impl Change {
    /// Adds the elements `at`.. of it.
    pub fn add<T: Number>(&self, at: usize, x: &mut [T]) {
        x.par_chunks_mut(BLOCK).enumerate().for_each(|(block, mut x)| {
            let mut at = at + block * BLOCK;
            let mut sums = vec![0.0; self.columns.min(x.len())];
            // Row by row, of which the first and the last may be cut.
            while !x.is_empty() {
                let (row, column) = (at / self.columns, at % self.columns);
                let here;
                let length = x.len().min(self.columns - column);
                (here, x) = x.split_at_mut(length);
                let sums = &mut sums[..length];
                sums.fill(0.0);
                for (k, left) in self.left[row * self.rank..][..self.rank].iter().enumerate() {
                    let right = &self.right[k * self.columns + column..][..length];
                    sums.iter_mut().zip(right).for_each(|(sum, right)| *sum += left * right);
                }
                here.iter_mut().zip(&*sums).for_each(|(x, sum)| *x = T::from_wide(x.wide() + self.scale * sum));
                at += length;
            }
        });
    }
}
