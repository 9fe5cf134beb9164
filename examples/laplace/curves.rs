//! Evidence and held-out loss over prior precisions and widths.

use serde_json::{Value, json};
use std::path::Path;
use tch::nn::{LinearConfig, Module, VarStore};
use tch::{Device, Kind, Tensor};
use tch_blr::fisher::Fisher;
use tch_blr::laplace::{Laplace, Link};
use tch_blr::nn::{self, Likelihood};
use tch_blr::{Adam, Schedule, metrics};
use tch_blr_examples::moons::moons;
use tch_blr_examples::pictures::{Curves, training_curves};
use tch_blr_examples::random::Rng;
use tch_blr_examples::{Outcome, data};

/// Noise of Snelson's data, as in `--example regression`.
const SIGMA: f64 = 0.286;
const STEPS: u64 = 3000;
/// Parts of which one is held out in turn; every other number is a mean over them.
const FOLDS: i64 = 5;
/// Half a decade apart.
const PRECISIONS: [f64; 11] = [-3.0, -2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0];
const WIDTHS: [i64; 7] = [1, 2, 4, 8, 16, 32, 64];
/// While the other varies.
const WIDTH: i64 = 16;

/// A problem with what is held out of it, fold by fold.
struct Problem {
    name: &'static str,
    likelihood: Likelihood,
    outputs: i64,
    x: Tensor,
    y: Tensor,
    /// The same held-out data for every fold instead of the fold's own.
    other: Option<[Tensor; 2]>,
}

/// -ln Z and -ln p(held out), both in nats per example; how far the mean over folds is uncertain does not matter,
/// because the folds are the same everywhere.
struct Found {
    evidence: f64,
    held_out: f64,
}

impl Problem {
    fn snelson() -> Outcome<Problem> {
        let folder = data::folder().map(|data| data.join("snelson"));
        let (x, y): (Vec<f64>, Vec<f64>) = if let Some(folder) = folder.filter(|f| f.is_dir()) {
            (data::numbers(&folder.join("train_inputs"))?, data::numbers(&folder.join("train_outputs"))?)
        } else {
            let mut rng = Rng::new(0, 0);
            let point = |_| {
                let x = rng.between(0.0, 6.0);
                (x, (2.0 * x + 2.5).sin() + 0.7 * (0.9 * x + 2.0).sin() + SIGMA * rng.normal())
            };
            (0..200).map(point).unzip()
        };
        let column = |v: Vec<f64>| Tensor::from_slice(&v).unsqueeze(1);
        let likelihood = Likelihood::Gaussian { variance: SIGMA * SIGMA };
        Ok(Problem { name: "Snelson", likelihood, outputs: 1, x: column(x) - 3.0, y: column(y), other: None })
    }

    fn moons() -> Problem {
        let wide = |(x, y): (Tensor, Tensor)| [x.to_kind(Kind::Double), y];
        let [x, y] = wide(moons(200, 0.3, 1));
        let other = Some(wide(moons(5000, 0.3, 2)));
        Problem { name: "two moons", likelihood: Likelihood::Categorical, outputs: 2, x, y, other }
    }

    /// Inputs and targets that are trained on, and those that are held out.
    fn fold(&self, fold: i64) -> [[Tensor; 2]; 2] {
        let n = self.x.size()[0];
        let part = |held: bool| {
            let places: Vec<i64> = (0..n).filter(|i| (i / 2 % FOLDS == fold) == held).collect();
            let places = Tensor::from_slice(&places);
            [self.x.index_select(0, &places), self.y.index_select(0, &places)]
        };
        let other = self.other.as_ref().map(|o| o.each_ref().map(Tensor::shallow_clone));
        [part(false), other.unwrap_or_else(|| part(true))]
    }

