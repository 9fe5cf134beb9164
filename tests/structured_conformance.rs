//! What every row with a structured posterior must do, checked for every one.
//!
//! "Untouched", "identical" and "equal" mean bit by bit.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use support::{F64, Place, bits, places, wave_at};
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::rule::Row;
use tch_blr::{
    DiagonalGaussian, DiagonalNewton, Error, Evon, Expectation, FullVon, Labels, Newton, NoisyKfac, Optimizer, Params,
    Philox, Prior, Schedule, Soap, Statistic, nn,
};

macro_rules! checks {
    ($rule:expr, $lr:expr; $($check:ident)*) => {
        $(#[test]
        fn $check() {
            super::$check($rule, $lr);
        })*
    };
}

macro_rules! suite {
    ($($row:ident: $rule:expr, $lr:expr;)*) => {
        $(mod $row {
            #[allow(unused_imports)]
            use super::*;
            checks!($rule, $lr;
                loss_decreases
                a_parameter_that_the_loss_does_not_know_has_the_gradient_zero
                frozen_variable_is_untouched
                tied_variable_steps_once
                failure_changes_nothing
                resumed_run_is_identical
                variables_hold_the_mean
                changes_from_outside_are_taken_over
                schedule_multiplies_the_learning_rate
                other_thread_gives_the_same
                posterior_as_prior_is_refused
                groups_have_their_own_settings
            );
        })*
    };
}

suite!(
    newton: Newton::default().ess(1e3).weight_decay(0.1), 0.5;
    newton_averaged: Newton::default().ess(1e3).weight_decay(0.1).hess_init(1.0).beta2(0.5), 0.5;
    diagonal_newton: DiagonalNewton::default().ess(1e3).weight_decay(0.1), 0.3;
    hutchinson: DiagonalNewton::default().ess(1e3).weight_decay(0.1).hess_init(1.0).beta2(0.9).hessian(Statistic::Hutchinson { probes: 2 }), 0.2;
    full_von: FullVon::default().ess(1e3).weight_decay(0.01).beta2(0.99).expectation(Expectation::Antithetic { pairs: 4 }), 0.1;
    full_von_exact: FullVon::default().ess(1e3).weight_decay(0.01).hessian(Statistic::Hessian).expectation(Expectation::Antithetic { pairs: 1 }), 0.3;
    evon: Evon::default().ess(1e3).weight_decay(0.01).beta1(0.8).frequency(2), 0.2;
    soap: Soap::default().ess(1e3).weight_decay(0.01).frequency(2), 0.05;
    noisy_kfac: NoisyKfac::default().ess(1e3).weight_decay(0.01).frequency(2), 0.2;
    noisy_kfac_exact: NoisyKfac::default().ess(1e3).weight_decay(0.01).labels(Labels::Exact).split_damping(false).damping(0.1).expectation(Expectation::MonteCarlo { samples: 2 }), 0.2;
    kfac: NoisyKfac::default().ess(1e3).weight_decay(0.1).labels(Labels::Observed).expectation(Expectation::Delta), 0.05;
);

/// A linear regression by two layers that see different inputs, quadratic in all weights.
struct Model {
    vs: VarStore,
    a: nn::Linear,
    b: nn::Linear,
    x: Tensor,
    y: Tensor,
}

const EXAMPLES: i64 = 12;

impl Model {
    fn new(place: Place) -> Self {
        Self::starting_at(place, 0.0)
    }

    fn starting_at(place: Place, phase: f64) -> Self {
        let vs = support::store(place);
        let a = nn::linear(vs.root() / "a", 3, 2, LinearConfig::default());
        // The second layer is in a group of its own.
        let b = nn::linear(vs.root().set_group(1) / "b", 2, 2, LinearConfig { bias: false, ..LinearConfig::default() });
        let bias = a.bs.as_ref().unwrap();
        for (i, w) in [&a.ws, bias, &b.ws].into_iter().enumerate() {
            tch::no_grad(|| w.shallow_clone().copy_(&(wave_at(&w.size(), phase + i as f64, place) * 0.9)));
        }
        let (x, y) = (wave_at(&[EXAMPLES, 5], 0.5, place), wave_at(&[EXAMPLES, 2], 1.5, place) * 2.0);
        Model { vs, a, b, x, y }
    }

