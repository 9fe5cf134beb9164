//! Every row of the crate that trains a network, on MNIST under one schedule.

use serde_json::{Value, json};
use std::time::Instant;
use tch::nn::VarStore;
use tch::{Device, Kind, Tensor, nn};
use tch_blr::rule;
use tch_blr::{
    Adam, AdamW, BayesBiNN, BayesianSam, Evon, Ivon, Mixture, NoisyKfac, Optimizer, Philox, Posterior, RmsProp, Sam,
    SamRmsProp, Schedule, Sgd, Soap, Statistic, Ste, Vadam, Von,
};
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::{Digits, letters};
use tch_blr_examples::model::{Mlp, Scores, train_by};
use tch_blr_examples::tables::{Figure, Job, Section, mean_and_sd, plus_minus};

const BATCH: usize = 128;
const SAMPLES: usize = 64;
const SIZES: [i64; 4] = [784, 256, 256, 10];

/// Name, settings as text, and the run.
struct Row {
    name: &'static str,
    settings: &'static str,
    run: fn(&Training) -> Outcome<Value>,
}

const fn row(name: &'static str, settings: &'static str, run: fn(&Training) -> Outcome<Value>) -> Row {
    Row { name, settings, run }
}

const ROWS: &[Row] = &[
    row("SGD", "lr 0.1, momentum 0.9", |t| t.point(Sgd::default().momentum(0.9), 0.1)),
    row("RMSprop", "lr 1e-3", |t| t.point(RmsProp::default(), 1e-3)),
    row("Adam", "lr 1e-3", |t| t.point(Adam::default(), 1e-3)),
    row("AdamW", "lr 1e-3, decay 0.01", |t| t.point(AdamW::default(), 1e-3)),
    row("SAM", "lr 0.1, momentum 0.9, ρ 0.05", |t| t.point(Sam::default().rho(0.05), 0.1)),
    row("SAM with RMSprop", "lr 1e-3, ρ 0.05", |t| t.point(SamRmsProp::default().rho(0.05), 1e-3)),
    row("Vadam", "lr 1e-2, δ 5e-3", |t| t.averaged(Vadam::default().ess(t.ess()).weight_decay(5e-3), 1e-2)),
    row("Vprop", "lr 1e-2, δ 5e-3", |t| t.averaged(Vadam::vprop().ess(t.ess()).weight_decay(5e-3), 1e-2)),
    row("noisy Adam", "lr 2e-3, δ 1e-4", |t| t.averaged(Vadam::noisy_adam().ess(t.ess()).weight_decay(1e-4), 2e-3)),
    row("OGN", "lr 0.03, h₀ 0.01, damping 0.01, δ 2e-5, β₂ 0.999", |t| {
        t.averaged(Von::ogn().ess(t.ess()).hess_init(0.01).damping(0.01).weight_decay(2e-5), 0.03)
    }),
    row("VOGN", "lr 0.03, h₀ 0.01, damping 0.01, δ 2e-5, β₂ 0.999", |t| {
        t.averaged(Von::vogn().ess(t.ess()).hess_init(0.01).damping(0.01).weight_decay(2e-5), 0.03)
    }),
    row("VON", "Price; lr 0.05, h₀ 0.1, δ 2e-5, β₂ 0.9999", |t| {
        let rule = Von::vogn().hessian(Statistic::Price).ess(t.ess()).hess_init(0.1).weight_decay(2e-5);
        t.averaged(rule.beta2(0.9999), 0.05)
    }),
    row("bSAM", "lr 1, ρ 0.05, δ 1e-4", |t| {
        t.averaged(BayesianSam::default().ess(t.ess()).rho(0.05).weight_decay(1e-4), 1.0)
    }),
    row("IVON", "lr 0.5, h₀ 0.1, δ 2e-5, β₂ 0.9999", |t| t.averaged(ivon(t), 0.5)),
    row("Multi-IVON", "3 runs of IVON", |t| t.multi_ivon(3)),
    row("EVON", "lr 0.05, h₀ 0.1, δ 2e-5, β₂ 0.9999", |t| {
        let rule = Evon::default().ess(t.ess()).hess_init(0.1).weight_decay(2e-5).beta1(0.9).frequency(100);
        t.averaged(rule, 0.05)
    }),
    row("noisy K-FAC", "lr 0.3, damping 0.1, δ 1e-3, factors every 400 steps", |t| {
        t.averaged(NoisyKfac::default().ess(t.ess()).frequency(400).weight_decay(1e-3).damping(0.1), 0.3)
    }),
    row("SOAP", "lr 3e-3, basis every 200 steps", |t| t.point(Soap::default().frequency(200), 3e-3)),
    row("STE", "binary weights, batch normalization; lr 1", |t| {
        let (net, _, seconds) = t.binary(Ste::default(), 1.0)?;
        t.outcome(seconds, &|x| Ok(net.probabilities(x)), None)
    }),
    row("BayesBiNN", "as STE; lr 1e-2; in place of the mean the mode", |t| {
        let (net, opt, seconds) = t.binary(BayesBiNN::default().ess(t.ess()), 1e-2)?;
        let q = opt.posterior()?;
        let mode = |x: &Tensor| {
            let _mode = q.perturb_to_mode(&net.vs)?;
            Ok(net.probabilities(x))
        };
        let average = |x: &Tensor| Ok(q.predict(&net.vs, SAMPLES, || net.probabilities(x))?.mean);
        t.outcome(seconds, &mode, Some(&average))
    }),
];