    fn run(&self, width: i64, precision: f64) -> Outcome<Found> {
        let (mut evidence, mut held_out) = (0.0, 0.0);
        for fold in 0..FOLDS {
            let [[x, y], [at, label]] = self.fold(fold);
            let n = x.size()[0] as f64;
            tch::manual_seed(fold);
            let mut vs = VarStore::new(Device::Cpu);
            let inputs = x.size()[1];
            let layers = [("hidden", inputs, width), ("output", width, self.outputs)]
                .map(|(name, i, o)| nn::linear(vs.root() / name, i, o, LinearConfig::default()));
            vs.double();
            let net = |x: &Tensor| layers[1].forward(&layers[0].forward(x).tanh());
            let schedule = Schedule::Cosine { warmup: STEPS / 20, total: STEPS, end: 0.0 };
            let mut adam = Adam::default().weight_decay(precision / n).schedule(schedule).build(&vs, 0.1)?;
            for _ in 0..STEPS {
                adam.step(|| match self.likelihood {
                    Likelihood::Gaussian { variance } => nn::squared_error(&net(&x), &y, variance),
                    _ => nn::cross_entropy(&net(&x), &y),
                })?;
            }
            let f = Fisher::exact().likelihood(self.likelihood).full(&vs, [(&x, &y)], net)?;
            let laplace = Laplace::new(f, precision)?;
            evidence -= laplace.log_evidence()? / n;
            let f = laplace.predict(&vs, || net(&at))?;
            held_out += match self.likelihood {
                Likelihood::Gaussian { .. } => -f.log_density(&label)?.mean(Kind::Double).double_value(&[]),
                _ => metrics::nll(&f.probabilities(Link::Probit)?, &label)?,
            };
        }
        Ok(Found { evidence: evidence / FOLDS as f64, held_out: held_out / FOLDS as f64 })
    }
}

/// Where the lowest value is.
fn lowest(values: impl Iterator<Item = f64>) -> usize {
    values.enumerate().fold((0, f64::INFINITY), |best, (i, v)| if v < best.1 { (i, v) } else { best }).0
}

/// One grid: a row per place, and where each curve is lowest.
fn grid(
    problem: &Problem,
    what: &str,
    places: &[f64],
    run: impl Fn(usize) -> Outcome<Found>,
) -> Outcome<(Vec<Found>, Value)> {
    let found = (0..places.len()).map(run).collect::<Outcome<Vec<_>>>()?;
    let by_evidence = lowest(found.iter().map(|f| f.evidence));
    let by_held_out = lowest(found.iter().map(|f| f.held_out));
    println!("\n{}, nats per example\n   {what:>16}  -ln evidence  held-out NLL", problem.name);
    for (i, (place, f)) in places.iter().zip(&found).enumerate() {
        let mark = |lowest| if i == lowest { '*' } else { ' ' };
        let (a, b) = (mark(by_evidence), mark(by_held_out));
        println!("   {place:>16.3} {:>12.4} {a} {:>11.4} {b}", f.evidence, f.held_out);
    }
    let steps = by_evidence.abs_diff(by_held_out);
    // What choosing by the evidence costs on the data that were held out.
    let cost = found[by_evidence].held_out - found[by_held_out].held_out;
    println!("   lowest {steps} step(s) apart; choosing by the evidence costs {cost:.4} nats of the held-out NLL");
    let rows = places.iter().zip(&found).map(|(place, f)| json!([place, f.evidence, f.held_out]));
    let json = json!({"problem": problem.name, "grid": what, "rows": rows.collect::<Vec<_>>(), "steps_apart": steps, "cost": cost});
    Ok((found, json))
}

pub fn run(folder: &Path) -> Outcome<Value> {
    let problems = [Problem::snelson()?, Problem::moons()];
    let mut report = Vec::new();
    let (mut precisions, mut widths) = (Vec::new(), Vec::new());
    let panel = |problem: &Problem, x: &[f64], found: &[Found]| {
        let curve = |f: fn(&Found) -> f64| x.iter().copied().zip(found.iter().map(f)).collect();
        let series = vec![
            ("−ln evidence".to_owned(), curve(|f| f.evidence)),
            ("held-out NLL".to_owned(), curve(|f| f.held_out)),
        ];
        Curves { y_label: format!("{}: nats per example", problem.name), series }
    };
    for problem in &problems {
        let (found, json) =
            grid(problem, "log10 precision", &PRECISIONS, |i| problem.run(WIDTH, 10f64.powf(PRECISIONS[i])))?;
        let best = PRECISIONS[lowest(found.iter().map(|f| f.evidence))];
        precisions.push(panel(problem, &PRECISIONS, &found));
        report.push(json);
        let logs = WIDTHS.map(|w| (w as f64).log2());
        // Every width at the precision that the evidence has chosen.
        let (found, json) = grid(problem, "log2 width", &logs, |i| problem.run(WIDTHS[i], 10f64.powf(best)))?;
        widths.push(panel(problem, &logs, &found));
        report.push(json);
    }
    training_curves(&folder.join("precisions.svg"), "log₁₀ of the prior precision", &precisions)?;
    training_curves(&folder.join("widths.svg"), "log₂ of the width", &widths)?;
    Ok(json!(report))
}
