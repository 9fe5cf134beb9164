//! A tenth of MNIST's labels: what each posterior makes of the same network, settings by a validation split.

use serde_json::{Value, json};
use std::time::Instant;
use tch::Tensor;
use tch_blr::fisher::Fisher;
use tch_blr::laplace::{Laplace, Link, PriorSearch};
use tch_blr::metrics::{self, Temperature};
use tch_blr::{Adam, DiagonalGaussian, Ivon, Mixture, Params, Philox, Posterior, Schedule, Sgd, Swag};
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::model::{Mlp, train};
use tch_blr_examples::random::Rng;
use tch_blr_examples::tables::{Figure, Job, Section, mean_and_sd, plus_minus};

const LABELS: usize = 6000;
/// Of these labels.
const VALIDATION: usize = 1000;
const BATCH: usize = 50;
const SAMPLES: usize = 64;
const BINS: usize = 15;
const SIZES: [i64; 4] = [784, 256, 256, 10];

const DECAYS: [f64; 4] = [1e-4, 1e-3, 3e-3, 1e-2];
const SWAG_RATES: [f64; 3] = [0.03, 0.1, 0.3];
const IVON_RATES: [f64; 4] = [3e-4, 1e-3, 3e-3, 1e-2];
const TEMPERATURES: [f64; 7] = [0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0];
const MEMBERS: u64 = 5;
/// Iterates that SWAG collects, one per epoch, after the other epochs.
const COLLECTED: u64 = 20;

type Examples = (Tensor, Tensor);

/// The labels of one seed.
struct Split<'a> {
    train: Examples,
    validation: Examples,
    test: (&'a Tensor, &'a Tensor),
    epochs: u64,
    seed: u64,
}

/// One method: what it chose, its probabilities on the test images, and the seconds of all trainings and passes.
struct Row {
    name: &'static str,
    chosen: String,
    test: Tensor,
    seconds: f64,
}

/// Average over samples at these images.
fn average(q: &dyn Posterior, net: &Mlp, images: &Tensor) -> tch_blr::Result<Tensor> {
    Ok(q.predict(&net.vs, SAMPLES, || net.probabilities(images))?.mean)
}

/// The setting of the lowest validation NLL, and what was trained with it.
fn best<S: Copy, T>(settings: &[S], mut run: impl FnMut(S) -> Outcome<(f64, T)>) -> Outcome<(S, T)> {
    let mut best: Option<(f64, S, T)> = None;
    for &setting in settings {
        let (nll, result) = run(setting)?;
        if best.as_ref().is_none_or(|(lowest, ..)| nll < *lowest) {
            best = Some((nll, setting, result));
        }
    }
    let (_, setting, result) = best.ok_or("no setting")?;
    Ok((setting, result))
}

