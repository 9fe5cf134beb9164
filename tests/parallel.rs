//! Several ranks, as threads: they do what one process does with as many evaluations, decide alike, and none waits for
//! what does not come.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;
use support::rows::{self, Case};
use support::{F32, F64, Net, Place, bits, values, wave_at};
use tch::{Kind, Tensor};
use tch_blr::parallel::{Alone, Collective, Threads};
use tch_blr::rule::Row;
use tch_blr::{Adam, AnyRow, BuildOptions, Error, Evon, Expectation, Ivon, Optimizer, Philox, Result, Sgd, Von};

/// Runs `work` on every rank, and gives what they return; a rank that waits for longer than this is an error.
fn ranks<T: Send>(size: usize, work: impl Fn(usize, Threads) -> T + Sync) -> Vec<T> {
    let (group, work) = (Threads::with_timeout(size, Duration::from_secs(60)).unwrap(), &work);
    std::thread::scope(|scope| {
        let run = |c: Threads| scope.spawn(move || work(c.rank(), c));
        let threads: Vec<_> = group.into_iter().map(run).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// What all ranks have alike.
#[track_caller]
fn same<T: PartialEq + std::fmt::Debug>(all: Vec<T>) -> T {
    let mut all = all.into_iter();
    let first = all.next().unwrap();
    all.enumerate().for_each(|(i, x)| assert_eq!(x, first, "rank {} beside rank 0", i + 1));
    first
}

/// Weights and state, bit by bit.
fn held<R: Row>(opt: &Optimizer<R>, net: &Net) -> Vec<Vec<u8>> {
    let names: Vec<String> = opt.params().names().map(str::to_owned).collect();
    let states = names.iter().flat_map(|name| R::STATE.iter().filter_map(|state| opt.state(name, state)));
    net.weights.iter().map(bits).chain(states.map(|t| bits(&t))).collect()
}

/// The examples of a rank of three: uneven parts of twelve.
const PARTS: [(i64, i64); 3] = [(0, 5), (5, 4), (9, 3)];

fn part(net: &Net, rank: usize) -> Tensor {
    net.losses_of(PARTS[rank].0, PARTS[rank].1)
}

/// Three ranks and one process that makes the evaluations of all, each at the noise that the rank has.
fn ranks_equal_evaluations<R: Row>(row: &Case<R>) {
    for place in support::places() {
        let together = same(ranks(3, |rank, c| {
            // Weights of its own, which those of rank 0 replace.
            let net = row.net_at(place, rank as f64);
            let mut opt = row.builder(&net.vs).parallel(c).compare_ranks(1).build(&net.vs, row.lr).unwrap();
            let losses: Vec<f64> = (0..4).map(|_| opt.step(|| part(&net, rank)).unwrap()).collect();
            (losses, held(&opt, &net))
        }));
        let net = row.net(place);
        let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
        let (each, pairs) = match opt.config().expectation() {
            Expectation::MonteCarlo { samples } => (samples, 1),
            Expectation::Antithetic { pairs } => (2 * pairs, 2),
            _ => (1, 1),
        };
        let climbs = matches!(opt.config().expectation(), Expectation::Adversarial { .. });
        let losses = (0..4).map(|_| {
            for k in 0..3 * each {
                // One draw of each rank after the other, and of a pair both.
                let rank = k / pairs % 3;
                let mut evaluation = opt.perturbed().unwrap();
                if climbs {
                    evaluation = evaluation.ascend(part(&net, rank)).unwrap();
                }
                let loss = part(&net, rank);
                evaluation.backward(loss).unwrap();
            }
            opt.update().unwrap()
        });
        let losses: Vec<f64> = losses.collect();
        if each == 1 {
            assert_eq!(together, (losses, held(&opt, &net)), "{place:?}");
            continue;
        }
        // Another order of the same sum, first each rank's own: rounding, which four steps of a row may enlarge; and in half
        // precision the points that are evaluated, and the weights, have eight bits.
        let digits = match place.0 {
            Kind::Double => 1e-9,
            Kind::Float => 1e-4,
            _ => 2e-3,
        };
        for (ours, theirs) in together.0.iter().zip(&losses) {
            assert!((ours - theirs).abs() < digits * theirs.abs(), "{place:?}: {ours} {theirs}");
        }
        for (ours, w) in together.1.iter().zip(&net.weights) {
            let ours = Tensor::from_slice(ours).view_dtype(w.kind()).reshape(w.size());
            support::assert_close(&ours.to_kind(Kind::Double), &w.detach().to_kind(Kind::Double), digits);
        }
    }
}

macro_rules! suite {
    ($($row:ident)*) => {
        $(#[test]
        fn $row() {
            ranks_equal_evaluations(&rows::$row());
        })*
    };
}

mod every_row {
    use super::{ranks_equal_evaluations, rows};
    support::rows_of_weights!(suite);
    support::rows_of_all_weights!(suite);
    support::rows_of_binary_weights!(suite);
}

fn ivon() -> tch_blr::Builder<Ivon> {
    Ivon::default().ess(100.0).builder().noise(Philox { seed: 5 })
}

#[test]
fn chunks_are_ranks() {
    let together = same(ranks(3, |rank, c| {
        let net = Net::new(F32);
        let mut opt = ivon().parallel(c).build(&net.vs, 0.1).unwrap();
        let losses = [0; 3].map(|_| opt.step(|| part(&net, rank)).unwrap());
        (losses, held(&opt, &net))
    }));
    let net = Net::new(F32);
    let mut opt = ivon().parallel(Alone).build(&net.vs, 0.1).unwrap();
    let losses = [0; 3].map(|_| opt.step_chunks(3, |rank| part(&net, rank)).unwrap());
    assert_eq!(together, (losses, held(&opt, &net)));
}

#[test]
fn a_mean_loss_counts_once_per_rank() {
    let loss = same(ranks(2, |rank, c| {
        let net = Net::new(F64);
        let mut opt = Sgd::default().builder().parallel(c).build(&net.vs, 0.1).unwrap();
        opt.step(|| net.losses_of(0, 4 + 8 * rank as i64).mean(Kind::Double)).unwrap()
    }));
    let net = Net::new(F64);
    let mean = |n| net.losses_of(0, n).mean(Kind::Double).double_value(&[]);
    assert_eq!(loss, f64::midpoint(mean(4), mean(12)));
}

#[test]
fn micro_batches_are_summed_once() {
    let together = same(ranks(3, |rank, c| {
        let net = Net::new(F64);
        let mut opt = ivon().parallel(c).build(&net.vs, 0.1).unwrap();
        // Means over all ranks, too.
        let (first, n) = PARTS[rank];
        let kept = opt.accumulate(|| net.losses_of(first, 1)).unwrap();
        let loss = opt.step(|| net.losses_of(first + 1, n - 1)).unwrap();
        opt.accumulate(|| part(&net, rank)).unwrap();
        (kept, loss, opt.update().unwrap(), opt.steps(), held(&opt, &net))
    }));
    let net = Net::new(F64);
    let mut opt = ivon().build(&net.vs, 0.1).unwrap();
    // In the order of the draws: the first micro-batch of each rank, then the second.
    let mut kept = 0.0;
    for (first, _) in PARTS {
        kept += opt.accumulate(|| net.losses_of(first, 1)).unwrap() / 3.0;
    }
    for (first, n) in PARTS {
        opt.accumulate(|| net.losses_of(first + 1, n - 1)).unwrap();
    }
    let loss = opt.update().unwrap();
    opt.step_chunks(3, |rank| part(&net, rank)).unwrap();
    let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} {b}");
    near(together.0, kept);
    near(together.1, loss);
    let w = &net.weights[0];
    let ours = Tensor::from_slice(&together.4[0]).view_dtype(Kind::Double).reshape(w.size());
    support::assert_close(&ours, &w.detach(), 1e-12);
    assert_eq!(together.3, 2);
}

#[test]
fn a_rank_without_data_changes_nothing_but_the_sum() {
    for rows_of_two_points in [false, true] {
        let together = same(ranks(3, |rank, c| {
            let net = Net::new(F64);
            let step = |loss: &dyn Fn() -> Tensor, c| -> Result<_> {
                if rows_of_two_points {
                    let mut opt = tch_blr::BayesianSam::default()
                        .ess(100.0)
                        .builder()
                        .noise(Philox { seed: 1 })
                        .parallel(c)
                        .build(&net.vs, 0.1)?;
                    Ok((opt.step(loss)?, held(&opt, &net)))
                } else {
                    let mut opt = ivon().parallel(c).build(&net.vs, 0.1)?;
                    Ok((opt.step(loss)?, held(&opt, &net)))
                }
            };
            let empty = || Tensor::zeros([0], F64);
            step(&|| if rank == 2 { empty() } else { part(&net, rank) }, c).unwrap()
        }));
        let net = Net::new(F64);
        let alone = if rows_of_two_points {
            let mut opt = tch_blr::BayesianSam::default().ess(100.0).builder().noise(Philox { seed: 1 });
            opt = opt.parallel(Alone);
            let mut opt = opt.build(&net.vs, 0.1).unwrap();
            (opt.step_chunks(2, |rank| part(&net, rank)).unwrap(), held(&opt, &net))
        } else {
            let mut opt = ivon().build(&net.vs, 0.1).unwrap();
            (opt.step_chunks(2, |rank| part(&net, rank)).unwrap(), held(&opt, &net))
        };
        assert_eq!(together.1, alone.1);
    }
    let nobody = same(ranks(2, |_, c| {
        let net = Net::new(F64);
        let mut opt = ivon().parallel(c).build(&net.vs, 0.1).unwrap();
        let before = held(&opt, &net);
        let refused = opt.step(|| Tensor::zeros([0], F64)).unwrap_err().to_string();
        assert_eq!(held(&opt, &net), before);
        assert!(opt.accumulate(|| Tensor::zeros([0], F64)).is_err());
        // Alone it is an error as ever, and here the next step is fine.
        opt.step(|| net.losses()).unwrap();
        refused
    }));
    assert!(nobody.contains("no example on any rank"), "{nobody}");
}

/// What goes wrong on one rank.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Wrong {
    Closure,
    Loss,
    Gradient,
    NoGraph,
    Panic,
    Shape,
}

impl Wrong {
    fn happen(self, net: &Net) -> std::result::Result<Tensor, Box<dyn std::error::Error + Send + Sync>> {
        match self {
            Wrong::Closure => Err("no data".into()),
            Wrong::Loss => Ok(net.losses() * f64::NAN),
            Wrong::Gradient => Ok((net.losses() - net.losses().detach()).abs().sqrt()),
            Wrong::NoGraph => Ok(net.losses().detach()),
            Wrong::Panic => panic!("out of luck"),
            Wrong::Shape => Ok(net.losses().reshape([3, 4])),
        }
    }

    fn says(self) -> &'static str {
        match self {
            Wrong::Closure => "rank 1: the closure failed: no data",
            Wrong::Loss => "the loss is NaN in step 1",
            Wrong::Gradient => "the gradient of parameter `first.weight` is not finite",
            Wrong::NoGraph => "rank 1: loss: it has no graph",
            Wrong::Panic => "rank 1: loss: a panic: out of luck",
            Wrong::Shape => "rank 1: loss: its shape is [3, 4]",
        }
    }
}

