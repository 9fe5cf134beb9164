//! The arguments of a metric, checked, as f64 numbers on the CPU: class probabilities, labels, scores, numbers of any
//! shape, levels.

use crate::{Error, Result};
use tch::{Device, Kind, Tensor};

/// Validated class probabilities, row-major.
pub(crate) struct Probabilities {
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

    pub fn classes(&self) -> usize {
        self.classes
    }

    pub fn examples(&self) -> usize {
        self.values.len() / self.classes
    }

    pub fn rows(&self) -> std::slice::ChunksExact<'_, f64> {
        self.values.chunks_exact(self.classes)
    }
}

pub(crate) fn check(probs: &Tensor, labels: &Tensor) -> Result<(Probabilities, Vec<usize>)> {
    let p = Probabilities::read(probs)?;
    let labels = classes("probs", labels, p.examples(), p.classes)?;
    Ok((p, labels))
}

/// Labels `[n]` below `classes`, for examples that come from the argument `of`.
pub(crate) fn classes(of: &str, labels: &Tensor, n: usize, classes: usize) -> Result<Vec<usize>> {
    match labels.f_kind() {
        Ok(Kind::Int64) => {}
        Ok(kind) => return Err(Error::Metric(format!("labels is {kind:?}: expected Int64 class numbers"))),
        Err(_) => return Err(Error::Metric("labels is an undefined tensor".into())),
    }
    if labels.size() != [n as i64] {
        return Err(Error::Metric(format!("labels has shape {:?}: expected [{n}] to match {of}", labels.size())));
    }
    let labels: Vec<i64> = Vec::try_from(&labels.f_to_device(Device::Cpu)?.f_contiguous()?)?;
    let labels = labels.iter().enumerate().map(|(n, &y)| {
        usize::try_from(y)
            .ok()
            .filter(|y| *y < classes)
            .ok_or_else(|| Error::Metric(format!("labels[{n}] = {y}: expected a class in 0..{classes}")))
    });
    labels.collect()
}

pub(crate) fn scores(name: &str, scores: &Tensor) -> Result<Vec<f64>> {
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

/// Numbers of any shape, each finite.
pub(crate) fn finite(name: &str, tensor: &Tensor) -> Result<Tensor> {
    numbers(name, tensor, "a finite number", f64::is_finite)
}

/// Numbers of any shape, each of them `ok`, in memory of their own.
pub(crate) fn numbers(name: &str, tensor: &Tensor, expected: &str, ok: impl Fn(f64) -> bool) -> Result<Tensor> {
    floating(name, tensor)?;
    let size = tensor.size();
    if tensor.numel() == 0 {
        return Err(Error::Metric(format!("{name} has shape {size:?}: expected at least one number")));
    }
    let all = values(tensor)?;
    if let Some(i) = all.iter().position(|x| !ok(*x)) {
        let mut rest = i as i64;
        let mut place: Vec<i64> = size.iter().rev().map(|n| (rest % n, rest /= n).0).collect();
        place.reverse();
        return Err(Error::Metric(format!("{name}{place:?} = {}: expected {expected}", all[i])));
    }
    Ok(Tensor::from_slice(&all).f_reshape(size)?)
}

/// Errors unless the tensors have one shape.
pub(crate) fn same_shape(name: &str, tensor: &Tensor, of: &str, expected: &[i64]) -> Result<()> {
    let size = tensor.size();
    if size == expected {
        return Ok(());
    }
    // Broadcasting [N] against [N, 1] would compare every prediction with every label.
    Err(Error::Metric(format!("{name} has shape {size:?}: expected {expected:?}, that of {of}")))
}

/// A probability that neither nothing nor everything has.
pub(crate) fn open_unit(name: &str, x: f64) -> Result<f64> {
    if x > 0.0 && x < 1.0 {
        return Ok(x);
    }
    Err(Error::Metric(format!("{name} = {x}: expected a number in (0, 1)")))
}

/// ⌈x⌉, at least 1. Products like 0.07 · 100 that come out a little above a whole number count as that number.
pub(crate) fn rank(x: f64) -> usize {
    ((x - 1e-9).ceil() as usize).max(1)
}

/// Mean of all elements.
pub(crate) fn mean(t: &Tensor) -> Result<f64> {
    Ok(t.f_mean(Kind::Double)?.f_double_value(&[])?)
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
pub(crate) fn top(row: &[f64]) -> (usize, f64) {
    row.iter().enumerate().fold((0, row[0]), |best, (c, &p)| if p > best.1 { (c, p) } else { best })
}
