//! Data of the examples: MNIST if it is there, else digits that we draw ourselves; letters as foreign inputs; two moons.
//!
//! With `TCH_BLR_DATA` set, [`Digits::load`] reads MNIST's four IDX files from `$TCH_BLR_DATA/mnist`. Otherwise it renders
//! a *synthetic* set, so that every example runs without a download: pen strokes (lines and elliptic arcs) of one to
//! three writing styles a digit, randomly slanted, rotated, stretched, bent, thickened and shifted, with grainy ink.
//!
//! Everything here is a pure function of its arguments and seeds, through a small generator of its own ([`Rng`]);
//! libtorch's global generator is not touched.

// Each example uses a part of this file.
#![allow(dead_code)]

use std::error::Error;
use std::f64::consts::PI;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

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
    pub fn load() -> Result<Digits, Box<dyn Error>> {
        Digits::load_from(std::env::var_os("TCH_BLR_DATA").map(PathBuf::from).as_deref())
    }

    /// MNIST from `data/mnist` if that folder exists, else the synthetic set.
    ///
    /// # Errors
    ///
    /// One line that names the file if the folder lacks one of the four files, or holds one that is truncated, too
    /// long, not IDX, or does not match its partner.
    pub fn load_from(data: Option<&Path>) -> Result<Digits, Box<dyn Error>> {
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
    pub fn mnist(folder: &Path) -> Result<Digits, Box<dyn Error>> {
        let (train_images, train_labels) = read_pair(folder, "train")?;
        let (test_images, test_labels) = read_pair(folder, "t10k")?;
        Ok(Digits { train_images, train_labels, test_images, test_labels, source: "MNIST".into() })
    }

    /// Draws `train` + `test` digits, as many of each class as divisibility allows, in shuffled order.
    ///
    /// Training and test images come from one distribution and share no image.
    pub fn synthetic(train: usize, test: usize, seed: u64) -> Digits {
        let draw = |n: usize, stream: u64| {
            let mut labels: Vec<usize> = (0..n).map(|i| i % DIGITS.len()).collect();
            Rng::new(seed, stream).shuffle(&mut labels);
            let images = draw(&labels, &DIGITS, seed, stream + 1);
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
/// cannot tell them by brightness or position but only by shape. Letters that people also read as digits
/// (B, G, I, O, Q, S, Z) are left out, since a confident answer to them is not wrong; T and Y, close to 7 and 4, are in.
/// They serve as foreign inputs to MNIST too: black background, glyphs about 20 pixels high, centred by mass as there.
pub fn letters(n: usize, seed: u64) -> Tensor {
    let classes: Vec<usize> = (0..n).map(|i| i % LETTERS.len()).collect();
    draw(&classes, &LETTERS, seed, 30)
}

/// Turns each image `[N, 784]` counter-clockwise by 90°.
pub fn rotate90(images: &Tensor) -> Tensor {
    let side = SIDE as i64;
    images.view([-1, side, side]).rot90(1, [1, 2]).reshape([-1, side * side])
}

/// Positions of the examples whose label is one of `classes`, in order, `[K]` i64: for `index_select(0, …)`.
pub fn subset(labels: &Tensor, classes: &[i64]) -> Tensor {
    let values = Vec::<i64>::try_from(labels.to_device(Device::Cpu)).expect("labels: [N] integers");
    let positions: Vec<i64> = (0_i64..).zip(&values).filter(|(_, y)| classes.contains(y)).map(|(i, _)| i).collect();
    Tensor::from_slice(&positions).to_device(labels.device())
}

/// What becomes of the examples that do not fill the last mini-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Last {
    /// They make a smaller mini-batch.
    Keep,
    /// They sit this epoch out.
    Drop,
}

/// One epoch of shuffled mini-batches `(x, y)`; see [`batches`].
#[derive(Debug)]
pub struct Batches {
    x: Tensor,
    y: Tensor,
    order: Tensor,
    size: i64,
    start: i64,
    end: i64,
}

/// Visits every row of `x` and `y` once, in an order that `seed` decides, `size` rows at a time.
///
/// Another epoch takes another seed: `batches(&x, &y, 128, epoch, Last::Keep)`.
///
/// # Panics
///
/// If `size` is 0 or `x` and `y` do not have as many rows.
pub fn batches(x: &Tensor, y: &Tensor, size: usize, seed: u64, last: Last) -> Batches {
    let (n, size) = (x.size()[0], size as i64);
    assert!(size > 0, "batches: size 0");
    assert_eq!(n, y.size()[0], "batches: rows of x and y");
    let mut order: Vec<i64> = (0..n).collect();
    Rng::new(seed, 40).shuffle(&mut order);
    Batches {
        x: x.shallow_clone(),
        y: y.shallow_clone(),
        order: Tensor::from_slice(&order).to_device(x.device()),
        size,
        start: 0,
        end: if last == Last::Drop { n - n % size } else { n },
    }
}

impl Iterator for Batches {
    type Item = (Tensor, Tensor);

    fn next(&mut self) -> Option<Self::Item> {
        if self.start >= self.end {
            return None;
        }
        let rows = self.order.narrow(0, self.start, self.size.min(self.end - self.start));
        self.start += self.size;
        Some((self.x.index_select(0, &rows), self.y.index_select(0, &rows)))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        let left = ((self.end - self.start).max(0) as usize).div_ceil(self.size as usize);
        (left, Some(left))
    }
}

impl ExactSizeIterator for Batches {}

/// Two interleaving half circles of radius 1: points `[n, 2]` f32 and classes `[n]` i64, alternating 0 and 1.
///
/// Class 0 is (cos t, sin t), class 1 is (1 - cos t, ½ - sin t), t evenly spaced over [0, π], plus normal noise of
/// standard deviation `noise`.
pub fn moons(n: usize, noise: f64, seed: u64) -> (Tensor, Tensor) {
    let mut rng = Rng::new(seed, 50);
    let last = (n.div_ceil(2).max(2) - 1) as f64;
    let mut points = Vec::with_capacity(2 * n);
    for i in 0..n {
        let (sin, cos) = (PI * (i / 2) as f64 / last).sin_cos();
        let (x, y) = if i % 2 == 0 { (cos, sin) } else { (1.0 - cos, 0.5 - sin) };
        points.push((x + noise * rng.normal()) as f32);
        points.push((y + noise * rng.normal()) as f32);
    }
    let classes: Vec<i64> = (0..n as i64).map(|i| i % 2).collect();
    (Tensor::from_slice(&points).view([-1, 2]), Tensor::from_slice(&classes))
}

/// SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"): a counter in steps of the
/// golden ratio, scrambled.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

    /// The generator of one seed and stream; different streams of a seed are as good as independent.
    pub fn new(seed: u64, stream: u64) -> Rng {
        Rng(Rng(seed).bits() ^ Rng(!stream).bits())
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(Self::STEP);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1), a multiple of 2⁻⁵³.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Uniform in [`low`, `high`).
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.unit()
    }

    /// Uniform in 0..`n`; the bias of the product is below n · 2⁻⁶⁴.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// Standard normal (Box-Muller; the second of the pair is dropped).
    pub fn normal(&mut self) -> f64 {
        (-2.0 * (1.0 - self.unit()).ln()).sqrt() * (2.0 * PI * self.unit()).cos()
    }

    /// A uniformly random order (Fisher-Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

// --- IDX files ---

fn read_pair(folder: &Path, part: &str) -> Result<(Tensor, Tensor), Box<dyn Error>> {
    let (path, size, pixels) = read_idx(folder, &format!("{part}-images-idx3-ubyte"), 3)?;
    if size[0] == 0 || size[1..] != [SIDE, SIDE] {
        return Err(format!("{}: size {size:?}: expected images of 28×28 pixels", path.display()).into());
    }
    let n = size[0];
    let (path, size, labels) = read_idx(folder, &format!("{part}-labels-idx1-ubyte"), 1)?;
    if size != [n] {
        return Err(format!("{}: {} labels for {n} images", path.display(), size[0]).into());
    }
    if let Some(i) = labels.iter().position(|&l| i64::from(l) >= CLASSES) {
        return Err(format!("{}: label {} of example {i} is not a digit", path.display(), labels[i]).into());
    }
    Ok((to_images(&pixels), Tensor::from_slice(&labels).to_kind(Kind::Int64)))
}

/// An IDX file of bytes: 0, 0, 8 (the type: u8), number of dimensions; each size as a big-endian u32; the data.
fn read_idx(folder: &Path, name: &str, dims: usize) -> Result<(PathBuf, Vec<usize>, Vec<u8>), Box<dyn Error>> {
    let plain = folder.join(name);
    let path = if plain.is_file() { plain } else { folder.join(format!("{name}.gz")) };
    let fail = |problem: String| -> Box<dyn Error> { format!("{}: {problem}", path.display()).into() };
    if !path.is_file() {
        return Err(fail("no such file, and none without .gz".into()));
    }
    let mut bytes = fs::read(&path).map_err(|e| fail(e.to_string()))?;
    if path.extension().is_some_and(|e| e == "gz") {
        let mut unpacked = Vec::new();
        let mut gz = flate2::read::GzDecoder::new(bytes.as_slice());
        gz.read_to_end(&mut unpacked).map_err(|e| fail(format!("truncated or not gzip ({e})")))?;
        bytes = unpacked;
    }
    let header = 4 + 4 * dims;
    let magic = [0, 0, 8, dims as u8];
    if bytes.get(..4).is_some_and(|m| m != magic) {
        return Err(fail(format!("starts with {:?}, not with IDX's {magic:?}", &bytes[..4])));
    }
    if bytes.len() < header {
        return Err(fail(format!("truncated: {} bytes, the header alone has {header}", bytes.len())));
    }
    let size: Vec<usize> = bytes[4..header]
        .chunks_exact(4)
        .map(|b| u32::from_be_bytes(b.try_into().expect("four bytes")) as usize)
        .collect();
    let expected = size.iter().try_fold(1_usize, |n, &s| n.checked_mul(s)).and_then(|n| n.checked_add(header));
    if expected != Some(bytes.len()) {
        let what = if expected.is_none_or(|n| n > bytes.len()) { "truncated" } else { "too long" };
        let expected = expected.map_or("more".into(), |n| n.to_string());
        return Err(fail(format!("{what}: {} bytes, size {size:?} needs {expected}", bytes.len())));
    }
    bytes.drain(..header);
    Ok((path, size, bytes))
}

fn to_images(pixels: &[u8]) -> Tensor {
    let images = Tensor::from_slice(pixels).view([-1, PIXELS as i64]).to_kind(Kind::Float);
    images / 255.0
}

// --- Drawing ---

/// One movement of the pen in a box about 0.6 wide and 1 high, y downwards.
enum Stroke {
    /// Straight lines from point to point.
    Line(&'static [(f64, f64)]),
    /// Part of an axis-parallel ellipse: centre, radii, first and last angle in degrees (0 right, 90 down).
    Arc((f64, f64), (f64, f64), (f64, f64)),
}
use Stroke::{Arc, Line};

/// The ways in which people write one character.
type Styles = &'static [&'static [Stroke]];

const DIGITS: [Styles; 10] = [
    &[
        &[Arc((0.30, 0.50), (0.30, 0.50), (-90.0, 275.0))],
        &[Arc((0.30, 0.50), (0.24, 0.50), (-70.0, 285.0))],
        &[Arc((0.32, 0.52), (0.32, 0.46), (-100.0, 250.0))],
    ],
    &[
        &[Line(&[(0.30, 0.00), (0.30, 1.00)])],
        &[Line(&[(0.10, 0.24), (0.30, 0.00), (0.30, 1.00)])],
        &[Line(&[(0.12, 0.20), (0.30, 0.00), (0.30, 1.00)]), Line(&[(0.08, 1.00), (0.52, 1.00)])],
    ],
    &[
        &[Arc((0.29, 0.28), (0.27, 0.28), (-170.0, 35.0)), Line(&[(0.51, 0.44), (0.02, 1.00), (0.60, 1.00)])],
        &[
            Arc((0.29, 0.28), (0.26, 0.28), (-160.0, 40.0)),
            Line(&[(0.49, 0.46), (0.12, 0.90)]),
            Arc((0.12, 0.88), (0.12, 0.11), (60.0, 290.0)),
            Line(&[(0.16, 0.78), (0.40, 0.98), (0.62, 0.92)]),
        ],
    ],
    &[
        &[Arc((0.26, 0.26), (0.26, 0.26), (-160.0, 90.0)), Arc((0.26, 0.76), (0.30, 0.24), (-90.0, 155.0))],
        &[Line(&[(0.03, 0.00), (0.53, 0.00), (0.24, 0.41)]), Arc((0.24, 0.71), (0.32, 0.29), (-90.0, 150.0))],
    ],
    &[
        &[Line(&[(0.14, 0.00), (0.04, 0.58), (0.60, 0.56)]), Line(&[(0.46, 0.12), (0.42, 1.00)])],
        &[Line(&[(0.44, 1.00), (0.46, 0.00), (0.00, 0.68), (0.62, 0.68)])],
        &[Line(&[(0.04, 0.06), (0.08, 0.50), (0.50, 0.44)]), Line(&[(0.52, 0.00), (0.48, 1.00)])],
    ],
    &[
        &[Line(&[(0.55, 0.00), (0.12, 0.00), (0.06, 0.46)]), Arc((0.25, 0.70), (0.31, 0.30), (-130.0, 145.0))],
        &[
            Line(&[(0.10, 0.02), (0.08, 0.46)]),
            Arc((0.23, 0.71), (0.32, 0.29), (-115.0, 140.0)),
            Line(&[(0.10, 0.02), (0.58, 0.00)]),
        ],
    ],
    &[
        &[Arc((0.56, 0.62), (0.55, 0.62), (-95.0, -185.0)), Arc((0.30, 0.72), (0.28, 0.28), (-180.0, 180.0))],
        &[Line(&[(0.40, 0.00), (0.06, 0.60)]), Arc((0.27, 0.74), (0.25, 0.26), (-190.0, 170.0))],
    ],
    &[
        &[Line(&[(0.00, 0.02), (0.58, 0.00), (0.22, 1.00)])],
        &[Line(&[(0.00, 0.02), (0.58, 0.00), (0.24, 1.00)]), Line(&[(0.14, 0.50), (0.58, 0.48)])],
        &[Line(&[(0.02, 0.18), (0.04, 0.02), (0.56, 0.00), (0.30, 0.50), (0.24, 1.00)])],
    ],
    &[
        &[Arc((0.30, 0.25), (0.23, 0.25), (-270.0, 90.0)), Arc((0.30, 0.75), (0.29, 0.25), (-90.0, 270.0))],
        &[
            Arc((0.30, 0.24), (0.25, 0.24), (-20.0, -230.0)),
            Line(&[(0.14, 0.42), (0.46, 0.62)]),
            Arc((0.29, 0.76), (0.26, 0.24), (-40.0, 215.0)),
            Line(&[(0.08, 0.62), (0.53, 0.16)]),
        ],
    ],
    &[
        &[Arc((0.28, 0.28), (0.27, 0.28), (0.0, 360.0)), Line(&[(0.56, 0.10), (0.50, 1.00)])],
        &[Arc((0.28, 0.28), (0.27, 0.28), (-10.0, 350.0)), Arc((0.08, 0.32), (0.48, 0.68), (-15.0, 80.0))],
    ],
];

const LETTERS: [Styles; 10] = [
    &[&[Line(&[(0.00, 1.00), (0.30, 0.00), (0.62, 1.00)]), Line(&[(0.11, 0.64), (0.50, 0.64)])]],
    &[&[Line(&[(0.55, 0.00), (0.00, 0.00), (0.00, 1.00), (0.57, 1.00)]), Line(&[(0.00, 0.49), (0.45, 0.49)])]],
    &[&[Line(&[(0.57, 0.00), (0.00, 0.00), (0.00, 1.00)]), Line(&[(0.00, 0.48), (0.45, 0.48)])]],
    &[&[Line(&[(0.00, 0.00), (0.00, 1.00)]), Line(&[(0.58, 0.00), (0.58, 1.00)]), Line(&[(0.00, 0.50), (0.58, 0.50)])]],
    &[&[Line(&[(0.00, 0.00), (0.00, 1.00)]), Line(&[(0.55, 0.00), (0.00, 0.56)]), Line(&[(0.18, 0.40), (0.60, 1.00)])]],
    &[&[Line(&[(0.00, 0.00), (0.00, 1.00), (0.55, 1.00)])]],
    &[&[Line(&[(0.00, 1.00), (0.06, 0.00), (0.35, 0.62), (0.64, 0.00), (0.70, 1.00)])]],
    &[&[Line(&[(0.00, 0.00), (0.64, 0.00)]), Line(&[(0.32, 0.00), (0.32, 1.00)])]],
    &[&[Line(&[(0.00, 0.00), (0.60, 1.00)]), Line(&[(0.60, 0.00), (0.00, 1.00)])]],
    &[&[Line(&[(0.00, 0.00), (0.30, 0.48)]), Line(&[(0.60, 0.00), (0.30, 0.48), (0.28, 1.00)])]],
];

/// Image i shows `styles[classes[i]]` and depends on (seed, stream, i) only.
fn draw(classes: &[usize], styles: &[Styles], seed: u64, stream: u64) -> Tensor {
    let mut pixels = vec![0_u8; classes.len() * PIXELS];
    let streams = Rng::new(seed, stream).bits();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let share = classes.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (t, (images, classes)) in pixels.chunks_mut(share * PIXELS).zip(classes.chunks(share)).enumerate() {
            scope.spawn(move || {
                for (i, (image, &class)) in images.chunks_exact_mut(PIXELS).zip(classes).enumerate() {
                    let mut rng = Rng::new(streams, (t * share + i) as u64);
                    let styles = styles[class];
                    write(styles[rng.below(styles.len())], &mut rng, image);
                }
            });
        }
    });
    to_images(&pixels)
}

