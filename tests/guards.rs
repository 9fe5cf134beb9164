//! Guards over the same weights in any order, steps inside of others, and several threads: what cannot be right is
//! refused, and the mean is never lost.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use support::{F32, Snapshot, bits, wave_at};
use tch::nn::{LinearConfig, Module, VarStore, linear};
use tch::{Device, Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{
    Adam, DiagonalGaussian, Ema, Error, Evon, FullVon, Ivon, Lawa, Params, Perturbed, Philox, Sam, Swag, soft_update,
};

fn weights() -> (VarStore, Tensor) {
    let vs = VarStore::new(Device::Cpu);
    let w = vs.root().zeros("w", &[5]);
    tch::no_grad(|| w.shallow_clone().copy_(&wave_at(&[5], 0.0, F32)));
    (vs, w)
}

fn posterior(w: &Tensor) -> DiagonalGaussian {
    DiagonalGaussian::new([("w", w.detach().copy(), w.detach().ones_like() * 4.0)]).unwrap()
}

#[track_caller]
fn in_use<T: std::fmt::Debug>(result: tch_blr::Result<T>, needle: &str) {
    match result {
        Err(Error::InUse(text)) if text.contains(needle) => {}
        other => panic!("{other:?}"),
    }
}

/// All orders in which three guards can be dropped: the weights are those of the latest that lives, then the mean.
#[test]
fn guards_may_be_dropped_in_any_order() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let (vs, w) = weights();
        let (q, mean) = (posterior(&w), bits(&w));
        let samples: Vec<_> = (0..3).map(|k| bits(&q.sample(k).unwrap()[0].1)).collect();
        let mut guards: Vec<Option<Perturbed>> = (0..3).map(|k| Some(q.perturb(&vs, k).unwrap())).collect();
        for gone in order {
            guards[gone] = None;
            let latest = guards.iter().rposition(Option::is_some);
            assert_eq!(bits(&w), latest.map_or(mean.clone(), |k| samples[k].clone()), "{order:?}");
        }
    }
}

/// The last handle of a guard that is replaced by the next sample's.
#[test]
fn a_guard_replaces_another() {
    let (vs, w) = weights();
    let (q, mean) = (posterior(&w), bits(&w));
    let mut guard = q.perturb(&vs, 0).unwrap();
    for k in 1..5 {
        guard = q.perturb(&vs, k).unwrap();
        assert_eq!(bits(&w), bits(&q.sample(k).unwrap()[0].1));
    }
    drop(guard);
    assert_eq!(bits(&w), mean);
}

/// Whoever would train, save or average perturbed weights is told, and nothing changes.
#[test]
fn perturbed_weights_are_not_trained() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("run");
    let (vs, w) = weights();
    let q = posterior(&w);
    let loss = || w.square().mean(Kind::Float);
    let mut ema = Ema::new(&vs, 0.5).unwrap();
    let (mut swag, mut lawa) = (Swag::new(&vs, 2).unwrap(), Lawa::new(&vs, 2, 1).unwrap());
    let mut ivon = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap();
    let mut adam = Adam::default().build(&vs, 0.1).unwrap();
    let mut evon = Evon::default().ess(10.0).build(&vs, 0.1).unwrap();
    ivon.save(&path).unwrap();
    ivon.accumulate(loss).unwrap();
    let before = Snapshot::of(&ivon, &vs);
    let guard = q.perturb(&vs, 0).unwrap();
    in_use(ivon.step(loss), "`w`");
    in_use(ivon.accumulate(loss), "drop that before");
    in_use(ivon.update(), "`w`");
    in_use(ivon.perturbed().map(drop), "`w`");
    in_use(ivon.posterior(), "`w`");
    in_use(ivon.learned_posterior(), "`w`");
    in_use(ivon.save(&path), "`w`");
    in_use(ivon.load(&path), "`w`");
    in_use(ivon.lr_find(1e-3..=1.0, 3, loss), "`w`");
    in_use(adam.step(loss), "`w`");
    in_use(adam.backward_step(&loss()), "`w`");
    in_use(evon.step(loss), "`w`");
    in_use(ema.update(), "`w`");
    in_use(swag.collect(), "`w`");
    in_use(lawa.update(), "`w`");
    in_use(soft_update(&vs, &vs, 0.5), "`w`");
    in_use(q.copy_mean_to(&vs), "`w`");
    // A look at the loss there is what the guard is for.
    let _ = q.predict_samples(&vs, 2, loss).unwrap();
    drop(guard);
    assert_eq!(Snapshot::of(&ivon, &vs), before);
    ivon.step(loss).unwrap();
    adam.step(loss).unwrap();
    ema.update().unwrap();
    assert_eq!((swag.collected(), lawa.updates()), (0, 0));
}

