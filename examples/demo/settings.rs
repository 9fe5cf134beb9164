//! What is trained, and how long: all of the demo's choices in one place.
//!
//! Every optimizer takes the same number of steps of one gradient each. VOGN and IVON are told the number of examples and
//! of steps, and nothing was tried for them. Adam has its usual learning rate; and, for comparison, the one of 1e-4,
//! 3e-4, 5e-4 and 1e-3 that has the lowest NLL on the validation forms (`--validation` prints what that saw). How often
//! the first task counts in the second was chosen there too, among 1, 10 and 30.

use tch_blr::rule::Row;
use tch_blr::{Adam, Builder, Ivon, Optimizer, Schedule, Von};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::handwritten::Examples;
use tch_blr_examples::model::{Mlp, ProgressBar};

/// Every number is a mean over these.
pub const SEEDS: u64 = 5;
/// Of the posterior, to predict with.
pub const SAMPLES: usize = 64;
/// Layers of the network for the digits.
pub const NETWORK: [i64; 4] = [64, 100, 100, 10];
const BATCH: usize = 50;
/// Of the first task, and of the second.
pub const EPOCHS: u64 = 300;
/// Of a fine-tune.
pub const FINE_TUNE: u64 = 100;
/// How often the first posterior counts as prior of the second task: a diagonal Gaussian knows less of the first than
/// its data did.
pub const OLD_COUNTS: f64 = 10.0;
/// Adam's usual learning rate, and its best.
pub const ADAM: [f64; 2] = [1e-3, 1e-4];
/// VOGN's and IVON's.
pub const LR: f64 = 0.01;

/// With a schedule like VOGN's and IVON's.
pub fn adam(examples: usize, epochs: u64) -> Builder<Adam> {
    let total = steps(examples, epochs);
    Adam::default().schedule(Schedule::Cosine { warmup: total / 10, total, end: 0.0 })
}

pub fn vogn(examples: usize, epochs: u64) -> Builder<Von> {
    Von::auto(examples as f64, steps(examples, epochs))
}

pub fn ivon(examples: usize, epochs: u64) -> Builder<Ivon> {
    Ivon::auto(examples as f64, steps(examples, epochs))
}

/// Steps of so many epochs.
pub fn steps(examples: usize, epochs: u64) -> u64 {
    examples.div_ceil(BATCH) as u64 * epochs
}

/// Trains with mini-batches; `after` is called at the end of every epoch.
pub fn fit<R: Row>(
    (net, opt): (&Mlp, &mut Optimizer<R>),
    data: &Examples,
    (epochs, seed): (u64, u64),
    bar: &ProgressBar,
    mut after: impl FnMut(u64) -> Outcome,
) -> Outcome {
    for epoch in 0..epochs {
        for (x, y) in batches(&data.images, &data.labels, BATCH, 1000 * seed + epoch, Last::Keep) {
            opt.step(|| net.logits(&x).cross_entropy_for_logits(&y))?;
            bar.inc(1);
        }
        after(epoch + 1)?;
    }
    Ok(())
}
