//! Conformal sets and intervals.

use super::{labels, rows, t};
use support::{all_close, bits, close, refused, values};
use tch::{Device, Kind, Tensor};
use tch_blr::conformal::{ClassSets, Cqr, Score, Uniforms, threshold};
use tch_blr::metrics::{Interval, ks_uniform, threshold_at};
use tch_blr_examples::random::Rng;

#[test]
fn the_thresholds_of_the_reference() {
    let scores = t(&[0.4, 0.1, 0.2, 0.25, 0.9, 0.3, 0.5, 0.55, 0.6]);
    let q = |alpha| threshold(&scores, alpha).unwrap();
    assert_eq!((q(0.1), q(0.2), q(0.05)), (0.9, 0.6, f64::INFINITY));
}

/// k = ⌈(n+1)(1-α)⌉ in whole numbers, whatever the product rounds to; the same for the level of false positives.
#[test]
fn the_rank_of_a_threshold_is_exact() {
    for n in 1..=120_usize {
        let scores = t(&(1..=n).map(|i| i as f64).collect::<Vec<_>>());
        for percent in 1..100_usize {
            let k = ((n + 1) * (100 - percent)).div_ceil(100);
            let expected = if k > n { f64::INFINITY } else { k as f64 };
            assert_eq!(threshold(&scores, percent as f64 / 100.0).unwrap(), expected, "{n} {percent}");
            let level = (n * percent).div_ceil(100) as f64;
            assert_eq!(threshold_at(&scores, percent as f64 / 100.0).unwrap(), level, "{n} {percent}");
        }
    }
}

#[test]
fn the_scores_of_the_reference() {
    let p = rows(&[0.5, 0.3, 0.15, 0.05], 4);
    let u = t(&[0.4]);
    let scores = |score: Score| values(&score.of(&p, Uniforms::Given(&u)).unwrap());
    all_close(&scores(Score::Lac), &[0.5, 0.7, 0.85, 0.95], 1e-15);
    all_close(&scores(Score::Aps), &[0.2, 0.62, 0.86, 0.97], 1e-15);
    all_close(&scores(Score::Raps { lambda: 0.1, k_reg: 1 }), &[0.2, 0.72, 1.06, 1.27], 1e-15);
    // Equal classes have one score, and ranks in the order of their numbers.
    let p = rows(&[0.25, 0.5, 0.25], 3);
    let raps = Score::Raps { lambda: 1.0, k_reg: 1 };
    all_close(&values(&Score::Aps.of(&p, Uniforms::Ones).unwrap()), &[0.75, 0.5, 0.75], 1e-15);
    all_close(&values(&raps.of(&p, Uniforms::Ones).unwrap()), &[1.75, 0.5, 2.75], 1e-15);
}

#[test]
fn sets_hold_what_their_threshold_says() {
    let p = rows(&[0.5, 0.3, 0.2, 0.1, 0.8, 0.1, 0.4, 0.35, 0.25, 0.3, 0.3, 0.4], 3);
    let y = labels(&[0, 1, 1, 2]);
    let of = |sets: &ClassSets, p: &Tensor| sets.sets(p, Uniforms::Ones).unwrap();
    // Scores 1-p of the labels: .5, .2, .65, .6; k = ⌈5·.6⌉ = 3.
    let lac = Score::Lac.calibrate(&p, &y, 0.4, Uniforms::Ones).unwrap();
    close(lac.threshold(), 0.6, 1e-15);
    let found = of(&lac, &p);
    assert_eq!(values(&found.sizes().unwrap()), [1.0, 1.0, 1.0, 1.0]);
    assert_eq!((found.mean_size().unwrap(), found.coverage(&y).unwrap()), (1.0, 0.75));
    // Too few examples: everything.
    let all = Score::Lac.calibrate(&p, &y, 0.1, Uniforms::Ones).unwrap();
    assert_eq!((all.threshold(), of(&all, &p).mean_size().unwrap()), (f64::INFINITY, 3.0));
    // Nothing reaches 1-q: empty, but for the option.
    let unsure = rows(&[0.34, 0.33, 0.33, 0.3, 0.35, 0.35], 3);
    assert_eq!(of(&lac, &unsure).mean_size().unwrap(), 0.0);
    let found = of(&lac.at_least_argmax(), &unsure);
    assert_eq!(values(&found.members().to_kind(Kind::Double)), [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]);
}

