//! What every row must do, checked for every row.
//!
//! "Untouched", "identical" and "equal" mean bit by bit.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use support::rows::{self, Case};
use support::{F32, F64, Form, Net, Place, Separable, Snapshot, assert_close, bits, places, refused};
use tch::{Device, Kind, Tensor};
use tch_blr::rule::{DeltaRule, MaybePosterior, Row};
use tch_blr::{
    Adam, AdamW, BayesBiNN, BayesianSam, Error, Evon, Expectation, Ivon, Newton, NoisyKfac, Optimizer, Philox, Prior,
    RmsProp, Sam, SamRmsProp, Schedule, Sgd, Soap, Statistic, Train, Vadam, Von,
};

macro_rules! checks {
    ($row:ident: $($check:ident)*) => {
        mod $row {
            $(#[test]
            fn $check() {
                super::$check(&super::rows::$row());
            })*
        }
    };
}

macro_rules! suite {
    ($($row:ident)*) => {
        $(checks!($row:
            loss_decreases
            undefined_gradient_touches_nothing
            frozen_variable_is_untouched
            tied_variable_steps_once
            late_variable_trains
            overrides_apply
            settings_apply
            schedule_multiplies_the_learning_rate
            failure_changes_nothing
            what_is_not_finite_is_left_out
            resumed_run_is_identical
            lr_find_leaves_no_trace
            guard_equals_closure
            grad_equals_closure
            variables_hold_the_mean
            aliases_are_at_every_point
            extreme_gradients_leave_finite_weights
            changes_from_outside_are_taken_over
            other_thread_gives_the_same
        );)*
    };
}

support::rows_of_weights!(suite);

/// Rows with one block of all weights: no groups, and state that belongs to all parameters together.
macro_rules! joint {
    ($($row:ident)*) => {
        $(checks!($row:
            loss_decreases
            undefined_gradient_touches_nothing
            frozen_variable_is_untouched
            tied_variable_steps_once
            late_variable_trains
            groups_are_refused
            settings_of_all_apply
            schedule_multiplies_the_learning_rate
            failure_changes_nothing
            what_is_not_finite_is_left_out
            resumed_run_is_identical
            lr_find_leaves_no_trace
            guard_equals_closure
            grad_equals_closure
            variables_hold_the_mean
            aliases_are_at_every_point
            extreme_gradients_leave_finite_weights
            changes_from_outside_are_taken_over
            other_thread_gives_the_same
        );)*
    };
}

support::rows_of_all_weights!(joint);

fn is_joint<R: Row>() -> bool {
    matches!(R::NAME, "newton" | "diagonal_newton" | "full_von")
}

/// Whether the path of a variable depends on the others even where the loss is a sum: the norm of all gradients is in
/// it (`tests/sam.rs` has the other variables' share), or one precision matrix.
fn coupled<R: Row>() -> bool {
    matches!(R::NAME, "sam" | "sam_rmsprop") || is_joint::<R>()
}

/// Paths of `a`, `b` and `late` that must be the same; `apart` names those of which another variable goes its own way.
#[track_caller]
fn assert_paths<R: Row>(ours: &[Vec<u8>; 3], expected: &[Vec<u8>; 3], apart: &[usize], place: Place) {
    for i in (0..3).filter(|i| !coupled::<R>() || !apart.contains(i)) {
        assert_eq!(ours[i], expected[i], "{place:?}: {}", ["a", "b", "late"][i]);
    }
}
/// Rows that learn binary weights: what the loss, and weights from elsewhere, come to is in tests/binary.rs.
macro_rules! binary {
    ($($row:ident: $($further:ident)*;)*) => {
        $(checks!($row:
            undefined_gradient_touches_nothing
            tied_variable_steps_once
            overrides_apply
            settings_apply
            schedule_multiplies_the_learning_rate
            failure_changes_nothing
            what_is_not_finite_is_left_out
            resumed_run_is_identical
            lr_find_leaves_no_trace
            guard_equals_closure
            grad_equals_closure
            variables_hold_the_mean
            aliases_are_at_every_point
            extreme_gradients_leave_finite_weights
            other_thread_gives_the_same
            $($further)*
        );)*
    };
}

binary!(
    // A step need not change any sign; tests/binary.rs freezes its weights.
    ste: ;
    bayesbinn: frozen_variable_is_untouched;
    bayesbinn_antithetic: frozen_variable_is_untouched;
);

fn loss_decreases<R: Row>(row: &Case<R>) {
    // Of the quadratic model, by the row that finds it in one step; the network can come as near to 0 as it likes.
    let least = match row.form {
        Form::Plain => 0.0,
        Form::Tapped => {
            let best = row.net(F64);
            Newton::default().weight_decay(1e-6).build(&best.vs, 1.0).unwrap().step(|| best.losses()).unwrap();
            best.loss()
        }
    };
    for place in places() {
        let net = row.net(place);
        let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
        let before = net.loss();
        for _ in 0..150 {
            opt.step(|| net.losses()).unwrap();
        }
        let after = net.loss();
        assert!(after - least < 0.35 * (before - least), "{place:?}: {before} → {after}, at best {least}");
        assert_eq!(opt.steps(), 150);
        let diagnostics = opt.diagnostics().unwrap();
        let posterior = Train::posterior(&opt);
        assert_eq!(diagnostics.steps, 150);
        let exists = R::Posterior::EXISTS && opt.config().effective_sample_size().is_some();
        assert_eq!((posterior.is_ok(), diagnostics.sigma.is_some()), (exists, exists), "{place:?}: {posterior:?}");
    }
}

/// State tensors of one parameter, where they are its own.
fn state<R: Row>(opt: &Optimizer<R>, name: &str) -> Vec<Vec<u8>> {
    if is_joint::<R>() {
        return Vec::new();
    }
    R::STATE.iter().filter_map(|s| Some(bits(&opt.state(name, s)?))).collect()
}

fn undefined_gradient_touches_nothing<R: Row>(row: &Case<R>) {
    for place in places() {
        let problem = row.separable(place);
        let (a, b) = (problem.get("a"), problem.get("b"));
        let mut opt = row.builder(&problem.vs).build(&problem.vs, row.lr).unwrap();
        let before = (bits(&b), state(&opt, "b"), bits(&a));
        for _ in 0..3 {
            opt.step(|| problem.losses(&["a"])).unwrap();
        }
        assert_eq!((bits(&b), state(&opt, "b")), (before.0, before.1), "{place:?}");
        assert_ne!(bits(&a), before.2, "{place:?}");
        let untouched = bits(&b);
        // SOAP's first step looks only.
        for _ in 0..2 {
            opt.step(|| problem.losses(&["a", "b"])).unwrap();
        }
        assert_ne!(bits(&b), untouched, "{place:?}");
    }
}

