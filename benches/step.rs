//! One optimizer step of every row with the loss and its gradient in it: a small multilayer perceptron, batch 128.

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use tch::nn::{self, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::{Adam, AdamW, Ivon, Philox, RmsProp, Rule, Sgd, Von};

fn network(vs: &VarStore) -> nn::Sequential {
    let layer =
        |name, inputs, outputs| tch_blr::nn::linear(vs.root() / name, inputs, outputs, nn::LinearConfig::default());
    nn::seq()
        .add(layer("fc1", 784, 256))
        .add_fn(Tensor::relu)
        .add(layer("fc2", 256, 256))
        .add_fn(Tensor::relu)
        .add(layer("fc3", 256, 10))
}

fn bench<R: Rule>(c: &mut Criterion, name: &str, row: R, lr: f64) {
    let vs = VarStore::new(Device::Cpu);
    let net = network(&vs);
    let x = Tensor::linspace(0.0, 1.0, 128 * 784, (Kind::Float, Device::Cpu)).reshape([128, 784]);
    let y = Tensor::arange(128, (Kind::Int64, Device::Cpu)).remainder(10);
    let mut opt = row.noise(Philox { seed: 0 }).build(&vs, lr).expect("valid settings");
    c.bench_function(&format!("mlp-784-256-256-10/{name}"), |b| {
        b.iter(|| black_box(opt.step(|| net.forward(&x).cross_entropy_for_logits(&y)).expect("a finite loss")));
    });
}

fn steps(c: &mut Criterion) {
    bench(c, "sgd", Sgd::default(), 1e-3);
    bench(c, "rmsprop", RmsProp::default(), 1e-4);
    bench(c, "adam", Adam::default(), 1e-4);
    bench(c, "adamw", AdamW::default(), 1e-4);
    bench(c, "ogn", Von::ogn().ess(1e4), 1e-3);
    bench(c, "vogn", Von::vogn().ess(1e4), 1e-3);
    bench(c, "ivon", Ivon::default().ess(1e4), 1e-2);
}

criterion_group!(benches, steps);
criterion_main!(benches);
