//! Rows with a structured posterior: exact answers, positivity, errors that change nothing, checkpoints.

// Digits as the reference has them.
#![allow(clippy::unreadable_literal)]

use support::{all_close, chirp, close, exact_expectations, mean_and_error, orthogonal, params, values, weight};
use tch::nn::{Init, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::rows::{PrecisionInStep, StepLength};
use tch_blr::rule::Row;
use tch_blr::{
    Adam, Builder, DiagonalNewton, Error, Evon, Expectation, FullGaussian, FullVon, Given, Ivon, Newton, Optimizer,
    Params, Philox, Prior, Schedule, Soap, Statistic,
};

/// Ridge regression of three points, unit noise and prior: its posterior has precision [[4, 3], [3, 6]] and mean
/// (0.8, 0.6). As mean loss of N = λ = 3 examples, δ = 1/3.
struct Ridge {
    w: Tensor,
    x: Tensor,
    y: Tensor,
}

const ESS: f64 = 3.0;
const DELTA: f64 = 1.0 / ESS;
const MEAN: [f64; 2] = [0.8, 0.6];
const PRECISION: [f64; 4] = [4.0, 3.0, 3.0, 6.0];

impl Ridge {
    fn new() -> Self {
        let x = Tensor::from_slice(&[1.0, 0.0, 1.0, 1.0, 1.0, 2.0]).reshape([3, 2]);
        Ridge { w: weight(&[5.0, -3.0]), x, y: Tensor::from_slice(&[1.0, 2.0, 2.0]) }
    }

    fn loss(&self) -> Tensor {
        (self.x.mv(&self.w) - &self.y).square().mean(Kind::Double) * 0.5
    }

    fn is_solved(&self, q: &FullGaussian, tolerance: f64) {
        all_close(&values(&self.w), &MEAN, tolerance);
        all_close(&values(&q.mean_vector()), &MEAN, tolerance);
        all_close(&values(q.precision_matrix()), &PRECISION, tolerance);
        // The inverse by hand: [[6, -3], [-3, 4]]/15.
        all_close(&values(&q.covariance_matrix().unwrap()), &[0.4, -0.2, -0.2, 4.0 / 15.0], tolerance);
    }
}

/// Both Hessians, with expectations that are exact, and rates of one.
fn unit_steps(steps: usize) -> [Builder<FullVon>; 2] {
    [Statistic::Price, Statistic::Hessian].map(|hessian| {
        let (expectation, noise) = exact_expectations(steps, &[2]);
        let rule = FullVon::default().ess(ESS).weight_decay(DELTA).improved(false).beta2(0.0);
        rule.expectation(expectation).hessian(hessian).noise(noise)
    })
}

/// ρ = 1 is conjugate Bayes: the exact posterior of a linear regression after one step from anywhere.
#[test]
fn one_step_solves_linear_regression() {
    for builder in unit_steps(1) {
        let ridge = Ridge::new();
        let mut opt = builder.build(params(&ridge.w), 1.0).unwrap();
        opt.step(|| ridge.loss()).unwrap();
        ridge.is_solved(&opt.posterior().unwrap(), 1e-13);
    }
    let ridge = Ridge::new();
    let mut opt = Newton::default().ess(ESS).weight_decay(DELTA).build(params(&ridge.w), 1.0).unwrap();
    opt.step(|| ridge.loss()).unwrap();
    ridge.is_solved(&opt.posterior().unwrap(), 1e-13);
}

/// ρ < 1 goes the same way geometrically: in natural parameters the rest shrinks by 1-ρ in each step.
#[test]
fn natural_parameters_converge_geometrically() {
    let rho = 0.3;
    let ridge = Ridge::new();
    let (expectation, noise) = exact_expectations(5, &[2]);
    let rule = FullVon::default().ess(ESS).weight_decay(DELTA).improved(false).beta2(1.0 - rho);
    let rule = rule.expectation(expectation).noise(noise);
    let mut opt = rule.build(params(&ridge.w), rho).unwrap();
    let rest = |opt: &Optimizer<FullVon>| {
        let q = opt.posterior().unwrap();
        let precision_mean = values(&q.precision_matrix().mv(&q.mean_vector()));
        let exact = PRECISION.iter().chain(&[5.0, 6.0]);
        values(q.precision_matrix()).iter().chain(&precision_mean).zip(exact).map(|(a, b)| a - b).collect::<Vec<_>>()
    };
    for _ in 0..5 {
        let before: Vec<f64> = rest(&opt).iter().map(|x| x * (1.0 - rho)).collect();
        opt.step(|| ridge.loss()).unwrap();
        all_close(&rest(&opt), &before, 1e-12);
    }
}

/// The improved rule has the same fixed point, with either precision in the step.
#[test]
fn the_improved_rule_finds_the_same_posterior() {
    for precision_in_step in [PrecisionInStep::New, PrecisionInStep::Old] {
        for hessian in [Statistic::Price, Statistic::Hessian] {
            let ridge = Ridge::new();
            let (expectation, noise) = exact_expectations(400, &[2]);
            let rule = FullVon::default().ess(ESS).weight_decay(DELTA).precision_in_step(precision_in_step);
            let rule = rule.expectation(expectation).hessian(hessian).noise(noise);
            let mut opt = rule.build(params(&ridge.w), 0.3).unwrap();
            for _ in 0..400 {
                opt.step(|| ridge.loss()).unwrap();
            }
            ridge.is_solved(&opt.posterior().unwrap(), 1e-12);
        }
    }
}

/// Quadratic losses whose Hessians are of any sign and of sizes from 1e-3 to 1e6: the improved rule's S never falls
/// below half of itself, and the plain rule's step is an error that changes nothing.
#[test]
fn the_improved_rule_stays_positive_definite() {
    let n = 4;
    let hessian = |t: usize| {
        let a = (Tensor::arange(n * n, (Kind::Double, Device::Cpu)) * 1.7 + t as f64).sin().reshape([n, n]);
        (&a + a.tr()) * 10f64.powi((t * 7 % 10) as i32 - 3)
    };
    let rule = FullVon::default().ess(10.0).hessian(Statistic::Hessian).beta2(0.5).expectation(Expectation::Delta);
    let w = weight(&[0.1, -0.2, 0.3, 0.0]);
    let mut opt = rule.build(params(&w), 0.0).unwrap();
    let mut indefinite = 0;
    for t in 0..60 {
        let (before, a) = (opt.posterior().unwrap(), hessian(t));
        indefinite += i32::from(a.linalg_eigvalsh("L").min().double_value(&[]) < 0.0);
        opt.step(|| a.mv(&w).dot(&w) * 0.5).unwrap();
        let after = opt.posterior().unwrap();
        let rest = (after.precision_matrix() - before.precision_matrix() * 0.5).linalg_eigvalsh("L");
        let scale = after.precision_matrix().abs().max().double_value(&[]);
        assert!(rest.min().double_value(&[]) > -1e-12 * scale, "step {t}: {rest}");
    }
    assert!(indefinite > 50, "{indefinite}");

    let mut plain = rule.improved(false).build(params(&w), 0.1).unwrap();
    let refused = unchanged(&mut plain, &w, || hessian(7).mv(&w).dot(&w) * 0.5);
    assert!(matches!(refused, Error::NotPositiveDefinite { .. }), "{refused}");
}

/// The error of a step that changes neither the checkpoint nor the weights.
fn unchanged<R: Row>(opt: &mut Optimizer<R>, w: &Tensor, loss: impl FnMut() -> Tensor) -> Error {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let file = |opt: &Optimizer<R>| {
        opt.save(&path).unwrap();
        (std::fs::read(&path).unwrap(), values(w), opt.steps())
    };
    let before = file(opt);
    let error = opt.step(loss).unwrap_err();
    assert!(before == file(opt), "{error}");
    error
}

/// ℓ(θ) = ln(1 + e⁻ᶿ) + ½θ²: one observation of a logistic regression, with its prior as the weight decay.
fn logistic(w: &Tensor) -> Tensor {
    (-w).softplus().sum(Kind::Double)
}

/// The minimum is the delta method's fixed point and its Hessian Laplace's precision (reference).
#[test]
fn newton_finds_laplace() {
    let w = weight(&[0.0]);
    let mut opt = Newton::default().ess(1.0).weight_decay(1.0).build(params(&w), 1.0).unwrap();
    let v = weight(&[0.0]);
    let mut diagonal = DiagonalNewton::default().ess(1.0).weight_decay(1.0).build(params(&v), 1.0).unwrap();
    for _ in 0..8 {
        opt.step(|| logistic(&w)).unwrap();
        diagonal.step(|| logistic(&v)).unwrap();
    }
    let q = opt.posterior().unwrap();
    close(values(&w)[0], 0.40105813754154696, 1e-14);
    close(values(q.precision_matrix())[0], 1.2402105078532526, 1e-14);
    let q = diagonal.posterior().unwrap();
    close(values(&q.mean("w").unwrap())[0], 0.40105813754154696, 1e-14);
    close(values(&q.precision("w").unwrap())[0], 1.2402105078532526, 1e-14);
}

/// The variational fixed point (reference), with E_q as a mean over 80 quantiles of the normal, scaled to unit
/// variance. The delta method's answer is ten times the tolerance away.
#[test]
fn full_von_finds_the_variational_posterior() {
    let k = 40;
    let u = (Tensor::arange(k, (Kind::Double, Device::Cpu)) + 0.5) / (2.0 * k as f64) + 0.5;
    let z = ((u * 2.0 - 1.0).erfinv()) * 2f64.sqrt();
    let z = &z / z.square().mean(Kind::Double).sqrt();
    let steps = 40;
    let draw = |i: i64| vec![z.narrow(0, i, 1)];
    let noise = || Given((0..steps).map(|_| (0..k).map(draw).collect()).collect());
    for hessian in [Statistic::Price, Statistic::Hessian] {
        let w = weight(&[0.0]);
        let rule = FullVon::default().ess(1.0).weight_decay(1.0).beta2(0.5).hessian(hessian);
        let rule = rule.expectation(Expectation::Antithetic { pairs: k as usize }).noise(noise());
        let mut opt = rule.build(params(&w), 0.5).unwrap();
        for _ in 0..steps {
            opt.step(|| logistic(&w)).unwrap();
        }
        close(values(&w)[0], 0.4131268059796806, 1e-3);
        close(values(opt.posterior().unwrap().precision_matrix())[0], 1.2064642957005864, 3e-3);
    }
}

/// One sample a step, with a falling learning rate: the mean is that of the regression at 4 standard errors over
/// independent runs, and the precision, of a constant Hessian, is exact.
#[test]
fn stochastic_steps_are_unbiased() {
    let mut found = [Vec::new(), Vec::new()];
    for seed in 0..16 {
        let ridge = Ridge::new();
        let rule = FullVon::default().ess(ESS).weight_decay(DELTA).beta2(0.8).hessian(Statistic::Hessian);
        let rule = rule.noise(Philox { seed }).schedule(Schedule::Step { every: 40, factor: 0.5 });
        let mut opt = rule.build(params(&ridge.w), 0.3).unwrap();
        for _ in 0..160 {
            opt.step(|| ridge.loss()).unwrap();
        }
        all_close(&values(opt.posterior().unwrap().precision_matrix()), &PRECISION, 1e-8);
        for (all, x) in found.iter_mut().zip(values(&ridge.w)) {
            all.push(x);
        }
    }
    for (all, expected) in found.iter().zip(MEAN) {
        let (mean, error) = mean_and_error(all);
        close(mean, expected, 4.0 * error);
        assert!(error < 0.05, "{error}");
    }
}

/// A loss over two variables of different shapes, with cross derivatives.
fn coupled(a: &Tensor, b: &Tensor) -> Tensor {
    (a.matmul(&b.unsqueeze(1)).sin() + a.square().sum_dim_intlist(1, true, None::<Kind>)).sum(Kind::Double)
        + b.pow_tensor_scalar(4.0).sum(Kind::Double)
}

/// Against the fourth-order difference quotient of the gradient.
#[test]
fn the_hessian_is_that_of_all_parameters_together() {
    let a = (Tensor::arange(6, (Kind::Double, Device::Cpu)) * 1.3).sin().reshape([2, 3]).set_requires_grad(true);
    let b = weight(&[0.3, -0.2, 0.5]);
    let named = || Params::named([("a", a.shallow_clone()), ("b", b.shallow_clone())]).unwrap();
    let (a0, b0) = (a.detach().copy(), b.detach().copy());
    let gradient = |i: i64, h: f64| {
        let shift = |x: &Tensor, first: i64| {
            let x = x.copy();
            if (first..first + x.numel() as i64).contains(&i) {
                let mut element = x.view([-1]).get(i - first);
                element += h;
            }
            x.set_requires_grad(true)
        };
        let (a, b) = (shift(&a0, 0), shift(&b0, 6));
        let g = Tensor::run_backward(&[coupled(&a, &b)], &[&a, &b], false, false);
        Tensor::cat(&[g[0].view([-1]), g[1].view([-1])], 0)
    };
    let h = 1e-3;
    let row =
        |i| (gradient(i, -2.0 * h) - gradient(i, 2.0 * h) + (gradient(i, h) - gradient(i, -h)) * 8.0) / (12.0 * h);
    let exact = Tensor::stack(&(0..9).map(row).collect::<Vec<_>>(), 0);
    let rule = FullVon::default().ess(1.0).hessian(Statistic::Hessian).expectation(Expectation::Delta);
    let mut opt = rule.beta2(0.0).weight_decay(100.0).improved(false).build(named(), 0.0).unwrap();
    opt.step(|| coupled(&a, &b)).unwrap();
    let error = (opt.state("b", "hess").unwrap() - &exact).abs().max().double_value(&[]);
    assert!(error < 1e-9, "{error}");

    let rule = DiagonalNewton::default().weight_decay(100.0);
    let diagonal = |rule: DiagonalNewton, seed| {
        let mut opt = rule.noise(Philox { seed }).build(named(), 0.0).unwrap();
        opt.step(|| coupled(&a, &b)).unwrap();
        values(&opt.state("a", "hess").unwrap())
    };
    all_close(&diagonal(rule, 0), &values(&exact.diagonal(0, 0, 1)), 1e-9);
    // Hutchinson: unbiased, at 4.5 standard errors of 400 estimates for each of 9 elements (6e-5), and not exact.
    let rule = rule.hessian(Statistic::Hutchinson { probes: 2 });
    let estimates: Vec<Vec<f64>> = (0..400).map(|seed| diagonal(rule, seed)).collect();
    for (i, expected) in values(&exact.diagonal(0, 0, 1)).into_iter().enumerate() {
        let (mean, error) = mean_and_error(&estimates.iter().map(|e| e[i]).collect::<Vec<_>>());
        close(mean, expected, 4.5 * error + 1e-9);
        assert!(error > 1e-4, "{error}");
    }
}

/// A diagonal Hessian is found exactly by a single vector of signs; so a separable quadratic is solved in one step.
#[test]
fn one_diagonal_step_solves_a_separable_quadratic() {
    for hessian in [Statistic::HessianDiagonal, Statistic::Hutchinson { probes: 1 }] {
        let w = weight(&[1.0, 2.0, -3.0]);
        let c = Tensor::from_slice(&[1.0, 4.0, 0.5]);
        let mut opt = DiagonalNewton::default().ess(2.0).hessian(hessian).build(params(&w), 1.0).unwrap();
        opt.step(|| ((&w - 0.25).square() * &c).sum(Kind::Double) * 0.5).unwrap();
        all_close(&values(&w), &[0.25; 3], 1e-15);
        all_close(&values(&opt.posterior().unwrap().precision("w").unwrap()), &[2.0, 8.0, 1.0], 1e-15);
    }
}

#[test]
fn a_saddle_is_an_error_that_changes_nothing() {
    let w = weight(&[1.0, 2.0]);
    let saddle = || {
        let square = w.square();
        square.get(0) - square.get(1)
    };
    let e = unchanged(&mut Newton::default().build(params(&w), 1.0).unwrap(), &w, saddle);
    assert!(matches!(e, Error::NotPositiveDefinite { .. }) && e.to_string().contains("weight decay"), "{e}");
    let e = unchanged(&mut DiagonalNewton::default().build(params(&w), 1.0).unwrap(), &w, saddle);
    assert!(matches!(e, Error::NotPositiveDefinite { .. }) && e.to_string().contains("-2e0"), "{e}");
    // A singular Hessian: the loss does not depend on the second weight.
    let e = unchanged(&mut Newton::default().build(params(&w), 1.0).unwrap(), &w, || w.get(0).square());
    assert!(matches!(e, Error::NotPositiveDefinite { .. }), "{e}");
    // Nor does a loss that is not finite, one whose derivatives are not, or a closure's misuse.
    let mut opt = FullVon::default().ess(10.0).noise(Philox { seed: 0 }).build(params(&w), 0.1).unwrap();
    let e = unchanged(&mut opt, &w, || (w.sum(Kind::Double) * 0.0).log());
    assert!(matches!(e, Error::NonFiniteLoss { .. }), "{e}");
    let e = unchanged(&mut opt, &w, || (&w - &w).sqrt().sum(Kind::Double));
    assert!(matches!(e, Error::NonFiniteGradient { .. }) && e.to_string().contains("`w`"), "{e}");
    let e = unchanged(&mut opt, &w, || w.shallow_clone().reshape([1, 2]));
    assert!(matches!(e, Error::Loss(_)), "{e}");
}

#[test]
fn priors_that_do_not_fit_are_refused() {
    let w = weight(&[1.0, 2.0]);
    let q = FullGaussian::new([("w", w.copy())], &Tensor::eye(2, (Kind::Double, Device::Cpu))).unwrap();
    let e = Evon::default().ess(10.0).prior(&q).build(params(&w), 0.1).unwrap_err();
    assert!(matches!(e, Error::Posterior(_)) && e.to_string().contains(".diagonal()"), "{e}");
    Evon::default().ess(10.0).prior(q.diagonal().unwrap()).build(params(&w), 0.1).unwrap();
    let e = Ivon::default().ess(10.0).prior(&q).build(params(&w), 0.1).unwrap_err();
    assert!(e.to_string().contains("ivon takes a prior that is isotropic or a diagonal Gaussian"), "{e}");
    let e = Newton::default().prior(Prior::isotropic(2.0)).build(params(&w), 0.1).unwrap_err();
    assert!(e.to_string().contains("`ess`"), "{e}");
    let e = FullVon::default().ess(10.0).prior(Prior::isotropic(-2.0)).build(params(&w), 0.1).unwrap_err();
    assert!(matches!(e, Error::HyperParameter { .. }), "{e}");
    // P₀ beside λh₀.
    let opt = FullVon::default().ess(10.0).hess_init(0.5).prior(Prior::isotropic(2.0)).build(params(&w), 0.1).unwrap();
    all_close(&values(&opt.posterior().unwrap().precision_matrix().diag(0)), &[7.0; 2], 1e-14);
}

/// A model of three variables, of which one is frozen.
fn model(kind: Kind) -> (VarStore, Vec<Tensor>) {
    let mut vs = VarStore::new(Device::Cpu);
    let root = vs.root();
    let vars = [("a", vec![2, 3]), ("b", vec![3]), ("c", vec![2])]
        .map(|(name, shape)| root.var(name, &shape, Init::Const(0.5)));
    drop(root);
    vs.set_kind(kind);
    let _ = vars[2].set_requires_grad(false);
    (vs, vars.into())
}

fn loss_of(vars: &[Tensor]) -> Tensor {
    let [a, b, c] = vars else { unreachable!() };
    let wide = |t: &Tensor| t.to_kind(Kind::Double);
    ((wide(a).mv(&wide(b)) - wide(c)).square().sum(Kind::Double) + wide(b).square().sum(Kind::Double)) * 0.5
}

/// Six steps are three, a checkpoint, and three; for rows of one and of many blocks, in every kind of weights.
#[test]
fn training_resumes_bit_by_bit() {
    fn resumes<R: Row>(rule: R, lr: f64) {
        for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
            let build = |vs: &VarStore, seed| {
                rule.builder()
                    .noise(Philox { seed })
                    .schedule(Schedule::Step { every: 2, factor: 0.5 })
                    .build(vs, lr)
                    .unwrap()
            };
            let dir = tempfile::tempdir().unwrap();
            let (half, whole) = (dir.path().join("half"), dir.path().join("whole"));
            let (vs, vars) = model(kind);
            let mut opt = build(&vs, 3);
            for t in 0..6 {
                if t == 3 {
                    opt.save(&half).unwrap();
                }
                opt.step(|| loss_of(&vars)).unwrap();
            }
            opt.save(&whole).unwrap();
            assert_eq!(values(&vars[2]), [0.5; 2], "a frozen variable moved");
            let (vs, vars) = model(kind);
            let mut again = build(&vs, 4);
            again.load(&half).unwrap();
            assert_eq!((again.steps(), again.lr()), (3, 0.5 * lr));
            for _ in 0..3 {
                again.step(|| loss_of(&vars)).unwrap();
            }
            again.save(&half).unwrap();
            assert!(std::fs::read(&half).unwrap() == std::fs::read(&whole).unwrap(), "{} {kind:?}", R::NAME);
        }
    }
    resumes(FullVon::default().ess(100.0), 0.1);
    resumes(Evon::default().ess(100.0).frequency(2), 0.1);
    // With an odd number of steps before the checkpoint, so that the phase goes on, too.
    resumes(Evon::published().ess(100.0).beta2(0.9).frequency(2), 0.1);
    resumes(Evon::default().ess(100.0).frequency(2).merge_dims(true).rotate_vectors(true), 0.1);
    resumes(Evon::default().expectation(Expectation::Delta).hess_clip(2.0).frequency(2), 0.1);
    resumes(Soap::default().frequency(2), 0.1);
    resumes(Newton::default().weight_decay(1.0), 0.5);
    resumes(DiagonalNewton::default().weight_decay(1.0).hessian(Statistic::Hutchinson { probes: 2 }), 0.1);
}