/// A second optimizer of the same weights cannot step while the first has them at a sample; one of others can, and so
/// can one inside a row that evaluates at the mean.
#[test]
fn steps_inside_of_steps() {
    let ((vs, w), (other_vs, other_w)) = (weights(), weights());
    let mut outer = Ivon::default().ess(10.0).builder().noise(Philox { seed: 1 }).build(&vs, 0.1).unwrap();
    let mut same = Adam::default().build(&vs, 0.1).unwrap();
    let mut other = Sam::default().build(&other_vs, 0.1).unwrap();
    let before = Snapshot::of(&same, &vs);
    let loss = outer
        .step(|| {
            in_use(same.step(|| w.square().mean(Kind::Float)), "`w`");
            other.step(|| other_w.square().mean(Kind::Float))?;
            Ok::<_, Error>(w.square().mean(Kind::Float))
        })
        .unwrap();
    assert!(loss.is_finite() && same.steps() == 0 && other.steps() == 1);
    assert!(Snapshot::of(&same, &vs) != before, "the outer step was lost");
    let mut adam = Adam::default().build(&other_vs, 0.1).unwrap();
    adam.step(|| {
        other.step(|| other_w.square().mean(Kind::Float)).unwrap();
        other_w.square().mean(Kind::Float)
    })
    .unwrap();
    assert_eq!((other.steps(), adam.steps()), (2, 1));
}

/// A guard that outlives the evaluation it was made in, in rows at samples, at the mean, at two points and over blocks:
/// no update is made at its weights.
#[test]
fn a_guard_from_inside_an_evaluation() {
    fn check<R: Row>(row: R) {
        let run = |leave: bool| {
            let (vs, w) = weights();
            let q = posterior(&w);
            let mut opt = row.builder().noise(Philox { seed: 1 }).build(&vs, 0.1).unwrap();
            let before = Snapshot::of(&opt, &vs);
            let loss = || w.square().mean(Kind::Float);
            let mut kept = None;
            let mut closure = |leave: bool| {
                let guard = q.perturb(&vs, 0).unwrap();
                if leave {
                    kept = Some(guard);
                } else {
                    drop(guard);
                }
                loss()
            };
            if leave {
                // At the first point, and at the second where there is one.
                in_use(opt.step(|| closure(true)), "");
                in_use(opt.step(|| closure(false)), "`w`");
                drop(kept.take());
                assert_eq!(Snapshot::of(&opt, &vs), before, "{}", R::NAME);
                let evaluation = opt.perturbed().unwrap();
                let guard = q.perturb(&vs, 1).unwrap();
                if matches!(R::NAME, "sam") {
                    in_use(evaluation.ascend(loss()), "");
                } else {
                    in_use(evaluation.step(loss()), "");
                }
                drop(guard);
                assert_eq!(Snapshot::of(&opt, &vs), before, "{}", R::NAME);
            } else {
                opt.step(|| closure(false)).unwrap();
                return Snapshot::of(&opt, &vs).values();
            }
            opt.step(loss).unwrap();
            Snapshot::of(&opt, &vs).values()
        };
        assert!(run(true) == run(false), "{}", R::NAME);
    }
    check(Ivon::default().ess(10.0));
    check(Ivon::default().ess(10.0).samples(2));
    check(Adam::default());
    check(Sam::default());
    check(Evon::default().ess(10.0));
    check(FullVon::default().ess(10.0).weight_decay(1.0));
}

