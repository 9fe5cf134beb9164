//! The elementwise computation over raw contiguous CPU memory: one pass over all tensors of a step together.
//!
//! Each thread takes pieces of the tensors, and of each piece a block of positions at a time: the computation reads
//! the inputs where they lie (noise is drawn into an array first) and writes to arrays on the stack, which are then
//! copied to the outputs. On arrays of known length that alias nothing, the compiler turns the generic arithmetic
//! into vector instructions, for the widest that the CPU turns out to have. No instruction fuses a product with a
//! sum, so all widths and any split into blocks, pieces and threads give the same bits.
//!
//! Tensors hand out their memory as pointers, so the code here is unsafe; apart from `vectors.rs`, no other is.
#![allow(unsafe_code)]

use super::half::{Half, from_bfloat16, from_float16, to_bfloat16, to_float16};
use super::noise::Draw;
use super::normal::Normals;
use super::philox::groups;
use super::threads;
use super::vectors::{Vectorized, Width};
use super::{CONSTANTS, Elementwise, Field, INPUTS, Job, OUTPUTS, Real, computed_in};
use arrayvec::ArrayVec;
use std::sync::atomic::{AtomicU64, Ordering};
use tch::{Kind, Tensor};

/// Positions per block: what a computation draws and writes of them stays in the first-level cache.
const BLOCK: usize = 256;
/// Positions whose results are held in registers.
const CHUNK: usize = 32;
/// Positions per piece, which a thread takes at a time.
const PIECE: usize = 1 << 15;

/// Positions whose squares are summed together: a warp of a GPU's has them, so that there are warps enough.
pub(super) const SUMMED: usize = 1 << 13;
/// Independent sums of them, because the additions of one would wait for each other; a thread of a GPU's has one. Both
/// numbers are part of the result: they must not follow the device.
pub(super) const SUMS: usize = 32;

/// A number type of the lanes.
pub(super) trait Lane: Real + Default + Send + Sync + Normals + Into<f64> + 'static {
    const KIND: Kind;
    fn from_single(x: f32) -> Self;
    fn single(self) -> f32;
}
impl Lane for f32 {
    const KIND: Kind = Kind::Float;
    #[inline(always)]
    fn from_single(x: f32) -> Self {
        x
    }
    #[inline(always)]
    fn single(self) -> f32 {
        self
    }
}
impl Lane for f64 {
    const KIND: Kind = Kind::Double;
    #[inline(always)]
    fn from_single(x: f32) -> Self {
        f64::from(x)
    }
    #[inline(always)]
    fn single(self) -> f32 {
        self as f32
    }
}

/// Elements of a tensor: of the lanes' own kind, or halves.
#[derive(Debug, Clone, Copy)]
enum Memory<F> {
    Own(*mut F),
    Half(*mut u16, Half),
}

impl<F: Lane> Memory<F> {
    fn of(t: &Tensor) -> Self {
        let kind = t.kind();
        match Half::of(kind) {
            Some(half) => Memory::Half(t.data_ptr().cast(), half),
            None => {
                // Also in release builds: the pointer is trusted from here on.
                assert!(kind == F::KIND, "tensors of one job differ in kind: {kind:?} beside {:?}", F::KIND);
                Memory::Own(t.data_ptr().cast())
            }
        }
    }

    /// The addresses of `n` elements.
    fn range(self, n: usize) -> std::ops::Range<usize> {
        let (start, size) = match self {
            Memory::Own(p) => (p.addr(), size_of::<F>()),
            Memory::Half(p, _) => (p.addr(), 2),
        };
        start..start + n * size
    }

    /// Asks for elements to be brought into the cache.
    #[inline(always)]
    fn prefetch(self, at: usize, n: usize) {
        match self {
            Memory::Own(p) => prefetch(p.cast_const().wrapping_add(at), n),
            Memory::Half(p, _) => prefetch(p.cast_const().wrapping_add(at), n),
        }
    }