fn failure_of_one_is_of_all<R: Row>(make: impl Fn() -> tch_blr::Builder<R> + Sync) {
    let run = |wrong: Option<Wrong>| {
        same(ranks(3, |rank, c| {
            let net = Net::new(F64);
            let mut opt = make().noise(Philox { seed: 3 }).parallel(c).build(&net.vs, 0.01).unwrap();
            opt.step(|| net.losses()).unwrap();
            let before = held(&opt, &net);
            if let Some(wrong) = wrong {
                let closure = || if rank == 1 { wrong.happen(&net) } else { Ok(net.losses()) };
                for accumulated in [false, true] {
                    let found = catch_unwind(AssertUnwindSafe(|| {
                        if accumulated { opt.accumulate(closure) } else { opt.step(closure) }
                    }));
                    assert_eq!(found.is_err(), rank == 1 && wrong == Wrong::Panic);
                    if let Ok(found) = found {
                        let e = found.unwrap_err().to_string();
                        assert!(e.starts_with(wrong.says()), "rank {rank}, {wrong:?}: {e}");
                    }
                    assert_eq!(held(&opt, &net), before, "rank {rank}: {wrong:?}");
                }
            }
            opt.step(|| part(&net, rank)).unwrap();
            (opt.steps(), held(&opt, &net))
        }))
    };
    let without = run(None);
    for wrong in [Wrong::Closure, Wrong::Loss, Wrong::Gradient, Wrong::NoGraph, Wrong::Panic, Wrong::Shape] {
        assert_eq!(run(Some(wrong)), without, "{wrong:?}");
    }
}