    fn with_b(&self, b: bool) -> Tensor {
        let z = self.a.forward(&self.x.narrow(1, 0, 3));
        let z = if b { z + self.b.forward(&self.x.narrow(1, 3, 2)) } else { z };
        let kind = if z.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        nn::squared_error(&z.to_kind(kind), &self.y.to_kind(kind), 1.0).unwrap()
    }

    fn losses(&self) -> Tensor {
        self.with_b(true)
    }

    /// With the prior of this δ.
    fn objective(&self, delta: f64) -> f64 {
        let _no_grad = tch::no_grad_guard();
        let prior: f64 = self
            .weights()
            .iter()
            .map(|w| w.to_kind(Kind::Double).square().sum(Kind::Double))
            .map(|s| s.double_value(&[]))
            .sum();
        self.losses().mean(Kind::Double).double_value(&[]) + 0.5 * delta * prior
    }

    fn weights(&self) -> Vec<Tensor> {
        [&self.a.ws, self.a.bs.as_ref().unwrap(), &self.b.ws].map(Tensor::shallow_clone).into()
    }

    fn bits(&self) -> Vec<Vec<u8>> {
        self.weights().iter().map(bits).collect()
    }
}

fn build<R: Row>(rule: R, lr: f64, model: &Model) -> Optimizer<R> {
    rule.noise(Philox { seed: 11 }).build(&model.vs, lr).unwrap()
}

/// Everything that a step may change: the checkpoint and the weights.
fn snapshot<R: Row>(opt: &Optimizer<R>, model: &Model) -> (Vec<u8>, Vec<Vec<u8>>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    opt.save(&path).unwrap();
    (std::fs::read(&path).unwrap(), model.bits())
}

fn loss_decreases<R: Row>(rule: R, lr: f64) {
    for place in places() {
        let model = Model::new(place);
        let mut opt = build(rule, lr, &model);
        // The minimum, by the row that finds it in one step.
        let best = Model::new(F64);
        Newton::default().weight_decay(0.01).build(&best.vs, 1.0).unwrap().step(|| best.losses()).unwrap();
        let (before, least) = (model.objective(0.01), best.objective(0.01));
        for _ in 0..100 {
            opt.step(|| model.losses()).unwrap();
        }
        let after = model.objective(0.01);
        assert!(after - least < 0.1 * (before - least), "{place:?}: {before} → {after}, at best {least}");
        assert_eq!(opt.steps(), 100);
        opt.posterior().unwrap_or_else(|e| panic!("{place:?}: {e}"));
    }
}

/// Only the prior pulls at it, towards zero: every row here has one.
fn a_parameter_that_the_loss_does_not_know_has_the_gradient_zero<R: Row>(rule: R, lr: f64) {
    for place in places() {
        let model = Model::new(place);
        let mut opt = build(rule, lr, &model);
        let norm = || tch::no_grad(|| model.b.ws.to_kind(Kind::Double).norm().double_value(&[]));
        let (before, a) = (norm(), bits(&model.a.ws));
        for _ in 0..30 {
            opt.step(|| model.with_b(false)).unwrap();
        }
        assert!(norm() < before, "{place:?}: {before} → {}", norm());
        assert_ne!(bits(&model.a.ws), a, "{place:?}");
    }
}

fn frozen_variable_is_untouched<R: Row>(rule: R, lr: f64) {
    for place in places() {
        let model = Model::new(place);
        _ = model.b.ws.set_requires_grad(false);
        let mut opt = build(rule, lr, &model);
        let before = model.bits();
        for _ in 0..3 {
            opt.step(|| {
                assert_eq!(bits(&model.b.ws), before[2], "{place:?}: noise on a frozen variable");
                model.losses()
            })
            .unwrap();
        }
        let after = model.bits();
        assert_eq!(after[2], before[2], "{place:?}");
        assert!(after[0] != before[0] && after[1] != before[1], "{place:?}");
        assert!(opt.state("b.weight", R::STATE[0]).is_none());
    }
}

