//! A digit more for a trained classifier, without its data: memories of all sizes, with soft or hard labels.
//!
//! USPS, odd against even, 257 weights, penalty ½δ‖w‖² with δ = 25. The base model knows the digits 0-8 (N = 6,647),
//! the new data are the 644 nines; the batch is trained on both. Exact optima in f64.

use super::{Figure, Job, Section, mean_and_sd, plus_minus};
use crate::logistic::{Examples, Logistic, Objective};
use crate::usps::Usps;
use crate::{Outcome, data};
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr::{Prior, selection};

const DELTA: f64 = 25.0;
/// Weights: a constant and 256 pixels.
const FEATURES: i64 = 257;

/// Which part of the past is kept, and how.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// The memory with soft labels, and a quadratic around the base.
    KPrior,
    /// The memory with its labels.
    Replay,
    /// The K-prior with the curvature of the examples left out.
    Diagonal,
    /// The same with the whole curvature.
    Full,
    /// The K-prior with each example of the memory counting for N/M.
    Weighted,
}

/// Examples to keep: those of highest λ, or any.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Choice {
    /// Of highest λ.
    Lambda,
    /// Any, by a seed.
    Random(u64),
}

/// Share of the past in %, then accuracy in % and relative distance for K-prior and replay by λ, and by chance (3 seeds
/// of another generator): an independent computation of the same optima.
pub const REFERENCE: [(f64, [f64; 4], [f64; 4]); 6] = [
    (100.0, [93.12, 0.000, 93.12, 0.000], [93.12, 0.0, 93.12, 0.0]),
    (50.0, [93.17, 0.026, 93.32, 0.106], [93.02, 0.080, 92.38, 0.273]),
    (20.0, [92.97, 0.104, 92.28, 0.430], [92.16, 0.139, 90.63, 0.471]),
    (10.0, [92.63, 0.156, 71.80, 0.746], [91.11, 0.174, 88.52, 0.597]),
    (5.0, [91.58, 0.185, 48.38, 0.912], [90.18, 0.204, 85.32, 0.701]),
    (2.0, [90.38, 0.205, 46.49, 0.951], [88.03, 0.226, 79.17, 0.802]),
];

/// Additions to the K-prior by λ: method, share, accuracy, distance.
pub const ADDITIONS: [(Method, &str, f64, [f64; 2]); 6] = [
    (Method::Diagonal, "and the diagonal curvature of the rest", 10.0, [92.48, 0.157]),
    (Method::Full, "and the full curvature of the rest", 10.0, [93.32, 0.048]),
    (Method::Weighted, "weighted by N/M", 10.0, [93.22, 0.206]),
    (Method::Diagonal, "and the diagonal curvature of the rest", 2.0, [90.53, 0.204]),
    (Method::Full, "and the full curvature of the rest", 2.0, [93.32, 0.052]),
    (Method::Weighted, "weighted by N/M", 2.0, [93.22, 0.400]),
];

/// Accuracy in % of the base and of the batch.
pub const ENDS: [f64; 2] = [92.08, 93.12];

/// The data, the base model and the batch's.
#[derive(Debug)]
pub struct AddDigit {
    past: Examples,
    new: Examples,
    test: Examples,
    base: Tensor,
    batch: Tensor,
}

impl AddDigit {
    /// # Errors
    /// If the data cannot be read.
    pub fn load(data: &Path) -> Outcome<AddDigit> {
        let parity = |u: &Usps| Examples { x: u.features(), y: u.odd() };
        let train = Usps::load(data, "train")?;
        let (past, new) = (parity(&train.of(&[0, 1, 2, 3, 4, 5, 6, 7, 8])), parity(&train.of(&[9])));
        let model = Logistic::new(FEATURES);
        model.fit(&Objective::new().decay(&model, DELTA)?.loss(&past)?)?;
        let base = model.weights();
        model.fit(&Objective::new().decay(&model, DELTA)?.loss(&past)?.loss(&new)?)?;
        Ok(AddDigit { past, new, test: parity(&Usps::load(data, "test")?), base, batch: model.weights() })
    }

    /// Accuracies of the base and of the batch.
    pub fn ends(&self) -> [f64; 2] {
        [&self.base, &self.batch].map(|w| self.scores(w)[0])
    }

    /// Accuracy on the test set in %, and ‖w - w_batch‖/‖w_batch‖.
    fn scores(&self, w: &Tensor) -> [f64; 2] {
        let model = Logistic::new(FEATURES);
        model.set(w);
        let off = (w - &self.batch).norm().double_value(&[]) / self.batch.norm().double_value(&[]);
        [100.0 * model.accuracy(&self.test), off]
    }