    /// Copies `n` elements from position `at` on.
    ///
    /// # Safety
    /// They lie there, and n ≤ BLOCK.
    #[inline(always)]
    unsafe fn read(self, at: usize, n: usize, to: &mut [F; BLOCK]) {
        match self {
            // SAFETY: of the caller; the array is another memory.
            Memory::Own(p) => unsafe { std::ptr::copy_nonoverlapping(p.add(at), to.as_mut_ptr(), n) },
            Memory::Half(p, half) => {
                // SAFETY: of the caller; nobody writes to a piece but the thread that works on it.
                let from = unsafe { std::slice::from_raw_parts(p.add(at), n) };
                match half {
                    Half::BFloat16 => convert(to, from, |x| F::from_single(from_bfloat16(x))),
                    Half::Float16 => convert(to, from, |x| F::from_single(from_float16(x))),
                }
            }
        }
    }

    /// Writes `n` elements from position `at` on.
    ///
    /// # Safety
    /// The memory is there, no other thread works on it, and n ≤ BLOCK elements lie behind `from`, which may be the same
    /// place.
    #[inline(always)]
    unsafe fn write(self, at: usize, n: usize, from: *const F) {
        match self {
            // SAFETY: of the caller; `copy` allows for the same place.
            Memory::Own(p) => unsafe { std::ptr::copy(from, p.add(at), n) },
            Memory::Half(p, half) => {
                // SAFETY: of the caller; memory of another kind is another memory.
                let (to, from) =
                    unsafe { (std::slice::from_raw_parts_mut(p.add(at), n), std::slice::from_raw_parts(from, n)) };
                match half {
                    Half::BFloat16 => convert(to, from, |x| to_bfloat16(x.single())),
                    Half::Float16 => convert(to, from, |x| to_float16(x.single())),
                }
            }
        }
    }
}

#[inline(always)]
fn convert<A: Copy, B>(to: &mut [B], from: &[A], f: impl Fn(A) -> B) {
    for (to, x) in to.iter_mut().zip(from) {
        *to = f(*x);
    }
}

#[derive(Clone, Copy)]
enum Source<F> {
    Number(F),
    Memory(Memory<F>),
    Noise { seed: u64, at: Draw },
}

/// A job as pointers.
struct Task<F, E> {
    f: E,
    constants: [F; CONSTANTS],
    inputs: ArrayVec<Source<F>, INPUTS>,
    /// `None` for a result that nobody wants.
    outputs: ArrayVec<Option<Memory<F>>, OUTPUTS>,
    also: ArrayVec<(usize, Memory<F>), 2>,
    len: usize,
}

// SAFETY: the pointers are to memory of tensors that `run` borrows until all threads have ended. There are several
// threads only if all outputs are disjoint, each works on pieces of its own, and an input that is written to is an output
// of the same task, at the same positions.
unsafe impl<F: Sync, E: Sync> Sync for Task<F, E> {}

/// Where a pass may be cut: task and first position of each piece.
fn pieces(lengths: impl Iterator<Item = usize>, size: usize) -> Vec<(usize, usize)> {
    lengths.enumerate().flat_map(move |(t, len)| (0..len).step_by(size).map(move |at| (t, at))).collect()
}

/// Every tensor is contiguous, on the CPU, and of element type `F`: see [`super::run`].
pub(super) fn run<F: Lane, E: Elementwise + Sync>(jobs: Vec<Job<E>>) {
    let tasks: Vec<Task<F, E>> = jobs.into_iter().map(Task::new).collect();
    let pieces = pieces(tasks.iter().map(|t| t.len), PIECE);
    let threads = threads::worth(tasks.iter().map(|t| t.len).sum());
    let threads = if threads > 1 && disjoint(&tasks) { threads } else { 1 };
    threads::share(pieces.len(), threads, |i| {
        let (t, at) = pieces[i];
        let task = &tasks[t];
        let width = Width::chosen();
        width.run(Blocks { task, start: at, len: PIECE.min(task.len - at), width });
    });
}

