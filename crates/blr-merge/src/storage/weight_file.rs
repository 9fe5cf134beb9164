//! A model's weights in one safetensors file or several, read piece by piece.

use super::convert::{decode, width};
use super::header::{self, StoredTensor};
use super::{AVERAGE, DESCRIPTION, POSTERIOR, PRECISION, regular};
use crate::number::Number;
use crate::{Error, Result};
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

/// The names that model hubs use within a model's folder: the only file, or the index of several.
const SINGLE: &str = "model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Bytes of a tensor that are copied or compared at a time.
pub(crate) const PIECE: usize = 1 << 22;

/// A model's weights on the disk: one safetensors file, or several (shards) with an index. Opening reads only the
/// headers.
///
/// A broken or hostile file gives an error. Headers are believed only where they agree with the length of the file, and
/// whatever they say, opening takes no more memory than 4 times the bytes of the file and a megabyte. Names longer than
/// 4096 bytes, shapes of more than 64 dimensions and more than 4096 entries of metadata are refused, and so is what is
/// no regular file.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    shards: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, StoredTensor>,
    metadata: HashMap<String, String>,
    contents: Contents,
}

/// What a file is for, by its description.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Contents {
    /// Whatever another program wrote, or an average of weights.
    Weights,
    /// A diagonal Gaussian: means and their precisions.
    Posterior,
    /// Something else of tch-blr's, with what its description calls it.
    Other(String),
}

/// The description, as far as this crate knows it.
#[derive(Deserialize)]
struct Description {
    form: String,
}

impl Contents {
    fn of(metadata: &HashMap<String, String>) -> Self {
        let Some(text) = metadata.get(DESCRIPTION) else { return Contents::Weights };
        match serde_json::from_str::<Description>(text).map(|d| d.form) {
            Ok(form) if form == POSTERIOR => Contents::Posterior,
            Ok(form) if form == AVERAGE => Contents::Weights,
            Ok(form) => Contents::Other(form),
            Err(_) => Contents::Other("a description that cannot be read".to_owned()),
        }
    }
}

#[derive(Deserialize)]
struct Index {
    /// File by tensor.
    weight_map: BTreeMap<String, String>,
}

/// Bytes of the longest index. One of 100,000 tensors has ten million.
const LONGEST_INDEX: u64 = 100_000_000;

impl WeightFile {
    /// Opens a safetensors file, an index (`….index.json`) with the shards beside it, or a folder with a
    /// `model.safetensors` or `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read or is broken, an index and its shards do not agree, or a folder has a
    /// `model.safetensors` and an index of other files: nobody can know which of the two is the model.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let [index, single] = [INDEX, SINGLE].map(|name| path.join(name));
        let file = match (path.is_dir(), index.exists(), single.exists()) {
            (false, ..) => path,
            (true, true, _) => &index,
            (true, false, true) => &single,
            _ => return Err(Error::file(path, format!("is a folder with neither {SINGLE} nor {INDEX}"))),
        };
        let mut weights = WeightFile {
            path: path.to_owned(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: HashMap::new(),
            contents: Contents::Weights,
        };
        if file.extension().is_some_and(|e| e == "json") {
            weights.open_shards(file)?;
            if file == index && single.exists() && weights.shards.iter().any(|(path, _)| *path != single) {
                let problem =
                    format!("has a {SINGLE}, and a {INDEX} of other files: give the path of the one you mean");
                return Err(Error::file(path, problem));
            }
        } else {
            weights.open_shard(file)?;
        }
        weights.contents = Contents::of(&weights.metadata);
        Ok(weights)
    }

