//! Small models in safetensors files: what the tests of files and of the command share.
#![allow(dead_code)] // Each test file is a crate of its own and takes the part it needs.

use safetensors::tensor::{TensorView, serialize_to_file};
use safetensors::{Dtype, SafeTensors};
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

/// A tensor as it is in a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

pub type Model = BTreeMap<String, Stored>;

impl Stored {
    pub fn f32(x: &[f32]) -> Self {
        let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        Stored { dtype: Dtype::F32, shape: vec![x.len()], bytes }
    }

    pub fn f64(x: &[f64]) -> Self {
        let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        Stored { dtype: Dtype::F64, shape: vec![x.len()], bytes }
    }

    pub fn f16(x: &[f32]) -> Self {
        let bytes = x.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
        Stored { dtype: Dtype::F16, shape: vec![x.len()], bytes }
    }

    pub fn i64(x: &[i64]) -> Self {
        let bytes = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        Stored { dtype: Dtype::I64, shape: vec![x.len()], bytes }
    }

    pub fn scalar(x: f32) -> Self {
        Self::f32(&[x]).shaped(&[])
    }

    pub fn shaped(self, shape: &[usize]) -> Self {
        Stored { shape: shape.to_vec(), ..self }
    }

    /// Its numbers, of an f32 tensor.
    pub fn numbers(&self) -> Vec<f32> {
        assert_eq!(self.dtype, Dtype::F32);
        self.bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }
}

pub fn model<const N: usize>(tensors: [(&str, Stored); N]) -> Model {
    tensors.into_iter().map(|(name, t)| (name.to_owned(), t)).collect()
}

/// Writes a model with one entry of metadata.
pub fn save_with(path: &Path, tensors: &Model, (key, text): (&str, &str)) {
    let views = tensors.iter().map(|(name, t)| (name, TensorView::new(t.dtype, t.shape.clone(), &t.bytes).unwrap()));
    serialize_to_file(views, Some(HashMap::from([(key.to_owned(), text.to_owned())])), path).unwrap();
}

pub fn save(path: &Path, tensors: &Model) {
    save_with(path, tensors, ("format", "pt"));
}

/// Writes a posterior as tch-blr does: a weight's precision beside it, and a description.
pub fn save_posterior(path: &Path, mean: &Model, precision: &Model) {
    let precisions = precision.iter().map(|(name, s)| (format!("{name}.precision"), s.clone()));
    let tensors = mean.clone().into_iter().chain(precisions).collect();
    save_with(path, &tensors, ("tch_blr", r#"{"form":"diagonal Gaussian posterior","version":1,"content":{}}"#));
}

pub fn load(path: &Path) -> Model {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let stored = |t: &TensorView| Stored { dtype: t.dtype(), shape: t.shape().to_vec(), bytes: t.data().to_vec() };
    file.iter().map(|(name, t)| (name.to_owned(), stored(&t))).collect()
}

/// So many numbers between -1 and 1 without a pattern, the same for a seed in every run.
pub fn random(seed: u64, n: usize) -> Vec<f32> {
    // xorshift64*
    let mut state = 0x9E37_79B9_7F4A_7C15 ^ (seed + 1).wrapping_mul(0x2545_F491_4F6C_DD1D);
    let mut next = || {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