/// Whether no two tasks, and no two outputs of one, write to the same memory, and none reads what another writes.
fn disjoint<F: Lane, E>(tasks: &[Task<F, E>]) -> bool {
    let outputs = |(i, t): (usize, &Task<F, E>)| {
        let wanted = t.outputs.iter().flatten().chain(t.also.iter().map(|(_, p)| p)).filter(|_| t.len > 0);
        wanted.map(|p| (p.range(t.len), i)).collect::<ArrayVec<_, { OUTPUTS + 2 }>>()
    };
    let mut written: Vec<_> = tasks.iter().enumerate().flat_map(outputs).collect();
    written.sort_unstable_by_key(|(range, _)| range.start);
    // Sorted by their start, ranges overlap only if two neighbours do.
    if !written.windows(2).all(|w| w[0].0.end <= w[1].0.start) {
        return false;
    }
    // Inputs may overlap with each other, and one that is an output of its task is read before it is written.
    tasks.iter().enumerate().filter(|(_, t)| t.len > 0).all(|(i, t)| {
        t.inputs.iter().all(|source| {
            let Source::Memory(p) = source else { return true };
            let read = p.range(t.len);
            let first = written.partition_point(|(range, _)| range.end <= read.start);
            let met = written[first..].iter().take_while(|(range, _)| range.start < read.end);
            met.into_iter().all(|(range, task)| *task == i && *range == read)
        })
    })
}

impl<F: Lane, E: Elementwise> Task<F, E> {
    fn new(Job { f, inputs, outputs, also }: Job<E>) -> Self {
        let len = outputs.iter().flatten().next().expect("a job has an output").numel();
        let memory = |t: &Tensor| {
            // Also in release builds: the pointers are trusted for `len` elements from here on.
            assert!(t.numel() == len, "tensors of one job differ in size");
            Memory::of(t)
        };
        let source = |x: Field| match x {
            Field::Number(x) => Source::Number(F::real(x)),
            Field::Noise { seed, at } => Source::Noise { seed, at },
            Field::Tensor(t) => Source::Memory(memory(t)),
        };
        Task {
            constants: f.constants().map(F::real),
            f,
            inputs: inputs.into_iter().map(source).collect(),
            outputs: outputs.into_iter().map(|t| t.map(memory)).collect(),
            also: also.into_iter().map(|(o, t)| (o, memory(t))).collect(),
            len,
        }
    }
}

/// Positions `start..start + len` of a task.
struct Blocks<'a, F, E> {
    task: &'a Task<F, E>,
    start: usize,
    len: usize,
    width: Width,
}