#[test]
fn other_checkpoints_and_models_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    let (vs, vars) = model(Kind::Double);
    let mut opt = FullVon::default().ess(100.0).noise(Philox { seed: 0 }).build(&vs, 0.1).unwrap();
    opt.save(&path).unwrap();
    let mut newton = Newton::default().build(&vs, 0.1).unwrap();
    assert!(newton.load(&path).unwrap_err().to_string().contains("full_von"));
    let w = weight(&[1.0]);
    let mut other = FullVon::default().ess(100.0).build(params(&w), 0.1).unwrap();
    assert!(other.load(&path).unwrap_err().to_string().contains("`a`, `b`"));
    // A parameter that was frozen so far joins the block, and one that is frozen is left alone.
    let state = |opt: &Optimizer<FullVon>| opt.state("a", "hess").unwrap().size();
    assert_eq!(state(&opt), [9, 9]);
    let _ = vars[2].set_requires_grad(true);
    opt.step(|| loss_of(&vars)).unwrap();
    assert_eq!(state(&opt), [11, 11]);
    assert!(opt.load(&path).unwrap_err().to_string().contains("`a`, `b`"));
    let _ = vars[1].set_requires_grad(false);
    let before = values(&vars[1]);
    opt.step(|| loss_of(&vars)).unwrap();
    assert_eq!(values(&vars[1]), before);
    assert_eq!(opt.posterior().unwrap().names().collect::<Vec<_>>(), ["a", "c"]);
}