fn tied_variable_steps_once<R: Row>(rule: R, lr: f64) {
    for place in places() {
        let run = |tied: bool| {
            let model = Model::new(place);
            if tied {
                _ = model.vs.root().sub("tied").add("weight", model.b.ws.shallow_clone(), true);
            }
            let mut opt = build(rule, lr, &model);
            assert_eq!(opt.params().len(), 3);
            for _ in 0..3 {
                opt.step(|| model.losses()).unwrap();
            }
            model.bits()
        };
        assert_eq!(run(true), run(false), "{place:?}");
    }
}

/// A closure that goes wrong.
type Failure = fn(&Model) -> Result<Tensor, std::io::Error>;

fn failure_changes_nothing<R: Row>(rule: R, lr: f64) {
    for place in places() {
        let start = || {
            let model = Model::new(place);
            let mut opt = build(rule, lr, &model);
            for _ in 0..2 {
                opt.step(|| model.losses()).unwrap();
            }
            (model, opt)
        };
        let (model, mut opt) = start();
        let before = snapshot(&opt, &model);
        let evaluations = Cell::new(0);
        let bad: [(&str, Failure); 7] = [
            ("the closure failed", |_| Err(std::io::Error::other("no more data"))),
            ("", |_| panic!("a panic on purpose")),
            ("the loss is NaN", |m| Ok(m.losses() * f64::NAN)),
            // √0, whose derivative is ∞·0.
            ("is not finite", |m| Ok(m.losses() + (m.a.forward(&m.x.narrow(1, 0, 3)) * 0.0).sqrt().sum(Kind::Float))),
            ("loss:", |m| Ok(m.losses().unsqueeze(1))),
            ("no graph", |m| Ok(m.losses().detach())),
            ("undefined", |_| Ok(Tensor::new())),
        ];
        for (expected, closure) in bad {
            // In the first evaluation, and in the last.
            for failing in [1, opt.config().expectation_evaluations()] {
                evaluations.set(0);
                let result = catch_unwind(AssertUnwindSafe(|| {
                    opt.step(|| {
                        evaluations.set(evaluations.get() + 1);
                        if evaluations.get() == failing { closure(&model) } else { Ok(model.losses()) }
                    })
                }));
                match result {
                    Ok(result) => {
                        let e = result.unwrap_err().to_string();
                        assert!(!expected.is_empty() && e.contains(expected), "{place:?}: {e}");
                    }
                    Err(_) => assert_eq!(expected, "", "{place:?}"),
                }
                assert_eq!(evaluations.get(), failing);
                assert!(snapshot(&opt, &model) == before, "{place:?}: {expected}");
            }
        }
        let (twin_model, mut twin) = start();
        opt.step(|| model.losses()).unwrap();
        twin.step(|| twin_model.losses()).unwrap();
        assert!(snapshot(&opt, &model) == snapshot(&twin, &twin_model), "{place:?}");
    }
}

/// Of a step.
trait Evaluations {
    fn expectation_evaluations(&self) -> u64;
}

impl<R: Row> Evaluations for R {
    fn expectation_evaluations(&self) -> u64 {
        match self.expectation() {
            Expectation::MonteCarlo { samples } => samples as u64,
            Expectation::Antithetic { pairs } => 2 * pairs as u64,
            _ => 1,
        }
    }
}

