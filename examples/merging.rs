//! Two fine-tunes of one base, merged in seven ways: what each merge knows, how far its gradients are from those of the fine-tunes,
//! and what the weight of the merge changes.
//!
//! `cargo run --release --example merging [-- OUTPUT_FOLDER]` (default `target/merging`). Real digits if `$TCH_BLR_DATA/mnist`
//! holds MNIST's IDX files, else digits that the example draws itself. Writes two pictures and `report.json`.
//!
//! The base learns centred digits with IVON. One fine-tune sees shifted 0-4 and the other shifted 5-9, each with the base's
//! posterior as prior; wanted is a network for all shifted digits, as close as possible to the fine-tune on both together, which
//! is trained for comparison. No weight or density is tuned.

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
use tch_blr::merge::{self, Method, Model, Rescale, Tensors, gradient_mismatch, merge};
use tch_blr::{Builder, DiagonalGaussian, HessianEstimator, Ivon, Rule, Schedule};

type Outcome<T> = Result<T, Box<dyn Error>>;
/// From the weight of both fine-tunes to the merge.
type Merge<'a> = Box<dyn Fn(f64) -> tch_blr::Result<Tensors> + 'a>;
/// Images and labels.
type Examples = (Tensor, Tensor);

const BATCH: usize = 128;
const BASE: Training = Training { steps: 700, lr: 0.5, beta2: 0.998 };
const FINE_TUNE: Training = Training { steps: 200, lr: 0.2, beta2: 0.98 };
/// Images of a fine-tune, at most.
const IMAGES: i64 = 5000;
/// Pixels to the right and down.
const SHIFT: i64 = 2;
const HALVES: [(&str, [i64; 5]); 2] = [("0-4", [0, 1, 2, 3, 4]), ("5-9", [5, 6, 7, 8, 9])];

struct Training {
    steps: u64,
    lr: f64,
    /// 1/(1-β₂) is shorter than the training, so that the precision leaves its start.
    beta2: f64,
}

impl Training {
    fn run(
        &self,
        what: &str,
        net: &Mlp,
        (x, y): &Examples,
        prior: Option<&DiagonalGaussian>,
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
        train(what, net, &mut opt, (x, y), (epochs, BATCH), 0)?;
        Ok(opt.posterior()?)
    }

    /// Squared gradients of mini-batches, times their size, estimate the Fisher information: never negative, so that a fine-tune only
    /// adds precision to its prior, and every merge with weights ≥ 0 has a positive one. Price's estimate, of either sign, need not:
    /// here some merges of the sweep would have none.
    fn ivon(&self, examples: usize) -> Builder<Ivon> {
        let ivon = Ivon::default().ess(examples as f64).hess_init(0.03).beta2(self.beta2).weight_decay(1e-4);
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
    tensors(q, |name| q.mean(name).map(Tensor::shallow_clone))
}

/// H_t of the fine-tune q_t: its precision less the prior's, on the scale of the summed loss.
fn curvature(q: &DiagonalGaussian, base: &DiagonalGaussian) -> Tensors {
    // Rounding may make a zero negative.
    tensors(q, |name| Some((q.precision(name)? - base.precision(name)?).clamp_min(0.0)))
}

/// The base, its two fine-tunes and the joint one.
struct Posteriors {
    base: DiagonalGaussian,
    halves: [DiagonalGaussian; 2],
    joint: DiagonalGaussian,
}

impl Posteriors {
    fn train(net: &Mlp, centred: &Examples, halves: &[Examples; 2]) -> Outcome<Posteriors> {
        let [(x0, y0), (x1, y1)] = halves;
        let both = (Tensor::cat(&[x0, x1], 0), Tensor::cat(&[y0, y1], 0));
        let base = BASE.run("base on centred digits", net, centred, None)?;
        let fine_tune = |what: &str, data: &Examples| FINE_TUNE.run(what, net, data, Some(&base));
        let halves =
            [fine_tune("fine-tune on shifted 0-4", &halves[0])?, fine_tune("fine-tune on shifted 5-9", &halves[1])?];
        let joint = fine_tune("fine-tune on both", &both)?;
        Ok(Posteriors { base, halves, joint })
    }

    /// (1-2α) q₀ + α q₁ + α q₂, in natural parameters.
    fn gradient_matching(&self, alpha: f64) -> tch_blr::Result<Tensors> {
        let [low, high] = &self.halves;
        merge::gradient_matching(&self.base, &[(alpha, low), (alpha, high)]).map(|q| mean(&q))
    }