/// Weights that were changed from outside are where the next step starts; the posterior is there too.
#[test]
fn weights_changed_from_outside_are_followed() {
    let ridge = Ridge::new();
    let mut opt = Newton::default().ess(ESS).weight_decay(DELTA).build(params(&ridge.w), 0.5).unwrap();
    opt.step(|| ridge.loss()).unwrap();
    tch::no_grad(|| ridge.w.shallow_clone().copy_(&Tensor::from_slice(&[2.8, -3.4])));
    assert_eq!(values(&opt.posterior().unwrap().mean_vector()), [2.8, -3.4]);
    opt.step(|| ridge.loss()).unwrap();
    all_close(&values(&ridge.w), &[1.8, -1.4], 1e-13);
}

/// Without a rotation EVON is IVON, sample by sample, but for rounding: IVON has all of a weight's arithmetic in one
/// expression, EVON an operation of libtorch for each sign of it.
#[test]
fn evon_in_the_identity_basis_is_ivon() {
    let (vs, vars) = model(Kind::Double);
    let evon = Evon::default().ess(50.0).max_dim(0).beta1(0.9).beta2(0.9).weight_decay(0.1).clip_radius(0.4);
    let mut evon = evon.noise(Philox { seed: 5 }).build(&vs, 0.1).unwrap();
    let (other, same) = model(Kind::Double);
    let ivon = Ivon::default().ess(50.0).beta2(0.9).weight_decay(0.1).clip_radius(0.4).rescale_lr(false);
    let mut ivon = ivon.noise(Philox { seed: 5 }).build(&other, 0.1).unwrap();
    for _ in 0..20 {
        evon.step(|| loss_of(&vars)).unwrap();
        ivon.step(|| loss_of(&same)).unwrap();
        for (a, b) in vars.iter().zip(&same) {
            all_close(&values(a), &values(b), 1e-13);
        }
    }
    let (ours, theirs) = (evon.posterior().unwrap().marginals().unwrap(), ivon.posterior().unwrap());
    assert_eq!(ours.names().collect::<Vec<_>>(), theirs.names().collect::<Vec<_>>());
    for name in ["a", "b"] {
        all_close(&values(&ours.precision(name).unwrap()), &values(&theirs.precision(name).unwrap()), 1e-10);
    }
}

