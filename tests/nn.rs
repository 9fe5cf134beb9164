//! The tapped layers are tch's: the same variables, initial values and results, to the last bit.

use std::sync::Mutex;
use tch::nn::{self as plain, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::nn;

/// The generator of initial values belongs to the process.
static GENERATOR: Mutex<()> = Mutex::new(());

/// Builds both from the same seed and compares variables and outputs.
fn same<A: Module, B: Module>(x: &Tensor, ours: impl Fn(&plain::Path) -> A, theirs: impl Fn(&plain::Path) -> B) {
    let (a, b) = (VarStore::new(Device::Cpu), VarStore::new(Device::Cpu));
    tch::manual_seed(7);
    let ours = ours(&a.root());
    tch::manual_seed(7);
    let theirs = theirs(&b.root());
    assert_eq!(a.variables(), b.variables());
    let order = |vs: &VarStore| vs.trainable_variables().iter().map(Tensor::size).collect::<Vec<_>>();
    assert_eq!(order(&a), order(&b));
    assert_eq!(ours.forward(x), theirs.forward(x), "{ours:?}");
}

#[test]
fn layers_are_those_of_tch() {
    let _alone = GENERATOR.lock();
    let x = Tensor::randn([3, 4, 7, 6], (Kind::Float, Device::Cpu));
    let random = plain::Init::Randn { mean: 0.5, stdev: 2.0 };

    for bias in [true, false] {
        for bs_init in [None, Some(random)] {
            let c = plain::LinearConfig { bias, bs_init, ..Default::default() };
            same(&x, |p| nn::linear(p, 6, 5, c), |p| plain::linear(p, 6, 5, c));
        }
    }
    for padding_mode in [
        plain::PaddingMode::Zeros,
        plain::PaddingMode::Reflect,
        plain::PaddingMode::Replicate,
        plain::PaddingMode::Circular,
    ] {
        for bias in [true, false] {
            let c = plain::ConvConfig {
                stride: 2,
                padding: 2,
                dilation: 2,
                groups: 2,
                bias,
                bs_init: random,
                padding_mode,
                ..Default::default()
            };
            same(&x, |p| nn::conv2d(p, 4, 6, 3, c), |p| plain::conv2d(p, 4, 6, 3, c));
        }
    }
    let tokens = Tensor::from_slice(&[4_i64, 0, 0, 2]).view([2, 2]);
    for padding_idx in [-1, 2, 5] {
        let c = plain::EmbeddingConfig { padding_idx, ..Default::default() };
        let theirs = |p: &plain::Path| {
            let table = plain::embedding(p, 5, 3, c);
            if padding_idx == 2 {
                // As PyTorch has it.
                tch::no_grad(|| _ = table.ws.narrow(0, 2, 1).zero_());
            }
            table
        };
        same(&tokens, |p| nn::embedding(p, 5, 3, c), theirs);
    }
    for affine in [true, false] {
        let c = plain::LayerNormConfig {
            elementwise_affine: affine,
            eps: 0.1,
            ws_init: random,
            bs_init: random,
            ..Default::default()
        };
        same(&x, |p| nn::layer_norm(p, vec![7, 6], c), |p| plain::layer_norm(p, vec![7, 6], c));
        let c = plain::GroupNormConfig { affine, eps: 0.1, ws_init: random, bs_init: random, ..Default::default() };
        same(&x, |p| nn::group_norm(p, 2, 4, c), |p| plain::group_norm(p, 2, 4, c));
    }
}

#[test]
fn layers_drop_into_a_sequence() {
    let _alone = GENERATOR.lock();
    let vs = VarStore::new(Device::Cpu);
    let net = plain::seq()
        .add(nn::conv2d(vs.root() / "conv", 1, 4, 3, plain::ConvConfig { padding: 1, ..Default::default() }))
        .add(nn::group_norm(vs.root() / "norm", 2, 4, plain::GroupNormConfig::default()))
        .add_fn(|x| x.relu().flatten(1, -1))
        .add(nn::linear(vs.root() / "out", 64, 3, plain::LinearConfig::default()));
    assert_eq!(net.forward(&Tensor::zeros([2, 1, 4, 4], (Kind::Float, Device::Cpu))).size(), [2, 3]);
    let mut names: Vec<_> = vs.variables().into_keys().collect();
    names.sort();
    assert_eq!(names, ["conv.bias", "conv.weight", "norm.bias", "norm.weight", "out.bias", "out.weight"]);
}