fn frozen_variable_is_untouched<R: Row>(row: &Case<R>) {
    for place in places() {
        let problem = row.separable(place);
        let [a, b] = ["a", "b"].map(|name| problem.get(name));
        _ = b.set_requires_grad(false);
        let override_all = |c: R| c.with_weight_decay(0.3);
        let builder = row.builder(&problem.vs);
        let builder = if is_joint::<R>() { builder } else { builder.named(|_| true, override_all) };
        let mut opt = builder.build(&problem.vs, row.lr).unwrap();
        let train = |opt: &mut Optimizer<R>, frozen: &Tensor, other: &Tensor, name: &str| {
            let before = (bits(frozen), state(opt, name), bits(other));
            for _ in 0..3 {
                opt.step(|| {
                    assert_eq!(bits(frozen), before.0, "{place:?}: noise on a frozen variable");
                    problem.losses(&["a", "b"])
                })
                .unwrap();
            }
            assert_eq!((bits(frozen), state(opt, name)), (before.0, before.1), "{place:?}: frozen {name}");
            assert_ne!(bits(other), before.2, "{place:?}: beside frozen {name}");
        };
        // Frozen when built, then trained again, while the other one is frozen after it was trained.
        train(&mut opt, &b, &a, "b");
        _ = b.set_requires_grad(true);
        _ = a.set_requires_grad(false);
        train(&mut opt, &a, &b, "a");
        // Frozen between the evaluation and the update.
        opt.accumulate(|| problem.losses(&["a", "b"])).unwrap();
        _ = a.set_requires_grad(true);
        opt.accumulate(|| problem.losses(&["a", "b"])).unwrap();
        let before = (bits(&b), state(&opt, "b"), bits(&a));
        _ = b.set_requires_grad(false);
        opt.update().unwrap();
        assert_eq!((bits(&b), state(&opt, "b")), (before.0, before.1), "{place:?}: frozen before update");
        assert_ne!(bits(&a), before.2, "{place:?}");
    }
}

fn tied_variable_steps_once<R: Row>(row: &Case<R>) {
    for place in places() {
        let run = |tied: bool| {
            let problem = row.separable(place);
            let a = problem.get("a");
            let builder = row.builder(&problem.vs);
            if tied {
                _ = problem.vs.root().sub("tied").add("a", a.shallow_clone(), true);
            }
            let mut opt = builder.build(&problem.vs, row.lr).unwrap();
            assert_eq!(opt.params().len(), 2);
            for _ in 0..4 {
                opt.step(|| problem.losses(&["a", "b"]) + problem.losses(&["a"])).unwrap();
            }
            [bits(&a), bits(&problem.get("b"))]
        };
        assert_eq!(run(true), run(false), "{place:?}");
    }
}

fn late_variable_trains<R: Row>(row: &Case<R>) {
    for place in places() {
        let run = |with_late: bool| {
            let mut problem = row.separable(place);
            let mut opt = row.builder(&problem.vs).build(&problem.vs, row.lr).unwrap();
            for _ in 0..2 {
                opt.step(|| problem.losses(&["a", "b"])).unwrap();
            }
            if with_late {
                let late = problem.add("late", 2);
                let loss =
                    |p: &Separable| tch::no_grad(|| p.losses(&["late"]).sum(tch::Kind::Double).double_value(&[]));
                let (before, loss_before) = (bits(&late), loss(&problem));
                for _ in 0..2 {
                    opt.step(|| problem.losses(&["a", "b", "late"])).unwrap();
                }
                assert_eq!(opt.params().names().collect::<Vec<_>>(), ["a", "b", "late"]);
                assert!(bits(&late) != before && loss(&problem) < loss_before, "{place:?}");
            } else {
                for _ in 0..2 {
                    opt.step(|| problem.losses(&["a", "b"])).unwrap();
                }
            }
            ["a", "b"].map(|name| bits(&problem.get(name)))
        };
        let (with, without) = (run(true), run(false));
        assert!(with == without || coupled::<R>(), "{place:?}: a late variable disturbs the others");
    }
}

/// Weights of `a`, `b` and the later `late` (like `b` in group 1) after some steps.
fn path<R: Row>(row: &Case<R>, place: Place, build: impl Fn(&Separable) -> Optimizer<R>) -> [Vec<u8>; 3] {
    let mut problem = row.separable(place);
    let mut opt = build(&problem);
    opt.step(|| problem.losses(&["a", "b"])).unwrap();
    _ = problem.add("late", 1);
    for _ in 0..3 {
        opt.step(|| problem.losses(&["a", "b", "late"])).unwrap();
    }
    ["a", "b", "late"].map(|name| bits(&problem.get(name)))
}

fn overrides_apply<R: Row>(row: &Case<R>) {
    for place in places() {
        let plain = path(row, place, |p| row.builder(&p.vs).build(&p.vs, row.lr).unwrap());
        let start = path(row, place, |p| row.builder(&p.vs).build(&p.vs, 0.0).unwrap());
        let [fixed_a, fixed_b, fixed_late] = start;
        let by_group = path(row, place, |p| row.builder(&p.vs).group_lr(1, 0.0).build(&p.vs, row.lr).unwrap());
        assert_paths::<R>(&by_group, &[plain[0].clone(), fixed_b.clone(), fixed_late], &[0], place);
        let by_name =
            path(row, place, |p| row.builder(&p.vs).named_lr(|n| n == "a", 0.0).build(&p.vs, row.lr).unwrap());
        assert_paths::<R>(&by_name, &[fixed_a, plain[1].clone(), plain[2].clone()], &[1, 2], place);

        // Where an override applies, it is as if all had been configured so; elsewhere, as if none had.
        let decay = |c: R| c.with_weight_decay(0.3);
        let all = path(row, place, |p| row.builder(&p.vs).named(|_| true, decay).build(&p.vs, row.lr).unwrap());
        let some = path(row, place, |p| row.builder(&p.vs).group(1, decay).build(&p.vs, row.lr).unwrap());
        assert_paths::<R>(&some, &[plain[0].clone(), all[1].clone(), all[2].clone()], &[0, 1, 2], place);
        // The last one wins.
        let twice = path(row, place, |p| {
            let builder = row.builder(&p.vs).named_lr(|_| true, 0.0);
            builder.named_lr(|_| true, row.lr).build(&p.vs, 7.0).unwrap()
        });
        assert_eq!(twice, plain, "{place:?}");
    }
}

/// An override of a hyper-parameter that only this row has.
fn named_override<R: Row>(row: &Case<R>, change: fn(R) -> R) {
    let plain = path(row, F64, |p| row.builder(&p.vs).build(&p.vs, row.lr).unwrap());
    let all = path(row, F64, |p| row.builder(&p.vs).named(|_| true, change).build(&p.vs, row.lr).unwrap());
    let some = path(row, F64, |p| row.builder(&p.vs).named(|n| n != "a", change).build(&p.vs, row.lr).unwrap());
    assert_paths::<R>(&some, &[plain[0].clone(), all[1].clone(), all[2].clone()], &[0, 1, 2], F64);
    assert!(plain.iter().zip(&all).all(|(a, b)| a != b), "the override has no effect");
}

