//! The test loss from training data alone.

use crate::network::{BATCH, Evolution, checkpoint, look, network, sensitivities};
use serde_json::{Value, json};
use std::path::Path;
use tch::Tensor;
use tch_blr::{Ivon, Optimizer, metrics};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::{Last, batches};
use tch_blr_examples::digits::Digits;
use tch_blr_examples::model::{Mlp, progress};
use tch_blr_examples::pictures::{self, Curves};

/// Evaluations of the leave-one-out estimate in each of the first epochs, where the loss moves fast.
const EARLY: [usize; 2] = [4, 2];

/// Epochs after which the losses move slowly.
pub const LATE: f64 = 2.0;

/// Losses at some point of the training, in nats per example.
pub struct Point {
    epoch: f64,
    train: f64,
    left_out: f64,
    test: f64,
}

impl Point {
    pub fn json(&self) -> Value {
        json!({"epoch": self.epoch, "train": self.train, "leave_one_out": self.left_out, "test": self.test})
    }
}

/// Trains, and compares the losses now and then.
pub fn follow(
    data: &Digits,
    (epochs, hess_init): (u64, f64),
) -> Outcome<(Mlp, Optimizer<Ivon>, Vec<Point>, Evolution)> {
    let (x, y) = (&data.train_images, &data.train_labels);
    let (net, mut opt) = network(y.numel(), epochs, hess_init)?;
    let per_epoch = y.numel().div_ceil(BATCH);
    let bar = progress("   IVON", epochs * per_epoch as u64);
    let (mut curve, mut evolution) = (Vec::new(), Vec::new());
    for epoch in 0..epochs {
        let every = per_epoch.div_ceil(EARLY.get(epoch as usize).copied().unwrap_or(1));
        for (i, (bx, by)) in batches(x, y, BATCH, epoch, Last::Keep).enumerate() {
            opt.step(|| net.logits(&bx).cross_entropy_for_logits(&by))?;
            bar.inc(1);
            if (i + 1) % every != 0 && i + 1 != per_epoch {
                continue;
            }
            let s = sensitivities(&net, &opt, x, y)?;
            let test = metrics::nll(&net.probabilities(&data.test_images), &data.test_labels)?;
            let (train, left_out) = (s.nll(&s.outputs().zeros_like())?, s.nll(&s.shift()?)?);
            bar.set_message(format!("loss {train:.3}, left out {left_out:.3}, test {test:.3}"));
            curve.push(Point { epoch: epoch as f64 + (i + 1) as f64 / per_epoch as f64, train, left_out, test });
            if i + 1 == per_epoch && checkpoint(epoch + 1, epochs) {
                evolution.push(look(epoch + 1, &s)?);
            }
        }
    }
    bar.finish();
    for p in curve.iter().rev().step_by((curve.len() / 6).max(1)).collect::<Vec<_>>().into_iter().rev() {
        println!("   epoch {:5.2}: training {:.4}, left out {:.4}, test {:.4}", p.epoch, p.train, p.left_out, p.test);
    }
    Ok((net, opt, curve, evolution))
}

pub fn correlation(curve: &[Point], from: f64) -> f64 {
    let of =
        |f: fn(&Point) -> f64| Tensor::from_slice(&curve.iter().filter(|p| p.epoch > from).map(f).collect::<Vec<_>>());
    Tensor::stack(&[of(|p| p.left_out), of(|p| p.test)], 0).corrcoef().double_value(&[0, 1])
}

pub fn draw(curve: &[Point], folder: &Path) -> Outcome<()> {
    let series = |from: f64| {
        let line = |f: fn(&Point) -> f64| curve.iter().filter(|p| p.epoch > from).map(|p| (p.epoch, f(p))).collect();
        vec![
            ("training".to_owned(), line(|p| p.train)),
            ("left out, estimated".to_owned(), line(|p| p.left_out)),
            ("test".to_owned(), line(|p| p.test)),
        ]
    };
    let mut panels = vec![Curves { y_label: "loss (nats per example)".to_owned(), series: series(0.0) }];
    if curve.last().is_some_and(|p| p.epoch > LATE) {
        panels.push(Curves { y_label: "the same, after two epochs".to_owned(), series: series(LATE) });
    }
    pictures::training_curves(&folder.join("losses.svg"), "epoch", &panels)
}