/// A linear model of two outputs has the Hessian I ⊗ XᵀX/N, whose eigenbasis is Kronecker-factored. With exact
/// expectations EVON finds it, and with it the full posterior; IVON finds only the diagonal of the precision.
#[test]
fn evon_recovers_the_full_posterior_of_a_linear_model() {
    // Of full rank, which a single wave is not.
    let x = (Tensor::arange(15, (Kind::Double, Device::Cpu)).square() * 0.37).sin().reshape([5, 3]);
    let y = (Tensor::arange(10, (Kind::Double, Device::Cpu)) * 0.9).cos().reshape([5, 2]);
    let loss = |w: &Tensor| (x.matmul(&w.tr()) - &y).square().sum(Kind::Double) * 0.1;
    let steps = 400;
    let (expectation, noise) = exact_expectations(steps, &[2, 3]);
    let w = weight(&[0.0; 6]).detach().reshape([2, 3]).set_requires_grad(true);
    let rule = Evon::default().ess(5.0).weight_decay(0.0).beta1(0.0).beta2(0.5).beta_basis(0.5).frequency(1);
    let rule = rule.expectation(expectation).noise(noise);
    let mut opt = rule.build(params(&w), 0.5).unwrap();
    for _ in 0..steps {
        opt.step(|| loss(&w)).unwrap();
    }
    let gram = x.tr().matmul(&x);
    let exact = Tensor::eye(2, (Kind::Double, Device::Cpu)).kron(&gram);
    let q = opt.posterior().unwrap();
    all_close(&values(q.full().unwrap().precision_matrix()), &values(&exact), 1e-10);
    let solution = gram.inverse().matmul(&x.tr()).matmul(&y).tr();
    all_close(&values(&q.mean("w").unwrap()), &values(&solution), 1e-10);
    assert!(gram.get(0).get(1).double_value(&[]).abs() > 0.1, "nothing to rotate");
}

