//! The memory of tensors, as the lanes read and write it: numbers of their own kind where they lie, halves by way of an
//! array, and what is not needed again soon written around the cache.
//!
//! Tensors hand out their memory as pointers, so the code here is unsafe, as in `lanes.rs` and `vectors.rs`.
#![allow(unsafe_code)]

use super::half::{Half, from_bfloat16, from_float16, to_bfloat16, to_float16};
use super::normal::Normals;
use super::{Real, computed_in};
use std::ops::Range;
use tch::{Kind, Tensor};

/// Positions per block: what a computation draws and writes of them stays in the first-level cache.
pub(super) const BLOCK: usize = 256;

/// A number type of the lanes.
pub(crate) trait Lane: Real + Default + Send + Sync + Normals + Into<f64> + 'static {
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

/// Numbers of a block. They begin a cache line, because a vector register that is filled from two lines takes twice as
/// long.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Block<F>(pub [F; BLOCK]);

/// Elements of a tensor: of the lanes' own kind, or of a smaller one.
#[derive(Debug, Clone, Copy)]
pub(super) enum Memory<F> {
    Own(*mut F),
    /// As `Own`, but written around the cache.
    Around(*mut F),
    Half(*mut u16, Half),
    /// f32 beside f64.
    Single(*mut f32),
}

impl<F: Lane> Memory<F> {
    pub(super) fn of(t: &Tensor) -> Self {
        let kind = t.kind();
        if let Some(half) = Half::of(kind) {
            return Memory::Half(t.data_ptr().cast(), half);
        }
        if (kind, F::KIND) == (Kind::Float, Kind::Double) {
            return Memory::Single(t.data_ptr().cast());
        }
        // Also in release builds: the pointer is trusted from here on.
        assert!(kind == F::KIND, "tensors of one job differ in kind: {kind:?} beside {:?}", F::KIND);
        Memory::Own(t.data_ptr().cast())
    }

    /// The same elements, written around the cache if they are of the lanes' own kind.
    pub(super) fn around(self) -> Self {
        match self {
            Memory::Own(p) => Memory::Around(p),
            other => other,
        }
    }

    /// The addresses of `n` elements.
    pub(super) fn range(self, n: usize) -> Range<usize> {
        let (start, size) = match self {
            Memory::Own(p) | Memory::Around(p) => (p.addr(), size_of::<F>()),
            Memory::Half(p, _) => (p.addr(), 2),
            Memory::Single(p) => (p.addr(), 4),
        };
        start..start + n * size
    }

    /// Asks for elements to be brought into the cache.
    #[inline(always)]
    pub(super) fn prefetch(self, at: usize, n: usize) {
        match self {
            Memory::Own(p) | Memory::Around(p) => prefetch(p.cast_const().wrapping_add(at), n),
            Memory::Half(p, _) => prefetch(p.cast_const().wrapping_add(at), n),
            Memory::Single(p) => prefetch(p.cast_const().wrapping_add(at), n),
        }
    }

    /// Copies `n` elements from position `at` on.
    ///
    /// # Safety
    /// They lie there, and n ≤ BLOCK.
    #[inline(always)]
    pub(super) unsafe fn read(self, at: usize, n: usize, to: &mut [F; BLOCK]) {
        match self {
            // SAFETY: of the caller; the array is another memory.
            Memory::Own(p) | Memory::Around(p) => unsafe {
                std::ptr::copy_nonoverlapping(p.add(at), to.as_mut_ptr(), n);
            },
            Memory::Half(p, half) => {
                // SAFETY: of the caller; nobody writes to a piece but the thread that works on it.
                let from = unsafe { std::slice::from_raw_parts(p.add(at), n) };
                match half {
                    Half::BFloat16 => convert(to, from, |x| F::from_single(from_bfloat16(x))),
                    Half::Float16 => convert(to, from, |x| F::from_single(from_float16(x))),
                }
            }
            Memory::Single(p) => {
                // SAFETY: as above.
                convert(to, unsafe { std::slice::from_raw_parts(p.add(at), n) }, F::from_single);
            }
        }
    }

