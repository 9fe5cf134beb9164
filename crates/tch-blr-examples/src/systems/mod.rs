//! Other systems that learn one thing after the other, as small examples on this crate's optimizers and posteriors.
//!
//! | name | what carries over from task to task |
//! |---|---|
//! | [`progressive`] | features: columns that are frozen and read |
//! | [`superposition`] | all weights at once, told apart by a key per task |
//! | [`maml`] | an initialization from which a gradient step does much |
//! | [`matching`] | a distance (Siamese), or the examples themselves (nearest neighbour) |
//! | [`low_shot`] | the posterior of a head, as the prior for another domain |
//!
//! What they share is here: their data, what they report, and draws of a few examples per class.

pub mod low_shot;
pub mod maml;
pub mod matching;
pub mod progressive;
pub mod superposition;

use crate::Outcome;
use crate::batches::subset;
use crate::digits::Digits;
use crate::random::Rng;
use std::path::PathBuf;
use tch::Tensor;

/// Digits that are learned first, and those that few examples are given of.
pub const OLD: [i64; 6] = [0, 1, 2, 3, 4, 5];
/// Digits that few examples are given of.
pub const NEW: [i64; 4] = [6, 7, 8, 9];

/// A name and what runs under it.
pub type System = (&'static str, fn(&Setting) -> Outcome<Vec<Finding>>);

/// All systems.
pub const SYSTEMS: [System; 5] = [
    ("progressive", progressive::run),
    ("superposition", superposition::run),
    ("maml", maml::run),
    ("matching", matching::run),
    ("low_shot", low_shot::run),
];

/// What a system runs on.
#[derive(Debug)]
pub struct Setting {
    /// Training and test digits.
    pub data: Digits,
    /// Where pictures go.
    pub folder: PathBuf,
}

impl Setting {
    /// Images and labels of the training (or test) digits of these classes, at most `most` of them.
    pub fn part(&self, training: bool, classes: &[i64], most: usize) -> (Tensor, Tensor) {
        let Digits { train_images, train_labels, test_images, test_labels, .. } = &self.data;
        let (images, labels) = if training { (train_images, train_labels) } else { (test_images, test_labels) };
        let rows = subset(labels, classes);
        let rows = rows.narrow(0, 0, rows.size()[0].min(most as i64));
        (images.index_select(0, &rows), labels.index_select(0, &rows))
    }
}

/// One line of the table: what was looked at, how it came out, and what a right implementation gives.
#[derive(Debug)]
pub struct Finding {
    /// What was looked at.
    pub what: String,
    /// How it came out.
    pub found: String,
    /// What a right implementation gives.
    pub expected: String,
    /// Whether it is so.
    pub holds: bool,
}

impl Finding {
    /// A line of these parts.
    pub fn new(what: &str, found: impl Into<String>, expected: &str, holds: bool) -> Finding {
        Finding { what: what.to_owned(), found: found.into(), expected: expected.to_owned(), holds }
    }
}

/// Mean and its standard error.
pub fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0);
    (mean, (variance / n).sqrt())
}

/// Positions of `shots` examples of each class, drawn without replacement: `[shots · classes]`, class by class.
///
/// # Panics
/// If there are fewer of a class.
pub fn draw(labels: &Tensor, classes: &[i64], shots: usize, rng: &mut Rng) -> Tensor {
    let rows: Vec<Tensor> = classes
        .iter()
        .map(|&class| {
            let of_class = subset(labels, &[class]);
            let mut order: Vec<i64> = (0..of_class.size()[0]).collect();
            rng.shuffle(&mut order);
            of_class.index_select(0, &Tensor::from_slice(&order[..shots]))
        })
        .collect();
    Tensor::cat(&rows, 0)
}
