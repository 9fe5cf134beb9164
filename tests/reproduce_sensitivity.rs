//! The tables of sensitivity: `d5` and `d6` of `make reproduce`.

use tch_blr_examples::libsvm;
use tch_blr_examples::tables::{d5, d6};

use support::data;

/// Reference values of the same exact optima, computed by an independent program, to their last digit.
#[test]
fn leave_one_out_on_adult() {
    let Some(data) = data("adult") else { return };
    let rows = d5::run(&data.join("adult")).unwrap();
    for (row, reference) in rows.iter().zip(d5::REFERENCE) {
        assert!(row.residual < 1e-9);
        for (i, (ours, expected)) in row.numbers().into_iter().zip(reference).enumerate() {
            println!("δ {} {}: {ours:.6} ({expected})", row.delta, d5::Row::NAMES[i]);
        }
        for (i, (ours, expected)) in row.numbers().into_iter().zip(reference).enumerate() {
            let tolerance = [6e-5, 6e-5, 6e-5, 6e-5, 6e-5, 6e-5, 6e-5, 6e-5, 6e-4, 0.06][i];
            assert!((ours - expected).abs() <= tolerance, "δ {}, {}: {ours}", row.delta, d5::Row::NAMES[i]);
        }
    }
}

/// Reference values by an independent program.
#[test]
fn weights_and_kernel_on_snelson() {
    let Some(data) = data("snelson") else { return };
    let found = d6::run(&data.join("snelson")).unwrap();
    println!("{found:?}");
    let [weights, kernel] = found.evidence;
    assert!((weights - d6::REFERENCE[0]).abs() < 1e-6 && (weights - kernel).abs() < 1e-11, "{weights} {kernel}");
    assert!((found.rmse - d6::REFERENCE[1]).abs() < 1e-6, "{}", found.rmse);
    assert!(found.identity < 1e-12, "{}", found.identity);
}

#[test]
fn bad_tables_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t");
    let error = |text: &str| {
        std::fs::write(&path, text).unwrap();
        libsvm::load(&path, 3).unwrap_err().to_string()
    };
    assert!(error("1 1:1\n2 1:1\n").contains("line 2: label 2"));
    assert!(error("1 4:1\n").contains("4:1") && error("1 0:1\n").contains("0:1") && error("1 1\n").contains("line 1"));
    assert!(error("\n").contains("no examples"));
    std::fs::write(&path, "+1 2:0.5 \n-1 1:1 3:2\n").unwrap();
    let t = libsvm::load(&path, 3).unwrap();
    assert_eq!(Vec::<f64>::try_from(t.x.reshape([-1])).unwrap(), [0.0, 0.5, 0.0, 1.0, 1.0, 0.0, 2.0, 1.0]);
    assert_eq!(Vec::<f64>::try_from(t.y).unwrap(), [1.0, 0.0]);
}