#[test]
fn drawn_numbers_are_the_seeds() {
    let p = rows(&[0.5, 0.5], 2).repeat([1000, 1]);
    let of = |seed| Score::Aps.of(&p, Uniforms::Seed(seed)).unwrap();
    assert_eq!(bits(&of(3)), bits(&of(3)));
    assert_ne!(bits(&of(3)), bits(&of(4)));
    // The score of the tied classes is u/2. Above 1.95/√N in one case of a thousand.
    assert!(ks_uniform(&(of(3).select(1, 0) * 2.0)).unwrap() < 1.95 / 1000_f64.sqrt());
}

/// P(x ≤ c) of x ~ Beta(k, n+1-k): that at least k of n uniform numbers are below c.
fn beta_cdf(n: usize, k: usize, c: f64) -> f64 {
    let ln_factorial = |n: usize| (1..=n).map(|i| (i as f64).ln()).sum::<f64>();
    let term = |j: usize| {
        let ln_choose = ln_factorial(n) - ln_factorial(j) - ln_factorial(n - j);
        (ln_choose + j as f64 * c.ln() + (n - j) as f64 * (1.0 - c).ln()).exp()
    };
    (k..=n).map(term).sum::<f64>().min(1.0)
}

const SPLITS: usize = 2000;
const N: usize = 100;
/// ⌈101 · 0.9⌉
const K: usize = 91;

/// n probabilities of three classes, and labels drawn from them.
fn drawn(rng: &mut Rng, n: usize) -> (Tensor, Tensor) {
    let (mut p, mut y) = (Vec::new(), Vec::new());
    for _ in 0..n {
        let e = [0, 1, 2].map(|_| -(1.0 - rng.unit()).ln());

        let sum: f64 = e.iter().sum();
        let row = e.map(|e| e / sum);
        let u = rng.unit();
        y.push(i64::from(u >= row[0]) + i64::from(u >= row[0] + row[1]));
        p.extend(row);
    }
    (rows(&p, 3), labels(&y))
}

/// Over 2000 calibration sets the probability that a set holds the label is distributed as Beta(91, 10): its mean
/// within five standard errors (one of 10⁶ cases), its distribution function by the bound of Dvoretzky, Kiefer,
/// Wolfowitz and Massart at 10⁻⁶.
#[test]
fn coverage_is_distributed_as_beta() {
    let mut rng = Rng::new(1, 0);
    let mut seen = Vec::new();
    // APS with probabilities that are right: the score of the label is uniform on (0, 1), and the coverage is q.
    let aps: Vec<f64> = (0..SPLITS as u64)
        .map(|split| {
            let (p, y) = drawn(&mut rng, N);
            let sets = Score::Aps.calibrate(&p, &y, 0.1, Uniforms::Seed(2 * split)).unwrap();
            // And as it is measured, with 50 further examples.
            let (p, y) = drawn(&mut rng, 50);
            let found = sets.clone().at_least_argmax().sets(&p, Uniforms::Seed(2 * split + 1)).unwrap();
            assert!(found.sizes().unwrap().min().int64_value(&[]) >= 1, "an empty set in split {split}");
            seen.push(sets.sets(&p, Uniforms::Seed(2 * split + 1)).unwrap().coverage(&y).unwrap());
            sets.threshold()
        })
        .collect();
    // LAC with probabilities that are wrong, p(1) uniform and y = 1 with p(1)²: P(1 - p(y) ≤ q) by integration is
    // (1 - (1-q)³)/3 for y = 1 and q - q³/3 for y = 0.
    let lac: Vec<f64> = (0..SPLITS)
        .map(|_| {
            let p: Vec<f64> = (0..N).map(|_| rng.unit()).collect();
            let y: Vec<i64> = p.iter().map(|p| i64::from(rng.unit() < p * p)).collect();
            let p: Vec<f64> = p.iter().flat_map(|p| [1.0 - p, *p]).collect();
            let q = Score::Lac.calibrate(&rows(&p, 2), &labels(&y), 0.1, Uniforms::Ones).unwrap().threshold();
            (1.0 - (1.0 - q).powi(3)) / 3.0 + q - q.powi(3) / 3.0
        })
        .collect();
    let (n, k) = (N as f64, K as f64);
    let mean = k / (n + 1.0);
    let deviation = (mean * (1.0 - mean) / (n + 2.0)).sqrt();
    let bound = ((2.0 / 1e-6_f64).ln() / (2.0 * SPLITS as f64)).sqrt();
    for (name, coverage) in [("APS", aps), ("LAC", lac)] {
        let found = coverage.iter().sum::<f64>() / SPLITS as f64;
        let distance = ks_uniform(&t(&coverage.iter().map(|c| beta_cdf(N, K, *c)).collect::<Vec<_>>())).unwrap();
        println!("{name}: mean {found:.5} ({mean:.5}), distance {distance:.4} (bound {bound:.4})");
        close(found, mean, 5.0 * deviation / (SPLITS as f64).sqrt());
        assert!(distance < bound, "{name}: {distance}");
    }
    let (found, error) = support::mean_and_error(&seen);
    println!("APS as measured: {found:.5} ± {error:.5}");
    close(found, mean, 5.0 * error);
}

