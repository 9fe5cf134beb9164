//! EVON as published: the options that the row has beside its defaults.

use std::cell::RefCell;
use support::{
    F64, all_close, chirp, close, exact_expectations, given, orthogonal, params, randn, refused, store, values,
    variable, weight,
};
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{Past, Quadratic};
use tch_blr::{
    Error, Evon, Expectation, KroneckerGaussian, KroneckerParameter, Optimizer, Params, Philox, Prior, Soap,
};

/// One variable of this shape, and a loss of it that is not linear.
struct Model {
    vs: VarStore,
    w: Tensor,
}

impl Model {
    fn new(size: &[i64]) -> Self {
        let vs = store(F64);
        let w = variable(&vs, "w", 0, &chirp(size, 0.4));
        Model { vs, w }
    }

    fn loss(&self) -> Tensor {
        ((&self.w - chirp(&self.w.size(), 1.1)).square() * (chirp(&self.w.size(), 2.0) + 1.5)).sum(Kind::Double)
            + self.w.sin().sum(Kind::Double).square()
    }
}

#[test]
fn clean_steps_leave_the_hessian_and_noisy_ones_the_moments() {
    let model = Model::new(&[3, 4]);
    let rule = Evon::default().ess(50.0).beta2(0.9).beta_basis(0.8).frequency(4).phased(true);
    let mut opt = rule.noise(Philox { seed: 3 }).build(&model.vs, 0.01).unwrap();
    let state = |opt: &Optimizer<Evon>| {
        ["hess", "left_moment", "right_moment", "left_basis", "right_basis"].map(|name| opt.state("w", name).unwrap())
    };
    for t in 1..=12 {
        let (before, mean) = (state(&opt).map(|t| t.copy()), values(&model.w));
        let at = RefCell::new(Vec::new());
        opt.step(|| {
            *at.borrow_mut() = values(&model.w);
            model.loss()
        })
        .unwrap();
        let unchanged: Vec<bool> = before.iter().zip(state(&opt)).map(|(a, b)| *a == b).collect();
        // The basis turns after the first step and every fourth, which is a noisy one, by the moments of clean steps.
        let turns = t == 1 || t % 4 == 0;
        let clean = t % 2 == 1;
        assert_eq!(unchanged, [clean, !clean, !clean, !turns, !turns], "step {t}");
        assert_eq!(at.into_inner() == mean, clean, "step {t}");
        assert_ne!(values(&model.w), mean, "step {t}");
    }
}

/// h ← h + r(f-h) + ½r²(f-h)²/h forgets its start only in the noisy steps, and the diagnostics know how much.
#[test]
fn only_noisy_steps_forget_the_start() {
    let share = |rule: Evon, steps: i32| {
        let w = weight(&[0.3]);
        let mut opt = rule.noise(Philox { seed: 0 }).build(params(&w), 0.0).unwrap();
        (0..steps).for_each(|_| _ = opt.step(|| (&w * 0.0).sum(Kind::Double)).unwrap());
        let h = opt.state("w", "hess").unwrap().double_value(&[0]) / 2.0;
        if let Some(learned) = opt.diagnostics().unwrap().learned {
            close(learned, 1.0 - h, 1e-14);
        } else {
            // With an ess as without, the limit has no precision.
            assert_eq!((rule.expectation, opt.posterior().is_err()), (Expectation::Delta, true));
        }
        h
    };
    let rule = Evon::default().ess(10.0).weight_decay(0.0).beta2(0.9).hess_init(2.0);
    close(share(rule, 4), 0.905_f64.powi(4), 1e-14);
    close(share(rule, 4), share(rule.phased(true), 8), 1e-15);
    close(share(rule, 4), share(rule.phased(true), 9), 1e-15);
    // β₂ᵗ without the retraction.
    close(share(rule.expectation(Expectation::Delta).weight_decay(1e-300), 4), 0.9_f64.powi(4), 1e-14);
}