#[test]
fn overrides_of_a_rows_own_hyper_parameters() {
    named_override::<Sgd>(&rows::sgd_nesterov(), |c| c.momentum(0.5));
    named_override::<RmsProp>(&rows::rmsprop(), |c| c.alpha(0.5).centered(false));
    named_override::<Adam>(&rows::adam(), |c| c.beta1(0.5).beta2(0.9));
    named_override::<AdamW>(&rows::adamw(), |c| c.weight_decay(0.3));
    named_override::<Vadam>(&rows::vadam(), |c| c.beta1(0.5).ess(500.0));
    named_override::<BayesBiNN>(&rows::bayesbinn(), |c| c.beta1(0.5).ess(500.0));
    named_override::<Von>(&rows::vogn(), |c| c.damping(0.2).beta1(0.5));
    named_override::<Ivon>(&rows::ivon(), |c| c.beta1(0.5).ess(500.0));
    named_override::<Sam>(&rows::sam(), |c| c.rho(0.5).momentum(0.5));
    named_override::<SamRmsProp>(&rows::sam_rmsprop(), |c| c.rho(0.5).alpha(0.5));
    named_override::<BayesianSam>(&rows::bsam(), |c| c.rho(0.5).damping(0.2).beta1(0.5));
    named_override::<Evon>(&rows::evon(), |c| c.beta1(0.5).ess(500.0));
    named_override::<Soap>(&rows::soap(), |c| c.beta1(0.5).frequency(1));
    named_override::<NoisyKfac>(&rows::noisy_kfac(), |c| c.beta1(0.5).damping(0.2));
}

fn settings_apply<R: Row>(row: &Case<R>) {
    for place in places() {
        let lr = row.lr;
        let plain = |p: &Separable| row.builder(&p.vs).build(&p.vs, lr).unwrap();
        let at = |set: &dyn Fn(&mut Optimizer<R>)| {
            path(row, place, |p| {
                let mut opt = plain(p);
                set(&mut opt);
                opt
            })
        };
        let reference = path(row, place, plain);
        let fixed = path(row, place, |p| row.builder(&p.vs).build(&p.vs, 0.0).unwrap());

        assert_eq!(at(&|opt| opt.set_lr(0.0).unwrap()), fixed, "{place:?}");
        // Documented: a variable created later has the group's configuration as it was built.
        let group = at(&|opt| opt.set_lr_group(1, 0.0).unwrap());
        assert_paths::<R>(&group, &[reference[0].clone(), fixed[1].clone(), reference[2].clone()], &[0, 2], place);
        let decayed = |c: R| c.with_weight_decay(0.3);
        let all = path(row, place, |p| row.builder(&p.vs).named(|_| true, decayed).build(&p.vs, lr).unwrap());
        assert_eq!(at(&|opt| opt.set_weight_decay(0.3).unwrap()), all, "{place:?}");
        assert_eq!(at(&|opt| opt.configure(decayed).unwrap()), all, "{place:?}");
        let group = at(&|opt| opt.set_weight_decay_group(1, 0.3).unwrap());
        assert_paths::<R>(&group, &[reference[0].clone(), all[1].clone(), reference[2].clone()], &[0, 1, 2], place);

        let refused = at(&|opt| {
            for result in [
                opt.set_lr(f64::NAN),
                opt.set_lr_group(1, -1.0),
                opt.set_weight_decay(-1.0),
                opt.set_weight_decay_group(0, f64::INFINITY),
            ] {
                assert!(matches!(result, Err(Error::HyperParameter { .. })), "{result:?}");
            }
            opt.set_schedule(Schedule::Step { every: 0, factor: 0.5 }).unwrap_err();
        });
        assert_eq!(refused, reference, "{place:?}");
    }
}

fn groups_are_refused<R: Row>(row: &Case<R>) {
    let net = row.net(F64);
    let says = |result: tch_blr::Result<()>| {
        let e = result.unwrap_err();
        assert!(matches!(&e, Error::Parameters(e) if e.contains("no groups")), "{e}");
    };
    let builder = || row.builder(&net.vs);
    says(builder().group(1, |c| c).build(&net.vs, row.lr).map(|_| ()));
    says(builder().named_lr(|_| true, 0.1).build(&net.vs, row.lr).map(|_| ()));
    let mut opt = builder().build(&net.vs, row.lr).unwrap();
    let before = Snapshot::of(&opt, &net.vs);
    says(opt.set_lr_group(1, 0.1));
    says(opt.set_weight_decay_group(0, 0.1));
    says(opt.configure_group(1, |c| c));
    assert_eq!(Snapshot::of(&opt, &net.vs), before);
}

fn settings_of_all_apply<R: Row>(row: &Case<R>) {
    for place in places() {
        let plain = |p: &Separable| row.builder(&p.vs).build(&p.vs, row.lr).unwrap();
        let at = |set: &dyn Fn(&mut Optimizer<R>)| {
            path(row, place, |p| {
                let mut opt = plain(p);
                set(&mut opt);
                opt
            })
        };
        let (reference, fixed) = (path(row, place, plain), at(&|opt| opt.set_lr(0.0).unwrap()));
        assert!(reference.iter().zip(&fixed).all(|(a, b)| a != b), "{place:?}: set_lr has no effect");
        let built = path(row, place, |p| row.builder(&p.vs).build(&p.vs, 0.0).unwrap());
        assert_eq!(built, fixed, "{place:?}");
        let decayed = at(&|opt| opt.set_weight_decay(0.3).unwrap());
        assert_eq!(decayed, at(&|opt| opt.configure(|c| c.with_weight_decay(0.3)).unwrap()), "{place:?}");
        let refused = at(&|opt| {
            for result in [opt.set_lr(f64::NAN), opt.set_weight_decay(-1.0)] {
                assert!(matches!(result, Err(Error::HyperParameter { .. })), "{result:?}");
            }
            opt.set_schedule(Schedule::Step { every: 0, factor: 0.5 }).unwrap_err();
        });
        assert_eq!(refused, reference, "{place:?}");
    }
}

