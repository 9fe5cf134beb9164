//! What merges are computed in, and how many numbers at a time.

use num_traits::Float;

/// Elements of each input that are in memory at a time: 4 MiB in f32, so that half a dozen inputs take tens of
/// megabytes, and long enough that the disk reads in sequence.
pub(crate) const CHUNK: usize = 1 << 20;

/// Elements that a thread takes at a time: few enough for its cache, and enough that handing them out costs nothing.
///
/// Sums over a tensor are sums over its blocks, added in order, so results depend on this number in their last bits,
/// but not on the number of threads.
pub(crate) const BLOCK: usize = 1 << 14;

// Blocks begin at multiples of four, as the groups of random words do (engine/select.rs), whichever chunk they are in.
const _: () = assert!(CHUNK.is_multiple_of(BLOCK) && BLOCK.is_multiple_of(4));

/// f32, or f64 where an input is f64. Sealed.
pub trait Number: Float + Default + Send + Sync + sealed::Sealed + 'static {
    /// 16-bit digits of [`Number::magnitude`].
    const DIGITS: u32;
    /// |x| as an integer of the same order: of two numbers that are not NaN, the larger |x| has the larger magnitude.
    fn magnitude(self) -> u64;
    /// Rounded from f64.
    fn from_wide(x: f64) -> Self;
    /// Exactly the f32.
    fn from_single(x: f32) -> Self;
    /// Exactly this number, in f64.
    fn wide(self) -> f64;
    /// Rounded to f32.
    fn single(self) -> f32;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

// The bits of non-negative IEEE numbers, read as integers, are in the order of the numbers.
impl Number for f32 {
    const DIGITS: u32 = 2;
    fn magnitude(self) -> u64 {
        u64::from(self.abs().to_bits())
    }
    fn from_wide(x: f64) -> Self {
        x as f32
    }
    fn from_single(x: f32) -> Self {
        x
    }
    fn wide(self) -> f64 {
        f64::from(self)
    }
    fn single(self) -> f32 {
        self
    }
}

impl Number for f64 {
    const DIGITS: u32 = 4;
    fn magnitude(self) -> u64 {
        self.abs().to_bits()
    }
    fn from_wide(x: f64) -> Self {
        x
    }
    fn from_single(x: f32) -> Self {
        f64::from(x)
    }
    fn wide(self) -> f64 {
        self
    }
    fn single(self) -> f32 {
        self as f32
    }
}
