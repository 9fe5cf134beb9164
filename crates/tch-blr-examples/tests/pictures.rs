//! The pictures of the examples: that they are drawn, hold their words, and refuse what cannot be drawn.

use std::path::Path;
use tch::Tensor;
use tch_blr::metrics::{self, Reliability};
use tch_blr_examples::Outcome;
use tch_blr_examples::pictures::planes::{Panel, ellipse, field, planes};
use tch_blr_examples::pictures::{Cloud, Curves, entropy_planes, histograms, reliability, scatter, training_curves};

/// Draws into a folder that does not exist yet and returns the file, which must hold all of `words`.
fn drawn(draw: impl Fn(&Path) -> Outcome, words: &[&str]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a/b/picture.svg");
    draw(&path).unwrap();
    let svg = std::fs::read_to_string(&path).unwrap();
    assert!(svg.starts_with("<svg ") && svg.trim_end().ends_with("</svg>"), "not an SVG document");
    for word in words {
        assert!(svg.contains(word), "no {word:?} in the picture");
    }
    assert!(!svg.contains("NaN") && !svg.contains("inf"));
    svg
}

/// The text of the error; nothing must have been written.
fn refused(draw: impl Fn(&Path) -> Outcome) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("picture.svg");
    let text = draw(&path).unwrap_err().to_string();
    assert!(!path.exists());
    text
}

fn table() -> Reliability {
    let p = Tensor::from_slice(&[0.75, 0.25, 0.1, 0.9]).view([2, 2]);
    metrics::reliability(&p, &Tensor::from_slice(&[0_i64, 0]), 10).unwrap()
}

#[test]
fn curves() {
    let panel = |y: &str, points: &[(f64, f64)]| Curves {
        y_label: y.into(),
        series: vec![("Adam".into(), points.to_vec()), ("a < b & c".into(), vec![(1.0, 2.0)])],
    };
    let panels = [panel("NLL", &[(0.0, 1.0), (1.0, f64::NAN), (2.0, 0.5)]), panel("accuracy", &[])];
    let words = ["NLL", "accuracy", "epoch", "Adam", "a &lt; b &amp; c"];
    drawn(|path| training_curves(path, "epoch", &panels), &words);
    let empty = [Curves { y_label: "NLL".into(), series: vec![("Adam".into(), vec![(1.0, f64::INFINITY)])] }];
    assert_eq!(refused(|path| training_curves(path, "epoch", &empty)), "no points for NLL");
    assert!(refused(|path| training_curves(path, "epoch", &[])).contains("no training curves"));
}

#[test]
fn clouds() {
    let cloud = |y: &str, points: &[(f64, f64)]| Cloud {
        x_label: "‖e‖".into(),
        y_label: y.into(),
        groups: vec![("all".into(), points.to_vec()), ("few".into(), vec![(0.5, 1.0)])],
    };
    let panels = [cloud("tr v", &[(0.0, 1.0), (1.0, f64::NAN), (1.0, 3.0)]), cloud("tr Λ", &[])];
    let svg = drawn(|path| scatter(path, &panels), &["‖e‖", "tr v", "tr Λ", "all", "few"]);
    // Two keys, and the finite points.
    assert_eq!(svg.matches("<circle").count(), 2 + 3 + 1);
    let empty = Cloud { groups: vec![("all".into(), vec![(1.0, f64::NAN)])], ..cloud("tr v", &[]) };
    assert_eq!(refused(|path| scatter(path, std::slice::from_ref(&empty))), "no points for tr v");
    assert!(refused(|path| scatter(path, &[])).contains("no clouds"));
}

#[test]
fn reliability_diagrams() {
    let diagrams = [("Adam".to_owned(), table()), ("IVON".to_owned(), table())];
    // |1 - 0.75| / 2 + |0 - 0.9| / 2
    drawn(|path| reliability(path, &diagrams), &["Adam: ECE 57.50 %", "IVON: ECE 57.50 %", "confidence"]);
    assert!(refused(|path| reliability(path, &[])).contains("no reliability diagrams"));
    let empty = [("Adam".to_owned(), Reliability { bins: Vec::new() })];
    assert!(refused(|path| reliability(path, &empty)).contains("of Adam"));
}

