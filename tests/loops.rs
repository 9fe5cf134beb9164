//! Training loops of other shapes than `opt.step(|| loss)`: what they bring out of a step, where their gradients come
//! from, what they leave out. That every row's steps are the same by each door is in tests/conformance.rs.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use support::rows::{self, Case};
use support::{F64, Net, Snapshot, assert_close, bits, close, params, refused, values, variable, weight};
use tch::nn::{BatchNormConfig, ModuleT, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Adam, AnyRow, DiagonalGaussian, Error, Ivon, Optimizer, Params, Philox, Sam, Schedule, Sgd};

/// The last of three samples, or the second of two points; and a step is what it is without an output.
#[test]
fn the_output_is_that_of_the_last_evaluation() {
    let calls = Cell::new(0);
    let counted = |net: &Net| {
        calls.set(calls.get() + 1);
        (net.losses(), calls.get())
    };
    let [net, other] = [0, 1].map(|_| Net::new(F64));
    let build =
        |net: &Net| Ivon::default().ess(100.0).samples(3).noise(Philox { seed: 1 }).build(&net.vs, 0.1).unwrap();
    let (mut opt, mut plain) = (build(&net), build(&other));
    for step in 1..3 {
        let (loss, call) = opt.step_with_output(|| counted(&net)).unwrap();
        assert_eq!((loss, call), (plain.step(|| other.losses()).unwrap(), 3 * step));
    }
    for (a, b) in net.weights.iter().zip(&other.weights) {
        assert_eq!(bits(a), bits(b));
    }
    calls.set(0);
    let (_, call) = Sam::default().build(&net.vs, 0.1).unwrap().step_with_output(|| counted(&net)).unwrap();
    assert_eq!(call, 2);
    // A row chosen at run time has the same method.
    calls.set(0);
    let mut opt = AnyRow::named("sgd").unwrap().build(&net.vs, 0.1).unwrap();
    let (loss, (call, size)) = opt
        .step_with_output(|| {
            let (losses, call) = counted(&net);
            let size = losses.size();
            Ok::<_, Error>((losses, (call, size)))
        })
        .unwrap();
    assert_eq!((call, size), (1, vec![12]));
    assert!(loss > 0.0);
}

/// The closure's own error comes through, once.
#[test]
fn a_closure_with_an_output_may_fail() {
    let net = Net::new(F64);
    let fails = || Err::<(Tensor, ()), _>(std::io::Error::other("no more data"));
    let mut opt = Sgd::default().build(&net.vs, 0.1).unwrap();
    let mut chosen = AnyRow::named("sgd").unwrap().build(&net.vs, 0.1).unwrap();
    for error in [opt.step_with_output(fails).unwrap_err(), chosen.step_with_output(fails).unwrap_err()] {
        let text = error.to_string();
        assert_eq!(text, "the closure failed: no more data");
        assert!(matches!(error, Error::Closure(e) if e.downcast_ref::<std::io::Error>().is_some()));
    }
    refused(opt.step_with_output(|| (net.losses().mean(Kind::Double).detach(), 1)), &["loss", "no graph"]);
    assert_eq!(opt.steps(), 0);
}

/// Two halves are one batch: as means that the driver averages, and as gradients that add up in `.grad`, of losses that
/// the loop has divided or has not.
#[test]
fn halves_make_a_batch_by_every_door() {
    type Step = fn(&mut Optimizer<Adam>, &Net) -> f64;
    fn half(net: &Net, i: i64) -> Tensor {
        net.losses_of(6 * i, 6).mean(Kind::Double)
    }
    fn sum(net: &Net, divided_by: f64) -> f64 {
        for i in [0, 1] {
            (half(net, i) / divided_by).backward();
        }
        net.loss()
    }
    let doors: [Step; 3] = [
        |opt, net| {
            opt.accumulate(|| half(net, 0)).unwrap();
            opt.step(|| half(net, 1)).unwrap()
        },
        |opt, net| {
            let loss = sum(net, 1.0);
            opt.step_from_grad(loss, 2.0).unwrap()
        },
        |opt, net| {
            let loss = sum(net, 2.0);
            opt.step_from_grad(loss, 1.0).unwrap()
        },
    ];
    for door in doors {
        let [net, whole] = [0, 1].map(|_| Net::new(F64));
        let build = |net: &Net| Adam::default().build(&net.vs, 0.01).unwrap();
        let (mut opt, mut expected) = (build(&net), build(&whole));
        for _ in 0..3 {
            let loss = expected.step(|| (half(&whole, 0) + half(&whole, 1)) / 2.0).unwrap();
            close(door(&mut opt, &net), loss, 1e-14);
            for (a, b) in net.weights.iter().zip(&whole.weights) {
                assert_close(a, b, 1e-13);
            }
        }
    }
}