#[test]
fn failures_of_one_are_of_all() {
    failure_of_one_is_of_all(|| Ivon::default().ess(100.0).builder());
    failure_of_one_is_of_all(|| Adam::default().builder());
    failure_of_one_is_of_all(|| tch_blr::BayesianSam::default().ess(100.0).builder());
    failure_of_one_is_of_all(|| Evon::default().ess(100.0).builder());
}

#[test]
fn errors_that_callers_tell_apart_keep_their_kind() {
    same(ranks(2, |rank, c| {
        let net = Net::new(F64);
        let mut opt = ivon().parallel(c).build(&net.vs, 0.1).unwrap();
        let of = |x: f64| move |net: &Net| if rank == 1 { net.losses() * x } else { net.losses() };
        let e = opt.step(|| of(f64::INFINITY)(&net)).unwrap_err();
        assert!(matches!(e, Error::NonFiniteLoss { value: f64::INFINITY, step: 0 }), "{e:?}");
        let e = opt.step(|| if rank == 1 { Wrong::Gradient.happen(&net) } else { Ok(net.losses()) }).unwrap_err();
        assert!(matches!(e, Error::NonFiniteGradient { what: "gradient", .. }), "{e:?}");
        let e = opt.step(|| if rank == 1 { Wrong::Closure.happen(&net) } else { Ok(net.losses()) }).unwrap_err();
        assert!(matches!(&e, Error::Rank { rank: 1, problem } if problem.contains("no data")), "{e:?}");
        e.to_string()
    }));
}

#[test]
fn what_is_not_finite_is_left_out_on_all() {
    let run = |wrong: bool| {
        same(ranks(3, |rank, c| {
            let net = Net::new(F64);
            // Without noise, of which what is left out takes its part.
            let mut opt = Adam::default().builder().skip_non_finite().parallel(c).build(&net.vs, 0.1).unwrap();
            let bad = |net: &Net| if rank == 1 { net.losses() * f64::NAN } else { net.losses() };
            if wrong {
                assert!(opt.step(|| bad(&net)).unwrap().is_nan());
                assert!(opt.accumulate(|| bad(&net)).unwrap().is_nan());
                assert_eq!((opt.skipped(), opt.steps()), (2, 0));
                assert!(opt.update().unwrap().is_nan());
            }
            opt.accumulate(|| part(&net, rank)).unwrap();
            if wrong {
                // The first micro-batch is left.
                assert!(!opt.step(|| bad(&net)).unwrap().is_nan());
            } else {
                opt.update().unwrap();
            }
            (opt.steps(), held(&opt, &net))
        }))
    };
    assert_eq!(run(true), run(false));
    // Any other error of any rank is an error: none is left behind at another call.
    for wrong in [Wrong::Closure, Wrong::Panic] {
        same(ranks(3, |rank, c| {
            let net = Net::new(F64);
            let mut opt = Adam::default().builder().skip_non_finite().parallel(c).build(&net.vs, 0.1).unwrap();
            let before = held(&opt, &net);
            let found = catch_unwind(AssertUnwindSafe(|| {
                opt.step(|| match rank {
                    0 => Ok(net.losses() * f64::NAN),
                    1 => wrong.happen(&net),
                    _ => Ok(net.losses()),
                })
            }));
            if let Ok(found) = found {
                assert!(found.unwrap_err().to_string().starts_with(wrong.says()));
            }
            assert_eq!((held(&opt, &net), opt.skipped()), (before, 0));
            opt.step(|| part(&net, rank)).unwrap();
            held(&opt, &net)
        }));
    }
    same(ranks(2, |rank, c| {
        let net = Net::new(F64);
        let mut opt = tch_blr::Sam::default().builder().skip_non_finite().parallel(c).build(&net.vs, 0.1).unwrap();
        let evaluation = opt.perturbed().unwrap();
        let loss = net.losses() * if rank == 1 { f64::NAN } else { 1.0 };
        let evaluation = evaluation.ascend(loss).unwrap();
        let loss = net.losses();
        assert!(evaluation.step(loss).unwrap().is_nan());
        opt.skipped()
    }));
}

