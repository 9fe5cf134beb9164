//! Weights in safetensors files, read piece by piece.

use super::engine::Number;
use super::header;
use crate::{Error, Result};
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;
use serde::Deserialize;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};

const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Bytes of a piece of a tensor that is copied or compared as it is.
pub(super) const PIECE: usize = 1 << 22;
/// What the name of a weight's precision ends with in a posterior's file.
pub(super) const PRECISION: &str = ".precision";
/// Elements that a thread converts at a time.
const BLOCK: usize = 1 << 14;

/// A model's weights on the disk: one safetensors file, or several (shards) with an index. Opening reads the headers alone.
///
/// A header is believed only where it agrees with the length of the file, and opening takes at most 4 times the bytes of the file and a
/// megabyte, whatever it says: a broken or hostile file gives an error. Names longer than 4096 bytes, shapes of more than 64 dimensions
/// and more than 4096 entries of metadata are refused.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    shards: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, StoredTensor>,
    metadata: HashMap<String, String>,
}

/// A tensor of a [`WeightFile`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Kind of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    pub(super) shard: usize,
    /// From the beginning of the shard, in bytes.
    pub(super) at: u64,
    pub(super) bytes: u64,
}

impl StoredTensor {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its size in the file.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether it is of a kind that merges compute with: F32, F64, BF16, F16.
    pub fn is_floating(&self) -> bool {
        width(self.dtype).is_some()
    }
}

/// Bytes of an element of the kinds that merges compute with.
fn width(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::BF16 | Dtype::F16 => Some(2),
        Dtype::F32 => Some(4),
        Dtype::F64 => Some(8),
        _ => None,
    }
}

#[derive(Deserialize)]
struct Index {
    /// File by tensor.
    weight_map: BTreeMap<String, String>,
}

impl WeightFile {
    /// Opens a safetensors file, an index (`….index.json`) with the shards beside it, or a folder with a `model.safetensors`
    /// or `model.safetensors.index.json`.
    ///
    /// # Errors
    /// [`Error::File`] if a file cannot be read or is broken, or an index and its shards do not agree.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let inside = [INDEX, SINGLE].map(|name| path.join(name));
        let file = if path.is_dir() {
            let found = inside.into_iter().find(|p| p.is_file());
            found.ok_or_else(|| Error::file(path, format!("is a folder with neither {SINGLE} nor {INDEX}")))?
        } else {
            path.to_owned()
        };
        let mut weights = WeightFile {
            path: path.to_owned(),
            shards: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: HashMap::new(),
        };
        if file.extension().is_some_and(|e| e == "json") {
            weights.open_shards(&file)?;
        } else {
            weights.open_shard(&file)?;
        }
        Ok(weights)
    }

    fn open_shards(&mut self, path: &Path) -> Result<()> {
        let error = |problem: String| Error::file(path, problem);
        let text = std::fs::read(path).map_err(|e| error(format!("cannot be read: {e}")))?;
        let index: Index =
            serde_json::from_slice(&text).map_err(|e| error(format!("is not an index of weights: {e}")))?;
        let mut files: Vec<&String> = index.weight_map.values().collect();
        files.sort_unstable();
        files.dedup();
        for name in files {
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
        if let Some(name) = self.tensors.keys().find(|name| !index.weight_map.contains_key(*name)) {
            return Err(error(format!("does not list tensor `{name}`, which a shard has")));
        }
        Ok(())
    }

    fn open_shard(&mut self, path: &Path) -> Result<()> {
        let file = File::open(path).map_err(|e| Error::file(path, format!("cannot be read: {e}")))?;
        let header = header::read(path, &file, self.shards.len())?;
        self.shards.push((path.to_owned(), file));
        if let Some(name) = header.tensors.keys().find(|name| self.tensors.contains_key(*name)) {
            return Err(Error::file(path, format!("has a tensor `{name}`, which another shard has too")));
        }
        if self.tensors.is_empty() {
            self.tensors = header.tensors;
        } else {
            self.tensors.extend(header.tensors);
        }
        self.metadata.extend(header.metadata);
        Ok(())
    }

    /// What was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Files that it consists of.
    pub fn shards(&self) -> impl Iterator<Item = &Path> {
        self.shards.iter().map(|(path, _)| path.as_path())
    }

    /// Its tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, StoredTensor> {
        &self.tensors
    }

    /// The text that writers left in the header; of shards, all of it.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// The precision of a weight, in a posterior's file: `<name>.precision`, of the same shape.
    pub fn precision_of(&self, name: &str) -> Option<&StoredTensor> {
        let weight = self.tensors.get(name)?;
        self.tensors
            .get(&format!("{name}{PRECISION}"))
            .filter(|s| s.shape == weight.shape && s.is_floating() && weight.is_floating())
    }

    /// Whether a tensor is the precision of another.
    pub fn is_precision(&self, name: &str) -> bool {
        name.strip_suffix(PRECISION).is_some_and(|weight| self.precision_of(weight).is_some())
    }

    /// Bytes `from`.. of a tensor.
    pub(super) fn read_bytes(&self, t: &StoredTensor, from: u64, bytes: &mut [u8]) -> Result<()> {
        let (path, mut file) = self.shards.get(t.shard).map(|(path, file)| (path, file)).expect("its own shard");
        debug_assert!(from + bytes.len() as u64 <= t.bytes);
        let read = file.seek(SeekFrom::Start(t.at + from)).and_then(|_| file.read_exact(bytes));
        read.map_err(|e| Error::file(path, format!("cannot be read: {e}")))
    }

    /// Elements `at`.. of a floating tensor; `buffer` is used on the way.
    pub(super) fn read<T: Number>(&self, t: &StoredTensor, at: usize, x: &mut [T], buffer: &mut Vec<u8>) -> Result<()> {
        let width = width(t.dtype).expect("only floating tensors are computed with");
        buffer.resize(x.len() * width, 0);
        self.read_bytes(t, (at * width) as u64, buffer)?;
        decode(t.dtype, buffer, x);
        Ok(())
    }
}