/// No `.grad` is not a `.grad` of zero, which momentum and weight decay go with.
#[test]
fn a_parameter_without_grad_is_not_used() {
    let (a, b) = (support::weight(&[1.0]), support::weight(&[1.0]));
    let params = Params::named([("a", a.shallow_clone()), ("b", b.shallow_clone())]).unwrap();
    let mut opt = Sgd::default().weight_decay(0.5).build(params, 1.0).unwrap();
    (&a * 0.25).sum(Kind::Double).backward();
    opt.step_from_grad(0.25, 1.0).unwrap();
    assert_eq!((values(&a), values(&b)), (vec![0.25], vec![1.0]));
    (&b * 0.25).sum(Kind::Double).backward();
    opt.step_from_grad(0.25, 1.0).unwrap();
    assert_eq!((values(&a), values(&b)), (vec![0.125], vec![0.25]));
    // What was left in .grad is not used where it is not wanted.
    (&b * 100.0).sum(Kind::Double).backward();
    opt.zero_grad();
    (&b * 0.25).sum(Kind::Double).backward();
    opt.step_from_grad(0.25, 1.0).unwrap();
    assert_eq!(values(&b), [-0.125]);
}

/// f16 ends at 2⁻²⁴; gradients below that arrive by way of a scaled loss.
#[test]
fn a_scaled_loss_brings_small_gradients_through_half_precision() {
    let step = |scale: f64| {
        let vs = support::store((Kind::Half, Device::Cpu));
        let w = variable(&vs, "w", 0, &Tensor::from_slice(&[1.0, 2.0]));
        let mut opt = Adam::default().beta1(0.5).build(&vs, 0.0).unwrap();
        let loss = (w.to_kind(Kind::Float) * 2f64.powi(-30)).sum(Kind::Float);
        (&loss * scale).backward();
        opt.step_from_grad(loss.double_value(&[]), scale).unwrap();
        values(&opt.state("w", "momentum").unwrap())
    };
    assert_eq!(step(1.0), [0.0, 0.0]);
    assert_eq!(step(2f64.powi(20)), [2f64.powi(-31); 2]);
}

/// A deterministic row ends where it would have without the bad batches, the schedule included.
#[test]
fn steps_that_are_left_out_are_none() {
    let [net, other] = [0, 1].map(|_| Net::new(F64));
    let schedule = Schedule::Cosine { warmup: 2, total: 8, end: 0.0 };
    let builder = || Adam::default().schedule(schedule);
    let mut opt = builder().skip_non_finite().build(&net.vs, 0.01).unwrap();
    let mut clean = builder().build(&other.vs, 0.01).unwrap();
    for batch in 0..12 {
        let bad = batch % 3 == 1;
        let factor = if bad { f64::INFINITY } else { 1.0 };
        let loss = opt.step(|| net.losses() * factor).unwrap();
        if bad {
            assert!(loss.is_nan());
        } else {
            assert_eq!(loss, clean.step(|| other.losses()).unwrap());
        }
    }
    assert_eq!((opt.steps(), opt.skipped(), opt.lr()), (8, 4, clean.lr()));
    for (a, b) in net.weights.iter().zip(&other.weights) {
        assert_eq!(bits(a), bits(b));
    }
}

