//! Accuracy and calibration of Adam, VOGN and IVON on digits of forms that they have never seen.

use crate::claims::Claim;
use crate::settings::{ADAM, EPOCHS, LR, NETWORK, SAMPLES, SEEDS, adam, fit, ivon, steps, vogn};
use serde_json::{Map, Value, json};
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr::rule::{Row, Rule};
use tch_blr::{Builder, DiagonalGaussian, Optimizer, Philox, Result, metrics};
use tch_blr_examples::handwritten::Examples;
use tch_blr_examples::model::{Mlp, ProgressBar, progress};
use tch_blr_examples::tables::{mean_and_sd, plus_minus};
use tch_blr_examples::{Outcome, pictures};

/// Of the reliability diagram.
const BINS: usize = 15;

/// A way to predict, over the seeds.
struct Predictions {
    name: String,
    /// `[N, 10]` of each seed.
    probabilities: Vec<Tensor>,
    accuracy: Vec<f64>,
    nll: Vec<f64>,
    ece: Vec<f64>,
}

impl Predictions {
    fn new(name: String) -> Self {
        Predictions { name, probabilities: Vec::new(), accuracy: Vec::new(), nll: Vec::new(), ece: Vec::new() }
    }

    fn push(&mut self, p: Tensor, labels: &Tensor) -> Result<()> {
        self.accuracy.push(metrics::accuracy(&p, labels)?);
        self.nll.push(metrics::nll(&p, labels)?);
        self.ece.push(metrics::ece(&p, labels, BINS)?);
        self.probabilities.push(p);
        Ok(())
    }

    fn line(&self) {
        let percent: Vec<f64> = self.accuracy.iter().map(|a| 100.0 * a).collect();
        let column = |values: &[f64], digits| plus_minus(mean_and_sd(values), digits);
        println!(
            "  {:<18} {:>12}   {:>15}   {:>15}",
            self.name,
            column(&percent, 1),
            column(&self.nll, 3),
            column(&self.ece, 3)
        );
    }

    fn json(&self) -> Value {
        json!({"accuracy": self.accuracy, "nll": self.nll, "ece": self.ece})
    }
}

/// An optimizer over the seeds: at its mean, averaged over its posterior, and what it has learned of the weights.
struct Trained {
    name: String,
    at_mean: Predictions,
    averaged: Predictions,
    learned: Vec<DiagonalGaussian>,
}

/// Where the networks are trained and asked.
struct Task<'a> {
    train: &'a Examples,
    test: &'a Examples,
    bar: &'a ProgressBar,
}

/// The posterior to predict with, and the one that goes on: what was learned.
type Posteriors = [DiagonalGaussian; 2];

fn posteriors<R: Rule<Posterior = DiagonalGaussian>>(opt: &Optimizer<R>) -> Result<Option<Posteriors>> {
    Ok(Some([opt.posterior()?, opt.learned_posterior()?]))
}

impl Task<'_> {
    fn run<R: Row>(
        &self,
        name: &str,
        lr: f64,
        build: impl Fn(usize, u64) -> Builder<R>,
        posteriors: impl Fn(&Optimizer<R>) -> Result<Option<Posteriors>>,
    ) -> Outcome<Trained> {
        let Task { train, test, bar } = self;
        let mut at_mean = Predictions::new(name.to_owned());
        let mut averaged = Predictions::new(format!("{name}, {SAMPLES} samples"));
        let mut learned = Vec::new();
        for seed in 0..SEEDS {
            tch::manual_seed(seed as i64);
            let net = Mlp::new(&NETWORK);
            let mut opt = build(train.len(), EPOCHS).noise(Philox { seed }).build(&net.vs, lr)?;
            fit((&net, &mut opt), train, (EPOCHS, seed), bar, |_| Ok(()))?;
            at_mean.push(net.probabilities(&test.images), &test.labels)?;
            if let Some([q, known]) = posteriors(&opt)? {
                let p = q.predict(&net.vs, SAMPLES, || net.probabilities(&test.images))?.mean;
                averaged.push(p, &test.labels)?;
                learned.push(known);
            }
        }
        Ok(Trained { name: name.to_owned(), at_mean, averaged, learned })
    }
}

/// The report, what it shows, and what IVON has learned.
pub fn run(train: &Examples, test: &Examples, folder: &Path) -> Outcome<(Value, Vec<Claim>, Vec<DiagonalGaussian>)> {
    let bar = progress("Adam (twice), VOGN and IVON, five seeds", 4 * SEEDS * steps(train.len(), EPOCHS));
    let task = Task { train, test, bar: &bar };
    let adam = ADAM.map(|lr| task.run(&format!("Adam, {lr:e}"), lr, adam, |_| Ok(None)));
    let [usual, best] = adam;
    let all = [usual?, best?, task.run("VOGN", LR, vogn, posteriors)?, task.run("IVON", LR, ivon, posteriors)?];
    bar.finish_and_clear();

    println!("  {:<18} {:>12}   {:>15}   {:>15}", "", "accuracy (%)", "NLL (nats)", "ECE");
    let mut report = Map::new();
    for t in &all {
        let averaged = (!t.learned.is_empty()).then_some(&t.averaged);
        [Some(&t.at_mean), averaged].into_iter().flatten().for_each(|p| {
            p.line();
            report.insert(p.name.clone(), p.json());
        });
    }
    let [adam, _, vogn, ivon] = all;
    let (point, bayes) = (&adam.at_mean, [&vogn.averaged, &ivon.averaged]);
    let diagrams = [point, bayes[0], bayes[1]].map(|p| {
        let labels = Tensor::cat(&vec![&test.labels; p.probabilities.len()], 0);
        let all = metrics::reliability(&Tensor::cat(&p.probabilities, 0), &labels, BINS);
        all.map(|all| (p.name.clone(), all))
    });
    pictures::reliability(&folder.join("calibration.svg"), &diagrams.into_iter().collect::<Result<Vec<_>>>()?)?;
    precisions(&[&vogn, &ivon], folder)?;

    let mut claims = Vec::new();
    for p in bayes {
        claims.push(Claim::below(format!("NLL of {} below that of {}", p.name, point.name), &p.nll, &point.nll, 5.0));
        claims.push(Claim::below(format!("ECE of {} below that of {}", p.name, point.name), &p.ece, &point.ece, 20.0));
    }
    Ok((Value::Object(report), claims, ivon.learned))
}

/// Histograms of the learned precisions, of all seeds.
fn precisions(trained: &[&Trained], folder: &Path) -> Outcome {
    let mut histograms = Vec::new();
    for t in trained {
        let mut logs = Vec::new();
        for q in &t.learned {
            for s in q.names().filter_map(|name| q.precision(name)) {
                logs.extend(Vec::<f64>::try_from(s.log10().flatten(0, -1).to_kind(Kind::Double))?);
            }
        }
        histograms.push((t.name.clone(), logs));
    }
    pictures::histograms(
        &folder.join("precisions.svg"),
        "log₁₀ of the learned precision of a weight, prior included",
        &histograms,
    )
}
