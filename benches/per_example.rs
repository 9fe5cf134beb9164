//! What per-example squares cost, at batch 128: a plain forward and backward pass; VOGN's step, which needs the squares;
//! the optimizer's own part of it; and the same squares by a backward pass per example.

mod common;

use criterion::{BenchmarkGroup, Criterion, criterion_group, criterion_main, measurement::WallTime};
use std::hint::black_box;
use tch::nn::{Module, Sequential, VarStore};
use tch::{Device, Reduction, Tensor};
use tch_blr::{Optimizer, Philox, Rule, Von};

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

criterion_group! { name = benches; config = common::quick(); targets = per_example }
criterion_main!(benches);
