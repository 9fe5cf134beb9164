//! Comparisons that say what was compared.

use std::fmt::Debug;
use tch::{Device, Kind, Tensor};
use tch_blr::Error;

/// The memory of a tensor.
pub fn bits(t: &Tensor) -> Vec<u8> {
    let t = t.detach().to_device(Device::Cpu).contiguous();
    let mut bytes = vec![0; t.numel() * t.kind().elt_size_in_bytes()];
    t.copy_data_u8(&mut bytes, t.numel());
    bytes
}

pub fn values(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.detach().to_kind(Kind::Double).contiguous().flatten(0, -1)).unwrap()
}

/// max |t|
pub fn largest(t: &Tensor) -> f64 {
    t.abs().max().double_value(&[])
}

/// ‖a - b‖ ≤ rtol ‖b‖
#[track_caller]
pub fn assert_close(a: &Tensor, b: &Tensor, rtol: f64) {
    let wide = |t: &Tensor| t.detach().to_device(Device::Cpu).to_kind(Kind::Double);
    assert_eq!(a.size(), b.size());
    let norm = |t: Tensor| t.square().sum(Kind::Double).double_value(&[]).sqrt();
    let (error, scale) = (norm(wide(a) - wide(b)), norm(wide(b)));
    assert!(error <= rtol * scale, "relative error {:e} > {rtol:e}\n{a}\n{b}", error / scale);
}

#[track_caller]
pub fn close(ours: f64, expected: f64, tolerance: f64) {
    assert!((ours - expected).abs() <= tolerance, "{ours} and not {expected} (tolerance {tolerance:e})");
}

#[track_caller]
pub fn all_close(ours: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(ours.len(), expected.len());
    assert!(
        ours.iter().zip(expected).all(|(a, b)| (a - b).abs() <= tolerance),
        "{ours:?} and not {expected:?} (tolerance {tolerance:e})"
    );
}

/// The error's text is one line that contains all of `parts`.
#[track_caller]
pub fn refused<T: Debug>(result: Result<T, Error>, parts: &[&str]) -> Error {
    let error = result.unwrap_err();
    let text = error.to_string();
    println!("{text}");
    for part in parts {
        assert!(text.contains(part), "`{part}` is not in: {text}");
    }
    assert!(!text.contains('\n'), "more than one line: {text}");
    error
}

/// [`refused`] before libtorch saw anything of it: by a variant of our error.
#[track_caller]
pub fn says<T: Debug>(result: Result<T, Error>, what: &str) {
    let error = refused(result, &[what]);
    assert!(!matches!(error, Error::Torch(_) | Error::Closure(_) | Error::File { .. }), "{error:?}");
}
