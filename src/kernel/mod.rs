//! How an elementwise computation runs: written once over [`Real`], executed over raw memory or through libtorch; and
//! the noise that such a computation draws.
//!
//! Here belongs what knows positions and numbers. What a step computes there is a row's business ([`crate::rows`]),
//! and which tensors it touches is the driver's.

mod cuda;
mod finite;
mod half;
mod lanes;
mod memory;
mod noise;
mod normal;
mod philox;
mod real;
mod squares;
mod tensors;
mod threads;
mod trace;
mod vectors;

#[cfg(feature = "cuda-emulation")]
pub use cuda::emulation;
pub(crate) use finite::{first_non_finite, sum_of_squares};
pub(crate) use memory::elements;
pub(crate) use noise::{Draw, Drawn, STEPS};
pub use noise::{Given, Noise, Philox};
pub(crate) use philox::{GROUP, Stream, groups, uniform, words};
pub use real::{Pack, Real};

use crate::Result;
use arrayvec::ArrayVec;
use tch::{Device, Kind, Tensor};
use trace::Traced;

/// A computation that maps the elements of its inputs at one position to the elements of its outputs there.
pub(crate) trait Elementwise {
    /// Number of outputs.
    const OUTPUTS: usize;
    /// What is the same at all positions.
    fn constants(&self) -> Constants {
        Constants::default()
    }
    /// `constant(i)` is number `i` of the constants, rounded once: a conversion inside the loop over positions would
    /// halve the width of its vectors. `read(i)` is input `i`; `write(o, x)` sets output `o`. All reads come before the
    /// first write, so an output may be the same memory as an input.
    fn eval<T: Real>(&self, constant: impl Fn(usize) -> T, read: impl Fn(usize) -> T, write: impl FnMut(usize, T));
}

/// Numbers that are the same at all positions of a tensor.
pub(crate) type Constants = [f64; CONSTANTS];
// A bound, because an array cannot take its length from a row's associated type. The longest now is 14.
pub(crate) const CONSTANTS: usize = 16;

/// An input: one number for all positions, a tensor of the outputs' shape, or standard normals.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Field<'a> {
    Number(f64),
    Tensor(&'a Tensor),
    Noise { seed: u64, at: Draw },
}

/// States that a rule may have.
pub(crate) const MAX_STATES: usize = 8;
/// The most inputs and outputs that a computation has: those of an update.
const INPUTS: usize = 5 + MAX_STATES;
const OUTPUTS: usize = 1 + MAX_STATES;

/// Inputs of a job.
pub(crate) type Inputs<'a> = ArrayVec<Field<'a>, INPUTS>;
/// Outputs of a job; `None` for a result that nobody wants.
pub(crate) type Outputs<'a> = ArrayVec<Option<&'a Tensor>, OUTPUTS>;

/// A second place for a result: the number of the output, and where else it goes.
pub(crate) type Also<'a> = ArrayVec<(usize, &'a Tensor), 2>;

/// A computation over the positions of `outputs`, which hold the results afterwards.
///
/// All tensors have one shape and device. It is computed in f64 if one of them is f64, else in f32: a number of a
/// smaller kind is read as it is, and an output rounded at the end. What one job writes no other reads or writes.
#[derive(Debug)]
pub(crate) struct Job<'a, E> {
    pub f: E,
    pub inputs: Inputs<'a>,
    pub outputs: Outputs<'a>,
    /// Results that are written twice, as a weight is to a variable of half precision and to its mean in f32.
    pub also: Also<'a>,
}

/// What numbers a tensor of this kind is computed in.
pub(crate) fn computed_in(kind: Kind) -> Kind {
    if half::Half::of(kind).is_some() { Kind::Float } else { kind }
}

/// What a tensor is computed in if raw memory will do: contiguous, on the CPU, a kind of the lanes, and no view whose
/// numbers are the negative of what is in memory.
fn lanes(t: &Tensor) -> Option<Kind> {
    #[cfg(test)]
    if tensors::ONLY.get() {
        return None;
    }
    (t.device() == Device::Cpu && t.is_contiguous() && !t.is_neg() && !cuda::emulates())
        .then(|| computed_in(t.kind()))
        .filter(|k| matches!(k, Kind::Float | Kind::Double))
}

/// All that a job reads.
fn read<'a>(inputs: &Inputs<'a>) -> impl Iterator<Item = &'a Tensor> {
    inputs.iter().filter_map(|x| if let Field::Tensor(t) = x { Some(*t) } else { None })
}

/// All that a job writes.
fn written<'a>(outputs: &Outputs<'a>, also: &Also<'a>) -> impl Iterator<Item = &'a Tensor> {
    outputs.iter().flatten().copied().chain(also.iter().map(|(_, t)| *t))
}