#[test]
fn a_loop_with_guards_may_fail_on_one_rank() {
    let run = |wrong: bool| {
        same(ranks(2, |rank, c| {
            let net = Net::new(F64);
            let sam = tch_blr::Sam::default().builder();
            let mut opt = sam.parallel(c).build(&net.vs, 0.1).unwrap();
            let before = held(&opt, &net);
            let go = |opt: &mut Optimizer<_>| {
                let evaluation = opt.perturbed()?.ascend(part(&net, rank))?;
                let loss = part(&net, rank);
                evaluation.step(loss)
            };
            if wrong {
                // Dropped here, and waited for there.
                let e = if rank == 0 {
                    go(&mut opt).unwrap_err().to_string()
                } else {
                    drop(opt.perturbed().unwrap());
                    "rank 1: loss: an evaluation was dropped without one".to_owned()
                };
                assert_eq!(e, "rank 1: loss: an evaluation was dropped without one");
                let e = if rank == 0 {
                    go(&mut opt)
                } else {
                    opt.perturbed().unwrap().ascend(net.losses().detach()).map(|_| 0.0)
                };
                let e = e.unwrap_err().to_string();
                assert!(e.starts_with("rank 1: loss: it has no graph"), "{e}");
                let e = if rank == 0 { go(&mut opt) } else { opt.perturbed().unwrap().step(net.losses()) };
                let e = e.unwrap_err().to_string();
                assert!(e.starts_with("rank 1: loss: this row evaluates the loss at two points"), "{e}");
                // A guard of the user's own is in the way of this rank alone.
                let mine = tch_blr::Params::from(&net.vs);
                let q = tch_blr::DiagonalGaussian::new(
                    mine.names()
                        .zip(&net.weights)
                        .map(|(n, w)| (n.to_owned(), w.detach().copy(), w.detach().ones_like())),
                )
                .unwrap();
                let guard = (rank == 1).then(|| q.perturb(&net.vs, 0).unwrap());
                let e = go(&mut opt).unwrap_err().to_string();
                assert!(e.starts_with("rank 1: in use"), "{e}");
                drop(guard);
                assert_eq!(held(&opt, &net), before);
            }
            go(&mut opt).unwrap();
            held(&opt, &net)
        }))
    };
    assert_eq!(run(true), run(false));
}

/// All ranks have the same error, which says so.
#[track_caller]
fn refused_everywhere(all: Vec<String>, parts: &[&str]) {
    let e = same(all);
    for part in parts {
        assert!(e.contains(part), "{e:?} does not say {part:?}");
    }
}

#[test]
fn what_differs_is_named_when_built() {
    let build =
        |of: &(dyn Fn(usize, Threads) -> Result<f64> + Sync)| ranks(3, |rank, c| of(rank, c).unwrap_err().to_string());
    let plain = |rank: usize| Net::new(if rank == 1 { F64 } else { F32 });
    let e = build(&|rank, c| ivon().parallel(c).build(&plain(rank).vs, 0.1).map(|o| o.lr()));
    refused_everywhere(
        e,
        &["rank 1: parameter 0 is `first.weight`, Double [3, 5], and on rank 0 `first.weight`, Float"],
    );
    let e = build(&|rank, c| {
        let net = Net::new(F32);
        if rank == 2 {
            _ = net.vs.root().zeros("more", &[2]);
        }
        ivon().parallel(c).build(&net.vs, 0.1).map(|o| o.lr())
    });
    refused_everywhere(e, &["rank 2: parameter 4 is `more`, Float [2], and on rank 0 missing"]);
    let e = build(&|rank, c| {
        let net = Net::new(F32);
        Ivon::default().ess(100.0 + rank as f64).builder().parallel(c).build(&net.vs, 0.1).map(|o| o.lr())
    });
    refused_everywhere(e, &["rank 1: the row is ivon with", "101.0", "100.0"]);
    let e = build(&|rank, c| {
        let net = Net::new(F32);
        ivon().noise(Philox { seed: (rank / 2) as u64 }).parallel(c).build(&net.vs, 0.1).map(|o| o.lr())
    });
    refused_everywhere(e, &["rank 2: the noise is seeded by 1, and on rank 0 seeded by 0"]);
    let e = build(&|rank, c| {
        let net = Net::new(F32);
        let builder = Ivon::default().ess(100.0).builder();
        let builder = if rank == 1 { builder.noise(Philox { seed: 0 }) } else { builder };
        builder.parallel(c).build(&net.vs, 0.1).map(|o| o.lr())
    });
    refused_everywhere(e, &["rank 1: the seed is given, and on rank 0 not given"]);
    let e = build(&|rank, c| {
        let net = Net::new(F32);
        ivon().parallel(c).build(&net.vs, 0.1 + rank as f64).map(|o| o.lr())
    });
    refused_everywhere(e, &["rank 1: the learning rate of `first.weight` is 1.1, and on rank 0 0.1"]);
    let e = build(&|rank, c| {
        let net = Net::new(F32);
        let prior = rows::posterior(&net.vs);
        // The same names and shapes, and another number.
        _ = (rank == 2).then(|| prior.precision("first.bias").unwrap().fill_(7.0));
        Ivon::default()
            .ess(100.0)
            .prior(&prior)
            .noise(Philox { seed: 0 })
            .parallel(c)
            .build(&net.vs, 0.1)
            .map(|o| o.lr())
    });
    refused_everywhere(e, &["rank 2: the prior of `first.bias` is"]);
    // One that is refused by itself.
    let e = build(&|rank, c| {
        let net = Net::new(F32);
        ivon().parallel(c).build(&net.vs, if rank == 1 { -1.0 } else { 0.1 }).map(|o| o.lr())
    });
    refused_everywhere(e, &["rank 1: hyper-parameter `lr` = -1"]);
    let e = build(&|rank, c| {
        let net = Net::new(F32);
        let builder = if rank == 1 { ivon().skip_non_finite() } else { ivon() };
        builder.parallel(c).build(&net.vs, 0.1).map(|o| o.lr())
    });
    refused_everywhere(e, &["rank 1: what the builder sets is", "skip_non_finite true", "skip_non_finite false"]);
    let e = build(&|_, c| {
        let net = Net::new(F32);
        ivon().compare_ranks(0).parallel(c).build(&net.vs, 0.1).map(|o| o.lr())
    });
    refused_everywhere(e, &["compare_ranks"]);
}

