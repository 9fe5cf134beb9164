//! Temperature, calibration, selection, foreign inputs.

use super::{labels, predicted, rows, t};
use support::{all_close, close, refused, values};
use tch::{Kind, Tensor};
use tch_blr::metrics::{
    RiskCoverage, Temperature, adaptive_ece, adaptive_reliability, auroc, classwise_ece, ece, fpr_at, nll, reliability,
    selective, selective_by, threshold_at,
};
use tch_blr_examples::random::Rng;

#[test]
fn the_temperature_of_the_reference() {
    let z = rows(&[2.0, 0.0, 0.0, 1.0, 0.0, -1.0, 0.0, 3.0, 0.0, 0.0, 0.0, 1.0, 1.5, 1.0, 0.0], 3);
    let y = labels(&[0, 1, 1, 2, 0]);
    let found = Temperature::fit(&z, &y).unwrap();
    close(found.value(), 0.644_402_384_230_015_5, 1e-14);
    assert!(!found.at_bound());
    close(nll(&found.apply(&z).unwrap(), &y).unwrap(), 0.536_341_357_201_683_7, 1e-15);
    close(nll(&Temperature::new(1.0).unwrap().apply(&z).unwrap(), &y).unwrap(), 0.579_529_801_271_201_1, 1e-15);
    // Of probabilities it is that of their logarithms, whose softmax they are.
    let averaged = Temperature::fit_averaged(&z.softmax(1, Kind::Double), &y).unwrap();
    close(averaged.value(), found.value(), 1e-13);
    let p = averaged.apply_averaged(&z.softmax(1, Kind::Double)).unwrap();
    all_close(&values(&p), &values(&found.apply(&z).unwrap()), 1e-13);
}

#[test]
fn a_temperature_that_does_not_exist_is_at_its_bound() {
    let fit = |z: &[f64], c, y: &[i64]| Temperature::fit(&rows(z, c), &labels(y)).unwrap();
    // Every label has the largest logit: surer is always better.
    let right = fit(&[2.0, 0.0, 0.0, 1.0], 2, &[0, 1]);
    assert!(right.value() == Temperature::LOWEST && right.at_bound());
    // No better than chance: less sure is always better.
    let wrong = fit(&[2.0, 0.0, 0.0, 1.0], 2, &[1, 0]);
    assert!(wrong.value() == Temperature::HIGHEST && wrong.at_bound());
    // Nothing to choose.
    for same in [fit(&[3.0, 3.0, -1.0, -1.0], 2, &[0, 1]), fit(&[3.0, -1.0], 1, &[0, 0])] {
        assert!(same.value() == 1.0 && !same.at_bound());
    }
    // An extreme temperature leaves probabilities.
    let p = right.apply(&rows(&[1e4, -1e4, 300.0, 300.0], 2)).unwrap();
    assert_eq!(values(&p), [1.0, 0.0, 0.5, 0.5]);
    // A probability of zero at a label costs as much as in `nll`.
    let p = rows(&[1.0, 0.0, 0.25, 0.75, 0.5, 0.5], 2);
    assert!(Temperature::fit_averaged(&p, &labels(&[1, 1, 0])).unwrap().value() > 1.0);
}

#[test]
fn an_excluded_class_plays_no_part() {
    let excluded = rows(&[2.0, 0.0, f64::NEG_INFINITY, 0.0, 1.0, f64::NEG_INFINITY, 0.0, 0.5, f64::NEG_INFINITY], 3);
    let (without, y) = (excluded.narrow(1, 0, 2), labels(&[0, 1, 0]));
    let [all, two] = [&excluded, &without].map(|z| Temperature::fit(z, &y).unwrap());
    close(all.value(), two.value(), 1e-14);
    all_close(&values(&all.apply(&excluded).unwrap().narrow(1, 0, 2)), &values(&two.apply(&without).unwrap()), 1e-15);
    refused(Temperature::fit(&excluded, &labels(&[0, 2, 0])), &["labels[1] = 2", "-inf"]);
    refused(two.apply(&rows(&[0.0, 0.0, f64::NEG_INFINITY, f64::NEG_INFINITY], 2)), &["logits[1]", "every class"]);
}

#[test]
fn temperatures_refuse_what_they_cannot_use() {
    let (z, y) = (rows(&[1.0, 0.0, 0.0, 1.0], 2), labels(&[0, 1]));
    let one = Temperature::new(1.0).unwrap();
    refused(Temperature::fit(&rows(&[1.0, f64::NAN, 0.0, 1.0], 2), &y), &["logits[0, 1] = NaN"]);
    refused(one.apply(&rows(&[1.0, 0.0, 0.0, f64::INFINITY], 2)), &["logits[1, 1] = inf"]);
    refused(Temperature::fit(&z.view([4]), &y), &["logits has shape [4]", "[N, C]"]);
    refused(Temperature::fit(&z.narrow(0, 0, 0), &labels(&[])), &["logits has shape [0, 2]"]);
    refused(Temperature::fit(&z, &labels(&[0, 2])), &["labels[1] = 2", "0..2"]);
    refused(Temperature::fit(&z, &labels(&[0])), &["labels has shape [1]", "[2] to match logits"]);
    refused(Temperature::fit_averaged(&(z * 2.0), &y), &["probs[0, 0] = 2"]);
    for bad in [0.0, -1.0, f64::NAN, 1e4] {
        refused(Temperature::new(bad), &["temperature from 0.001 to 1000"]);
    }
}