fn resumed_run_is_identical<R: Row>(rule: R, lr: f64) {
    for place in places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run");
        let model = Model::new(place);
        let schedule = Schedule::WarmupCosine { warmup: 3, total: 20 };
        let mut opt =
            rule.noise(Philox { seed: 11 }).schedule(schedule).clip_grad_norm(3.0).build(&model.vs, lr).unwrap();
        for _ in 0..3 {
            opt.step(|| model.losses()).unwrap();
        }
        opt.save(&path).unwrap();
        // Another run of the program: other initial weights, seed, learning rate; no schedule, no clipping.
        let other = Model::starting_at(place, 5.0);
        let mut resumed = rule.noise(Philox { seed: 99 }).build(&other.vs, 7.0 * lr).unwrap();
        resumed.load(&path).unwrap();
        assert!(snapshot(&opt, &model) == snapshot(&resumed, &other), "{place:?}");
        for _ in 0..3 {
            let losses = (opt.step(|| model.losses()).unwrap(), resumed.step(|| other.losses()).unwrap());
            assert_eq!(losses.0, losses.1, "{place:?}");
            assert!(snapshot(&opt, &model) == snapshot(&resumed, &other), "{place:?}");
        }
        // A file that was cut or changed is refused, and nothing has changed then.
        let (whole, before) = (std::fs::read(&path).unwrap(), snapshot(&resumed, &other));
        for broken in [&whole[..whole.len() / 2], &whole[..whole.len() - 1], &whole[..7], &[]] {
            std::fs::write(&path, broken).unwrap();
            assert!(matches!(resumed.load(&path), Err(Error::File { .. })), "{place:?}");
        }
        assert!(snapshot(&resumed, &other) == before, "{place:?}");
    }
}

fn variables_hold_the_mean<R: Row>(rule: R, _: f64) {
    for place in places() {
        let model = Model::new(place);
        let mut opt = build(rule, 0.0, &model);
        let mean = model.bits();
        let mut seen = Vec::new();
        for _ in 0..3 {
            opt.step(|| {
                seen.push(model.bits());
                model.losses()
            })
            .unwrap();
            // A decoupled decay is scaled by the learning rate.
            assert_eq!(model.bits(), mean, "{place:?}");
        }
        if rule.expectation() == Expectation::Delta {
            assert!(seen.iter().all(|s| *s == mean), "{place:?}");
        } else {
            assert!(seen.iter().all(|s| *s != mean), "{place:?}");
            assert!(seen.windows(2).all(|s| s[0] != s[1]), "{place:?}");
        }
    }
}

fn changes_from_outside_are_taken_over<R: Row>(rule: R, lr: f64) {
    for place in places() {
        let (model, other) = (Model::new(place), Model::starting_at(place, 1.0));
        let mut opt = build(rule, lr, &model);
        opt.step(|| model.losses()).unwrap();
        tch::no_grad(|| {
            for (w, x) in model.weights().iter_mut().zip(&other.weights()) {
                w.copy_(x);
            }
        });
        // The step starts from there: with no learning rate it stays there.
        opt.set_lr(0.0).unwrap();
        opt.step(|| model.losses()).unwrap();
        assert_eq!(model.bits(), other.bits(), "{place:?}");
    }
}

fn schedule_multiplies_the_learning_rate<R: Row>(rule: R, lr: f64) {
    let (model, other) = (Model::new(F64), Model::new(F64));
    // Powers of two, so that the order of multiplications makes no difference.
    let schedule = Schedule::Step { every: 2, factor: 0.5 };
    let mut scheduled = rule.noise(Philox { seed: 11 }).schedule(schedule).build(&model.vs, lr).unwrap();
    let mut by_hand = build(rule, lr, &other);
    for step in 0..6 {
        by_hand.set_lr(lr * 0.5f64.powi(step / 2)).unwrap();
        assert_eq!(scheduled.lr(), by_hand.lr());
        scheduled.step(|| model.losses()).unwrap();
        by_hand.step(|| other.losses()).unwrap();
    }
    assert_eq!(model.bits(), other.bits());
    assert!(matches!(by_hand.set_lr(-1.0), Err(Error::HyperParameter { name: "lr", .. })));
}

fn other_thread_gives_the_same<R: Row>(rule: R, lr: f64) {
    let run = |elsewhere: bool| {
        let model = Model::new(F64);
        let mut opt = build(rule, lr, &model);
        opt.step(|| model.losses()).unwrap();
        let mut rest = move || {
            opt.step(|| model.losses()).unwrap();
            snapshot(&opt, &model)
        };
        if elsewhere { std::thread::spawn(rest).join().unwrap() } else { rest() }
    };
    assert!(run(true) == run(false));
}