#[test]
fn what_differs_later_is_named_and_nothing_has_changed() {
    type Work<'a> = &'a (dyn Fn(usize, &mut Optimizer<Ivon>, &Net) -> Result<f64> + Sync);
    fn step(opt: &mut Optimizer<Ivon>, net: &Net) -> Result<f64> {
        opt.step(|| net.losses())
    }
    let after = |work: Work, mend: Work, parts: &[&str]| {
        let all = ranks(3, |rank, c| {
            let net = Net::new(F32);
            let mut opt = ivon().parallel(c).build(&net.vs, 0.1).unwrap();
            opt.step(|| part(&net, rank)).unwrap();
            let before = held(&opt, &net);
            let e = work(rank, &mut opt, &net).unwrap_err().to_string();
            assert_eq!(held(&opt, &net), before);
            mend(rank, &mut opt, &net).unwrap();
            opt.step(|| part(&net, rank)).unwrap();
            e
        });
        refused_everywhere(all, parts);
    };
    after(
        &|rank, opt, net| {
            opt.set_lr(0.1 + (rank / 2) as f64)?;
            step(opt, net)
        },
        &|_, opt, _| opt.set_lr(0.1).map(|()| 0.0),
        &["rank 2: the learning rate of `first.weight` is 1.1, and on rank 0 0.1"],
    );
    after(
        &|rank, opt, net| {
            let change = rank == 1;
            opt.configure(move |c| if change { c.beta1(0.5) } else { c })?;
            step(opt, net)
        },
        &|_, opt, _| opt.configure(|c| c.beta1(0.9)).map(|()| 0.0),
        &["rank 1: the row is ivon with", "0.5"],
    );
    after(
        &|rank, opt, net| {
            _ = net.weights[1].set_requires_grad(rank != 1);
            step(opt, net)
        },
        &|_, _, net| {
            _ = net.weights[1].set_requires_grad(true);
            Ok(0.0)
        },
        &["rank 1: parameter `first.bias` is frozen, and on rank 0 trained"],
    );
    // Different calls.
    let file = tempfile::tempdir().unwrap();
    let file = file.path().join("c");
    after(
        &|rank, opt, net| if rank == 0 { opt.save(&file).map(|()| 0.0) } else { step(opt, net) },
        &|_, _, _| Ok(0.0),
        &["rank 1: the call is step or update, and on rank 0 save"],
    );
    after(
        &|rank, opt, net| if rank == 2 { opt.accumulate(|| net.losses()) } else { step(opt, net) },
        &|_, _, _| Ok(0.0),
        &["rank 2: the call is accumulate, and on rank 0 step or update"],
    );
    // A variable of one rank alone; the others get theirs afterwards.
    after(
        &|rank, opt, net| {
            _ = (rank == 1).then(|| net.vs.root().zeros("late", &[2]));
            step(opt, net)
        },
        &|rank, _, net| {
            _ = (rank != 1).then(|| net.vs.root().zeros("late", &[2]));
            Ok(0.0)
        },
        &["rank 1: the call is taking up a new variable, and on rank 0 step or update"],
    );
    after(
        &|rank, opt, net| opt.step(|| if rank == 0 { net.losses() } else { net.losses().mean(Kind::Float) }),
        &|_, _, _| Ok(0.0),
        &["a mean on some ranks and per example on others"],
    );
    after(&|_, opt, _| opt.update(), &|_, _, _| Ok(0.0), &["none was evaluated since the last update"]);
}