fn schedule_multiplies_the_learning_rate<R: Row>(row: &Case<R>) {
    for place in places() {
        let net = row.net(place);
        // Powers of two, so that the order of multiplications makes no difference.
        let schedule = Schedule::Step { every: 2, factor: 0.5 };
        let mut scheduled = row.builder(&net.vs).schedule(schedule).build(&net.vs, row.lr).unwrap();
        let by_hand_net = row.net(place);
        let mut by_hand = row.builder(&by_hand_net.vs).build(&by_hand_net.vs, row.lr).unwrap();
        for step in 0..6 {
            let lr = row.lr * 0.5f64.powi(step / 2);
            assert_eq!(scheduled.lr(), lr);
            by_hand.set_lr(lr).unwrap();
            scheduled.step(|| net.losses()).unwrap();
            by_hand.step(|| by_hand_net.losses()).unwrap();
        }
        assert_eq!(
            Snapshot::of(&scheduled, &net.vs).weights,
            Snapshot::of(&by_hand, &by_hand_net.vs).weights,
            "{place:?}"
        );
    }
}

/// What can go wrong in a closure.
#[derive(Debug, Clone, Copy)]
enum Failure {
    Error,
    Panic,
    NonFiniteLoss,
    NonFiniteGradient,
    Shape,
    NoGraph,
    Undefined,
}

impl Failure {
    const ALL: [Failure; 7] = [
        Failure::Error,
        Failure::Panic,
        Failure::NonFiniteLoss,
        Failure::NonFiniteGradient,
        Failure::Shape,
        Failure::NoGraph,
        Failure::Undefined,
    ];

    fn happen(self, net: &Net) -> Result<Tensor, std::io::Error> {
        let losses = net.losses();
        Ok(match self {
            Failure::Error => return Err(std::io::Error::other("no more data")),
            Failure::Panic => panic!("a panic on purpose"),
            Failure::NonFiniteLoss => losses * f64::NAN,
            // √0, whose derivative is ∞·0.
            Failure::NonFiniteGradient => {
                let zero = &net.weights[3] * 0.0;
                losses + zero.sqrt().sum(tch::Kind::Float)
            }
            Failure::Shape => losses.unsqueeze(1),
            Failure::NoGraph => losses.detach(),
            Failure::Undefined => Tensor::new(),
        })
    }

    fn check(self, result: std::thread::Result<tch_blr::Result<f64>>) {
        let error = match (self, result) {
            (Failure::Panic, Err(_)) => return,
            (_, Ok(Err(e))) => e,
            (_, other) => panic!("{self:?}: {other:?}"),
        };
        let text = error.to_string();
        let right = match self {
            Failure::Error => matches!(error, Error::Closure(_)) && text.contains("no more data"),
            Failure::NonFiniteLoss => matches!(error, Error::NonFiniteLoss { value, step: 2 } if value.is_nan()),
            Failure::NonFiniteGradient => {
                matches!(&error, Error::NonFiniteGradient { name, step: 2, .. } if name == "second.bias")
            }
            Failure::Shape => matches!(error, Error::Loss(_)) && text.contains("[12, 1]"),
            Failure::NoGraph => matches!(error, Error::Loss(_)) && text.contains("no graph"),
            Failure::Undefined => matches!(error, Error::Loss(_)) && text.contains("undefined"),
            Failure::Panic => false,
        };
        assert!(right, "{self:?}: {error:?}");
    }
}

fn failure_changes_nothing<R: Row>(row: &Case<R>) {
    for place in places() {
        let start = || {
            let net = row.net(place);
            let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
            let evaluations = Cell::new(0);
            for _ in 0..2 {
                evaluations.set(0);
                opt.step(|| {
                    evaluations.set(evaluations.get() + 1);
                    net.losses()
                })
                .unwrap();
            }
            opt.accumulate(|| net.losses_of(3, 4)).unwrap();
            (net, opt, evaluations.get())
        };
        let (net, mut opt, evaluations) = start();
        let before = Snapshot::of(&opt, &net.vs);
        for failure in Failure::ALL {
            // In the first evaluation of a step, and in the last one.
            for failing in [1, evaluations] {
                let calls = Cell::new(0);
                let closure = || {
                    calls.set(calls.get() + 1);
                    if calls.get() == failing { failure.happen(&net) } else { Ok(net.losses()) }
                };
                failure.check(catch_unwind(AssertUnwindSafe(|| opt.step(closure))));
                assert_eq!(calls.get(), failing);
                assert_eq!(Snapshot::of(&opt, &net.vs), before, "{place:?}: {failure:?} in evaluation {failing}");
            }
        }
        // A mean where the first micro-batch had per-example losses.
        let mixed = opt.step(|| net.losses().mean(None::<tch::Kind>)).unwrap_err();
        assert!(matches!(mixed, Error::Loss(_) | Error::PerExample(_)), "{mixed:?}");
        assert_eq!(Snapshot::of(&opt, &net.vs), before, "{place:?}: mixed losses");

        let (twin_net, mut twin, _) = start();
        for _ in 0..2 {
            opt.step(|| net.losses()).unwrap();
            twin.step(|| twin_net.losses()).unwrap();
            let after = Snapshot::of(&opt, &net.vs).values();
            assert_eq!(after, Snapshot::of(&twin, &twin_net.vs).values(), "{place:?}");
        }
    }
}

/// On request. A row without noise goes on as if the evaluations had never been; all others at samples of their own.
fn what_is_not_finite_is_left_out<R: Row>(row: &Case<R>) {
    for place in places() {
        let (net, other) = (row.net(place), row.net(place));
        let mut opt = row.builder(&net.vs).skip_non_finite().build(&net.vs, row.lr).unwrap();
        let mut twin = row.builder(&other.vs).build(&other.vs, row.lr).unwrap();
        let look = |opt: &Optimizer<R>, net: &Net| {
            let states = ["first.weight", "first.bias", "second.weight", "second.bias"].map(|name| state(opt, name));
            (states, net.weights.iter().map(bits).collect::<Vec<_>>(), opt.steps())
        };
        let seen = Cell::new(0);
        for _ in 0..2 {
            seen.set(0);
            twin.step(|| {
                seen.set(seen.get() + 1);
                other.losses()
            })
            .unwrap();
            opt.step(|| net.losses()).unwrap();
        }
        let evaluations = seen.get();
        let before = look(&opt, &net);
        let mut skipped = 0;
        for failure in [Failure::NonFiniteLoss, Failure::NonFiniteGradient] {
            for failing in [1, evaluations] {
                let calls = Cell::new(0);
                let closure = || {
                    calls.set(calls.get() + 1);
                    if calls.get() == failing { failure.happen(&net) } else { Ok(net.losses()) }
                };
                let loss = opt.step(closure).unwrap();
                skipped += 1;
                assert!(loss.is_nan() && opt.skipped() == skipped, "{place:?}: {failure:?} in {failing}: {loss}");
                assert_eq!(look(&opt, &net), before, "{place:?}: {failure:?} in evaluation {failing}");
            }
        }
        // A micro-batch does not count; and an update of nothing but such micro-batches is none.
        assert!(opt.accumulate(|| net.losses() * f64::NAN).unwrap().is_nan());
        assert!(opt.update().unwrap().is_nan());
        assert_eq!(look(&opt, &net), before, "{place:?}");
        opt.accumulate(|| net.losses_of(0, 7)).unwrap();
        opt.accumulate(|| net.losses() * f64::NAN).unwrap();
        opt.step(|| net.losses_of(7, 5)).unwrap();
        twin.accumulate(|| other.losses_of(0, 7)).unwrap();
        twin.step(|| other.losses_of(7, 5)).unwrap();
        let (after, expected) = (look(&opt, &net), look(&twin, &other));
        let at_the_mean =
            matches!(opt.config().expectation(), Expectation::Delta | Expectation::Adversarial { sampled: false });
        // The third update of a phased training is a clean one.
        let at_the_mean = at_the_mean || is_phased(opt.config());
        let deterministic = at_the_mean && !matches!(opt.config().statistic(), Statistic::Hutchinson { .. });
        assert_eq!(after == expected, deterministic, "{place:?}");
        assert_eq!((after.2, opt.skipped(), opt.diagnostics().unwrap().skipped), (3, 6, 6), "{place:?}");
    }
}