fn posterior_as_prior_is_refused<R: Row>(rule: R, lr: f64) {
    let model = Model::new(F64);
    let weights = Params::from(&model.vs);
    let variables = model.vs.variables();
    let q = DiagonalGaussian::new(
        weights.names().map(|n| (n.to_owned(), variables[n].detach().copy(), variables[n].detach().abs() + 1.0)),
    );
    let e = rule.prior(q.unwrap()).build(&model.vs, lr).unwrap_err();
    assert!(matches!(e, Error::Posterior(_)) && e.to_string().contains(R::NAME), "{e}");
    // The isotropic one is the weight decay.
    let paths = [rule.prior(Prior::isotropic(50.0)), rule.with_weight_decay(50.0 / 1e3).builder()].map(|builder| {
        let model = Model::new(F64);
        let mut opt = builder.noise(Philox { seed: 11 }).build(&model.vs, lr).unwrap();
        for _ in 0..3 {
            opt.step(|| model.losses()).unwrap();
        }
        model.bits()
    });
    assert_eq!(paths[0], paths[1]);
}

/// A group that does not learn stays, also after a checkpoint, until the learning rate is set for all; rows with one block
/// have no groups.
fn groups_have_their_own_settings<R: Row>(rule: R, lr: f64) {
    let model = Model::new(F64);
    let builder = rule.noise(Philox { seed: 11 }).group(1, |c: R| c.with_learning_rate(0.0));
    if R::JOINT {
        let e = builder.build(&model.vs, lr).unwrap_err();
        assert!(matches!(&e, Error::Parameters(e) if e.contains("no groups")), "{e}");
        return;
    }
    let mut opt = builder.build(&model.vs, lr).unwrap();
    let before = model.bits();
    for _ in 0..3 {
        opt.step(|| model.losses()).unwrap();
    }
    let after = model.bits();
    assert_eq!(after[2], before[2]);
    assert!(after[0] != before[0] && after[1] != before[1]);

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    opt.save(&path).unwrap();
    let mut other = build(rule, lr, &model);
    other.load(&path).unwrap();
    other.step(|| model.losses()).unwrap();
    assert_eq!(model.bits()[2], before[2]);
    other.set_lr(lr).unwrap();
    other.step(|| model.losses()).unwrap();
    assert_ne!(model.bits()[2], before[2]);

    let bad = rule.builder().named(|name| name.starts_with("b."), |c| c.with_weight_decay(-1.0));
    assert!(bad.build(&model.vs, lr).unwrap_err().to_string().contains("`weight_decay`"));
}

/// δ of one group is in its posterior, and what all evaluate together cannot differ.
#[test]
fn overrides_reach_the_posterior() {
    let model = Model::new(F64);
    let rule = Evon::default().ess(10.0).weight_decay(0.01).hess_init(0.5);
    let opt = rule.group(1, |c| c.weight_decay(0.5).ess(20.0)).build(&model.vs, 0.1).unwrap();
    let q = opt.posterior().unwrap();
    let precision = |name: &str| q.parameter(name).unwrap().precision.double_value(&[0, 0]);
    assert!((precision("a.weight") - 10.0 * 0.51).abs() < 1e-12);
    assert!((precision("b.weight") - 20.0 * 1.0).abs() < 1e-12);
    // The prior takes the place of every weight decay, at each group's own ess.
    let prior = rule.prior(Prior::isotropic(2.0)).group(1, |c| c.weight_decay(0.5).ess(20.0));
    let q = prior.build(&model.vs, 0.1).unwrap().posterior().unwrap();
    let precision = |name: &str| q.parameter(name).unwrap().precision.double_value(&[0, 0]);
    assert!((precision("a.weight") - (10.0 * 0.5 + 2.0)).abs() < 1e-12);
    assert!((precision("b.weight") - (20.0 * 0.5 + 2.0)).abs() < 1e-12);
    let elsewhere = rule.group(1, |c| c.expectation(Expectation::MonteCarlo { samples: 2 }));
    let e = elsewhere.build(&model.vs, 0.1).unwrap_err().to_string();
    assert!(e.contains("where the loss is evaluated"), "{e}");
}
