//! `Optimizer::learned_posterior`: prior and data, without what a training starts from or is damped by.

use support::{F64, Net, all_close, bits, close, params, refused, values, weight};
use tch::{Kind, Tensor};
use tch_blr::rule::{Row, Rule};
use tch_blr::{
    Adam, BayesianSam, Builder, DiagonalGaussian, Ivon, Optimizer, Philox, Prior, Result, Statistic, Vadam, Von,
};

/// ∇L = 3 everywhere, so that each step finds the same.
fn steps<R: Row>(opt: &mut Optimizer<R>, w: &Tensor, n: u64) {
    for _ in 0..n {
        opt.step(|| (w * 3.0).sum(Kind::Double)).unwrap();
    }
}

fn precision(q: &DiagonalGaussian) -> f64 {
    values(&q.precision("w").unwrap())[0]
}

fn prior() -> DiagonalGaussian {
    DiagonalGaussian::new([("w", weight(&[0.5]).detach(), weight(&[7.0]).detach())]).unwrap()
}

/// h is a plain average of ĝ² = 9: to the last digits, from the first step on.
#[test]
fn prior_and_data() {
    let vadam = || Vadam::default().ess(10.0).beta2(0.9).weight_decay(0.2);
    let starts: [(Builder<Vadam>, f64); 3] = [
        (vadam().builder(), 2.0),
        (vadam().square_init(5000.0).builder(), 2.0),
        (vadam().builder().prior(prior()), 7.0),
    ];
    for (i, (builder, p)) in starts.into_iter().enumerate() {
        let w = weight(&[2.0]);
        let mut opt = builder.build(params(&w), 1e-3).unwrap();
        close(precision(&opt.learned_posterior().unwrap()), p, 1e-12);
        for t in [1, 2, 40] {
            steps(&mut opt, &w, t);
            let q = opt.learned_posterior().unwrap();
            assert!((precision(&q) / (p + 10.0 * 9.0) - 1.0).abs() < 1e-9, "start {i}, {t} steps: {q:?}");
            assert_eq!(values(&q.mean("w").unwrap()), values(&w), "start {i}");
        }
    }
}

/// With IVON's retraction, which is of second order in 1-β₂, and f = κ·3² with κ = ess = 10.
#[test]
fn prior_and_data_by_ivon() {
    let ivon = || Ivon::default().ess(10.0).hessian(Statistic::SquaredGradient).beta2(0.999).weight_decay(0.2);
    let starts: [(Builder<Ivon>, f64); 4] = [
        (ivon().hess_init(200.0).builder(), 2.0),
        // 1/(10·(0.05·2)²) = 10
        (ivon().relative_noise(0.05).builder(), 2.0),
        (ivon().hess_init(200.0).builder().prior(prior()), 7.0),
        (ivon().relative_noise(0.05).builder().prior(prior()), 7.0),
    ];
    for (i, (builder, p)) in starts.into_iter().enumerate() {
        let w = weight(&[2.0]);
        let mut opt = builder.build(params(&w), 1e-3).unwrap();
        steps(&mut opt, &w, 2000);
        let (learned, whole) = (opt.learned_posterior().unwrap(), opt.posterior().unwrap());
        assert!((precision(&learned) / (p + 10.0 * 90.0) - 1.0).abs() < 0.02, "start {i}: {learned:?}");
        let apart = (precision(&whole) / precision(&learned) - 1.0).abs();
        assert!((0.05..0.3).contains(&apart), "start {i}, which is to be seen in the whole: {whole:?}");
    }
}

/// Tasks whose loss is 0 leave the prior as it was, whatever the row starts from and is damped by.
#[test]
fn chains_of_empty_tasks() {
    fn check<R: Rule<Posterior = DiagonalGaussian>>(what: &str, row: fn() -> Builder<R>, wider: bool) {
        let net = Net::new(F64);
        let of = |(name, w): (String, Tensor)| (name, w.copy(), w.full_like(3.0));
        let first = DiagonalGaussian::new(net.vs.variables().into_iter().map(of)).unwrap();
        let mut q = first.shallow_clone();
        for task in 0..3 {
            let mut opt = row().prior(&q).noise(Philox { seed: task }).build(&net.vs, 0.01).unwrap();
            for _ in 0..20 {
                opt.step(|| net.losses() * 0.0).unwrap();
            }
            q = opt.learned_posterior().unwrap();
            // For some rows the training has more than the prior: the test can fail.
            let whole = opt.posterior().unwrap();
            let name = q.names().next().unwrap().to_owned();
            let ratio = values(&(whole.precision(&name).unwrap() / q.precision(&name).unwrap()));
            assert_eq!(ratio[0] > 1.0 + 1e-6, wider, "{what}: {ratio:?}");
        }
        for name in first.names() {
            all_close(&values(&q.precision(name).unwrap()), &values(&first.precision(name).unwrap()), 1e-9);
            all_close(&values(&q.mean(name).unwrap()), &values(&first.mean(name).unwrap()), 1e-9);
        }
    }
    check("Ivon", || Ivon::default().ess(50.0).builder(), false);
    check("Ivon::auto", || Ivon::auto(50.0, 30), true);
    check("Von::auto", || Von::auto(50.0, 30), true);
    check("BayesianSam::auto", || BayesianSam::auto(50.0, 30), true);
    check("VOGN with damping", || Von::vogn().ess(50.0).damping(0.1).builder(), true);
    check("VON by Price's theorem", || Von::vogn().ess(50.0).hessian(Statistic::Price).damping(0.1).builder(), true);
    check("Bayesian SAM with damping", || BayesianSam::default().ess(50.0).damping(0.1).builder(), true);
    check("noisy Adam", || Vadam::noisy_adam().ess(50.0).builder(), false);
}