    /// Writes `n` elements from position `at` on.
    ///
    /// # Safety
    /// The memory is there, no other thread works on it, and n ≤ BLOCK elements lie behind `from`, which may be the same
    /// place.
    #[inline(always)]
    pub(super) unsafe fn write(self, at: usize, n: usize, from: *const F) {
        match self {
            // SAFETY: of the caller; `copy` allows for the same place.
            Memory::Own(p) => unsafe { std::ptr::copy(from, p.add(at), n) },
            // SAFETY: of the caller; a block is never written to its own place around the cache.
            Memory::Around(p) => unsafe { stream(from, p.add(at), n) },
            Memory::Half(p, half) => {
                // SAFETY: of the caller; memory of another kind is another memory.
                let (to, from) =
                    unsafe { (std::slice::from_raw_parts_mut(p.add(at), n), std::slice::from_raw_parts(from, n)) };
                match half {
                    Half::BFloat16 => convert(to, from, |x| to_bfloat16(x.single())),
                    Half::Float16 => convert(to, from, |x| to_float16(x.single())),
                }
            }
            Memory::Single(p) => {
                // SAFETY: as above.
                let (to, from) =
                    unsafe { (std::slice::from_raw_parts_mut(p.add(at), n), std::slice::from_raw_parts(from, n)) };
                convert(to, from, F::single);
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

/// Copies `n` elements around the cache, where the CPU can: a plain store first reads the line that it writes to.
/// [`flush`] has to follow before another thread reads them.
///
/// # Safety
/// They lie behind both pointers, in different memory.
#[inline(always)]
unsafe fn stream<F: Copy>(from: *const F, to: *mut F, n: usize) {
    let mut done = 0;
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{__m128i, _mm_loadu_si128, _mm_stream_si128};
        let step = 16 / size_of::<F>();
        if to.addr().is_multiple_of(16) {
            while done + step <= n {
                // SAFETY: 16 bytes lie behind both, and `to` is a multiple of 16.
                unsafe {
                    let x = _mm_loadu_si128(from.add(done).cast::<__m128i>());
                    _mm_stream_si128(to.add(done).cast::<__m128i>(), x);
                }
                done += step;
            }
        }
    }
    // SAFETY: of the caller.
    unsafe { std::ptr::copy_nonoverlapping(from.add(done), to.add(done), n - done) };
}

/// Orders what was written around the cache before all later writes, as plain ones are by themselves.
#[inline(always)]
pub(super) fn flush() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every CPU of the architecture has the instruction.
    #[allow(unused_unsafe)] // in newer versions of Rust
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// The elements of a contiguous CPU tensor, alive and not written to while they are read.
pub(super) struct Array<F> {
    pub memory: Memory<F>,
    pub len: usize,
}

// SAFETY: it is only read.
unsafe impl<F: Sync> Sync for Array<F> {}

impl<F: Lane> Array<F> {
    pub(super) fn of(t: &Tensor) -> Self {
        assert!(computed_in(t.kind()) == F::KIND);
        Array { memory: Memory::of(t), len: t.numel() }
    }
}

/// The elements of a contiguous CPU tensor of this kind, to be changed by who holds the only handle to its memory.
pub(crate) fn elements<F: Lane>(t: &mut Tensor) -> &mut [F] {
    assert!(t.kind() == F::KIND && t.device() == tch::Device::Cpu && t.is_contiguous());
    let n = t.numel();
    if n == 0 {
        // A slice begins somewhere, and such a tensor may not.
        return &mut [];
    }
    // SAFETY: n elements of this kind lie there, as long as the tensor lives.
    unsafe { std::slice::from_raw_parts_mut(t.data_ptr().cast(), n) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At every place within a line, at every short length and at a whole block; and nothing beside it.
    fn written_around<F: Lane + PartialEq + std::fmt::Debug>() {
        let number = |i: usize| F::from_single(i as f32 + 0.5);
        let from = Block(std::array::from_fn::<F, BLOCK, _>(number));
        for (offset, n) in (0..17).flat_map(|offset| (0..20).chain([BLOCK - 1, BLOCK]).map(move |n| (offset, n))) {
            let mut to = [Block([F::default(); BLOCK]); 2];
            let start = to.as_mut_ptr().cast::<F>();
            // SAFETY: offset + n are fewer elements than two blocks have.
            unsafe { Memory::Own(start).around().write(offset, n, from.0.as_ptr()) };
            flush();
            let expected = |i: usize| if (offset..offset + n).contains(&i) { number(i - offset) } else { F::default() };
            let found = to.iter().flat_map(|block| block.0);
            assert!(found.enumerate().all(|(i, x)| x == expected(i)), "{n} from {offset} on");
        }
    }

    #[test]
    fn around_the_cache_everything_arrives_and_nothing_else_changes() {
        written_around::<f32>();
        written_around::<f64>();
    }

    #[test]
    fn halves_are_written_as_ever() {
        let mut bits = [0_u16; 3];
        let memory = Memory::<f32>::Half(bits.as_mut_ptr(), Half::BFloat16).around();
        // SAFETY: three elements lie there.
        unsafe { memory.write(1, 2, [1.0, -2.0].as_ptr()) };
        assert_eq!(bits, [0, 0x3F80, 0xC000]);
    }
}
