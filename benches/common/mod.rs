//! What the benchmarks share: criterion's settings, shapes of known models, networks and their data.
//!
//! Each benchmark is a program of its own and uses a part of it.
#![allow(dead_code)]

use criterion::Criterion;
use std::time::Duration;
use tch::nn::{self, ConvConfig, LinearConfig, Module, Path, Sequential};
use tch::{Device, Kind, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Derivatives, Optimizer, Params};

/// Few and short measurements, so that `make bench` takes minutes. `cargo bench --bench step -- --measurement-time 10`
/// and the like overrule them.
pub fn quick() -> Criterion {
    Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
}

/// Name and shape of each parameter of a model, in the order of their creation.
pub type Shapes = Vec<(String, Vec<i64>)>;

pub fn weights(shapes: &Shapes) -> i64 {
    shapes.iter().map(|(_, size)| size.iter().product::<i64>()).sum()
}

/// A model of these shapes and this kind: its tensors in the order of their names, and the same as parameters.
pub fn parameters(shapes: &Shapes, kind: Kind) -> (Vec<Tensor>, Params) {
    let mut shapes = shapes.clone();
    shapes.sort();
    let leaf = |size: &[i64]| Tensor::full(size, 0.02, (kind, Device::Cpu)).set_requires_grad(true);
    let leaves: Vec<Tensor> = shapes.iter().map(|(_, size)| leaf(size)).collect();
    let named = shapes.iter().zip(&leaves).map(|((name, _), leaf)| (name, leaf.shallow_clone()));
    let params = Params::named(named).expect("names of their own");
    (leaves, params)
}

/// ResNet-18 with 1000 classes, as in torchvision: 62 tensors.
pub fn resnet18() -> Shapes {
    fn norm(shapes: &mut Shapes, name: &str, channels: i64) {
        shapes.push((format!("{name}.weight"), vec![channels]));
        shapes.push((format!("{name}.bias"), vec![channels]));
    }
    let mut shapes = vec![("conv1.weight".to_owned(), vec![64, 3, 7, 7])];
    norm(&mut shapes, "bn1", 64);
    let mut before = 64;
    for (layer, channels) in [64, 128, 256, 512].into_iter().enumerate() {
        for block in 0..2 {
            let name = format!("layer{}.{block}", layer + 1);
            shapes.push((format!("{name}.conv1.weight"), vec![channels, before, 3, 3]));
            norm(&mut shapes, &format!("{name}.bn1"), channels);
            shapes.push((format!("{name}.conv2.weight"), vec![channels, channels, 3, 3]));
            norm(&mut shapes, &format!("{name}.bn2"), channels);
            if before != channels {
                shapes.push((format!("{name}.downsample.0.weight"), vec![channels, before, 1, 1]));
                norm(&mut shapes, &format!("{name}.downsample.1"), channels);
            }
            before = channels;
        }
    }
    shapes.push(("fc.weight".to_owned(), vec![1000, 512]));
    shapes.push(("fc.bias".to_owned(), vec![1000]));
    assert_eq!((shapes.len(), weights(&shapes)), (62, 11_689_512));
    shapes
}

/// The smallest GPT-2, whose output layer is the table of its tokens.
pub fn gpt2() -> Shapes {
    let d = 768;
    let mut shapes = vec![("wte.weight".to_owned(), vec![50257, d]), ("wpe.weight".to_owned(), vec![1024, d])];
    let mut add = |name: &str, weight: &[i64], bias: i64| {
        shapes.push((format!("{name}.weight"), weight.to_vec()));
        shapes.push((format!("{name}.bias"), vec![bias]));
    };
    for block in 0..12 {
        let name = |part: &str| format!("h.{block}.{part}");
        add(&name("ln_1"), &[d], d);
        add(&name("attn.c_attn"), &[d, 3 * d], 3 * d);
        add(&name("attn.c_proj"), &[d, d], d);
        add(&name("ln_2"), &[d], d);
        add(&name("mlp.c_fc"), &[d, 4 * d], 4 * d);
        add(&name("mlp.c_proj"), &[4 * d, d], d);
    }
    add("ln_f", &[d], d);
    assert_eq!(weights(&shapes), 124_439_808);
    shapes
}

/// A multilayer perceptron 10-15-5-1.
pub fn small_mlp() -> Shapes {
    let widths = [10, 15, 5, 1];
    let mut shapes = Shapes::new();
    for (layer, io) in widths.windows(2).enumerate() {
        shapes.push((format!("{layer}.weight"), vec![io[1], io[0]]));
        shapes.push((format!("{layer}.bias"), vec![io[1]]));
    }
    assert_eq!(weights(&shapes), 251);
    shapes
}

/// Tensors like these, without a graph, of equal elements.
pub fn all_like(tensors: &[Tensor], x: f64) -> Vec<Tensor> {
    tensors.iter().map(|t| t.detach().full_like(x)).collect()
}

/// An optimizer's own part of a step: perturb, take derivatives that are there already, update.
pub fn step_given<R: Row>(opt: &mut Optimizer<R>, gradients: &[Tensor], squares: &[Tensor]) -> f64 {
    let given = |tensors: &[Tensor]| tensors.iter().map(|t| Some(t.shallow_clone())).collect();
    let evaluation = opt.perturbed().expect("valid parameters");
    let (gradients, squares) = (given(gradients), given(squares));
    let derivatives = Derivatives { loss: 1.0, examples: None, gradients, squares };
    evaluation.step(derivatives).expect("finite derivatives")
}

/// A perceptron 784-256-256-10 of this crate's linear layers or of tch's.
pub fn mlp<'a, L: Module + 'static>(
    root: &Path<'a>,
    linear: impl Fn(Path<'a>, i64, i64, LinearConfig) -> L,
) -> Sequential {
    let linear = |name: &str, i, o| linear(root / name, i, o, LinearConfig::default());
    nn::seq()
        .add_fn(|x| x.flatten(1, -1))
        .add(linear("fc1", 784, 256))
        .add_fn(Tensor::relu)
        .add(linear("fc2", 256, 256))
        .add_fn(Tensor::relu)
        .add(linear("fc3", 256, 10))
}

/// A convolutional network in the style of LeNet-5 (LeCun et al. 1998), with ReLU and maxima: 61,706 weights.
pub fn lenet<'a, C: Module + 'static, L: Module + 'static>(
    root: &Path<'a>,
    conv2d: impl Fn(Path<'a>, i64, i64, i64, ConvConfig) -> C,
    linear: impl Fn(Path<'a>, i64, i64, LinearConfig) -> L,
) -> Sequential {
    let linear = |name: &str, i, o| linear(root / name, i, o, LinearConfig::default());
    let halved = |x: &Tensor| x.relu().max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false);
    nn::seq()
        .add(conv2d(root / "conv1", 1, 6, 5, ConvConfig { padding: 2, ..Default::default() }))
        .add_fn(halved)
        .add(conv2d(root / "conv2", 6, 16, 5, ConvConfig::default()))
        .add_fn(halved)
        .add_fn(|x| x.flatten(1, -1))
        .add(linear("fc1", 400, 120))
        .add_fn(Tensor::relu)
        .add(linear("fc2", 120, 84))
        .add_fn(Tensor::relu)
        .add(linear("fc3", 84, 10))
}

/// Images `[B, 1, 28, 28]` of noise, and classes `[B]` out of ten.
pub fn images(batch: i64) -> (Tensor, Tensor) {
    let x = Tensor::randn([batch, 1, 28, 28], (Kind::Float, Device::Cpu));
    (x, Tensor::arange(batch, (Kind::Int64, Device::Cpu)).remainder(10))
}