/// Writes one character with a random hand.
fn write(strokes: &[Stroke], rng: &mut Rng, image: &mut [u8]) {
    let mut lines: Vec<Vec<(f64, f64)>> = strokes.iter().map(|s| trace(s, rng)).collect();

    // The hand: bend, then stretch, slant and turn; height about 20 pixels as in MNIST.
    let height = rng.between(15.5, 20.5);
    let width = height * rng.between(0.7, 1.2);
    let slant = 0.22 * rng.normal();
    let (sin, cos) = (0.14 * rng.normal()).sin_cos();
    let bend = [0.06 * rng.normal(), 0.06 * rng.normal()];
    let phase = [rng.between(0.0, 2.0 * PI), rng.between(0.0, 2.0 * PI)];
    for (x, y) in lines.iter_mut().flatten() {
        let u = *x - 0.3 + bend[0] * (4.0 * *y + phase[0]).sin();
        let v = *y - 0.5 + bend[1] * (6.0 * *x + phase[1]).sin();
        let (u, v) = (width * (u - slant * v), height * v);
        (*x, *y) = (cos * u - sin * v, sin * u + cos * v);
    }

    // Centre of mass in the middle of the image, within a pixel or two.
    let middle = (SIDE as f64 - 1.0) / 2.0;
    let (cx, cy) = centre(&lines);
    let shift = (middle - cx + 0.8 * rng.normal(), middle - cy + 0.8 * rng.normal());
    for (x, y) in lines.iter_mut().flatten() {
        (*x, *y) = (*x + shift.0, *y + shift.1);
    }

    let radius = rng.between(0.55, 1.55);
    let darkness = rng.between(0.75, 1.0);
    let mut ink = [0.0_f64; PIXELS];
    for line in &lines {
        for ends in line.windows(2) {
            stamp(ends[0], ends[1], radius, &mut ink);
        }
    }
    for (pixel, ink) in image.iter_mut().zip(ink) {
        if ink > 0.0 {
            let grain = 1.0 - 0.12 * rng.normal().abs();
            *pixel = (255.0 * darkness * ink * grain).round().clamp(0.0, 255.0) as u8;
        }
    }
}

