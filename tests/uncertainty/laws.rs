//! What holds for any predictions.

use super::{labels, rows, t};
use proptest::prelude::*;
use support::{all_close, close, values};
use tch::{Kind, Tensor};
use tch_blr::conformal::{Score, Uniforms};
use tch_blr::metrics::{Forecast, Temperature, adaptive_reliability, classwise_ece, nll, selective};

/// Class probabilities `[N, 3]`, of which some are tied, and labels.
fn predictions() -> impl Strategy<Value = (Tensor, Tensor)> {
    prop::collection::vec((prop::array::uniform3(-3..=3_i32), 0..3_i64), 2..30).prop_map(|drawn| {
        let logits: Vec<f64> = drawn.iter().flat_map(|(l, _)| l.map(f64::from)).collect();
        let y: Vec<i64> = drawn.iter().map(|(_, y)| *y).collect();
        (rows(&logits, 3).softmax(-1, Kind::Double), labels(&y))
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Nothing depends on the order of the examples, to the bit where sums are over sorted numbers.
    #[test]
    fn the_order_of_the_examples_does_not_matter((p, y) in predictions(), bins in 1..8_usize) {
        let (q, z) = (p.flip([0]), y.flip([0]));
        prop_assert_eq!(adaptive_reliability(&p, &y, bins).unwrap(), adaptive_reliability(&q, &z, bins).unwrap());
        close(classwise_ece(&p, &y, bins).unwrap(), classwise_ece(&q, &z, bins).unwrap(), 1e-14);
        let [a, b] = [selective(&p, &y).unwrap(), selective(&q, &z).unwrap()];
        prop_assert_eq!((a.aurc(), a.oracle(), a.augrc()), (b.aurc(), b.oracle(), b.augrc()));
        let [a, b] = [(&p, &y), (&q, &z)].map(|(p, y)| Score::Aps.calibrate(p, y, 0.2, Uniforms::Ones).unwrap());
        prop_assert_eq!(a, b);
        let [a, b] = [(&p, &y), (&q, &z)].map(|(p, y)| Temperature::fit_averaged(p, y).unwrap().value());
        prop_assert!((a / b - 1.0).abs() < 1e-9, "{} {}", a, b);
    }

    #[test]
    fn selective_risks_are_what_their_formulas_say((p, y) in predictions()) {
        let found = selective(&p, &y).unwrap();
        let r = found.curve().last().unwrap().1;
        if let Ok(auroc) = found.auroc() {
            close(found.augrc(), (1.0 - r) * r * (1.0 - auroc) + r * r / 2.0, 1e-14);
        }
        prop_assert!(found.excess() >= -1e-14 && found.aurc() <= 1.0 && found.augrc() <= 0.5);
    }

    /// The fitted temperature has no better neighbour, and no other class.
    #[test]
    fn the_fitted_temperature_is_the_best((p, y) in predictions()) {
        let found = Temperature::fit_averaged(&p, &y).unwrap();
        let loss = |t: f64| nll(&Temperature::new(t).unwrap().apply_averaged(&p).unwrap(), &y).unwrap();
        for factor in [0.5, 0.99, 1.01, 2.0] {
            let other = (found.value() * factor).clamp(Temperature::LOWEST, Temperature::HIGHEST);
            prop_assert!(loss(found.value()) <= loss(other) + 1e-12);
        }
        let scaled = found.apply_averaged(&p).unwrap();
        all_close(&values(&scaled.sum_dim_intlist(1, false, Kind::Double)), &vec![1.0; y.numel()], 1e-12);
        let highest = |p: &Tensor| p.max_dim(1, true).0;
        // The class that was the most probable still is; others may have joined it.
        let still = scaled.eq_tensor(&highest(&scaled)).logical_or(&p.lt_tensor(&(highest(&p) - 1e-12)));
        prop_assert!(still.all().int64_value(&[]) == 1);
    }

    /// Less to be sure of gives smaller sets, inside of the larger ones.
    #[test]
    fn sets_shrink_as_alpha_grows((p, y) in predictions(), seed in 0..100_u64) {
        for score in [Score::Lac, Score::Aps, Score::Raps { lambda: 0.05, k_reg: 1 }] {
            let sets = [0.1, 0.3, 0.6].map(|alpha| {
                let sets = score.calibrate(&p, &y, alpha, Uniforms::Seed(seed)).unwrap();
                sets.sets(&p, Uniforms::Seed(seed)).unwrap().members().to_kind(Kind::Double)
            });
            for pair in sets.windows(2) {
                prop_assert!((&pair[0] - &pair[1]).min().double_value(&[]) >= 0.0);
            }
        }
    }

    /// A higher level is a wider interval, and a mixture's quantiles are within those of its components.
    #[test]
    fn intervals_are_nested(means in prop::array::uniform4(-3.0..3.0_f64), v in prop::array::uniform4(0.0..2.0_f64)) {
        let f = Forecast::mixture(&[0.1, 0.2, 0.3, 0.4], &rows(&means, 1), &rows(&v, 1)).unwrap();
        let intervals = [0.5, 0.8, 0.95].map(|level| f.interval(level).unwrap());
        for pair in intervals.windows(2) {
            prop_assert!(values(pair[1].lower())[0] <= values(pair[0].lower())[0] + 1e-12);
            prop_assert!(values(pair[1].upper())[0] >= values(pair[0].upper())[0] - 1e-12);
        }
        let y = t(&[0.5]);
        // The fair score is what is left of the charge for few components.
        let equal = Forecast::mixture(&[1.0; 4], &rows(&means, 1), &rows(&v, 1)).unwrap();
        prop_assert!(equal.crps(&y).unwrap() >= 0.0 && equal.crps_fair(&y).unwrap() <= equal.crps(&y).unwrap() + 1e-12);
        prop_assert!(f.interval(0.8).unwrap().score(&y).unwrap() >= f.interval(0.8).unwrap().width().unwrap() - 1e-12);
    }
}
