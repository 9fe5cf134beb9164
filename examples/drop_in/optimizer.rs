//! What the name of an optimizer means, and the one line that all of them are stepped by.

use super::program::Plan;
use std::time::Instant;
use tch::nn::{self, VarStore};
use tch::{TchError, Tensor};
use tch_blr::rule::Row;
use tch_blr::{Adam, BayesianSam, Builder, Error, Evon, Ivon, Philox, Posterior, Result, Schedule, Train, Von};

/// Every name; the first six are the table's unless others are asked for.
pub(crate) const NAMES: [&str; 9] =
    ["own", "adam", "ivon-auto", "bsam-auto", "vogn-auto", "evon-auto", "ivon", "bsam", "vogn"];

/// One training: an optimizer, a seed, and what else the command line says.
#[derive(Debug)]
pub(crate) struct Job<'a> {
    /// One of [`NAMES`].
    pub(crate) optimizer: &'a str,
    pub(crate) seed: u64,
    /// Factor on the learning rates that mean Adam's.
    pub(crate) lr_scale: f64,
    pub(crate) quick: bool,
    /// Scored on what settings are chosen by, instead of on what the table shows.
    pub(crate) validation: bool,
}

impl Job<'_> {
    /// Posterior samples behind each averaged prediction.
    pub(crate) fn samples(&self) -> usize {
        if self.quick { 2 } else { 32 }
    }

    /// Steps to train for.
    pub(crate) fn steps(&self, plan: &Plan) -> u64 {
        if self.quick { 3 } else { plan.steps }
    }

    /// The seed of an epoch's order.
    pub(crate) fn order(&self, epoch: u64) -> u64 {
        (self.seed << 32) + epoch
    }

    /// A model's store, with libtorch's generator at the seed: whatever the optimizer, the weights start alike.
    pub(crate) fn store(&self) -> VarStore {
        tch::manual_seed(self.seed as i64);
        VarStore::new(tch::Device::Cpu)
    }

    /// The optimizer of the name, which knows what the plan says.
    ///
    /// # Errors
    /// As [`Builder::build`].
    pub(crate) fn optimizer(&self, plan: &Plan, vs: &VarStore) -> Result<Trainer> {
        // A quick run is the beginning of a whole one.
        let (n, steps) = (plan.examples as f64, plan.steps);
        let schedule = Schedule::Cosine { warmup: steps / 10, total: steps, end: 0.0 };
        let lr = 0.01 * self.lr_scale;
        match self.optimizer {
            "own" => plan.own.build(vs, schedule),
            "adam" => self.row(Adam::default().schedule(schedule), vs, plan.adam_lr * self.lr_scale),
            "ivon" => self.row(Ivon::default().ess(n).schedule(schedule), vs, 0.1),
            "bsam" => self.row(BayesianSam::default().ess(n).schedule(schedule), vs, 0.5),
            "vogn" => self.row(Von::vogn().ess(n).schedule(schedule), vs, 1e-3),
            "ivon-auto" => self.row(Ivon::auto(n, steps), vs, lr),
            "bsam-auto" => self.row(BayesianSam::auto(n, steps), vs, lr),
            "vogn-auto" => self.row(Von::auto(n, steps), vs, lr),
            "evon-auto" => self.row(Evon::auto(n, steps), vs, lr),
            other => unreachable!("{other} is not in NAMES"),
        }
    }

    fn row<R: Row>(&self, row: Builder<R>, vs: &VarStore, lr: f64) -> Result<Trainer> {
        let row = row.noise(Philox { seed: self.seed }).build(vs, lr)?;
        Ok(Trainer::new(Kind::Row(Box::new(row))))
    }
}

/// One of tch's optimizers, as programs of its kind use it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Own {
    pub(crate) build: fn(&VarStore, f64) -> std::result::Result<nn::Optimizer, TchError>,
    pub(crate) lr: f64,
    /// Whether such programs warm up and decay the learning rate.
    pub(crate) scheduled: bool,
}

impl Own {
    fn build(self, vs: &VarStore, schedule: Schedule) -> Result<Trainer> {
        let schedule = if self.scheduled { schedule } else { Schedule::Constant };
        Ok(Trainer::new(Kind::Tch { optimizer: (self.build)(vs, self.lr)?, lr: self.lr, schedule }))
    }
}

enum Kind {
    Tch { optimizer: nn::Optimizer, lr: f64, schedule: Schedule },
    Row(Box<dyn Train>),
}

/// An optimizer of any name, and the time that it has taken.
pub(crate) struct Trainer {
    kind: Kind,
    steps: u64,
    seconds: f64,
}

impl Trainer {
    fn new(kind: Kind) -> Self {
        Trainer { kind, steps: 0, seconds: 0.0 }
    }

    /// One step; the loss, a mean over the batch, is computed inside.
    ///
    /// # Errors
    /// If it is not finite, and those of the row.
    pub(crate) fn step(&mut self, mut loss: impl FnMut() -> Tensor) -> Result<f64> {
        let started = Instant::now();
        let value = match &mut self.kind {
            Kind::Row(row) => row.step(&mut || Ok(loss()))?,
            Kind::Tch { optimizer, lr, schedule } => {
                optimizer.set_lr(*lr * schedule.factor(self.steps));
                let loss = loss();
                let value = loss.double_value(&[]);
                if !value.is_finite() {
                    return Err(Error::NonFiniteLoss { value, step: self.steps });
                }
                optimizer.backward_step(&loss);
                value
            }
        };
        self.steps += 1;
        self.seconds += started.elapsed().as_secs_f64();
        Ok(value)
    }

    /// What was learned about the weights, of rows that learn more than a point.
    pub(crate) fn posterior(&self) -> Option<Box<dyn Posterior>> {
        match &self.kind {
            Kind::Row(row) => row.posterior().ok(),
            Kind::Tch { .. } => None,
        }
    }

    /// Mean time of a step.
    pub(crate) fn seconds_per_step(&self) -> f64 {
        self.seconds / self.steps as f64
    }
}