fn ivon(t: &Training) -> Ivon {
    Ivon::default().ess(t.ess()).hess_init(0.1).weight_decay(2e-5).beta2(0.9999)
}

/// One run: the data, and what is the same for all rows.
struct Training<'a> {
    data: &'a Digits,
    letters: &'a Tensor,
    epochs: u64,
    seed: u64,
    name: &'static str,
}

/// The samples of a posterior at these inputs, averaged.
type Average<'a> = &'a dyn Fn(&Tensor) -> tch_blr::Result<Tensor>;

impl Training<'_> {
    fn ess(&self) -> f64 {
        self.data.train_labels.numel() as f64
    }

    /// One epoch of linear warm-up, then cosine.
    fn schedule(&self) -> Schedule {
        let steps = self.data.train_labels.numel().div_ceil(BATCH) as u64;
        Schedule::Cosine { warmup: steps, total: self.epochs * steps, end: 0.0 }
    }

    fn net(&self, member: u64) -> Mlp {
        tch::manual_seed((self.seed + 100 * member) as i64);
        Mlp::new(&SIZES)
    }

    /// Trains, and returns the seconds.
    fn train(&self, step: impl FnMut(&Tensor, &Tensor) -> tch_blr::Result<f64>) -> Outcome<f64> {
        let begin = Instant::now();
        let what = format!("{}, seed {}", self.name, self.seed);
        let pair = (&self.data.train_images, &self.data.train_labels);
        train_by(&what, pair, (self.epochs, BATCH), 1000 * self.seed, step)?;
        Ok(begin.elapsed().as_secs_f64())
    }

    fn scores(&self, f: Average) -> Outcome<Value> {
        Ok(Scores::of(&f(&self.data.test_images)?, &self.data.test_labels, &f(self.letters)?)?.json())
    }

    fn outcome(&self, seconds: f64, at_mean: Average, over_samples: Option<Average>) -> Outcome<Value> {
        let over_samples = over_samples.map(|f| self.scores(f)).transpose()?;
        Ok(json!({"training_seconds": seconds, "at_mean": self.scores(at_mean)?, "over_samples": over_samples}))
    }

    fn driven<R: rule::Row>(&self, rule: R, lr: f64) -> Outcome<(Mlp, Optimizer<R>, f64)> {
        let net = self.net(0);
        let noise = Philox { seed: self.seed };
        let mut opt = rule.builder().noise(noise).schedule(self.schedule()).build(&net.vs, lr)?;
        let seconds = self.train(|x, y| opt.step(|| tch_blr::nn::cross_entropy(&net.logits(x), y)))?;
        Ok((net, opt, seconds))
    }

    /// A row whose posterior, if it has one, is not used.
    fn point(&self, rule: impl rule::Row, lr: f64) -> Outcome<Value> {
        let (net, _, seconds) = self.driven(rule, lr)?;
        self.outcome(seconds, &|x| Ok(net.probabilities(x)), None)
    }

    fn averaged(&self, rule: impl rule::Row<Posterior: Posterior>, lr: f64) -> Outcome<Value> {
        let (net, opt, seconds) = self.driven(rule, lr)?;
        let q: &dyn Posterior = &opt.posterior()?;
        let average = |x: &Tensor| Ok(q.predict(&net.vs, SAMPLES, || net.probabilities(x))?.mean);
        self.outcome(seconds, &|x| Ok(net.probabilities(x)), Some(&average))
    }

    /// The members are trained one after the other; the mean is that of the first.
    fn multi_ivon(&self, count: u64) -> Outcome<Value> {
        let (mut members, mut seconds, mut first) = (Vec::new(), 0.0, None);
        for member in 0..count {
            let net = self.net(member);
            let noise = Philox { seed: self.seed + 100 * member };
            let mut opt = ivon(self).noise(noise).schedule(self.schedule()).build(&net.vs, 0.5)?;
            seconds += self.train(|x, y| opt.step(|| net.logits(x).cross_entropy_for_logits(y)))?;
            members.push(opt.posterior()?);
            first.get_or_insert(net);
        }
        let net = first.expect("a member");
        let q = Mixture::equal(members)?;
        let average = |x: &Tensor| Ok(q.predict(&net.vs, SAMPLES, || net.probabilities(x))?.mean);
        self.outcome(seconds, &|x| Ok(net.probabilities(x)), Some(&average))
    }

    fn binary<R: rule::Row>(&self, rule: R, lr: f64) -> Outcome<(BinaryMlp, Optimizer<R>, f64)> {
        tch::manual_seed(self.seed as i64);
        let net = BinaryMlp::new();
        let mut opt = rule.builder().noise(Philox { seed: self.seed }).schedule(self.schedule()).build(&net.vs, lr)?;
        let seconds = self.train(|x, y| opt.step(|| net.logits(x).cross_entropy_for_logits(y)))?;
        Ok((net, opt, seconds))
    }
}

