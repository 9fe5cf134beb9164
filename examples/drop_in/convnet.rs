//! Convolutions on 6,000 digits, as beginners' programs have them.

use super::optimizer::{Job, Own};
use super::program::{DIGITS, Examples, HeldOut, Plan, Program, digits, mini_batches};
use super::scores::{Predictions, Scores};
use std::path::Path;
use tch::Tensor;
use tch::nn::{self, ConvConfig, LinearConfig, Module, OptimizerConfig, Path as Names, Sequential};
use tch_blr::nn::{conv2d, linear};
use tch_blr_examples::Outcome;

struct Convnet {
    train: Examples,
    held_out: HeldOut<Examples>,
}

pub(crate) fn load(data: Option<&Path>) -> Outcome<Box<dyn Program>> {
    let (train, held_out) = digits(data, |images| images.reshape([-1, 1, 28, 28]))?;
    Ok(Box::new(Convnet { train, held_out }))
}

fn network(p: &Names) -> Sequential {
    let conv = |name, from, to| conv2d(p / name, from, to, 5, ConvConfig::default());
    let dense = |name, from, to| linear(p / name, from, to, LinearConfig::default());
    nn::seq()
        .add(conv("conv1", 1, 16))
        .add_fn(|x| x.relu().max_pool2d_default(2))
        .add(conv("conv2", 16, 32))
        .add_fn(|x| x.relu().max_pool2d_default(2).flat_view())
        .add(dense("fc1", 512, 128))
        .add_fn(Tensor::relu)
        .add(dense("fc2", 128, 10))
}

impl Program for Convnet {
    fn plan(&self) -> Plan {
        Plan {
            examples: DIGITS as usize,
            steps: 500,
            own: Own { build: |vs, lr| nn::Adam::default().build(vs, lr), lr: 1e-3, scheduled: false },
            adam_lr: 1e-2,
            without_vogn: None,
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let net = network(&vs.root());
        let plan = self.plan();
        let mut opt = job.optimizer(&plan, &vs)?;
        for (x, y) in mini_batches((&self.train.0, &self.train.1), 64, job, &plan) {
            opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))?;
        }
        let (x, y) = self.held_out.of(job);
        let p = Predictions::of(job, &opt, &vs, || net.forward(x))?;
        Ok(Scores::new([p.accuracy(y)?, p.nll(y)?, p.ece(y)?], &[&opt]))
    }
}