fn resumed_run_is_identical<R: Row>(row: &Case<R>) {
    for place in places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.safetensors");
        let net = row.net(place);
        let lr = row.lr;
        let builder = row.builder(&net.vs);
        let builder = if is_joint::<R>() { builder } else { builder.group_lr(1, 0.5 * lr) };
        let schedule = Schedule::Cosine { warmup: 3, total: 20, end: 0.0 };
        let mut opt = builder.schedule(schedule).build(&net.vs, lr).unwrap();
        for _ in 0..3 {
            opt.step(|| net.losses()).unwrap();
        }
        if !is_joint::<R>() {
            opt.set_weight_decay_group(0, 0.02).unwrap();
        }

        // Another run of the program: other initial weights, seed, learning rate; no groups, no schedule.
        let other = row.net_at(place, 5.0);
        let mut resumed = (row.make)(&other.vs).noise(Philox { seed: 99 }).build(&other.vs, 7.0 * lr).unwrap();
        resumed.accumulate(|| other.losses_of(0, 2)).unwrap();
        let same = |opt: &Optimizer<R>, resumed: &Optimizer<R>, what: &str| {
            let (a, b) = (Snapshot::of(opt, &net.vs), Snapshot::of(resumed, &other.vs));
            assert_eq!(a.values(), b.values(), "{place:?}: {what}");
        };
        for halfway in [false, true] {
            if halfway {
                opt.accumulate(|| net.losses_of(0, 5)).unwrap();
            }
            opt.save(&path).unwrap();
            resumed.load(&path).unwrap();
            same(&opt, &resumed, "loaded");
            assert_eq!((resumed.steps(), resumed.lr()), (opt.steps(), opt.lr()));
            if halfway {
                opt.accumulate(|| net.losses_of(5, 7)).unwrap();
                resumed.accumulate(|| other.losses_of(5, 7)).unwrap();
                opt.update().unwrap();
                resumed.update().unwrap();
                same(&opt, &resumed, "update");
            }
            for _ in 0..3 {
                let losses = (opt.step(|| net.losses()).unwrap(), resumed.step(|| other.losses()).unwrap());
                assert_eq!(losses.0, losses.1);
                same(&opt, &resumed, "step");
            }
        }
        for opt in [&mut opt, &mut resumed] {
            opt.set_lr(0.5 * lr).unwrap();
        }
        opt.step(|| net.losses()).unwrap();
        resumed.step(|| other.losses()).unwrap();
        same(&opt, &resumed, "after set_lr");
    }
}

/// In the middle of an accumulation and of a schedule, with groups.
fn lr_find_leaves_no_trace<R: Row>(row: &Case<R>) {
    for place in places() {
        let [net, twin_net] = [0, 1].map(|_| row.net(place));
        let build = |net: &Net| {
            let builder = row.builder(&net.vs).schedule(Schedule::Cosine { warmup: 3, total: 20, end: 0.0 });
            let builder = if is_joint::<R>() { builder } else { builder.group_lr(1, 0.5 * row.lr) };
            builder.build(&net.vs, row.lr).unwrap()
        };
        let (mut opt, mut twin) = (build(&net), build(&twin_net));
        for (opt, net) in [(&mut opt, &net), (&mut twin, &twin_net)] {
            (0..2).for_each(|_| _ = opt.step(|| net.losses()).unwrap());
            opt.accumulate(|| net.losses_of(0, 5)).unwrap();
        }
        let moved = Cell::new(0);
        let before = net.loss();
        let range = opt.lr_find(1e-3 * row.lr..=2.0 * row.lr, 4, || {
            moved.set(moved.get() + i32::from(net.loss() != before));
            net.losses()
        });
        let rates: Vec<f64> = range.unwrap().tried.iter().map(|(lr, _)| *lr / row.lr).collect();
        for (rate, expected) in rates.iter().zip([1e-3, 1e-3 * 2000_f64.cbrt(), 2.0 / 2000_f64.cbrt(), 2.0]) {
            assert!((rate / expected - 1.0).abs() < 1e-12, "{rates:?}");
        }
        assert_eq!(rates.len(), 4, "{place:?}");
        assert!(moved.get() > 0, "{place:?}: it has not moved the weights at all");
        for (opt, net) in [(&mut opt, &net), (&mut twin, &twin_net)] {
            opt.accumulate(|| net.losses_of(5, 7)).unwrap();
            opt.update().unwrap();
            opt.step(|| net.losses()).unwrap();
        }
        let after = Snapshot::of(&opt, &net.vs).values();
        assert_eq!(after, Snapshot::of(&twin, &twin_net.vs).values(), "{place:?}");
        assert_eq!((opt.steps(), opt.lr()), (twin.steps(), twin.lr()), "{place:?}");
    }
}

/// A checkpoint carries its prior: it does not matter how the optimizer was built that loads it.
#[test]
fn prior_is_in_the_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run.safetensors");
    let priors: [fn(&Net) -> Option<Prior>; 3] =
        [|_| None, |_| Some(Prior::isotropic(300.0)), |net| Some(rows::posterior(&net.vs).into())];
    let build = |net: &Net, prior: Option<Prior>| {
        let builder = Ivon::default().ess(1e3).noise(Philox { seed: 1 });
        let builder = if let Some(prior) = prior { builder.prior(prior) } else { builder };
        builder.build(&net.vs, 0.1).unwrap()
    };
    for (i, saved) in priors.iter().enumerate() {
        for (j, built) in priors.iter().enumerate() {
            let (net, other) = (Net::new(F64), Net::starting_at(F64, 3.0));
            let (mut opt, mut resumed) = (build(&net, saved(&net)), build(&other, built(&other)));
            opt.step(|| net.losses()).unwrap();
            opt.save(&path).unwrap();
            resumed.load(&path).unwrap();
            for change in [|c: Ivon| c, |c: Ivon| c.beta1(0.5), |c: Ivon| c.weight_decay(0.1), |c: Ivon| c.ess(500.0)] {
                opt.configure(change).unwrap();
                resumed.configure(change).unwrap();
                opt.step(|| net.losses()).unwrap();
                resumed.step(|| other.losses()).unwrap();
                let after = Snapshot::of(&opt, &net.vs).values();
                assert_eq!(after, Snapshot::of(&resumed, &other.vs).values(), "prior {i} loaded over {j}");
            }
        }
    }
}

