//! One step of every row: the optimizer's own part of it, with gradients given, at the shapes of known models; and a
//! whole step with the loss and its gradient in it.

mod common;

use common::Shapes;
use criterion::{BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime};
use std::hint::black_box;
use tch::nn::{Module, VarStore};
use tch::{Device, Kind};
use tch_blr::nn::cross_entropy;
use tch_blr::rule::Row;
use tch_blr::{Adam, AdamW, Evon, Ivon, Labels, NoisyKfac, Philox, RmsProp, Sgd, Statistic, Von};

type Group<'a> = BenchmarkGroup<'a, WallTime>;

/// What is measured of a row.
trait Measure {
    fn row<R: Row>(&mut self, name: &str, row: R, lr: f64);

    fn rows(&mut self) {
        self.row("sgd", Sgd::default(), 1e-3);
        self.row("rmsprop", RmsProp::default(), 1e-4);
        self.row("adam", Adam::default(), 1e-4);
        self.row("adamw", AdamW::default(), 1e-4);
        self.row("ogn", Von::ogn().ess(1e4), 1e-3);
        self.row("vogn", Von::vogn().ess(1e4), 1e-3);
        self.row("ivon", Ivon::default().ess(1e4), 1e-2);
    }
}

/// Perturb, take gradients (and squares) that are there already, update.
struct GradientsGiven<'a, 'b> {
    group: &'a mut Group<'b>,
    shapes: Shapes,
    kind: Kind,
}

impl Measure for GradientsGiven<'_, '_> {
    fn row<R: Row>(&mut self, name: &str, row: R, lr: f64) {
        let per_example = row.statistic() == Statistic::Fisher(Labels::Observed);
        let (leaves, params) = common::parameters(&self.shapes, self.kind);
        let mut opt = row.builder().noise(Philox { seed: 0 }).build(params, lr).expect("valid settings");
        let gradients = common::all_like(&leaves, 1e-3);
        let squares = if per_example { common::all_like(&leaves, 1e-6) } else { Vec::new() };
        self.group.bench_function(name, |b| {
            b.iter(|| black_box(common::step_given(&mut opt, &gradients, &squares)));
        });
    }
}

fn gradients_given(c: &mut Criterion) {
    let models = [
        ("mlp-251", common::small_mlp(), Kind::Float),
        ("resnet18", common::resnet18(), Kind::Float),
        ("resnet18-bf16", common::resnet18(), Kind::BFloat16),
        ("resnet18-f16", common::resnet18(), Kind::Half),
        ("gpt2", common::gpt2(), Kind::Float),
    ];
    for (name, shapes, kind) in models {
        let mut group = c.benchmark_group(format!("step/{name}"));
        group.throughput(Throughput::Elements(common::weights(&shapes) as u64));
        GradientsGiven { group: &mut group, shapes, kind }.rows();
        group.finish();
    }
}

/// A step on 128 images, forward and backward pass included.
struct Whole<'a, 'b> {
    group: &'a mut Group<'b>,
}

impl Measure for Whole<'_, '_> {
    fn row<R: Row>(&mut self, name: &str, row: R, lr: f64) {
        let vs = VarStore::new(Device::Cpu);
        let net = common::mlp(&vs.root(), tch_blr::nn::linear);
        let (x, y) = common::images(128);
        let mut opt = row.builder().noise(Philox { seed: 0 }).build(&vs, lr).expect("valid settings");
        self.group.bench_function(name, |b| {
            b.iter(|| black_box(opt.step(|| cross_entropy(&net.forward(&x), &y)).expect("a finite loss")));
        });
    }
}

fn whole(c: &mut Criterion) {
    let mut group = c.benchmark_group("step/whole-mlp-784-256-256-10");
    let mut whole = Whole { group: &mut group };
    whole.rows();
    // Rows over blocks have no part of their own to time with gradients given.
    whole.row("evon", Evon::default().ess(1e4), 1e-2);
    // Damped, since on targets that are noise its factors vanish and the steps grow.
    whole.row("noisy_kfac", NoisyKfac::default().ess(1e4).damping(0.1), 1e-3);
    group.finish();
}

criterion_group! { name = benches; config = common::quick(); targets = gradients_given, whole }
criterion_main!(benches);