const CONFIDENCE: [f64; 8] = [0.95, 0.9, 0.8, 0.7, 0.6, 0.55, 1.0, 0.35];
const RIGHT: [bool; 8] = [true, true, false, true, false, false, true, true];

#[test]
fn the_calibration_errors_of_the_reference() {
    let (p, y) = predicted(&CONFIDENCE, &RIGHT);
    close(ece(&p, &y, 10).unwrap(), 0.381_25, 1e-15);
    close(adaptive_ece(&p, &y, 4).unwrap(), 0.143_75, 1e-15);
    close(adaptive_ece(&p, &y, 2).unwrap(), 0.106_25, 1e-15);
    // The reference puts an edge into the bin to its right, so that .8 and .6 have to be a little above. On the edge
    // they are to its left, as in Guo et al.: (.95 + .9 + 1 - 3, .8 + .7 - 1, .6 + .55, .35 - 1).
    let (above, _) = predicted(&CONFIDENCE.map(|c| if c == 0.8 || c == 0.6 { c + 1e-12 } else { c }), &RIGHT);
    close(ece(&above, &y, 5).unwrap(), 0.268_75, 1e-12);
    close(ece(&p, &y, 5).unwrap(), (0.15 + 0.5 + 1.15 + 0.65) / 8.0, 1e-15);
}

#[test]
fn an_edge_that_rounding_moves_is_still_an_edge() {
    // 10·0.7 and 10·0.6 round to 7 and 6, and 100·0.07 to more than 7: each is in the bin that it closes.
    for (confidence, bins, bin) in [(0.7, 10, 6), (0.6, 10, 5), (0.07, 100, 6), (0.29, 100, 28), (0.58, 100, 57)] {
        let others = (1.0 - confidence) / 99.0;
        let p: Vec<f64> = std::iter::once(confidence).chain(std::iter::repeat_n(others, 99)).collect();
        let table = reliability(&rows(&p, 100), &labels(&[0]), bins).unwrap();
        assert_eq!(table.bins.iter().position(|b| b.count == 1), Some(bin), "{confidence} of {bins}");
    }
}

#[test]
fn bins_of_equal_mass_keep_ties_together() {
    // Four at .9, of which the first has two below it: bin ⌊3·2/6⌋ = 1, and bin 2 is left out.
    let (p, y) = predicted(&[0.9, 0.5, 0.9, 0.6, 0.9, 0.9], &[true, true, false, false, true, true]);
    let table = adaptive_reliability(&p, &y, 3).unwrap();
    let found: Vec<_> = table.bins.iter().map(|b| (b.count, b.lower, b.upper, b.accuracy)).collect();
    assert_eq!(found, [(2, 0.0, 0.6, 0.5), (4, 0.6, 0.9, 0.75)]);
    close(table.ece(), (2.0 * 0.05 + 4.0 * 0.15) / 6.0, 1e-15);
    // More bins than examples: each by itself.
    close(adaptive_ece(&p.narrow(0, 1, 3), &y.narrow(0, 1, 3), 50).unwrap(), (0.5 + 0.9 + 0.6) / 3.0, 1e-15);
}

#[test]
fn every_class_is_calibrated_by_itself() {
    let p = rows(&[0.75, 0.25, 0.75, 0.25, 0.25, 0.75, 0.25, 0.75], 2);
    let y = labels(&[0, 1, 1, 1]);
    // Class 0: .75 is right once of two, .25 never. Class 1: .25 once of two, .75 always.
    close(classwise_ece(&p, &y, 4).unwrap(), 0.25, 1e-15);
    // The confidence alone sees (.75, .75, .75, .75) and three right.
    assert_eq!(ece(&p, &y, 4).unwrap(), 0.0);
    // One class only is what it is.
    assert_eq!(classwise_ece(&t(&[1.0, 1.0]).view([2, 1]), &labels(&[0, 0]), 4).unwrap(), 0.0);
}

#[test]
fn the_debiased_square_is_without_bias() {
    let (p, y) = predicted(&[0.75, 0.75, 0.75, 0.75, 0.4], &[true, true, true, false, true]);
    // Of the bin of four: 0² - (3/4)(1/4)/3; a bin of one says nothing.
    close(reliability(&p, &y, 10).unwrap().debiased_square(), -1.0 / 16.0, 1e-15);
    // Calibrated predictions, 1000 times 50 examples: 0 on average, where the plain square is about Σ p(1-p)/N.
    let mut rng = Rng::new(0, 1);
    let each: Vec<f64> = (0..1000)
        .map(|_| {
            let confidence: Vec<f64> = (0..50).map(|i| if i % 2 == 0 { 0.62 } else { 0.87 }).collect();
            let right: Vec<bool> = confidence.iter().map(|c| rng.unit() < *c).collect();
            let (p, y) = predicted(&confidence, &right);
            reliability(&p, &y, 5).unwrap().debiased_square()
        })
        .collect();
    let (mean, error) = support::mean_and_error(&each);
    assert!(mean.abs() < 5.0 * error && error < 5e-4, "{mean} ± {error}");
}