    /// Accuracy in % and relative distance of what a method makes of the base, the new data and `percent` of the past.
    ///
    /// # Errors
    /// If an optimum is not found.
    pub fn run(&self, method: Method, choice: Choice, percent: f64) -> Outcome<[f64; 2]> {
        let model = Logistic::new(FEATURES);
        model.set(&self.base);
        let scores = match choice {
            Choice::Lambda => self.past.memory().lambda(|x| model.forward(x))?,
            Choice::Random(seed) => selection::random_scores(self.past.len(), seed),
        };
        // As many of each class.
        let n = self.past.len();
        let half = (percent / 100.0 * n as f64) as usize / 2;
        let k = if percent == 100.0 { n } else { 2 * half };
        let (kept, rest) = self.past.split(&selection::class_balanced(&scores, &self.past.y.to_kind(Kind::Int64), k)?);
        let new = Objective::new().loss(&self.new)?;
        let weight = if method == Method::Weighted { n as f64 / k as f64 } else { 1.0 };
        let objective = match method {
            Method::Replay => new.decay(&model, DELTA)?.loss(&kept)?,
            Method::KPrior | Method::Weighted => new.after(&model.isotropic(DELTA)?).soft(&kept, weight, &model)?,
            Method::Diagonal => {
                let q = model.laplace(&rest.x, Prior::isotropic(DELTA))?;
                new.after_diagonal(&q).soft(&kept, 1.0, &model)?
            }
            Method::Full => {
                let q = model.full_laplace(&rest.x, &model.isotropic(DELTA)?)?;
                new.after(&q).soft(&kept, 1.0, &model)?
            }
        };
        model.fit(&objective)?;
        Ok(self.scores(&model.weights()))
    }
}

/// The table beside the reference.
///
/// # Errors
/// If the data are not there, or an optimum is not found.
pub fn table(job: &Job) -> Outcome<Section> {
    let data = data::folder_with("usps")?;
    let usps = AddDigit::load(&data)?;
    let seeds = job.seeds(3);
    let (mut rows, mut figures) = (Vec::new(), Vec::new());
    let mut cell = |row: &str, published: [f64; 2], runs: &[[f64; 2]]| {
        let each = [0, 1].map(|i| mean_and_sd(&runs.iter().map(|r| r[i]).collect::<Vec<_>>()));
        for ((what, published), (ours, sd)) in ["accuracy", "distance"].iter().zip(published).zip(each) {
            let seeds = runs.len() as u64;
            figures.push(Figure {
                row: format!("{row}: {what}"),
                published: Some(published),
                ours,
                sd,
                seeds,
                seconds: None,
            });
        }
        let [accuracy, distance] = each;
        let reference = format!("[{:.2}, {:.3}]", published[0], published[1]);
        format!("{}, {} {reference}", plus_minus(accuracy, 2), plus_minus(distance, 3))
    };
    for (percent, by_lambda, by_chance) in REFERENCE {
        let mut cells = vec![format!("{percent} %")];
        for (reference, chance) in [(by_lambda, false), (by_chance, true)] {
            for (method, name, at) in [(Method::KPrior, "K-prior", 0), (Method::Replay, "replay", 2)] {
                let runs = if chance && percent < 100.0 {
                    (0..seeds).map(|s| usps.run(method, Choice::Random(s), percent)).collect::<Outcome<Vec<_>>>()?
                } else {
                    vec![usps.run(method, Choice::Lambda, percent)?]
                };
                let name = format!("{name}, {}, {percent} %", if chance { "random" } else { "top-λ" });
                cells.push(cell(&name, [reference[at], reference[at + 1]], &runs));
            }
        }
        rows.push(cells);
    }
    for (method, name, percent, reference) in ADDITIONS {
        let run = usps.run(method, Choice::Lambda, percent)?;
        let text = cell(&format!("K-prior, top-λ, {percent} %, {name}"), reference, &[run]);
        rows.push(vec![format!("{percent} %, {name}"), text, String::new(), String::new(), String::new()]);
    }
    let [base, batch] = usps.ends();
    for ((row, published), ours) in ["base: accuracy", "batch: accuracy"].iter().zip(ENDS).zip([base, batch]) {
        let (row, published) = ((*row).to_owned(), Some(published));
        figures.push(Figure { row, published, ours, sd: None, seeds: 1, seconds: None });
    }
    let header = ["memory", "K-prior, top-λ", "replay, top-λ", "K-prior, random", "replay, random"];
    Ok(Section {
        title: "USPS, a digit more for a trained classifier".to_owned(),
        text: format!(
            "Odd against even, base on the digits 0-8 ({base:.2} %), then the nines without the past (batch {batch:.2} \
             %), δ = 25, exact optima. Memory: as many examples of each class, by λ or at random (mean ± standard \
             deviation over {seeds} seeds). Test accuracy in %, ‖w - w_batch‖/‖w_batch‖, \\[reference: an independent \
             computation of the same optima; for random memories by another generator, mean of 3 seeds\\]. The \
             examples of highest λ are right for soft labels and wrong for hard ones; 2 % of the examples and the \
             curvature of the others are nearly the batch."
        ),
        header: header.map(str::to_owned).into(),
        rows,
        figures,
    })
}