    fn open_shards(&mut self, path: &Path) -> Result<()> {
        let error = |problem: String| Error::file(path, problem);
        let text = regular::read(path, LONGEST_INDEX)?;
        let index: Index =
            serde_json::from_slice(&text).map_err(|e| error(format!("is not an index of weights: {e}")))?;
        let mut files: Vec<&String> = index.weight_map.values().collect();
        files.sort_unstable();
        files.dedup();
        for name in files {
            // An index may come from anyone, and must not make us read files elsewhere.
            let mut parts = Path::new(name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(error(format!("names the shard `{name}`: expected a file beside it")));
            }
            self.open_shard(&path.with_file_name(name))?;
        }
        for (name, file) in &index.weight_map {
            let found = self.tensors.get(name).map(|t| self.shards[t.shard].0.file_name());
            if found != Some(Some(file.as_ref())) {
                return Err(error(format!("says that tensor `{name}` is in {file}, where it is not")));
            }
        }
        if self.tensors.is_empty() {
            return Err(error("lists no tensor".to_owned()));
        }
        if let Some(name) = self.tensors.keys().find(|name| !index.weight_map.contains_key(*name)) {
            return Err(error(format!("does not list tensor `{name}`, which a shard has")));
        }
        Ok(())
    }

    fn open_shard(&mut self, path: &Path) -> Result<()> {
        let file = regular::open(path)?;
        let header = header::read(path, &file, self.shards.len())?;
        self.shards.push((path.to_owned(), file));
        if let Some(name) = header.tensors.keys().find(|name| self.tensors.contains_key(*name)) {
            return Err(Error::file(path, format!("has a tensor `{name}`, which another shard has too")));
        }
        if self.tensors.is_empty() {
            // Not extended with: a second map beside the first one would double the memory that a header can take.
            self.tensors = header.tensors;
        } else {
            self.tensors.extend(header.tensors);
        }
        self.metadata.extend(header.metadata);
        Ok(())
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files that it consists of.
    pub fn shards(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|(path, _)| path.as_path())
    }

    /// Its tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// The texts that the writer left in the header; for shards, those of all headers, the last one counting where keys
    /// agree.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// Whether tch-blr has written it as a diagonal Gaussian posterior. Only then is `<name>.precision` the precision
    /// of `<name>`; in any other file it is a tensor like the others.
    pub fn is_posterior(&self) -> bool {
        self.contents == Contents::Posterior
    }

    /// What tch-blr has written it as, if its tensors are neither a model's weights nor a diagonal Gaussian posterior:
    /// `ivon optimizer`, for example.
    pub fn other_form(&self) -> Option<&str> {
        if let Contents::Other(form) = &self.contents { Some(form) } else { None }
    }

    /// The precision of a weight in a posterior's file: `<name>.precision`, if both are of floating kinds and the same
    /// shape.
    pub fn precision_of(&self, name: &str) -> Option<&StoredTensor> {
        let weight = self.tensors.get(name).filter(|_| self.is_posterior())?;
        self.tensors
            .get(&format!("{name}{PRECISION}"))
            .filter(|s| s.shape == weight.shape && s.is_floating() && weight.is_floating())
    }

    /// Whether a tensor is the precision of another.
    pub fn is_precision(&self, name: &str) -> bool {
        name.strip_suffix(PRECISION).is_some_and(|weight| self.precision_of(weight).is_some())
    }

    /// Fills `bytes` with those of one of its tensors from byte `from` on.
    ///
    /// # Errors
    /// [`Error::File`] if they cannot be read.
    ///
    /// # Panics
    /// If the tensor is of another file that has more shards.
    pub fn read_bytes(&self, t: &StoredTensor, from: u64, bytes: &mut [u8]) -> Result<()> {
        let (path, mut file) =
            self.shards.get(t.shard).map(|(path, file)| (path, file)).expect("a tensor of this file");
        let read = file.seek(SeekFrom::Start(t.at + from)).and_then(|_| file.read_exact(bytes));
        read.map_err(|e| Error::file(path, format!("cannot be read: {e}")))
    }

    /// Fills `x` with the elements `at`.. of a floating tensor, by way of `buffer`.
    pub(crate) fn read<T: Number>(&self, t: &StoredTensor, at: usize, x: &mut [T], buffer: &mut Vec<u8>) -> Result<()> {
        let width = width(t.dtype).expect("only floating tensors are computed with");
        buffer.resize(x.len() * width, 0);
        self.read_bytes(t, (at * width) as u64, buffer)?;
        decode(t.dtype, buffer, x);
        Ok(())
    }
}
