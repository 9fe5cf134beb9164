//! Two fine-tunes of one base, merged in eight ways: what each merge knows, how far its gradients are from those of the fine-tunes,
//! and what the weight of the merge changes.
//!
//! `cargo run --release --example merging [-- [OUTPUT_FOLDER] [--seeds N] [--base-beta2 B]]` (default `target/merging`, 5 seeds, 0.99).
//! Real digits if `$TCH_BLR_DATA/mnist` holds MNIST's IDX files, else digits that the example draws itself. Prints means ± standard
//! deviations over the seeds; writes two pictures and `report.json`.
//!
//! The base learns centred digits with IVON. One fine-tune sees shifted 0-4 and the other shifted 5-9, each with the base's
//! posterior as prior; wanted is a network for all shifted digits, as close as possible to the fine-tune on both together, which
//! is trained for comparison. Weights are 1, or chosen on shifted training digits that no network has seen; densities are not tuned.

#[path = "common/digits.rs"]
mod digits;
#[path = "common/model.rs"]
mod model;
#[path = "common/pictures.rs"]
mod pictures;

use digits::{Digits, SIDE, subset};
use model::{Mlp, accuracy, train};
use pictures::{Curves, training_curves};
use serde_json::{Map, Value, json};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::{Kind, Reduction, Tensor};
use tch_blr::fisher::{DiagonalFisher, Fisher};
use tch_blr::merge::{self, Method, Model, Rescale, Tensors, gradient_mismatch, merge};
use tch_blr::{Builder, DiagonalGaussian, HessianEstimator, Ivon, Rule, Schedule};

type Outcome<T> = Result<T, Box<dyn Error>>;
/// Images and labels.
type Examples = (Tensor, Tensor);

const BATCH: usize = 128;
const BASE: Training = Training { steps: 700, lr: 0.5, beta2: 0.99 };
const FINE_TUNE: Training = Training { steps: 200, lr: 0.2, beta2: 0.98 };
/// δ of the base's prior for each example.
const DECAY: f64 = 1e-4;
/// Images of a fine-tune, at most.
const IMAGES: i64 = 5000;
/// Pixels to the right and down.
const SHIFT: i64 = 2;
const HALVES: [(&str, [i64; 5]); 2] = [("0-4", [0, 1, 2, 3, 4]), ("5-9", [5, 6, 7, 8, 9])];

struct Training {
    steps: u64,
    lr: f64,
    /// With β₂^steps ≪ 1 the precision is that of the data, and not what it was started with: merging weighs by it.
    beta2: f64,
}

impl Training {
    fn run(
        &self,
        what: &str,
        net: &Mlp,
        (x, y): &Examples,
        prior: Option<&DiagonalGaussian>,
        seed: u64,
    ) -> Outcome<DiagonalGaussian> {
        let per_epoch = (y.numel() as u64).div_ceil(BATCH as u64);
        let epochs = self.steps.div_ceil(per_epoch);
        let total = epochs * per_epoch;
        let mut opt = self.ivon(y.numel()).schedule(Schedule::WarmupCosine { warmup: total / 10, total });
        if let Some(q) = prior {
            q.copy_mean_to(&net.vs)?;
            opt = opt.prior(q);
        }
        let mut opt = opt.build(&net.vs, self.lr)?;
        train(&format!("{seed}: {what}"), net, &mut opt, (x, y), (epochs, BATCH), 1000 * seed)?;
        Ok(opt.posterior()?)
    }

    /// Squared gradients of mini-batches, times their size, estimate the Fisher information: never negative, so that a fine-tune only
    /// adds precision to its prior, and every merge with weights ≥ 0 has a positive one. Price's estimate, of either sign, need not:
    /// here some merges of the sweep would have none.
    fn ivon(&self, examples: usize) -> Builder<Ivon> {
        let ivon = Ivon::default().ess(examples as f64).hess_init(0.03).beta2(self.beta2).weight_decay(DECAY);
        ivon.estimator(HessianEstimator::SquaredGradient { scale: BATCH as f64 }).builder()
    }
}

fn shifted(images: &Tensor) -> Tensor {
    let side = SIDE as i64;
    images.view([-1, side, side]).roll([SHIFT, SHIFT], [1, 2]).reshape([-1, side * side])
}

/// Those of `digits`, the first `most`.
fn only((x, y): &Examples, digits: &[i64], most: i64) -> Examples {
    let chosen = subset(y, digits);
    let chosen = chosen.narrow(0, 0, most.min(chosen.size()[0]));
    (x.index_select(0, &chosen), y.index_select(0, &chosen))
}

/// One tensor a parameter, of what `part` says about it.
fn tensors(q: &DiagonalGaussian, part: impl Fn(&str) -> Option<Tensor>) -> Tensors {
    q.names().filter_map(|name| Some((name.to_owned(), part(name)?))).collect()
}