/// The points of a stroke, with an unsteady hand: ends, corners, centres, radii and angles all miss a little.
fn trace(stroke: &Stroke, rng: &mut Rng) -> Vec<(f64, f64)> {
    const MISS: f64 = 0.03;
    match stroke {
        Line(corners) => {
            let corners: Vec<(f64, f64)> =
                corners.iter().map(|&(x, y)| (x + MISS * rng.normal(), y + MISS * rng.normal())).collect();
            // Points in between, for the bend to act on.
            let mut points = vec![corners[0]];
            for ends in corners.windows(2) {
                let ((x0, y0), (x1, y1)) = (ends[0], ends[1]);
                points.extend((1..=4).map(|k| f64::from(k) / 4.0).map(|t| (x0 + t * (x1 - x0), y0 + t * (y1 - y0))));
            }
            points
        }
        Arc((cx, cy), (rx, ry), (from, to)) => {
            let (cx, cy) = (cx + MISS * rng.normal(), cy + MISS * rng.normal());
            let (rx, ry) = (rx * (1.0 + 3.0 * MISS * rng.normal()), ry * (1.0 + 2.0 * MISS * rng.normal()));
            let (from, to) = (from + 10.0 * rng.normal(), to + 14.0 * rng.normal());
            let pieces = ((to - from).abs() / 18.0).ceil().max(1.0);
            (0..=pieces as u32)
                .map(|k| (from + (to - from) * f64::from(k) / pieces).to_radians())
                .map(|a| (cx + rx * a.cos(), cy + ry * a.sin()))
                .collect()
        }
    }
}

