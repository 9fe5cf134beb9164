//! What is measured of the networks of one seed.

use crate::networks::{Examples, Networks, Task, Training, WEIGHTED, mean};
use tch::{Kind, Reduction, Tensor};
use tch_blr::DiagonalGaussian;
use tch_blr::merge::{self, Tensors, gradient_mismatch};
use tch_blr_examples::Outcome;
use tch_blr_examples::model::{Mlp, accuracy};

/// 0, 0.1, .., 1.5
pub fn grid() -> Vec<Vec<f64>> {
    (0..=15).map(|i| vec![f64::from(i) / 10.0]).collect()
}

/// The sum over the examples at the current weights.
fn summed(net: &Mlp, (x, y): &Examples) -> Tensor {
    let losses = net.logits(x).log_softmax(-1, Kind::Float);
    losses.nll_loss_nd::<Tensor>(y, None, Reduction::Sum, -100)
}

fn average_loss(net: &Mlp, data: &Examples) -> Tensor {
    summed(net, data) / data.1.numel() as f64
}

/// Of 100.
fn share_right(net: &Mlp, (x, y): &Examples) -> Tensor {
    net.logits(x).argmax(-1, false).eq_tensor(y).to_kind(Kind::Double).mean(Kind::Double) * 100.0
}

/// Everything that is measured of the networks of one seed.
#[derive(Default)]
pub struct Run {
    /// Accuracy in % on all shifted test digits, on 0-4 and on 5-9; mismatch of the gradients of both fine-tunes'
    /// summed losses.
    pub models: Vec<(String, [f64; 5])>,
    /// Over the grid, on the test digits: accuracy in %, and NLL.
    pub sweeps: Vec<[Vec<f64>; 2]>,
    /// Weight of the highest accuracy on the validation digits, and the test accuracy in % there.
    pub chosen: Vec<[f64; 2]>,
    /// Losses on the straight line from the one fine-tune to the other: on all test digits, 0-4, 5-9.
    pub line: Vec<Vec<f64>>,
    /// Mean precision of the base, by IVON and by its definition.
    pub precision: [f64; 2],
}

impl Run {
    pub fn new(task: &Task, base: &Training, seed: u64) -> Outcome<Run> {
        tch::manual_seed(seed as i64);
        let net = &Mlp::new(&[784, 100, 100, 10]);
        let networks = Networks::train(net, task, base, seed)?;
        let mut run = Run::default();
        let [low, high] = networks.halves.each_ref().map(mean);
        for (name, weights) in networks.all()? {
            let mismatch = gradient_mismatch(
                &net.vs,
                &weights,
                &mut [(&low, &mut || summed(net, &task.halves[0])), (&high, &mut || summed(net, &task.halves[1]))],
            )?;
            DiagonalGaussian::new(weights.into_iter().map(|(name, t)| (name, t.copy(), t.ones_like())))?
                .copy_mean_to(&net.vs)?;
            let score = |(x, y): &Examples| accuracy(net, x, y).map(|a| 100.0 * a);
            let scores = [score(&task.test)?, score(&task.tests[0])?, score(&task.tests[1])?];
            run.models.push((name, [scores[0], scores[1], scores[2], mismatch[0], mismatch[1]]));
        }
        for (_, way) in WEIGHTED {
            let over = |loss: &dyn Fn() -> Tensor| {
                let trials = merge::sweep(&net.vs, grid(), |a| networks.weighted(way, a[0]), loss)?;
                Ok::<Vec<f64>, tch_blr::Error>(trials.into_iter().flat_map(|trial| trial.losses).collect())
            };
            let test = over(&|| share_right(net, &task.test))?;
            let validation = over(&|| share_right(net, &task.validation))?;
            let best = (0..validation.len()).rev().max_by(|a, b| validation[*a].total_cmp(&validation[*b]));
            let best = best.expect("a grid with points");
            run.chosen.push([grid()[best][0], test[best]]);
            run.sweeps.push([test, over(&|| average_loss(net, &task.test))?]);
        }
        for data in [&task.test, &task.tests[0], &task.tests[1]] {
            run.line.push(merge::barrier(&net.vs, &low, &high, POINTS, || average_loss(net, data))?.loss);
        }
        let average = |t: &Tensors| {
            let sum: f64 = t.values().map(|t| t.sum(Kind::Double).double_value(&[])).sum();
            sum / t.values().map(Tensor::numel).sum::<usize>() as f64
        };
        run.precision = [average(&networks.own.base), average(&networks.exact.base)];
        Ok(run)
    }
}

/// On the line between the fine-tunes.
pub const POINTS: usize = 21;