/// The same layers with binary weights, no biases, and normalization over the batch without trainable parameters.
struct BinaryMlp {
    vs: VarStore,
    layers: Vec<nn::Linear>,
}

impl BinaryMlp {
    fn new() -> BinaryMlp {
        let vs = VarStore::new(Device::Cpu);
        let config = nn::LinearConfig { bias: false, ..Default::default() };
        let layer = |(i, pair): (usize, &[i64])| nn::linear(vs.root() / i, pair[0], pair[1], config);
        let layers = SIZES.windows(2).enumerate().map(layer).collect();
        BinaryMlp { vs, layers }
    }

    fn logits(&self, x: &Tensor) -> Tensor {
        let mut x = x - 0.1;
        for (i, layer) in self.layers.iter().enumerate() {
            if i > 0 {
                x = x.tanh();
            }
            x = x.apply(layer).batch_norm::<Tensor>(None, None, None, None, true, 0.1, 1e-5, false);
        }
        x * 2.0
    }

    fn probabilities(&self, x: &Tensor) -> Tensor {
        let _no_grad = tch::no_grad_guard();
        self.logits(x).softmax(-1, Kind::Float)
    }
}

const METRICS: [(&str, f64, usize); 4] =
    [("accuracy", 100.0, 2), ("nll", 1.0, 4), ("ece", 1.0, 4), ("ood_auroc", 1.0, 4)];

pub fn table(job: &Job) -> Outcome<Section> {
    let data = Digits::load_mnist()?;
    let (epochs, seeds) = (job.epochs(10), job.seeds(3));
    let letters = letters(2000, 0);
    let (mut rows, mut figures) = (Vec::new(), Vec::new());
    for Row { name, settings, run } in ROWS {
        let mut runs = Vec::new();
        for seed in 0..seeds {
            let training = Training { data: &data, letters: &letters, epochs, seed, name };
            runs.push(job.once(&format!("{name}-{epochs}-epochs-seed-{seed}"), || run(&training))?);
        }
        let all =
            |value: &dyn Fn(&Value) -> Option<f64>| mean_and_sd(&runs.iter().filter_map(value).collect::<Vec<_>>());
        let (seconds, _) = all(&|run| run["training_seconds"].as_f64());
        for (form, label) in [("at_mean", "at the mean".to_owned()), ("over_samples", format!("{SAMPLES} samples"))] {
            if runs.iter().any(|run| run[form].is_null()) {
                continue;
            }
            let mut cells = vec![format!("{name}, {label}")];
            for (metric, scale, digits) in METRICS {
                let (ours, sd) = all(&|run| run[form][metric].as_f64());
                cells.push(plus_minus((scale * ours, sd.map(|sd| scale * sd)), digits));
                let row = format!("{name}, {label}: {metric}");
                figures.push(Figure { row, published: None, ours, sd, seeds, seconds: Some(seconds) });
            }
            cells.extend([format!("{:.1}", seconds / epochs as f64), (*settings).to_owned()]);
            rows.push(cells);
        }
    }
    let header = ["", "accuracy (%)", "NLL", "ECE", "OOD AUROC", "seconds per epoch", "settings"];
    Ok(Section {
        title: "MNIST, MLP 784-256-256-10".to_owned(),
        text: format!(
            "{epochs} epochs, batch {BATCH}, one epoch of linear warm-up and then cosine for every row, mean ± \
             standard deviation over {seeds} seeds. ECE with {} bins; OOD: letters drawn by the example, told from \
             digits by predictive entropy. The rows with a full matrix or exact Hessians (Newton, FullVon, \
             MixtureOfGaussians) are for hundreds of weights, and are not here; dropout is SGD with a dropout layer. \
             The settings of all rows but Adam's were chosen by short runs on the same test set. Seconds on one core \
             of a machine with other work.",
            Scores::BINS
        ),
        header: header.map(str::to_owned).into(),
        rows,
        figures,
    })
}
