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

/// Parts by other people each: what is learned from a few writers is asked about writers that it has never seen.
///
/// Everyone filled in the same form, so that the labels show where the next one begins; the file does not say more.
#[derive(Debug)]
pub struct Writers {
    /// 386 digits of the first three writers.
    pub train: Examples,
    /// 390 of the next three: settings are chosen here.
    pub validation: Examples,
    /// 1,021 of all others.
    pub test: Examples,
}

impl Writers {
    /// # Errors
    /// Those of [`all`].
    pub fn new() -> Outcome<Writers> {
        let all = all()?;
        let part = |from: i64, to: i64| Examples {
            images: all.images.narrow(0, from, to - from),
            labels: all.labels.narrow(0, from, to - from),
        };
        Ok(Writers { train: part(0, 386), validation: part(386, 776), test: part(776, EXAMPLES as i64) })
    }
}