/// A quadratic seen through W → UWV has the same path, rotated, whichever basis the weights are written in, with exact
/// expectations and where the first step learns no h yet, in the basis of the weights. Without a rotation it has not.
#[test]
fn the_published_rule_does_not_depend_on_the_coordinates() {
    let (n, steps) = (3, 24);
    let (u, v) = (orthogonal(n, 0.2), orthogonal(n, 0.9));
    let (stiffness, target, start) = (chirp(&[n, n], 0.3).square() + 0.5, chirp(&[n, n], 1.0), chirp(&[n, n], 2.0));
    let loss = |w: &Tensor| ((w - &target).square() * &stiffness).sum(Kind::Double);
    let path = |rule: Evon, rotated: bool| {
        let w = if rotated { u.matmul(&start).matmul(&v) } else { start.copy() }.set_requires_grad(true);
        let rule = rule.ess(20.0).beta1(0.8).beta2(0.9).frequency(3).weight_decay(0.1);
        let (expectation, noise) = exact_expectations(steps, &[n, n]);
        let mut opt = rule.expectation(expectation).noise(noise).build(params(&w), 0.05).unwrap();
        let closure = || if rotated { loss(&u.tr().matmul(&w).matmul(&v.tr())) } else { loss(&w) };
        (0..steps).for_each(|_| _ = opt.step(closure).unwrap());
        let w = w.detach();
        if rotated { u.tr().matmul(&w).matmul(&v.tr()) } else { w }
    };
    let difference = |rule: Evon| (path(rule, true) - path(rule, false)).abs().max().double_value(&[]);
    let phased = Evon::default().phased(true);
    for rule in [phased, phased.whiten(true), Evon::published().hess_clip(1.1)] {
        assert!(difference(rule) < 1e-9, "{}", difference(rule));
        assert!((path(rule, false) - &start).abs().max().double_value(&[]) > 0.3, "nothing happened");
    }
    assert!(difference(phased.max_dim(0)) > 1e-3, "{}", difference(phased.max_dim(0)));
}

#[test]
fn a_whitened_step_is_as_long_in_every_direction() {
    let start = |size: &[i64]| chirp(size, 0.0).set_requires_grad(true);
    for size in [[64, 32], [32, 64]] {
        for scale in [1e-12, 1.0, 1e12] {
            let (w, c) = (start(&size), randn(&size, 7) * scale);
            let before = w.detach().copy();
            // A limit, so that h stays nearly h₀ under such a gradient.
            let rule = Evon::default().ess(1e3).weight_decay(0.0).hess_clip(1.0).whiten(true);
            let mut opt = rule.noise(Philox { seed: 1 }).build(params(&w), 0.25).unwrap();
            opt.step(|| (&w * &c).sum(Kind::Double)).unwrap();
            let singular = ((before - w.detach()) / 0.25).svd(true, true).1;
            let [least, most] = [singular.min(), singular.max()].map(|x| x.double_value(&[]));
            assert!(0.6 < least && most < 1.3, "{least} {most}");
        }
    }
    // Of a vector only the length changes, rotated or not.
    for rotate in [false, true] {
        let w = weight(&[1.0, 2.0, -1.0]);
        let rule = Evon::default().ess(1e3).weight_decay(0.0).beta2(0.0).whiten(true).rotate_vectors(rotate);
        let mut opt = rule.noise(given(1, &[&[0.0; 3]])).build(params(&w), 0.5).unwrap();
        opt.step(|| (&w * Tensor::from_slice(&[3.0, 0.0, -4.0])).sum(Kind::Double)).unwrap();
        all_close(&values(&w), &[1.0 - 0.5 * 0.6, 2.0, -1.0 + 0.5 * 0.8], 1e-15);
    }
    // And a tensor is the matrix of its rows, whatever it is rotated as.
    for merge in [false, true] {
        let (w, c) = (start(&[4, 2, 3]), randn(&[4, 2, 3], 7));
        let before = w.detach().copy();
        let rule = Evon::default().ess(1e3).weight_decay(0.0).whiten(true).merge_dims(merge).max_dim(8);
        let mut opt = rule.noise(Philox { seed: 1 }).build(params(&w), 0.25).unwrap();
        opt.step(|| (&w * &c).sum(Kind::Double)).unwrap();
        let singular = ((before - w.detach()) / 0.25).reshape([4, 6]).svd(true, true).1;
        let [least, most] = [singular.min(), singular.max()].map(|x| x.double_value(&[]));
        assert!(0.6 < least && most < 1.3, "{merge}: {least} {most}");
    }
}

