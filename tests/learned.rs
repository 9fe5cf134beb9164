//! What of a training goes on, as a prior and into a merge: prior and data, and neither what the training was damped by
//! (`posterior`) nor what it started from (`learned_posterior`).

use support::{F64, Form, Net, all_close, assert_close, bits, close, params, refused, values, weight};
use tch::{Kind, Tensor};
use tch_blr::rule::{Row, Rule};
use tch_blr::{
    Adam, BayesianSam, Builder, DiagonalGaussian, DiagonalNewton, Evon, FullVon, Given, Ivon, KroneckerGaussian,
    Labels, Mixture, NoisyKfac, Optimizer, Philox, Posterior, Prior, Result, Statistic, Vadam, Von, combine, merge, nn,
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
    check("VOGN with damping", || Von::vogn().ess(50.0).damping(0.1).builder(), false);
    check("VON by Price's theorem", || Von::vogn().ess(50.0).hessian(Statistic::Price).damping(0.1).builder(), false);
    check("Bayesian SAM with damping", || BayesianSam::default().ess(50.0).damping(0.1).builder(), false);
    check("noisy Adam", || Vadam::noisy_adam().ess(50.0).builder(), false);
}

/// Tasks whose loss is 0 leave q as it was, by its plain `posterior`, in every row that makes one; and the mean stays.
#[test]
fn the_posterior_of_an_empty_task_is_its_prior() {
    fn check<R: Row>(what: &str, first: &R::Posterior, row: impl Fn() -> Builder<R>)
    where
        R::Posterior: Posterior,
        Prior: for<'a> From<&'a R::Posterior>,
    {
        let net = Net::of(Form::Tapped, F64, 0.0);
        let mut last: Option<R::Posterior> = None;
        for task in 0..3 {
            let q = last.as_ref().unwrap_or(first);
            (q as &dyn Posterior).copy_mean_to(&net.vs).unwrap();
            let mut opt = row().prior(Prior::from(q)).noise(Philox { seed: task }).build(&net.vs, 0.01).unwrap();
            for _ in 0..12 {
                opt.step(|| net.losses() * 0.0).unwrap();
            }
            last = Some(opt.posterior().unwrap());
        }
        let last = last.unwrap();
        for name in first.names() {
            println!("{what}, {name}");
            assert_close(&last.mean(name).unwrap(), &first.mean(name).unwrap(), 1e-12);
            assert_close(&last.variance(name).unwrap(), &first.variance(name).unwrap(), 1e-12);
        }
    }
    // Of a task with data, so that its bases are not the identity.
    fn trained<R: Row<Posterior = KroneckerGaussian>>(row: R) -> KroneckerGaussian {
        let net = Net::of(Form::Tapped, F64, 0.0);
        let mut opt = row.builder().noise(Philox { seed: 9 }).build(&net.vs, 1e-12).unwrap();
        (0..12).for_each(|_| _ = opt.step(|| net.losses()).unwrap());
        opt.posterior().unwrap()
    }
    let net = Net::of(Form::Tapped, F64, 0.0);
    let of = |(i, (name, w)): (usize, (String, Tensor))| {
        let s = Tensor::arange(w.numel() as i64, (Kind::Double, w.device())).reshape(w.size()) + 3.0 + i as f64;
        (name, w.copy(), s)
    };
    let diagonal = DiagonalGaussian::new(net.vs.variables().into_iter().enumerate().map(of)).unwrap();
    check("Ivon", &diagonal, || Ivon::default().ess(50.0).builder());
    check("VOGN", &diagonal, || Von::vogn().ess(50.0).damping(0.1).builder());
    check("VOGN of 2019", &diagonal, || Von::neurips2019().ess(50.0).builder());
    check("VON", &diagonal, || Von::vogn().ess(50.0).damping(0.1).hessian(Statistic::Price).builder());
    check("tempered", &diagonal, || Von::vogn().ess(50.0).damping(0.1).temperature(0.3).builder());
    check("bSAM", &diagonal, || BayesianSam::default().ess(50.0).builder());
    check("released bSAM", &diagonal, || BayesianSam::released().ess(50.0).builder());
    check("Vadam", &diagonal, || Vadam::default().ess(50.0).damping(0.1).builder());
    check("noisy Adam", &diagonal, || Vadam::noisy_adam().ess(50.0).damping(0.1).builder());
    check("Adam", &diagonal, || Adam::default().ess(50.0).builder());
    check("DiagonalNewton", &diagonal, || DiagonalNewton::default().ess(50.0).builder());

    let kfac = NoisyKfac::default().ess(50.0).damping(0.1).frequency(2).labels(Labels::Observed);
    let evon = Evon::default().ess(50.0).frequency(2);
    // Not that of K-FAC, whose biases have a basis.
    check("EVON", &trained(evon), || evon.builder());
    for q in [trained(kfac), trained(evon)] {
        check("noisy K-FAC", &q, || kfac.builder());
        check("noisy K-FAC, one damping", &q, || kfac.split_damping(false).builder());
    }
    let full = diagonal.full().unwrap();
    check("FullVon", &full, || FullVon::default().ess(50.0).builder());
    check("FullVon, plain", &full, || FullVon::default().ess(50.0).improved(false).builder());
}