/// The next attempt is elsewhere, or a bad sample of a full batch would come again for ever. And a checkpoint between
/// the two changes nothing.
#[test]
fn a_step_that_is_left_out_has_spent_its_noise() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    let [net, other] = [0, 1].map(|_| Net::new(F64));
    let build = |net: &Net| {
        let ivon = Ivon::default().ess(100.0).samples(2).noise(Philox { seed: 1 }).skip_non_finite();
        ivon.build(&net.vs, 0.1).unwrap()
    };
    let (mut opt, mut resumed) = (build(&net), build(&other));
    let seen = RefCell::new(Vec::new());
    let look = |factor: f64| {
        seen.borrow_mut().push(values(&net.weights[0]));
        net.losses() * factor
    };
    opt.step(|| look(f64::NAN)).unwrap();
    opt.save(&path).unwrap();
    resumed.load(&path).unwrap();
    let losses = [opt.step(|| look(1.0)).unwrap(), resumed.step(|| other.losses()).unwrap()];
    assert_eq!(losses[0], losses[1]);
    let seen = seen.into_inner();
    // The first sample was enough to leave both out.
    assert_eq!(seen.len(), 3);
    assert!(seen[0] != seen[1] && seen[0] != seen[2] && seen[1] != seen[2]);
}

#[test]
fn too_many_in_a_row_are_an_error() {
    let net = Net::new(F64);
    let mut opt = Adam::default().builder().skip_non_finite().build(&net.vs, 0.01).unwrap();
    for _ in 0..2 {
        for _ in 0..100 {
            assert!(opt.step(|| net.losses() * f64::NAN).unwrap().is_nan());
        }
        let before = Snapshot::of(&opt, &net.vs);
        for _ in 0..2 {
            let error = opt.step(|| net.losses() * f64::NAN).unwrap_err();
            assert!(matches!(error, Error::NonFiniteLoss { .. }), "{error:?}");
        }
        assert_eq!(Snapshot::of(&opt, &net.vs), before);
        // One that is finite, and they may come again.
        opt.step(|| net.losses()).unwrap();
    }
    assert_eq!(opt.skipped(), 200);
    // The closure's own error is none of them, and neither is a loss without a graph.
    opt.step(|| Err::<Tensor, _>("no more data")).unwrap_err();
    opt.step(|| net.losses().detach() * f64::NAN).unwrap_err();
}

/// Of a pair of points, the first or the second; by the guard as by the closure.
#[test]
fn a_pair_of_points_is_left_out_once() {
    let net = Net::new(F64);
    let mut opt = Sam::default().builder().skip_non_finite().build(&net.vs, 0.1).unwrap();
    let before: Vec<_> = net.weights.iter().map(bits).collect();
    for (first, second) in [(f64::NAN, 1.0), (1.0, f64::NAN), (f64::NAN, f64::NAN)] {
        let evaluation = opt.perturbed().unwrap();
        let losses = net.losses() * first;
        let evaluation = evaluation.ascend(losses).unwrap();
        let losses = net.losses() * second;
        assert!(evaluation.step(losses).unwrap().is_nan());
    }
    assert_eq!((opt.skipped(), opt.steps()), (3, 0));
    assert_eq!(net.weights.iter().map(bits).collect::<Vec<_>>(), before);
    // An error at the second point is still one.
    let evaluation = opt.perturbed().unwrap();
    let losses = net.losses() * f64::NAN;
    let evaluation = evaluation.ascend(losses).unwrap();
    evaluation.step(Err::<Tensor, _>("no more data")).unwrap_err();
    opt.step(|| net.losses()).unwrap();
}

/// A loss scale that starts far too high comes down by itself, and costs nothing but its attempts.
#[test]
fn a_dynamic_loss_scale_finds_its_size() {
    let vs = support::store((Kind::Half, Device::Cpu));
    let w = variable(&vs, "w", 0, &Tensor::from_slice(&[1.0, 2.0]));
    let mut opt = Sgd::default().builder().skip_non_finite().build(&vs, 0.5).unwrap();
    let mut scale = 2f64.powi(24);
    for _ in 0..20 {
        let loss = (w.to_kind(Kind::Float) * 0.25).sum(Kind::Float);
        (&loss * scale).backward();
        if opt.step_from_grad(loss.double_value(&[]), scale).unwrap().is_nan() {
            scale /= 2.0;
        }
    }
    // f16 ends below 2¹⁶, and the gradient is ¼.
    assert_eq!((scale, opt.skipped(), opt.steps()), (2f64.powi(17), 7, 13));
    assert_eq!(values(&w), [1.0 - 13.0 * 0.125, 2.0 - 13.0 * 0.125]);
}

