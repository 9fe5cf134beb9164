use super::*;
use crate::{Error, Result};
use proptest::prelude::*;
use tch::{Kind, Tensor};

/// Four examples, three classes; rows 0 and 2 are right, row 3 is tied between classes 1 and 2.
fn example() -> (Tensor, Tensor) {
    let p = [0.5, 0.25, 0.25, 0.125, 0.75, 0.125, 0.0, 0.0, 1.0, 0.0, 0.5, 0.5];
    (Tensor::from_slice(&p).view([4, 3]), Tensor::from_slice(&[0_i64, 0, 2, 2]))
}

fn near(a: f64, b: f64) {
    assert!((a - b).abs() < 1e-12, "{a} is not {b}");
}

fn message<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result {
        Err(Error::Metric(text)) => text,
        other => panic!("expected Error::Metric, got {other:?}"),
    }
}

#[test]
fn exact_values() {
    let (p, y) = example();
    near(accuracy(&p, &y).unwrap(), 0.5);
    // -ln(1/2), -ln(1/8), -ln 1, -ln(1/2)
    near(nll(&p, &y).unwrap(), 5.0 * 2_f64.ln() / 4.0);
    // ¼+1/16+1/16, 49/64+9/16+1/64, 0, ¼+¼
    near(brier(&p, &y).unwrap(), (0.375 + 1.343_75 + 0.0 + 0.5) / 4.0);
    let h: Vec<f64> = Vec::try_from(entropy(&p).unwrap()).unwrap();
    near(h[0], 1.5 * 2_f64.ln());
    near(h[2], 0.0);
    near(h[3], 2_f64.ln());
}

#[test]
fn reliability_table() {
    let (p, y) = example();
    let r = reliability(&p, &y, 4).unwrap();
    let bin = |b: usize| (r.bins[b].count, r.bins[b].confidence, r.bins[b].accuracy);
    // Right-closed: confidences ½ and ½ are in (¼, ½], ¾ in (½, ¾], 1 in (¾, 1].
    assert_eq!([bin(0), bin(1), bin(2), bin(3)], [(0, 0.0, 0.0), (2, 0.5, 0.5), (1, 0.75, 0.0), (1, 1.0, 1.0)]);
    assert_eq!((r.bins[1].lower, r.bins[1].upper, r.examples()), (0.25, 0.5, 4));
    near(r.ece(), 0.75 / 4.0);
    near(r.mce(), 0.75);
    near(ece(&p, &y, 4).unwrap(), r.ece());
    // One bin: |½ - mean confidence|.
    near(ece(&p, &y, 1).unwrap(), 0.6875 - 0.5);
    near(r.overconfidence(), 0.6875 - 0.5);
}

#[test]
fn calibrated_predictions_have_no_calibration_error() {
    // Confidence ¾ is right three times out of four.
    let p = Tensor::from_slice(&[0.75, 0.25]).view([1, 2]).repeat([4, 1]);
    let y = Tensor::from_slice(&[0_i64, 0, 1, 0]);
    assert_eq!(ece(&p, &y, 15).unwrap(), 0.0);
}

#[test]
fn probability_zero_is_clamped() {
    let p = Tensor::from_slice(&[1.0_f32, 0.0]).view([1, 2]);
    let loss = nll(&p, &Tensor::from_slice(&[1_i64])).unwrap();
    near(loss, 126.0 * 2_f64.ln());
}

#[test]
fn auroc_exact_values() {
    let a = |x: &[f64], y: &[f64]| auroc(&Tensor::from_slice(x), &Tensor::from_slice(y)).unwrap();
    assert_eq!(a(&[0.0, 1.0], &[2.0, 3.0, 4.0]), 1.0);
    assert_eq!(a(&[2.0, 3.0], &[0.0, 1.0]), 0.0);
    assert_eq!(a(&[1.0, 1.0], &[1.0, 1.0, 1.0]), 0.5);
    // Pairs: 2>1, 2=2 (½), 2<3; 4>1, 4>2, 4>3.
    assert_eq!(a(&[1.0, 2.0, 3.0], &[2.0, 4.0]), 4.5 / 6.0);
    assert_eq!(a(&[0.0, f64::NEG_INFINITY], &[f64::INFINITY]), 1.0);
    assert_eq!(a(&[0.0], &[-0.0]), 0.5);
}

#[test]
fn kinds_strides_and_graphs() {
    let (p, y) = example();
    for kind in [Kind::Half, Kind::BFloat16, Kind::Float] {
        let p = p.to_kind(kind);
        near(nll(&p, &y).unwrap(), 5.0 * 2_f64.ln() / 4.0);
        assert_eq!(entropy(&p).unwrap().kind(), Kind::Float);
    }
    assert_eq!(entropy(&p).unwrap().kind(), Kind::Double);
    let strided = p.transpose(0, 1).contiguous().transpose(0, 1).set_requires_grad(true);
    assert!(!strided.is_contiguous());
    near(brier(&strided, &y).unwrap(), brier(&p, &y).unwrap());
    assert!(!entropy(&strided).unwrap().requires_grad());
    let every_other = Tensor::from_slice(&[0_i64, 9, 0, 9, 2, 9, 2, 9]).slice(0, 0, 8, 2);
    near(accuracy(&p, &every_other).unwrap(), 0.5);
}

