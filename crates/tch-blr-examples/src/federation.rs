//! Clients with two digits each, and a server: federated learning on data that differ as much as they can.

use crate::Outcome;
use crate::batches::{Last, batches, subset};
use crate::digits::Digits;
use crate::handwritten::Forms;
use crate::model::Mlp;
use std::collections::BTreeMap;
use tch::{Kind, Tensor};
use tch_blr::federated::{Local, Method, Server};
use tch_blr::rows::StepLength;
use tch_blr::{DiagonalGaussian, Error, Ivon, Params, Sgd, clamp_information, metrics};

/// Images and labels.
pub type Examples = (Tensor, Tensor);

/// Data of all clients, and those that the server is measured on.
#[derive(Debug)]
pub struct Federation {
    /// Name and examples of each.
    pub clients: Vec<(String, Examples)>,
    /// On which settings are chosen.
    pub validation: Examples,
    /// On which results are reported.
    pub test: Examples,
    /// What the digits are, for people.
    pub source: String,
}

impl Federation {
    /// Client k has digits k and k+1, half of the first `most` of each; its neighbours have the other halves.
    fn clients((x, y): &Examples, most: i64) -> Vec<(String, Examples)> {
        let half = |digit: i64, part: i64| {
            let all = subset(y, &[digit]);
            let n = most.min(all.size()[0]);
            all.narrow(0, 0, n).slice(0, part, n, 2)
        };
        let client = |k: i64| {
            let next = (k + 1) % 10;
            let chosen = Tensor::cat(&[half(k, 0), half(next, 1)], 0);
            (format!("digits {k} and {next}"), (x.index_select(0, &chosen), y.index_select(0, &chosen)))
        };
        (0..10).map(client).collect()
    }

    /// MNIST: 500 images of each digit for the clients, 5,000 other training images to choose by, the test images.
    pub fn mnist(data: &Digits) -> Federation {
        let part = |start, n| (data.train_images.narrow(0, start, n), data.train_labels.narrow(0, start, n));
        let n = data.train_labels.size()[0];
        let held = (n / 6).min(5000);
        Federation {
            clients: Self::clients(&part(0, n - held), 500),
            validation: part(n - held, held),
            test: (data.test_images.shallow_clone(), data.test_labels.shallow_clone()),
            source: data.source.clone(),
        }
    }

    /// The digits that are part of the program: 386 for the clients.
    pub fn handwritten() -> Outcome<Federation> {
        let Forms { train, validation, test } = Forms::new()?;
        let pair = |e: crate::handwritten::Examples| (e.images, e.labels);
        Ok(Federation {
            clients: Self::clients(&pair(train), i64::MAX),
            validation: pair(validation),
            test: pair(test),
            source: "8×8 handwritten digits".to_owned(),
        })
    }
}

/// A method, and how its clients train.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// For people.
    pub name: &'static str,
    /// With its settings.
    pub method: Method,
    /// Of SGD for FedAvg, otherwise of IVON, whose steps are as long as Adam's.
    pub lr: f64,
    /// Of the prior around the common initial weights.
    pub prior_precision: f64,
    /// Every example counts 1/this times: a cold posterior.
    pub temperature: f64,
}

/// How long everybody trains.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Of the federation.
    pub rounds: usize,
    /// Of every client in every round.
    pub epochs: u64,
    /// Of a mini-batch.
    pub batch: usize,
    /// Units of the hidden layer.
    pub hidden: i64,
    /// Of the posterior for predictions.
    pub samples: usize,
}

/// What the server knows after a round.
#[derive(Debug, Clone, Copy)]
pub struct Score {
    /// Of the network at the mean.
    pub accuracy: f64,
    /// Of the network at the mean, in nats per example.
    pub nll: f64,
    /// Averaged over samples of the posterior; the same as `nll` if there is none.
    pub predictive_nll: f64,
}

impl Plan {
    /// Whether clients train a posterior.
    pub fn is_point(&self) -> bool {
        matches!(self.method, Method::FedAvg(_) | Method::FedLap(_) | Method::Admm(_))
    }