/// Of `[8, 3, 3]`, for every limit, and which sides of it are rotated.
#[test]
fn dimensions_are_merged_while_their_product_is_small() {
    let sides = |rule: Evon, size: &[i64]| {
        let opt = rule.ess(10.0).noise(Philox { seed: 0 }).build(&Model::new(size).vs, 0.1).unwrap();
        ["left_basis", "right_basis"].map(|name| opt.state("w", name).unwrap().size()[0])
    };
    let merged = |limit| Evon::default().merge_dims(true).max_dim(limit);
    for (limit, expected) in
        [(7, [0, 0]), (8, [8, 0]), (9, [8, 9]), (23, [8, 9]), (24, [24, 3]), (71, [24, 3]), (72, [0, 72])]
    {
        assert_eq!(sides(merged(limit), &[8, 3, 3]), expected, "{limit}");
    }
    assert_eq!(sides(merged(144), &[8, 3, 3, 2]), [0, 144]);
    assert_eq!(sides(merged(64), &[64, 3, 3, 3]), [64, 27]);
    // Off: the matrix of the rows.
    assert_eq!(sides(Evon::default().max_dim(24), &[8, 3, 3]), [8, 9]);
    // Dimensions of one, and none.
    assert_eq!(sides(merged(8), &[1, 8, 3]), [8, 3]);
    assert_eq!(sides(merged(8), &[8, 1, 1]), [0, 8]);
    for rule in [Evon::default(), merged(100)] {
        assert_eq!(sides(rule, &[5]), [0, 0]);
        assert_eq!(sides(rule.rotate_vectors(true), &[5]), [0, 5]);
        assert_eq!(sides(rule.rotate_vectors(true).max_dim(4), &[5]), [0, 0]);
        assert_eq!(sides(rule.rotate_vectors(true), &[]), [0, 0]);
    }
}

/// A posterior of `[4, 2, 3]` in the bases of `[8, 3]`, or of all 24 weights.
fn learned(rule: Evon) -> (Model, KroneckerGaussian) {
    let model = Model::new(&[4, 2, 3]);
    let rule = rule.ess(30.0).beta2(0.8).weight_decay(0.1).frequency(2);
    let mut opt = rule.noise(Philox { seed: 2 }).build(&model.vs, 0.02).unwrap();
    (0..9).for_each(|_| _ = opt.step(|| model.loss()).unwrap());
    (model, opt.posterior().unwrap())
}

fn merging() -> [(Evon, [i64; 2]); 2] {
    let merged = Evon::default().merge_dims(true);
    [(merged.max_dim(8), [8, 3]), (merged, [0, 24])]
}

/// What a Gaussian of a merged matrix says, its precision written out says too.
#[test]
fn a_posterior_of_a_merged_matrix_is_its_full_gaussian() {
    for (rule, sides) in merging() {
        let (model, q) = learned(rule);
        let p = q.parameter("w").unwrap();
        assert_eq!([&p.left, &p.right].map(|q| q.as_ref().map_or(0, |q| q.size()[0])), sides);
        assert_eq!((q.mean("w").unwrap().size(), q.precision("w").unwrap().size()), (vec![4, 2, 3], vec![4, 2, 3]));
        let full = q.full().unwrap();
        let off_diagonal = full.precision_matrix() - full.precision_matrix().diag(0).diag(0);
        assert!(off_diagonal.abs().max().double_value(&[]) > 1.0, "nothing to rotate");
        close(q.log_prob(&model.vs).unwrap(), full.log_prob(&model.vs).unwrap(), 1e-10);
        close(q.entropy(), full.entropy(), 1e-10);
        all_close(&values(&q.variance("w").unwrap()), &values(&full.variance("w").unwrap()), 1e-12);
        let [ours, theirs] = [q.diagonal().unwrap(), full.diagonal().unwrap()];
        all_close(&values(&ours.precision("w").unwrap()), &values(&theirs.precision("w").unwrap()), 1e-10);
        // Samples: their mean log density tells rotated noise from unrotated.
        let mean = (0..400)
            .map(|k| {
                let _at = q.perturb(&model.vs, k).unwrap();
                full.log_prob(&model.vs).unwrap()
            })
            .sum::<f64>()
            / 400.0;
        // ln q has the variance n/2, so the mean of 400 has 12/400.
        close(mean, -q.entropy(), 4.0 * 0.03_f64.sqrt());
        assert_eq!(q.kl(&q).unwrap(), 0.0);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("q");
        q.save(&path).unwrap();
        let read = KroneckerGaussian::load(&path).unwrap();
        assert_eq!(read.full().unwrap().precision_matrix(), full.precision_matrix());
        // As the penalty of another training, whose value is ln q but for its constant.
        let value = |k: Quadratic| {
            let past = Past::new().with(k);
            let zero = Tensor::zeros([], (Kind::Double, Device::Cpu));
            past.beside(zero, 1.0, Params::from(&model.vs), |x: &Tensor| x.shallow_clone()).unwrap().double_value(&[])
        };
        tch::no_grad(|| model.w.shallow_clone().copy_(&(chirp(&[4, 2, 3], 5.0))));
        close(value(Quadratic::from(&q)), value(Quadratic::from(&full)), 1e-9);
    }
    let [a, b] = merging().map(|(rule, _)| learned(rule).1);
    for e in [a.kl(&b).unwrap_err(), tch_blr::combine(&[(1.0, &a), (1.0, &b)]).unwrap_err()] {
        assert!(e.to_string().contains("full()"), "{e}");
    }
}