fn mean(q: &DiagonalGaussian) -> Tensors {
    tensors(q, |name| q.mean(name))
}

/// What is learned, and where it is measured.
struct Task {
    centred: Examples,
    halves: [Examples; 2],
    /// For the choice of weights.
    validation: Examples,
    test: Examples,
    tests: [Examples; 2],
}

impl Task {
    fn new(data: &Digits) -> Task {
        let half = data.train_labels.size()[0] / 2;
        let part = |x: &Tensor, y: &Tensor, start, n| (x.narrow(0, start, n), y.narrow(0, start, n));
        let (x, y) = part(&data.train_images, &data.train_labels, half, half);
        let (moved, kept) = (shifted(&x), half - half / 6);
        let (seen, validation) = (part(&moved, &y, 0, kept), part(&moved, &y, kept, half - kept));
        let test = (shifted(&data.test_images), data.test_labels.shallow_clone());
        Task {
            centred: part(&data.train_images, &data.train_labels, 0, half),
            halves: HALVES.map(|(_, digits)| only(&seen, &digits, IMAGES)),
            validation,
            tests: HALVES.map(|(_, digits)| only(&test, &digits, i64::MAX)),
            test,
        }
    }
}

/// H₀ with the prior's part, and H_t of the fine-tunes' losses, on the scale of the sums over their data.
struct Curvatures {
    base: Tensors,
    halves: [Tensors; 2],
}

/// The base, its two fine-tunes and the joint one.
struct Networks {
    base: DiagonalGaussian,
    halves: [DiagonalGaussian; 2],
    joint: DiagonalGaussian,
    /// IVON's own precisions, and those of a pass over all data with the networks as they are.
    own: Curvatures,
    exact: Curvatures,
    seed: u64,
}

impl Networks {
    fn train(net: &Mlp, task: &Task, base: &Training, seed: u64) -> Outcome<Networks> {
        let [(x0, y0), (x1, y1)] = &task.halves;
        let both = (Tensor::cat(&[x0, x1], 0), Tensor::cat(&[y0, y1], 0));
        let base = base.run("base on centred digits", net, &task.centred, None, seed)?;
        let fine_tune = |what: &str, data: &Examples| FINE_TUNE.run(what, net, data, Some(&base), seed);
        let halves = [
            fine_tune("fine-tune on shifted 0-4", &task.halves[0])?,
            fine_tune("fine-tune on shifted 5-9", &task.halves[1])?,
        ];
        let joint = fine_tune("fine-tune on both", &both)?;

        // Rounding may make a zero negative.
        let added = |q: &DiagonalGaussian| tensors(q, |n| Some((q.precision(n)? - base.precision(n)?).clamp_min(0.0)));
        let own = Curvatures { base: tensors(&base, |n| base.precision(n)), halves: halves.each_ref().map(added) };
        let fisher = |q: &DiagonalGaussian, (x, _): &Examples| -> Outcome<DiagonalFisher> {
            q.copy_mean_to(&net.vs)?;
            Ok(Fisher::exact().diagonal(&net.vs, x.split(1000, 0), |x| net.logits(x))?)
        };
        let delta = DECAY * task.centred.1.numel() as f64;
        let prior = fisher(&base, &task.centred)?;
        let [low, high] = [fisher(&halves[0], &task.halves[0])?, fisher(&halves[1], &task.halves[1])?];
        let exact = Curvatures {
            base: tensors(&base, |n| Some(prior.get(n)? + delta)),
            halves: [low, high].map(|f| tensors(&base, |n| f.get(n).map(Tensor::shallow_clone))),
        };
        Ok(Networks { base, halves, joint, own, exact, seed })
    }

    /// With one weight for both fine-tunes.
    fn merge(&self, method: Method, curvatures: &Curvatures, weight: f64) -> tch_blr::Result<Tensors> {
        let base = mean(&self.base);
        let weights = self.halves.each_ref().map(mean);
        let model = |t: usize| Model::new(HALVES[t].0, &weights[t]).curvature(&curvatures.halves[t]).weight(weight);
        merge(method, Some(&Model::new("base", &base).curvature(&curvatures.base)), &[model(0), model(1)])
    }

    /// The merges that a weight changes.
    fn weighted(&self, way: Weighted, weight: f64) -> tch_blr::Result<Tensors> {
        let plain = |method| self.merge(method, &self.own, 1.0);
        match way {
            Weighted::TaskArithmetic => plain(Method::task_arithmetic(weight)),
            Weighted::Ties => plain(Method::ties(weight, 0.2)),
            Weighted::Dare => plain(Method::dare(weight, 0.5, Rescale::Density, self.seed)),
            Weighted::Own => self.merge(Method::gradient_matching(), &self.own, weight),
            Weighted::Exact => self.merge(Method::gradient_matching(), &self.exact, weight),
        }
    }

