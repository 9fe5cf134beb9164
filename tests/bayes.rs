//! The driver does Bayes: tempering, priors, one posterior after the other.

use support::{all_close, close, given, params, state, values, weight};
use tch::{Kind, Tensor};
use tch_blr::rows::Momentum;
use tch_blr::rule::{Row, Rule};
use tch_blr::{
    Adam, AdamW, DiagonalGaussian, Expectation, Given, Ivon, Optimizer, Params, Philox, Prior, RmsProp, Sgd, Statistic,
    Von, combine,
};

/// Five points and targets of a linear model in three weights, with nothing orthogonal about it.
fn tanh_losses(w: &Tensor) -> Tensor {
    let x = Tensor::from_slice(&[0.3, -1.0, 0.7, 1.1, 0.4, -0.2, -0.6, 0.9, 0.1, 0.5, 0.5, -1.2, 1.4, -0.3, 0.8]);
    let y = Tensor::from_slice(&[0.5, -0.2, 0.9, -0.4, 0.1]);
    (x.reshape([5, 3]).mv(w).tanh() - y).square()
}

/// Mean, state and posterior precision after each of 20 steps.
fn trajectory<R: Row<Posterior = DiagonalGaussian>>(opt: &mut Optimizer<R>, w: &Tensor) -> Vec<f64> {
    let mut all = Vec::new();
    for _ in 0..20 {
        opt.step(|| tanh_losses(w)).unwrap();
        let q = opt.posterior().unwrap();
        all.extend(values(&q.mean("w").unwrap()));
        all.extend(values(&q.precision("w").unwrap()));
    }
    all
}

fn from_start<R: Row<Posterior = DiagonalGaussian>>(rule: R) -> Vec<f64> {
    from_start_with(rule, None)
}

fn from_start_with<R: Row<Posterior = DiagonalGaussian>>(rule: R, prior: Option<Prior>) -> Vec<f64> {
    let w = weight(&[0.2, -0.5, 0.3]);
    let builder = rule.builder().noise(Philox { seed: 4 });
    let builder = if let Some(prior) = prior { builder.prior(prior) } else { builder };
    trajectory(&mut builder.build(params(&w), 0.05).unwrap(), &w)
}

/// Every form of VON.
fn vons() -> Vec<Von> {
    let base = Von::default().ess(20.0).weight_decay(0.1).beta2(0.9).damping(0.2).hess_init(0.5);
    vec![
        base,
        base.expectation(Expectation::Delta),
        base.hessian(Statistic::Price),
        base.hessian(Statistic::Price).expectation(Expectation::Antithetic { pairs: 2 }),
        base.momentum(Momentum::HeavyBall).debias(false).prior_in_momentum(true).hess_from_first_batch(true),
    ]
}

/// The KL weight τ is another effective sample size N/τ and another δ = τ·prior/N: E[L] + (τ/N) KL either way.
#[test]
fn a_temperature_is_an_effective_sample_size() {
    for von in vons() {
        for tau in [0.3, 2.5] {
            let tempered = from_start(von.temperature(tau));
            all_close(&tempered, &from_start(von.ess(20.0 / tau).weight_decay(0.1 * tau)), 1e-12);
            assert_ne!(tempered, from_start(von));
        }
    }
}

#[test]
fn augmentation_multiplies_the_effective_sample_size() {
    for von in vons() {
        let augmented = from_start(von.augmentation(5.0));
        all_close(&augmented, &from_start(von.ess(100.0)), 1e-12);
    }
}

/// With z = 1 and no gradient, the distance of the sample and the step of the mean show the KL weight of the step.
#[test]
fn the_kl_weight_warms_up_in_noise_and_prior() {
    let (ess, delta, gamma, h, lr) = (10.0, 0.4, 0.3, 0.6, 0.1);
    let (from, warmup, temperature) = (0.2, 4, 1.5);
    let w = weight(&[0.8]);
    let rule = Von::default().ess(ess).weight_decay(delta).damping(gamma).hess_init(h).beta1(0.0).beta2(0.9);
    let rule = rule.temperature(temperature).warmup_from(from).warmup_steps(warmup);
    let mut opt = rule.noise(given(7, &[&[1.0]])).build(params(&w), lr).unwrap();
    let (mut m, mut h) = (0.8, h);
    for t in 1..=7_u32 {
        // Linear: 0.2, 0.4, 0.6, 0.8 and 1 of the temperature from the fifth step on.
        let tau = temperature * (from + (1.0 - from) * f64::from(t - 1) / warmup as f64).min(1.0);
        let mut theta = 0.0;
        opt.step(|| {
            theta = values(&w)[0];
            &w * 0.0
        })
        .unwrap();
        close(theta - m, 1.0 / (ess / tau * (h + tau * delta + gamma)).sqrt(), 1e-14);
        h *= 0.9;
        m -= lr * tau * delta * m / (h + tau * delta + gamma);
        close(values(&w)[0], m, 1e-14);
        // What is known, and beside it what the noise has.
        let q = opt.posterior().unwrap();
        close(values(&q.precision("w").unwrap())[0], ess / tau * h + ess * delta, 1e-12);
        close(q.damping("w").unwrap(), ess / tau * gamma, 1e-12);
    }
}