impl<F: Lane, E: Elementwise> Vectorized for Blocks<'_, F, E> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let Blocks { task, start, len, width } = self;
        let mut inputs = [[F::default(); BLOCK]; INPUTS];
        let mut outputs = [[F::default(); BLOCK]; OUTPUTS];
        // Of an input that there is not, zeros.
        let mut read: [*const F; INPUTS] = inputs.each_ref().map(|array| array.as_ptr());
        let mut write = [std::ptr::null_mut(); OUTPUTS];
        for (source, array) in task.inputs.iter().zip(&mut inputs) {
            if let Source::Number(x) = source {
                // Once per piece: a number is the same in all of its blocks.
                *array = [*x; BLOCK];
            }
        }
        let k = task.constants;
        let noisy = task.inputs.iter().any(|x| matches!(x, Source::Noise { .. }));
        for at in (start..start + len).step_by(BLOCK) {
            let n = BLOCK.min(start + len - at);
            if noisy {
                // While the normals are computed, the memory that is needed next can be on its way.
                let inputs = task.inputs.iter().filter_map(|x| if let Source::Memory(p) = x { Some(p) } else { None });
                inputs.chain(task.outputs.iter().flatten()).for_each(|p| p.prefetch(at, n));
            }
            for ((source, array), read) in task.inputs.iter().zip(&mut inputs).zip(&mut read) {
                match *source {
                    Source::Memory(Memory::Own(p)) if n == BLOCK => {
                        // SAFETY: `at + n ≤ len` elements of type F lie there, see `run`.
                        *read = unsafe { p.add(at) };
                        continue;
                    }
                    // SAFETY: as above.
                    Source::Memory(p) => unsafe { p.read(at, n, array) },
                    Source::Number(_) => {}
                    Source::Noise { seed, at: draw } => {
                        width.run(Draws { seed, at: draw, group: groups(at), z: array });
                    }
                }
                *read = array.as_ptr();
            }
            for ((p, array), write) in task.outputs.iter().zip(&mut outputs).zip(&mut write) {
                // The last block may be short, and the loops below always write a whole one.
                *write = match p {
                    Some(Memory::Own(p)) if n == BLOCK => p.wrapping_add(at),
                    _ => array.as_mut_ptr(),
                };
            }
            // Always the whole block, whose length the compiler knows; what lies behind `n` is not written back.
            for at in (0..BLOCK).step_by(CHUNK) {
                // All inputs of a chunk are read before its outputs are written: they may be the same memory.
                let mut results = [[F::default(); CHUNK]; OUTPUTS];
                #[allow(clippy::needless_range_loop)] // all arrays at once, for the vectoriser
                for l in 0..CHUNK {
                    // SAFETY: BLOCK elements lie behind each pointer that belongs to an input of the task.
                    let read = |i: usize| unsafe { *read[i].add(at + l) };
                    task.f.eval(|i| k[i], read, |o, x| results[o][l] = x);
                }
                for o in 0..E::OUTPUTS {
                    // SAFETY: as above, for outputs; no other thread works on these positions.
                    unsafe { write[o].add(at).cast::<[F; CHUNK]>().write_unaligned(results[o]) };
                }
            }
            // Here a result is where `write` says, in an array or already in place.
            for (o, p) in task.also.iter().copied() {
                // SAFETY: as above.
                unsafe { p.write(at, n, write[o]) };
            }
            for (p, array) in task.outputs.iter().zip(&outputs) {
                let Some(p) = p else { continue };
                if n < BLOCK || matches!(p, Memory::Half(..)) {
                    // SAFETY: as above.
                    unsafe { p.write(at, n, array.as_ptr()) };
                }
            }
        }
    }
}

/// A block of normals, from the group that it starts with.
struct Draws<'a, F> {
    seed: u64,
    at: Draw,
    group: u64,
    z: &'a mut [F; BLOCK],
}

impl<F: Lane> Vectorized for Draws<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        F::normals(self.seed, self.at, self.group, self.z);
    }
}

/// Asks for `n` elements to be brought into the cache; a hint, which any address will do for.
#[inline(always)]
fn prefetch<F>(p: *const F, n: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..n * size_of::<F>()).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch neither reads nor faults.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast::<i8>().wrapping_add(line)) };
    }
}

/// Σ x² over contiguous CPU tensors that are computed in `F`, in f64: the same bits for any number of threads.
pub(super) fn sum_of_squares<F: Lane>(tensors: &[&Tensor]) -> f64 {
    let arrays: Vec<Array<F>> = tensors.iter().map(|t| Array::of(t)).collect();
    let pieces = pieces(arrays.iter().map(|x| x.len), SUMMED);
    // A sum for each piece, added in order at the end, so that it does not show in the bits which thread was faster.
    let sums: Vec<AtomicU64> = pieces.iter().map(|_| AtomicU64::new(0)).collect();
    let threads = threads::worth(arrays.iter().map(|x| x.len).sum());
    threads::share(pieces.len(), threads, |i| {
        let (t, at) = pieces[i];
        let sum = Width::chosen().run(Squares { array: &arrays[t], start: at, len: SUMMED.min(arrays[t].len - at) });
        // Relaxed, because the end of `share` orders every store before the reads below.
        sums[i].store(sum.to_bits(), Ordering::Relaxed);
    });
    sums.into_iter().map(|x| f64::from_bits(x.into_inner())).sum()
}

