//! IDX files, the format of MNIST.

use super::{CLASSES, SIDE, to_images};
use crate::Outcome;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use tch::{Kind, Tensor};

/// Images `[N, 784]` and labels `[N]` of a part, `train` or `t10k`.
pub(super) fn read_pair(folder: &Path, part: &str) -> Outcome<(Tensor, Tensor)> {
    let Idx { path, size, bytes: pixels } = read_idx(folder, &format!("{part}-images-idx3-ubyte"), 3)?;
    if size[0] == 0 || size[1..] != [SIDE, SIDE] {
        return Err(format!("{}: size {size:?}: expected images of 28×28 pixels", path.display()).into());
    }
    let n = size[0];
    let Idx { path, size, bytes: labels } = read_idx(folder, &format!("{part}-labels-idx1-ubyte"), 1)?;
    if size != [n] {
        return Err(format!("{}: {} labels for {n} images", path.display(), size[0]).into());
    }
    if let Some(i) = labels.iter().position(|&l| i64::from(l) >= CLASSES) {
        return Err(format!("{}: label {} of example {i} is not a digit", path.display(), labels[i]).into());
    }
    Ok((to_images(&pixels), Tensor::from_slice(&labels).to_kind(Kind::Int64)))
}

struct Idx {
    path: PathBuf,
    size: Vec<usize>,
    bytes: Vec<u8>,
}

/// An IDX file of bytes: 0, 0, 8 (the type: u8), number of dimensions; each size as a big-endian u32; the data.
fn read_idx(folder: &Path, name: &str, dims: usize) -> Outcome<Idx> {
    let plain = folder.join(name);
    let path = if plain.is_file() { plain } else { folder.join(format!("{name}.gz")) };
    let fail = |problem: String| -> Box<dyn std::error::Error> { format!("{}: {problem}", path.display()).into() };
    if !path.is_file() {
        return Err(fail("no such file, and none without .gz".into()));
    }
    let mut bytes = fs::read(&path).map_err(|e| fail(e.to_string()))?;
    if path.extension().is_some_and(|e| e == "gz") {
        let mut unpacked = Vec::new();
        let mut gz = flate2::read::GzDecoder::new(bytes.as_slice());
        gz.read_to_end(&mut unpacked).map_err(|e| fail(format!("truncated or not gzip ({e})")))?;
        bytes = unpacked;
    }
    let header = 4 + 4 * dims;
    let magic = [0, 0, 8, dims as u8];
    if bytes.get(..4).is_some_and(|m| m != magic) {
        return Err(fail(format!("starts with {:?}, not with IDX's {magic:?}", &bytes[..4])));
    }
    if bytes.len() < header {
        return Err(fail(format!("truncated: {} bytes, the header alone has {header}", bytes.len())));
    }
    let size: Vec<usize> = bytes[4..header]
        .chunks_exact(4)
        .map(|b| u32::from_be_bytes(b.try_into().expect("four bytes")) as usize)
        .collect();
    let expected = size.iter().try_fold(1_usize, |n, &s| n.checked_mul(s)).and_then(|n| n.checked_add(header));
    if expected != Some(bytes.len()) {
        let what = if expected.is_none_or(|n| n > bytes.len()) { "truncated" } else { "too long" };
        let expected = expected.map_or("more".into(), |n| n.to_string());
        return Err(fail(format!("{what}: {} bytes, size {size:?} needs {expected}", bytes.len())));
    }
    bytes.drain(..header);
    Ok(Idx { path, size, bytes })
}
