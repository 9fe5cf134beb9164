//! Prediction averaged over 16 samples of a posterior, beside 16 forward passes at fixed weights.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use tch::nn::{Module, VarStore};
use tch::{Device, Kind, no_grad};
use tch_blr::DiagonalGaussian;

const SAMPLES: usize = 16;

fn predict(c: &mut Criterion) {
    let vs = VarStore::new(Device::Cpu);
    let net = common::mlp(&vs.root(), tch::nn::linear);
    let entries = vs.variables().into_iter().map(|(name, mean)| {
        let precision = mean.full_like(1e4);
        (name, mean, precision)
    });
    let q = DiagonalGaussian::new(entries).expect("a posterior");
    let (x, _) = common::images(256);
    let probabilities = || net.forward(&x).softmax(-1, Kind::Float);
    let mut group = c.benchmark_group("predict/mlp-784-256-256-10");
    group.bench_function("posterior", |b| {
        b.iter(|| black_box(q.predict(&vs, SAMPLES, probabilities).expect("probabilities")));
    });
    group.bench_function("fixed weights", |b| {
        b.iter(|| no_grad(|| (0..SAMPLES).for_each(|_| drop(black_box(probabilities())))));
    });
    group.finish();
}

criterion_group! { name = benches; config = common::quick(); targets = predict }
criterion_main!(benches);
