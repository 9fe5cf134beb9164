//! A safetensors file that is written in pieces.

use super::convert::encode;
use super::{PIECE, StoredTensor, WeightFile};
use crate::number::Number;
use crate::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::fmt::Display;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// A tensor that a new file will hold.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

/// A new file: the header first, then elements in any order, each where the header says.
pub(crate) struct FileWriter<'a> {
    /// What errors call the file, which for now is a draft under another name.
    path: &'a Path,
    file: File,
    /// Kind of each tensor, and where it begins in the file.
    tensors: HashMap<String, (Dtype, u64)>,
    /// Called with every number of bytes written.
    progress: &'a mut dyn FnMut(u64),
    buffer: Vec<u8>,
}

impl<'a> FileWriter<'a> {
    /// Makes the file `draft`, which will be known as `path`, and writes its header.
    pub fn create(
        path: &'a Path,
        draft: &Path,
        metadata: Option<HashMap<String, String>>,
        mut entries: Vec<Entry>,
        progress: &'a mut dyn FnMut(u64),
    ) -> Result<Self> {
        let error = |e: &dyn Display| Error::file(path, format!("cannot be written: {e}"));
        // Wide elements first: every tensor then begins at a multiple of its elements' size, for readers that map the
        // file.
        entries.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
        let (mut infos, mut places) = (Vec::new(), Vec::new());
        let mut at = 0;
        for Entry { name, dtype, shape, bytes } in entries {
            let begin = at;
            at += bytes as usize;
            places.push((name.clone(), (dtype, begin as u64)));
            infos.push((name, TensorInfo { dtype, shape, data_offsets: (begin, at) }));
        }
        let header = Metadata::new(metadata, infos).map_err(|e| error(&e))?;
        let mut header = serde_json::to_vec(&header).map_err(|e| error(&e))?;
        // The format lets headers end with spaces; a multiple of 8 bytes keeps the tensors aligned within the file,
        // too.
        header.resize(header.len().next_multiple_of(8), b' ');
        let data = 8 + header.len() as u64;
        let mut file = File::create(draft).map_err(|e| error(&e))?;
        let prefix = (header.len() as u64).to_le_bytes();
        file.write_all(&prefix).and_then(|()| file.write_all(&header)).map_err(|e| error(&e))?;
        let tensors = places.into_iter().map(|(name, (dtype, at))| (name, (dtype, data + at))).collect();
        Ok(FileWriter { path, file, tensors, progress, buffer: Vec::new() })
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let written = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.write_all(bytes));
        written.map_err(|e| Error::file(self.path, format!("cannot be written: {e}")))?;
        (self.progress)(bytes.len() as u64);
        Ok(())
    }

    /// Writes the elements `at`.. of a floating tensor.
    pub fn elements<T: Number>(&mut self, name: &str, at: usize, x: &[T]) -> Result<()> {
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

    /// Writes a whole tensor as it is in another file.
    pub fn copy(&mut self, name: &str, from: &WeightFile, t: &StoredTensor) -> Result<()> {
        let (_, begin) = self.tensors[name];
        let mut piece = Vec::new();
        for at in (0..t.bytes()).step_by(PIECE) {
            piece.resize(PIECE.min((t.bytes() - at) as usize), 0);
            from.read_bytes(t, at, &mut piece)?;
            self.write(begin + at, &piece)?;
        }
        Ok(())
    }

    /// Returns once all of it is on the disk.
    pub fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::file(self.path, format!("cannot be written: {e}")))
    }
}
