//! Golden values, conventions, files, and what is refused.

use super::*;
use crate::FullGaussian;
use crate::iterates::SMALLEST_VARIANCE;
use tch::nn::VarStore;
use tch::{Device, Kind};

fn set(w: &Tensor, x: &[f64]) {
    tch::no_grad(|| w.shallow_clone().copy_(&Tensor::from_slice(x)));
}

fn values(t: Option<Tensor>) -> Vec<f64> {
    Vec::try_from(t.unwrap().to_kind(Kind::Double).reshape([-1])).unwrap()
}

fn near(ours: &[f64], expected: &[f64], tolerance: f64) {
    let apart = ours.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(ours.len() == expected.len() && apart <= tolerance, "{ours:?} and not {expected:?}");
}

/// SWAG of the rows of a matrix.
fn of(kind: Kind, rank: usize, rows: &[&[f64]]) -> Swag {
    let w = Tensor::zeros([rows[0].len() as i64], (kind, Device::Cpu)).set_requires_grad(true);
    let mut swag = Swag::new(Params::named([("w", w.shallow_clone())]).unwrap(), rank).unwrap();
    for row in rows {
        set(&w, row);
        swag.collect().unwrap();
    }
    swag
}

/// m = 7/3, v = 14/9, deviations 0, 1/2 and 5/3, or -4/3, -1/3 and 5/3.
#[test]
fn both_conventions_and_the_diagonal() {
    let swag = of(Kind::Double, 20, &[&[1.0], &[2.0], &[4.0]]);
    near(&values(swag.get("w")), &[7.0 / 3.0], 1e-15);
    let q = swag.posterior().unwrap();
    near(&values(q.independent("w")), &[7.0 / 9.0], 1e-15);
    near(&values(q.directions("w")), &[0.0, 0.25, 5.0 / 6.0], 1e-15);
    near(&values(q.variance("w")), &[1.534_722_222_2], 1e-10);
    near(&values(swag.diagonal().unwrap().variance("w")), &[14.0 / 9.0], 1e-15);
    let q = swag.deviations(Deviations::Final).posterior().unwrap();
    near(&values(q.directions("w")), &[-2.0 / 3.0, -1.0 / 6.0, 5.0 / 6.0], 1e-15);
    near(&values(q.variance("w")), &[1.944_444_444_4], 1e-10);
    near(&values(q.temper(2.0).unwrap().variance("w")), &[35.0 / 9.0], 1e-14);
}

/// Twelve iterates of four weights, far from zero beside what they move, in f32 too.
#[test]
fn all_deviations_from_the_last_mean_are_the_sample_covariance() {
    let wave = |i: usize, j: usize| (1.7 * i as f64 + 2.3 * (i * j) as f64).sin();
    for (kind, base, tolerance) in [(Kind::Double, 1e3, 1e-12), (Kind::Float, 1.0, 1e-7), (Kind::Float, 256.0, 1e-4)] {
        let rows: Vec<Vec<f64>> = (0..12).map(|i| (0..4).map(|j| base + wave(i, j)).collect()).collect();
        let borrowed: Vec<&[f64]> = rows.iter().map(Vec::as_slice).collect();
        let q = of(kind, 12, &borrowed).deviations(Deviations::Final).posterior().unwrap();
        let u = q.directions("w").unwrap().to_kind(Kind::Double);
        // In f32 the weights themselves are rounded.
        let x = Tensor::from_slice2(&borrowed).to_kind(kind).to_kind(Kind::Double);
        let d = &x - x.mean_dim(0, true, None::<Kind>);
        let (ours, sample) = (u.tr().matmul(&u) * 2.0, d.tr().matmul(&d) / 11.0);
        let apart = (ours - sample).abs().max().double_value(&[]);
        assert!(apart < tolerance, "{kind:?} {base}: {apart}");
    }
}