#[test]
fn what_holds_for_one_step_is_compared_in_it() {
    let all = ranks(2, |rank, c| {
        let net = Net::new(F32);
        let mut opt = Sgd::default().builder().parallel(c).build(&net.vs, 0.1).unwrap();
        let before = held(&opt, &net);
        let loss = net.losses().mean(Kind::Float);
        let e = opt.backward_step_clip_norm(&loss, 1.0 + rank as f64).unwrap_err().to_string();
        assert!(opt.backward_step_clip_norm(&loss, if rank == 0 { -1.0 } else { 1.0 }).is_err());
        assert!(opt.lr_find(if rank == 1 { 1.0..=0.1 } else { 0.1..=1.0 }, 3, || net.losses()).is_err());
        assert_eq!(held(&opt, &net), before);
        let loss = net.losses().mean(Kind::Float);
        opt.backward_step_clip_norm(&loss, 1.0).unwrap();
        e
    });
    refused_everywhere(all, &["rank 1: what the builder sets is", "Norm(2.0)", "Norm(1.0)"]);
    let all = ranks(2, |rank, c| {
        let net = Net::new(F32);
        let mut opt =
            Ivon::default().ess(100.0).builder().noise(Philox { seed: 1 }).parallel(c).build(&net.vs, 0.1).unwrap();
        opt.step(|| net.losses()).unwrap();
        let of = |share: f64| tch_blr::pruning::prune(&tch_blr::pruning::magnitude(&net.vs), share).unwrap();
        let (mine, ours) = (of(0.25 + 0.5 * rank as f64), of(0.5));
        let e = mine.step(&mut opt, || net.losses()).unwrap_err().to_string();
        ours.step(&mut opt, || part(&net, rank)).unwrap();
        e
    });
    refused_everywhere(all, &["rank 1: the fingerprint of the mask of `"]);
}

#[test]
fn weights_buffers_and_late_variables_begin_at_those_of_rank_0() {
    let all = same(ranks(3, |rank, c| {
        let net = Net::starting_at(F32, rank as f64);
        let buffer = net.vs.root().zeros_no_train("buffer", &[3]);
        _ = tch::no_grad(|| buffer.shallow_clone().fill_(rank as f64));
        // A seed of its own each.
        let mut opt = Ivon::default().ess(100.0).builder().parallel(c).compare_ranks(1).build(&net.vs, 0.1).unwrap();
        opt.step(|| part(&net, rank)).unwrap();
        let late = support::variable(&net.vs, "late", 0, &(wave_at(&[4], rank as f64, F32)));
        for _ in 0..2 {
            opt.step(|| part(&net, rank) + late.square().sum(Kind::Float)).unwrap();
        }
        (bits(&late), bits(&buffer), held(&opt, &net))
    }));
    assert_eq!(all.1, bits(&Tensor::zeros([3], F32)));
}

#[test]
fn a_checkpoint_goes_on_with_any_number_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("checkpoint");
    let run = |size: usize, load: Option<&Path>, save: Option<&Path>, steps: usize, place: Place| {
        same(ranks(size, |rank, c| {
            let net = Net::starting_at(place, rank as f64);
            let mut opt = Ivon::default().ess(100.0).builder().parallel(c).build(&net.vs, 0.1).unwrap();
            load.map_or(Ok(()), |path| opt.load(path)).unwrap();
            for _ in 0..steps {
                // The same losses whatever the number of ranks; the draws are as many as there are ranks.
                opt.step(|| net.losses()).unwrap();
            }
            if let Some(path) = save {
                opt.accumulate(|| part(&net, rank % 3)).unwrap();
                opt.save(path).unwrap();
                opt.update().unwrap();
            }
            (opt.steps(), held(&opt, &net), opt.posterior().unwrap().mean("first.bias").map(|t| bits(&t)))
        }))
    };
    // Six steps of three ranks, in one piece and in two.
    let at = |place| {
        run(3, None, Some(&path), 3, place);
        let accumulated = |size| {
            same(ranks(size, |_, c| {
                let net = Net::new(place);
                let mut opt = Ivon::default().ess(100.0).builder().parallel(c).build(&net.vs, 0.1).unwrap();
                opt.load(&path).unwrap();
                // What three ranks had accumulated, each its part of twelve examples.
                let loss = opt.update().unwrap();
                (opt.steps(), loss.to_bits(), held(&opt, &net))
            }))
        };
        let one = accumulated(1);
        for size in [2, 3, 4] {
            assert_eq!(accumulated(size), one, "{size} ranks");
        }
        assert_eq!(one.0, 4);
    };
    at(F64);
    at(F32);
    // Without anything accumulated it is exact.
    let whole = same(ranks(2, |rank, c| {
        let net = Net::new(F32);
        let mut opt = ivon().parallel(c).build(&net.vs, 0.1).unwrap();
        opt.step(|| part(&net, rank)).unwrap();
        opt.save(&path).unwrap();
        opt.step(|| part(&net, rank)).unwrap();
        held(&opt, &net)
    }));
    let resumed = same(ranks(2, |rank, c| {
        let net = Net::starting_at(F32, 2.0);
        let mut opt = Ivon::default().ess(7.0).builder().parallel(c).build(&net.vs, 0.3).unwrap();
        opt.load(&path).unwrap();
        opt.step(|| part(&net, rank)).unwrap();
        held(&opt, &net)
    }));
    assert_eq!(resumed, whole);
    // Pairs stay pairs: of a linear loss the gradient has no noise, but if one half of a pair is missing.
    let linear = |w: &Tensor| (w * w).sum(Kind::Double);
    let pairs = || Ivon::default().ess(4.0).expectation(Expectation::Antithetic { pairs: 1 }).hess_init(1.0);
    let w = Tensor::ones([1], F64).set_requires_grad(true);
    let of = |w: &Tensor| tch_blr::Params::named([("w", w.shallow_clone())]).unwrap();
    let mut alone = pairs().build(of(&w), 0.0).unwrap();
    alone.accumulate(|| linear(&w)).unwrap();
    alone.save(&path).unwrap();
    for size in [2, 3] {
        same(ranks(size, |_, c| {
            let w = Tensor::ones([1], F64).set_requires_grad(true);
            let mut opt = pairs().builder().parallel(c).build(of(&w), 0.0).unwrap();
            opt.load(&path).unwrap();
            opt.step(|| linear(&w)).unwrap();
            let gradient = opt.diagnostics().unwrap().gradient_norm;
            assert!((gradient - 2.0).abs() < 1e-12, "{size} ranks: {gradient}");
        }));
    }
}

