//! `blr-merge inspect` and `blr-merge diff`: what is in a file, and what differs between two.

use crate::Outcome;
use crate::output::print;
use blr_merge::{Difference, WeightFile, diff_files};
use std::path::Path;

pub fn inspect(path: &Path) -> Outcome<()> {
    let file = WeightFile::open(path)?;
    let mut lines = Vec::new();
    let width = file.tensors().keys().map(|name| name.chars().count()).max().unwrap_or(0);
    let (mut elements, mut bytes) = (0, 0);
    for (name, t) in file.tensors() {
        lines.push(format!("{name:width$}  {:<5} {:?}", format!("{:?}", t.dtype), t.shape));
        elements += t.elements();
        bytes += t.bytes();
    }
    let tensors = file.tensors().len();
    lines.push(format!("{tensors} tensors, {elements} elements, {bytes} bytes, {} file(s)", file.shards().count()));
    let precisions = file.tensors().keys().filter(|name| file.is_precision(name)).count();
    if file.is_posterior() {
        lines.push(format!("a posterior: {precisions} of the tensors are precisions of others"));
    }
    let mut metadata: Vec<_> = file.metadata().iter().collect();
    metadata.sort();
    for (key, value) in metadata {
        lines.push(format!("{key}: {value}"));
    }
    print(&lines)
}

/// Whether there are any differences.
pub fn diff(a: &Path, b: &Path) -> Outcome<bool> {
    let differences = diff_files(a, b)?;
    let mut lines = Vec::new();
    for (name, difference) in &differences {
        let line = match difference {
            Difference::OnlyInFirst => format!("only in {}", a.display()),
            Difference::OnlyInSecond => format!("only in {}", b.display()),
            Difference::Form(x, y) => format!("{:?} {:?} and {:?} {:?}", x.dtype, x.shape, y.dtype, y.shape),
            Difference::Numbers { largest, relative } => {
                format!("largest difference {largest:.3e}, norm of the difference {relative:.3e} of the first's")
            }
            _ => "differs".to_owned(),
        };
        lines.push(format!("{name}: {line}"));
    }
    print(&lines)?;
    Ok(!differences.is_empty())
}
