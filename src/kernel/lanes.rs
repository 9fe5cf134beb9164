//! The elementwise computation over raw contiguous CPU memory, one position after the other.
//!
//! The only unsafe code of the crate: tensors hand out their memory as pointers.
#![allow(unsafe_code)]

use super::{Elementwise, Field, Real};
use tch::Tensor;

#[derive(Clone, Copy)]
enum Lane<F> {
    Number(F),
    Memory(*const F),
}

/// `F` is the element type of every tensor, and every tensor is contiguous on the CPU: see [`super::run`].
pub(super) fn run<F: Real>(f: &impl Elementwise, inputs: &[Field], outputs: &mut [Tensor]) {
    let n = outputs[0].numel();
    assert!(outputs.iter().all(|t| t.numel() == n), "outputs of different sizes");
    let lanes: Vec<Lane<F>> = inputs
        .iter()
        .map(|x| match x {
            Field::Number(x) => Lane::Number(F::real(*x)),
            Field::Tensor(t) => {
                assert_eq!(t.numel(), n, "an input of another size than the outputs");
                assert_eq!(t.kind(), outputs[0].kind(), "an input of another kind than the outputs");
                Lane::Memory(t.data_ptr() as *const F)
            }
        })
        .collect();
    let out: Vec<*mut F> = outputs.iter().map(|t| t.data_ptr().cast()).collect();
    for j in 0..n {
        f.eval(
            |i| match lanes[i] {
                Lane::Number(x) => x,
                // SAFETY: `run` in mod.rs checked kind, device and contiguity, so this is `n` elements of type F that
                // live as long as `inputs`; j < n.
                Lane::Memory(p) => unsafe { *p.add(j) },
            },
            // SAFETY: as above for `outputs`, which are borrowed mutably. Inputs may alias them, which is sound with
            // raw pointers on one thread.
            |o, x| unsafe { *out[o].add(j) = x },
        );
    }
}

/// Calls `f` with the elements of a contiguous CPU tensor of kind f32 or f64; `None` for any other tensor.
pub(super) fn scan<R>(t: &Tensor, f32s: impl FnOnce(&[f32]) -> R, f64s: impl FnOnce(&[f64]) -> R) -> Option<R> {
    if t.device() != tch::Device::Cpu || !t.is_contiguous() {
        return None;
    }
    let n = t.numel();
    match (t.kind(), n) {
        (_, 0) => Some(f32s(&[])),
        // SAFETY: `n` initialised elements of this kind, alive and not written to while `t` is borrowed here.
        (tch::Kind::Float, _) => Some(f32s(unsafe { std::slice::from_raw_parts(t.data_ptr().cast(), n) })),
        // SAFETY: as above.
        (tch::Kind::Double, _) => Some(f64s(unsafe { std::slice::from_raw_parts(t.data_ptr().cast(), n) })),
        _ => None,
    }
}