/// Without a rotation SOAP is Adam, which starts a step later.
#[test]
fn soap_in_the_identity_basis_is_adam() {
    // `b` has one dimension, which is never rotated.
    for (max_dim, same_variables) in [(0, 0..2), (10_000, 1..2)] {
        let (vs, vars) = model(Kind::Double);
        let soap = Soap::default().max_dim(max_dim).beta1(0.9).beta2(0.99).weight_decay(0.1).decoupled_decay(0.0);
        let mut soap = soap.ess(50.0).build(&vs, 0.05).unwrap();
        let (other, same) = model(Kind::Double);
        let adam = Adam::default().beta1(0.9).beta2(0.99).weight_decay(0.1).ess(50.0);
        let mut adam = adam.build(&other, 0.05).unwrap();
        // Separable, so that what happens to `a` makes no difference to `b`.
        let loss = |vars: &[Tensor]| vars[..2].iter().map(|x| (x.sin() + x.square()).sum(Kind::Double)).sum::<Tensor>();
        let before = values(&vars[1]);
        soap.step(|| loss(&vars)).unwrap();
        assert_eq!(values(&vars[1]), before, "the first step moved the weights");
        for _ in 0..30 {
            soap.step(|| loss(&vars)).unwrap();
            adam.step(|| loss(&same)).unwrap();
            for i in same_variables.clone() {
                all_close(&values(&vars[i]), &values(&same[i]), 1e-12);
            }
        }
        let (ours, theirs) = (soap.posterior().unwrap().marginals().unwrap(), adam.posterior().unwrap());
        all_close(&values(&ours.precision("b").unwrap()), &values(&theirs.precision("b").unwrap()), 1e-10);
    }
}