/// The prior's matrix is the row's, so that they have a basis in common, whatever the row would have merged.
#[test]
fn a_prior_brings_its_matrix_along() {
    for (rule, sides) in merging() {
        let (model, q) = learned(rule);
        let dense = |q: &KroneckerGaussian| values(q.full().unwrap().precision_matrix());
        for row in [Evon::default(), rule, Evon::default().merge_dims(true)] {
            let row = row.ess(30.0).beta2(0.9);
            let mut opt = row.prior(&q).noise(Philox { seed: 5 }).build(&model.vs, 0.01).unwrap();
            all_close(&dense(&opt.posterior().unwrap()), &dense(&q), 1e-10);
            (0..3).for_each(|_| _ = opt.step(|| model.loss()).unwrap());
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("run");
            opt.save(&path).unwrap();
            let mut again = row.noise(Philox { seed: 6 }).build(&model.vs, 0.5).unwrap();
            again.load(&path).unwrap();
            assert_eq!(dense(&again.posterior().unwrap()), dense(&opt.posterior().unwrap()));
            again.step(|| model.loss()).unwrap();
        }
        let mut soap = Soap::default().ess(30.0).prior(&q).build(&model.vs, 0.01).unwrap();
        assert_eq!(soap.state("w", "right_basis").unwrap().size()[0], sides[1]);
        (0..3).for_each(|_| _ = soap.step(|| model.loss()).unwrap());
        // A diagonal prior has no matrix of its own.
        let diagonal = Prior::from(&q.diagonal().unwrap());
        let mut opt = rule.ess(30.0).prior(diagonal).noise(Philox { seed: 5 }).build(&model.vs, 0.01).unwrap();
        assert_eq!(opt.state("w", "right_basis").unwrap().size()[0], sides[1]);
        (0..3).for_each(|_| _ = opt.step(|| model.loss()).unwrap());
    }
}

/// With all weights rotated together the covariance is full: that of a linear regression is exact, and one side of a
/// matrix would not do.
#[test]
fn a_rotated_vector_has_the_full_posterior_of_a_linear_model() {
    let steps = 300;
    let (x, y) = (chirp(&[7, 4], 0.2), chirp(&[7], 0.8));
    let w = weight(&[0.0; 4]);
    let rule = Evon::default().ess(7.0).weight_decay(0.0).beta1(0.0).beta2(0.5).beta_basis(0.5).frequency(1);
    let (expectation, noise) = exact_expectations(steps, &[4]);
    let mut opt = rule.rotate_vectors(true).expectation(expectation).noise(noise).build(params(&w), 0.5).unwrap();
    for _ in 0..steps {
        opt.step(|| (x.mv(&w) - &y).square().mean(Kind::Double) * 0.5).unwrap();
    }
    let exact = x.tr().matmul(&x);
    let q = opt.posterior().unwrap();
    all_close(&values(q.full().unwrap().precision_matrix()), &values(&exact), 1e-8);
    all_close(&values(&w), &values(&exact.inverse().mv(&x.tr().mv(&y))), 1e-8);
}

