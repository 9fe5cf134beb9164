//! Images of digits: MNIST if it is there, otherwise digits that we draw ourselves; letters as foreign inputs.
//!
//! With `TCH_BLR_DATA` set, [`Digits::load`] reads MNIST's four IDX files from `$TCH_BLR_DATA/mnist`. Otherwise it
//! renders a *synthetic* set, so that every example runs without a download: pen strokes (lines and elliptic arcs) of
//! one to three writing styles a digit, randomly slanted, rotated, stretched, bent, thickened and shifted, with grainy
//! ink.
//!
//! Everything here is a pure function of its arguments and seeds, through [`Rng`]; libtorch's global generator is not
//! touched. `idx.rs` reads files, `strokes.rs` knows the shapes of the characters, `pen.rs` writes them.

mod idx;
mod pen;
mod strokes;

use crate::random::Rng;
use crate::{Outcome, data};
use std::path::Path;
use strokes::{DIGITS, LETTERS};
use tch::{Device, Kind, Tensor};

/// Rows and columns of an image.
pub const SIDE: usize = 28;
/// Pixels of an image.
pub const PIXELS: usize = SIDE * SIDE;
/// Number of classes.
pub const CLASSES: i64 = 10;

const SYNTHETIC_TRAIN: usize = 12_000;
const SYNTHETIC_TEST: usize = 2_000;

/// Images of handwritten (or hand-drawn by [`Digits::synthetic`]) digits, on the CPU until moved.
#[derive(Debug)]
pub struct Digits {
    /// `[N, 784]` f32 in [0, 1], row-major 28×28, ink is 1.
    pub train_images: Tensor,
    /// `[N]` i64 in 0..10.
    pub train_labels: Tensor,
    /// `[M, 784]` f32 in [0, 1].
    pub test_images: Tensor,
    /// `[M]` i64 in 0..10.
    pub test_labels: Tensor,
    /// Where the images came from, for titles and logs.
    pub source: String,
}

impl Digits {
    /// MNIST from `$TCH_BLR_DATA/mnist`, or the synthetic set if the variable is unset or there is no such folder.
    ///
    /// # Errors
    ///
    /// Those of [`Digits::load_from`].
    pub fn load() -> Outcome<Digits> {
        Digits::load_from(data::folder().as_deref())
    }

    /// MNIST itself, for what is compared with numbers of MNIST.
    ///
    /// # Errors
    ///
    /// If there is no folder `$TCH_BLR_DATA/mnist`, and those of [`Digits::load_from`].
    pub fn load_mnist() -> Outcome<Digits> {
        let data = data::folder_with("mnist").map_err(|e| format!("these numbers are MNIST's: {e}"))?;
        Digits::mnist(&data.join("mnist"))
    }

    /// With the last `n` training images in place of the test images: for the choice of settings.
    #[must_use]
    pub fn held_out(&self, n: i64) -> Digits {
        let rest = self.train_labels.size()[0] - n;
        Digits {
            train_images: self.train_images.narrow(0, 0, rest),
            train_labels: self.train_labels.narrow(0, 0, rest),
            test_images: self.train_images.narrow(0, rest, n),
            test_labels: self.train_labels.narrow(0, rest, n),
            source: format!("{}, validation images in place of the test images", self.source),
        }
    }

    /// MNIST from `data/mnist` if that folder exists, otherwise the synthetic set.
    ///
    /// # Errors
    ///
    /// One line that names the file if the folder lacks one of the four files, or holds one that is truncated, too
    /// long, not IDX, or does not match its partner.
    pub fn load_from(data: Option<&Path>) -> Outcome<Digits> {
        match data.map(|d| d.join("mnist")) {
            Some(folder) if folder.is_dir() => Digits::mnist(&folder),
            Some(folder) => {
                let mut digits = Digits::synthetic(SYNTHETIC_TRAIN, SYNTHETIC_TEST, 0);
                digits.source = format!("synthetic digits (no folder {})", folder.display());
                Ok(digits)
            }
            None => Ok(Digits::synthetic(SYNTHETIC_TRAIN, SYNTHETIC_TEST, 0)),
        }
    }

    /// Reads `{train,t10k}-images-idx3-ubyte` and `{train,t10k}-labels-idx1-ubyte`, plain or with `.gz`, from `folder`.
    ///
    /// # Errors
    ///
    /// See [`Digits::load_from`].
    pub fn mnist(folder: &Path) -> Outcome<Digits> {
        let (train_images, train_labels) = idx::read_pair(folder, "train")?;
        let (test_images, test_labels) = idx::read_pair(folder, "t10k")?;
        Ok(Digits { train_images, train_labels, test_images, test_labels, source: "MNIST".into() })
    }

    /// Draws `train` + `test` digits, as many of each class as divisibility allows, in shuffled order.
    ///
    /// Training and test images come from one distribution and share no image.
    pub fn synthetic(train: usize, test: usize, seed: u64) -> Digits {
        let draw = |n: usize, stream: u64| {
            let mut labels: Vec<usize> = (0..n).map(|i| i % DIGITS.len()).collect();
            Rng::new(seed, stream).shuffle(&mut labels);
            let images = pen::draw(&labels, &DIGITS, seed, stream + 1);
            (images, Tensor::from_slice(&labels.iter().map(|&l| l as i64).collect::<Vec<_>>()))
        };
        let (train_images, train_labels) = draw(train, 10);
        let (test_images, test_labels) = draw(test, 20);
        Digits { train_images, train_labels, test_images, test_labels, source: "synthetic digits".into() }
    }

    /// The same digits on `device`.
    pub fn to_device(&self, device: Device) -> Digits {
        Digits {
            train_images: self.train_images.to_device(device),
            train_labels: self.train_labels.to_device(device),
            test_images: self.test_images.to_device(device),
            test_labels: self.test_labels.to_device(device),
            source: self.source.clone(),
        }
    }
}

/// Out-of-distribution inputs for digits: `n` capital letters A E F H K L M T X Y, `[n, 784]` f32 in [0, 1].
///
/// They come from the renderer of the synthetic digits, with the same ink, sizes and distortions, so that a model
/// cannot tell them by brightness or position but only by shape. Letters that people also read as digits (B, G, I, O,
/// Q, S, Z) are left out, since a confident answer to them is not wrong; T and Y, close to 7 and 4, are in. They serve
/// as foreign inputs to MNIST too: black background, glyphs about 20 pixels high, centred by mass as there.
pub fn letters(n: usize, seed: u64) -> Tensor {
    let classes: Vec<usize> = (0..n).map(|i| i % LETTERS.len()).collect();
    pen::draw(&classes, &LETTERS, seed, 30)
}

/// Turns each image `[N, side²]` counter-clockwise by 90°.
pub fn rotate90(images: &Tensor) -> Tensor {
    let side = images.size()[1].isqrt();
    images.view([-1, side, side]).rot90(1, [1, 2]).reshape([-1, side * side])
}

fn to_images(pixels: &[u8]) -> Tensor {
    let images = Tensor::from_slice(pixels).view([-1, PIXELS as i64]).to_kind(Kind::Float);
    images / 255.0
}