/// Ten iterates, of which four deviations are kept: as from all ten, in both conventions.
#[test]
fn the_last_deviations_are_those_of_a_larger_rank() {
    let rows: Vec<[f64; 2]> = (0..10).map(|i| [f64::from(i).sin(), f64::from(i * i).cos()]).collect();
    let rows: Vec<&[f64]> = rows.iter().map(|row| &row[..]).collect();
    for convention in [Deviations::Running, Deviations::Final] {
        let [few, all] = [4, 20].map(|rank| of(Kind::Double, rank, &rows).deviations(convention).posterior().unwrap());
        assert_eq!((few.rank(), all.rank()), (4, 10));
        let (few, all) = (few.directions("w").unwrap() * 3f64.sqrt(), all.directions("w").unwrap() * 3.0);
        assert!((few - all.narrow(0, 6, 4)).abs().max().double_value(&[]) < 1e-15);
    }
}

#[test]
fn the_mean_of_a_straight_way_is_its_middle_and_what_stays_has_no_variance() {
    let rows: Vec<[f64; 2]> = (0..9).map(|i| [f64::from(i), 0.1]).collect();
    let rows: Vec<&[f64]> = rows.iter().map(|row| &row[..]).collect();
    for convention in [Deviations::Running, Deviations::Final] {
        let swag = of(Kind::Float, 5, &rows).deviations(convention);
        near(&values(swag.get("w")), &[4.0, f64::from(0.1f32)], 1e-6);
        let q = swag.posterior().unwrap();
        let stays = q.directions("w").unwrap().select(1, 1).abs().max().double_value(&[]);
        assert_eq!((stays, values(q.variance("w"))[1]), (0.0, f64::from((SMALLEST_VARIANCE / 2.0) as f32)));
        assert!(q.entropy().is_finite() && q.kl(&q).unwrap().abs() < 1e-9);
        // 9 numbers from 0: (81-1)/12
        near(&values(swag.diagonal().unwrap().variance("w"))[..1], &[80.0 / 12.0], 1e-5);
    }
}

/// The Gaussian through two iterates of two weights, against the dense one of numpy's formula.
#[test]
fn its_covariance_is_dense_where_it_is_written_out() {
    let q = of(Kind::Double, 2, &[&[0.0, 1.0], &[2.0, -1.0]]).deviations(Deviations::Final).posterior().unwrap();
    // v = (1, 1), D = ±(1, -1), K-1 = 1
    let covariance = [[0.5 + 1.0, -1.0], [-1.0, 0.5 + 1.0]];
    let det = 1.5 * 1.5 - 1.0;
    let inverse = Tensor::from_slice2(&[[1.5 / det, 1.0 / det], [1.0 / det, 1.5 / det]]);
    let full = FullGaussian::new([("w", Tensor::from_slice(&[1.0, 0.0]))], &inverse).unwrap();
    assert!(full.kl(&q.full().unwrap()).unwrap().abs() < 1e-14);
    near(&values(q.variance("w")), &[covariance[0][0], covariance[1][1]], 1e-15);
}

#[test]
fn a_late_variable_was_always_at_its_first_value_and_a_frozen_one_is_collected() {
    let mut vs = VarStore::new(Device::Cpu);
    let a = vs.root().zeros("a", &[1]);
    let _statistics = vs.root().zeros_no_train("statistics", &[2]);
    let mut swag = Swag::new(&vs, 3).unwrap();
    set(&a, &[1.0]);
    swag.collect().unwrap();
    let b = vs.root().zeros("b", &[1]);
    set(&b, &[4.0]);
    swag.collect().unwrap();
    vs.freeze();
    set(&b, &[7.0]);
    swag.collect().unwrap();
    let q = swag.posterior().unwrap();
    assert_eq!(q.names().collect::<Vec<_>>(), ["a", "b"]);
    near(&values(q.mean("b")), &[5.0], 1e-6);
    near(&values(swag.diagonal().unwrap().variance("b")), &[2.0], 1e-6);
    near(&values(q.directions("b")), &[0.0, 0.0, 1.0], 1e-6);
    let guard = swap(&swag);
    near(&values(Some(b.shallow_clone())), &[5.0], 1e-6);
    drop(guard);
    assert_eq!(values(Some(b)), [7.0]);
}

fn swap(swag: &Swag) -> Perturbed {
    swag.swap_in().unwrap()
}

