//! Is every element finite, and how large are they together? Whatever has to look at all elements of a tensor before
//! a step is accepted belongs here; what changes them does not.

use super::{cuda, squares, tensors};
use crate::Result;
use tch::{Kind, Tensor};

/// Σ x² over all tensors, accumulated in f64; not finite if any element is not. The order of the sum, and so every bit,
/// depends on the shapes alone.
///
/// # Errors
/// A device has no memory left, or has failed.
pub(crate) fn sum_of_squares<'a>(tensors: impl IntoIterator<Item = &'a Tensor>) -> Result<f64> {
    let tensors: Vec<&Tensor> = tensors.into_iter().collect();
    let sum = sum(&tensors)?;
    #[cfg(feature = "cuda-emulation")]
    cuda::emulation::check_sum(&tensors, sum);
    Ok(sum)
}

fn sum(tensors: &[&Tensor]) -> Result<f64> {
    let (mut single, mut double, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for t in tensors.iter().copied() {
        match super::lanes(t) {
            Some(Kind::Float) => single.push(t),
            Some(_) => double.push(t),
            None => others.push(t),
        }
    }
    let (there, others) = cuda::sum_of_squares(others);
    Ok(tensors::sum_of_squares(&others)?
        + there
        + squares::sum_of_squares::<f32>(&single)
        + squares::sum_of_squares::<f64>(&double))
}

/// The first NaN or infinity of a tensor, if there is one.
pub(crate) fn first_non_finite(t: &Tensor) -> Option<f64> {
    // One flag is read from the device; the elements themselves only on the way to an error.
    let bad = t.isfinite().logical_not();
    bad.any().int64_value(&[]).ne(&0).then(|| t.masked_select(&bad).double_value(&[0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_not_finite_on_every_path() {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            let x = Tensor::from_slice(&[3.0, -4.0]).to_kind(kind);
            assert_eq!((sum_of_squares([&x]).unwrap(), first_non_finite(&x)), (25.0, None));
            for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let y = Tensor::from_slice(&[1.0, bad, 2.0]).to_kind(kind);
                assert!(!sum_of_squares([&y]).unwrap().is_finite());
                let found = first_non_finite(&y).unwrap();
                assert!(found == bad || (found.is_nan() && bad.is_nan()));
            }
        }
        assert_eq!(sum_of_squares([&Tensor::zeros([0], (Kind::Double, tch::Device::Cpu))]).unwrap(), 0.0);
    }
}