/// The elements of a contiguous CPU tensor, alive and not written to while they are summed.
struct Array<F> {
    memory: Memory<F>,
    len: usize,
}

// SAFETY: it is only read.
unsafe impl<F: Sync> Sync for Array<F> {}

impl<F: Lane> Array<F> {
    fn of(t: &Tensor) -> Self {
        assert!(computed_in(t.kind()) == F::KIND);
        Array { memory: Memory::of(t), len: t.numel() }
    }
}

/// The sum of a piece.
struct Squares<'a, F> {
    array: &'a Array<F>,
    start: usize,
    len: usize,
}

impl<F: Lane> Vectorized for Squares<'_, F> {
    type Output = f64;
    #[inline(always)]
    fn run(self) -> f64 {
        let mut sums = [0.0; SUMS];
        let mut halves = [F::default(); BLOCK];
        for at in (self.start..self.start + self.len).step_by(BLOCK) {
            let n = BLOCK.min(self.start + self.len - at);
            let block: &[F] = match self.array.memory {
                // SAFETY: `at + n ≤ len` initialised elements of this kind lie there, alive and not written to.
                Memory::Own(p) => unsafe { std::slice::from_raw_parts(p.add(at), n) },
                Memory::Half(..) => {
                    // SAFETY: as above.
                    unsafe { self.array.memory.read(at, n, &mut halves) };
                    &halves[..n]
                }
            };
            let (chunks, rest) = block.as_chunks::<SUMS>();
            for chunk in chunks {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    let x: f64 = (*x).into();
                    *sum += x * x;
                }
            }
            for (sum, x) in sums.iter_mut().zip(rest) {
                let x: f64 = (*x).into();
                *sum += x * x;
            }
        }
        sums.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::Constants;
    use super::*;

    /// Every operation of [`Real`] on two tensors, a number and noise, with two results.
    struct Everything;

    impl Elementwise for Everything {
        const OUTPUTS: usize = 2;
        fn constants(&self) -> Constants {
            let mut k = Constants::default();
            k[0] = 0.3;
            k
        }
        #[inline(always)]
        fn eval<T: Real>(
            &self,
            constant: impl Fn(usize) -> T,
            read: impl Fn(usize) -> T,
            mut write: impl FnMut(usize, T),
        ) {
            let (x, y, c, z) = (read(0), read(1), read(2), read(3));
            write(0, x + z / (y.abs() + c).sqrt());
            write(1, (x * constant(0) - y).min(c).max(-z));
        }
    }

    fn results<F: Lane>(kind: Kind, width: Width) -> (Vec<f64>, f64) {
        // A whole piece, a piece that ends within a block, and both results in place.
        let n = PIECE + 3 * BLOCK + 17;
        let [x, y] = [1.0, -2.0].map(|a| Tensor::linspace(a, 3.0, n as i64, (kind, tch::Device::Cpu)));
        let at = Draw { step: 7, sample: 0, parameter: 0, group: 5 };
        let inputs = [Field::Tensor(&x), Field::Tensor(&y), Field::Number(0.7), Field::Noise { seed: 3, at }];
        let task: Task<F, _> = Task::new(Job::new(Everything, inputs, [Some(&x), Some(&y)]));
        for (_, start) in pieces(std::iter::once(n), PIECE) {
            width.run(Blocks { task: &task, start, len: PIECE.min(n - start), width });
        }
        let squares = width.run(Squares { array: &Array::<F>::of(&x), start: 0, len: n });
        (Vec::try_from(Tensor::cat(&[x, y], 0).to_kind(Kind::Double)).unwrap(), squares)
    }

    #[test]
    fn every_width_gives_the_same_bits() {
        let widths = Width::all();
        println!("widths of this CPU: {widths:?}");
        for width in widths {
            assert_eq!(results::<f32>(Kind::Float, width), results::<f32>(Kind::Float, Width::Baseline), "{width:?}");
            assert_eq!(results::<f64>(Kind::Double, width), results::<f64>(Kind::Double, Width::Baseline), "{width:?}");
        }
    }
}
