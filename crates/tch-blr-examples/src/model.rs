//! The network, training loop and scores that the examples share.

use crate::batches::{Last, batches};
pub use indicatif::ProgressBar;
use indicatif::ProgressStyle;
use serde_json::{Value, json};
use tch::nn::{self, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::metrics::{self, Reliability};
use tch_blr::rule::Row;
use tch_blr::{Optimizer, Result};

/// A multilayer perceptron with ReLU between its layers; the layers are tapped, so that VOGN gets per-example squares.
#[derive(Debug)]
pub struct Mlp {
    /// `fc1.weight`, `fc1.bias`, `fc2.weight`, ..
    pub vs: VarStore,
    net: nn::Sequential,
}

impl Mlp {
    /// Initial weights depend on libtorch's generator: call [`tch::manual_seed`] first.
    pub fn new(sizes: &[i64]) -> Mlp {
        let vs = VarStore::new(Device::Cpu);
        let mut net = nn::seq();
        for (i, pair) in sizes.windows(2).enumerate() {
            if i > 0 {
                net = net.add_fn(Tensor::relu);
            }
            let name = format!("fc{}", i + 1);
            net = net.add(tch_blr::nn::linear(vs.root() / name, pair[0], pair[1], nn::LinearConfig::default()));
        }
        Mlp { vs, net }
    }

    /// `[N, C]`
    pub fn logits(&self, x: &Tensor) -> Tensor {
        self.net.forward(x)
    }

    /// Class probabilities at the current weights, `[N, C]`.
    pub fn probabilities(&self, x: &Tensor) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        self.logits(x).softmax(-1, Kind::Float)
    }
}

/// A line of the terminal for a training of so many steps.
pub fn progress(what: &str, steps: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{prefix:<34} {bar:30} {pos:>6}/{len} steps  {msg}  {eta} left")
        .expect("a valid template");
    ProgressBar::new(steps).with_style(style).with_prefix(what.to_owned())
}

/// Trains with mini-batches of `size` and returns (epoch, running mean of the loss) about twenty times an epoch.
pub fn train<R: Row>(
    what: &str,
    net: &Mlp,
    opt: &mut Optimizer<R>,
    data: (&Tensor, &Tensor),
    epochs_and_size: (u64, usize),
    seed: u64,
) -> Result<Vec<(f64, f64)>> {
    train_by(what, data, epochs_and_size, seed, |x, y| opt.step(|| net.logits(x).cross_entropy_for_logits(y)))
}

/// The same with any step: from a mini-batch to its loss.
pub fn train_by(
    what: &str,
    (x, y): (&Tensor, &Tensor),
    (epochs, size): (u64, usize),
    seed: u64,
    mut step: impl FnMut(&Tensor, &Tensor) -> Result<f64>,
) -> Result<Vec<(f64, f64)>> {
    let per_epoch = (x.size()[0] as u64).div_ceil(size as u64);
    let bar = progress(what, epochs * per_epoch);
    let every = (per_epoch / 20).max(1);
    let (mut curve, mut sum, mut count) = (Vec::new(), 0.0, 0);
    for epoch in 0..epochs {
        for (i, (x, y)) in batches(x, y, size, seed + epoch, Last::Keep).enumerate() {
            sum += step(&x, &y)?;
            count += 1;
            bar.inc(1);
            if count == every {
                let loss = sum / count as f64;
                bar.set_message(format!("loss {loss:.3}"));
                curve.push((epoch as f64 + (i + 1) as f64 / per_epoch as f64, loss));
                (sum, count) = (0.0, 0);
            }
        }
    }
    bar.finish();
    Ok(curve)
}

/// How well probabilities fit labels, and how well their entropy tells other inputs from them.
#[derive(Debug)]
pub struct Scores {
    /// Between 0 and 1.
    pub accuracy: f64,
    /// Mean negative log likelihood, in nats per example.
    pub nll: f64,
    /// With [`Scores::BINS`] bins.
    pub reliability: Reliability,
    /// Area under the curve of telling the other inputs by a higher entropy.
    pub ood_auroc: f64,
}

impl Scores {
    /// Of the reliability diagram.
    pub const BINS: usize = 15;

    /// Scores of probabilities `[N, C]` against labels `[N]`, and against those of other inputs, `out` `[M, C]`.
    ///
    /// # Errors
    /// If shapes do not agree.
    pub fn of(probabilities: &Tensor, labels: &Tensor, out: &Tensor) -> Result<Scores> {
        Ok(Scores {
            accuracy: metrics::accuracy(probabilities, labels)?,
            nll: metrics::nll(probabilities, labels)?,
            reliability: metrics::reliability(probabilities, labels, Self::BINS)?,
            ood_auroc: metrics::auroc(&metrics::entropy(probabilities)?, &metrics::entropy(out)?)?,
        })
    }

    /// For reports.
    pub fn json(&self) -> Value {
        json!({"accuracy": self.accuracy, "nll": self.nll, "ece": self.reliability.ece(), "ood_auroc": self.ood_auroc})
    }
}

/// Share of right predictions at the current weights.
///
/// # Errors
/// If there are not as many labels as inputs.
pub fn accuracy(net: &Mlp, x: &Tensor, y: &Tensor) -> Result<f64> {
    metrics::accuracy(&net.probabilities(x), y)
}