/// tch's autocast is that of CUDA: on the CPU the closure computes as without it.
#[test]
fn autocast_leaves_the_cpu_alone() {
    let [net, other] = [0, 1].map(|_| Net::new(support::F32));
    let build = |net: &Net| Ivon::default().ess(100.0).noise(Philox { seed: 1 }).build(&net.vs, 0.1).unwrap();
    let (mut opt, mut plain) = (build(&net), build(&other));
    for _ in 0..2 {
        let loss = opt.step(|| tch::autocast(true, || net.losses())).unwrap();
        assert_eq!(loss, plain.step(|| other.losses()).unwrap());
    }
    for (a, b) in net.weights.iter().zip(&other.weights) {
        assert_eq!((bits(a), a.kind()), (bits(b), Kind::Float));
    }
}

/// One optimizer over two stores, and two over one, are the same as each on its own.
#[test]
fn stores_and_optimizers_need_not_go_together() {
    let net = |vs: &VarStore, name: &str| variable(vs, name, 0, &Tensor::from_slice(&[1.0, -2.0]));
    let loss = |w: &Tensor| (w - 0.5).square().mean(Kind::Double);
    let path = |opt: &mut dyn FnMut(), w: [&Tensor; 2]| {
        (0..3).for_each(|_| opt());
        w.map(values)
    };
    let alone = {
        let vs = [0, 1].map(|_| support::store(F64));
        let [a, b] = [0, 1].map(|i| net(&vs[i], "w"));
        let mut opts = [0, 1].map(|i| Adam::default().build(&vs[i], 0.1).unwrap());
        path(&mut || [&a, &b].iter().zip(&mut opts).for_each(|(w, opt)| _ = opt.step(|| loss(w)).unwrap()), [&a, &b])
    };
    let together = {
        let vs = [0, 1].map(|_| support::store(F64));
        let [a, b] = [0, 1].map(|i| net(&vs[i], "w"));
        let params = Params::of_stores([("a", &vs[0]), ("b", &vs[1])]).unwrap();
        let mut opt = Adam::default().build(params, 0.1).unwrap();
        let paths = path(&mut || _ = opt.step(|| loss(&a) + loss(&b)).unwrap(), [&a, &b]);
        assert_eq!(opt.params().names().collect::<Vec<_>>(), ["a.w", "b.w"]);
        paths
    };
    let apart = {
        let vs = support::store(F64);
        let [a, b] = ["a.w", "b.w"].map(|name| net(&vs, name));
        let of = |folder: &'static str| Params::from(&vs).only(move |name| name.starts_with(folder));
        let mut opts = ["a.", "b."].map(|folder| Adam::default().build(of(folder), 0.1).unwrap());
        path(&mut || opts.iter_mut().for_each(|opt| _ = opt.step(|| loss(&a) + loss(&b)).unwrap()), [&a, &b])
    };
    assert_eq!(together, alone);
    assert_eq!(apart, alone);
}