/// Linear regression with unit noise: examples (xᵢ, yᵢ) of a few features.
struct Task {
    x: Vec<Vec<f64>>,
    y: Vec<f64>,
}

impl Task {
    fn n(&self) -> f64 {
        self.y.len() as f64
    }

    fn loss(&self, w: &Tensor) -> Tensor {
        let x = Tensor::from_slice(&self.x.concat()).reshape([self.y.len() as i64, -1]);
        0.5 * (x.mv(w) - Tensor::from_slice(&self.y)).square().mean(Kind::Double)
    }

    /// Σ xᵢⱼ xᵢₖ
    fn gram(&self, j: usize, k: usize) -> f64 {
        self.x.iter().map(|x| x[j] * x[k]).sum()
    }

    /// Σ xᵢⱼ yᵢ
    fn moment(&self, j: usize) -> f64 {
        self.x.iter().zip(&self.y).map(|(x, y)| x[j] * y).sum()
    }
}

/// Two tasks of different size whose features are orthogonal, so that the exact posterior is diagonal.
fn tasks() -> [Task; 2] {
    let rows = |rows: &[[f64; 3]]| rows.iter().map(|r| r.to_vec()).collect();
    let tasks = [
        Task {
            x: rows(&[[1.0, 1.0, 0.5], [1.0, -1.0, 0.5], [-1.0, 1.0, 0.5], [-1.0, -1.0, 0.5]]),
            y: vec![1.0, 0.3, -0.4, 2.0],
        },
        Task {
            x: rows(&[
                [2.0, 0.0, 0.0],
                [0.0, 3.0, 0.0],
                [0.0, 0.0, 1.0],
                [0.0, 0.0, -2.0],
                [1.0, 0.0, 0.0],
                [0.0, 0.5, 0.0],
            ]),
            y: vec![-1.0, 2.0, 0.7, 0.1, 3.0, -0.2],
        },
    ];
    for t in &tasks {
        assert!((0..3).all(|j| (0..j).all(|k| t.gram(j, k) == 0.0)));
    }
    tasks
}

const PRIOR: f64 = 0.5;

/// N(0, 1/0.5) times the likelihoods: precision 0.5 + Σ x², mean Σ xy / precision.
fn exact(tasks: &[&Task]) -> [Vec<f64>; 2] {
    let sum = |f: &dyn Fn(&Task, usize) -> f64, j| tasks.iter().map(|t| f(t, j)).sum::<f64>();
    let precision: Vec<f64> = (0..3).map(|j| PRIOR + sum(&|t, j| t.gram(j, j), j)).collect();
    [(0..3).map(|j| sum(&Task::moment, j) / precision[j]).collect(), precision]
}

/// Learns a task exactly: pairs at m ± σ integrate a linear model's gradients and Hessian.
fn learn<R: Row<Posterior = DiagonalGaussian>>(rule: R, task: &Task, prior: Prior) -> DiagonalGaussian {
    const STEPS: usize = 400;
    let w = weight(&[0.1, -0.2, 0.3]);
    let mut opt = rule.builder().prior(prior).noise(given(STEPS, &[&[1.0, 1.0, 1.0]])).build(params(&w), 0.2).unwrap();
    for _ in 0..STEPS {
        opt.step(|| task.loss(&w)).unwrap();
    }
    opt.posterior().unwrap()
}

#[track_caller]
fn is(q: &DiagonalGaussian, [mean, precision]: &[Vec<f64>; 2], tolerance: f64) {
    all_close(&values(&q.mean("w").unwrap()), mean, tolerance);
    all_close(&values(&q.precision("w").unwrap()), precision, tolerance);
}

