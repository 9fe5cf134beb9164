//! A safetensors file that is written in pieces.

use super::convert::{encode, vanishing};
use super::header::{self, METADATA};
use super::{PIECE, StoredTensor, WeightFile};
use crate::number::{CHUNK, Number};
use crate::{Error, Result};
use safetensors::Dtype;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// A tensor that a new file will hold.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Kind of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl Entry {
    /// Its size in the file, in bytes.
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// Writes a file: the header first, then elements in any order, each where the header says.
pub struct FileWriter<'a> {
    /// What errors call the file, which for now is a draft under another name.
    path: &'a Path,
    file: &'a File,
    /// Kind of each tensor, and where it begins in the file.
    tensors: HashMap<String, (Dtype, u64)>,
    /// Called with every number of bytes written.
    progress: &'a mut dyn FnMut(u64),
    buffer: Vec<u8>,
}

impl<'a> FileWriter<'a> {
    /// Writes the header of a file that is empty, and that errors call `path`. `progress` is called with the number of
    /// bytes of each piece of a tensor that is written.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a tensor's name that is given twice, that the format keeps for itself, or that is
    /// longer than [`WeightFile`] reads; [`Error::File`] if the header is, or if it cannot be written.
    pub fn new(
        path: &'a Path,
        file: &'a File,
        metadata: &HashMap<String, String>,
        mut entries: Vec<Entry>,
        progress: &'a mut dyn FnMut(u64),
    ) -> Result<Self> {
        // Wide elements first: every tensor then begins at a multiple of its elements' size, for readers that map the
        // file.
        entries.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
        let mut header = BTreeMap::new();
        let mut tensors = HashMap::new();
        let mut at = 0;
        for entry in entries {
            let end = at + entry.bytes();
            let Entry { name, dtype, shape } = entry;
            header::check_name(&name).map_err(|problem| Error::parameter(&name, problem))?;
            header.insert(name.clone(), json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]}));
            if tensors.insert(name.clone(), (dtype, at)).is_some() {
                return Err(Error::parameter(&name, "two tensors would have this name in the file"));
            }
            at = end;
        }
        if !metadata.is_empty() {
            header.insert(METADATA.to_owned(), json!(metadata));
        }
        let error = |e: &dyn Display| Error::file(path, format!("cannot be written: {e}"));
        // In order, so that equal contents are equal files.
        let mut header = serde_json::to_vec(&header).map_err(|e| error(&e))?;
        // The format lets headers end with spaces; a multiple of 8 bytes keeps the tensors aligned within the file,
        // too.
        header.resize(header.len().next_multiple_of(8), b' ');
        if header.len() as u64 > header::LONGEST {
            return Err(error(&format_args!(
                "its header would have {} bytes; {} may be",
                header.len(),
                header::LONGEST
            )));
        }
        let data = 8 + header.len() as u64;
        let mut output = file;
        let prefix = (header.len() as u64).to_le_bytes();
        output.write_all(&prefix).and_then(|()| output.write_all(&header)).map_err(|e| error(&e))?;
        for (_, at) in tensors.values_mut() {
            *at += data;
        }
        Ok(FileWriter { path, file, tensors, progress, buffer: Vec::new() })
    }

    /// The kind that a tensor is written in.
    pub(crate) fn dtype(&self, name: &str) -> Dtype {
        self.tensors[name].0
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut file = self.file;
        let written = file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(bytes));
        written.map_err(|e| Error::file(self.path, format!("cannot be written: {e}")))?;
        (self.progress)(bytes.len() as u64);
        Ok(())
    }

    /// Writes a whole tensor.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    ///
    /// # Panics
    /// If the file has no tensor of this name.
    pub fn whole(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let (_, begin) = self.tensors[name];
        self.write(begin, bytes)
    }

    /// Writes the elements `at`.. of a floating tensor.
    pub(crate) fn elements<T: Number>(&mut self, name: &str, at: usize, x: &[T]) -> Result<()> {
        let (dtype, begin) = self.tensors[name];
        let mut bytes = std::mem::take(&mut self.buffer);
        if let Some(i) = encode(dtype, x, &mut bytes) {
            let problem = format!("its element {} becomes {:e}, which is too large for {dtype:?}", at + i, x[i].wide());
            return Err(Error::parameter(name, problem));
        }
        self.write(begin + (at * dtype.bitsize() / 8) as u64, &bytes)?;
        self.buffer = bytes;
        Ok(())
    }

    /// Writes the precisions `at`.. of a tensor `of`, none of which may become 0.
    pub(crate) fn precisions<T: Number>(&mut self, of: &str, name: &str, at: usize, s: &[T]) -> Result<()> {
        let dtype = self.dtype(name);
        let lost = vanishing(dtype);
        if let Some(i) = s.iter().position(|s| s.wide() <= lost) {
            let problem = format!(
                "its precision {:e} of element {} would be 0 in {dtype:?}, and no weight has that: choose a wider kind \
                 (dtype)",
                s[i].wide(),
                at + i
            );
            return Err(Error::parameter(of, problem));
        }
        self.elements(name, at, s)
    }

    /// Writes a whole tensor of another file: as it is or, if the kinds differ, number by number.
    pub(crate) fn copy(&mut self, name: &str, from: &WeightFile, t: &StoredTensor) -> Result<()> {
        self.copied(name, from, t, |file, at, x| file.elements(name, at, x))
    }

    /// The same of the precisions of a tensor `of`.
    pub(crate) fn copy_precisions(&mut self, of: &str, name: &str, from: &WeightFile, t: &StoredTensor) -> Result<()> {
        self.copied(name, from, t, |file, at, x| file.precisions(of, name, at, x))
    }

    /// `put`: what writes numbers that have to be converted.
    fn copied(
        &mut self,
        name: &str,
        from: &WeightFile,
        t: &StoredTensor,
        put: impl Fn(&mut Self, usize, &[f64]) -> Result<()>,
    ) -> Result<()> {
        let (dtype, begin) = self.tensors[name];
        if dtype != t.dtype {
            let (mut x, mut buffer) = (Vec::new(), Vec::new());
            for at in (0..t.elements()).step_by(CHUNK) {
                x.resize(CHUNK.min(t.elements() - at), 0f64);
                from.read(t, at, &mut x, &mut buffer)?;
                put(self, at, &x)?;
            }
            return Ok(());
        }
        let mut piece = Vec::new();
        for at in (0..t.bytes()).step_by(PIECE) {
            piece.resize(PIECE.min((t.bytes() - at) as usize), 0);
            from.read_bytes(t, at, &mut piece)?;
            self.write(begin + at, &piece)?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for FileWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileWriter").field("path", &self.path).finish_non_exhaustive()
    }
}
