//! Regression of a table with a small network: the strength of concrete (UCI), in two of the published splits.

use super::optimizer::{Job, Own};
use super::program::{HeldOut, Plan, Program, mini_batches};
use super::scores::{Better, Measure, Scores};
use std::f64::consts::PI;
use std::path::Path;
use tch::nn::{self, LinearConfig, Module, OptimizerConfig};
use tch::{Kind, Tensor};
use tch_blr::Result;
use tch_blr::nn::linear;
use tch_blr_examples::Outcome;
use tch_blr_examples::data::numbers;

/// Standard deviation of the noise, in those of the target: taken as known.
const NOISE: f64 = 0.3;

/// One of the published splits, standardised by its training part.
struct Split {
    train: (Tensor, Tensor),
    test: (Tensor, Tensor),
    /// Standard deviation of the target, for scores in its units.
    unit: f64,
}

/// Settings are chosen by one split, and the table shows another.
struct Tabular(HeldOut<Split>);

pub(crate) fn load(data: Option<&Path>) -> Outcome<Box<dyn Program>> {
    let set = data.map(|data| data.join("uci/concrete")).filter(|set| set.is_dir());
    let set = set.ok_or("it needs $TCH_BLR_DATA/uci/concrete")?;
    let integers =
        |file: &str| -> Outcome<Vec<i64>> { Ok(numbers(&set.join(file))?.into_iter().map(|x| x as i64).collect()) };
    let (features, target) = (integers("index_features.txt")?, integers("index_target.txt")?);
    let table = Tensor::from_slice(&numbers(&set.join("data.txt"))?).reshape([-1, features.len() as i64 + 1]);
    let part = |file: &str| -> Outcome<(Tensor, Tensor)> {
        let rows = table.index_select(0, &Tensor::from_slice(&integers(file)?));
        Ok((rows.index_select(1, &Tensor::from_slice(&features)), rows.index_select(1, &Tensor::from_slice(&target))))
    };
    let split = |k: usize| -> Outcome<Split> {
        Ok(Split::new(part(&format!("index_train_{k}.txt"))?, part(&format!("index_test_{k}.txt"))?))
    };
    Ok(Box::new(Tabular(HeldOut { validation: split(0)?, test: split(1)? })))
}

impl Split {
    fn new(train: (Tensor, Tensor), test: (Tensor, Tensor)) -> Split {
        let moments = |t: &Tensor| (t.mean_dim(0, true, Kind::Double), t.std_dim(0, true, true));
        let ((mx, sx), (my, sy)) = (moments(&train.0), moments(&train.1));
        let standard =
            |(x, y): (Tensor, Tensor)| (((x - &mx) / &sx).to_kind(Kind::Float), ((y - &my) / &sy).to_kind(Kind::Float));
        Split { train: standard(train), test: standard(test), unit: sy.double_value(&[0, 0]) }
    }

    /// Root mean squared error of predictions `[K, N, 1]` of K networks together, and the mean negative log density of
    /// the targets under their mixture, both in units of the target.
    fn errors(&self, predictions: &Tensor) -> [f64; 2] {
        let (predictions, y) = (predictions.to_kind(Kind::Double), self.test.1.to_kind(Kind::Double));
        let mean = predictions.mean_dim(0, false, Kind::Double);
        let rmse = self.unit * (mean - &y).square().mean(Kind::Double).double_value(&[]).sqrt();
        let each: Tensor = (predictions - y).square() * (-0.5 / NOISE.powi(2));
        let density = each.logsumexp(0, false) - (each.size()[0] as f64).ln();
        let nll = (2.0 * PI).sqrt().ln() + (NOISE * self.unit).ln() - density.mean(Kind::Double).double_value(&[]);
        [rmse, nll]
    }
}

impl Program for Tabular {
    fn plan(&self) -> Plan {
        Plan {
            examples: self.0.test.train.0.size()[0] as usize,
            steps: 3000,
            own: Own { build: |vs, lr| nn::Adam::default().build(vs, lr), lr: 1e-2, scheduled: false },
            adam_lr: 3e-2,
            without_vogn: None,
        }
    }

    fn run(&self, job: &Job) -> Outcome<Scores> {
        let vs = job.store();
        let split = self.0.of(job);
        let dense = |name, from, to| linear(vs.root() / name, from, to, LinearConfig::default());
        let inputs = split.train.0.size()[1];
        let net = nn::seq().add(dense("hidden", inputs, 50)).add_fn(Tensor::relu).add(dense("out", 50, 1));
        let plan = self.plan();
        let mut opt = job.optimizer(&plan, &vs)?;
        for (x, y) in mini_batches((&split.train.0, &split.train.1), 32, job, &plan) {
            opt.step(|| (net.forward(&x) - &y).square().mean(Kind::Float) * (0.5 / NOISE.powi(2)))?;
        }
        let outputs = || tch::no_grad(|| net.forward(&split.test.0));
        let at_mean = split.errors(&outputs().unsqueeze(0));
        let sampled = |q: Box<dyn tch_blr::Posterior>| q.predict_samples(&vs, job.samples(), outputs);
        let averaged: Option<Result<Tensor>> = opt.posterior().map(sampled);
        let averaged = averaged.transpose()?.map(|predictions| split.errors(&predictions));
        let measure = |k: usize, name| Measure {
            name,
            better: Better::Lower,
            at_mean: at_mean[k],
            averaged: averaged.map(|errors| errors[k]),
        };
        Ok(Scores::new([measure(0, "RMSE"), measure(1, "NLL")], &[&opt]))
    }
}
