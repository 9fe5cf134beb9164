//! Drawing samples of a posterior: a normal per weight, scaled and shifted.

mod common;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use tch::{Device, Kind, Tensor};
use tch_blr::DiagonalGaussian;

const WEIGHTS: i64 = 1 << 22;

fn normals(c: &mut Criterion) {
    let mut group = c.benchmark_group("normals");
    group.throughput(Throughput::Elements(WEIGHTS as u64));
    for (name, kind) in [("f32", Kind::Float), ("f64", Kind::Double)] {
        let all = |x: f64| Tensor::full([WEIGHTS], x, (kind, Device::Cpu));
        let q = DiagonalGaussian::new([("w", all(0.5), all(1e4))]).expect("a posterior");
        let mut k = 0;
        group.bench_function(name, |b| {
            b.iter(|| {
                k += 1;
                black_box(q.sample(k).expect("a sample"))
            });
        });
    }
    group.finish();
}

criterion_group! { name = benches; config = common::quick(); targets = normals }
criterion_main!(benches);
