//! The tables of merging on USPS: `d4` and `previews` of `make reproduce`.

use tch_blr_examples::tables::d4;
use tch_blr_examples::tables::previews::{FAMILIES, Loss, Previews};

/// Reference values of the same exact optima, computed by an independent program: accuracy in %, distance, gap in nats;
/// to 1 %.
#[test]
fn merging_on_usps() {
    let Some(data) = support::data("usps") else { return };
    let rows = d4::run(&data).unwrap();
    for row in &rows {
        println!("{:<28} {:6.2} {:.4} {:8.2}", row.scheme, row.accuracy, row.distance, row.gap);
    }
    let row = |scheme: &str| rows.iter().find(|r| r.scheme == scheme).unwrap();
    for (scheme, accuracy, distance, gap) in [
        ("average", 89.39, 0.562, 476.0),
        ("task arithmetic", 92.03, 0.292, 170.0),
        ("Fisher average", 91.08, 0.501, 332.0),
        ("gradient matching, diagonal", 91.98, 0.336, 153.0),
        ("gradient matching, full", 93.17, 0.131, 19.3),
        ("target", 93.32, 0.0, 0.0),
    ] {
        let r = row(scheme);
        for (what, value, expected) in
            [("accuracy", r.accuracy, accuracy), ("distance", r.distance, distance), ("gap", r.gap, gap)]
        {
            assert!((value - expected).abs() <= 0.01 * expected, "{scheme}: {what} {value} instead of {expected}");
        }
    }
    for (scheme, accuracy) in [("fine-tune on 4, 5", 81.12), ("fine-tune on 6, 7", 86.05), ("fine-tune on 8, 9", 87.39)]
    {
        let r = row(scheme);
        assert!((r.accuracy - accuracy).abs() <= 0.01 * accuracy, "{scheme}: {}", r.accuracy);
    }
    let gap = |scheme: &str| row(scheme).gap;
    let (full, diagonal) = (gap("gradient matching, full"), gap("gradient matching, diagonal"));
    assert!(full < diagonal);
    for scheme in ["task arithmetic", "Fisher average", "average"] {
        assert!(diagonal < gap(scheme), "{scheme}");
    }
}

/// Squares are what a Gaussian describes: with all covariances nothing is missing, and with fewer more.
#[test]
fn previews_on_usps() {
    let Some(data) = support::data("usps") else { return };
    for loss in [Loss::Squared, Loss::Logistic] {
        let previews = Previews::load(&data, loss).unwrap();
        let fronts = FAMILIES.map(|(_, family)| previews.front(family, 4).unwrap());
        let [exact, full, diagonal, isotropic] = &fronts;
        println!("{loss:?}: {:?}", fronts.each_ref().map(|front| front.area));
        assert_eq!(exact.trials.len(), 15);
        assert!(exact.area <= full.area * (1.0 + 1e-12));
        assert!(full.area < diagonal.area && diagonal.area < isotropic.area);
        // No other weighting can beat the optimum of one whose weights are all positive.
        assert!(exact.trials.iter().all(|trial| trial.efficient || trial.alpha.contains(&0.0)));
        if loss == Loss::Squared {
            for (a, b) in full.thetas.iter().zip(&exact.thetas) {
                assert!(((a - b).norm() / b.norm()).double_value(&[]) < 1e-10);
            }
        }
    }
}