#[test]
fn a_basis_of_no_split_of_the_dimensions_is_refused() {
    let parameter = |left: Option<i64>, right: Option<i64>| {
        let basis = |n: i64| Tensor::eye(n, (Kind::Double, Device::Cpu));
        let ones = || Tensor::ones([2, 2, 3], (Kind::Double, Device::Cpu));
        let (left, right) = (left.map(basis), right.map(basis));
        KroneckerGaussian::new([KroneckerParameter { name: "w".into(), mean: ones(), left, right, precision: ones() }])
    };
    for (left, right) in [(Some(2), None), (Some(4), None), (Some(4), Some(3)), (None, Some(6)), (None, Some(12))] {
        parameter(left, right).unwrap();
    }
    // The wrong side, another parameter's, and two that do not belong together.
    for (left, right) in [(Some(3), Some(4)), (Some(6), None), (Some(5), None), (None, Some(4)), (Some(2), Some(3))] {
        refused(parameter(left, right), &["`w`", "basis"]);
    }
}

/// The state of a checkpoint is that of its own settings, whatever the optimizer was built with.
#[test]
fn a_checkpoint_brings_its_options_along() {
    let rules = [
        Evon::default(),
        Evon::default().merge_dims(true).max_dim(8),
        Evon::default().merge_dims(true).rotate_vectors(true),
        Evon::published(),
    ];
    let rules = rules.map(|rule| rule.ess(30.0).frequency(2));
    for (from, to) in rules.iter().flat_map(|a| rules.iter().map(move |b| (a, b))) {
        let model = Model::new(&[4, 2, 3]);
        let mut opt = from.noise(Philox { seed: 2 }).build(&model.vs, 0.02).unwrap();
        (0..3).for_each(|_| _ = opt.step(|| model.loss()).unwrap());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        opt.save(&path).unwrap();
        let other = Model::new(&[4, 2, 3]);
        let mut again = to.noise(Philox { seed: 9 }).build(&other.vs, 0.5).unwrap();
        again.step(|| other.loss()).unwrap();
        again.load(&path).unwrap();
        for _ in 0..3 {
            opt.step(|| model.loss()).unwrap();
            again.step(|| other.loss()).unwrap();
        }
        assert_eq!(values(&model.w), values(&other.w), "{from:?} {to:?}");
        // And options may change between steps.
        again.configure(|_| *to).unwrap();
        again.step(|| other.loss()).unwrap();
    }
}

/// By hand: h ← β₂h + (1-β₂)·min(g², κ(h+δ)), m ← m - α(b̂ + δm)/(h+δ), in f64.
#[test]
fn without_noise_the_hessian_averages_squared_gradients() {
    let (delta, beta1, beta2, kappa, lr) = (0.3, 0.6, 0.7, 1.5, 0.2);
    let rule = Evon::default().expectation(Expectation::Delta).weight_decay(delta).beta1(beta1).beta2(beta2);
    let rule = rule.hess_clip(kappa).hess_init(0.5);
    let w = weight(&[1.0, -2.0, 0.1]);
    let mut opt = rule.build(params(&w), lr).unwrap();
    let (mut m, mut h, mut b) = (values(&w), [0.5; 3], [0.0; 3]);
    let mut clips = 0;
    for t in 1..=6 {
        opt.step(|| (w.square() * 0.5 + w.sin()).sum(Kind::Double)).unwrap();
        for i in 0..3 {
            let g = m[i] + m[i].cos();
            let limit = kappa * (h[i] + delta);
            clips += i32::from(g * g > limit);
            h[i] = beta2 * h[i] + (1.0 - beta2) * (g * g).min(limit);
            b[i] = beta1 * b[i] + (1.0 - beta1) * g;
            m[i] -= lr * (b[i] / (1.0 - beta1.powi(t)) + delta * m[i]) / (h[i] + delta);
        }
        all_close(&values(&w), &m, 1e-14);
        all_close(&values(&opt.state("w", "hess").unwrap()), &h, 1e-14);
    }
    assert!(clips > 0 && clips < 18, "{clips}");
    // No noise was asked for, and what has none has no posterior.
    let e = opt.posterior().unwrap_err();
    assert!(matches!(e, Error::Posterior(_)) && e.to_string().contains("limit of an infinite ess"), "{e}");
    assert_eq!(opt.diagnostics().unwrap().sigma, None);
    // Nor may it be asked for later.
    let before = values(&w);
    refused(opt.configure(|c| c.ess(9.0).samples(1)), &["fixed when the optimizer is built"]);
    refused(opt.configure(|c| c.ess(f64::INFINITY)), &["ess", "inf", "Expectation::Delta"]);
    assert_eq!(values(&w), before);
}