fn ivon(task: &Task) -> Ivon {
    Ivon::default()
        .ess(task.n())
        .expectation(Expectation::Antithetic { pairs: 1 })
        .beta1(0.0)
        .beta2(0.9)
        .rescale_lr(false)
}

fn von(task: &Task) -> Von {
    let pairs = Expectation::Antithetic { pairs: 1 };
    Von::default().ess(task.n()).hessian(Statistic::Price).expectation(pairs).beta1(0.0).beta2(0.9)
}

fn one_after_the_other<R: Row<Posterior = DiagonalGaussian>>(rule: impl Fn(&Task) -> R) {
    let [a, b] = &tasks();
    let isotropic = || Prior::isotropic(PRIOR);
    let [qa, qb] = [a, b].map(|t| learn(rule(t), t, isotropic()));
    is(&qa, &exact(&[a]), 1e-10);
    is(&qb, &exact(&[b]), 1e-10);
    let joint = exact(&[a, b]);
    is(&learn(rule(b), b, Prior::from(&qa)), &joint, 1e-10);
    is(&learn(rule(a), a, Prior::from(&qb)), &joint, 1e-10);
    // Learned apart and added, the prior counted once.
    let zeros = Tensor::zeros([3], (Kind::Double, tch::Device::Cpu));
    let q0 = DiagonalGaussian::new([("w", zeros.copy(), zeros + PRIOR)]).unwrap();
    let merged = combine(&[(1.0, &qa), (1.0, &qb), (-1.0, &q0)]).unwrap();
    is(&merged, &joint, 1e-9);
    // Forgetting a task leaves the other.
    is(&combine(&[(1.0, &merged), (-1.0, &qa), (1.0, &q0)]).unwrap(), &exact(&[b]), 1e-9);
}

#[test]
fn tasks_one_after_the_other_are_learned_as_if_at_once() {
    one_after_the_other(ivon);
    one_after_the_other(von);
}

/// Mean and precision from the parts of S and of S·m.
fn sum(parts: &[(f64, &[Vec<f64>; 2])]) -> [Vec<f64>; 2] {
    let of = |i: usize, f: &dyn Fn(&[f64; 2]) -> f64| -> f64 {
        parts.iter().map(|(w, [mean, precision])| w * f(&[mean[i], precision[i]])).sum()
    };
    let precision: Vec<f64> = (0..3).map(|i| of(i, &|[_, s]| *s)).collect();
    [(0..3).map(|i| of(i, &|[m, s]| m * s) / precision[i]).collect(), precision]
}

/// What a task's likelihood adds to the prior: Σ x² around Σ xy / Σ x².
fn likelihood(task: &Task) -> [Vec<f64>; 2] {
    let of = |f: &dyn Fn(usize) -> f64| (0..3).map(f).collect::<Vec<_>>();
    [of(&|j| task.moment(j) / task.gram(j, j)), of(&|j| task.gram(j, j))]
}

fn options_of_variational_continual_learning<R: Row<Posterior = DiagonalGaussian>>(rule: impl Fn(f64) -> R) {
    let [a, b] = &tasks();
    let (la, lb) = (likelihood(a), likelihood(b));
    let q0 = posterior(&[0.2, 0.0, -0.1], &[PRIOR; 3]);
    let p0 = [vec![0.2, 0.0, -0.1], vec![PRIOR; 3]];
    let qa = learn(rule(a.n()), a, Prior::from(&q0));
    is(&qa, &sum(&[(1.0, &p0), (1.0, &la)]), 1e-10);
    for x in [0.3, 0.9] {
        // A tempered likelihood, E[L] + τ KL: S = S₀ + H/τ.
        let tempered = learn(rule(b.n() / x), b, Prior::from(&qa));
        is(&tempered, &sum(&[(1.0, &p0), (1.0, &la), (1.0 / x, &lb)]), 1e-9);
        // Forgetting: natural parameters between those of the last posterior and those of the first prior.
        let forgotten = combine(&[(x, &qa), (1.0 - x, &q0)]).unwrap();
        is(&forgotten, &sum(&[(1.0, &p0), (x, &la)]), 1e-10);
        is(&learn(rule(b.n()), b, Prior::from(forgotten)), &sum(&[(1.0, &p0), (x, &la), (1.0, &lb)]), 1e-10);
        // An inflated prior: all that was known counts for less, the first prior too.
        let inflated = learn(rule(b.n()), b, Prior::from(qa.temper(1.0 / x).unwrap()));
        is(&inflated, &sum(&[(x, &p0), (x, &la), (1.0, &lb)]), 1e-10);
    }
}