#[test]
fn files_that_fail_or_differ_are_errors_of_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let all = ranks(2, |rank, c| {
        let net = Net::new(F32);
        let mut opt = ivon().parallel(c).build(&net.vs, 0.1).unwrap();
        opt.save(path("first")).unwrap();
        opt.step(|| net.losses()).unwrap();
        opt.save(path("second")).unwrap();
        let before = held(&opt, &net);
        let mut problems = vec![
            opt.save(path("missing").join("file")).unwrap_err().to_string(),
            opt.load(path("nothing")).unwrap_err().to_string(),
            opt.load(path(if rank == 0 { "first" } else { "second" })).unwrap_err().to_string(),
            opt.load(path(if rank == 0 { "first" } else { "nothing" })).unwrap_err().to_string(),
        ];
        assert_eq!(held(&opt, &net), before);
        opt.load(path("first")).unwrap();
        problems.push(opt.steps().to_string());
        problems
    });
    let all = same(all);
    assert!(all[0].starts_with("rank 0: ") && all[0].contains("missing"), "{}", all[0]);
    assert!(all[1].starts_with("rank 0: ") && all[1].contains("nothing"), "{}", all[1]);
    assert!(all[2].starts_with("rank 1: the fingerprint of the checkpoint is"), "{}", all[2]);
    assert!(all[3].starts_with("rank 1: ") && all[3].contains("nothing"), "{}", all[3]);
    assert_eq!(all[4], "0");
}

#[test]
fn ranks_that_drift_apart_are_found() {
    let all = ranks(3, |rank, c| {
        let net = Net::new(F32);
        let mut opt = ivon().parallel(c).compare_ranks(2).build(&net.vs, 0.1).unwrap();
        opt.step(|| part(&net, rank)).unwrap();
        opt.step(|| part(&net, rank)).unwrap();
        if rank == 2 {
            // One bit of one weight.
            let flipped = net.weights[2].detach().view_dtype(Kind::Int).bitwise_xor(1);
            tch::no_grad(|| net.weights[2].shallow_clone().copy_(&flipped.view_dtype(Kind::Float)));
        }
        opt.step(|| part(&net, rank)).unwrap();
        opt.step(|| part(&net, rank)).unwrap_err().to_string()
    });
    refused_everywhere(all, &["rank 2: after 4 updates, the fingerprint of mean of `second.weight` is"]);
}

#[test]
fn the_norm_is_limited_over_all_ranks() {
    // Gradients of opposite sign, whose mean is short: each alone is longer than the limit.
    let moved = same(ranks(2, |rank, c| {
        let w = Tensor::zeros([2], F64).set_requires_grad(true);
        let params = tch_blr::Params::named([("w", w.shallow_clone())]).unwrap();
        let direction = Tensor::from_slice(if rank == 0 { &[100.0, 1.0] } else { &[-100.0, 1.0] });
        let mut opt = Sgd::default().builder().clip_grad_norm(2.0).parallel(c).build(params, 1.0).unwrap();
        opt.step(|| (&w * &direction).sum(Kind::Double)).unwrap();
        assert_eq!(opt.diagnostics().unwrap().gradient_norm, 1.0);
        opt.step(|| (&w * &direction * 8.0).sum(Kind::Double)).unwrap();
        let seen = opt.diagnostics().unwrap();
        assert_eq!(seen.clipped, Some(0.5));
        (values(&w), seen.gradient_norm)
    }));
    assert_eq!(moved, (vec![0.0, -3.0], 8.0));
}

/// With a limit on the norm, statistics that are products with the gradient are shortened with it: after one step the
/// state is that of a loss that is as much smaller, and needs no limit.
fn limited_norm_scales_the_loss<R: Row>(states: &[&str], make: impl Fn() -> tch_blr::Builder<R> + Sync) {
    let step = |limit: f64, scale: f64| {
        same(ranks(2, |rank, c| {
            let net = Net::new(F64);
            let builder = make().noise(Philox { seed: 2 }).clip_grad_norm(limit).parallel(c);
            let mut opt = builder.build(&net.vs, 0.1).unwrap();
            opt.step(|| part(&net, rank) * scale).unwrap();
            let norm = opt.diagnostics().unwrap().gradient_norm;
            let state = |name: &&str| bits(&opt.state("first.weight", name).unwrap());
            (norm.to_bits(), states.iter().map(state).collect::<Vec<_>>())
        }))
    };
    let (norm, cut) = step(1e-2, 1.0);
    let scaled = step(1e9, 1e-2 / f64::from_bits(norm)).1;
    assert_ne!(cut, step(1e9, 1.0).1);
    for (a, b) in cut.iter().zip(&scaled) {
        let of = |bytes: &[u8]| Tensor::from_slice(bytes).view_dtype(Kind::Double);
        support::assert_close(&of(a), &of(b), 1e-9);
    }
}

