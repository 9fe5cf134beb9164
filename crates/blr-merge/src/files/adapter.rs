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

/// PEFT's configuration, as far as it says what is computed.
#[derive(Default, Deserialize)]
struct Config {
    peft_type: Option<String>,
    r: Option<usize>,
    lora_alpha: Option<f64>,
    use_rslora: Option<bool>,
    use_dora: Option<bool>,
    fan_in_fan_out: Option<bool>,
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
        let some = |map: Option<usize>| map.is_some_and(|n| n > 0);
        let refused = match &config {
            Config { peft_type: Some(kind), .. } if kind != "LORA" => Some(format!("peft_type = {kind}")),
            Config { use_dora: Some(true), .. } => Some("use_dora".to_owned()),
            c if some(c.alpha_pattern.as_ref().map(HashMap::len)) => Some("alpha_pattern".to_owned()),
            _ => None,
        };
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

impl Adapter {
    /// Opens PEFT's file or folder, for weights that are those of `base`.
    pub fn open(path: &Path, alpha: Option<f64>, base: &WeightFile) -> Result<Self> {
        let path = if path.is_dir() { &path.join(WEIGHTS) } else { path };
        let file = WeightFile::open(path)?;
        let error = |problem: String| Err(Error::file(path, problem));
        let config = Config::beside(path)?;
        let given = config.is_some();
        let config = config.unwrap_or_default();
        let Some(alpha) = alpha.or(config.lora_alpha) else {
            let why = if given { "does not say it" } else { "is not there" };
            return error(format!("needs α, and {CONFIG} beside it {why}: give it (alpha)"));
        };
        Error::unless(alpha.is_finite(), "alpha", alpha, "a finite number")?;
        let mut modules: BTreeMap<(&str, bool), [Option<(&str, &StoredTensor)>; 2]> = BTreeMap::new();
        for (name, tensor) in file.tensors() {
            let Some((module, is_b, embedding)) = factor(name) else {
                return error(format!(
                    "has `{name}`, which is no factor of a low-rank product (….lora_A.weight, ….lora_B.weight): biases, \
                     whole modules and adapters of other kinds are not merged"
                ));
            };
            let place = &mut modules.entry((module, embedding)).or_default()[usize::from(is_b)];
            if let Some((other, _)) = place.replace((name, tensor)) {
                return error(format!("has `{other}` and `{name}`, which are one factor"));
            }
        }
        let mut pairs = BTreeMap::new();
        for ((module, embedding), pair) in modules {
            let [Some((name, a)), Some((name_b, b))] = pair else {
                let (there, missing) = if let Some((name, _)) = pair[0] { (name, "B") } else { (pair[1].map_or("", |b| b.0), "A") };
                return error(format!("has `{there}`, and no factor {missing} to multiply it with"));
            };
            let target = format!("{module}.weight");
            let Some(weight) = base.tensors().get(&target) else {
                return error(format!("changes `{target}`, which {} does not have", base.path().display()));
            };
            let (rank, rank_b) = (a.shape.first().copied().unwrap_or(0), b.shape.get(1).copied().unwrap_or(0));
            if rank != rank_b || rank == 0 {
                return error(format!("has `{name}` {:?} and `{name_b}` {:?}, whose ranks differ: expected [r, in] and [out, r]", a.shape, b.shape));
            }
            let patterned = config.rank_pattern.as_ref().is_some_and(|ranks| !ranks.is_empty());
            if let Some(r) = config.r.filter(|r| *r != rank && !patterned) {
                return error(format!("has `{name}` of rank {rank}, and {CONFIG} says r = {r}"));
            }
            let transposed = embedding || config.fan_in_fan_out == Some(true);
            let product = if transposed {
                [&a.shape[1..], &b.shape[..1]].concat()
            } else {
                [&b.shape[..1], &a.shape[1..]].concat()
            };
            if product != weight.shape || b.shape[2..].iter().any(|n| *n != 1) || transposed && weight.shape.len() != 2 {
                return error(format!(
                    "changes `{target}` by a product of `{name_b}` {:?} and `{name}` {:?}, which does not fit its shape {:?}",
                    b.shape, a.shape, weight.shape
                ));
            }
            for (name, t) in [(name, a), (name_b, b), (target.as_str(), weight)] {
                if !t.is_floating() {
                    return error(format!("needs `{name}` as floating-point numbers, and it is {:?}", t.dtype));
                }
            }
            let divisor = if config.use_rslora == Some(true) { (rank as f64).sqrt() } else { rank as f64 };
            pairs.insert(target, Pair { a: a.clone(), b: b.clone(), scale: alpha / divisor, transposed });
        }
        if pairs.is_empty() {
            return error("holds no factors".to_owned());
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