/// Tempering, forgetting and inflation at the fixed points of IVON and of VON, whose temperature is another way to the first.
#[test]
fn variational_continual_learning_has_its_options() {
    let [a, b] = &tasks();
    options_of_variational_continual_learning(|n| ivon(b).ess(n));
    options_of_variational_continual_learning(|n| von(b).ess(n));
    let qa = learn(von(a), a, Prior::isotropic(PRIOR));
    for tau in [0.3, 2.5] {
        let q = learn(von(b).temperature(tau), b, Prior::from(&qa));
        is(&q, &sum(&[(1.0, &exact(&[a])), (1.0 / tau, &likelihood(b))]), 1e-9);
    }
}

/// δ = S/N′: with no curvature yet the step along a slope g from the prior's mean is α g/δ = α g N′/S.
#[test]
fn a_prior_is_rescaled_by_the_examples_of_the_next_task() {
    let slope = [0.3, -0.2, 0.5];
    let g = Tensor::from_slice(&slope);
    let one_step = |builder: tch_blr::Builder<Ivon>| {
        let w = weight(&[0.5, -1.0, 2.0]);
        builder.noise(given(1, &[&[1.0; 3]])).build(params(&w), 1e-3).unwrap().step(|| w.dot(&g)).unwrap();
        values(&w)
    };
    for n in [1.0, 6.0, 1000.0] {
        let rule =
            Ivon::default().ess(n).expectation(Expectation::Antithetic { pairs: 1 }).beta1(0.0).rescale_lr(false);
        let expected: Vec<f64> =
            [0.5, -1.0, 2.0].iter().zip(slope).zip([3.0, 40.0, 0.2]).map(|((m, g), s)| m - 1e-3 * g * n / s).collect();
        all_close(&one_step(rule.prior(old())), &expected, 1e-12);
    }
}

/// For a Gaussian target with the precision matrix A = [[2, 0.9], [0.9, 1]] the best diagonal Gaussian has the exact
/// mean and the precisions on A's diagonal (reference), not the reciprocals of the marginal variances.
#[test]
fn a_correlated_target_has_the_mean_field_answer() {
    let a = Tensor::from_slice(&[2.0, 0.9, 0.9, 1.0]).reshape([2, 2]);
    let target = Tensor::from_slice(&[0.7, -1.3]);
    let steps = 600;
    for ess in [1.0, 10.0] {
        let w = weight(&[0.0, 0.0]);
        // Without a prior, the loss alone is the target's.
        let rule =
            Ivon::default().ess(ess).weight_decay(0.0).expectation(Expectation::Antithetic { pairs: 1 }).samples(2);
        let rule = rule.beta1(0.0).beta2(0.9).rescale_lr(false);
        // All four signs, so that the products of different weights' noise cancel.
        let mut opt = rule.noise(given(steps, &[&[1.0, 1.0], &[1.0, -1.0]])).build(params(&w), 0.2).unwrap();
        for _ in 0..steps {
            opt.step(|| {
                let d = &w - &target;
                0.5 * d.dot(&a.mv(&d)) / ess
            })
            .unwrap();
        }
        let q = opt.posterior().unwrap();
        all_close(&values(&q.mean("w").unwrap()), &[0.7, -1.3], 1e-10);
        all_close(&values(&q.precision("w").unwrap()), &[2.0, 1.0], 1e-10);
    }
}

fn posterior(mean: &[f64], precision: &[f64]) -> DiagonalGaussian {
    DiagonalGaussian::new([("w", Tensor::from_slice(mean), Tensor::from_slice(precision))]).unwrap()
}

fn old() -> DiagonalGaussian {
    posterior(&[0.5, -1.0, 2.0], &[3.0, 40.0, 0.2])
}

