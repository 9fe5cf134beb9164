//! What per-example squares cost, at batch 128: a plain forward and backward pass; VOGN's step, which needs the squares;
//! the optimizer's own part of it; and the same squares by a backward pass per example. The exact Fisher information and the
//! sensitivities of examples, too.

mod common;

use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use std::hint::black_box;
use tch::nn::{Module, Sequential, VarStore};
use tch::{Device, Kind, Reduction, Tensor};
use tch_blr::fisher::Fisher;
use tch_blr::nn::Likelihood;
use tch_blr::sensitivity::Sensitivity;
use tch_blr::{Adam, Optimizer, Philox, Prior, Von};

const BATCH: i64 = 128;

fn optimizer(vs: &VarStore) -> Optimizer<Von> {
    Von::vogn().ess(1e4).noise(Philox { seed: 0 }).build(vs, 1e-3).expect("valid settings")
}

/// A network and the cross-entropy of a batch of images.
struct Model {
    vs: VarStore,
    net: Sequential,
    x: Tensor,
    y: Tensor,
}

impl Model {
    fn new(make: impl Fn(&VarStore) -> Sequential) -> Model {
        let vs = VarStore::new(Device::Cpu);
        let (net, (x, y)) = (make(&vs), common::images(BATCH));
        Model { vs, net, x, y }
    }

    fn loss(&self) -> Tensor {
        self.net.forward(&self.x).cross_entropy_for_logits(&self.y)
    }

    fn losses(&self) -> Tensor {
        self.net.forward(&self.x).cross_entropy_loss(&self.y, None::<Tensor>, Reduction::None, -100, 0.0)
    }

    fn gradients(&self, loss: &Tensor) -> Vec<Tensor> {
        Tensor::run_backward(&[loss], &self.vs.trainable_variables(), false, false)
    }

    /// Σᵢ ∇ℓᵢ and Σᵢ (∇ℓᵢ)² of B passes over one example each.
    fn one_by_one(&self) -> (Vec<Tensor>, Vec<Tensor>) {
        let zeros = || self.vs.trainable_variables().iter().map(|p| p.detach().zeros_like()).collect();
        let (mut sums, mut squares): (Vec<Tensor>, Vec<Tensor>) = (zeros(), zeros());
        for i in 0..BATCH {
            let loss = self.net.forward(&self.x.narrow(0, i, 1)).cross_entropy_for_logits(&self.y.narrow(0, i, 1));
            for ((g, sum), square) in self.gradients(&loss).iter().zip(&mut sums).zip(&mut squares) {
                let _ = sum.g_add_(g);
                let _ = square.addcmul_(g, g);
            }
        }
        (sums, squares)
    }
}

/// `tapped` and `plain` are one network of this crate's layers and of tch's.
fn model(
    group: &mut BenchmarkGroup<WallTime>,
    tapped: impl Fn(&VarStore) -> Sequential,
    plain: impl Fn(&VarStore) -> Sequential,
) {
    let model = Model::new(&tapped);
    group.bench_function("forward and backward pass", |b| b.iter(|| black_box(model.gradients(&model.loss()))));
    let mut opt = optimizer(&model.vs);
    group.bench_function("vogn step", |b| {
        b.iter(|| black_box(opt.step(|| model.loss()).expect("a finite loss")));
    });
    let leaves = model.vs.trainable_variables();
    let (gradients, squares) = (common::all_like(&leaves, 1e-3), common::all_like(&leaves, 1e-6));
    group.bench_function("vogn step with derivatives given", |b| {
        b.iter(|| black_box(common::step_given(&mut opt, &gradients, &squares)));
    });
    group.bench_function("one example at a time", |b| b.iter(|| black_box(model.one_by_one())));
    let model = Model::new(plain);
    let mut opt = optimizer(&model.vs);
    group.bench_function("vogn step without taps", |b| {
        b.iter(|| black_box(opt.step(|| model.losses()).expect("finite losses")));
    });
}

/// The exact diagonal Fisher information of two active labels out of ten, as for a task of Split MNIST: by layers, and by
/// passes over one example each, with a backward pass for each label.
fn fisher(c: &mut Criterion) {
    let labels = [2, 3];
    let model = Model::new(|vs| common::mlp(&vs.root(), tch_blr::nn::linear));
    let (data, _) = common::images(8 * BATCH);
    let mut group = c.benchmark_group("per_example/fisher-784-256-256-10, 1024 examples");
    let by_layers = || {
        let fisher = Fisher::exact().active(&labels);
        fisher.diagonal(&model.vs, data.split(BATCH, 0), |x| model.net.forward(x)).expect("a finite curvature")
    };
    let columns = Tensor::from_slice(&labels);
    let one_by_one = || {
        let leaves = model.vs.trainable_variables();
        let mut squares: Vec<Tensor> = leaves.iter().map(|p| p.detach().zeros_like()).collect();
        for i in 0..8 * BATCH {
            let logits = model.net.forward(&data.narrow(0, i, 1)).index_select(1, &columns);
            let log_p = logits.log_softmax(-1, None::<Kind>).squeeze();
            for c in 0..labels.len() as i64 {
                let log_p = log_p.get(c);
                let p = log_p.detach().exp();
                for (g, square) in Tensor::run_backward(&[log_p], &leaves, true, false).iter().zip(&mut squares) {
                    let _ = square.addcmul_(&(g * &p), g);
                }
            }
        }
        squares
    };
    let names: Vec<String> = by_layers().names().map(str::to_owned).collect();
    let fast = by_layers();
    for (name, slow) in names.iter().zip(one_by_one()) {
        let fast = fast.get(name).expect("a parameter");
        let error = (fast - &slow).abs().max().double_value(&[]) / slow.abs().max().double_value(&[]);
        assert!(error < 1e-4, "{name}: {error:e}");
    }
    group.bench_function("by layers", |b| b.iter(|| black_box(by_layers())));
    group.bench_function("one example at a time", |b| b.iter(|| black_box(one_by_one())));
    let q = by_layers().laplace(Prior::isotropic(1.0)).expect("a positive precision");
    group.finish();
    let mut group = c.benchmark_group("per_example/outputs-784-256-256-10");
    group.bench_function("variance of ten outputs", |b| {
        b.iter(|| black_box(q.output_variance(&model.vs, || model.net.forward(&model.x)).expect("finite variances")));
    });
    group.bench_function("forward pass", |b| b.iter(|| black_box(tch::no_grad(|| model.net.forward(&model.x)))));
    group.finish();
}