/// P₀ is on the scale of the posterior's precision, so δ = P₀/ess follows ess.
#[test]
fn isotropic_prior_follows_the_effective_sample_size() {
    let run = |ess: f64, later: f64| {
        let net = Net::new(F64);
        let builder = Ivon::default().ess(ess).prior(Prior::isotropic(300.0)).noise(Philox { seed: 1 });
        let mut opt = builder.build(&net.vs, 0.1).unwrap();
        opt.configure(|c| c.ess(later)).unwrap();
        opt.step(|| net.losses()).unwrap();
        Snapshot::of(&opt, &net.vs).weights
    };
    assert_eq!(run(1e3, 500.0), run(500.0, 500.0));
}

fn guard_equals_closure<R: Row>(row: &Case<R>) {
    for place in places() {
        let (net, other) = (row.net(place), row.net(place));
        let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
        let mut guarded = row.builder(&other.vs).build(&other.vs, row.lr).unwrap();
        for _ in 0..4 {
            let calls = Cell::new(0);
            let loss = opt.step(|| {
                calls.set(calls.get() + 1);
                net.losses()
            });
            let before = Snapshot::of(&guarded, &other.vs);
            // An evaluation that comes to nothing.
            drop(guarded.perturbed().unwrap());
            guarded.perturbed().unwrap().backward(other.losses().detach()).unwrap_err();
            assert_eq!(Snapshot::of(&guarded, &other.vs), before, "{place:?}");
            let pairs = matches!(opt.config().expectation(), Expectation::Adversarial { .. });
            for _ in 0..calls.get() / if pairs { 2 } else { 1 } {
                let mut evaluation = guarded.perturbed().unwrap();
                if pairs {
                    let losses = other.losses();
                    evaluation = evaluation.ascend(losses).unwrap();
                }
                let losses = other.losses();
                evaluation.backward(losses).unwrap();
            }
            assert_eq!(guarded.update().unwrap(), loss.unwrap());
            assert_eq!(Snapshot::of(&opt, &net.vs).values(), Snapshot::of(&guarded, &other.vs).values(), "{place:?}");
        }
        let nothing = guarded.update().unwrap_err();
        assert!(matches!(nothing, Error::Loss(_)), "{nothing:?}");
    }
}

/// A backward pass of the loop's own, of a scaled loss, is the step that a closure makes; or the row says what it
/// needs.
fn grad_equals_closure<R: Row>(row: &Case<R>) {
    // A power of two, which rounds nothing.
    const SCALE: f64 = 1024.0;
    let mean = |net: &Net| net.losses().mean(None::<tch::Kind>);
    let backward = |net: &Net| {
        let loss = mean(net);
        (&loss * SCALE).backward();
        loss.double_value(&[])
    };
    let more_than_a_gradient = |statistic: Statistic| {
        use Statistic::{Fisher, Hessian, HessianDiagonal, Hutchinson, KroneckerFisher};
        matches!(statistic, Fisher(_) | KroneckerFisher(_) | Hessian | HessianDiagonal | Hutchinson { .. })
    };
    for place in places() {
        let (net, other) = (row.net(place), row.net(place));
        let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
        let mut by_grad = row.builder(&other.vs).build(&other.vs, row.lr).unwrap();
        let grads = || other.weights.iter().map(Tensor::grad).filter(Tensor::defined).map(|g| bits(&g)).collect();
        let before = Snapshot::of(&by_grad, &other.vs);
        if more_than_a_gradient(opt.config().statistic()) {
            let evaluation = by_grad.perturbed().unwrap();
            let loss = backward(&other);
            refused(evaluation.step_from_grad(loss, SCALE), &["loss", R::NAME, "hand over the loss"]);
            assert_eq!(Snapshot::of(&by_grad, &other.vs), before, "{place:?}");
            continue;
        }
        refused(by_grad.perturbed().unwrap().backward_from_grad(1.0, 1.0), &["loss", "loss.backward()"]);
        for scale in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let evaluation = by_grad.perturbed().unwrap();
            let loss = backward(&other);
            let taken: Vec<Vec<u8>> = grads();
            refused(evaluation.backward_from_grad(loss, scale), &["scale", &format!("{scale:?}"), "> 0"]);
            assert_eq!(grads(), taken, "{place:?}");
        }
        let pairs = matches!(opt.config().expectation(), Expectation::Adversarial { .. });
        let evaluation = by_grad.perturbed().unwrap();
        let nan = if pairs {
            evaluation.ascend_from_grad(f64::NAN, 1.0).map(drop)
        } else {
            evaluation.backward_from_grad(f64::NAN, 1.0).map(drop)
        };
        refused(nan, &["loss is NaN"]);
        assert_eq!(Snapshot::of(&by_grad, &other.vs), before, "{place:?}");
        by_grad.zero_grad();
        for _ in 0..3 {
            let calls = Cell::new(0);
            let closure = || {
                calls.set(calls.get() + 1);
                mean(&net)
            };
            let loss = opt.step(closure).unwrap();
            let evaluations = calls.get() / if pairs { 2 } else { 1 };
            for left in (0..evaluations).rev() {
                let mut evaluation = by_grad.perturbed().unwrap();
                if pairs {
                    let first = backward(&other);
                    evaluation = evaluation.ascend_from_grad(first, SCALE).unwrap();
                }
                let one = backward(&other);
                if left > 0 {
                    evaluation.backward_from_grad(one, SCALE).unwrap();
                } else {
                    assert_eq!(evaluation.step_from_grad(one, SCALE).unwrap(), loss, "{place:?}");
                }
                assert!(grads().iter().flatten().all(|byte| *byte == 0), "{place:?}");
            }
            assert_eq!(Snapshot::of(&opt, &net.vs).values(), Snapshot::of(&by_grad, &other.vs).values(), "{place:?}");
        }
    }
}

/// Whether updates at the mean and at samples take turns, as EVON's can.
fn is_phased<R: Row>(row: &R) -> bool {
    serde_json::to_value(row).unwrap()["phased"] == true
}

