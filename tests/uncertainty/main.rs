//! Calibration, selection, conformal sets and forecasts of numbers: values by hand or from an independent program,
//! guarantees by simulation, laws, and what is refused.

mod classes;
mod forecasts;
mod laws;
mod posteriors;
mod sets;

use tch::Tensor;

fn t(x: &[f64]) -> Tensor {
    Tensor::from_slice(x)
}

fn labels(y: &[i64]) -> Tensor {
    Tensor::from_slice(y)
}

fn rows(x: &[f64], columns: i64) -> Tensor {
    t(x).reshape([-1, columns])
}

/// Probabilities of four classes with these confidences in class 0, and labels that are it where right.
fn predicted(confidence: &[f64], right: &[bool]) -> (Tensor, Tensor) {
    let p: Vec<f64> = confidence.iter().flat_map(|c| [*c, (1.0 - c) / 3.0, (1.0 - c) / 3.0, (1.0 - c) / 3.0]).collect();
    (rows(&p, 4), labels(&right.iter().map(|r| i64::from(!r)).collect::<Vec<_>>()))
}
