//! Numbers and memory that nobody means to hand over: what comes of them is right, or an error that has changed
//! nothing.

use support::{F32, Snapshot, bits, refused, wave_at};
use tch::nn::{Init, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{Mas, Quadratic, SynapticIntelligence};
use tch_blr::fisher::Fisher;
use tch_blr::rule::Rule;
use tch_blr::{
    Adam, BayesianSam, Derivatives, DiagonalGaussian, Ema, Error, Evon, Ivon, Labels, Lawa, Params, Philox, Prior, Sgd,
    Statistic, Swag, Von, nn, sensitivity,
};

fn parameters(tensors: [(&str, &Tensor); 2]) -> Params {
    Params::named(tensors.map(|(name, t)| (name, t.shallow_clone()))).unwrap()
}

fn given(gradients: impl IntoIterator<Item = Tensor>) -> Derivatives {
    let gradients = gradients.into_iter().map(Some).collect();
    Derivatives { loss: 1.0, examples: None, gradients, squares: Vec::new() }
}

/// The gradient of ⟨a, b⟩ by a is b: handed over as b itself, it is the one of before the update; with few weights, and
/// with enough for several threads.
#[test]
fn gradients_in_the_memory_of_the_parameters() {
    for n in [4, 300_000] {
        for transposed in [false, true] {
            let run = |copied: bool| {
                let matrix = |x: f64| {
                    let t = Tensor::full([2, n / 2], x, F32);
                    (if transposed { t.tr().contiguous().tr() } else { t }).set_requires_grad(true)
                };
                let (a, b) = (matrix(1.0), matrix(10.0));
                let own = |t: &Tensor| if copied { t.detach().copy() } else { t.detach() };
                let mut opt = Sgd::default().momentum(0.5).build(parameters([("a", &a), ("b", &b)]), 0.1).unwrap();
                opt.perturbed().unwrap().step(given([own(&b), own(&a)])).unwrap();
                let after_one = (a.double_value(&[0, 0]), b.double_value(&[0, 0]));
                // Views of the other one, and of itself.
                opt.perturbed().unwrap().step(given([own(&b.expand_as(&a)), own(&b)])).unwrap();
                (after_one, bits(&a), bits(&b))
            };
            let (after_one, a, b) = run(false);
            assert!((after_one.0 - 0.0).abs() < 1e-6 && (after_one.1 - 9.9).abs() < 1e-6, "{after_one:?}");
            assert!((after_one, a, b) == run(true), "{n} weights, transposed: {transposed}");
        }
    }
}

/// A view that stands for the negative of its memory.
#[test]
fn lazily_negated_gradients() {
    let run = |lazy: bool| {
        let w = wave_at(&[5], 0.0, F32).set_requires_grad(true);
        let negative = if lazy { wave_at(&[5], 1.0, F32).internal_neg_view() } else { -wave_at(&[5], 1.0, F32) };
        assert_eq!(negative.is_neg(), lazy);
        let params = Params::named([("w", w.shallow_clone())]).unwrap();
        let mut opt = Adam::default().build(params, 0.1).unwrap();
        for _ in 0..2 {
            opt.perturbed().unwrap().step(given([negative.shallow_clone()])).unwrap();
        }
        bits(&w)
    };
    assert_eq!(run(true), run(false));
}

/// Settings that every check admits one by one, and whose products may leave the range of f32 in the first step: the
/// weights stay finite, or nothing has changed, so that the optimizer goes on once they are set right.
#[test]
fn settings_beyond_the_range_of_the_numbers() {
    fn check<R: Rule>(what: &str, row: R, right: fn(R) -> R) {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().var("w", &[2], Init::Const(0.5));
        let mut opt = row.builder().noise(Philox { seed: 4 }).build(&vs, 1e-3).unwrap();
        let before = Snapshot::of(&opt, &vs);
        let step = |opt: &mut tch_blr::Optimizer<R>| opt.step(|| (&w * 0.5).square().sum(Kind::Float));
        match step(&mut opt) {
            Ok(_) => {}
            Err(Error::NonFiniteGradient { .. } | Error::NonFiniteLoss { .. }) => {
                assert_eq!(Snapshot::of(&opt, &vs), before, "{what}");
                opt.configure(right).unwrap();
                step(&mut opt).unwrap();
            }
            Err(e) => panic!("{what}: {e}"),
        }
        assert!(w.isfinite().all().int64_value(&[]) == 1, "{what}");
    }
    let ivon = || Ivon::default().ess(1e3);
    check("ess", ivon().ess(1e300), |c| c.ess(1e3));
    check("weight decay", ivon().weight_decay(1e38), |c| c.weight_decay(1e-4));
    check("sgd's weight decay", Sgd::default().weight_decay(1e38), |c| c.weight_decay(0.0));
    check("bsam's ess", BayesianSam::default().ess(1e300), |c| c.ess(1e3));
}

/// A micro-batch of a huge gradient is not forgotten when the next one is small; nor is the first of two points, of
/// which Bayesian SAM takes the precision.
#[test]
fn huge_gradients_among_others() {
    let one = |size: f64| {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().var("w", &[2], Init::Const(0.5));
        let c = Tensor::from_slice(&[size as f32, -size as f32]);
        (vs, w, c)
    };
    for size in [1e20, 1e30, 3e38] {
        let (vs, w, c) = one(size);
        let mut opt = Ivon::default().ess(6e4).builder().noise(Philox { seed: 4 }).build(&vs, 1e-3).unwrap();
        opt.step(|| w.square().sum(Kind::Float)).unwrap();
        let mut calls = 0;
        for _ in 0..2 {
            _ = opt.accumulate(|| (&w * &c).sum(Kind::Float));
            _ = opt.step(|| w.square().sum(Kind::Float));
            _ = opt.step_chunks(2, |k| if k == 0 { (&w * &c).sum(Kind::Float) } else { w.square().sum(Kind::Float) });
        }
        let hess = opt.state("w", "hess").unwrap();
        assert!(Tensor::cat(&[&hess, &w], 0).isfinite().all().int64_value(&[]) == 1, "{size:e}");

        let (vs, w, c) = one(size);
        let mut opt = BayesianSam::default().ess(6e4).builder().noise(Philox { seed: 4 }).build(&vs, 1e-3).unwrap();
        for _ in 0..6 {
            _ = opt.step(|| {
                calls += 1;
                if calls % 2 == 1 { (&w * &c).sum(Kind::Float) } else { w.square().sum(Kind::Float) }
            });
            // An evaluation that fails at its first point has no second.
            calls = 0;
        }
        let hess = opt.state("w", "hess").unwrap();
        assert!(Tensor::cat(&[&hess, &w], 0).isfinite().all().int64_value(&[]) == 1, "{size:e}");
    }
}

/// A finite gradient whose square is not: named at once, and the next step goes on.
#[test]
fn finite_gradients_with_infinite_squares() {
    for size in [1e16, 1e24, 1e30, 3e38] {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().var("w", &[2], Init::Const(0.5));
        let mut opt = Ivon::default().ess(6e4).builder().noise(Philox { seed: 4 }).build(&vs, 1e-3).unwrap();
        opt.step(|| w.square().sum(Kind::Float)).unwrap();
        let c = Tensor::from_slice(&[size as f32, -size as f32]);
        for _ in 0..3 {
            let before = Snapshot::of(&opt, &vs);
            match opt.step(|| (&w * &c).sum(Kind::Float)) {
                Ok(_) => {}
                Err(Error::NonFiniteGradient { name, .. }) => {
                    assert_eq!((name.as_str(), Snapshot::of(&opt, &vs)), ("w", before), "{size:e}");
                }
                Err(e) => panic!("{size:e}: {e}"),
            }
            assert!(opt.state("w", "hess").unwrap().isfinite().all().int64_value(&[]) == 1, "{size:e}");
        }
        assert!(w.isfinite().all().int64_value(&[]) == 1, "{size:e}");
    }
}

/// Parameters in a store that are no plain memory, or share it, are refused by name wherever they would be read or
/// written, and not by a panic.
#[test]
fn parameters_that_cannot_be() {
    let plain = |n: i64| wave_at(&[n, 2], 0.0, F32);
    let whole = plain(4);
    let cases: [(&str, Vec<Tensor>); 4] = [
        ("sparse", vec![plain(2).to_sparse_sparse_dim(2)]),
        ("expand", vec![plain(1).expand([3, 2], false)]),
        ("share", vec![whole.narrow(0, 0, 3), whole.narrow(0, 2, 2)]),
        ("share", vec![plain(2)].into_iter().flat_map(|t| [t.tr(), t]).collect()),
    ];
    for (word, tensors) in cases {
        let vs = VarStore::new(Device::Cpu);
        for (i, t) in tensors.iter().enumerate() {
            _ = vs.root().add(&format!("w{i}"), t.detach(), true);
        }
        let entry =
            |(i, t): (usize, &Tensor)| (format!("w{i}"), Tensor::zeros(t.size(), F32), Tensor::ones(t.size(), F32));
        let q = DiagonalGaussian::new(tensors.iter().enumerate().map(entry)).unwrap();
        let x = plain(3);
        refused(Sgd::default().build(&vs, 0.1), &["w0", word]);
        refused(Ivon::default().ess(1.0).build(&vs, 0.1), &["w0", word]);
        refused(Evon::default().ess(1.0).build(&vs, 0.1), &["w0", word]);
        refused(q.perturb(&vs, 0), &["w0", word]);
        refused(q.predict(&vs, 1, || x.softmax(-1, Kind::Float)), &["w0", word]);
        refused(q.copy_mean_to(&vs), &["w0", word]);
        refused(Ema::new(&vs, 0.5), &["w0", word]);
        refused(Swag::new(&vs, 2), &["w0", word]);
        refused(Lawa::new(&vs, 2, 1), &["w0", word]);
        refused(Mas::new(&vs, [&x], Tensor::shallow_clone), &["w0", word]);
        refused(Fisher::exact().diagonal(&vs, [&x], Tensor::shallow_clone), &["w0", word]);
        refused(Fisher::exact().full(&vs, [&x], Tensor::shallow_clone), &["w0", word]);
        refused(sensitivity::jacobian(&vs, || x.shallow_clone()), &["w0", word]);
        refused(SynapticIntelligence::new(&vs, 0.1), &["w0", word]);
    }
}

/// Numbers beyond the kind of the tensors that they would fill: an error, and not a panic; and those of half precision
/// are kept in f32.
#[test]
fn numbers_beyond_the_kind_of_a_tensor() {
    let model = |kind| {
        let vs = VarStore::new(Device::Cpu);
        let w = vs.root().add("w", wave_at(&[2, 3], 0.3, (kind, Device::Cpu)), true);
        (vs, w)
    };
    let x = wave_at(&[5, 3], 0.7, F32);
    let laplace = |kind, precision: f64| {
        let (vs, w) = model(kind);
        let of_model = |x: &Tensor| x.to_kind(kind).matmul(&w.tr()).to_kind(Kind::Float);
        let fisher = Fisher::exact().diagonal(&vs, [&x], of_model)?;
        fisher.laplace(Prior::isotropic(precision)).map(|q| q.precision("w").unwrap().min().double_value(&[]))
    };
    refused(laplace(Kind::Float, 1e39), &["w"]);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        let least = laplace(kind, 1e6).unwrap();
        assert!((1e6..1.001e6).contains(&least), "{kind:?}: {least:e}");
    }
    let (vs, w) = model(Kind::Float);
    refused(Quadratic::isotropic(&vs, 1e39), &["w"]);
    let mut opt = Von::ogn().hessian(Statistic::Fisher(Labels::Exact)).ess(1.0).build(&vs, 0.1).unwrap();
    let before = Snapshot::of(&opt, &vs);
    let step = opt.step(|| nn::squared_error(&x.matmul(&w.tr()), &wave_at(&[5, 2], 0.1, F32), 1e-60));
    assert!(step.is_err());
    assert_eq!(Snapshot::of(&opt, &vs), before);
}