    fn all(&self) -> tch_blr::Result<Vec<(String, Tensors)>> {
        let fixed = [
            ("base", mean(&self.base)),
            ("fine-tune on 0-4", mean(&self.halves[0])),
            ("fine-tune on 5-9", mean(&self.halves[1])),
            ("joint fine-tune", mean(&self.joint)),
            ("average", self.merge(Method::linear(), &self.own, 1.0)?),
            ("slerp, t = 1/2", self.merge(Method::Slerp { t: 0.5 }, &self.own, 1.0)?),
            ("Fisher average (IVON)", self.merge(Method::Fisher, &self.own, 1.0)?),
            ("Fisher average (exact)", self.merge(Method::Fisher, &self.exact, 1.0)?),
        ];
        let fixed = fixed.into_iter().map(|(name, weights)| Ok((name.to_owned(), weights)));
        fixed.chain(WEIGHTED.iter().map(|(name, way)| Ok(((*name).to_owned(), self.weighted(*way, 1.0)?)))).collect()
    }
}

#[derive(Debug, Clone, Copy)]
enum Weighted {
    TaskArithmetic,
    Ties,
    Dare,
    Own,
    Exact,
}

const WEIGHTED: [(&str, Weighted); 5] = [
    ("task arithmetic", Weighted::TaskArithmetic),
    ("TIES, density 0.2", Weighted::Ties),
    ("DARE, density 0.5", Weighted::Dare),
    ("gradient matching (IVON)", Weighted::Own),
    ("gradient matching (exact)", Weighted::Exact),
];

