//! Shakespeare, character by character: what its models share.

use super::optimizer::Job;
use super::program::{HeldOut, Plan};
use super::scores::{Predictions, Scores};
use std::fs;
use std::path::Path;
use tch::nn::VarStore;
use tch::{Kind, Tensor};
use tch_blr_examples::Outcome;
use tch_blr_examples::random::Rng;

/// Characters that a model sees at once, and predicts one after each.
pub(crate) const LENGTH: i64 = 48;
/// Windows of a held-out text that are scored.
const WINDOWS: usize = 200;

/// A text as indices into its own alphabet.
#[derive(Debug)]
pub(crate) struct Text {
    /// The first nine tenths.
    train: Tensor,
    held_out: HeldOut<Tensor>,
    pub(crate) symbols: i64,
}

impl Text {
    pub(crate) fn load(folder: Option<&Path>) -> Outcome<Self> {
        let set = folder.map(|data| data.join("tinyshakespeare")).filter(|set| set.is_dir());
        let path = set.ok_or("it needs $TCH_BLR_DATA/tinyshakespeare")?.join("input.txt");
        let bytes = fs::read(&path).map_err(|e| format!("{}: {e}", path.display()))?;
        let mut symbols = bytes.clone();
        symbols.sort_unstable();
        symbols.dedup();
        let index = |byte| symbols.binary_search(byte).expect("the alphabet is the text's") as i64;
        let all = Tensor::from_slice(&bytes.iter().map(index).collect::<Vec<_>>());
        let n = all.size()[0];
        let train = n * 9 / 10;
        let half = (n - train) / 2;
        Ok(Text {
            train: all.narrow(0, 0, train),
            held_out: HeldOut { validation: all.narrow(0, train, half), test: all.narrow(0, train + half, half) },
            symbols: symbols.len() as i64,
        })
    }

    /// Characters to learn from.
    pub(crate) fn examples(&self) -> usize {
        self.train.size()[0] as usize
    }

    /// Trains on random windows, `size` at a time; `logits` maps `[B, LENGTH]` to `[B, LENGTH, symbols]`.
    pub(crate) fn run(
        &self,
        job: &Job,
        plan: &Plan,
        vs: &VarStore,
        size: usize,
        logits: impl Fn(&Tensor) -> Tensor,
    ) -> Outcome<Scores> {
        let mut opt = job.optimizer(plan, vs)?;
        let mut rng = Rng::new(job.seed, 1);
        let flat = |x: &Tensor| logits(x).flatten(0, 1);
        for _ in 0..job.steps(plan) {
            let last = self.examples() - LENGTH as usize;
            let (x, y) = windows(&self.train, (0..size).map(|_| rng.below(last)));
            opt.step(|| flat(&x).cross_entropy_for_logits(&y.flatten(0, 1)))?;
        }
        let held_out = self.held_out.of(job);
        let apart = (held_out.size()[0] as usize - LENGTH as usize - 1) / WINDOWS;
        let (x, y) = windows(held_out, (0..WINDOWS).map(|k| k * apart));
        let y = y.flatten(0, 1);
        let p = Predictions::of(job, &opt, vs, || flat(&x))?;
        Ok(Scores::new([p.nll(&y)?, p.accuracy(&y)?, p.ece(&y)?], &[&opt]))
    }
}

/// Windows `[B, LENGTH]` that start at these characters, and the same one character later.
fn windows(text: &Tensor, starts: impl Iterator<Item = usize>) -> (Tensor, Tensor) {
    let starts: Vec<i64> = starts.map(|start| start as i64).collect();
    let both = text.unfold(0, LENGTH + 1, 1).index_select(0, &Tensor::from_slice(&starts)).to_kind(Kind::Int64);
    (both.narrow(1, 0, LENGTH), both.narrow(1, 1, LENGTH))
}