/// Batches one after the other are the whole, each sample goes through all of them, and the closure's order is theirs.
#[test]
fn batches_are_predicted_as_one() {
    let vs = support::store(F64);
    let w = variable(&vs, "w", 0, &support::wave(&[4, 3], 0.3));
    let x = support::wave(&[10, 4], 0.1);
    let q = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap().posterior().unwrap();
    let probabilities = |x: &Tensor| x.matmul(&w).softmax(-1, Kind::Double);
    let whole = q.predict(&vs, 5, || probabilities(&x)).unwrap();
    let (passes, seen) = (Cell::new(0), RefCell::new(Vec::new()));
    let batches = || {
        passes.set(passes.get() + 1);
        x.split(4, 0)
    };
    let forward = |batch: Tensor| {
        seen.borrow_mut().push((passes.get(), batch.size()[0]));
        probabilities(&batch)
    };
    let ours = q.predict_batches(&vs, 5, batches, forward).unwrap();
    for (a, b) in [
        (&ours.mean, &whole.mean),
        (&ours.entropy, &whole.entropy),
        (&ours.mutual_information, &whole.mutual_information),
    ] {
        assert_close(a, b, 1e-13);
    }
    assert_eq!(seen.into_inner(), (1..=5).flat_map(|k| [4, 4, 2].map(|n| (k, n))).collect::<Vec<_>>());
    // Any posterior, with any iterator.
    let q: Box<dyn tch_blr::Posterior> = Box::new(q);
    let three = q.predict_batches(&vs, 2, || (0..3).map(|i| x.narrow(0, i, 1)), |x| Ok::<_, Error>(probabilities(&x)));
    assert_eq!(three.unwrap().mean.size(), [3, 3]);
    refused(q.predict_batches(&vs, 2, || 0..0, |_: i32| probabilities(&x)), &["posterior", "no batches"]);
    refused(q.predict_batches(&vs, 2, || 0..3, |_| Err::<Tensor, _>("no more data")), &["no more data"]);
}

/// The running statistics are put back, and named; in evaluation mode they may be there.
#[test]
fn predictions_in_training_mode_are_refused() {
    let vs = VarStore::new(Device::Cpu);
    let norm = tch::nn::batch_norm1d(vs.root() / "norm", 3, BatchNormConfig::default());
    let q = Ivon::default().ess(10.0).build(&vs, 0.1).unwrap().posterior().unwrap();
    let x = support::wave(&[6, 3], 0.1).to_kind(Kind::Float) * 3.0;
    let forward = |train: bool| norm.forward_t(&x, train).softmax(-1, Kind::Float);
    let statistics = || vs.variables().into_iter().filter(|(name, _)| name.contains("running"));
    let look = || statistics().map(|(name, t)| (name, bits(&t))).collect::<BTreeMap<_, _>>();
    let before = look();
    assert_eq!(before.len(), 2);
    refused(q.predict(&vs, 3, || forward(true)), &["`norm.running_", "train = false"]);
    refused(q.predict_samples(&vs, 3, || forward(true)), &["`norm.running_", "train = false"]);
    assert_eq!(look(), before);
    q.predict(&vs, 3, || forward(false)).unwrap();
    assert_eq!(look(), before);
}

/// tch writes zip archives under every name but those that end in .safetensors.
#[test]
fn a_file_of_tchs_own_format_is_named_as_such() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weights.ot");
    let mut net = Net::new(F64);
    net.vs.save(&path).unwrap();
    let parts = ["weights.ot", ".ot", ".safetensors", "VarStore::save"];
    refused(DiagonalGaussian::load(&path), &parts);
    refused(Sgd::default().build(&net.vs, 0.1).unwrap().load(&path), &parts);
    let error = tch_blr::blr_merge::WeightFile::open(&path).unwrap_err().to_string();
    assert!(parts.iter().all(|part| error.contains(part)), "{error}");
    // … and reads them.
    net.vs.load(&path).unwrap();
}

/// L = ½ 4 (w ± 1)², where SGD is unstable from a learning rate of ½ on.
#[test]
fn a_range_of_learning_rates() {
    let w = weight(&[10.0]);
    let mut opt = Sgd::default().build(params(&w), 0.3).unwrap();
    let sign = Cell::new(1.0);
    let loss = || {
        sign.set(-sign.get());
        (&w + sign.get()).square().sum(Kind::Double) * 2.0
    };
    let range = opt.lr_find(1e-3..=10.0, 41, loss).unwrap();
    assert_eq!(range.tried.len(), 41);
    let (lowest, rates) = (range.lowest(), range.tried.iter().map(|(lr, _)| *lr).collect::<Vec<_>>());
    assert!((0.05..0.8).contains(&lowest) && rates.contains(&lowest), "{range:?}");
    assert_eq!(range.suggestion(), 0.2 * lowest);
    assert!(range.tried[40].1 > 100.0 * range.tried[0].1, "{range:?}");
    assert_eq!((values(&w), opt.lr(), opt.steps()), (vec![10.0], 0.3, 0));
    // It ends where the loss does.
    let range = opt.lr_find(1.0..=1e300, 30, loss).unwrap();
    assert!((2..30).contains(&range.tried.len()), "{range:?}");
    assert_eq!(values(&w), [10.0]);

    for (range, steps, name) in
        [(0.0..=1.0, 9, "start"), (1.0..=1.0, 9, "end"), (1.0..=f64::NAN, 9, "end"), (0.1..=1.0, 1, "steps")]
    {
        refused(opt.lr_find(range, steps, loss), &["lr", name]);
    }
    refused(opt.lr_find(0.1..=1.0, 9, || loss() * f64::NAN), &["NaN"]);
    refused(opt.lr_find(0.1..=1.0, 9, || Err::<Tensor, _>(std::io::Error::other("no data"))), &["no data"]);
    assert_eq!((values(&w), opt.lr(), opt.steps()), (vec![10.0], 0.3, 0));
}