/// Why passes over this tensor are libtorch's operations, one after the other, and not one pass; `None` if they are
/// one.
pub(crate) fn fallback(t: &Tensor) -> Option<String> {
    if !matches!(computed_in(t.kind()), Kind::Float | Kind::Double) {
        return Some(format!("its kind is {:?}", t.kind()));
    }
    if !t.is_contiguous() || t.is_neg() {
        return Some(
            "it is not contiguous: replace it by a copy (contiguous), before the optimizer is built".to_owned(),
        );
    }
    match t.device() {
        Device::Cpu => None,
        device @ Device::Cuda(_) => cuda::unavailable(device),
        device => Some(format!("there are no kernels for {device:?}")),
    }
}

impl<'a, E> Job<'a, E> {
    /// A computation whose results each go to one place.
    pub(crate) fn new(
        f: E,
        inputs: impl IntoIterator<Item = Field<'a>>,
        outputs: impl IntoIterator<Item = Option<&'a Tensor>>,
    ) -> Self {
        let (inputs, outputs) = (inputs.into_iter().collect(), outputs.into_iter().collect());
        Job { f, inputs, outputs, also: Also::new() }
    }

    fn tensors(&self) -> impl Iterator<Item = &'a Tensor> {
        read(&self.inputs).chain(written(&self.outputs, &self.also))
    }

    fn lanes(&self) -> Option<Kind> {
        let kinds = self.tensors().map(lanes);
        kinds.reduce(|a, b| {
            let (a, b) = (a?, b?);
            Some(if a == Kind::Double { a } else { b })
        })?
    }
}

/// Positions that a job is tried out at a time: on the CPU as many as its caches hold.
fn tried(device: Device) -> i64 {
    if device == Device::Cpu { 1 << 15 } else { 1 << 24 }
}

impl<E: Elementwise + Copy + Sync> Job<'_, E> {
    /// Computes the outputs in other memory, and hands each over with its number; of contiguous tensors a piece at a
    /// time, so that it takes little.
    pub(crate) fn try_out(&self, mut look: impl FnMut(usize, &Tensor) -> Result<()>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let n = self.tensors().next().map_or(0, |t| t.numel() as i64);
        let whole = !self.tensors().all(Tensor::is_contiguous);
        let size = self.tensors().next().map_or(1, |t| tried(t.device()));
        for first in (0..n).step_by(if whole { n.max(1) as usize } else { size as usize }) {
            let piece = |t: &Tensor| {
                if whole { t.detach() } else { t.detach().view(-1).narrow(0, first, size.min(n - first)) }
            };
            let pieces: ArrayVec<Option<Tensor>, INPUTS> =
                self.inputs.iter().map(|x| if let Field::Tensor(t) = x { Some(piece(t)) } else { None }).collect();
            let fields = self.inputs.iter().zip(&pieces).map(|(x, t)| match (*x, t) {
                (_, Some(t)) => Field::Tensor(t),
                // Pieces are whole groups of normals.
                (Field::Noise { seed, at }, _) => {
                    Field::Noise { seed, at: Draw { group: at.group + groups(first as usize), ..at } }
                }
                (x, None) => x,
            });
            let scratch: ArrayVec<Option<Tensor>, OUTPUTS> =
                self.outputs.iter().map(|t| t.map(|t| piece(t).empty_like())).collect();
            run([Job::new(self.f, fields, scratch.iter().map(Option::as_ref))])?;
            scratch.iter().enumerate().try_for_each(|(i, t)| t.as_ref().map_or(Ok(()), |t| look(i, t)))?;
        }
        Ok(())
    }
}

/// Runs the jobs of a step, those over raw memory all in one pass.
///
/// # Errors
/// A device has no memory left, say. No job has written anything then, unless they have more than 2²⁶ elements.
pub(crate) fn run<'a, E: Elementwise + Sync>(jobs: impl IntoIterator<Item = Job<'a, E>>) -> Result<()> {
    // The tensor back-end writes into leaves in place, which libtorch refuses while it records gradients.
    let _no_grad = tch::no_grad_guard();
    let jobs = jobs.into_iter().collect();
    #[cfg(feature = "cuda-emulation")]
    return emulation::checked(jobs, dispatch);
    #[cfg(not(feature = "cuda-emulation"))]
    dispatch(jobs)
}

/// Each job to the back-end that reaches its memory.
fn dispatch<E: Elementwise + Sync>(jobs: Vec<Job<E>>) -> Result<()> {
    let (mut single, mut double, mut others) = (Vec::new(), Vec::new(), Vec::new());
    for job in jobs {
        match job.lanes() {
            Some(Kind::Float) => single.push(job),
            Some(_) => double.push(job),
            None => others.push(job),
        }
    }
    // First what can fail.
    if !others.is_empty() {
        cuda::run(others.iter().map(Traced::of).collect(), tensors::run)?;
    }
    lanes::run::<f32, E>(single);
    lanes::run::<f64, E>(double);
    Ok(())
}

/// Its first input.
struct First;

impl Elementwise for First {
    const OUTPUTS: usize = 1;
    #[inline(always)]
    fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        write(0, read(0));
    }
}

/// A field as a tensor of this shape, kind (f32 or f64) and device.
pub(crate) fn tensor(field: Field, like: &Tensor) -> Result<Tensor> {
    // It has the strides of `like`. Where they are not those of rows, the tensor back-end counts positions by their
    // index, so that a draw does not depend on the layout.
    let t = like.detach().f_empty_like()?;
    fill([(field, &t)])?;
    Ok(t)
}