fn risk(confidence: &[f64], wrong: &[bool]) -> RiskCoverage {
    let correct: Vec<bool> = wrong.iter().map(|w| !w).collect();
    selective_by(&t(confidence), &Tensor::from_slice(&correct)).unwrap()
}

#[test]
fn the_selective_risks_of_the_reference() {
    let confidence = [0.95, 0.9, 0.8, 0.7, 0.6, 0.55];
    let wrong = [false, false, true, false, true, true];
    let found = risk(&confidence, &wrong);
    close(found.aurc(), 0.247_222_222_22, 5e-12);
    close(found.oracle(), 0.191_666_666_67, 5e-12);
    close(found.excess(), 0.247_222_222_22 - 0.191_666_666_67, 1e-11);
    close(found.auroc().unwrap(), 0.888_888_888_89, 5e-12);
    close(found.augrc(), 0.152_777_777_78, 5e-12);
    assert_eq!(found.curve()[2], (0.5, 1.0 / 3.0));
    // The same by class probabilities.
    let (p, y) = predicted(&confidence, &wrong.map(|w| !w));
    assert_eq!(selective(&p, &y).unwrap(), found);
}

#[test]
fn all_right_and_all_wrong_have_values() {
    let right = risk(&[0.1, 0.7, 0.7], &[false; 3]);
    assert_eq!((right.aurc(), right.oracle(), right.augrc()), (0.0, 0.0, 0.0));
    refused(right.auroc(), &["all 3 answers are right"]);
    let wrong = risk(&[0.1, 0.7], &[true; 2]);
    assert_eq!((wrong.aurc(), wrong.oracle(), wrong.excess(), wrong.augrc()), (1.0, 1.0, 0.0, 0.5));
    refused(wrong.auroc(), &["all 2 answers are wrong"]);
}

#[test]
fn ties_count_as_expected_over_their_orders() {
    // One wrong of three that are tied, after one right: at place 2, 3 or 4.
    let tied = risk(&[0.9, 0.5, 0.5, 0.5], &[false, true, false, false]);
    let orders = [1, 2, 3].map(|place| {
        let wrong: Vec<bool> = (0..4).map(|i| i == place).collect();
        risk(&[0.9, 0.8, 0.7, 0.6], &wrong)
    });
    let mean = |f: fn(&RiskCoverage) -> f64| orders.iter().map(f).sum::<f64>() / 3.0;
    close(tied.aurc(), mean(RiskCoverage::aurc), 1e-15);
    close(tied.augrc(), mean(RiskCoverage::augrc), 1e-15);
    close(tied.auroc().unwrap(), mean(|r| r.auroc().unwrap()), 1e-15);
}

#[test]
fn selection_refuses_what_does_not_fit() {
    let correct = Tensor::from_slice(&[true, false]);
    refused(selective_by(&t(&[0.5, f64::NAN]), &correct), &["confidence[1] is NaN"]);
    refused(selective_by(&t(&[0.5]), &correct), &["correct is Bool [2]", "Bool [1]"]);
    refused(selective_by(&t(&[0.5, 0.6]), &t(&[1.0, 0.0])), &["correct is Double"]);
    refused(selective_by(&t(&[0.5, 0.6]), &Tensor::new()), &["correct is undefined"]);
    refused(selective_by(&t(&[]), &Tensor::from_slice::<bool>(&[])), &["confidence has shape [0]"]);
}

#[test]
fn false_positives_of_the_reference() {
    // There a high score means inside.
    let inside = -t(&[0.9, 0.8, 0.85, 0.7, 0.95, 0.6, 0.88, 0.92, 0.75, 0.5]);
    let outside = -t(&[0.4, 0.65, 0.3, 0.55, 0.52]);
    assert_eq!((threshold_at(&inside, 0.95).unwrap(), fpr_at(&inside, &outside, 0.95).unwrap()), (-0.5, 0.6));
    assert_eq!((threshold_at(&inside, 0.8).unwrap(), fpr_at(&inside, &outside, 0.8).unwrap()), (-0.7, 0.0));
    close(auroc(&inside, &outside).unwrap(), 0.92, 1e-15);
    // Fewer than 1/(1-level): all of the inside passes, and ties with its last one do, too.
    assert_eq!(threshold_at(&t(&[3.0, 1.0, 2.0]), 0.95).unwrap(), 3.0);
    assert_eq!(fpr_at(&t(&[3.0, 1.0]), &t(&[3.0, 4.0]), 0.95).unwrap(), 0.5);
    for bad in [0.0, 1.5, -0.1, f64::NAN] {
        refused(fpr_at(&inside, &outside, bad), &["level = ", "(0, 1]"]);
    }
    refused(fpr_at(&inside, &t(&[f64::NAN]), 0.9), &["out_scores[0] is NaN"]);
}