/// A quadratic seen through W → UWV has the same path, rotated, whichever basis the weights are written in; Adam's
/// depends on it. The gradients are square and of full rank, so that the eigenvectors are unique but for their signs.
/// In its own basis the second step's gradient is diagonal but for rounding, which the division magnifies up to 1/ε
/// times.
#[test]
fn soap_does_not_depend_on_the_coordinates() {
    let n = 3;
    let wave =
        |phase: f64| (Tensor::arange(n * n, (Kind::Double, Device::Cpu)) * 1.3 + phase).sin().reshape([n, n]) + 0.1;
    let (u, v) = (orthogonal(n, 0.2), orthogonal(n, 0.9));
    let (stiffness, target, start) = (wave(0.4).square() + 0.5, wave(1.0), wave(2.0));
    let loss = |w: &Tensor| ((w - &target).square() * &stiffness).sum(Kind::Double);
    let path = |rotated: bool, adam: bool| {
        let w = if rotated { u.matmul(&start).matmul(&v) } else { start.copy() }.set_requires_grad(true);
        let closure = || if rotated { loss(&u.tr().matmul(&w).matmul(&v.tr())) } else { loss(&w) };
        let steps = 40;
        if adam {
            let mut opt = Adam::default().build(params(&w), 0.05).unwrap();
            (0..steps).for_each(|_| _ = opt.step(closure).unwrap());
        } else {
            let mut opt = Soap::default().frequency(3).eps(1e-4).build(params(&w), 0.05).unwrap();
            (0..steps).for_each(|_| _ = opt.step(closure).unwrap());
        }
        let w = w.detach();
        if rotated { u.tr().matmul(&w).matmul(&v.tr()) } else { w }
    };
    let difference = |adam| (path(true, adam) - path(false, adam)).abs().max().double_value(&[]);
    assert!(difference(false) < 1e-10, "{}", difference(false));
    assert!(difference(true) > 1e-3, "{}", difference(true));
    assert!((path(false, false) - &start).abs().max().double_value(&[]) > 0.5, "nothing happened");
}

