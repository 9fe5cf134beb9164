//! The tables `d1` and `d2` of `make reproduce` against an independent computation of the same optima, where
//! `TCH_BLR_DATA` has the data: all of the four moons, the ends of the memory sizes on USPS.

use std::io::Write;
use support::{close, data};
use tch_blr_examples::tables::d1;
use tch_blr_examples::tables::d2::{self, Choice, Method};
use tch_blr_examples::{four_moons, usps};

/// The reference has six digits of the objectives at most.
#[test]
fn four_moons_in_sequence() {
    let Some(data) = data("four_moons") else { return };
    let moons = d1::FourMoons::load(&data).unwrap();
    for (ours, reference) in moons.optimum.into_iter().zip(d1::JOINT) {
        close(ours, reference, 1e-6);
    }
    for (method, name, objective, accuracies) in d1::METHODS {
        let run = moons.run(method).unwrap();
        let digits = if objective > 1e4 {
            0.05
        } else if objective > 1e3 {
            5e-3
        } else {
            5e-4
        };
        assert!((run.objective - objective).abs() < 1.01 * digits, "{name}: {} and not {objective}", run.objective);
        for (ours, reference) in run.accuracies.iter().zip(accuracies) {
            assert!((ours - reference).abs() < 1e-9, "{name}: {:?}", run.accuracies);
        }
        if method == d1::Method::AllData {
            close(run.objective, d1::JOINT[0], 1e-6);
            // The reference: below 4e-8.
            assert!(run.distance < 4e-8, "{}", run.distance);
        }
    }
}

#[test]
fn a_digit_more() {
    let Some(data) = data("usps") else { return };
    let usps = d2::AddDigit::load(&data).unwrap();
    // To the digits that the reference is given with.
    let agrees = |ours: [f64; 2], reference: &[f64]| {
        close(ours[0], reference[0], 0.0051);
        close(ours[1], reference[1], 0.00051);
    };
    for (ours, reference) in usps.ends().into_iter().zip(d2::ENDS) {
        close(ours, reference, 0.0051);
    }
    for (percent, lambda, _) in [d2::REFERENCE[0], d2::REFERENCE[5]] {
        agrees(usps.run(Method::KPrior, Choice::Lambda, percent).unwrap(), &lambda[..2]);
        agrees(usps.run(Method::Replay, Choice::Lambda, percent).unwrap(), &lambda[2..]);
    }
    for (method, _, percent, reference) in d2::ADDITIONS {
        if percent == 2.0 {
            agrees(usps.run(method, Choice::Lambda, percent).unwrap(), &reference);
        }
    }
    // Soft labels want the memorable, hard labels the random.
    let random = usps.run(Method::Replay, Choice::Random(0), 2.0).unwrap();
    let lambda = usps.run(Method::Replay, Choice::Lambda, 2.0).unwrap();
    assert!(random[0] > lambda[0] + 20.0, "{random:?} {lambda:?}");
}

#[test]
fn broken_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    };
    let moons = || four_moons::tasks(folder.path()).unwrap_err().to_string();
    let digits = || usps::Usps::load(folder.path(), "test").unwrap_err().to_string();
    let says =
        |e: String, what: [&str; 2]| assert!(what.iter().all(|w| e.contains(w)) && e.lines().count() == 1, "{e}");
    says(moons(), ["make_moons.csv", "No such file"]);
    write("four_moons/make_moons.csv", b"X,Y,label\n0.5,1.0,0\n0.5,1.0\n");
    says(moons(), ["make_moons.csv", "line 3"]);
    write("four_moons/make_moons.csv", b"X,Y,label\n0.5,1.0,0\n");
    says(moons(), ["make_moons.csv", "500 points"]);
    says(digits(), ["zip.test.gz", "No such file"]);
    write("usps/zip.test.gz", b"no gzip");
    says(digits(), ["zip.test.gz", "gzip"]);
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(b"6.0 -1.0 0.5\n").unwrap();
    write("usps/zip.test.gz", &gz.finish().unwrap());
    says(digits(), ["zip.test.gz", "256 grey values"]);
}