#[test]
fn under_a_posterior_as_prior_the_precision_starts_there() {
    fn starts_there<R: Row<Posterior = DiagonalGaussian>>(rule: R) {
        let w = weight(&[1.0, 1.0, 1.0]);
        let opt = rule.builder().prior(old()).build(params(&w), 0.1).unwrap();
        is(&opt.posterior().unwrap(), &[vec![1.0; 3], vec![3.0, 40.0, 0.2]], 1e-14);
        assert_eq!(state(&opt, "hess"), [0.0; 3]);
    }
    for ess in [1.0, 77.0] {
        starts_there(Ivon::default().ess(ess));
        starts_there(Von::default().ess(ess));
        starts_there(Von::default().ess(ess).temperature(3.0).augmentation(2.0).weight_decay(0.1));
    }
}

/// The prior belongs to yesterday: it does not follow the weights that were trained since.
#[test]
fn a_prior_stays_where_it_was() {
    let w = weight(&[1.0, -2.0]);
    let mut first = Ivon::default().ess(10.0).noise(Philox { seed: 1 }).build(params(&w), 0.1).unwrap();
    first.step(|| w.square()).unwrap();
    let learned = first.posterior().unwrap();
    // As a Laplace approximation would be built, from the model's own variable.
    let precision = learned.precision("w").unwrap().copy();
    let built = DiagonalGaussian::new([("w", w.shallow_clone(), precision)]).unwrap();
    let before = [values(&learned.mean("w").unwrap()), values(&learned.precision("w").unwrap())];
    for q in [&learned, &built] {
        let mut next = Ivon::default().ess(10.0).prior(q).noise(Philox { seed: 2 }).build(params(&w), 0.1).unwrap();
        next.step(|| w.square()).unwrap();
    }
    first.step(|| w.square()).unwrap();
    assert_ne!(values(&w), before[0]);
    is(&learned, &before, 0.0);
    is(&built, &before, 0.0);
}

/// Two heads on one body: heads that a task does not use stay as they are, new ones start from their own prior.
#[test]
fn heads_have_their_own_prior() {
    let (body, a, b) = (weight(&[0.4]), weight(&[-0.3]), weight(&[0.9]));
    let model = || Params::named([("body", &body), ("a", &a), ("b", &b)].map(|(n, t)| (n, t.shallow_clone()))).unwrap();
    let one = |x: f64| Tensor::from_slice(&[x]);
    let q = DiagonalGaussian::new([("body", one(0.4), one(5.0)), ("a", one(-0.3), one(7.0))]).unwrap();
    let rule = Ivon::default().ess(10.0).hess_init(0.6).weight_decay(0.2).beta2(0.9);

    let missing = rule.prior(&q).build(model(), 0.1).unwrap_err().to_string();
    assert!(missing.contains("`b`") && missing.contains("elsewhere"), "{missing}");

    // A head whose gradient is zero learns nothing either: its curvature is zero and its mean is the prior's.
    for zero in [None, Some(0.0)] {
        let builder = rule.prior(Prior::from(&q).elsewhere(0.3)).noise(Philox { seed: 6 });
        let mut opt = builder.build(model(), 0.1).unwrap();
        let precision = |opt: &Optimizer<Ivon>, name| values(&opt.posterior().unwrap().precision(name).unwrap())[0];
        close(precision(&opt, "b"), 10.0 * (0.6 + 0.3), 1e-14);
        for _ in 0..5 {
            opt.step(|| {
                let used = ((&body * &b) - 1.0).square();
                if let Some(zero) = zero { used + &a * zero } else { used }
            })
            .unwrap();
        }
        assert_eq!(values(&a), [-0.3]);
        close(precision(&opt, "a"), 7.0, 1e-14);
        assert!((precision(&opt, "body") - 5.0).abs() > 0.1 && values(&b)[0] != 0.9);
        // Fresh weights for the second round.
        _ = tch::no_grad(|| [(&body, 0.4), (&b, 0.9)].map(|(w, x)| w.shallow_clone().fill_(x)));
    }
}

/// P₀ and δ = P₀/ess are the same prior, in every row whose weight decay is one.
#[test]
fn an_isotropic_prior_is_a_weight_decay() {
    fn same<R: Row<Posterior = DiagonalGaussian>>(rule: R, ess: f64) {
        let decay = from_start(rule.with_weight_decay(3.0 / ess));
        all_close(&from_start_with(rule, Some(Prior::isotropic(3.0))), &decay, 1e-14);
        assert_ne!(decay, from_start(rule));
    }
    same(RmsProp::default().ess(20.0), 20.0);
    same(Adam::default().ess(20.0), 20.0);
    same(Ivon::default().ess(20.0).beta2(0.9).rescale_lr(false), 20.0);
    same(Ivon::default().ess(20.0).beta2(0.9), 20.0);
    for von in vons() {
        same(von, 20.0);
        same(von.augmentation(2.0), 40.0);
    }
}