#[test]
fn planes_of_entropy() {
    let extent = ((-1.0, 1.0), (0.0, 1.0));
    let plane = |values: &[f64]| vec![("VOGN".to_owned(), values.to_vec(), 3, 2)];
    let points = [(0.0, 0.5, 0), (0.5, 0.5, 1), (9.0, 9.0, 1)];
    let good = plane(&[0.0, 0.1, 0.2, 0.3, 0.4, 9.0]);
    let svg =
        drawn(|path| entropy_planes(path, &good, extent, &points), &["VOGN", "class 1", "entropy (nats)", "ln 2"]);
    // One disc in the legend and one point, each with a rim; the point outside is left out.
    assert_eq!(svg.matches("<circle").count(), 4);
    let text = |values: &[f64]| refused(|path| entropy_planes(path, &plane(values), extent, &points));
    assert_eq!(text(&[0.0; 5]), "VOGN: expected 3·2 finite values, got 5");
    assert!(text(&[f64::NAN; 6]).contains("finite"));
    assert!(refused(|path| entropy_planes(path, &good, ((1.0, 1.0), (0.0, 1.0)), &points)).contains("empty"));
    assert!(refused(|path| entropy_planes(path, &[], extent, &points)).contains("no entropy planes"));
}

#[test]
fn planes_of_a_function() {
    let bowl = |x: f64, y: f64| x * x + y * y;
    let panel = |extent| Panel {
        title: "a bowl".into(),
        axes: ("slope", "intercept"),
        extent,
        contours: Some((&bowl, vec![0.25, 0.5, 3.0])),
        arrows: Vec::new(),
        paths: vec![("GD".into(), vec![(0.0, 0.0), (9.0, 9.0), (0.5, 0.5)])],
        rings: vec![("GD".into(), ellipse((0.0, 0.0), (0.5, 0.2)))],
        points: vec![(0.2, 0.2), (5.0, 5.0)],
    };
    let extent = ((-1.0, 1.0), (-1.0, 1.0));
    let lines = |panel: Panel<'_>| {
        let panels = [panel];
        drawn(|path| planes(path, &panels), &["a bowl", "slope", "intercept", "GD"]).matches("<polyline").count()
    };
    // Two of the heights are within the plane, as a line each; the far point and the piece of the path there are not.
    let without = lines(Panel { contours: None, ..panel(extent) });
    assert_eq!(lines(panel(extent)), without + 2);
    // The arrows of a rotation: a line each, and none where nothing moves.
    let arrows = field(extent, 3, |x, y| (-y, x));
    assert_eq!(arrows.len(), 8);
    for [(ax, ay), (bx, by)] in &arrows {
        let middle = ((ax + bx) / 2.0, (ay + by) / 2.0);
        assert!(
            ((bx - ax) * middle.0 + (by - ay) * middle.1).abs() < 1e-12 && (bx - ax).hypot(by - ay) < 2.0 / 3.0 + 1e-12
        );
    }
    assert_eq!(lines(Panel { arrows, ..panel(extent) }), without + 2 + 8);
    assert!(refused(|path| planes(path, &[panel(((1.0, 1.0), (0.0, 1.0)))])).contains("a bowl: extent"));
    assert!(refused(|path| planes(path, &[])).contains("no planes"));
}

#[test]
fn histograms_of_samples() {
    let samples = [("IVON".to_owned(), vec![1.0, 2.0, f64::NAN]), ("constant".to_owned(), vec![3.0; 10])];
    drawn(
        |path| histograms(path, "log₁₀ precision", &samples),
        &["IVON", "constant", "log₁₀ precision", "share of weights"],
    );
    drawn(|path| histograms(path, "x", &samples[1..]), &["constant"]);
    let empty = [("IVON".to_owned(), vec![f64::NAN])];
    assert!(refused(|path| histograms(path, "x", &empty)).contains("of IVON"));
    assert!(refused(|path| histograms(path, "x", &[])).contains("no histograms"));
}

#[test]
fn an_unwritable_path_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let path = file.join("picture.svg");
    let text = reliability(&path, &[("Adam".to_owned(), table())]).unwrap_err().to_string();
    assert!(text.contains(&*path.to_string_lossy()), "{text}");
}