/// An isotropic prior is all that noisy K-FAC knows where no gradient speaks, though the layers have inputs.
#[test]
fn without_gradients_noisy_kfac_has_the_priors_precision() {
    let net = Net::of(Form::Tapped, F64, 0.0);
    for split in [true, false] {
        let row =
            NoisyKfac::default().ess(50.0).weight_decay(0.1).damping(0.3).split_damping(split).labels(Labels::Observed);
        let mut opt = row.build(&net.vs, 0.0).unwrap();
        opt.step(|| net.losses() * 0.0).unwrap();
        let q = opt.posterior().unwrap();
        for name in q.names() {
            assert!(values(&q.variance(name).unwrap()).iter().all(|v| (v * 5.0 - 1.0).abs() < 1e-12), "{name}: {q:?}");
        }
    }
}

/// The training's noise has γ (with z = 1, a distance of 1/√(λ(h+δ+γ)) = ¼ from the mean), and so have the posterior's
/// samples; what is known has not.
#[test]
fn damping_is_in_the_noise_and_not_in_what_is_known() {
    fn check<R: Row<Posterior = DiagonalGaussian>>(row: R, evaluations: usize) {
        let w = weight(&[2.0]);
        let noise = Given(vec![vec![vec![Tensor::from_slice(&[1.0])]]]);
        let mut opt = row.builder().noise(noise).build(params(&w), 0.0).unwrap();
        let q = opt.posterior().unwrap();
        let mut points = Vec::new();
        opt.step(|| {
            points.push(values(&w)[0]);
            (&w * 0.0).sum(Kind::Double)
        })
        .unwrap();
        assert_eq!(points.len(), evaluations);
        close(points[0], 2.25, 1e-15);
        assert_eq!((values(&q.precision("w").unwrap()), q.damping("w")), (vec![4.0], Some(12.0)));
        assert_eq!(values(&q.variance("w").unwrap()), [0.25]);
        close(q.entropy(), 0.5 * (1.0 + std::f64::consts::TAU.ln() - 4.0_f64.ln()), 1e-15);
        // The same z in both.
        let of = |q: &DiagonalGaussian| values(&q.sample(3).unwrap()[0].1)[0] - 2.0;
        close(of(&q) * 4.0, of(&q.shallow_clone().undamped()) * 2.0, 1e-15);
        close(opt.diagnostics().unwrap().sigma.unwrap().mean, 0.25 * (16.0_f64 / opt_noise(&opt)).sqrt(), 1e-15);
        // Neither a sum nor a prior has it.
        let sum = combine(&[(1.0, &q), (1.0, &q)]).unwrap();
        assert_eq!((values(&sum.precision("w").unwrap()), sum.damping("w")), (vec![8.0], Some(0.0)));
        let next = Ivon::default().ess(8.0).prior(&q).build(params(&w), 0.0).unwrap().posterior().unwrap();
        assert_eq!((values(&next.precision("w").unwrap()), next.damping("w")), (vec![4.0], Some(0.0)));
    }
    /// λ(h+δ+γ) now.
    fn opt_noise<R: Row<Posterior = DiagonalGaussian>>(opt: &Optimizer<R>) -> f64 {
        let q = opt.posterior().unwrap();
        values(&q.precision("w").unwrap())[0] + q.damping("w").unwrap()
    }
    let von = Von::vogn().ess(8.0).hess_init(0.25).weight_decay(0.25).damping(1.5);
    check(von.hessian(Statistic::Price), 1);
    check(von.ess(4.0).augmentation(4.0).temperature(2.0).weight_decay(0.125).hessian(Statistic::Price), 1);
    check(BayesianSam::default().ess(8.0).hess_init(0.25).weight_decay(0.25).damping(1.5), 2);
}

/// A curvature estimate below -δ, which only the damping makes a precision: what is known is the prior then.
#[test]
fn damped_precisions_are_at_least_the_priors() {
    let w = weight(&[0.0]);
    let row = Von::vogn().ess(8.0).weight_decay(0.25).damping(1.5).beta2(0.5).hessian(Statistic::Price);
    let noise = Given((0..4).map(|_| vec![vec![Tensor::from_slice(&[1.0])]]).collect());
    let mut opt = row.noise(noise).build(params(&w), 0.0).unwrap();
    // ∇²L = -2 everywhere, in the mean f.
    (0..4).for_each(|_| _ = opt.step(|| -w.square().sum(Kind::Double)).unwrap());
    let h = values(&opt.state("w", "hess").unwrap())[0];
    assert!(h + 0.25 < 0.0 && h + 0.25 + 1.5 > 0.0, "{h}");
    let q = opt.posterior().unwrap();
    assert_eq!((values(&q.precision("w").unwrap()), q.damping("w")), (vec![2.0], Some(12.0)));
}