/// The same in the basis of the step before, of a matrix.
#[test]
fn without_noise_squares_are_those_of_the_rotated_gradient() {
    let (delta, beta2, lr) = (0.3, 0.7, 0.1);
    let rule = Evon::default().expectation(Expectation::Delta).weight_decay(delta).beta1(0.0).beta2(beta2);
    let model = Model::new(&[3, 2]);
    let mut opt = rule.frequency(2).build(&model.vs, lr).unwrap();
    for t in 1..=6 {
        let [l, r, h] = ["left_basis", "right_basis", "hess"].map(|name| opt.state("w", name).unwrap().copy());
        let m = model.w.detach().copy();
        let g = Tensor::run_backward(&[model.loss()], &[&model.w], false, false).remove(0);
        opt.step(|| model.loss()).unwrap();
        let turned = |x: &Tensor| l.tr().matmul(x).matmul(&r);
        let h = h * beta2 + turned(&g).square() * (1.0 - beta2);
        all_close(&values(&opt.state("w", "hess").unwrap()), &values(&h), 1e-12);
        let step = l.matmul(&(turned(&(g + &m * delta)) / (h + delta))).matmul(&r.tr());
        all_close(&values(&model.w), &values(&(m - step * lr)), 1e-12);
        assert_eq!(t == 1, l == Tensor::eye(3, (Kind::Double, Device::Cpu)));
    }
}

#[test]
fn published_settings_are_those_of_the_language_model() {
    let Evon { ess, beta1, beta2, beta_basis, hess_init, weight_decay, hess_clip, frequency, .. } = Evon::published();
    assert_eq!((ess, beta1, beta2, beta_basis), (None, 0.943, 1.0 - 9.12e-4, 0.995));
    assert_eq!((hess_init, weight_decay, hess_clip, frequency), (0.582, 1e-6, Some(1.5), 10));
    let Evon { phased, whiten, merge_dims, rotate_vectors, .. } = Evon::published();
    assert_eq!((phased, whiten, merge_dims, rotate_vectors), (true, true, false, false));
    let Evon { phased, whiten, merge_dims, rotate_vectors, .. } = Evon::default();
    assert_eq!((phased, whiten, merge_dims, rotate_vectors), (false, false, false, false));
}

/// In the limit with a posterior as prior: h starts at 0, and Δ = P₀/λ pulls and divides; phased, the noise at first is
/// the prior's. By hand, of a vector.
#[test]
fn the_limit_and_the_phases_take_a_posterior_as_prior() {
    let (m0, p0, ess, lr) = ([0.5, -1.0], [4.0, 9.0], 10.0, 0.1);
    let q = tch_blr::DiagonalGaussian::new([("w", Tensor::from_slice(&m0), Tensor::from_slice(&p0))]).unwrap();
    let rule = Evon::default().beta1(0.0).beta2(0.7);
    let limit = rule.expectation(Expectation::Delta);
    let w = weight(&[1.0, 2.0]);
    // Without λ there is no Δ.
    refused(limit.prior(&q).build(params(&w), lr), &["ess"]);
    let mut opt = limit.ess(ess).prior(&q).build(params(&w), lr).unwrap();
    let (mut m, mut h) = (values(&w), [0.0; 2]);
    for _ in 0..4 {
        opt.step(|| (w.square() * 0.5).sum(Kind::Double)).unwrap();
        for i in 0..2 {
            let (g, delta) = (m[i], p0[i] / ess);
            h[i] = 0.7 * h[i] + 0.3 * g * g;
            m[i] -= lr * (g + delta * (m[i] - m0[i])) / (h[i] + delta);
        }
        all_close(&values(&w), &m, 1e-14);
    }
    let w = weight(&[1.0, 2.0]);
    let phased = rule.ess(ess).phased(true).prior(&q);
    let mut opt = phased.noise(given(2, &[&[1.0, -1.0]])).build(params(&w), 0.0).unwrap();
    let at = RefCell::new(Vec::new());
    for expected in [[1.0, 2.0], [1.0 + 0.5, 2.0 - 1.0 / 3.0]] {
        opt.step(|| {
            *at.borrow_mut() = values(&w);
            (w.square() * 0.5).sum(Kind::Double)
        })
        .unwrap();
        all_close(&at.borrow(), &expected, 1e-14);
    }
}