impl Split<'_> {
    fn net(&self, member: u64) -> Mlp {
        tch::manual_seed((100 * self.seed + member) as i64);
        Mlp::new(&SIZES)
    }

    fn examples(&self) -> f64 {
        self.train.1.numel() as f64
    }

    fn steps(&self) -> u64 {
        self.epochs * self.train.1.numel().div_ceil(BATCH) as u64
    }

    fn train_with<R: tch_blr::rule::Row>(
        &self,
        what: &str,
        net: &Mlp,
        opt: &mut tch_blr::Optimizer<R>,
        epochs: u64,
        member: u64,
    ) -> Outcome<()> {
        let seed = 10_000 * self.seed + 1000 * member;
        train(what, net, opt, (&self.train.0, &self.train.1), (epochs, BATCH), seed)?;
        Ok(())
    }

    fn validation_nll(&self, p: &Tensor) -> tch_blr::Result<f64> {
        metrics::nll(p, &self.validation.1)
    }

    fn rows(&self) -> Outcome<Vec<Row>> {
        let begin = Instant::now();
        let (decay, net) = best(&DECAYS, |decay| {
            let net = self.net(0);
            let schedule = Schedule::Cosine { warmup: 0, total: self.steps(), end: 0.0 };
            let mut opt = Adam::default().weight_decay(decay).schedule(schedule).build(&net.vs, 1e-3)?;
            self.train_with("MAP", &net, &mut opt, self.epochs, 0)?;
            Ok((self.validation_nll(&net.probabilities(&self.validation.0))?, net))
        })?;
        let of_map = begin.elapsed().as_secs_f64();
        let map = net.probabilities(self.test.0);
        let mut rows =
            vec![Row { name: "MAP", chosen: format!("δ {decay}"), test: map.shallow_clone(), seconds: of_map }];

        let t = Temperature::fit_averaged(&net.probabilities(&self.validation.0), &self.validation.1)?;
        let test = t.apply_averaged(&map)?;
        rows.push(Row { name: "MAP, temperature", chosen: format!("T {:.2}", t.value()), test, seconds: of_map });

        let begin = Instant::now();
        let (x, y) = &self.train;
        let f = Fisher::exact().kronecker(Params::from(&net.vs).last_layer()?, [(x, y)], |x| net.logits(x))?;
        let mut laplace = Laplace::new(f, decay * self.examples())?;
        laplace.optimize_prior(&PriorSearch::mackay())?;
        let p = laplace.precisions().next().map_or(f64::NAN, |(_, p)| p);
        let outputs = laplace.predict(&net.vs, || net.logits(self.test.0))?;
        let seconds = of_map + begin.elapsed().as_secs_f64();
        for (name, link) in [
            ("last-layer Laplace, probit", Link::Probit),
            ("last-layer Laplace, pairwise probit", Link::PairwiseProbit),
        ] {
            let test = outputs.probabilities(link)?;
            rows.push(Row { name, chosen: format!("p {p:.1} by evidence"), test, seconds });
        }

        rows.push(self.swag(decay)?);
        let (lr, single, multi) = self.ivon()?;
        rows.push(Row { chosen: format!("lr {lr}"), ..single });
        rows.push(Row { chosen: format!("lr {lr}, {MEMBERS} runs"), ..multi });
        Ok(rows)
    }

    /// SGD at a constant rate, its last epochs collected.
    fn swag(&self, decay: f64) -> Outcome<Row> {
        let begin = Instant::now();
        let (rate, (net, q, tau)) = best(&SWAG_RATES, |rate| {
            let net = self.net(0);
            let mut opt = Sgd::default().momentum(0.9).weight_decay(decay).build(&net.vs, rate)?;
            self.train_with("SWAG", &net, &mut opt, self.epochs.saturating_sub(COLLECTED), 0)?;
            let mut swag = Swag::new(&net.vs, COLLECTED as usize)?;
            for epoch in 0..COLLECTED {
                self.train_with("SWAG, collecting", &net, &mut opt, 1, 100 + epoch)?;
                swag.collect()?;
            }
            let mut lowest = f64::INFINITY;
            let (tau, q) = swag.posterior()?.fit_temperature(TEMPERATURES, |q| {
                let nll = self.validation_nll(&average(q, &net, &self.validation.0)?)?;
                lowest = lowest.min(nll);
                Ok(nll)
            })?;
            Ok((lowest, (net, q, tau)))
        })?;
        let test = average(&q, &net, self.test.0)?;
        let chosen = format!("lr {rate}, c {tau}");
        Ok(Row { name: "SWAG", chosen, test, seconds: begin.elapsed().as_secs_f64() })
    }

    /// The learning rate of the best single run, this run, and a mixture of several with that rate.
    fn ivon(&self) -> Outcome<(f64, Row, Row)> {
        let run = |lr: f64, member: u64| -> Outcome<(Mlp, DiagonalGaussian)> {
            let net = self.net(member);
            let noise = Philox { seed: 100 * self.seed + member };
            let mut opt = Ivon::auto(self.examples(), self.steps()).noise(noise).build(&net.vs, lr)?;
            self.train_with("IVON", &net, &mut opt, self.epochs, member)?;
            Ok((net, opt.posterior()?))
        };
        let begin = Instant::now();
        let (lr, (net, q)) = best(&IVON_RATES, |lr| {
            let (net, q) = run(lr, 0)?;
            Ok((self.validation_nll(&average(&q, &net, &self.validation.0)?)?, (net, q)))
        })?;
        let test = average(&q, &net, self.test.0)?;
        let seconds = begin.elapsed().as_secs_f64();
        let single = Row { name: "IVON", chosen: String::new(), test, seconds };
        let others = (1..MEMBERS).map(|member| Ok(run(lr, member)?.1)).collect::<Outcome<Vec<_>>>()?;
        let mixture = Mixture::equal([q].into_iter().chain(others))?;
        let test = average(&mixture, &net, self.test.0)?;
        let seconds = begin.elapsed().as_secs_f64();
        Ok((lr, single, Row { name: "Multi-IVON", chosen: String::new(), test, seconds }))
    }
}

