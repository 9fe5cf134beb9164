//! Saving and loading an optimizer: mean, momentum and Hessian of 11.7 million weights.

mod common;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tch_blr::Ivon;

fn checkpoint(c: &mut Criterion) {
    let shapes = common::resnet18();
    let (_, params) = common::parameters(&shapes, tch::Kind::Float);
    let mut opt = Ivon::default().ess(1e4).build(params, 1e-2).expect("valid settings");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("resnet18.safetensors");
    let mut group = c.benchmark_group("checkpoint/ivon-resnet18");
    group.throughput(Throughput::Bytes(3 * 4 * common::weights(&shapes) as u64));
    group.bench_function("save", |b| b.iter(|| opt.save(&path).expect("a writable folder")));
    // A filter may have left out the saving.
    opt.save(&path).expect("a writable folder");
    group.bench_function("load", |b| b.iter(|| opt.load(&path).expect("the file just saved")));
    group.finish();
}

criterion_group! { name = benches; config = common::quick(); targets = checkpoint }
criterion_main!(benches);
