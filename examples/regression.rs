//! A regression with a gap in its data: what do Laplace's approximation, IVON and VOGN know of what they have not seen?
//!
//! `cargo run --release --example regression [-- OUTPUT_FOLDER]`
//!
//! The setting is close to that of Khan et al. (2019, *Approximate Inference Turns Deep Networks into Gaussian
//! Processes*): 1-32-1, noise σ = 0.286, prior N(0, 1/0.1) on every weight, no data for 1.5 < x < 3, full batches; but
//! with tanh, inputs relative to 3, and one in six of the other points held out, too. Laplace's approximation has the
//! whole Gauss-Newton matrix; IVON's and VOGN's posteriors are diagonal, which can leave less doubt between data than
//! there should be (shown for ReLU by Foong et al. 2020, *On the Expressiveness of Approximate Inference in Bayesian
//! Neural Networks*).

use clap::Parser;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::nn::{Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::fisher::Fisher;
use tch_blr::metrics::{Forecast, ks_uniform};
use tch_blr::nn::{self, Likelihood};
use tch_blr::rule::Row;
use tch_blr::sensitivity::{DualView, jacobian};
use tch_blr::{Adam, Expectation, Ivon, Optimizer, Posterior, Prior, Schedule, Von};
use tch_blr_examples::pictures::bands::{Panel, bands};
use tch_blr_examples::random::Rng;
use tch_blr_examples::{Outcome, data, output};

const HIDDEN: i64 = 32;
const SIGMA: f64 = 0.286;
/// Prior precision of a weight.
const DELTA: f64 = 0.1;
const GAP: (f64, f64) = (1.5, 3.0);
/// Every so many of the points beside the gap are held out.
const HELD_OUT: usize = 6;
const STEPS: u64 = 20_000;
/// For the predictions of IVON and VOGN.
const SAMPLES: usize = 1000;
/// What is drawn.
const EXTENT: ((f64, f64), (f64, f64)) = ((-1.5, 7.5), (-4.0, 4.0));

/// A regression with a gap in its data: what do Laplace's approximation, IVON and VOGN know of what they have not seen?
///
/// Writes bands.svg and report.json. Fails if Laplace's approximation is not less sure in the gap than beside it, or
/// differs from the Gaussian process that it is. Takes about a minute. The data are Snelson's if $TCH_BLR_DATA/snelson
/// has train_inputs and train_outputs, otherwise drawn by the example.
#[derive(Parser)]
struct Arguments {
    /// Where picture and report go
    #[arg(default_value = "target/regression")]
    output_folder: PathBuf,
}

fn main() -> Outcome {
    let folder = Arguments::parse().output_folder;
    output::create(&folder)?;
    let started = Instant::now();
    let data = Data::load()?;
    println!(
        "Data: {} ({} training points, {} held out beside the gap and {} in it)",
        data.source,
        data.train.len(),
        data.beside.len(),
        data.inside.len()
    );
    let (laplace, checks) = laplace(&data)?;
    let n = data.train.len() as f64;
    let schedule = Schedule::Cosine { warmup: STEPS / 20, total: STEPS, end: 0.0 };
    let antithetic = Expectation::Antithetic { pairs: 1 };
    let ivon = Ivon::default().ess(n).weight_decay(DELTA / n).hess_init(1.0).beta2(0.999).expectation(antithetic);
    let ivon = sampled("IVON", &data, |net| ivon.schedule(schedule).build(&net.vs, 0.3))?;
    let vogn = Von::vogn().ess(n).weight_decay(DELTA / n).hess_init(1.0).beta2(0.999).expectation(antithetic);
    let vogn = sampled("VOGN", &data, |net| vogn.schedule(schedule).build(&net.vs, 0.05))?;

    let all = [laplace, ivon, vogn];
    println!("\n                NLL (nats per point)           mean deviation of the function");
    println!("           train   beside gap    in gap      in gap   beside   ratio  seconds");
    for m in &all {
        let [train, beside, inside] = m.nll;
        let [gap, rest] = m.deviation;
        println!(
            "{:<8} {train:>7.3}  {beside:>11.3} {inside:>9.3}   {gap:>9.3} {rest:>8.3} {:>7.2} {:>8.1}",
            m.name,
            gap / rest,
            m.seconds
        );
    }
    println!("\n              held out beside the gap: y in the central interval of");
    println!("          CRPS    50 %    90 %    width of 90 %   interval score   PIT (at most {:.2})", data.uniform());
    for m in &all {
        let Intervals { crps, coverage: [half, most], width, score, pit } = m.intervals;
        println!("{:<8} {crps:>5.3} {half:>7.2} {most:>7.2} {width:>16.2} {score:>16.2} {pit:>8.2}", m.name);
    }
    draw(&data, &all, &folder)?;

    let report = json!({
        "data": data.source,
        "methods": all.iter().map(Method::json).collect::<Vec<_>>(),
        "laplace": checks.json(),
        "seconds": started.elapsed().as_secs_f64(),
    });
    output::report(&folder, &report)?;
    println!("\nPicture and report in {} ({:.0} s)", folder.display(), started.elapsed().as_secs_f64());
    let [gap, rest] = all[0].deviation;
    if gap <= rest {
        return Err(format!("Laplace: deviation {gap:.4} in the gap, {rest:.4} beside it: expected more in it").into());
    }
    if checks.difference > 1e-6 {
        return Err(format!("Laplace and the Gaussian process differ by {:.1e} (relative)", checks.difference).into());
    }
    Ok(())
}

// --- Data ---

type Points = Vec<(f64, f64)>;

struct Data {
    train: Points,
    /// Held out, outside of the gap and in it.
    beside: Points,
    inside: Points,
    source: &'static str,
}

impl Data {
    fn load() -> Outcome<Data> {
        let folder = data::folder().map(|data| data.join("snelson"));
        let (points, source) = match folder.filter(|f| f.is_dir()) {
            Some(folder) => {
                let (x, y) =
                    (data::numbers(&folder.join("train_inputs"))?, data::numbers(&folder.join("train_outputs"))?);
                if x.len() != y.len() {
                    return Err(format!("{}: {} inputs and {} outputs", folder.display(), x.len(), y.len()).into());
                }
                (x.into_iter().zip(y).collect(), "Snelson's")
            }
            None => (waves(200), "two waves with noise"),
        };
        let (inside, outside): (Points, Points) = points.iter().partition(|p| GAP.0 < p.0 && p.0 < GAP.1);
        let (beside, train): (Vec<_>, Vec<_>) = outside.into_iter().enumerate().partition(|(i, _)| i % HELD_OUT == 0);
        let only = |v: Vec<(usize, (f64, f64))>| v.into_iter().map(|p| p.1).collect();
        Ok(Data { train: only(train), beside: only(beside), inside, source })
    }

    /// The distance from uniform PIT values that right predictions stay below in nineteen of twenty cases.
    fn uniform(&self) -> f64 {
        1.36 / (self.beside.len() as f64).sqrt()
    }

    /// Of the training data, in which deviations are compared.
    fn range(&self) -> (f64, f64) {
        let x = || self.train.iter().map(|p| p.0);
        (x().fold(f64::INFINITY, f64::min), x().fold(f64::NEG_INFINITY, f64::max))
    }
}

fn waves(n: usize) -> Points {
    let mut rng = Rng::new(0, 0);
    let point = |_| {
        let x = rng.between(0.0, 6.0);
        (x, (2.0 * x + 2.5).sin() + 0.7 * (0.9 * x + 2.0).sin() + SIGMA * rng.normal())
    };
    (0..n).map(point).collect()
}

/// x `[N, 1]` and y `[N, 1]`
fn tensors(points: &[(f64, f64)]) -> [Tensor; 2] {
    let (x, y): (Vec<f64>, Vec<f64>) = points.iter().copied().unzip();
    [x, y].map(|v| Tensor::from_slice(&v).unsqueeze(1))
}

fn numbers(t: &Tensor) -> Outcome<Vec<f64>> {
    Ok(Vec::try_from(t.reshape([-1]))?)
}

// --- Model ---

struct Net {
    vs: VarStore,
    layers: [nn::Linear; 2],
}

impl Net {
    /// The same weights at every call.
    fn new() -> Net {
        tch::manual_seed(0);
        let mut vs = VarStore::new(Device::Cpu);
        let hidden = nn::linear(vs.root() / "hidden", 1, HIDDEN, tch::nn::LinearConfig::default());
        let output = nn::linear(vs.root() / "output", HIDDEN, 1, tch::nn::LinearConfig::default());
        vs.double();
        Net { vs, layers: [hidden, output] }
    }

    /// `[N, 1]`. Inputs are taken relative to 3, the middle of the data.
    fn forward(&self, x: &Tensor) -> Tensor {
        let [hidden, output] = &self.layers;
        output.forward(&hidden.forward(&(x - 3.0)).tanh())
    }
}

fn train<R: Row>(opt: &mut Optimizer<R>, net: &Net, data: &Data) -> Outcome<()> {
    let [x, y] = tensors(&data.train);
    for _ in 0..STEPS {
        opt.step(|| nn::squared_error(&net.forward(&x), &y, SIGMA * SIGMA))?;
    }
    Ok(())
}

// --- Predictions ---

struct Method {
    name: &'static str,
    /// x, mean, deviations of the function and of an observation.
    curve: Vec<[f64; 4]>,
    /// -ln p(y | x, data), a mean: of the training data, the points held out beside the gap, and those in it.
    nll: [f64; 3],
    /// Mean deviation of the function in the gap, and in the rest of the range of the data.
    deviation: [f64; 2],
    intervals: Intervals,
    seconds: f64,
}

/// How far predictions of y can be relied on, for the points held out beside the gap.
struct Intervals {
    crps: f64,
    /// Of the intervals of 50 and 90 %.
    coverage: [f64; 2],
    /// Of 90 %.
    width: f64,
    score: f64,
    /// Distance of the PIT values from uniform ones.
    pit: f64,
}

impl Intervals {
    fn new(forecast: &Forecast, y: &Tensor) -> Outcome<Intervals> {
        let [half, most] = [forecast.interval(0.5)?, forecast.interval(0.9)?];
        Ok(Intervals {
            crps: forecast.crps(y)?,
            coverage: [half.coverage(y)?, most.coverage(y)?],
            width: most.width()?,
            score: most.score(y)?,
            pit: ks_uniform(&forecast.pit(y)?.reshape([-1]))?,
        })
    }

    fn json(&self) -> Value {
        json!({
            "crps": self.crps,
            "coverage_50": self.coverage[0],
            "coverage_90": self.coverage[1],
            "width_90": self.width,
            "interval_score_90": self.score,
            "pit_ks": self.pit,
        })
    }
}

impl Method {
    /// `forecast` predicts y `[N, 1]`, noise included, at x `[N, 1]`.
    fn new(
        name: &'static str,
        data: &Data,
        started: Instant,
        forecast: impl Fn(&Tensor) -> tch_blr::Result<Forecast>,
    ) -> Outcome<Method> {
        let ((x0, x1), _) = EXTENT;
        let x = Tensor::linspace(x0, x1, 361, (Kind::Double, Device::Cpu));
        let curve = forecast(&x.unsqueeze(1))?;
        let variance = curve.variance()?;
        let columns =
            [&x, &curve.mean()?, &(&variance - SIGMA * SIGMA).sqrt(), &variance.sqrt()].map(|t| t.reshape([-1]));
        let rows = numbers(&Tensor::stack(&columns, 1))?;
        let curve: Vec<[f64; 4]> = rows.chunks_exact(4).map(|r| [r[0], r[1], r[2], r[3]]).collect();
        let (low, high) = data.range();
        let average = |inside: bool| {
            let here = |c: &&[f64; 4]| (low..=high).contains(&c[0]) && (GAP.0 < c[0] && c[0] < GAP.1) == inside;
            let (sum, n) = curve.iter().filter(here).fold((0.0, 0.0), |(sum, n), c| (sum + c[2], n + 1.0));
            sum / n
        };
        let deviation = [average(true), average(false)];
        let nll = |points: &[(f64, f64)]| {
            let [x, y] = tensors(points);
            forecast(&x)?.nll(&y)
        };
        let nll = [nll(&data.train)?, nll(&data.beside)?, nll(&data.inside)?];
        let [x, y] = tensors(&data.beside);
        let intervals = Intervals::new(&forecast(&x)?, &y)?;
        Ok(Method { name, curve, nll, deviation, intervals, seconds: started.elapsed().as_secs_f64() })
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "nll": {"train": self.nll[0], "held_out_beside_the_gap": self.nll[1], "held_out_in_the_gap": self.nll[2]},
            "deviation": {"in_the_gap": self.deviation[0], "beside": self.deviation[1]},
            "held_out_beside_the_gap": self.intervals.json(),
            "seconds": self.seconds,
        })
    }
}