/// P₀ holds when the effective sample size changes: δ = P₀/ess in every step.
#[test]
fn a_prior_keeps_its_precision_when_the_effective_sample_size_changes() {
    for prior in [Prior::isotropic(3.0), Prior::from(posterior(&[0.0; 3], &[3.0; 3]))] {
        let w = weight(&[0.5; 3]);
        let mut opt = Ivon::default().ess(10.0).prior(prior).build(params(&w), 0.1).unwrap();
        let h = state(&opt, "hess")[0];
        opt.configure(|c| c.ess(50.0)).unwrap();
        let precision = opt.posterior().unwrap();
        all_close(&values(&precision.precision("w").unwrap()), &[50.0 * h + 3.0; 3], 1e-12);
    }
}

/// A prior is the term (1/2N) Σ P₀ (m-m₀)² of the loss.
#[test]
fn delta_rows_are_pulled_to_the_prior() {
    fn pulled<R: Rule>(rule: R, ess: f64) {
        // An isotropic prior is the same term, also where the weight decay is another thing (AdamW).
        for (prior, q) in [(Prior::from(old()), old()), (Prior::isotropic(3.0), posterior(&[0.0; 3], &[3.0; 3]))] {
            let [with, without] = [weight(&[0.2, -0.5, 0.3]), weight(&[0.2, -0.5, 0.3])];
            let mut a = rule.builder().prior(prior).build(params(&with), 0.05).unwrap();
            let mut b = rule.builder().build(params(&without), 0.05).unwrap();
            let (m0, p0) = (q.mean("w").unwrap(), q.precision("w").unwrap());
            for _ in 0..20 {
                a.step(|| tanh_losses(&with).mean(Kind::Double)).unwrap();
                let penalty = || (&p0 * (&without - &m0).square()).sum(Kind::Double) * (0.5 / ess);
                b.step(|| tanh_losses(&without).mean(Kind::Double) + penalty()).unwrap();
                all_close(&values(&with), &values(&without), 1e-12);
            }
        }
    }
    pulled(Adam::default().ess(20.0), 20.0);
    pulled(AdamW::default().ess(20.0), 20.0);
    pulled(RmsProp::default().ess(20.0).momentum(0.9), 20.0);
    pulled(Sgd::default().ess(20.0).momentum(0.9), 20.0);
}

/// A prior N(m₀, 1/P₀) of equal tensors is the isotropic prior around m₀: shifting loss and weights by m₀ gives the
/// shifted trajectory.
#[test]
fn priors_are_centred_at_their_mean() {
    fn shifted<R: Row<Posterior = DiagonalGaussian>>(rule: R) {
        let shift = 1.7;
        let mut runs = [0.0, shift].map(|m0| {
            let w = weight(&[0.2 + m0, -0.5 + m0, 0.3 + m0]);
            let prior = posterior(&[m0; 3], &[3.0; 3]);
            let mut opt = rule.builder().prior(prior).noise(Philox { seed: 9 }).build(params(&w), 0.05).unwrap();
            for _ in 0..20 {
                opt.step(|| tanh_losses(&(&w - m0))).unwrap();
            }
            let precision = values(&opt.posterior().unwrap().precision("w").unwrap());
            values(&w).into_iter().map(|x| x - m0).chain(precision).collect::<Vec<_>>()
        });
        let there = std::mem::take(&mut runs[1]);
        all_close(&there, &runs[0], 1e-11);
    }
    shifted(Adam::default().ess(20.0));
    shifted(Ivon::default().ess(20.0).beta2(0.9));
    vons().into_iter().for_each(shifted);
}