fn decode<T: Number>(dtype: Dtype, bytes: &[u8], x: &mut [T]) {
    fn each<T: Number, const W: usize>(bytes: &[u8], x: &mut [T], f: impl Fn([u8; W]) -> T + Sync) {
        x.par_chunks_mut(BLOCK).zip(bytes.par_chunks(BLOCK * W)).for_each(|(x, bytes)| {
            let (numbers, _) = bytes.as_chunks::<W>();
            x.iter_mut().zip(numbers).for_each(|(x, bytes)| *x = f(*bytes));
        });
    }
    match dtype {
        Dtype::BF16 => each(bytes, x, |b| T::from_single(bf16::from_le_bytes(b).to_f32())),
        Dtype::F16 => each(bytes, x, |b| T::from_single(f16::from_le_bytes(b).to_f32())),
        Dtype::F32 => each(bytes, x, |b| T::from_single(f32::from_le_bytes(b))),
        Dtype::F64 => each(bytes, x, |b| T::of(f64::from_le_bytes(b))),
        _ => unreachable!("width() admits only these"),
    }
}

/// Appends numbers as bytes; gives the place of the first that is too large for the kind.
pub(super) fn encode<T: Number>(dtype: Dtype, x: &[T], bytes: &mut Vec<u8>) -> Option<usize> {
    fn each<T: Number, const W: usize>(
        x: &[T],
        bytes: &mut Vec<u8>,
        f: impl Fn(T) -> ([u8; W], bool) + Sync,
    ) -> Option<usize> {
        bytes.resize(x.len() * W, 0);
        let blocks = x.par_chunks(BLOCK).zip(bytes.par_chunks_mut(BLOCK * W)).enumerate();
        let lost = blocks.filter_map(|(block, (x, bytes))| {
            let (places, _) = bytes.as_chunks_mut::<W>();
            let mut lost = None;
            for (i, (x, place)) in x.iter().zip(places).enumerate() {
                let finite;
                (*place, finite) = f(*x);
                if !finite {
                    lost = lost.or(Some(block * BLOCK + i));
                }
            }
            lost
        });
        lost.min()
    }
    match dtype {
        Dtype::BF16 => each(x, bytes, |x| {
            let y = bf16::from_f32(x.single());
            (y.to_le_bytes(), y.is_finite())
        }),
        Dtype::F16 => each(x, bytes, |x| {
            let y = f16::from_f32(x.single());
            (y.to_le_bytes(), y.is_finite())
        }),
        Dtype::F32 => each(x, bytes, |x| (x.single().to_le_bytes(), x.single().is_finite())),
        Dtype::F64 => each(x, bytes, |x| (x.wide().to_le_bytes(), x.is_finite())),
        _ => unreachable!("width() admits only these"),
    }
}