#[test]
fn a_file_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("swag.safetensors");
    let store = || {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().zeros("w", &[2]);
        (vs, w)
    };
    let ((vs, w), (mut other, other_w)) = (store(), store());
    for rank in [0, 3] {
        let mut swag = Swag::new(&vs, rank).unwrap().deviations(Deviations::Final);
        for step in 0..6 {
            // Also of nothing yet, and of fewer than the rank.
            swag.save(&path).unwrap();
            let mut resumed = Swag::new(&other, 5).unwrap();
            resumed.load(&path).unwrap();
            let x = [f64::from(step).sin(), f64::from(step).cos()];
            for (swag, w) in [(&mut swag, &w), (&mut resumed, &other_w)] {
                set(w, &x);
                swag.collect().unwrap();
            }
            if step == 0 {
                continue;
            }
            let pair = [&swag, &resumed];
            let [a, b] = pair.map(|swag| swag.diagonal().unwrap().sample(0).unwrap());
            assert_eq!(a, b);
            if rank > 0 {
                let [a, b] = pair.map(|swag| swag.posterior().unwrap().sample(0).unwrap());
                assert_eq!(a, b);
            }
        }
        swag.save(&path).unwrap();
        other.load(&path).unwrap();
        assert_eq!(values(Some(other_w.shallow_clone())), values(swag.get("w")), "it is a file of weights as well");
    }
    let vs = VarStore::new(Device::Cpu);
    let _w = vs.root().zeros("w", &[3]);
    let mut swag = Swag::new(&vs, 4).unwrap();
    swag.collect().unwrap();
    let e = swag.load(&path).unwrap_err().to_string();
    assert!(e.contains("swag.safetensors") && e.contains("[3, 3]"), "{e}");
    assert_eq!((swag.rank, swag.collected()), (4, 1));
}

#[test]
fn what_has_no_covariance_is_refused() {
    let says = |e: Error, what: &str| assert!(e.to_string().contains(what), "{e}");
    let vs = VarStore::new(Device::Cpu);
    says(Swag::new(&vs, 20).unwrap_err(), "there are none");
    let w = vs.root().zeros("w", &[1]);
    says(Swag::new(&vs, 1).unwrap_err(), "rank");
    let mut swag = Swag::new(&vs, 2).unwrap();
    says(swag.swap_in().unwrap_err(), "collect()");
    swag.collect().unwrap();
    for e in [swag.posterior().map(|_| ()).unwrap_err(), swag.diagonal().map(|_| ()).unwrap_err()] {
        says(e, "it has 1, and a variance needs at least 2");
    }
    set(&w, &[f64::INFINITY]);
    says(swag.collect().unwrap_err(), "`w`: its weights are not finite (inf)");
    assert_eq!((swag.collected(), values(swag.get("w"))), (1, vec![0.0]));
    set(&w, &[1e30]);
    swag.collect().unwrap();
    says(swag.posterior().unwrap_err(), "not finite");
    let alone = of(Kind::Double, 0, &[&[1.0], &[2.0]]);
    says(alone.posterior().unwrap_err(), ".diagonal()");
    near(&values(alone.diagonal().unwrap().variance("w")), &[0.25], 1e-15);
}

/// What was refused is not kept: a variable that came with a NaN is taken in once it is a number.
#[test]
fn a_late_variable_that_is_no_number_is_no_part_yet() {
    let vs = VarStore::new(Device::Cpu);
    let _a = vs.root().zeros("a", &[1]);
    let mut swag = Swag::new(&vs, 2).unwrap();
    swag.collect().unwrap();
    let b = vs.root().zeros("b", &[1]);
    set(&b, &[f64::NAN]);
    assert!(swag.collect().is_err() && swag.get("b").is_none());
    set(&b, &[3.0]);
    swag.collect().unwrap();
    assert_eq!((values(swag.get("b")), swag.collected()), (vec![3.0], 2));
    assert!(swag.posterior().is_ok());

    // Begun at a NaN, which no iterate is.
    let w = VarStore::new(Device::Cpu);
    let v = w.root().zeros("v", &[1]);
    set(&v, &[f64::NAN]);
    let mut swag = Swag::new(&w, 2).unwrap();
    set(&v, &[1.0]);
    swag.collect().unwrap();
    assert_eq!(values(swag.get("v")), [1.0]);
}
