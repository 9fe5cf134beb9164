//! What differs between the tensors of two safetensors files.

use crate::Result;
use crate::number::CHUNK;
use crate::storage::{PIECE, StoredTensor, WeightFile};
use std::collections::BTreeMap;
use std::path::Path;

/// How one tensor differs between two files.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Difference {
    /// Only the first file has it.
    OnlyInFirst,
    /// Only the second file has it.
    OnlyInSecond,
    /// The shapes or kinds of numbers differ.
    Form(StoredTensor, StoredTensor),
    /// Some bytes differ; for kinds other than F32, F64, BF16 and F16, which are not compared as numbers.
    Bytes,
    /// Some numbers differ.
    Numbers {
        /// The largest |b - a|; NaN where exactly one of the two numbers is NaN.
        largest: f64,
        /// ‖b - a‖ / ‖a‖
        relative: f64,
    },
}

/// What differs between the tensors of two files, by name. Tensors that are equal are left out, and two NaNs count as
/// equal. Metadata are not compared.
///
/// # Errors
/// Files that cannot be read or are broken.
pub fn diff_files(a: impl AsRef<Path>, b: impl AsRef<Path>) -> Result<BTreeMap<String, Difference>> {
    let (a, b) = (WeightFile::open(a)?, WeightFile::open(b)?);
    let mut found = BTreeMap::new();
    for (name, x) in a.tensors() {
        let Some(y) = b.tensors().get(name) else {
            found.insert(name.clone(), Difference::OnlyInFirst);
            continue;
        };
        if (x.dtype, &x.shape) != (y.dtype, &y.shape) {
            found.insert(name.clone(), Difference::Form(x.clone(), y.clone()));
        } else if let Some(difference) = if x.is_floating() { numbers(&a, x, &b, y)? } else { bytes(&a, x, &b, y)? } {
            found.insert(name.clone(), difference);
        }
    }
    let new = b.tensors().keys().filter(|name| !a.tensors().contains_key(*name));
    found.extend(new.map(|name| (name.clone(), Difference::OnlyInSecond)));
    Ok(found)
}

fn bytes(a: &WeightFile, x: &StoredTensor, b: &WeightFile, y: &StoredTensor) -> Result<Option<Difference>> {
    let (mut p, mut q) = (Vec::new(), Vec::new());
    for at in (0..x.bytes()).step_by(PIECE) {
        let length = PIECE.min((x.bytes() - at) as usize);
        p.resize(length, 0);
        q.resize(length, 0);
        a.read_bytes(x, at, &mut p)?;
        b.read_bytes(y, at, &mut q)?;
        if p != q {
            return Ok(Some(Difference::Bytes));
        }
    }
    Ok(None)
}

fn numbers(a: &WeightFile, x: &StoredTensor, b: &WeightFile, y: &StoredTensor) -> Result<Option<Difference>> {
    let (mut p, mut q, mut buffer) = (Vec::new(), Vec::new(), Vec::new());
    let (mut largest, mut norm, mut distance) = (0f64, 0.0, 0.0);
    let len = x.elements();
    // In f64, where every one of the kinds is exact.
    for at in (0..len).step_by(CHUNK) {
        let length = CHUNK.min(len - at);
        p.resize(length, 0.0f64);
        q.resize(length, 0.0f64);
        a.read(x, at, &mut p, &mut buffer)?;
        b.read(y, at, &mut q, &mut buffer)?;
        for (p, q) in p.iter().zip(&q) {
            let d = if p == q || p.is_nan() && q.is_nan() { 0.0 } else { (q - p).abs() };
            // `max` would drop a NaN.
            largest = if d.is_nan() || largest.is_nan() { f64::NAN } else { largest.max(d) };
            norm += p * p;
            distance += d * d;
        }
    }
    // Infinite if only `a` is zero; and `largest` says whether there is a difference at all.
    let relative = (distance / norm).sqrt();
    Ok((largest != 0.0).then_some(Difference::Numbers { largest, relative }))
}