/// Writes each field to the tensor beside it.
pub(crate) fn fill<'a>(fields: impl IntoIterator<Item = (Field<'a>, &'a Tensor)>) -> Result<()> {
    run(fields.into_iter().map(|(field, t)| Job::new(First, [field], [Some(t)])))
}

/// The sum of two inputs.
struct Sum;

impl Elementwise for Sum {
    const OUTPUTS: usize = 1;
    #[inline(always)]
    fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
        write(0, read(0) + read(1));
    }
}

/// Adds to each tensor the one beside it, of the same shape, kind and device.
pub(crate) fn add<'a>(pairs: impl IntoIterator<Item = (&'a Tensor, &'a Tensor)>) -> Result<()> {
    run(pairs.into_iter().map(|(sum, more)| Job::new(Sum, [sum, more].map(Field::Tensor), [Some(sum)])))
}

/// Standard normals as a tensor like `like`.
pub(crate) fn normals(seed: u64, at: Draw, like: &Tensor) -> Result<Tensor> {
    tensor(Field::Noise { seed, at }, like)
}

/// A number in every element of a tensor like this one, rounded to its kind: to an infinity beyond its range, where
/// libtorch's own functions fail, and tch's panic.
pub(crate) fn filled(like: &Tensor, x: f64) -> Tensor {
    let _no_grad = tch::no_grad_guard();
    let mut t = like.detach().empty_like();
    t.copy_(&Tensor::from(x));
    t
}

/// Tells libtorch that a tensor was written to, or got other memory, behind its back, so that it refuses to
/// differentiate a graph that was recorded before.
pub(crate) fn note_write(t: &Tensor) {
    let _no_grad = tch::no_grad_guard();
    // Changing a shape in place moves the version counter on, which all views share, even if the change is none.
    _ = t.shallow_clone().f_transpose_(0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every operation of [`Real`], in place on its first input.
    struct AllOperations;

    impl Elementwise for AllOperations {
        const OUTPUTS: usize = 2;
        fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
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
        let y = make(&y);
        let inputs = [Field::Tensor(&outputs[0]), Field::Tensor(&y), Field::Number(0.25)];
        run([Job::new(AllOperations, inputs, outputs.iter().map(Some))]).unwrap();
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

    /// Wherever in a job a tensor stands that no pass over memory can take, and beside which kind.
    #[test]
    fn one_layout_of_its_own_sends_a_job_to_tensors() {
        let plain = |kind| Tensor::linspace(-1.0, 2.0, 6, (kind, Device::Cpu)).reshape([2, 3]);
        let transposed = |kind| plain(kind).tr().contiguous().tr();
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            for strange in 0..3 {
                let t = |i: usize, kind| if i == strange { transposed(kind) } else { plain(kind) };
                let (sum, more, to) = (t(0, Kind::Double), t(1, kind), t(2, kind));
                run([Job::new(Sum, [&sum, &more].map(Field::Tensor), [Some(&to)])]).unwrap();
                let expected = (plain(Kind::Double) + plain(kind)).to_kind(kind);
                assert_eq!(to.contiguous(), expected, "{kind:?}, transposed is number {strange}");
            }
        }
    }

    /// Inputs that move to other places, as a state that keeps the last mean does.
    struct Rotation;

    impl Elementwise for Rotation {
        const OUTPUTS: usize = 3;
        fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
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
            run([Job::new(Rotation, outputs[..2].iter().map(Field::Tensor), outputs.iter().map(Some))]).unwrap();
            assert_eq!(outputs.map(|t| t.double_value(&[1, 2])), [3.0, 1.0, 2.0], "transposed: {transposed}");
        }
    }

    /// k₀x + k₁
    struct Line([f64; 2]);

    impl Elementwise for Line {
        const OUTPUTS: usize = 1;
        fn constants(&self) -> Constants {
            let mut k = Constants::default();
            k[..2].copy_from_slice(&self.0);
            k
        }
        fn eval<T: Real>(&self, k: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
            write(0, k(0) * read(0) + k(1));
        }
    }

    #[test]
    fn jobs_over_the_same_memory_are_done_in_order() {
        // Few, and so many that several threads would be worth it.
        for n in [5, 1 << 19] {
            let all = Tensor::ones([n + 1], (Kind::Float, Device::Cpu));
            let (x, y) = (all.narrow(0, 0, n), all.narrow(0, 1, n));
            let job = |k, t| Job::new(Line(k), [Field::Tensor(t)], [Some(t)]);
            run([job([2.0, 0.0], &x), job([1.0, 3.0], &y), job([3.0, -1.0], &x)]).unwrap();
            let (low, high) = (all.min().double_value(&[]), all.narrow(0, 1, n - 1));
            assert_eq!((low, all.double_value(&[n])), (4.0, 4.0));
            assert_eq!(all.double_value(&[0]), 5.0);
            assert_eq!(high.min().double_value(&[]), 14.0);
            assert_eq!(high.max().double_value(&[]), 14.0);
        }
    }
}
