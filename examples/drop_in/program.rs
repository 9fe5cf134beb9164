//! What a program is to the suite.

use super::optimizer::{Job, Own};
use super::scores::Scores;
use std::path::Path;
use tch::Tensor;
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};

/// A training program with its data.
pub(crate) trait Program {
    /// What an optimizer is told about it.
    fn plan(&self) -> Plan;

    /// Trains from the initial weights, data order and noise of the job's seed, and scores what was learned.
    ///
    /// # Errors
    /// If the training fails, as by a loss that is not finite.
    fn run(&self, job: &Job) -> Outcome<Scores>;
}

/// Reads a program's data; the argument is `$TCH_BLR_DATA`.
pub(crate) type Load = fn(Option<&Path>) -> Outcome<Box<dyn Program>>;

/// What an optimizer is told about a program.
#[derive(Debug)]
pub(crate) struct Plan {
    /// Number of training examples; of labels, where the loss is a mean over several of each example.
    pub(crate) examples: usize,
    /// Number of steps.
    pub(crate) steps: u64,
    /// What such programs are trained with.
    pub(crate) own: Own,
    /// Adam's learning rate with warm-up and cosine decay: of 1e-3, 3e-3 and 1e-2 the best.
    pub(crate) adam_lr: f64,
    /// Why there are no per-example gradients for VOGN, if there are none.
    pub(crate) without_vogn: Option<&'static str>,
}

/// Mini-batches of `size` examples, epoch after epoch in another order, for as many steps as the job has.
pub(crate) fn mini_batches(
    (x, y): (&Tensor, &Tensor),
    size: usize,
    job: &Job,
    plan: &Plan,
) -> impl Iterator<Item = (Tensor, Tensor)> {
    let epoch = move |k: u64| batches(x, y, size, job.order(k), Last::Drop);
    (0..).flat_map(epoch).take(job.steps(plan) as usize)
}
