//! The elementwise computation over raw contiguous CPU memory: one pass over all tensors of a step together.
//!
//! Each thread takes pieces of the tensors, and of each piece a block of positions at a time, all from the end to the
//! beginning (what the CPU reads ahead must not be what was done before): the computation reads
//! the inputs where they lie (noise is drawn into an array first) and writes to arrays on the stack, which are then
//! copied to the outputs. On arrays of known length that alias nothing, the compiler turns the generic arithmetic
//! into vector instructions, for the widest that the CPU turns out to have. No instruction fuses a product with a
//! sum, so all widths and any split into blocks, pieces and threads give the same bits.
//!
//! Tensors hand out their memory as pointers, so the code here is unsafe, as it is in `memory.rs`, `squares.rs`,
//! `vectors.rs` and where a device is called (`cuda/`), and nowhere else.
#![allow(unsafe_code)]

use super::memory::{BLOCK, Block, Lane, Memory, flush};
use super::noise::Draw;
use super::philox::{W, groups};
use super::threads::{self, PIECE};
use super::trace::{Graph, Node};
use super::vectors::{Vectorized, Width};
use super::{CONSTANTS, Elementwise, Field, INPUTS, Job, OUTPUTS};
use arrayvec::ArrayVec;
use std::mem::MaybeUninit;
use tch::Tensor;

/// Positions whose results are held in registers.
const CHUNK: usize = 32;
/// Weights of a pass whose memory is larger than caches are: what it writes has left them before it is read again.
const LARGE: usize = 1 << 23;

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
    /// What is asked for while the noise of a block is drawn.
    ahead: ArrayVec<Memory<F>, { INPUTS + OUTPUTS }>,
    len: usize,
}

// SAFETY: the pointers are to memory of tensors that `run` borrows until all threads have ended. There are several
// threads only if all outputs are disjoint, each works on pieces of its own, and an input that is written to is an output
// of the same task, at the same positions.
unsafe impl<F: Sync, E: Sync> Sync for Task<F, E> {}