/// Memory that is held in one layout is not perturbed in another: out of order, the mean would come back transposed.
#[test]
fn one_layout_at_a_time() {
    let square = wave_at(&[3, 3], 0.0, F32);
    let before = bits(&square);
    let of = |w: Tensor| {
        let q = DiagonalGaussian::new([("w", w.detach().copy(), w.detach().ones_like())]).unwrap();
        (q, Params::named([("w", w)]).unwrap())
    };
    let ((q, params), (transposed, others)) = (of(square.shallow_clone()), of(square.tr()));
    let guard = q.perturb(&params, 0).unwrap();
    in_use(transposed.perturb(&others, 0), "layout");
    drop(guard);
    drop(transposed.perturb(&others, 0).unwrap());
    assert_eq!(bits(&square), before);
}

/// A leaked guard leaves the weights where they are, and no one trains them unknowingly.
#[test]
fn a_leaked_guard() {
    let (vs, w) = weights();
    let mut opt = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap();
    std::mem::forget(opt.perturbed().unwrap());
    in_use(opt.step(|| w.square().mean(Kind::Float)), "`w`");
}

/// One model in several threads, with nothing in between: each prediction is right or refused, and in the end the
/// weights are what they were. With turns, all are right.
#[test]
fn predictions_from_several_threads() {
    let vs = VarStore::new(Device::Cpu);
    let net = linear(vs.root(), 20, 3, LinearConfig::default());
    let x = wave_at(&[8, 20], 0.3, F32);
    let before: Vec<_> = vs.trainable_variables().iter().map(bits).collect();
    let q = || {
        let entries = [("weight", &net.ws), ("bias", net.bs.as_ref().unwrap())];
        DiagonalGaussian::new(entries.map(|(n, w)| (n, w.detach().copy(), w.detach().ones_like()))).unwrap()
    };
    let predict = |q: &DiagonalGaussian, net: &tch::nn::Linear, x: &Tensor| {
        q.predict(&vs, 8, || net.forward(x).softmax(-1, Kind::Float)).map(|p| bits(&p.mean))
    };
    let alone = predict(&q(), &net, &x).unwrap();
    for turns in [false, true] {
        let (start, lock) = (AtomicBool::new(false), Mutex::new(()));
        // Each thread with handles of its own, because tensors are not shared between threads.
        let threads: Vec<_> = (0..3)
            .map(|_| {
                (
                    q(),
                    tch::nn::Linear { ws: net.ws.shallow_clone(), bs: net.bs.as_ref().map(Tensor::shallow_clone) },
                    x.copy(),
                )
            })
            .collect();
        let (start, lock, predict, alone) = (&start, &lock, &predict, &alone);
        std::thread::scope(|scope| {
            for (q, net, x) in threads {
                scope.spawn(move || {
                    while !start.load(Ordering::Relaxed) {}
                    for _ in 0..100 {
                        let _turn = turns.then(|| lock.lock().unwrap());
                        match predict(&q, &net, &x) {
                            Ok(mean) => assert_eq!(mean, *alone),
                            Err(e) => assert!(matches!(e, Error::InUse(_)) && !turns, "{e}"),
                        }
                    }
                });
            }
            start.store(true, Ordering::Relaxed);
        });
        let after: Vec<_> = vs.trainable_variables().iter().map(bits).collect();
        assert_eq!(after, before);
    }
}

/// Training on one thread and predicting on another: no step is made at somebody's sample.
#[test]
fn training_beside_predictions() {
    let (vs, w) = weights();
    let (q, there) = (posterior(&w), w.shallow_clone());
    let mut opt = Adam::default().build(&vs, 0.0).unwrap();
    let (done, before, vs) = (AtomicBool::new(false), bits(&w), &vs);
    std::thread::scope(|scope| {
        let done = &done;
        scope.spawn(move || {
            let mut told = 0;
            for _ in 0..300 {
                match q.predict_samples(vs, 2, || there.copy()) {
                    Ok(_) => {}
                    Err(Error::InUse(_)) => told += 1,
                    Err(e) => panic!("{e}"),
                }
            }
            done.store(true, Ordering::Relaxed);
            told
        });
        while !done.load(Ordering::Relaxed) {
            // A backward pass of its own finds that the weights move under it.
            match opt.step(|| w.square().mean(Kind::Float)) {
                Ok(_) | Err(Error::InUse(_) | Error::Torch(_)) => {}
                Err(e) => panic!("{e}"),
            }
        }
    });
    assert_eq!(bits(&w), before);
}