    /// With weight 1 for both fine-tunes.
    fn merge(&self, method: Method) -> tch_blr::Result<Tensors> {
        let base = mean(&self.base);
        let weights = self.halves.each_ref().map(mean);
        let curvatures = self.halves.each_ref().map(|q| curvature(q, &self.base));
        let model = |t: usize| Model::new(HALVES[t].0, &weights[t]).curvature(&curvatures[t]);
        merge(method, Some(&Model::new("base", &base)), &[model(0), model(1)])
    }
}

fn ties(lambda: f64) -> Method {
    Method::ties(lambda, 0.2)
}

fn dare(lambda: f64) -> Method {
    Method::dare(lambda, 0.5, Rescale::Density, 0)
}

/// The sum over the examples at the current weights.
fn summed(net: &Mlp, (x, y): &Examples) -> Tensor {
    let losses = net.logits(x).log_softmax(-1, Kind::Float);
    losses.nll_loss_nd::<Tensor>(y, None, Reduction::Sum, -100)
}

fn average_loss(net: &Mlp, data: &Examples) -> Tensor {
    summed(net, data) / data.1.numel() as f64
}

/// Accuracies on all shifted test digits and on the halves, and for both fine-tunes the mismatch of gradients of the summed loss.
fn table(net: &Mlp, posteriors: &Posteriors, train: &[Examples; 2], test: &Examples) -> Outcome<Value> {
    let [low, high] = posteriors.halves.each_ref().map(mean);
    let tests = HALVES.map(|(_, digits)| only(test, &digits, i64::MAX));
    let models = [
        ("base", mean(&posteriors.base)),
        ("fine-tune on 0-4", mean(&posteriors.halves[0])),
        ("fine-tune on 5-9", mean(&posteriors.halves[1])),
        ("average", posteriors.merge(Method::linear())?),
        ("slerp, t = 1/2", posteriors.merge(Method::Slerp { t: 0.5 })?),
        ("task arithmetic, λ = 1", posteriors.merge(Method::task_arithmetic(1.0))?),
        ("TIES, λ = 1, density 0.2", posteriors.merge(ties(1.0))?),
        ("DARE, λ = 1, density 0.5", posteriors.merge(dare(1.0))?),
        ("Fisher average", posteriors.merge(Method::Fisher)?),
        ("gradient matching, α = 1", posteriors.gradient_matching(1.0)?),
        ("joint fine-tune", mean(&posteriors.joint)),
    ];
    println!("\n  {:<26}{:>27}    {:>19}", "", "accuracy on shifted digits", "gradient mismatch");
    println!("  {:<26}{:>9}{:>9}{:>9}    {:>9} {:>9}", "", "all", "0-4", "5-9", "0-4", "5-9");
    let mut report = Map::new();
    for (name, weights) in models {
        let mismatch = gradient_mismatch(
            &net.vs,
            &weights,
            &mut [(&low, &mut || summed(net, &train[0])), (&high, &mut || summed(net, &train[1]))],
        )?;
        DiagonalGaussian::new(weights.into_iter().map(|(name, t)| (name, t.copy(), t.ones_like())))?
            .copy_mean_to(&net.vs)?;
        let score = |(x, y): &Examples| accuracy(net, x, y);
        let scores = [score(test)?, score(&tests[0])?, score(&tests[1])?];
        let [all, first, second] = scores.map(|a| 100.0 * a);
        println!("  {name:<26}{all:>7.2} %{first:>7.2} %{second:>7.2} %    {:>9.0} {:>9.0}", mismatch[0], mismatch[1]);
        report.insert(
            name.to_owned(),
            json!({"accuracy": scores[0], "accuracy_0_4": scores[1], "accuracy_5_9": scores[2], "gradient_mismatch": mismatch}),
        );
    }
    Ok(Value::Object(report))
}

/// Accuracy and loss on the shifted test digits over the weight that both fine-tunes get.
fn sweep(net: &Mlp, posteriors: &Posteriors, test: &Examples, path: &Path) -> Outcome<Value> {
    let grid: Vec<Vec<f64>> = (0..=15).map(|i| vec![f64::from(i) / 10.0]).collect();
    let methods: [(&str, Merge); 3] = [
        ("task arithmetic (0.5: average)", Box::new(|alpha| posteriors.merge(Method::task_arithmetic(alpha)))),
        ("TIES", Box::new(|alpha| posteriors.merge(ties(alpha)))),
        ("gradient matching", Box::new(|alpha| posteriors.gradient_matching(alpha))),
    ];
    let right = || {
        let share = net.logits(&test.0).argmax(-1, false).eq_tensor(&test.1).to_kind(Kind::Double).mean(Kind::Double);
        share * 100.0
    };
    let (mut accuracies, mut losses, mut report) = (Vec::new(), Vec::new(), Map::new());
    for (name, method) in methods {
        let accuracy = merge::sweep(&net.vs, &grid, |a| method(a[0]), right)?;
        let loss = merge::sweep(&net.vs, &grid, |a| method(a[0]), || average_loss(net, test))?;
        report.insert(name.to_owned(), json!({"accuracy_percent": accuracy, "nll": loss}));
        let points = |values: Vec<f64>| grid.iter().map(|a| a[0]).zip(values).collect::<Vec<_>>();
        accuracies.push((name.to_owned(), points(accuracy)));
        losses.push((name.to_owned(), points(loss)));
    }
    let panels = [
        Curves { y_label: "accuracy on shifted digits (%)".to_owned(), series: accuracies },
        Curves { y_label: "NLL on shifted digits (nats)".to_owned(), series: losses },
    ];
    training_curves(path, "weight of both fine-tunes (TIES: λ)", &panels)?;
    report.insert("weights".to_owned(), json!(grid.concat()));
    Ok(Value::Object(report))
}

/// Losses on the straight line from the one fine-tune to the other.
fn barrier(net: &Mlp, posteriors: &Posteriors, test: &Examples, path: &Path) -> Outcome<Value> {
    let [low, high] = posteriors.halves.each_ref().map(mean);
    let [first, second] = HALVES.map(|(_, digits)| only(test, &digits, i64::MAX));
    let (mut series, mut report) = (Vec::new(), Map::new());
    // An end does not know the other's digits, so the chord is high; the lowest loss says more than the barrier.
    println!("\n  NLL on the straight line from the fine-tune on 0-4 to that on 5-9");
    println!("  {:<26}{:>9}{:>9}{:>9}    {:>9}", "", "start", "lowest", "end", "barrier");
    for (name, data) in [("shifted 0-9", test), ("shifted 0-4", &first), ("shifted 5-9", &second)] {
        let line = merge::barrier(&net.vs, &low, &high, 21, || average_loss(net, data))?;
        let lowest = line.loss.iter().copied().fold(f64::INFINITY, f64::min);
        let (start, end) = (line.loss[0], line.loss[line.loss.len() - 1]);
        println!("  {name:<26}{start:>9.3}{lowest:>9.3}{end:>9.3}    {:>9.3}", line.height);
        report.insert(name.to_owned(), json!({"height": line.height, "nll": line.loss}));
        series.push((name.to_owned(), line.t.into_iter().zip(line.loss).collect()));
    }
    let panel = Curves { y_label: "NLL (nats)".to_owned(), series };
    training_curves(path, "t: 0 is the fine-tune on 0-4, 1 that on 5-9", &[panel])?;
    Ok(Value::Object(report))
}

fn main() -> Outcome<()> {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("target/merging"), PathBuf::from);
    std::fs::create_dir_all(&folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
    let started = Instant::now();
    let data = Digits::load()?;
    println!("Data: {}\n", data.source);
    tch::manual_seed(0);
    let net = Mlp::new(&[784, 100, 100, 10]);

    let half = data.train_labels.size()[0] / 2;
    let part = |start| (data.train_images.narrow(0, start, half), data.train_labels.narrow(0, start, half));
    let (centred, (other, labels)) = (part(0), part(half));
    let moved = (shifted(&other), labels);
    let halves = HALVES.map(|(_, digits)| only(&moved, &digits, IMAGES));
    let test = (shifted(&data.test_images), data.test_labels.shallow_clone());

    let posteriors = Posteriors::train(&net, &centred, &halves)?;
    let report = json!({
        "data": data.source,
        "models": table(&net, &posteriors, &halves, &test)?,
        "barrier": barrier(&net, &posteriors, &test, &folder.join("line.svg"))?,
        "sweep": sweep(&net, &posteriors, &test, &folder.join("weights.svg"))?,
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
