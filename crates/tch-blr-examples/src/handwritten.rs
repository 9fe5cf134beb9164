//! 1,797 handwritten digits of 8 × 8 pixels, which are part of the program: nothing to download, and few enough labels
//! that uncertainty matters. `data/digits/README.md` has their source and licence.

use crate::Outcome;
use std::io::Read;
use tch::{Kind, Tensor};

/// Rows and columns of an image.
pub const SIDE: usize = 8;
/// Pixels of an image.
pub const PIXELS: usize = SIDE * SIDE;
/// Number of examples.
pub const EXAMPLES: usize = 1797;

const FILE: &[u8] = include_bytes!("../data/digits/digits.csv.gz");
/// Of a pixel in the file.
const INK: i64 = 16;

/// Images and their labels.
#[derive(Debug)]
pub struct Examples {
    /// `[N, 64]` f32 in [0, 1], row-major 8×8, ink is 1.
    pub images: Tensor,
    /// `[N]` i64 in 0..10.
    pub labels: Tensor,
}

impl Examples {
    /// Number of examples.
    pub fn len(&self) -> usize {
        self.labels.numel()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Those at `positions`, `[K]` i64.
    #[must_use]
    pub fn at(&self, positions: &Tensor) -> Examples {
        Examples { images: self.images.index_select(0, positions), labels: self.labels.index_select(0, positions) }
    }

    /// The same labels with other images.
    #[must_use]
    pub fn with(&self, images: impl Fn(&Tensor) -> Tensor) -> Examples {
        Examples { images: images(&self.images), labels: self.labels.shallow_clone() }
    }
}

/// All of them, in the order of the file.
///
/// # Errors
/// If the file in the program is not what it should be.
pub fn all() -> Outcome<Examples> {
    let mut text = String::new();
    flate2::read::GzDecoder::new(FILE).read_to_string(&mut text)?;
    let numbers = text.lines().flat_map(|line| line.split(',')).map(str::parse).collect::<Result<Vec<i64>, _>>()?;
    let table = Tensor::from_slice(&numbers).f_view([EXAMPLES as i64, PIXELS as i64 + 1])?;
    let images = table.narrow(1, 0, PIXELS as i64).to_kind(Kind::Float) / INK as f64;
    Ok(Examples { images, labels: table.select(1, PIXELS as i64).copy() })
}

/// Parts by other hands: what is learned from a few people is asked about people that it has never seen.
///
/// 13 people filled in 14 forms with the same text, of which some digits are missing here and there; the labels show
/// where the next one begins. The file does not say who wrote two, so that one person may be in two parts.
#[derive(Debug)]
pub struct Forms {
    /// 386 digits: the first three forms.
    pub train: Examples,
    /// 390: the next three, on which settings are chosen.
    pub validation: Examples,
    /// 1,021: the other eight.
    pub test: Examples,
}

impl Forms {
    /// # Errors
    /// Those of [`all`].
    pub fn new() -> Outcome<Forms> {
        let all = all()?;
        let part = |from: i64, to: i64| Examples {
            images: all.images.narrow(0, from, to - from),
            labels: all.labels.narrow(0, from, to - from),
        };
        Ok(Forms { train: part(0, 386), validation: part(386, 776), test: part(776, EXAMPLES as i64) })
    }
}