fn variables_hold_the_mean<R: Row>(row: &Case<R>) {
    for place in places() {
        let net = row.net(place);
        let mut opt = row.builder(&net.vs).build(&net.vs, 0.0).unwrap();
        let look = || net.weights.iter().map(|w| (bits(w), w.data_ptr() as usize)).collect::<Vec<_>>();
        let mean = look();
        let mut seen: Vec<Vec<_>> = Vec::new();
        for call in 0..6 {
            let closure = || {
                seen.push(look());
                net.losses()
            };
            // Two micro-batches to a step.
            if call % 2 == 0 {
                opt.accumulate(closure).unwrap()
            } else {
                opt.step(closure).unwrap()
            };
            assert_eq!(look(), mean, "{place:?}");
        }
        // Of a phased training, the first and the third of these three updates are at the mean.
        let clean = |i: usize| is_phased(opt.config()) && (i / 2).is_multiple_of(2);
        assert!(seen.iter().enumerate().all(|(i, s)| !clean(i) || *s == mean), "{place:?}");
        let noisy = seen.into_iter().enumerate().filter(|(i, _)| !clean(*i));
        let mut seen: Vec<_> = noisy.map(|(_, s)| s).collect();
        // Of a pair without noise, the first is at the mean, and the second is the same in each pair.
        let expectation = opt.config().expectation();
        let plain_pairs = expectation == Expectation::Adversarial { sampled: false };
        if plain_pairs {
            assert!(seen.iter().step_by(2).all(|s| *s == mean), "{place:?}");
            let mut seconds: Vec<_> = seen.into_iter().skip(1).step_by(2).collect();
            let values = |s: &Vec<(Vec<u8>, usize)>| s.iter().map(|w| w.0.clone()).collect::<Vec<_>>();
            assert!(seconds.iter().all(|s| values(s) == values(&seconds[0])), "{place:?}");
            seconds.truncate(1);
            seen = seconds;
        }
        let delta_method = seen.iter().all(|s| *s == mean);
        if !delta_method {
            // Each evaluation at a point of its own, in the memory of the mean.
            for (i, s) in seen.iter().enumerate() {
                assert!(s.iter().zip(&mean).all(|(a, b)| a.1 == b.1), "{place:?}");
                for other in seen[..i].iter().chain([&mean]) {
                    let mut differ = s.iter().zip(other).map(|(a, b)| a.0 != b.0);
                    // A small tensor may round to where it was in eight bits.
                    let half = place.0 == tch::Kind::BFloat16;
                    assert!(if half { differ.any(|d| d) } else { differ.all(|d| d) }, "{place:?}");
                }
            }
        }
        assert_eq!(delta_method, expectation == Expectation::Delta);
    }
}

/// Views and other handles that were made once, before the optimizer, are at every point of every evaluation, and a
/// loss that is computed through them trains as one from the variables.
fn aliases_are_at_every_point<R: Row>(row: &Case<R>) {
    for place in places() {
        let run = |aliased: bool| {
            let net = row.net(place);
            let whole: Vec<Tensor> = net.weights.iter().map(|w| w.narrow(0, 0, w.size()[0])).collect();
            let aliases: Vec<[Tensor; 4]> = net
                .weights
                .iter()
                .map(|w| [w.detach(), w.shallow_clone(), w.transpose(0, -1), w.narrow(0, 1, w.size()[0] - 1)])
                .collect();
            let look = || {
                for (w, [detached, handle, transposed, part]) in net.weights.iter().zip(&aliases) {
                    let same = [detached.shallow_clone(), handle.shallow_clone(), transposed.transpose(0, -1)];
                    assert!(same.iter().all(|alias| bits(alias) == bits(w)), "{place:?}");
                    assert!(bits(part) == bits(&w.narrow(0, 1, w.size()[0] - 1)), "{place:?}");
                }
            };
            let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
            for _ in 0..3 {
                opt.step(|| {
                    look();
                    // Layers that record know their weights by handle, so that a view is none of theirs.
                    if aliased && row.form == Form::Plain {
                        net.losses_with(&whole.iter().collect::<Vec<_>>())
                    } else {
                        net.losses()
                    }
                })
                .unwrap();
                look();
            }
            Snapshot::of(&opt, &net.vs).values()
        };
        assert!(run(true) == run(false), "{place:?}");
    }
}

/// However small or large the gradients: weights and state stay finite, or the step is an error and has changed
/// nothing.
fn extreme_gradients_leave_finite_weights<R: Row>(row: &Case<R>) {
    for place in [F32, F64, (Kind::Half, Device::Cpu)] {
        for power in [-44, 10, 16, 30, 160] {
            let net = row.net(place);
            let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
            for plain in [true, false, false, false, true] {
                let scale = if plain { 1.0 } else { 10f64.powi(power) };
                let before = Snapshot::of(&opt, &net.vs);
                let result = opt.step(|| net.losses() * scale);
                if result.is_err() {
                    assert_eq!(Snapshot::of(&opt, &net.vs), before, "{place:?}, 1e{power}");
                }
                let state = |name: &str| R::STATE.iter().filter_map(|state| opt.state(name, state)).collect::<Vec<_>>();
                for (name, w) in net.vs.variables() {
                    for t in state(&name).iter().chain([&w]) {
                        assert!(t.isfinite().all().int64_value(&[]) == 1, "{place:?}, 1e{power}: {name}, {result:?}");
                    }
                }
            }
        }
    }
}

fn changes_from_outside_are_taken_over<R: Row>(row: &Case<R>) {
    for place in places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.safetensors");
        let [net, other, loaded] = [0.0, 1.0, 2.0].map(|phase| row.net_at(place, phase));
        let build = |net: &Net| row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
        let mut opt = build(&net);
        opt.step(|| net.losses()).unwrap();
        tch::no_grad(|| net.weights.iter().zip(&other.weights).for_each(|(w, x)| w.shallow_clone().copy_(x)));
        opt.save(&path).unwrap();
        build(&loaded).load(&path).unwrap();
        let weights = |net: &Net| net.weights.iter().map(bits).collect::<Vec<_>>();
        assert_eq!(weights(&loaded), weights(&other), "{place:?}");
        // The step starts from there: with no learning rate it stays there.
        opt.set_lr(0.0).unwrap();
        opt.step(|| net.losses()).unwrap();
        assert_eq!(weights(&net), weights(&other), "{place:?}");
    }
}

fn other_thread_gives_the_same<R: Row>(row: &Case<R>) {
    fn send<T: Send>(t: T) -> T {
        t
    }
    for place in places() {
        let run = |elsewhere: bool| {
            let net = row.net(place);
            let mut opt = send(row.builder(&net.vs)).build(&net.vs, row.lr).unwrap();
            opt.step(|| net.losses()).unwrap();
            let mut rest = move || {
                opt.step(|| net.losses()).unwrap();
                Snapshot::of(&opt, &net.vs).values()
            };
            if elsewhere { std::thread::spawn(rest).join().unwrap() } else { rest() }
        };
        assert_eq!(run(true), run(false), "{place:?}");
    }
}

