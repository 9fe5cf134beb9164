//! The start that needs no search: `Ivon::auto` and its like.

use support::{F64, Net, close, params, values, weight};
use tch::Kind;
use tch_blr::rule::Row;
use tch_blr::{BayesianSam, Builder, Evon, Ivon, Params, Philox, Posterior, Von};

/// The weights after 30 steps on `scale` times the loss.
fn path<R: Row>(scale: f64, row: impl Fn(f64) -> Builder<R>) -> Vec<Vec<f64>> {
    let net = Net::new(F64);
    // The same posterior: ess·h and ess·δ are what it is made of, and the prior is N(0, 1) anyway.
    let mut opt = row(300.0 / scale).noise(Philox { seed: 3 }).build(&net.vs, 0.02).unwrap();
    for _ in 0..30 {
        opt.step(|| net.losses().mean(Kind::Double) * scale).unwrap();
    }
    net.weights.iter().map(values).collect()
}

/// By a power of two nothing is rounded differently.
#[test]
fn the_scale_of_the_loss_does_not_matter() {
    let (ivon, evon) = (|ess| Ivon::auto(ess, 40), |ess| Evon::auto(ess, 40));
    let expected = (path(1.0, ivon), path(1.0, evon));
    assert_ne!(expected.0, path(1.0, |ess| ivon(ess).map(|c| c.relative_noise(0.1))), "the noise takes part");
    for scale in [4.0, 0.25] {
        assert_eq!(path(scale, ivon), expected.0, "loss times {scale}");
        assert_eq!(path(scale, evon), expected.1, "loss times {scale}");
    }
    assert_eq!(path(65536.0, ivon), expected.0);
}

/// The precision of every parameter is that of a noise of 3 % of its weights' root mean square (of 0.01 where they are
/// smaller than that), and that of the prior N(0, 1).
#[test]
fn noise_starts_at_the_weights_own_scale() {
    let (a, b, zero) = (weight(&[3.0, -4.0]), weight(&[0.1, 0.1, 0.1]), weight(&[0.0]));
    let params =
        || Params::named([("a", &a), ("b", &b), ("zero", &zero)].map(|(name, w)| (name, w.shallow_clone()))).unwrap();
    let precision = |q: &dyn Posterior, name: &str| values(&q.variance(name).unwrap().reciprocal());
    let all: [Box<dyn Posterior>; 4] = [
        Box::new(Evon::auto(1e4, 10).build(params(), 0.1).unwrap().posterior().unwrap()),
        Box::new(Ivon::auto(1e4, 10).build(params(), 0.1).unwrap().posterior().unwrap()),
        Box::new(Von::auto(1e4, 10).build(params(), 0.1).unwrap().posterior().unwrap()),
        Box::new(BayesianSam::auto(1e4, 10).build(params(), 0.1).unwrap().posterior().unwrap()),
    ];
    for q in all {
        for (name, scale) in [("a", 12.5_f64.sqrt()), ("b", 0.1), ("zero", 0.01)] {
            let expected = 1.0 + (0.03_f64 * scale).powi(-2);
            for p in precision(&*q, name) {
                close(p / expected, 1.0, 1e-12);
            }
        }
    }
}

/// A batch whose gradient is a million times the usual one: the precision doubles, and training goes on.
#[test]
fn one_wild_batch_does_not_end_a_run() {
    let precision = |wild: bool| {
        let w = weight(&[1.0]);
        let mut opt = Ivon::auto(1e3, 100).noise(Philox { seed: 1 }).build(params(&w), 0.01).unwrap();
        let mut before = 0.0;
        for step in 0..20 {
            before = values(&opt.posterior().unwrap().precision("w").unwrap())[0];
            let factor = if wild && step == 19 { 1e6 } else { 1.0 };
            opt.step(|| (&w - 0.5).square().sum(Kind::Double) * factor).unwrap();
        }
        assert!((values(&w)[0] - 1.0).abs() < 0.2);
        values(&opt.posterior().unwrap().precision("w").unwrap())[0] / before
    };
    close(precision(true), 2.0, 1e-12);
    assert!((precision(false) - 1.0).abs() < 0.1);
}

/// The priors: N(0, 1), or the posterior that is given; the noise starts at the weights' scale under either.
#[test]
fn the_prior_is_standard_normal_or_the_one_given() {
    let w = weight(&[1.0]);
    let opt = Ivon::auto(50.0, 10).build(params(&w), 0.1).unwrap();
    close(opt.config().weight_decay * 50.0, 1.0, 1e-15);
    let q = opt.posterior().unwrap();
    let next = Ivon::auto(20.0, 10).prior(&q).build(params(&w), 0.1).unwrap().posterior().unwrap();
    let [start, prior] = [&next, &q].map(|q| values(&q.precision("w").unwrap())[0]);
    close((start - prior) * 0.03_f64.powi(2), 1.0, 1e-9);
}

#[test]
fn senseless_numbers_are_named() {
    let w = weight(&[1.0]);
    for (ess, steps, name) in [(0.0, 10, "`ess`"), (f64::NAN, 10, "`ess`"), (10.0, 0, "`schedule total`")] {
        let e = Ivon::auto(ess, steps).build(params(&w), 0.1).unwrap_err().to_string();
        assert!(e.contains(name), "{e}");
    }
}
