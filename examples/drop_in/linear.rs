//! Softmax regression on 6,000 digits.

use super::optimizer::{Job, Own};
use super::program::{Plan, Program, mini_batches};
use super::scores::{Predictions, Scores};
use std::path::Path;
use tch::Tensor;
use tch::nn::{LinearConfig, Module, OptimizerConfig};
use tch_blr::nn::linear;
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::{CLASSES, Digits, PIXELS};

struct Regression {
    train: (Tensor, Tensor),
    test: (Tensor, Tensor),
}

pub(crate) fn load(data: Option<&Path>) -> Outcome<Box<dyn Program>> {
    let digits = Digits::load_from(data)?;
    let first = |images: &Tensor, labels: &Tensor, n| (images.narrow(0, 0, n), labels.narrow(0, 0, n));
    Ok(Box::new(Regression {
        train: first(&digits.train_images, &digits.train_labels, 6000),
        test: first(&digits.test_images, &digits.test_labels, 2000),
    }))
}

impl Program for Regression {
    fn plan(&self) -> Plan {
        Plan {
            examples: 6000,
            steps: 2000,
            own: Own { build: |vs, lr| tch::nn::Sgd::default().build(vs, lr), lr: 0.1, scheduled: false },
            adam_lr: 3e-3,
            without_vogn: None,
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let net = linear(vs.root(), PIXELS as i64, CLASSES, LinearConfig::default());
        let plan = self.plan();
        let mut opt = job.optimizer(&plan, &vs)?;
        for (x, y) in mini_batches((&self.train.0, &self.train.1), 100, job, &plan) {
            opt.step(|| net.forward(&x).cross_entropy_for_logits(&y))?;
        }
        let (x, y) = &self.test;
        let p = Predictions::of(job, &opt, &vs, || net.forward(x))?;
        Ok(Scores::new([p.accuracy(y)?, p.nll(y)?, p.ece(y)?], &[&opt]))
    }
}