    /// Scores before the first round and after each, of the validation or the test examples.
    pub fn run(&self, data: &Federation, measured: &Examples, budget: &Budget, seed: u64) -> Outcome<Vec<Score>> {
        tch::manual_seed(seed as i64);
        let net = Mlp::new(&[measured.0.size()[1], budget.hidden, 10]);
        // By name: the order of a hash map is another one in every run, and samples go by the order.
        let start = BTreeMap::from_iter(net.vs.variables()).into_iter().map(|(name, w)| {
            let precision = w.full_like(self.prior_precision).detach();
            (name, w, precision)
        });
        let prior = DiagonalGaussian::new(start)?;
        let counts = data.clients.iter().map(|(name, (_, y))| (name.clone(), y.numel() as f64 / self.temperature));
        let mut server = Server::new(self.method, &prior, counts)?;
        let mut scores = vec![self.score(&net, &server, measured, budget)?];
        for round in 0..budget.rounds as u64 {
            let mut answers = Vec::new();
            for (k, (name, examples)) in data.clients.iter().enumerate() {
                let local = server.client(name)?;
                local.start(&net.vs)?;
                let seed = seed * 1_000_000 + round * 1000 + 100 * k as u64;
                let answer = if self.is_point() { Plan::weights } else { Plan::posterior };
                answers.push((name, answer(self, &net, &local, examples, budget, seed)?));
            }
            server.update(answers.iter().map(|(name, q)| (name, q)))?;
            scores.push(self.score(&net, &server, measured, budget)?);
        }
        Ok(scores)
    }

    fn weights(
        &self,
        net: &Mlp,
        local: &Local<DiagonalGaussian>,
        data: &Examples,
        budget: &Budget,
        seed: u64,
    ) -> Outcome<DiagonalGaussian> {
        let params = Params::from(&net.vs);
        let mut opt = Sgd::default().weight_decay(0.0).build(&net.vs, self.lr)?;
        train(data, budget, seed, |x, y| {
            opt.step(|| Ok::<_, Error>(net.logits(x).cross_entropy_for_logits(y) + local.penalty(&params)?))
        })?;
        Ok(local.at(&net.vs)?)
    }

    fn posterior(
        &self,
        net: &Mlp,
        local: &Local<DiagonalGaussian>,
        data: &Examples,
        budget: &Budget,
        seed: u64,
    ) -> Outcome<DiagonalGaussian> {
        let params = Params::from(&net.vs);
        let steps = budget.epochs * (data.1.numel() as u64).div_ceil(budget.batch as u64);
        // A memory shorter than the training, so that little of the start is left in the precision.
        let ivon = Ivon::default().ess(local.ess()).beta2(1.0 - 5.0 / (steps.max(10) as f64)).max_growth(2.0);
        let ivon = ivon.step_length(StepLength::Adam { beta: 0.99 });
        let mut opt = ivon.prior(local.prior()).noise(tch_blr::Philox { seed }).build(&net.vs, self.lr)?;
        train(data, budget, seed, |x, y| {
            opt.step(|| Ok::<_, Error>(net.logits(x).cross_entropy_for_logits(y) + local.correction(&params)?))
        })?;
        let q = opt.posterior()?;
        // A noisy estimate may find less than the prior knew. A sum of posteriors needs more than that of each.
        Ok(if let Method::PosteriorMerge(_) = self.method { clamp_information(&q, local.prior())? } else { q })
    }

    fn score(
        &self,
        net: &Mlp,
        server: &Server<DiagonalGaussian>,
        (x, y): &Examples,
        budget: &Budget,
    ) -> Outcome<Score> {
        let q = server.posterior();
        q.copy_mean_to(&net.vs)?;
        let p = net.probabilities(x);
        let (accuracy, nll) = (metrics::accuracy(&p, y)?, metrics::nll(&p, y)?);
        let predictive_nll = if self.is_point() {
            nll
        } else {
            let p = q.predict(&net.vs, budget.samples, || net.logits(x).softmax(-1, Kind::Float))?;
            metrics::nll(&p.mean, y)?
        };
        Ok(Score { accuracy, nll, predictive_nll })
    }
}

fn train(
    (x, y): &Examples,
    budget: &Budget,
    seed: u64,
    mut step: impl FnMut(&Tensor, &Tensor) -> tch_blr::Result<f64>,
) -> Outcome {
    for epoch in 0..budget.epochs {
        for (x, y) in batches(x, y, budget.batch, seed + epoch, Last::Keep) {
            step(&x, &y)?;
        }
    }
    Ok(())
}
