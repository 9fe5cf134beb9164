//! What a program is to the suite.

use super::optimizer::{Job, Own};
use super::scores::Scores;
use std::path::Path;
use tch::Tensor;
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::digits::Digits;

/// Digits to train on, for programs that do.
pub(crate) const DIGITS: i64 = 6000;

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

/// Inputs and labels.
pub(crate) type Examples = (Tensor, Tensor);

/// What is scored after a training.
#[derive(Debug)]
pub(crate) struct HeldOut<T> {
    /// Decides about settings.
    pub(crate) validation: T,
    /// Is in the table.
    pub(crate) test: T,
}

impl<T> HeldOut<T> {
    pub(crate) fn of(&self, job: &Job) -> &T {
        if job.validation { &self.validation } else { &self.test }
    }
}

/// Images to train on and to score, `[N, 784]` or what `shape` makes of it: the first 6,000 of the training digits; and of
/// the others two times 2,000, or halves of them.
pub(crate) fn digits(data: Option<&Path>, shape: impl Fn(&Tensor) -> Tensor) -> Outcome<(Examples, HeldOut<Examples>)> {
    let digits = Digits::load_from(data)?;
    let part =
        |images: &Tensor, labels: &Tensor, from, n| (shape(&images.narrow(0, from, n)), labels.narrow(0, from, n));
    let n = 2000.min(digits.test_labels.size()[0] / 2);
    let held_out = |from| part(&digits.test_images, &digits.test_labels, from, n);
    let train = part(&digits.train_images, &digits.train_labels, 0, DIGITS);
    Ok((train, HeldOut { validation: held_out(0), test: held_out(n) }))
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
    /// Adam's learning rate with warm-up and cosine decay: of 1e-3, 3e-3, 1e-2 and 3e-2 the best by the validation data,
    /// with two seeds.
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