/// Without noise and with Adam's divisor it is SOAP, whose averages count one step less because its first one only
/// looks: after a first gradient of zero both have the same averages, and steps that differ by the corrections.
#[test]
fn evon_by_the_delta_method_with_adams_divisor_is_soap() {
    let (beta1, beta2, lr) = (0.6, 0.9, 0.01);
    let variable = || support::wave(&[3, 4], 0.0).set_requires_grad(true);
    let (w, x) = (variable(), variable());
    let soap = Soap::default().frequency(2).beta_basis(0.8).beta1(beta1).beta2(beta2).decoupled_decay(0.0).eps(1e-15);
    let mut soap = soap.build(params(&w), lr).unwrap();
    let evon = Evon::default().frequency(2).beta_basis(0.8).beta1(beta1).step_length(StepLength::Adam { beta: beta2 });
    // A prior must be, and this one pulls nothing.
    let evon = evon.expectation(Expectation::Delta).weight_decay(f64::MIN_POSITIVE);
    let mut evon = evon.build(params(&x), lr).unwrap();
    for t in 1..=12 {
        // The same at every point, so that the two paths may differ.
        let c = chirp(&[3, 4], f64::from(t)) * if t == 1 { 0.0 } else { 1.0 };
        let before = [w.detach().copy(), x.detach().copy()];
        soap.step(|| (&w * &c).sum(Kind::Double)).unwrap();
        evon.step(|| (&x * &c).sum(Kind::Double)).unwrap();
        for (ours, theirs) in [("left_basis", "left_basis"), ("right_basis", "right_basis"), ("square", "square")] {
            assert_eq!(evon.state("w", ours), soap.state("w", theirs), "step {t}: {ours}");
        }
        let [theirs, ours] = [(&w, &before[0]), (&x, &before[1])].map(|(after, before)| before - after.detach());
        if t == 1 {
            assert_eq!((values(&ours), values(&theirs)), (vec![0.0; 12], vec![0.0; 12]));
            continue;
        }
        let correction = |beta: f64| (1.0 - beta.powi(t - 1)) / (1.0 - beta.powi(t));
        all_close(&values(&(ours / lr)), &values(&(theirs / lr * correction(beta1) / correction(beta2).sqrt())), 1e-12);
    }
    let turned = evon.state("w", "left_basis").unwrap() - Tensor::eye(3, (Kind::Double, Device::Cpu));
    assert!(turned.abs().max().double_value(&[]) > 0.1, "nothing to rotate");
}