/// What else is known of Laplace's approximation.
struct Checks {
    /// Largest relative difference of the variance as a Gaussian process from that of the posterior over the weights.
    difference: f64,
    /// ‖Φᵀα/δ - θ‖/‖θ‖, zero at the optimum.
    stationarity: f64,
    effective_parameters: f64,
    log_marginal_likelihood: f64,
}

impl Checks {
    fn json(&self) -> Value {
        json!({
            "difference": self.difference,
            "stationarity": self.stationarity,
            "effective_parameters": self.effective_parameters,
            "log_marginal_likelihood": self.log_marginal_likelihood,
        })
    }
}

/// Adam, and the network linearized where it ends: f(x) ~ N(f(x; θ), φ(x)ᵀS⁻¹φ(x)) with the Jacobian φ.
fn laplace(data: &Data) -> Outcome<(Method, Checks)> {
    let started = Instant::now();
    let net = Net::new();
    let n = data.train.len() as f64;
    let schedule = Schedule::Cosine { warmup: STEPS / 20, total: STEPS, end: 0.0 };
    let mut adam = Adam::default().weight_decay(DELTA / n).schedule(schedule).build(&net.vs, 0.1)?;
    train(&mut adam, &net, data)?;

    let [x, y] = tensors(&data.train);
    let noise = Likelihood::Gaussian { variance: SIGMA * SIGMA };
    let view = DualView::linearized(&net.vs, || net.forward(&x), &y.squeeze_dim(1), noise, DELTA)?;
    let variance = |x: &Tensor| -> tch_blr::Result<Tensor> {
        Ok(view.predict(&jacobian(&net.vs, || net.forward(x))?)?.variance.unsqueeze(1))
    };
    let forecast = |x: &Tensor| Forecast::gaussian(&tch::no_grad(|| net.forward(x)), &(variance(x)? + SIGMA * SIGMA));
    let method = Method::new("Laplace", data, started, forecast)?;

    // The same posterior, over the weights.
    let q =
        Fisher::exact().likelihood(noise).full(&net.vs, [&x], |x| net.forward(x))?.laplace(Prior::isotropic(DELTA))?;
    let theirs = q.output_covariance(&net.vs, || net.forward(&x))?.reshape([-1]);
    let ours = variance(&x)?.squeeze_dim(1);
    let off = view.representer()? - view.weights();
    let checks = Checks {
        difference: ((ours - &theirs) / theirs).abs().max().double_value(&[]),
        stationarity: (off.norm() / view.weights().norm()).double_value(&[]),
        effective_parameters: view.effective_parameters()?,
        log_marginal_likelihood: view.log_marginal_likelihood()?,
    };
    println!(
        "Laplace: {:.1} effective parameters of {}, log marginal likelihood {:.1} nats; ‖Φᵀα/δ - θ‖/‖θ‖ = {:.1e} (0 at \
         the optimum); differs from the posterior over the weights by {:.1e}",
        checks.effective_parameters,
        view.weights().numel(),
        checks.log_marginal_likelihood,
        checks.stationarity,
        checks.difference
    );
    Ok((method, checks))
}

/// The network itself with weights drawn from the posterior.
fn sampled<R: Row<Posterior: Posterior>>(
    name: &'static str,
    data: &Data,
    build: impl Fn(&Net) -> tch_blr::Result<Optimizer<R>>,
) -> Outcome<Method> {
    let started = Instant::now();
    let net = Net::new();
    let mut opt = build(&net)?;
    train(&mut opt, &net, data)?;
    let q: &dyn Posterior = &opt.posterior()?;
    let forecast = |x: &Tensor| q.predict_regression(&net.vs, SAMPLES, || (net.forward(x), SIGMA * SIGMA));
    Method::new(name, data, started, forecast)
}

fn draw(data: &Data, all: &[Method], folder: &Path) -> Outcome<()> {
    let panel = |m: &Method| Panel {
        title: m.name.to_owned(),
        curve: m.curve.clone(),
        seen: data.train.clone(),
        held_out: data.beside.iter().chain(&data.inside).copied().collect(),
    };
    bands(&folder.join("bands.svg"), &all.iter().map(panel).collect::<Vec<_>>(), EXTENT, GAP)
}