/// Only a prior knows anything about a parameter that no loss depends on.
#[test]
fn an_unused_head_has_the_priors_precision() {
    let vs = support::store(F64);
    let [used, head] = ["used", "head"].map(|name| support::variable(&vs, name, 0, &Tensor::from_slice(&[1.0, 2.0])));
    let mut opt = Ivon::default().ess(10.0).weight_decay(0.3).beta2(0.9).build(&vs, 0.01).unwrap();
    opt.step(|| used.square().sum(Kind::Double)).unwrap();
    all_close(&values(&opt.learned_posterior().unwrap().precision("head").unwrap()), &[3.0, 3.0], 1e-12);
    all_close(&values(&opt.posterior().unwrap().precision("head").unwrap()), &[13.0, 13.0], 1e-12);
    assert!(head.requires_grad());
}

/// The scale of the weights that it started from is in the checkpoint.
#[test]
fn a_resumed_run_has_learned_the_same() {
    let (w, other) = (weight(&[2.0, -1.0]), weight(&[700.0, 100.0]));
    let build = |w: &Tensor| Ivon::auto(10.0, 30).noise(Philox { seed: 1 }).build(params(w), 0.01).unwrap();
    let (mut opt, mut resumed) = (build(&w), build(&other));
    let loss = |w: &Tensor| (w - 1.0).square().sum(Kind::Double);
    (0..10).for_each(|_| _ = opt.step(|| loss(&w)).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    opt.save(&path).unwrap();
    resumed.load(&path).unwrap();
    for _ in 0..2 {
        let [a, b] = [&opt, &resumed].map(|opt| opt.learned_posterior().unwrap().precision("w").unwrap());
        assert_eq!(bits(&a), bits(&b));
        opt.step(|| loss(&w)).unwrap();
        resumed.step(|| loss(&other)).unwrap();
    }
}

#[test]
fn what_is_not_known_is_said() {
    let w = weight(&[2.0]);
    let adam: Result<_> = Adam::default().ess(10.0).build(params(&w), 0.1).unwrap().learned_posterior();
    refused(adam, &["`adam`", "posterior()"]);
    // Neither prior nor data.
    let opt = Ivon::default().ess(10.0).weight_decay(0.0).build(params(&w), 0.1).unwrap();
    refused(opt.learned_posterior(), &["`w`"]);
    let q = Ivon::default().ess(10.0).builder().prior(Prior::isotropic(4.0)).build(params(&w), 0.1).unwrap();
    close(precision(&q.learned_posterior().unwrap()), 4.0, 1e-12);
}

/// The share is in the posterior, and goes where it goes.
#[test]
fn a_posterior_says_how_much_was_learned() {
    let w = weight(&[2.0]);
    let mut opt = Vadam::default().ess(10.0).beta2(0.99).weight_decay(0.2).build(params(&w), 1e-3).unwrap();
    assert_eq!(opt.posterior().unwrap().learned(), None, "before the first step there is no telling");
    steps(&mut opt, &w, 5);
    let (q, expected) = (opt.posterior().unwrap(), Some(1.0 - 0.99_f64.powi(5)));
    assert_eq!((q.learned(), opt.diagnostics().unwrap().learned), (expected, expected));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("q.safetensors");
    q.save(&path).unwrap();
    let loaded = DiagonalGaussian::load(&path).unwrap();
    for same in [loaded, q.temper(2.0).unwrap(), q.select(|_| true).unwrap(), q.shallow_clone()] {
        assert_eq!(same.learned(), expected);
    }
    let combined = tch_blr::combine(&[(1.0, &q), (1.0, &q)]).unwrap();
    for other in [opt.learned_posterior().unwrap(), combined, prior()] {
        assert_eq!(other.learned(), None);
    }
    prior().save(&path).unwrap();
    assert_eq!(DiagonalGaussian::load(&path).unwrap().learned(), None);
    let mut adam = Adam::default().ess(10.0).build(params(&w), 0.1).unwrap();
    steps(&mut adam, &w, 2);
    assert_eq!(adam.posterior().unwrap().learned(), None);
}

/// Of a precision 7/τ, the one nearest to 2; a score that is no number is no score.
#[test]
fn a_temperature_by_a_score() {
    let score = |q: &DiagonalGaussian| if precision(q) > 10.0 { f64::NAN } else { (precision(q) - 2.0).abs() };
    let (tau, q) = prior().fit_temperature([0.1, 1.0, 3.0, 4.0, 9.0], |q| Ok(score(q))).unwrap();
    assert_eq!((tau, precision(&q)), (4.0, 7.0 / 4.0));
    refused(prior().fit_temperature([0.1], |q| Ok(score(q))), &["no temperature"]);
    refused(prior().fit_temperature([], |_| Ok(0.0)), &["no temperature"]);
    refused(prior().fit_temperature([1.0, -1.0], |_| Ok(0.0)), &["`tau`", "-1"]);
}