/// 0, 0.1, .., 1.5
fn grid() -> Vec<Vec<f64>> {
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
struct Run {
    /// Accuracy in % on all shifted test digits, on 0-4 and on 5-9; mismatch of the gradients of both fine-tunes' summed losses.
    models: Vec<(String, [f64; 5])>,
    /// Over the grid, on the test digits: accuracy in %, and NLL.
    sweeps: Vec<[Vec<f64>; 2]>,
    /// Weight of the highest accuracy on the validation digits, and the test accuracy in % there.
    chosen: Vec<[f64; 2]>,
    /// Losses on the straight line from the one fine-tune to the other: on all test digits, 0-4, 5-9.
    line: Vec<Vec<f64>>,
    /// Mean precision of the base, by IVON and by its definition.
    precision: [f64; 2],
}

impl Run {
    fn new(task: &Task, base: &Training, seed: u64) -> Outcome<Run> {
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
            let over =
                |loss: &dyn Fn() -> Tensor| merge::sweep(&net.vs, &grid(), |a| networks.weighted(way, a[0]), loss);
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
const POINTS: usize = 21;

/// Mean and standard deviation of what the runs say.
fn over(runs: &[Run], of: impl Fn(&Run) -> f64) -> [f64; 2] {
    let n = runs.len() as f64;
    let mean = runs.iter().map(&of).sum::<f64>() / n;
    let squares: f64 = runs.iter().map(|r| (of(r) - mean).powi(2)).sum();
    [mean, if runs.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 }]
}

fn table(runs: &[Run]) -> Value {
    println!("\n  {:<28}{:>43}    {:>17}", "all weights 1", "accuracy on shifted digits in %", "gradient mismatch");
    println!("  {:<28}{:>15}{:>14}{:>14}    {:>8} {:>8}", "", "all", "0-4", "5-9", "0-4", "5-9");
    let mut report = Map::new();
    for (i, (name, _)) in runs[0].models.iter().enumerate() {
        let column = |k: usize| over(runs, |r| r.models[i].1[k]);
        let [all, low, high, first, second] = [0, 1, 2, 3, 4].map(column);
        let percent = |[mean, sd]: [f64; 2]| format!("{mean:.2} ± {sd:.2}");
        println!(
            "  {name:<28}{:>15}{:>14}{:>14}    {:>8.0} {:>8.0}",
            percent(all),
            percent(low),
            percent(high),
            first[0],
            second[0]
        );
        report.insert(
            name.clone(),
            json!({"accuracy_percent": all, "accuracy_0_4": low, "accuracy_5_9": high, "gradient_mismatch": [first, second]}),
        );
    }
    Value::Object(report)
}

/// The weights that the validation digits choose, and the accuracies over all weights.
fn sweep(runs: &[Run], path: &Path) -> Outcome<Value> {
    let weights = grid().concat();
    let (mut accuracies, mut losses, mut report) = (Vec::new(), Vec::new(), Map::new());
    println!("\n  {:<28}{:>17}{:>17}", "weight chosen on validation", "weight", "accuracy in %");
    for (i, (name, _)) in WEIGHTED.iter().enumerate() {
        let [weight, accuracy] = [0, 1].map(|k| over(runs, |r| r.chosen[i][k]));
        let shown = [(weight, 2), (accuracy, 2)].map(|([mean, sd], digits)| format!("{mean:.digits$} ± {sd:.digits$}"));
        println!("  {name:<28}{:>17}{:>17}", shown[0], shown[1]);
        let mean = |k: usize| (0..weights.len()).map(|at| over(runs, |r| r.sweeps[i][k][at])[0]).collect::<Vec<_>>();
        let points = |values: &[f64]| weights.iter().copied().zip(values.iter().copied()).collect::<Vec<_>>();
        let [test, nll] = [0, 1].map(mean);
        accuracies.push(((*name).to_owned(), points(&test)));
        losses.push(((*name).to_owned(), points(&nll)));
        report.insert(
            (*name).to_owned(),
            json!({"accuracy_percent": test, "nll": nll, "chosen": weight, "accuracy_of_chosen": accuracy}),
        );
    }
    let panels = [
        Curves { y_label: "accuracy on shifted digits (%)".to_owned(), series: accuracies },
        Curves { y_label: "NLL on shifted digits (nats)".to_owned(), series: losses },
    ];
    training_curves(path, "weight of both fine-tunes (TIES, DARE: λ)", &panels)?;
    report.insert("weights".to_owned(), json!(weights));
    Ok(Value::Object(report))
}

fn line(runs: &[Run], path: &Path) -> Outcome<Value> {
    let (mut series, mut report) = (Vec::new(), Map::new());
    // An end does not know the other's digits, so there is no barrier above the chord; the lowest loss says more.
    println!("\n  NLL on the straight line from the fine-tune on 0-4 to that on 5-9 (means)");
    println!("  {:<28}{:>9}{:>9}{:>9}", "", "start", "lowest", "end");
    for (i, name) in ["shifted 0-9", "shifted 0-4", "shifted 5-9"].into_iter().enumerate() {
        let loss: Vec<f64> = (0..POINTS).map(|at| over(runs, |r| r.line[i][at])[0]).collect();
        let lowest = loss.iter().copied().fold(f64::INFINITY, f64::min);
        println!("  {name:<28}{:>9.3}{lowest:>9.3}{:>9.3}", loss[0], loss[POINTS - 1]);
        report.insert(name.to_owned(), json!(loss));
        let t = (0..POINTS).map(|at| at as f64 / (POINTS - 1) as f64);
        series.push((name.to_owned(), t.zip(loss).collect()));
    }
    let panel = Curves { y_label: "NLL (nats)".to_owned(), series };
    training_curves(path, "t: 0 is the fine-tune on 0-4, 1 that on 5-9", &[panel])?;
    Ok(Value::Object(report))
}

fn main() -> Outcome<()> {
    let (mut folder, mut seeds, mut base) = (PathBuf::from("target/merging"), 5u64, BASE);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a number"));
        match argument.as_str() {
            "--seeds" => {
                seeds = value()?.parse().ok().filter(|n| *n > 0).ok_or("--seeds: expected a number of at least 1")?;
            }
            "--base-beta2" => base.beta2 = value()?.parse().map_err(|_| "--base-beta2: expected a number")?,
            option if option.starts_with('-') => {
                return Err(format!("unknown option {option}: expected --seeds N or --base-beta2 B").into());
            }
            path => folder = PathBuf::from(path),
        }
    }
    std::fs::create_dir_all(&folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
    let started = Instant::now();
    let data = Digits::load()?;
    println!("Data: {}, {seeds} seeds\n", data.source);
    let task = Task::new(&data);
    let runs = (0..seeds).map(|seed| Run::new(&task, &base, seed)).collect::<Outcome<Vec<_>>>()?;

    let precision = [0, 1].map(|k| over(&runs, |r| r.precision[k])[0]);
    let left = base.beta2.powf(base.steps as f64);
    println!(
        "\n  Mean precision of the base: {:.1} by IVON, {:.1} by the exact Fisher information; β₂^{} = {left:.1e} of IVON's start is left",
        precision[0], precision[1], base.steps
    );
    let report = json!({
        "data": data.source,
        "seeds": seeds,
        "base_beta2": base.beta2,
        "mean_precision_of_base": precision,
        "models": table(&runs),
        "sweep": sweep(&runs, &folder.join("weights.svg"))?,
        "line": line(&runs, &folder.join("line.svg"))?,
        "seconds": started.elapsed().as_secs_f64(),
    });
    let path = folder.join("report.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")
        .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    println!(
        "\nweights.svg, line.svg and report.json are in {} ({:.0} s)",
        folder.display(),
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
