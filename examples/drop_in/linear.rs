//! Softmax regression on 6,000 digits.

use super::optimizer::{Job, Own};
use super::program::{DIGITS, Examples, HeldOut, Plan, Program, digits, mini_batches};
use super::scores::{Predictions, Scores};
use std::path::Path;
use tch::Tensor;
use tch::nn::{LinearConfig, Module, OptimizerConfig};
use tch_blr::nn::linear;
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::{CLASSES, PIXELS};

struct Regression {
    train: Examples,
    held_out: HeldOut<Examples>,
}

pub(crate) fn load(data: Option<&Path>) -> Outcome<Box<dyn Program>> {
    let (train, held_out) = digits(data, Tensor::shallow_clone)?;
    Ok(Box::new(Regression { train, held_out }))
}

impl Program for Regression {
    fn plan(&self) -> Plan {
        Plan {
            examples: DIGITS as usize,
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
        let (x, y) = self.held_out.of(job);
        let p = Predictions::of(job, &opt, &vs, || net.forward(x))?;
        Ok(Scores::new([p.accuracy(y)?, p.nll(y)?, p.ece(y)?], &[&opt]))
    }
}