/// Every tensor is contiguous, on the CPU, and of element type `F`: see [`super::run`].
pub(super) fn run<F: Lane, E: Elementwise + Sync>(jobs: Vec<Job<E>>) {
    let mut tasks: Vec<Task<F, E>> = jobs.into_iter().map(Task::new).collect();
    let weights = tasks.iter().map(|t| t.len).sum();
    if weights >= LARGE {
        tasks.iter_mut().for_each(Task::spare_the_cache);
    }
    let pieces = threads::pieces(tasks.iter().map(|t| t.len), PIECE);
    // Where memory is shared, the jobs are done in the order in which they were given; a few weights are in the cache
    // anyway.
    let free = weights > PIECE && disjoint(&tasks);
    let threads = if free { threads::worth(weights) } else { 1 };
    threads::share(pieces.len(), threads, |i| {
        // From the end, because the pass before has most likely gone forwards over some of the same memory (the check
        // over the gradients): what it read last is in the cache.
        let (t, at) = pieces[if free { pieces.len() - 1 - i } else { i }];
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
        // The loops below write as many, wherever that is.
        assert!(outputs.len() == E::OUTPUTS && also.iter().all(|(o, _)| *o < E::OUTPUTS), "outputs are missing");
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
            ahead: ArrayVec::new(),
            len,
        }
    }

    /// For a pass over much memory: results go around the cache where the pass does not read, and what it reads is asked
    /// for while noise is drawn.
    fn spare_the_cache(&mut self) {
        let read: ArrayVec<Memory<F>, INPUTS> =
            self.inputs.iter().filter_map(|x| if let Source::Memory(p) = x { Some(*p) } else { None }).collect();
        for output in self.outputs.iter_mut().flatten() {
            let own = output.range(self.len);
            let met = |p: &Memory<F>| p.range(self.len).start < own.end && own.start < p.range(self.len).end;
            if !read.iter().any(met) {
                *output = output.around();
            }
        }
        if self.inputs.iter().any(|x| matches!(x, Source::Noise { .. })) {
            // Without the inputs that a row has but no result depends on.
            let graph = Graph::of(&self.f, |o| self.outputs.get(o).is_some_and(Option::is_some));
            let needed = |i: usize| graph.nodes.contains(&Node::Input(i as u8));
            let inputs = self.inputs.iter().enumerate().filter(|(i, _)| needed(*i));
            let read = inputs.filter_map(|(_, x)| if let Source::Memory(p) = x { Some(*p) } else { None });
            let written = self.outputs.iter().flatten().filter(|p| !matches!(p, Memory::Around(_)));
            self.ahead = read.chain(written.copied()).collect();
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
        let zeros = Block([F::default(); BLOCK]);
        let mut inputs = [const { MaybeUninit::<Block<F>>::uninit() }; INPUTS];
        let mut outputs = [const { MaybeUninit::<Block<F>>::uninit() }; OUTPUTS];
        // Of an input that there is not, zeros.
        let mut read = [zeros.0.as_ptr(); INPUTS];
        let mut write = [std::ptr::null_mut::<F>(); OUTPUTS];
        for ((source, block), read) in task.inputs.iter().zip(&mut inputs).zip(&mut read) {
            // Once per piece: a number is the same in all of its blocks.
            let first = if let Source::Number(x) = source { Block([*x; BLOCK]) } else { zeros };
            *read = block.write(first).0.as_ptr();
        }
        for ((_, block), write) in task.outputs.iter().zip(&mut outputs).zip(&mut write) {
            *write = block.as_mut_ptr().cast();
        }
        let k = task.constants;
        for at in (start..start + len).step_by(BLOCK).rev() {
            let n = BLOCK.min(start + len - at);
            // While the normals are computed, the memory that is needed next can be on its way.
            task.ahead.iter().for_each(|p| p.prefetch(at, n));
            for ((source, block), read) in task.inputs.iter().zip(&mut inputs).zip(&mut read) {
                match *source {
                    Source::Number(_) => {}
                    // SAFETY: `at + n ≤ len` elements of type F lie there, see `run`.
                    Source::Memory(Memory::Own(p)) if n == BLOCK => *read = unsafe { p.add(at) },
                    Source::Memory(p) => {
                        // SAFETY: it was written above.
                        let block = unsafe { block.assume_init_mut() };
                        // SAFETY: as above.
                        unsafe { p.read(at, n, &mut block.0) };
                        *read = block.0.as_ptr();
                    }
                    Source::Noise { seed, at: draw } => {
                        // SAFETY: as above.
                        let z = unsafe { &mut block.assume_init_mut().0 };
                        width.run(Draws { seed, at: draw, group: groups(at), z, width });
                    }
                }
            }
            for ((p, block), write) in task.outputs.iter().zip(&mut outputs).zip(&mut write) {
                // The last block may be short, and the loops below always write a whole one.
                match p {
                    Some(Memory::Own(p)) if n == BLOCK => *write = p.wrapping_add(at),
                    _ => *write = block.as_mut_ptr().cast(),
                }
            }
            // Always the whole block, whose length the compiler knows; what lies behind `n` is not written back.
            for at in (0..BLOCK).step_by(CHUNK).rev() {
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
            for (p, from) in task.outputs.iter().zip(write) {
                match p {
                    None => {}
                    Some(Memory::Own(_)) if n == BLOCK => {}
                    // SAFETY: as above.
                    Some(p) => unsafe { p.write(at, n, from) },
                }
            }
        }
        if task.outputs.iter().any(|p| matches!(p, Some(Memory::Around(_)))) {
            flush();
        }
    }
}

/// A block of normals, from the group that it starts with.
struct Draws<'a, F> {
    seed: u64,
    at: Draw,
    group: u64,
    z: &'a mut [F; BLOCK],
    width: Width,
}

impl<F: Lane> Vectorized for Draws<'_, F> {
    type Output = ();
    #[inline(always)]
    fn run(self) {
        let Draws { seed, at, group, z, width } = self;
        // What fits in the registers.
        if width.has_many_registers() {
            F::normals::<{ 4 * W }, _>(seed, at, group, z);
        } else {
            F::normals::<W, _>(seed, at, group, z);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Array;
    use super::super::squares::Squares;
    use super::super::{Constants, Real};
    use super::*;
    use tch::{Kind, Tensor};

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
        for (_, start) in threads::pieces(std::iter::once(n), PIECE) {
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

    /// Noise, a tensor, one that no result depends on; the tensor and the noise pass through.
    struct Moved;

    impl Elementwise for Moved {
        const OUTPUTS: usize = 2;
        #[inline(always)]
        fn eval<T: Real>(&self, _: impl Fn(usize) -> T, read: impl Fn(usize) -> T, mut write: impl FnMut(usize, T)) {
            let (z, x, _) = (read(0), read(1), read(2));
            write(0, x + z);
            write(1, x);
        }
    }

    #[test]
    fn sparing_the_cache_changes_no_bit() {
        let n = 2 * BLOCK + 21;
        // Tensors that begin 4, 8, … bytes behind a cache line.
        for first in 0..5 {
            let t = |x: f64| {
                let all = Tensor::full([n as i64 + 5], x, (Kind::Float, tch::Device::Cpu));
                all.narrow(0, first, n as i64)
            };
            let results = |spare: bool| {
                let (x, other, moved) = (t(0.1), t(7.0), t(0.0));
                let at = Draw { step: 1, sample: 0, parameter: 0, group: 9 };
                let inputs = [Field::Noise { seed: 5, at }, Field::Tensor(&x), Field::Tensor(&other)];
                // The first result replaces its input, the second goes where nothing is read.
                let mut task: Task<f32, _> = Task::new(Job::new(Moved, inputs, [Some(&x), Some(&moved)]));
                if spare {
                    task.spare_the_cache();
                    assert!(matches!(task.outputs[..], [Some(Memory::Own(_)), Some(Memory::Around(_))]));
                    // The input that is needed, and the result in its place.
                    assert_eq!(task.ahead.len(), 2);
                }
                let width = Width::chosen();
                width.run(Blocks { task: &task, start: 0, len: n, width });
                Vec::<f32>::try_from(Tensor::cat(&[x, moved, other], 0)).unwrap()
            };
            assert_eq!(results(true), results(false), "{first}");
        }
    }

    #[test]
    fn what_overlaps_with_an_input_stays_in_the_cache() {
        let all = Tensor::zeros([2 * BLOCK as i64], (Kind::Float, tch::Device::Cpu));
        let part = |first: i64| all.narrow(0, first, BLOCK as i64);
        for (first, around) in [(0, false), (1, false), (BLOCK as i64 - 1, false), (BLOCK as i64, true)] {
            let (x, y) = (part(0), part(first));
            let inputs = [Field::Number(0.0), Field::Tensor(&x), Field::Number(0.0)];
            let mut task: Task<f32, _> = Task::new(Job::new(Moved, inputs, [None, Some(&y)]));
            task.spare_the_cache();
            assert_eq!(matches!(task.outputs[1], Some(Memory::Around(_))), around, "{first}");
        }
    }
}
