//! A safetensors file that is written in pieces.

use super::engine::Number;
use super::weight_file::{PIECE, StoredTensor, WeightFile, encode};
use crate::{Error, Result};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// A new file, written where its header says.
pub(super) struct Draft<'a> {
    path: &'a Path,
    file: File,
    /// Kind and place of each tensor.
    tensors: HashMap<String, (Dtype, u64)>,
    /// Called with every number of bytes written.
    progress: &'a mut dyn FnMut(u64),
    buffer: Vec<u8>,
}

/// Name, kind, shape and bytes of a tensor to be written.
pub(super) type Entry = (String, Dtype, Vec<usize>, u64);

impl<'a> Draft<'a> {
    pub fn new(
        path: &'a Path,
        draft: &Path,
        metadata: Option<HashMap<String, String>>,
        mut tensors: Vec<Entry>,
        progress: &'a mut dyn FnMut(u64),
    ) -> Result<Self> {
        let error = |e: &dyn std::fmt::Display| Error::file(path, format!("cannot be written: {e}"));
        // Wide elements first: every tensor then begins at a multiple of its elements' size.
        tensors.sort_by(|a, b| b.1.bitsize().cmp(&a.1.bitsize()).then_with(|| a.0.cmp(&b.0)));
        let mut at = 0;
        let infos = tensors.into_iter().map(|(name, dtype, shape, bytes)| {
            let begin = at;
            at += bytes as usize;
            (name, TensorInfo { dtype, shape, data_offsets: (begin, at) })
        });
        let infos: Vec<_> = infos.collect();
        let offsets: Vec<(String, Dtype, u64)> =
            infos.iter().map(|(name, info)| (name.clone(), info.dtype, info.data_offsets.0 as u64)).collect();
        let header = Metadata::new(metadata, infos).map_err(|e| error(&e))?;
        let mut header = serde_json::to_vec(&header).map_err(|e| error(&e))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let data = 8 + header.len() as u64;
        let mut file = File::create(draft).map_err(|e| error(&e))?;
        let prefix = (header.len() as u64).to_le_bytes();
        file.write_all(&prefix).and_then(|()| file.write_all(&header)).map_err(|e| error(&e))?;
        let tensors = offsets.into_iter().map(|(name, dtype, at)| (name, (dtype, data + at))).collect();
        Ok(Draft { path, file, tensors, progress, buffer: Vec::new() })
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let written = self.file.seek(SeekFrom::Start(at)).and_then(|_| self.file.write_all(bytes));
        written.map_err(|e| Error::file(self.path, format!("cannot be written: {e}")))?;
        (self.progress)(bytes.len() as u64);
        Ok(())
    }

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

    /// All of it is on the disk.
    pub fn finish(self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::file(self.path, format!("cannot be written: {e}")))
    }
}
