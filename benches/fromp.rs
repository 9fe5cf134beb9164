//! FROMP's kernels J diag(v) Jᵀ of 40 examples in 784-256-256-10, all ten classes: from tapped layers, and from Jacobians
//! by a backward pass for every example and class; and the penalty in training.

mod common;

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use tch::nn::{Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::continual::{Fromp, Kernel, Memory, Model, Regularizer};
use tch_blr::nn::Likelihood;
use tch_blr::{DiagonalGaussian, Params};

const MEMORY: i64 = 40;

fn fromp(c: &mut Criterion) {
    let mut group = c.benchmark_group("fromp/mlp-784-256-256-10");
    let vs = VarStore::new(Device::Cpu);
    let net = common::mlp(&vs.root(), tch_blr::nn::linear);
    let forward = |x: &Tensor| net.forward(x);
    let params = Params::from(&vs);
    let precise = |(name, w): (String, Tensor)| (name, w.detach().copy(), w.detach().square() * 10.0 + 1.0);
    let q = DiagonalGaussian::new(vs.variables().into_iter().map(precise)).expect("positive precisions");
    let memory = Memory::new(&common::images(MEMORY).0, Likelihood::Categorical);
    for (name, kernel) in [
        ("full kernels", Kernel::Full { q: &q, jitter: 1e-6 }),
        ("diagonal kernels", Kernel::Diagonal { q: &q, jitter: 1e-6 }),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| black_box(Fromp::kernel(&params, &kernel, &memory, forward).expect("fits")));
        });
    }
    let names: Vec<&str> = params.names().collect();
    let variables = vs.variables();
    let leaves: Vec<&Tensor> = names.iter().map(|name| &variables[*name]).collect();
    let deviations: Vec<Tensor> = names.iter().map(|name| q.variance(name).expect("its name").sqrt()).collect();
    group.bench_function("full kernels, one example at a time", |b| {
        b.iter(|| {
            let p = forward(memory.inputs()).softmax(1, Kind::Float);
            for class in 0..10 {
                let row = |i| {
                    let gradients = Tensor::run_backward(&[p.get(i).get(class)], &leaves, true, false);
                    let parts = gradients.iter().zip(&deviations).map(|(g, d)| (g * d).reshape([-1]));
                    Tensor::cat(&parts.collect::<Vec<_>>(), 0)
                };
                let j = Tensor::stack(&(0..MEMORY).map(row).collect::<Vec<_>>(), 0);
                let _ = black_box(j.matmul(&j.tr()));
            }
        });
    });
    let past = Fromp::new(&params, &Kernel::Full { q: &q, jitter: 1e-6 }, [&memory], forward).expect("fits");
    group.bench_function("penalty, forward and backward", |b| {
        b.iter(|| {
            let value = past.value(&Model { params: &params, forward: &|x| Ok(forward(x)) }).expect("fits");
            black_box(Tensor::run_backward(&[value], &leaves, false, false))
        });
    });
    group.finish();
}

criterion_group! { name = benches; config = common::quick(); targets = fromp }
criterion_main!(benches);