/// The arrow from SOAP to EVON: with the same gradients (here those of linear losses, which are the same at every
/// point) both have the same bases, bit by bit, and the same rotated gradients in their steps; what differs is the
/// divisor, √v + ε there and h + δ here.
#[test]
fn soap_and_evon_share_the_basis() {
    let start = (Tensor::arange(12, (Kind::Double, Device::Cpu)) * 0.3).cos().reshape([3, 4]);
    let slope = |t: i32| chirp(&[3, 4], f64::from(t));
    let variable = || start.copy().set_requires_grad(true);
    let (w, x) = (variable(), variable());
    let (lr, eps) = (0.01, 1e-3);
    let soap = Soap::default().frequency(2).beta_basis(0.8).beta1(0.0).decoupled_decay(0.0).eps(eps);
    let mut soap = soap.build(params(&w), lr).unwrap();
    let evon = Evon::default().frequency(2).beta_basis(0.8).beta1(0.0).weight_decay(0.0).ess(1e3).beta2(0.99);
    let mut evon = evon.noise(Philox { seed: 2 }).build(params(&x), lr).unwrap();
    let bases = ["left_basis", "right_basis"];
    for t in 0..9 {
        let c = slope(t);
        let [q_l, q_r] = bases.map(|name| soap.state("w", name).unwrap());
        let before = [w.detach().copy(), x.detach().copy()];
        soap.step(|| (&w * &c).sum(Kind::Double)).unwrap();
        evon.step(|| (&x * &c).sum(Kind::Double)).unwrap();
        for name in ["left_moment", "right_moment", "left_basis", "right_basis"] {
            assert_eq!(soap.state("w", name), evon.state("w", name), "step {t}: {name}");
        }
        if t == 0 {
            continue;
        }
        let debias = 1.0 - 0.95f64.powi(t);
        let divisors = [(soap.state("w", "square").unwrap() / debias).sqrt() + eps, evon.state("w", "hess").unwrap()];
        let gradient = q_l.tr().matmul(&c).matmul(&q_r);
        for ((after, before), divisor) in [&w, &x].into_iter().zip(&before).zip(divisors) {
            let step = q_l.tr().matmul(&((before - after.detach()) / lr)).matmul(&q_r);
            all_close(&values(&(step * divisor)), &values(&gradient), 1e-10);
        }
        let turned = (&q_l - Tensor::eye(3, (Kind::Double, Device::Cpu))).abs().max().double_value(&[]);
        assert!(turned > 0.1, "nothing to rotate");
    }
}