#[test]
fn invalid_inputs_are_named() {
    let (p, y) = example();
    let labels = |y: &[i64]| Tensor::from_slice(y);
    let row = |p: &[f64]| Tensor::from_slice(p).view([1, -1]);
    let bad = |p: &Tensor, y: &Tensor| message(accuracy(p, y));
    assert_eq!(bad(&p.view([12]), &y), "probs has shape [12]: expected [N, C]");
    assert!(bad(&p.narrow(0, 0, 0), &labels(&[])).contains("at least one example"));
    assert!(bad(&p.to_kind(Kind::Int64), &y).starts_with("probs is Int64"));
    assert!(bad(&Tensor::new(), &y).contains("undefined"));
    assert!(bad(&p, &Tensor::new()).contains("undefined"));
    assert!(bad(&p, &y.to_kind(Kind::Int)).starts_with("labels is Int:"));
    assert!(bad(&p, &labels(&[0, 1])).contains("expected [4]"));
    assert!(bad(&p, &y.view([4, 1])).contains("expected [4]"));
    assert_eq!(bad(&p, &labels(&[0, 1, 3, 0])), "labels[2] = 3: expected a class in 0..3");
    assert_eq!(bad(&p, &labels(&[0, -1, 0, 0])), "labels[1] = -1: expected a class in 0..3");
    assert!(bad(&row(&[0.5, f64::NAN]), &labels(&[0])).starts_with("probs[0, 1] = NaN"));
    assert!(bad(&row(&[2.0, -1.0]), &labels(&[0])).contains("softmax"));
    assert!(bad(&row(&[0.2, 0.2]), &labels(&[0])).starts_with("probs[0] sums to 0.4"));
    assert!(message(ece(&p, &y, 0)).contains("bins = 0"));
    assert!(message(entropy(&row(&[0.5, f64::INFINITY]))).contains("inf"));

    let s = Tensor::from_slice(&[0.0, 1.0]);
    assert!(message(auroc(&s.narrow(0, 0, 0), &s)).starts_with("in_scores has shape [0]"));
    assert!(message(auroc(&s, &s.view([1, 2]))).starts_with("out_scores has shape [1, 2]"));
    assert_eq!(message(auroc(&s, &Tensor::from_slice(&[0.0, f64::NAN]))), "out_scores[1] is NaN");
    assert!(message(auroc(&s, &y)).starts_with("out_scores is Int64"));
}

/// Scores from a small set, so that ties are common.
fn tied_scores() -> impl Strategy<Value = Vec<f64>> {
    prop::collection::vec((-4..=4_i32).prop_map(|s| f64::from(s) / 2.0), 1..40)
}

/// Class probabilities `[N, 4]` and labels.
fn predictions() -> impl Strategy<Value = (Tensor, Tensor)> {
    prop::collection::vec((prop::array::uniform4(-4.0..4.0_f64), 0..4_i64), 1..30).prop_map(|rows| {
        let logits: Vec<f64> = rows.iter().flat_map(|(l, _)| *l).collect();
        let labels: Vec<i64> = rows.iter().map(|(_, y)| *y).collect();
        (Tensor::from_slice(&logits).view([-1, 4]).softmax(-1, Kind::Double), Tensor::from_slice(&labels))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn auroc_is_the_pair_count(x in tied_scores(), y in tied_scores()) {
        let value = |a: &[f64], b: &[f64]| auroc(&Tensor::from_slice(a), &Tensor::from_slice(b)).unwrap();
        let pairs: f64 = y.iter().flat_map(|o| x.iter().map(move |i| {
            if o > i { 1.0 } else if o == i { 0.5 } else { 0.0 }
        })).sum();
        near(value(&x, &y), pairs / (x.len() * y.len()) as f64);
        near(value(&x, &y), 1.0 - value(&y, &x));
        // Only the order of the scores matters.
        let stretch = |s: &[f64]| s.iter().map(|s| s.exp()).collect::<Vec<_>>();
        near(value(&x, &y), value(&stretch(&x), &stretch(&y)));
    }

    #[test]
    fn ranges_and_bins((p, y) in predictions(), bins in 1..25_usize) {
        let n = y.size()[0] as usize;
        let r = reliability(&p, &y, bins).unwrap();
        prop_assert_eq!(r.examples(), n);
        for b in r.bins.iter().filter(|b| b.count > 0) {
            prop_assert!(b.lower < b.confidence + 1e-12 && b.confidence <= b.upper + 1e-12);
        }
        // Bins partition the examples, so that accuracy is their weighted mean; cancellation only lowers ECE.
        let mean = r.bins.iter().map(|b| b.count as f64 * b.accuracy).sum::<f64>() / n as f64;
        near(mean, accuracy(&p, &y).unwrap());
        prop_assert!(ece(&p, &y, 1).unwrap() <= r.ece() + 1e-12 && r.ece() <= r.mce() + 1e-12);
        prop_assert!((0.0..=2.0).contains(&brier(&p, &y).unwrap()) && nll(&p, &y).unwrap() >= 0.0);
        let h = entropy(&p).unwrap();
        prop_assert!(h.min().double_value(&[]) >= 0.0 && h.max().double_value(&[]) <= 4_f64.ln() + 1e-12);
        // Against libtorch.
        near(nll(&p, &y).unwrap(), p.log().nll_loss(&y).double_value(&[]));
    }
}