#[test]
fn quantile_regression_is_conformalized() {
    let t = |x: [f64; 4]| Tensor::from_slice(&x);
    let before = Interval::new(&t([0.0, 1.0, 2.0, 3.0]), &t([1.0, 2.0, 3.0, 4.0]), 0.5).unwrap();
    let y = t([0.5, 2.3, 1.8, 4.5]);
    let cqr = Cqr::calibrate(&before, &y, 0.25).unwrap();
    assert_eq!(cqr.threshold(), 0.5);
    let after = cqr.interval(&before).unwrap();
    assert_eq!((after.level(), values(after.lower())), (0.75, vec![-0.5, 0.5, 1.5, 2.5]));
    assert_eq!((before.coverage(&y).unwrap(), after.coverage(&y).unwrap()), (0.25, 1.0));
    assert_eq!(after.width().unwrap(), 2.0);
    // Inwards, beyond their middle: empty.
    let wide = Cqr::calibrate(&before, &t([0.4, 1.6, 2.5, 3.5]), 0.25).unwrap();
    close(wide.threshold(), -0.4, 1e-15);
    let narrow = Interval::new(&t([0.0; 4]), &t([0.5; 4]), 0.5).unwrap();
    let empty = wide.interval(&narrow).unwrap();
    assert_eq!((empty.coverage(&t([0.25; 4])).unwrap(), empty.width().unwrap()), (0.0, 0.0));
    // Too few: everything.
    let all = Cqr::calibrate(&before, &y, 0.1).unwrap().interval(&before).unwrap();
    assert_eq!((all.coverage(&y).unwrap(), all.width().unwrap()), (1.0, f64::INFINITY));
    refused(Cqr::calibrate(&all, &y, 0.25), &["lower[0] = -inf"]);
    refused(Cqr::calibrate(&before, &y.narrow(0, 0, 3), 0.25), &["y has shape [3]", "[4]"]);
}

#[test]
fn conformal_sets_refuse_what_they_cannot_use() {
    let (p, y) = (rows(&[0.5, 0.5, 0.25, 0.75], 2), labels(&[0, 1]));
    for alpha in [0.0, 1.0, -0.1, f64::NAN] {
        refused(Score::Lac.calibrate(&p, &y, alpha, Uniforms::Ones), &["alpha = ", "(0, 1)"]);
        refused(threshold(&t(&[1.0]), alpha), &["alpha = "]);
    }
    refused(threshold(&t(&[]), 0.1), &["scores has shape [0]"]);
    refused(threshold(&t(&[0.1, f64::NAN]), 0.1), &["scores[1] is NaN"]);
    refused(Score::Aps.calibrate(&p.narrow(0, 0, 0), &labels(&[]), 0.1, Uniforms::Ones), &["at least one example"]);
    refused(Score::Aps.calibrate(&p, &labels(&[0, 2]), 0.1, Uniforms::Ones), &["labels[1] = 2"]);
    refused(Score::Aps.of(&rows(&[f64::NAN, 0.5], 2), Uniforms::Ones), &["probs[0, 0] = NaN"]);
    refused(Score::Aps.of(&p, Uniforms::Given(&t(&[0.5]))), &["u has shape [1]", "[2]"]);
    refused(Score::Aps.of(&p, Uniforms::Given(&t(&[0.5, 1.5]))), &["u[1] = 1.5"]);
    refused(Score::Raps { lambda: -1.0, k_reg: 1 }.of(&p, Uniforms::Ones), &["lambda = -1"]);
    let sets = Score::Lac.calibrate(&p, &y, 0.5, Uniforms::Ones).unwrap();
    refused(sets.sets(&rows(&[0.2, 0.2, 0.6], 3), Uniforms::Ones), &["probs has 3 classes", "expected 2"]);
    refused(sets.sets(&p, Uniforms::Ones).unwrap().coverage(&labels(&[0])), &["labels has shape [1]", "the sets"]);
    // One class only is no error: every set that is not empty is it.
    let one = Tensor::ones([9, 1], (Kind::Double, Device::Cpu));
    let zeros = labels(&[0; 9]);
    let found = Score::Lac.calibrate(&one, &zeros, 0.5, Uniforms::Ones).unwrap().sets(&one, Uniforms::Ones).unwrap();
    assert_eq!((found.mean_size().unwrap(), found.coverage(&zeros).unwrap()), (1.0, 1.0));
}