/// It stays with a posterior on all of its ways, and does so in files.
#[test]
fn damping_goes_where_the_posterior_goes() {
    let (a, b) = (weight(&[2.0, 1.0]), weight(&[-1.0]));
    let params = || tch_blr::Params::named([("a", a.shallow_clone()), ("b", b.shallow_clone())]).unwrap();
    let row = Von::vogn().ess(8.0).damping(1.5).builder().named(|name| name == "b", |c| c.damping(0.25));
    let q = row.build(params(), 0.1).unwrap().posterior().unwrap().with_seed(5);
    let of = |q: &DiagonalGaussian| ["a", "b"].map(|name| q.damping(name));
    assert_eq!(of(&q), [Some(12.0), Some(2.0)]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("q.safetensors");
    q.save(&path).unwrap();
    let loaded = DiagonalGaussian::load(&path).unwrap();
    let clamped = tch_blr::clamp_information(&q, &q).unwrap();
    for same in [&loaded, &q.shallow_clone(), &q.select(|_| true).unwrap(), &clamped] {
        assert_eq!(of(same), of(&q));
        assert_eq!(bits(&same.sample(1).unwrap()[0].1), bits(&q.sample(1).unwrap()[0].1));
    }
    assert_eq!(of(&q.temper(4.0).unwrap()), [Some(3.0), Some(0.5)]);
    assert_eq!(of(&q.select(|name| name == "b").unwrap()), [None, Some(2.0)]);

    let mixture = Mixture::equal([q.shallow_clone(), q.shallow_clone().undamped()]).unwrap();
    mixture.save(&path).unwrap();
    let loaded = Mixture::load(&path).unwrap();
    assert_eq!(loaded.components().iter().map(of).collect::<Vec<_>>(), [[Some(12.0), Some(2.0)], [Some(0.0); 2]]);
    assert_eq!(bits(&loaded.sample(2).unwrap()[1].1), bits(&mixture.sample(2).unwrap()[1].1));
}

/// Fine-tunes of a quadratic loss: orthogonal inputs, 100 examples each, unit noise, the prior q₀. The merge is the
/// exact posterior of all data, whatever the damping.
#[test]
fn merges_of_damped_fine_tunes_are_exact() {
    let (n, p0) = (100.0, [4.0, 9.0]);
    let q0 = DiagonalGaussian::new([("w", Tensor::from_slice(&[0.5, -1.0]), Tensor::from_slice(&p0))]).unwrap();
    // Σ x² of each weight's own examples, and what they say.
    let tasks = [([50.0, 100.0], [1.0, 2.0]), ([100.0, 25.0], [0.5, -2.0])];
    for gamma in [0.0, 0.1] {
        let fine_tune = |(h, target): &([f64; 2], [f64; 2])| {
            let w = weight(&[0.5, -1.0]);
            let row = Von::ogn().ess(n).damping(gamma).beta1(0.0).beta2(0.5).hessian(Statistic::Fisher(Labels::Exact));
            let mut opt = row.prior(&q0).build(params(&w), 1.0).unwrap();
            // Two examples stand for all: x = √(2h/n) of its own weight.
            let x = Tensor::from_slice(h) * 2.0 / n;
            let x = x.sqrt();
            for _ in 0..400 {
                opt.step(|| nn::squared_error(&(&x * &w), &(&x * Tensor::from_slice(target)), 1.0)).unwrap();
            }
            opt.posterior().unwrap()
        };
        let [a, b] = tasks.each_ref().map(fine_tune);
        let joint = merge::gradient_matching(&q0, &[(1.0, &a), (1.0, &b)]).unwrap();
        let same = merge::federated(&q0, &[&a, &b]).unwrap();
        let mean = |j: usize| {
            let m0 = [0.5, -1.0][j];
            let sum: f64 = tasks.iter().map(|(h, target)| h[j] * target[j]).sum();
            (p0[j] * m0 + sum) / (p0[j] + tasks.iter().map(|(h, _)| h[j]).sum::<f64>())
        };
        for q in [joint, same] {
            all_close(&values(&q.precision("w").unwrap()), &[154.0, 134.0], 1e-10);
            all_close(&values(&q.mean("w").unwrap()), &[mean(0), mean(1)], 1e-10);
        }
    }
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