/// KL(q ‖ prior)/ess by way of two posteriors.
#[test]
fn diagnostics_agree_with_the_divergence_of_posteriors() {
    fn agrees<R: Row<Posterior = DiagonalGaussian>>(rule: R, prior: Option<Prior>, expected: &DiagonalGaussian) {
        let w = weight(&[0.2, -0.5, 0.3]);
        let builder = rule.builder().noise(Philox { seed: 4 });
        let builder = if let Some(prior) = prior { builder.prior(prior) } else { builder };
        let mut opt = builder.build(params(&w), 0.05).unwrap();
        for _ in 0..3 {
            let loss = opt.step(|| tanh_losses(&w)).unwrap();
            let seen = opt.diagnostics().unwrap();
            let kl = opt.posterior().unwrap().kl(expected).unwrap() / rule.effective_sample_size().unwrap();
            close(seen.kl_per_example.unwrap(), kl, 1e-13);
            close(seen.elbo_per_example.unwrap(), -loss - kl, 1e-13);
            // That of the noise, which damping limits.
            let q = opt.posterior().unwrap();
            let sigma = values(&(q.precision("w").unwrap() + q.damping("w").unwrap()).rsqrt());
            close(seen.sigma.unwrap().mean, sigma.iter().sum::<f64>() / 3.0, 1e-14);
            close(seen.sigma.unwrap().min, sigma.iter().copied().fold(f64::INFINITY, f64::min), 1e-14);
            close(seen.sigma.unwrap().max, sigma.iter().copied().fold(0.0, f64::max), 1e-14);
        }
    }
    let isotropic = |precision: f64| posterior(&[0.0; 3], &[precision; 3]);
    for tensors in [false, true] {
        let prior = || tensors.then(|| Prior::from(old()));
        let expected = |precision| if tensors { old() } else { isotropic(precision) };
        agrees(Ivon::default().ess(20.0).weight_decay(0.1).beta2(0.9), prior(), &expected(2.0));
        agrees(Adam::default().ess(20.0).weight_decay(0.1), prior(), &expected(2.0));
        for von in vons() {
            agrees(von.temperature(0.4).augmentation(3.0), prior(), &expected(6.0));
        }
    }
    agrees(Ivon::default().ess(20.0), Some(Prior::isotropic(5.0)), &isotropic(5.0));
}

/// Noise is drawn from the posterior that is being learned, tensor prior included.
#[test]
fn noise_is_as_wide_as_prior_and_curvature_say() {
    let w = weight(&[0.5; 3]);
    let z = [[0.3, -1.0, 2.0], [1.5, 0.2, -0.7]];
    let noise = Given(z.iter().map(|z| vec![vec![Tensor::from_slice(z)]]).collect());
    let mut opt = Ivon::default().ess(20.0).beta2(0.9).prior(old()).noise(noise).build(params(&w), 0.1).unwrap();
    for z in z {
        let q = opt.posterior().unwrap();
        let (m, s) = (values(&q.mean("w").unwrap()), values(&q.precision("w").unwrap()));
        let mut theta = Vec::new();
        opt.step(|| {
            theta = values(&w);
            tanh_losses(&w)
        })
        .unwrap();
        let expected: Vec<f64> = (0..3).map(|i| m[i] + z[i] / s[i].sqrt()).collect();
        all_close(&theta, &expected, 1e-14);
    }
}

/// `guard = q.perturb(..)` lets the old guard go after the new one has come.
#[test]
fn guards_may_go_oldest_first_and_latest_first() {
    let w = weight(&[1.0, -2.0, 3.0]);
    let q = old();
    let sample = |k| values(&q.sample(k).unwrap()[0].1);
    let at = |k| q.perturb(params(&w), k).unwrap();
    let [first, second, third] = [at(0), at(1), at(2)];
    for older in [first, second] {
        drop(older);
        assert_eq!(values(&w), sample(2));
    }
    drop(third);
    assert_eq!(values(&w), [1.0, -2.0, 3.0]);
    let [first, second] = [at(0), at(1)];
    drop(second);
    assert_eq!(values(&w), sample(0));
    drop(first);
    assert_eq!(values(&w), [1.0, -2.0, 3.0]);
}

/// The one of a model on CUDA, the other from a file.
#[test]
fn divergences_across_devices() {
    if !tch::Cuda::is_available() {
        support::skipped_on_cuda();
        return;
    }
    let there = |t: Tensor| t.to_device(tch::Device::Cuda(0));
    let (mean, precision) = (Tensor::from_slice(&[1.0, 1.0, 1.0]), Tensor::from_slice(&[2.0, 3.0, 4.0]));
    let here = DiagonalGaussian::new([("w", mean.copy(), precision.copy())]).unwrap();
    let q = DiagonalGaussian::new([("w", there(mean), there(precision))]).unwrap();
    for (a, b) in [(here.kl(&old()), q.kl(&old())), (old().kl(&here), old().kl(&q))] {
        close(a.unwrap(), b.unwrap(), 1e-12);
    }
}