/// Sensitivities over ten outputs, by layers and by a backward pass for each example and output, and what an epoch of training
/// takes.
fn sensitivity(c: &mut Criterion) {
    let model = Model::new(|vs| common::mlp(&vs.root(), tch_blr::nn::linear));
    let (data, labels) = common::images(8 * BATCH);
    let batches = || data.split(BATCH, 0).into_iter().zip(labels.split(BATCH, 0));
    let q = Fisher::exact().diagonal(&model.vs, data.split(BATCH, 0), |x| model.net.forward(x));
    let q = q.and_then(|f| f.laplace(Prior::isotropic(1.0))).expect("a positive precision");
    let by_layers =
        || Sensitivity::diagonal(&q, &model.vs, batches(), Likelihood::Categorical, |x| model.net.forward(x));
    let with_covariances =
        || Sensitivity::of(&q, &model.vs, batches(), Likelihood::Categorical, |x| model.net.forward(x));
    let names: Vec<String> = tch_blr::Params::from(&model.vs).names().map(str::to_owned).collect();
    let variances: Vec<Tensor> = names.iter().map(|name| q.variance(name).expect("a parameter")).collect();
    let one_by_one = || {
        let leaves = model.vs.trainable_variables();
        let mut all = Vec::new();
        for i in 0..BATCH {
            let (logits, y) = (model.net.forward(&data.narrow(0, i, 1)).squeeze_dim(0), labels.int64_value(&[i]));
            let p = logits.detach().softmax(-1, Kind::Double);
            let mut score = 0.0;
            for k in 0..10 {
                let jacobian = Tensor::run_backward(&[logits.get(k)], &leaves, true, false);
                let v =
                    jacobian.iter().zip(&variances).map(|(j, v)| (j.square() * v).sum(Kind::Double).double_value(&[]));
                let p = p.double_value(&[k]);
                score += ((p - f64::from(u8::from(k == y))) * p * (1.0 - p) * v.sum::<f64>()).abs();
            }
            all.push(score);
        }
        Tensor::from_slice(&all)
    };
    let fast = by_layers().and_then(|s| s.score()).expect("finite sensitivities").narrow(0, 0, BATCH);
    let slow = one_by_one();
    let error = (fast - &slow).abs().max().double_value(&[]) / slow.max().double_value(&[]);
    assert!(error < 1e-4, "{error:e}");
    let mut opt = Adam::default().build(&model.vs, 1e-6).expect("valid settings");
    let mut group = c.benchmark_group("per_example/sensitivity-784-256-256-10");
    group.bench_function("1024 examples", |b| {
        b.iter(|| black_box(by_layers().and_then(|s| s.score()).expect("finite")));
    });
    group.bench_function("1024 examples, covariances", |b| {
        b.iter(|| black_box(with_covariances().and_then(|s| s.shift()).expect("finite")));
    });
    group.bench_function("1024 examples, epoch of Adam", |b| {
        b.iter(|| {
            for (x, y) in batches() {
                black_box(opt.step(|| model.net.forward(&x).cross_entropy_for_logits(&y)).expect("a finite loss"));
            }
        });
    });
    group.bench_function("128 examples, one at a time", |b| b.iter(|| black_box(one_by_one())));
    group.finish();
}

fn per_example(c: &mut Criterion) {
    let mut group = c.benchmark_group("per_example/mlp-784-256-256-10");
    model(&mut group, |vs| common::mlp(&vs.root(), tch_blr::nn::linear), |vs| common::mlp(&vs.root(), tch::nn::linear));
    group.finish();
    let mut group = c.benchmark_group("per_example/lenet");
    model(
        &mut group,
        |vs| common::lenet(&vs.root(), tch_blr::nn::conv2d, tch_blr::nn::linear),
        |vs| common::lenet(&vs.root(), tch::nn::conv2d, tch::nn::linear),
    );
    group.finish();
}

criterion_group! { name = benches; config = common::quick(); targets = per_example, fisher, sensitivity }
criterion_main!(benches);
