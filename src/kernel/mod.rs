//! How an elementwise computation runs: written once over [`Real`], executed over raw memory or through libtorch.

mod finite;
mod lanes;
mod noise;
mod real;
mod tensors;

pub(crate) use finite::{first_non_finite, sum_of_squares};
pub(crate) use noise::{Draw, STEPS, groups, words};
pub use noise::{Given, Noise, Philox};
pub use real::{Pack, Real};

use tch::{Device, Kind, Tensor};

/// A computation that maps the elements of its inputs at one position to the elements of its outputs there.
pub(crate) trait Elementwise {
    /// `read(i)` is input `i`; `write(o, x)` sets output `o`. All reads come before the first write, so an output may
    /// be the same memory as an input.
    fn eval<T: Real>(&self, read: impl Fn(usize) -> T, write: impl FnMut(usize, T));
}

/// An input: one number for all positions, a tensor of the outputs' shape, or standard normals.
#[derive(Debug)]
pub(crate) enum Field {
    Number(f64),
    Tensor(Tensor),
    Noise { seed: u64, at: Draw },
}

impl Field {
    pub(crate) fn shallow_clone(&self) -> Field {
        match self {
            Field::Number(x) => Field::Number(*x),
            Field::Tensor(t) => Field::Tensor(t.shallow_clone()),
            Field::Noise { seed, at } => Field::Noise { seed: *seed, at: *at },
        }
    }
}

/// States that a rule may have.
pub(crate) const MAX_STATES: usize = 8;

/// A computation over the positions of `outputs`, which hold the results afterwards.
///
/// All tensors have one shape, device and kind (f32 or f64).
#[derive(Debug)]
pub(crate) struct Job<E> {
    pub f: E,
    pub inputs: Vec<Field>,
    pub outputs: Vec<Tensor>,
}

impl<E> Job<E> {
    /// The kind of number if raw memory will do.
    fn lanes(&self) -> Option<Kind> {
        let dense = |t: &Tensor| t.device() == Device::Cpu && t.is_contiguous();
        let tensors = self.inputs.iter().filter_map(|x| if let Field::Tensor(t) = x { Some(t) } else { None });
        tensors.chain(&self.outputs).all(dense).then(|| self.outputs[0].kind())
    }
}

/// Runs the jobs of a step, those over raw memory all in one pass.
pub(crate) fn run<E: Elementwise + Sync>(jobs: Vec<Job<E>>) {
    let _no_grad = tch::no_grad_guard();
    let (mut single, mut double) = (Vec::new(), Vec::new());
    for job in jobs {
        match job.lanes() {
            Some(Kind::Float) => single.push(job),
            Some(Kind::Double) => double.push(job),
            _ => tensors::run(job),
        }
    }
    lanes::run::<f32, E>(&mut single);
    lanes::run::<f64, E>(&mut double);
}

/// Tells libtorch that a tensor was written to, or got other memory, behind its back, so that it refuses to differentiate
/// a graph that was recorded before.
pub(crate) fn note_write(t: &Tensor) {
    let _no_grad = tch::no_grad_guard();
    // Writing in place to none of its elements moves the version counter on, which all views share.
    _ = t.f_unsqueeze(0).and_then(|t| t.f_narrow(0, 0, 0)?.f_zero_());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation of [`Real`], in place on its first input.
    struct AllOperations;

    impl Elementwise for AllOperations {
        fn eval<T: Real>(&self, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
            let (x, y, c) = (read(0), read(1), read(2));
            let a = (x * y + c - T::real(0.3)) / (y.abs() + T::real(0.7));
            let b = (T::real(1.0) / (x * x + T::real(0.1))).sqrt() - c * y;
            write(0, (T::real(2.0) - a).max(-b).min(T::real(5.0)));
            write(1, b.min(a).max(c) + (-x).min(c));
        }
    }

    fn both(kind: Kind, make: impl Fn(&Tensor) -> Tensor) -> [Vec<f64>; 2] {
        let x = Tensor::linspace(-2.0, 3.0, 24, (kind, Device::Cpu)).reshape([4, 6]);
        let y = Tensor::linspace(1.5, -1.0, 24, (kind, Device::Cpu)).reshape([4, 6]);
        let outputs = [make(&x), make(&Tensor::zeros_like(&x))];
        let inputs = vec![Field::Tensor(outputs[0].shallow_clone()), Field::Tensor(make(&y)), Field::Number(0.25)];
        run(vec![Job { f: AllOperations, inputs, outputs: outputs.iter().map(Tensor::shallow_clone).collect() }]);
        outputs.map(|t| Vec::<f64>::try_from(t.contiguous().flatten(0, -1).to_kind(Kind::Double)).unwrap())
    }

    #[test]
    fn lanes_and_tensors_agree_bit_by_bit() {
        for kind in [Kind::Float, Kind::Double] {
            let lanes = both(kind, Tensor::copy);
            // A transposed layout is not contiguous, so the tensor back-end takes it.
            let tensors = both(kind, |t| t.tr().contiguous().tr());
            assert_eq!(lanes, tensors, "{kind:?}");
            assert!(lanes.iter().flatten().all(|v| v.is_finite()));
        }
    }

    /// Inputs that move to other places, as a state that keeps the last mean does.
    struct Rotation;

    impl Elementwise for Rotation {
        fn eval<T: Real>(&self, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
            let (a, b) = (read(0), read(1));
            write(0, a + b);
            write(1, a);
            write(2, b);
        }
    }

    #[test]
    fn outputs_may_be_inputs_of_another_place() {
        for transposed in [false, true] {
            let t = |x: f64| {
                let t = Tensor::full([2, 3], x, (Kind::Double, Device::Cpu));
                if transposed { t.tr().contiguous().tr() } else { t }
            };
            let outputs = [t(1.0), t(2.0), t(3.0)];
            let inputs = [0, 1].map(|i: usize| Field::Tensor(outputs[i].shallow_clone())).into();
            run(vec![Job { f: Rotation, inputs, outputs: outputs.iter().map(Tensor::shallow_clone).collect() }]);
            assert_eq!(outputs.map(|t| t.double_value(&[1, 2])), [3.0, 1.0, 2.0], "transposed: {transposed}");
        }
    }
}
