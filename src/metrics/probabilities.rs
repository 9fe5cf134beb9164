//! The arguments of a metric, checked, as f64 numbers on the CPU: class probabilities, labels and scores.

use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Validated class probabilities, row-major.
pub(super) struct Probabilities {
    values: Vec<f64>,
    classes: usize,
}

impl Probabilities {
    pub fn read(probs: &Tensor) -> Result<Self> {
        let kind = floating("probs", probs)?;
        let &[n, classes] = probs.size().as_slice() else {
            return Err(Error::Metric(format!("probs has shape {:?}: expected [N, C]", probs.size())));
        };
        if n == 0 || classes == 0 {
            return Err(Error::Metric(format!(
                "probs has shape [{n}, {classes}]: expected at least one example and class"
            )));
        }
        // All at once: reading element by element would wait for the device each time.
        let this = Probabilities { values: values(probs)?, classes: classes as usize };
        // Rounding of a softmax with thousands of classes: f32 has 7 digits, half 3 and bfloat16 2.
        let tolerance = if matches!(kind, Kind::Half | Kind::BFloat16) { 1e-2 } else { 1e-3 };
        for (n, row) in this.rows().enumerate() {
            // Written so that NaN fails.
            if let Some((c, p)) = row.iter().enumerate().find(|(_, p)| !(-tolerance..=1.0 + tolerance).contains(*p)) {
                return Err(Error::Metric(format!(
                    "probs[{n}, {c}] = {p}: expected a probability (apply softmax to logits)"
                )));
            }
            let sum: f64 = row.iter().sum();
            if (sum - 1.0).abs() > tolerance {
                return Err(Error::Metric(format!(
                    "probs[{n}] sums to {sum}: expected 1 ± {tolerance} (apply softmax to logits)"
                )));
            }
        }
        Ok(this)
    }

    pub fn rows(&self) -> std::slice::ChunksExact<'_, f64> {
        self.values.chunks_exact(self.classes)
    }
}

pub(super) fn check(probs: &Tensor, labels: &Tensor) -> Result<(Probabilities, Vec<usize>)> {
    let p = Probabilities::read(probs)?;
    match labels.f_kind() {
        Ok(Kind::Int64) => {}
        Ok(kind) => return Err(Error::Metric(format!("labels is {kind:?}: expected Int64 class numbers"))),
        Err(_) => return Err(Error::Metric("labels is an undefined tensor".into())),
    }
    let n = p.values.len() / p.classes;
    if labels.size() != [n as i64] {
        return Err(Error::Metric(format!("labels has shape {:?}: expected [{n}] to match probs", labels.size())));
    }
    let labels: Vec<i64> = Vec::try_from(&labels.f_to_device(Device::Cpu)?.f_contiguous()?)?;
    let labels = labels.iter().enumerate().map(|(n, &y)| {
        usize::try_from(y)
            .ok()
            .filter(|y| *y < p.classes)
            .ok_or_else(|| Error::Metric(format!("labels[{n}] = {y}: expected a class in 0..{}", p.classes)))
    });
    let labels = labels.collect::<Result<Vec<usize>>>()?;
    Ok((p, labels))
}

pub(super) fn scores(name: &str, scores: &Tensor) -> Result<Vec<f64>> {
    floating(name, scores)?;
    if scores.dim() != 1 || scores.numel() == 0 {
        let size = scores.size();
        return Err(Error::Metric(format!("{name} has shape {size:?}: expected [N] with at least one score")));
    }
    let scores = values(scores)?;
    match scores.iter().position(|s| s.is_nan()) {
        Some(n) => Err(Error::Metric(format!("{name}[{n}] is NaN"))),
        None => Ok(scores),
    }
}

fn floating(name: &str, tensor: &Tensor) -> Result<Kind> {
    match tensor.f_kind() {
        Ok(kind @ (Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)) => Ok(kind),
        Ok(kind) => Err(Error::Metric(format!("{name} is {kind:?}: expected Half, BFloat16, Float or Double"))),
        Err(_) => Err(Error::Metric(format!("{name} is an undefined tensor"))),
    }
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    // To the CPU first: not every device knows f64.
    let flat = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?.f_reshape([-1])?;
    Ok(Vec::try_from(&flat)?)
}

/// The most probable class, the first among ties, and its probability.
pub(super) fn top(row: &[f64]) -> (usize, f64) {
    row.iter().enumerate().fold((0, row[0]), |best, (c, &p)| if p > best.1 { (c, p) } else { best })
}
