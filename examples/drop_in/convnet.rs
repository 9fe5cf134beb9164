//! Convolutions on 6,000 digits, as beginners' programs have them.

use super::optimizer::{Job, Own};
use super::program::{Plan, Program, mini_batches};
use super::scores::{Predictions, Scores};
use std::path::Path;
use tch::Tensor;
use tch::nn::{self, ConvConfig, LinearConfig, Module, OptimizerConfig, Path as Names, Sequential};
use tch_blr::nn::{conv2d, linear};
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::Digits;

struct Convnet {
    train: (Tensor, Tensor),
    test: (Tensor, Tensor),
}

pub(crate) fn load(data: Option<&Path>) -> Outcome<Box<dyn Program>> {
    let digits = Digits::load_from(data)?;
    let first =
        |images: &Tensor, labels: &Tensor, n| (images.narrow(0, 0, n).reshape([-1, 1, 28, 28]), labels.narrow(0, 0, n));
    Ok(Box::new(Convnet {
        train: first(&digits.train_images, &digits.train_labels, 6000),
        test: first(&digits.test_images, &digits.test_labels, 2000),
    }))
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
            examples: 6000,
            steps: 500,
            own: Own { build: |vs, lr| nn::Adam::default().build(vs, lr), lr: 1e-3, scheduled: false },
            adam_lr: 3e-3,
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
        let (x, y) = &self.test;
        let p = Predictions::of(job, &opt, &vs, || net.forward(x))?;
        Ok(Scores::new([p.accuracy(y)?, p.nll(y)?, p.ece(y)?], &[&opt]))
    }
}
