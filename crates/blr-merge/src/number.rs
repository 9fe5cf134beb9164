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

/// ⌊share·n⌋, as it is on paper: of 100, the share 0.29 is 29, though neither the number in memory nor its product is
/// so large. A product that is less than its own rounding below a whole number is that number.
pub fn part_of(share: f64, n: usize) -> usize {
    let product = share * n as f64;
    let near = product.round();
    (if near - product <= 2.0 * f64::EPSILON * near { near } else { product.floor() }) as usize
}

/// f32, or f64 where an input is f64. Sealed.
pub trait Number: Float + Default + Send + Sync + sealed::Sealed + 'static {
    /// 16-bit digits of [`Number::magnitude`].
    const DIGITS: u32;
    /// |x| as an integer of the same order: of two numbers that are not NaN, the larger |x| has the larger magnitude.
    fn magnitude(self) -> u64;
    /// The first 16 bits of |x| as an f32: with three decimal digits, in the order of |x|.
    fn first_digit(self) -> usize {
        (self.single().abs().to_bits() >> 16) as usize
    }
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

#[cfg(test)]
mod tests {
    use super::part_of;

    #[test]
    fn parts_are_those_of_decimal_fractions() {
        for (share, n, expected) in [(0.29, 100, 29), (0.57, 100, 57), (0.58, 100, 58), (0.999, 1000, 999), (1.0, 7, 7)]
        {
            assert_eq!(part_of(share, n), expected);
        }
        for denominator in [10usize, 100, 1000, 7, 3] {
            for numerator in 0..=denominator {
                for n in (0..3000).chain([1_000_000, 123_456_789]) {
                    let share = numerator as f64 / denominator as f64;
                    assert_eq!(part_of(share, n), numerator * n / denominator, "{numerator}/{denominator} of {n}");
                }
            }
        }
        // What rounding has left of a tenth.
        assert_eq!((part_of(1.0 - 0.9, 100), part_of(0.3 - 0.1, 5)), (10, 1));
        // Below by more than that.
        assert_eq!((part_of(0.289_999_999_999, 100), part_of(0.0, 5), part_of(0.5, 0)), (28, 0, 0));
    }
}