/// Centre of mass of lines of constant thickness.
fn centre(lines: &[Vec<(f64, f64)>]) -> (f64, f64) {
    let (mut mass, mut x, mut y) = (0.0, 0.0, 0.0);
    for ends in lines.iter().flat_map(|l| l.windows(2)) {
        let ((x0, y0), (x1, y1)) = (ends[0], ends[1]);
        let length = (x1 - x0).hypot(y1 - y0);
        mass += length;
        x += length * (x0 + x1) / 2.0;
        y += length * (y0 + y1) / 2.0;
    }
    (x / mass, y / mass)
}

/// Draws a line with round ends: full ink within `radius`, fading to none over the pixel around it.
fn stamp(a: (f64, f64), b: (f64, f64), radius: f64, ink: &mut [f64; PIXELS]) {
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let length2 = (dx * dx + dy * dy).max(1e-12);
    let reach = radius + 0.5;
    let range = |a: f64, b: f64| {
        let low = (a.min(b) - reach).ceil().clamp(0.0, SIDE as f64) as usize;
        let high = (a.max(b) + reach).floor().clamp(-1.0, SIDE as f64 - 1.0) + 1.0;
        low..high as usize
    };
    for row in range(a.1, b.1) {
        for column in range(a.0, b.0) {
            let (px, py) = (column as f64 - a.0, row as f64 - a.1);
            let t = ((px * dx + py * dy) / length2).clamp(0.0, 1.0);
            let (ex, ey) = (px - t * dx, py - t * dy);
            let distance = (ex * ex + ey * ey).sqrt();
            let pixel = &mut ink[row * SIDE + column];
            *pixel = pixel.max((reach - distance).clamp(0.0, 1.0));
        }
    }
}