/// The statistics of batch normalization are put back; variables that come late are an error.
#[test]
fn a_range_of_learning_rates_leaves_the_model_alone() {
    let _alone = support::seeded(0);
    let vs = VarStore::new(Device::Cpu);
    let norm = tch::nn::batch_norm1d(vs.root() / "norm", 3, BatchNormConfig::default());
    let x = Tensor::randn([8, 3], (Kind::Float, Device::Cpu));
    let mut opt = Adam::default().build(&vs, 0.1).unwrap();
    let all =
        || -> BTreeMap<String, Vec<u8>> { vs.variables().iter().map(|(name, t)| (name.clone(), bits(t))).collect() };
    let before = all();
    opt.lr_find(0.1..=1.0, 5, || norm.forward_t(&x, true).square().mean(Kind::Float)).unwrap();
    assert_eq!(all(), before);
    let late = || {
        let late = vs.root().var("late", &[1], tch::nn::Init::Const(2.0)).square().sum(Kind::Float);
        late + norm.forward_t(&x, false).square().mean(Kind::Float)
    };
    refused(opt.lr_find(0.1..=1.0, 5, late), &["creates variables"]);
    let mut after = all();
    assert!(after.remove("late").is_some());
    assert_eq!(after, before);
}

/// SGD at three times the learning rate that is stable: ten losses are not yet an average, and the eleventh says so.
#[test]
fn a_loss_that_rises_is_an_error_on_request() {
    let w = weight(&[1.0]);
    let build = |margin: Option<f64>| {
        let builder = Sgd::default().builder();
        margin.map_or(builder, |margin| Sgd::default().builder().check_divergence(margin)).build(params(&w), 1.5)
    };
    let loss = || w.square().sum(Kind::Double) * 2.0;
    let mut opt = build(Some(100.0)).unwrap();
    let steps = (0..50).take_while(|_| opt.step(loss).is_ok()).count();
    assert!((11..14).contains(&steps), "{steps}");
    let before = values(&w);
    let Err(Error::Diverged { average, lowest, margin, step }) = opt.step(loss) else { panic!("it goes on") };
    assert!(average > lowest + 100.0 && margin == 100.0 && step == steps as u64);
    assert_eq!((values(&w), opt.steps()), (before, step));
    // What was accumulated stays, and a smaller learning rate is a new beginning.
    opt.accumulate(loss).unwrap();
    assert!(matches!(opt.update(), Err(Error::Diverged { .. })));
    opt.set_lr(0.1).unwrap();
    opt.update().unwrap();
    for _ in 0..200 {
        opt.step(loss).unwrap();
    }
    assert!(values(&w)[0].abs() < 1e-9);
    // So is a checkpoint.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run.safetensors");
    opt.save(&path).unwrap();
    opt.set_lr(1.5).unwrap();
    while opt.step(loss).is_ok() {}
    opt.load(&path).unwrap();
    opt.step(loss).unwrap();
    let mut opt = build(None).unwrap();
    _ = tch::no_grad(|| w.shallow_clone().fill_(1.0));
    (0..50).for_each(|_| _ = opt.step(loss).unwrap());
    for margin in [0.0, -1.0, f64::NAN] {
        refused(build(Some(margin)), &["`check_divergence`"]);
    }
}