fn run(data: &Digits, epochs: u64, seed: u64) -> Outcome<Value> {
    let mut order: Vec<i64> = (0..data.train_labels.numel() as i64).collect();
    Rng::new(seed, 60).shuffle(&mut order);
    let some = |positions: &[i64]| {
        let at = Tensor::from_slice(positions);
        (data.train_images.index_select(0, &at), data.train_labels.index_select(0, &at))
    };
    let (validation, train) = (some(&order[..VALIDATION]), some(&order[VALIDATION..LABELS]));
    let split = Split { train, validation, test: (&data.test_images, &data.test_labels), epochs, seed };
    let scores = |row: Row| -> Outcome<Value> {
        let (p, y) = (&row.test, split.test.1);
        Ok(json!({
            "name": row.name, "chosen": row.chosen, "seconds": row.seconds, "accuracy": metrics::accuracy(p, y)?,
            "nll": metrics::nll(p, y)?, "ece": metrics::ece(p, y, BINS)?, "augrc": metrics::selective(p, y)?.augrc(),
        }))
    };
    Ok(split.rows()?.into_iter().map(scores).collect::<Outcome<Vec<_>>>()?.into())
}

const METRICS: [(&str, f64, usize); 4] =
    [("accuracy", 100.0, 2), ("nll", 1.0, 4), ("ece", 100.0, 2), ("augrc", 1e3, 2)];

pub fn table(job: &Job) -> Outcome<Section> {
    let data = Digits::load_mnist()?;
    let (epochs, seeds) = (job.epochs(40), job.seeds(3));
    let key = |seed: u64| format!("{epochs}-epochs-seed-{seed}");
    let runs = (0..seeds).map(|seed| job.once(&key(seed), || run(&data, epochs, seed)));
    let runs = runs.collect::<Outcome<Vec<_>>>()?;
    let (mut rows, mut figures) = (Vec::new(), Vec::new());
    for i in 0..runs[0].as_array().map_or(0, Vec::len) {
        let text = |what: &str| runs.iter().filter_map(|run| run[i][what].as_str()).collect::<Vec<_>>();
        let all = |what: &str| mean_and_sd(&runs.iter().filter_map(|run| run[i][what].as_f64()).collect::<Vec<_>>());
        let name = text("name")[0];
        let mut cells = vec![name.to_owned()];
        let seconds = all("seconds").0;
        for (metric, scale, digits) in METRICS {
            let (ours, sd) = all(metric);
            cells.push(plus_minus((scale * ours, sd.map(|sd| scale * sd)), digits));
            let row = format!("{name}: {metric}");
            figures.push(Figure { row, published: None, ours, sd, seeds, seconds: Some(seconds) });
        }
        cells.extend([format!("{seconds:.0}"), text("chosen").join("; ")]);
        rows.push(cells);
    }
    let header = ["", "accuracy (%)", "NLL", "ECE (%)", "AUGRC (10⁻³)", "seconds", "chosen, by seed"];
    Ok(Section {
        title: "MNIST with a tenth of the labels".to_owned(),
        text: format!(
            "MLP 784-256-256-10, {epochs} epochs of batches of {BATCH}. {LABELS} labels, other ones for each seed, of which \
             {VALIDATION} choose the settings by their NLL and the others train; scored once on the test set, mean ± standard \
             deviation over {seeds} seeds; ECE with {BINS} bins. MAP: Adam 1e-3, cosine, δ of {DECAYS:?}. Temperature: on the \
             same validation labels. Last-layer Laplace: Kronecker-factored, p by evidence. SWAG: SGD with momentum at a \
             constant rate of {SWAG_RATES:?}, {COLLECTED} iterates, scale of {TEMPERATURES:?}. IVON: `Ivon::auto`, lr of \
             {IVON_RATES:?}; Multi-IVON: {MEMBERS} such runs. {SAMPLES} samples. Seconds with the search for the settings, on \
             one core beside other work."
        ),
        header: header.map(str::to_owned).into(),
        rows,
        figures,
    })
}