// Not SOAP: a direction of its basis without any gradient divides rounding by its own size.
macro_rules! at_the_mean {
    ($($row:ident)*) => {
        mod micro_batches {
            $(#[test]
            fn $row() {
                super::micro_batches_equal_one_batch(&super::rows::$row());
            })*
        }
    };
}

at_the_mean!(sgd sgd_nesterov sgd_prior rmsprop adam adam_prior adamw ogn ste kfac newton diagonal_newton);

fn micro_batches_equal_one_batch<R: Row>(row: &Case<R>) {
    let (net, other) = (row.net(F64), row.net(F64));
    let mut whole = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
    let mut parts = row.builder(&other.vs).build(&other.vs, row.lr).unwrap();
    for _ in 0..5 {
        let loss = whole.step(|| net.losses()).unwrap();
        parts.accumulate(|| other.losses_of(0, 5)).unwrap();
        let loss_of_parts = parts.step(|| other.losses_of(5, 7)).unwrap();
        assert!((loss - loss_of_parts).abs() < 1e-12 * loss);
        for (a, b) in other.weights.iter().zip(&net.weights) {
            assert_close(a, b, 1e-12);
        }
    }
    assert_eq!((whole.steps(), parts.steps()), (5, 5));
}

/// tch's own form is the same step.
#[test]
fn backward_step_equals_step() {
    fn check<R: DeltaRule>(row: &Case<R>) {
        for place in places() {
            let (net, other) = (row.net(place), row.net(place));
            let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
            let mut tch_form = row.builder(&other.vs).build(&other.vs, row.lr).unwrap();
            for _ in 0..3 {
                let losses = (opt.step(|| net.losses()).unwrap(), tch_form.backward_step(&other.losses()).unwrap());
                assert_eq!(losses.0, losses.1);
                assert_eq!(Snapshot::of(&opt, &net.vs).values(), Snapshot::of(&tch_form, &other.vs).values());
            }
        }
    }
    check(&rows::sgd_nesterov());
    check(&rows::rmsprop());
    check(&rows::adam());
    check(&rows::adamw());
    check(&rows::ste());
}

/// As above, between the evaluation and the update.
#[test]
fn changes_before_the_update_are_taken_over() {
    for place in places() {
        let net = Net::new(place);
        let mut opt = tch_blr::Sgd::default().build(&net.vs, 0.0).unwrap();
        opt.accumulate(|| net.losses()).unwrap();
        tch::no_grad(|| net.weights.iter().for_each(|w| _ = w.shallow_clone().fill_(8.0)));
        opt.update().unwrap();
        assert!(net.weights.iter().all(|w| w.min().double_value(&[]) == 8.0), "{place:?}");
    }
}

/// A later sample's failure takes back what the earlier ones have shown.
#[test]
fn failure_leaves_the_diagnostics() {
    let net = Net::new(support::F64);
    let mut opt = tch_blr::Ivon::default().ess(100.0).samples(2).build(&net.vs, 0.1).unwrap();
    opt.step(|| net.losses()).unwrap();
    let before = opt.diagnostics().unwrap();
    let calls = Cell::new(0);
    let closure = || {
        calls.set(calls.get() + 1);
        if calls.get() == 2 { Err("on purpose") } else { Ok(net.losses() * 3.0) }
    };
    opt.step(closure).unwrap_err();
    assert_eq!(opt.diagnostics().unwrap(), before);
}

/// In a joint block, a parameter without a gradient is held where it is: a Newton step then finds the minimum over the
/// others, which on a quadratic is exact.
#[test]
fn a_joint_row_moves_the_others_as_if_the_rest_were_fixed() {
    type Build = fn(&Net) -> Optimizer<Newton>;
    let rows: [(&str, Build); 2] = [
        ("weight decay", |net| Newton::default().weight_decay(0.1).build(&net.vs, 1.0).unwrap()),
        ("full prior", |net| {
            let q = rows::posterior(&net.vs).full().unwrap();
            Newton::default().ess(1e3).prior(&q).build(&net.vs, 1.0).unwrap()
        }),
    ];
    for (prior, build) in rows {
        let [frozen, flat] = [0, 1].map(|_| Net::of(Form::Tapped, F64, 0.0));
        let [mut fixed, mut unknown] = [build(&frozen), build(&flat)];
        _ = frozen.weights[2].set_requires_grad(false);
        fixed.step(|| frozen.losses()).unwrap();
        // The same loss, which does not depend on that weight.
        let held = Net::of(Form::Tapped, F64, 0.0);
        tch::no_grad(|| held.weights[2].shallow_clone().copy_(&flat.weights[2]));
        let losses = || {
            let [a, b, _, d] = &flat.weights[..] else { unreachable!() };
            held.losses_with(&[a, b, &held.weights[2].detach(), d])
        };
        unknown.step(losses).unwrap();
        assert_eq!(bits(&frozen.weights[2]), bits(&held.weights[2]), "{prior}");
        for (a, b) in frozen.weights.iter().zip(&flat.weights) {
            assert_close(a, b, 1e-12);
        }
        let moved = (&frozen.weights[0] - &held.weights[0]).abs().max().double_value(&[]);
        assert!(moved > 1e-3, "{prior}: {moved}");
    }
}

/// δ of one group is in its posterior, and what all evaluate together cannot differ.
#[test]
fn overrides_reach_the_posterior() {
    let net = Net::of(Form::Tapped, F64, 0.0);
    let rule = Evon::default().ess(10.0).weight_decay(0.01).hess_init(0.5);
    let opt = rule.group(1, |c| c.weight_decay(0.5).ess(20.0)).build(&net.vs, 0.1).unwrap();
    let precision = |opt: &Optimizer<Evon>, name: &str| {
        opt.posterior().unwrap().parameter(name).unwrap().precision.double_value(&[0, 0])
    };
    assert!((precision(&opt, "first.weight") - 10.0 * 0.51).abs() < 1e-12);
    assert!((precision(&opt, "second.weight") - 20.0 * 1.0).abs() < 1e-12);
    // The prior takes the place of every weight decay, at each group's own ess.
    let prior = rule.prior(Prior::isotropic(2.0)).group(1, |c| c.weight_decay(0.5).ess(20.0));
    let opt = prior.build(&net.vs, 0.1).unwrap();
    assert!((precision(&opt, "first.weight") - (10.0 * 0.5 + 2.0)).abs() < 1e-12);
    assert!((precision(&opt, "second.weight") - (20.0 * 0.5 + 2.0)).abs() < 1e-12);
    let elsewhere = rule.group(1, |c| c.expectation(Expectation::MonteCarlo { samples: 2 }));
    let e = elsewhere.build(&net.vs, 0.1).unwrap_err().to_string();
    assert!(e.contains("where the loss is evaluated"), "{e}");
}
