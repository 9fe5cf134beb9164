//! A preview of one weighting of three tasks, beside one combination of the same posteriors: 11.7 million weights.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use tch::{Device, Kind, Tensor};
use tch_blr::{DiagonalGaussian, combine, merge};

const ALPHA: [f64; 3] = [0.5, 0.3, 0.2];

fn previews(c: &mut Criterion) {
    let shapes = common::resnet18();
    let q = |precision: f64| {
        let entries = shapes.iter().map(|(name, shape)| {
            let mean = Tensor::randn(shape, (Kind::Float, Device::Cpu));
            let precision = mean.full_like(precision);
            (name, mean, precision)
        });
        DiagonalGaussian::new(entries).expect("a posterior")
    };
    let (prior, tasks) = (q(1.0), [q(10.0), q(20.0), q(30.0)]);
    let tasks: [&DiagonalGaussian; 3] = std::array::from_fn(|t| &tasks[t]);
    let mut group = c.benchmark_group("merge/resnet18, three tasks");
    group.bench_function("preview", |b| {
        b.iter(|| black_box(merge::preview(&prior, &tasks, &ALPHA).expect("a preview")));
    });
    group.bench_function("combine", |b| {
        let all = [(0.0, &prior), (ALPHA[0], tasks[0]), (ALPHA[1], tasks[1]), (ALPHA[2], tasks[2])];
        b.iter(|| black_box(combine(&all).expect("a posterior")));
    });
    group.finish();
}

criterion_group! { name = benches; config = common::quick(); targets = previews }
criterion_main!(benches);