#[test]
fn a_limited_norm_scales_products_of_the_gradient() {
    limited_norm_scales_the_loss(&["momentum", "hess"], || {
        Ivon::default().ess(1e3).hess_init(0.1).beta2(0.9).builder()
    });
    limited_norm_scales_the_loss(&["momentum", "square"], || tch_blr::Vadam::default().ess(1e3).builder());
    limited_norm_scales_the_loss(&["hess"], || {
        tch_blr::FullVon::default().ess(1e3).weight_decay(0.1).beta2(0.9).builder()
    });
    // Not the bases: a gradient of low rank leaves eigenvectors free.
    limited_norm_scales_the_loss(&["momentum", "left_moment", "right_moment"], || {
        Evon::default().ess(1e3).hess_init(0.1).beta2(0.9).builder()
    });
    limited_norm_scales_the_loss(&["momentum", "left_moment", "right_moment"], || tch_blr::Soap::default().builder());
}

/// Of ĝ and of Price's estimate, at one sample per rank: a quarter with four ranks. At m = 10 of the loss ½w² and with
/// e ~ N(0, 1), ĝ = m+e has variance 1 and e·ĝ has m²+2.
#[test]
fn more_ranks_mean_less_variance() {
    const STEPS: usize = 4000;
    let variance = |x: &[f64]| {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (x.len() - 1) as f64
    };
    for (size, expected) in [(1, [1.0, 102.0]), (4, [0.25, 25.5])] {
        // So near to 1 that the precision, which e is drawn with, stays what it is.
        let rest = 1e-6;
        let [gradients, hessians] = same(ranks(size, |_, c| {
            let w = Tensor::full([1], 10.0, F64).set_requires_grad(true);
            let params = tch_blr::Params::named([("w", w.shallow_clone())]).unwrap();
            let von = Von::vogn().hessian(tch_blr::Statistic::Price).ess(1.0).hess_init(1.0).weight_decay(0.0);
            let von = von.beta2(1.0 - rest).builder().noise(Philox { seed: 9 });
            let mut opt = von.parallel(c).build(params, 0.0).unwrap();
            let (mut gradients, mut hessians, mut before) = (Vec::new(), Vec::new(), 1.0);
            for _ in 0..STEPS {
                opt.step(|| w.square().sum(Kind::Double) * 0.5).unwrap();
                let h = values(&opt.state("w", "hess").unwrap())[0];
                gradients.push(opt.diagnostics().unwrap().gradient_norm);
                hessians.push((h - (1.0 - rest) * before) / rest);
                before = h;
            }
            [gradients, hessians]
        }));
        for (found, expected) in [gradients, hessians].iter().zip(expected) {
            let found = variance(found);
            // Five standard errors of the variance of 4,000 numbers that are nearly normal, √(2/4000) each.
            assert!((found / expected - 1.0).abs() < 0.112, "{size} ranks: {found}, expected {expected}");
        }
    }
}

#[test]
fn a_rank_that_leaves_ends_the_others() {
    let all = ranks(3, |rank, c| {
        let net = Net::new(F32);
        let mut opt = ivon().parallel(c).build(&net.vs, 0.1).unwrap();
        opt.step(|| part(&net, rank)).unwrap();
        if rank == 1 {
            return None;
        }
        let before = held(&opt, &net);
        let e = opt.step(|| part(&net, rank)).unwrap_err();
        assert!(matches!(e, Error::Collective(_)), "{e:?}");
        assert_eq!(held(&opt, &net), before);
        // And no call waits afterwards.
        assert!(opt.accumulate(|| part(&net, rank)).is_err() && opt.save("/nowhere/at/all").is_err());
        Some(e.to_string())
    });
    assert_eq!(all[0].as_deref(), Some("ranks: rank 1 has left while others go on"));
    assert_eq!(all[0], all[2]);
}

#[test]
fn a_row_that_is_chosen_at_run_time_has_ranks_too() {
    same(ranks(2, |rank, c| {
        let net = Net::starting_at(F32, rank as f64);
        let row: AnyRow = serde_json::from_str(r#"{"ivon": {"ess": 100.0}}"#).unwrap();
        let options = BuildOptions { collective: Some(Box::new(c)), ..BuildOptions::default() };
        let mut opt = row.build_with(options, &net.vs, 0.1).unwrap();
        opt.step(&mut || Ok(part(&net, rank))).unwrap();
        net.weights.iter().map(bits).collect::<Vec<_>>()
    }));
}

#[test]
fn a_range_test_leaves_no_trace_on_any_rank() {
    same(ranks(2, |rank, c| {
        let net = Net::new(F32);
        let mut opt = ivon().parallel(c).compare_ranks(1).build(&net.vs, 0.1).unwrap();
        let before = held(&opt, &net);
        let range = opt.lr_find(1e-3..=1.0, 5, || part(&net, rank)).unwrap();
        assert_eq!(held(&opt, &net), before);
        opt.step(|| part(&net, rank)).unwrap();
        range.tried.iter().map(|(_, loss)| loss.to_bits()).collect::<Vec<_>>()
    }));
}

#[test]
fn sums_of_the_users_own() {
    let all = same(ranks(3, |rank, c| {
        let net = Net::new(F32);
        let opt = ivon().parallel(c).build(&net.vs, 0.1).unwrap();
        let mut right = [rank as f64, 10.0];
        opt.collective().sum_f64(&mut right).unwrap();
        right.map(f64::to_bits)
    }));
    assert_eq!(all.map(f64::from_bits), [3.0, 30.0]);
    let net = Net::new(F32);
    let opt = ivon().build(&net.vs, 0.1).unwrap();
    assert_eq!((opt.collective().rank(), opt.collective().size()), (0, 1));
}