/// Where a rate is too much for the precision, or a closure panics: the former is the end of the test, and after both
/// everything is as it was.
#[test]
fn a_range_of_learning_rates_survives_what_happens_in_it() {
    let w = weight(&[1.0]);
    let mut opt = Sgd::default().builder().skip_non_finite().build(params(&w), 0.3).unwrap();
    let calls = Cell::new(0);
    let failing = |at: i32| {
        calls.set(0);
        let (calls, w) = (&calls, &w);
        move || {
            calls.set(calls.get() + 1);
            w.square().sum(Kind::Double) * if calls.get() >= at { f64::NAN } else { 1.0 }
        }
    };
    refused(opt.lr_find(0.1..=1.0, 5, failing(1)), &["NaN"]);
    assert_eq!(opt.lr_find(0.1..=1.0, 5, failing(4)).unwrap().tried.len(), 3);
    let panicking = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        calls.set(0);
        _ = opt.lr_find(0.1..=1.0, 5, || {
            calls.set(calls.get() + 1);
            assert!(calls.get() < 4, "on purpose");
            w.square().sum(Kind::Double)
        });
    }));
    assert!(panicking.is_err());
    assert_eq!((values(&w), opt.lr(), opt.steps(), opt.skipped()), (vec![1.0], 0.3, 0, 0));
}

/// Of another store's variables, or with a detach in the middle: an error of every door that changes nothing. One head of
/// several without a gradient is none.
#[test]
fn a_loss_of_another_model() {
    fn check<R: Row>(row: &Case<R>) {
        let (net, other) = (row.net(F64), row.net(F64));
        let mut opt = row.builder(&net.vs).build(&net.vs, row.lr).unwrap();
        let words = ["depends on none of the parameters"];
        refused(opt.step(|| other.losses()), &words);
        refused(opt.accumulate(|| other.losses()), &words);
        let cut = || other.losses() + net.losses().detach();
        refused(opt.step(cut), &words);
        opt.step(|| net.losses()).unwrap();
        assert_eq!(opt.steps(), 1, "{}", R::NAME);
    }
    check(&rows::adam());
    check(&rows::ivon());
    check(&rows::vogn());
    check(&rows::bsam());
    check(&rows::evon());
    check(&rows::noisy_kfac());
    check(&rows::newton());
    check(&rows::full_von());
    let (net, other) = (Net::new(F64), Net::new(F64));
    let mut opt = Sgd::default().build(&net.vs, 0.1).unwrap();
    refused(opt.step_from_grad(1.0, 1.0), &["no parameter has a gradient"]);
    let x = Tensor::ones([3, 4], (Kind::Double, Device::Cpu));
    let w = variable(&other.vs, "w", 0, &Tensor::ones([4, 2], (Kind::Double, Device::Cpu)));
    let fisher = tch_blr::fisher::Fisher::exact().diagonal(&net.vs, [&x], |x| x.matmul(&w));
    refused(fisher, &["depend on none of the parameters"]);
}

/// A variable that the closure unfreezes was not moved, so that its displacement is 0: not its mean, and not that of an
/// earlier step.
#[test]
fn a_variable_unfrozen_in_the_closure() {
    let (w, u) = (weight(&[7.0]), weight(&[1.0]));
    let params = || Params::named([("u", u.shallow_clone()), ("w", w.shallow_clone())]).unwrap();
    let mut opt = Ivon::default().ess(10.0).beta2(0.5).noise(Philox { seed: 1 }).build(params(), 1e-3).unwrap();
    let loss = || (w.square() + u.square()).sum(Kind::Double);
    for trained_before in [false, true] {
        if trained_before {
            opt.step(loss).unwrap();
        }
        _ = w.set_requires_grad(false);
        let h = values(&opt.state("w", "hess").unwrap())[0];
        opt.step(|| {
            _ = w.set_requires_grad(true);
            loss()
        })
        .unwrap();
        // f = 0: h - ½h + ½·¼·h²/(h+δ)
        let expected = h - 0.5 * h + 0.125 * h * h / (h + 1e-4);
        close(values(&opt.state("w", "hess").unwrap())[0], expected, 1e-12);
    }
}
