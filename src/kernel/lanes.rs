//! The elementwise computation over raw contiguous CPU memory: one pass over all tensors of a step together.
//!
//! Each thread takes pieces of the tensors, and of each piece a block of positions at a time: inputs are copied (or noise
//! is drawn) into arrays on the stack, the computation runs over those, and the results are copied back. On arrays of
//! known length that alias nothing, the compiler turns the generic arithmetic into vector instructions, for the widest
//! that the CPU turns out to have. No instruction fuses a product with a sum, so all widths and any split into blocks,
//! pieces and threads give the same bits.
//!
//! The only unsafe code of the crate: tensors hand out their memory as pointers.
#![allow(unsafe_code)]

use super::noise::{Draw, Normals, groups};
use super::{Elementwise, Field, Job, Real};
use std::sync::atomic::{AtomicUsize, Ordering};
use tch::Tensor;

/// Positions per block: what a computation's inputs and outputs hold of them stays in the first-level cache.
const BLOCK: usize = 256;
/// Positions per piece, which a thread takes at a time.
const PIECE: usize = 1 << 15;
/// Positions below which another thread costs more than it brings (a thread takes some 30 µs to start).
const PER_THREAD: usize = 1 << 18;
/// The most inputs and outputs that a computation has: those of an update of [`super::MAX_STATES`] states.
const INPUTS: usize = 5 + super::MAX_STATES;
const OUTPUTS: usize = 1 + super::MAX_STATES;

/// A number type of the lanes.
pub(super) trait Lane: Real + Default + Send + Sync + Normals + 'static {}
impl Lane for f32 {}
impl Lane for f64 {}

#[derive(Clone, Copy)]
enum Source<F> {
    Number(F),
    Memory(*const F),
    Noise { seed: u64, at: Draw },
}

/// A job as pointers.
struct Task<'a, F, E> {
    f: &'a E,
    inputs: Vec<Source<F>>,
    outputs: Vec<*mut F>,
    len: usize,
}

// SAFETY: the pointers are to memory of tensors that `run` borrows (mutably, for outputs) until all threads have ended.
// There are several threads only if all outputs are disjoint, and each works on pieces of its own. An input that is not
// also an output of its task is not written to by any: gradients, curvature, priors and noise are nobody's output.
unsafe impl<F: Sync, E: Sync> Sync for Task<'_, F, E> {}

/// Every tensor is contiguous, on the CPU, and of element type `F`: see [`super::run`].
pub(super) fn run<F: Lane, E: Elementwise + Sync>(jobs: &mut [Job<E>]) {
    let tasks: Vec<Task<F, E>> = jobs.iter_mut().map(Task::new).collect();
    // First position of each task, and the end of the last.
    let pieces: Vec<(usize, usize)> =
        tasks.iter().enumerate().flat_map(|(t, task)| (0..task.len).step_by(PIECE).map(move |at| (t, at))).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        while let Some(&(t, at)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            let task = &tasks[t];
            run_piece(task, at, PIECE.min(task.len - at));
        }
    };
    let total: usize = tasks.iter().map(|t| t.len).sum();
    let worth = (total / PER_THREAD).clamp(1, tch::get_num_threads().max(1) as usize);
    let threads = if worth > 1 && disjoint(&tasks) { worth } else { 1 };
    std::thread::scope(|scope| {
        for _ in 1..threads {
            scope.spawn(work);
        }
        work();
    });
}

/// Whether no two tasks, and no two outputs of one, write to the same memory.
fn disjoint<F, E>(tasks: &[Task<F, E>]) -> bool {
    let range = |p: &*mut F, len: usize| (p.addr(), p.addr() + len * size_of::<F>());
    let mut written: Vec<_> = tasks.iter().flat_map(|t| t.outputs.iter().map(|p| range(p, t.len))).collect();
    written.sort_unstable();
    written.windows(2).all(|w| w[0].1 <= w[1].0)
}

impl<'a, F: Lane, E: Elementwise> Task<'a, F, E> {
    fn new(job: &'a mut Job<E>) -> Self {
        let Job { f, inputs, outputs } = job;
        let (len, kind) = (outputs[0].numel(), outputs[0].kind());
        assert!(inputs.len() <= INPUTS && outputs.len() <= OUTPUTS, "more inputs or outputs than there are arrays");
        assert!(outputs.iter().all(|t| t.numel() == len && t.kind() == kind), "outputs that differ");
        let source = |x: &Field| match x {
            Field::Number(x) => Source::Number(F::real(*x)),
            Field::Noise { seed, at } => Source::Noise { seed: *seed, at: *at },
            Field::Tensor(t) => {
                assert!(t.numel() == len && t.kind() == kind, "an input of another size or kind than the outputs");
                Source::Memory(t.data_ptr() as *const F)
            }
        };
        let inputs = inputs.iter().map(source).collect();
        Task { f, inputs, outputs: outputs.iter().map(|t| t.data_ptr().cast()).collect(), len }
    }
}

/// Positions `at..at + len` of a task, with the widest vectors there are.
fn run_piece<F: Lane, E: Elementwise>(task: &Task<F, E>, at: usize, len: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::is_x86_feature_detected as has;
        if has!("avx512f") && has!("avx512vl") && has!("avx512dq") && has!("avx512bw") {
            // SAFETY: the CPU has the features.
            return unsafe { avx512(task, at, len) };
        }
        if has!("avx2") {
            // SAFETY: the CPU has the feature.
            return unsafe { avx2(task, at, len) };
        }
    }
    blocks(task, at, len);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512vl,avx512dq,avx512bw")]
fn avx512<F: Lane, E: Elementwise>(task: &Task<F, E>, at: usize, len: usize) {
    blocks(task, at, len);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn avx2<F: Lane, E: Elementwise>(task: &Task<F, E>, at: usize, len: usize) {
    blocks(task, at, len);
}

#[inline(always)]
fn blocks<F: Lane, E: Elementwise>(task: &Task<F, E>, start: usize, len: usize) {
    let mut inputs = [[F::default(); BLOCK]; INPUTS];
    let mut outputs = [[F::default(); BLOCK]; OUTPUTS];
    for (source, array) in task.inputs.iter().zip(&mut inputs) {
        if let Source::Number(x) = source {
            *array = [*x; BLOCK];
        }
    }
    for at in (start..start + len).step_by(BLOCK) {
        let n = BLOCK.min(start + len - at);
        for (source, array) in task.inputs.iter().zip(&mut inputs) {
            match *source {
                Source::Number(_) => {}
                // SAFETY: `at + n ≤ len` elements of type F, see `run`; the array is another memory.
                Source::Memory(p) => unsafe { std::ptr::copy_nonoverlapping(p.add(at), array.as_mut_ptr(), n) },
                Source::Noise { seed, at: draw } => F::normals(seed, draw, groups(at), array),
            }
        }
        // Always the whole block, whose length the compiler knows; what lies behind `n` is not written back.
        for j in 0..BLOCK {
            task.f.eval(|i| inputs[i][j], |o, x| outputs[o][j] = x);
        }
        for (&p, array) in task.outputs.iter().zip(&outputs) {
            // SAFETY: as above; no other thread works on these positions.
            unsafe { std::ptr::copy_nonoverlapping(array.as_ptr(), p.add(at), n) };
        }
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
