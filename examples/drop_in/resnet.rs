//! Residual blocks with batch normalization on 10,000 small pictures of CIFAR-10.

use super::optimizer::{Job, Own};
use super::program::{Examples, HeldOut, Plan, Program, mini_batches};
use super::scores::{Predictions, Scores};
use safetensors::SafeTensors;
use std::fs;
use std::path::Path;
use tch::nn::{
    BatchNorm, BatchNormConfig, Conv2D, ConvConfig, Init, LinearConfig, Module, ModuleT, OptimizerConfig,
    Path as Names, batch_norm2d, conv2d, linear,
};
use tch::vision::image;
use tch::{Kind, Tensor};
use tch_blr_examples::Outcome;

const CLASSES: i64 = 10;

struct Resnet {
    train: Examples,
    held_out: HeldOut<Examples>,
}

pub(crate) fn load(data: Option<&Path>) -> Outcome<Box<dyn Program>> {
    let set = data.map(|data| data.join("cifar10")).filter(|set| set.is_dir());
    let set = set.ok_or("it needs $TCH_BLR_DATA/cifar10")?;
    let part = |name: &str, n| {
        let path = set.join(name);
        read(&path, n).map_err(|e| format!("{}: {e}", path.display()))
    };
    let train = part("train.safetensors", 10_000)?;
    let (x, y) = part("test.safetensors", 4000)?;
    let half = |from| (x.narrow(0, from, 2000), y.narrow(0, from, 2000));
    Ok(Box::new(Resnet { train, held_out: HeldOut { validation: half(0), test: half(2000) } }))
}

/// The first `n` pictures at half their size, `[N, 3, 16, 16]`, roughly standardised, and their classes. The file has
/// JPEGs one after the other as `bytes`, where each begins and ends as `offsets`, and `labels`.
fn read(path: &Path, n: usize) -> Outcome<(Tensor, Tensor)> {
    let file = fs::read(path)?;
    let tensors = SafeTensors::deserialize(&file)?;
    let (jpegs, labels) = (tensors.tensor("bytes")?.data(), tensors.tensor("labels")?.data());
    let offsets: Vec<usize> = tensors
        .tensor("offsets")?
        .data()
        .chunks_exact(8)
        .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")) as usize)
        .collect();
    if offsets.len() <= n || labels.len() < n {
        return Err(format!("expected {n} pictures or more").into());
    }
    let picture = |range: &[usize]| -> Outcome<Tensor> {
        let jpeg = jpegs.get(range[0]..range[1]).ok_or("an offset is beyond the end")?;
        Ok(image::load_from_memory(jpeg)?)
    };
    let pictures = offsets.windows(2).take(n).map(picture).collect::<Outcome<Vec<_>>>()?;
    let x = Tensor::stack(&pictures, 0).to_kind(Kind::Float).avg_pool2d_default(2);
    Ok(((x / 255.0 - 0.47) / 0.23, Tensor::from_slice(&labels[..n]).to_kind(Kind::Int64)))
}

/// A 3×3 convolution and its batch normalization.
#[derive(Debug)]
struct Convolution(Conv2D, BatchNorm);

impl Convolution {
    fn new(p: &Names, from: i64, to: i64, stride: i64) -> Self {
        let config = ConvConfig { stride, padding: 1, bias: false, ..ConvConfig::default() };
        // Every channel counts alike at the start; tch's default is uniform in [0, 1].
        let ones = BatchNormConfig { ws_init: Init::Const(1.0), ..BatchNormConfig::default() };
        Convolution(conv2d(p / "conv", from, to, 3, config), batch_norm2d(p / "norm", to, ones))
    }
}

impl ModuleT for Convolution {
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        self.1.forward_t(&self.0.forward(x), train)
    }
}

/// x + f(x) with f of two convolutions; where the size changes, x passes a convolution of 1×1.
#[derive(Debug)]
struct Block {
    first: Convolution,
    second: Convolution,
    shortcut: Option<Conv2D>,
}

impl Block {
    fn new(p: &Names, from: i64, to: i64) -> Self {
        let stride = if from == to { 1 } else { 2 };
        let config = ConvConfig { stride, bias: false, ..ConvConfig::default() };
        Block {
            first: Convolution::new(&(p / "first"), from, to, stride),
            second: Convolution::new(&(p / "second"), to, to, 1),
            shortcut: (from != to).then(|| conv2d(p / "shortcut", from, to, 1, config)),
        }
    }
}

impl ModuleT for Block {
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        let change = self.second.forward_t(&self.first.forward_t(x, train).relu(), train);
        let kept = self.shortcut.as_ref().map_or_else(|| x.shallow_clone(), |conv| conv.forward(x));
        (change + kept).relu()
    }
}

fn network(p: &Names) -> impl ModuleT + use<> {
    tch::nn::seq_t()
        .add(Convolution::new(&(p / "stem"), 3, 16, 1))
        .add_fn(Tensor::relu)
        .add(Block::new(&(p / "block1"), 16, 16))
        .add(Block::new(&(p / "block2"), 16, 32))
        .add(Block::new(&(p / "block3"), 32, 64))
        .add_fn(|x| x.mean_dim([2_i64, 3].as_slice(), false, Kind::Float))
        .add(linear(p / "head", 64, CLASSES, LinearConfig::default()))
}

impl Program for Resnet {
    fn plan(&self) -> Plan {
        Plan {
            examples: 10_000,
            steps: 400,
            own: Own { build: |vs, lr| tch::nn::sgd(0.9, 0.0, 5e-4, true).build(vs, lr), lr: 0.1, scheduled: true },
            adam_lr: 1e-2,
            without_vogn: Some("batch norm"),
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let net = network(&vs.root());
        let plan = self.plan();
        let mut opt = job.optimizer(&plan, &vs)?;
        for (x, y) in mini_batches((&self.train.0, &self.train.1), 64, job, &plan) {
            opt.step(|| net.forward_t(&x, true).cross_entropy_for_logits(&y))?;
        }
        let (x, y) = self.held_out.of(job);
        let p = Predictions::of(job, &opt, &vs, || net.forward_t(x, false))?;
        Ok(Scores::new([p.accuracy(y)?, p.nll(y)?, p.ece(y)?], &[&opt]))
    }
}
