//! Which examples a network depends on, which labels are wrong, what the test loss will be, and which weights it can do without:
//! all from the posterior that IVON learns anyway, without training again.
//!
//! `cargo run --release --example sensitivity [-- --examples N --epochs N --hess-init H --output FOLDER]` (defaults 10000, 30, 0.05,
//! `target/sensitivity`). Real digits if `$TCH_BLR_DATA/mnist` holds MNIST's IDX files, else digits that the example draws itself.
//! Writes pictures and `report.json` with every number, and fails if one of the promises at the end of `main` is not kept.

#[path = "common/digits.rs"]
mod digits;
#[path = "common/model.rs"]
mod model;
#[path = "common/pictures.rs"]
mod pictures;
#[path = "common/sheets.rs"]
mod sheets;

use digits::{Digits, Last, Rng, batches};
use model::{Mlp, accuracy, progress};
use pictures::{Cloud, Curves};
use serde_json::json;
use sheets::Row;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Instant;
use tch::{Kind, Tensor};
use tch_blr::fisher::Fisher;
use tch_blr::nn::Likelihood;
use tch_blr::selection;
use tch_blr::sensitivity::Sensitivity;
use tch_blr::{Ivon, Optimizer, Rule, Schedule, metrics, pruning};

type Outcome<T> = Result<T, Box<dyn Error>>;

const SIZES: [i64; 4] = [784, 32, 16, 10];
const BATCH: usize = 50;
/// Share of the labels that are made wrong.
const NOISE: f64 = 0.05;
/// Evaluations of the leave-one-out estimate in each of the first epochs, where the loss moves fast.
const EARLY: [usize; 2] = [4, 2];

/// Epochs after which the losses move slowly.
const LATE: f64 = 2.0;

/// Sensitivities are looked at after these epochs and the last, with predictions averaged over so many draws.
const CHECKPOINTS: [u64; 6] = [1, 2, 3, 5, 10, 20];
const DRAWS: usize = 150;
/// Of these and the last, all are drawn in their order.
const RANKED: [u64; 3] = [1, 3, 10];

struct Settings {
    examples: i64,
    epochs: u64,
    hess_init: f64,
    folder: PathBuf,
}

fn settings() -> Outcome<Settings> {
    let mut settings =
        Settings { examples: 10_000, epochs: 30, hess_init: 0.05, folder: PathBuf::from("target/sensitivity") };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{argument} needs a value"))?;
        let number = || {
            value.parse().ok().filter(|n| *n > 0).ok_or_else(|| format!("{argument} {value}: expected a number ≥ 1"))
        };
        match argument.as_str() {
            "--examples" => settings.examples = number()?,
            "--epochs" => settings.epochs = number()? as u64,
            // Looked at by the optimizer.
            "--hess-init" => settings.hess_init = value.parse().map_err(|e| format!("{argument} {value}: {e}"))?,
            "--output" => settings.folder = PathBuf::from(&value),
            _ => {
                return Err(format!(
                    "unknown argument {argument}: expected --examples, --epochs, --hess-init or --output"
                )
                .into());
            }
        }
    }
    Ok(settings)
}

fn main() -> Outcome<()> {
    let Settings { examples, epochs, hess_init, folder } = settings()?;
    std::fs::create_dir_all(&folder).map_err(|e| format!("cannot create {}: {e}", folder.display()))?;
    let started = Instant::now();
    let mut data = Digits::load()?;
    let n = examples.min(data.train_labels.numel() as i64);
    data.train_images = data.train_images.narrow(0, 0, n);
    data.train_labels = data.train_labels.narrow(0, 0, n);
    println!("Data: {} ({n} training and {} test images)\n", data.source, data.test_labels.numel());

    println!("1. The test loss from training data alone: 784-32-16-10, IVON");
    let (net, opt, curve, ranked) = follow(&data, (epochs, hess_init))?;
    let (correlation, late) = (correlation(&curve, 0.0), correlation(&curve, LATE));
    println!(
        "   correlation of the leave-one-out estimate with the test loss: {correlation:.3}; after epoch {LATE}: {late:.3}"
    );
    draw_losses(&curve, &folder)?;

    println!("\n2. Which digits does it depend on?");
    sheet(&data, &net, &opt, &folder)?;
    let ranked = draw_ranked(&ranked, &folder)?;
    let kinds = kinds(&data, &net, &opt, &folder)?;

    println!("\n3. Which weights can it do without?");
    let pruned = prune(&data, &net, &opt, hess_init, &folder)?;

    println!("\n4. Which labels are wrong? {:.0} % are, at random", 100.0 * NOISE);
    let found = wrong_labels(&data, (epochs, hess_init), &folder)?;
    let last = found.last().ok_or("no epoch")?;
    let half = 5 * found.len() + 4;
    println!("   found (%) among the 10 % of highest{:>half$}{:>half$}", "p of the mean", "averaged p");
    let epochs_of = found.iter().map(|(epoch, _)| format!("{epoch:5}")).collect::<Vec<_>>().concat();
    println!("     {:<32}{epochs_of}    {epochs_of}", "after epochs");
    for (i, name) in SCORES.iter().enumerate() {
        let cell = |share: f64| format!("{:5.1}", 100.0 * share);
        let row = |k: usize| found.iter().map(|(_, all)| cell(all[i][k])).collect::<Vec<_>>().concat();
        println!("     {name:<32}{}    {}", row(0), row(1));
    }

    let report = json!({
        "data": data.source, "examples": n, "epochs": epochs, "hess_init": hess_init,
        "losses": curve.iter().map(|p| json!({"epoch": p.epoch, "train": p.train, "leave_one_out": p.left_out, "test": p.test})).collect::<Vec<_>>(),
        "correlation": correlation, "correlation_late": late,
        "sensitivity_by_rank": ranked, "kinds": kinds,
        "wrong_labels_found": found.iter().map(|(epoch, [logits, predictions, errors])| json!({"epoch": epoch, "logits": logits, "predictions": predictions, "errors": errors})).collect::<Vec<_>>(),
        "pruning": pruned,
        "seconds": started.elapsed().as_secs_f64(),
    });
    let path = folder.join("report.json");
    std::fs::write(&path, serde_json::to_string_pretty(&report)? + "\n")
        .map_err(|e| format!("cannot write {}: {e}", path.display()))?;
    println!("\nPictures and report in {} ({:.0} s)", folder.display(), started.elapsed().as_secs_f64());
    if correlation < 0.95 || last.1[0][0] < 0.75 {
        return Err("the correlation is below 0.95, or fewer than 75 % of the wrong labels were found".into());
    }
    Ok(())
}

/// Losses at some point of the training, in nats per example.
struct Point {
    epoch: f64,
    train: f64,
    left_out: f64,
    test: f64,
}

/// The start of h and the rate at which it is learned set the size of v, and with it that of the estimate. Over the whole
/// training h forgets its start to e⁻³: much faster, and weights of no importance lose all precision and their noise is in v.
fn ivon(n: usize, steps: u64, hess_init: f64) -> Ivon {
    Ivon::default().ess(n as f64).hess_init(hess_init).beta2(1.0 - 3.0 / steps.max(1000) as f64).weight_decay(1e-4)
}

fn network(n: usize, epochs: u64, hess_init: f64) -> Outcome<(Mlp, Optimizer<Ivon>)> {
    tch::manual_seed(0);
    let net = Mlp::new(&SIZES);
    let total = epochs * n.div_ceil(BATCH) as u64;
    let opt = ivon(n, total, hess_init)
        .builder()
        .schedule(Schedule::WarmupCosine { warmup: 100, total })
        .build(&net.vs, 0.2)?;
    Ok((net, opt))
}

/// e and v of all training examples under the optimizer's own posterior.
fn sensitivities(net: &Mlp, opt: &Optimizer<Ivon>, x: &Tensor, y: &Tensor) -> Outcome<Sensitivity> {
    let batches = x.split(1000, 0).into_iter().zip(y.split(1000, 0));
    Ok(Sensitivity::diagonal(&opt.posterior()?, &net.vs, batches, Likelihood::Categorical, |x| net.logits(x))?)
}

/// Whether sensitivities are looked at after so many epochs.
fn checkpoint(epoch: u64, epochs: u64) -> bool {
    CHECKPOINTS.contains(&epoch) || epoch == epochs
}

/// Sensitivities Σ|e Λ v| of all examples after so many epochs, and the mean of tr v.
type Evolution = Vec<(u64, Tensor, f64)>;

/// With averaged predictions.
fn look(epoch: u64, s: &Sensitivity) -> Outcome<(u64, Tensor, f64)> {
    let variance = s.variance()?.sum(Kind::Double).double_value(&[]) / s.outputs().size()[0] as f64;
    Ok((epoch, s.averaged(DRAWS, epoch)?.score()?, variance))
}

/// Trains, and compares the losses now and then.
fn follow(data: &Digits, (epochs, hess_init): (u64, f64)) -> Outcome<(Mlp, Optimizer<Ivon>, Vec<Point>, Evolution)> {
    let (x, y) = (&data.train_images, &data.train_labels);
    let (net, mut opt) = network(y.numel(), epochs, hess_init)?;
    let per_epoch = y.numel().div_ceil(BATCH);
    let bar = progress("   IVON", epochs * per_epoch as u64);
    let (mut curve, mut evolution) = (Vec::new(), Vec::new());
    for epoch in 0..epochs {
        let every = per_epoch.div_ceil(EARLY.get(epoch as usize).copied().unwrap_or(1));
        for (i, (bx, by)) in batches(x, y, BATCH, epoch, Last::Keep).enumerate() {
            opt.step(|| net.logits(&bx).cross_entropy_for_logits(&by))?;
            bar.inc(1);
            if (i + 1) % every != 0 && i + 1 != per_epoch {
                continue;
            }
            let s = sensitivities(&net, &opt, x, y)?;
            let test = metrics::nll(&net.probabilities(&data.test_images), &data.test_labels)?;
            let (train, left_out) = (s.nll(&s.outputs().zeros_like())?, s.nll(&s.shift()?)?);
            bar.set_message(format!("{train:.3}, left out {left_out:.3}, test {test:.3}"));
            curve.push(Point { epoch: epoch as f64 + (i + 1) as f64 / per_epoch as f64, train, left_out, test });
            if i + 1 == per_epoch && checkpoint(epoch + 1, epochs) {
                evolution.push(look(epoch + 1, &s)?);
            }
        }
    }
    bar.finish();
    for p in curve.iter().rev().step_by((curve.len() / 6).max(1)).collect::<Vec<_>>().into_iter().rev() {
        println!("   epoch {:5.2}: training {:.4}, left out {:.4}, test {:.4}", p.epoch, p.train, p.left_out, p.test);
    }
    Ok((net, opt, curve, evolution))
}

fn correlation(curve: &[Point], from: f64) -> f64 {
    let of =
        |f: fn(&Point) -> f64| Tensor::from_slice(&curve.iter().filter(|p| p.epoch > from).map(f).collect::<Vec<_>>());
    Tensor::stack(&[of(|p| p.left_out), of(|p| p.test)], 0).corrcoef().double_value(&[0, 1])
}

fn draw_losses(curve: &[Point], folder: &Path) -> Outcome<()> {
    let series = |from: f64| {
        let line = |f: fn(&Point) -> f64| curve.iter().filter(|p| p.epoch > from).map(|p| (p.epoch, f(p))).collect();
        vec![
            ("training".to_owned(), line(|p| p.train)),
            ("left out, estimated".to_owned(), line(|p| p.left_out)),
            ("test".to_owned(), line(|p| p.test)),
        ]
    };
    let mut panels = vec![Curves { y_label: "loss (nats per example)".to_owned(), series: series(0.0) }];
    if curve.last().is_some_and(|p| p.epoch > LATE) {
        panels.push(Curves { y_label: "the same, after two epochs".to_owned(), series: series(LATE) });
    }
    pictures::training_curves(&folder.join("losses.svg"), "epoch", &panels)
}

/// The most sensitive digits above, the least sensitive below, each in order.
fn sheet(data: &Digits, net: &Mlp, opt: &Optimizer<Ivon>, folder: &Path) -> Outcome<()> {
    const ROWS: i64 = 4;
    const COLUMNS: i64 = 20;
    let s = sensitivities(net, opt, &data.train_images, &data.train_labels)?.score()?;
    let most = selection::top(&s, (ROWS * COLUMNS) as usize)?;
    let least = selection::top(&-&s, (ROWS * COLUMNS) as usize)?;
    let block = |positions: &[i64]| {
        let images = data.train_images.index_select(0, &Tensor::from_slice(positions));
        let missing = ROWS * COLUMNS - images.size()[0];
        let images = images.constant_pad_nd([0, 0, 0, missing]).view([ROWS, COLUMNS, 28, 28]);
        images.constant_pad_nd([2, 2, 2, 2]).permute([0, 2, 1, 3]).reshape([ROWS * 32, COLUMNS * 32])
    };
    let gap = Tensor::ones([4, COLUMNS * 32], (Kind::Float, tch::Device::Cpu));
    let sheet = Tensor::cat(&[block(&most), gap, block(&least)], 0);
    let path = folder.join("digits.png");
    tch::vision::image::save(&(sheet * 255.0).to_kind(Kind::Uint8).unsqueeze(0), &path)?;
    let at = |i: &[i64]| s.double_value(&[i[0]]);
    println!(
        "   from {:.2e} down to {:.2e}: the most and the least sensitive ones are in {}",
        at(&most),
        at(&least),
        path.display()
    );
    Ok(())
}

/// Sensitivities in their order, after some epochs.
fn draw_ranked(evolution: &Evolution, folder: &Path) -> Outcome<serde_json::Value> {
    const POINTS: i64 = 400;
    let last = evolution.last().map_or(0, |(epoch, ..)| *epoch);
    let (mut series, mut numbers) = (Vec::new(), Vec::new());
    println!("   sensitivity of the example at this rank (%)      1         10         50         90  mean tr v");
    for (epoch, s, variance) in evolution.iter().filter(|(epoch, ..)| RANKED.contains(epoch) || *epoch == last) {
        let (sorted, _) = s.sort(0, true);
        let n = sorted.numel() as i64;
        let at = |share: f64| sorted.double_value(&[((n - 1) as f64 * share) as i64]);
        let points = (0..=POINTS).map(|k| k as f64 / POINTS as f64);
        let log = |v: f64| v.max(f64::MIN_POSITIVE).log10();
        series.push((format!("after epoch {epoch}"), points.map(|share| (100.0 * share, log(at(share)))).collect()));
        let quantiles = [0.01, 0.1, 0.5, 0.9].map(at);
        let [a, b, c, d] = quantiles;
        println!("     after epoch {epoch:<28} {a:10.2e} {b:10.2e} {c:10.2e} {d:10.2e} {variance:10.1}");
        numbers.push(json!({"epoch": epoch, "quantiles": quantiles, "variance": variance}));
    }
    let panel = Curves { y_label: "log₁₀ Σ|e Λ v|".to_owned(), series };
    pictures::training_curves(&folder.join("ranked.svg"), "rank (% of the training examples)", &[panel])?;
    Ok(json!(numbers))
}

/// Easy, uncertain and unexpected digits: where they lie, and what they look like.
fn kinds(data: &Digits, net: &Mlp, opt: &Optimizer<Ivon>, folder: &Path) -> Outcome<serde_json::Value> {
    const EACH: usize = 20;
    const SHOWN: usize = 4000;
    let s = sensitivities(net, opt, &data.train_images, &data.train_labels)?.averaged(DRAWS, 0)?;
    let p = s.errors() + data.train_labels.one_hot(10);
    let sum = |t: Tensor| t.sum_dim_intlist(1, false, Kind::Double);
    let (error, lambda, variance) = (sum(s.errors().square()).sqrt(), sum(&p - p.square()), sum(s.variance()?));
    let outliers = selection::top(&error, EACH)?;
    // Not those again.
    let others = lambda.index_fill(0, &Tensor::from_slice(&outliers), -1.0);
    let kinds = [
        ("easy: smallest ‖v e‖ of each class", selection::class_balanced(&-s.shift_size()?, &data.train_labels, EACH)?),
        ("uncertain: largest tr Λ", selection::top(&others, EACH)?),
        ("outliers: largest ‖e‖", outliers),
    ];
    let every = (error.numel() / SHOWN).max(1);
    let all: Vec<i64> = (0..error.numel() as i64).step_by(every).collect();
    let clouds =
        [(&lambda, "tr Λ, uncertainty of the prediction"), (&variance.log10(), "log₁₀ tr v, variance of the logits")];
    let clouds = clouds.map(|(y, label)| {
        let at = |i: &i64| (error.double_value(&[*i]), y.double_value(&[*i]));
        let of = |name: &str, which: &[i64]| (name.to_owned(), which.iter().map(at).collect());
        let groups = kinds.iter().map(|(name, which)| of(name, which));
        Cloud {
            x_label: "‖e‖, error of the prediction".to_owned(),
            y_label: label.to_owned(),
            groups: std::iter::once(of("training examples", &all)).chain(groups).collect(),
        }
    });
    pictures::scatter(&folder.join("kinds.svg"), &clouds)?;
    let predicted = p.argmax(1, false);
    let row = |(name, which): &(&str, Vec<i64>)| {
        let caption = |i: &i64| match (data.train_labels.int64_value(&[*i]), predicted.int64_value(&[*i])) {
            (label, predicted) if label == predicted => format!("{label}"),
            (label, predicted) => format!("{label} → {predicted}"),
        };
        let images = data.train_images.index_select(0, &Tensor::from_slice(which));
        Row { title: (*name).to_owned(), images: images.view([-1, 784]), captions: which.iter().map(caption).collect() }
    };
    sheets::rows(&folder.join("kinds_digits.svg"), &kinds.each_ref().map(row))?;
    println!("   means of {EACH} each                               ‖e‖       tr Λ       tr v   Σ|e Λ v|");
    let mut numbers = Vec::new();
    let score = s.score()?;
    for (name, which) in &kinds {
        let at = Tensor::from_slice(which);
        let means =
            [&error, &lambda, &variance, &score].map(|t| t.index_select(0, &at).mean(Kind::Double).double_value(&[]));
        let [a, b, c, d] = means;
        println!("     {name:<40} {a:10.2e} {b:10.2e} {c:10.2e} {d:10.2e}");
        numbers.push(json!({"kind": name, "error": a, "lambda": b, "variance": c, "score": d}));
    }
    Ok(json!(numbers))
}

/// Accuracy (%) of the network without its least important weights; biases stay.
fn prune(data: &Digits, net: &Mlp, opt: &Optimizer<Ivon>, hess_init: f64, folder: &Path) -> Outcome<serde_json::Value> {
    let q = opt.posterior()?;
    let few = data.train_images.narrow(0, 0, data.train_images.size()[0].min(2000));
    let fisher = Fisher::exact().diagonal(&net.vs, few.split(500, 0), |x| net.logits(x))?;
    let mut importances = [
        ("magnitude |m|", pruning::magnitude(&net.vs)),
        ("signal to noise |m|√s", q.signal_to_noise()),
        ("Fisher ½m²F", pruning::saliency(&fisher, &net.vs)?),
    ];
    let shares = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99];
    let score = || accuracy(net, &data.test_images, &data.test_labels).map(|a| 100.0 * a);
    let mut series = Vec::new();
    println!("   {:<24} accuracy (%) without 50, 80, 90, 95 % of the weights", "");
    for (name, importance) in &mut importances {
        importance.retain(|(name, _)| name.ends_with("weight"));
        let mut points = Vec::new();
        for share in shares {
            pruning::prune(importance, share)?.apply(&net.vs)?;
            points.push((100.0 * share, score()?));
            q.copy_mean_to(&net.vs)?;
        }
        let at = |share: f64| points.iter().find(|p| p.0 == 100.0 * share).map_or(f64::NAN, |p| p.1);
        println!("   {name:<24} {:.2}  {:.2}  {:.2}  {:.2}", at(0.5), at(0.8), at(0.9), at(0.95));
        series.push(((*name).to_owned(), points));
    }
    let panel = Curves { y_label: "test accuracy (%)".to_owned(), series: series.clone() };
    pictures::training_curves(&folder.join("pruning.svg"), "weights pruned (%)", &[panel])?;

    // And on with the training of what is left.
    let mask = pruning::prune(&importances[1].1, 0.95)?;
    mask.apply(&net.vs)?;
    let n = data.train_labels.numel();
    let mut opt = ivon(n, n.div_ceil(BATCH) as u64, hess_init).build(&net.vs, 0.1)?;
    for (x, y) in batches(&data.train_images, &data.train_labels, BATCH, 1000, Last::Keep) {
        mask.step(&mut opt, || net.logits(&x).cross_entropy_for_logits(&y))?;
    }
    let trained = score()?;
    println!("   with 5 % of the weights by signal to noise, after another epoch: {trained:.2}");
    Ok(json!({"curves": series, "five_percent_trained_on": trained}))
}

const SCORES: [&str; 3] = ["‖v e‖, of the logits", "Σ|e Λ v|, of the predictions", "‖e‖, the error alone"];

/// Shares of the wrong labels among the 10 % of highest ‖v e‖, Σ|e Λ v| and ‖e‖, each with p of the mean and averaged p, after
/// some epochs.
fn wrong_labels(data: &Digits, (epochs, hess_init): (u64, f64), folder: &Path) -> Outcome<Vec<(u64, [[f64; 2]; 3])>> {
    let mut rng = Rng::new(0, 7);
    let clean: Vec<i64> = Vec::try_from(&data.train_labels)?;
    let noisy: Vec<i64> =
        clean.iter().map(|&y| if rng.unit() < NOISE { (y + 1 + rng.below(9) as i64) % 10 } else { y }).collect();
    let labels = Tensor::from_slice(&noisy);
    let wrong: Vec<bool> = clean.iter().zip(&noisy).map(|(a, b)| a != b).collect();
    let all = wrong.iter().filter(|w| **w).count() as f64;
    let found = |scores: &Tensor| -> Outcome<f64> {
        let suspects = selection::top(scores, wrong.len() / 10)?;
        Ok(suspects.iter().filter(|i| wrong[**i as usize]).count() as f64 / all)
    };
    let (net, mut opt) = network(clean.len(), epochs, hess_init)?;
    let bar = progress("   IVON", epochs);
    let (mut shares, mut evolution) = (Vec::new(), Vec::new());
    for epoch in 0..epochs {
        for (x, y) in batches(&data.train_images, &labels, BATCH, epoch, Last::Keep) {
            opt.step(|| net.logits(&x).cross_entropy_for_logits(&y))?;
        }
        bar.inc(1);
        if checkpoint(epoch + 1, epochs) {
            let s = sensitivities(&net, &opt, &data.train_images, &labels)?;
            let averaged = s.averaged(DRAWS, epoch)?;
            let size = |s: &Sensitivity| s.errors().square().sum_dim_intlist(1, false, Kind::Double).sqrt();
            let both = |f: &dyn Fn(&Sensitivity) -> Outcome<Tensor>| -> Outcome<[f64; 2]> {
                Ok([found(&f(&s)?)?, found(&f(&averaged)?)?])
            };
            let all = [both(&|s| Ok(s.shift_size()?))?, both(&|s| Ok(s.score()?))?, both(&|s| Ok(size(s)))?];
            shares.push((epoch + 1, all));
            evolution.push(look(epoch + 1, &s)?);
        }
    }
    bar.finish();
    draw_evolution(&evolution, &wrong, folder)?;
    draw_found(&shares, folder)?;
    Ok(shares)
}

/// Mean sensitivities of the wrong labels, and of the others by what they are at the end.
fn draw_evolution(evolution: &Evolution, wrong: &[bool], folder: &Path) -> Outcome<()> {
    let end = &evolution.last().ok_or("no epoch")?.1;
    // From the most to the least sensitive one at the end.
    let (_, order) = end.sort(0, true);
    let order: Vec<i64> = Vec::try_from(order)?;
    let (bad, good): (Vec<i64>, Vec<i64>) = order.into_iter().partition(|i| wrong[*i as usize]);
    let tenth = good.len() / 10;
    let groups = [
        ("wrong labels", &bad[..]),
        ("right: most sensitive tenth at the end", &good[..tenth]),
        ("right: middle tenth", &good[good.len() / 2 - tenth / 2..][..tenth]),
        ("right: least sensitive tenth", &good[good.len() - tenth..]),
    ];
    let series = groups.map(|(name, which)| {
        let which = Tensor::from_slice(which);
        let mean = |s: &Tensor| s.index_select(0, &which).mean(Kind::Double).double_value(&[]);
        (name.to_owned(), evolution.iter().map(|(epoch, s, _)| (*epoch as f64, mean(s).log10())).collect())
    });
    let panel = Curves { y_label: "log₁₀ of the mean Σ|e Λ v|".to_owned(), series: series.to_vec() };
    pictures::training_curves(&folder.join("evolution.svg"), "epoch", &[panel])
}

fn draw_found(shares: &[(u64, [[f64; 2]; 3])], folder: &Path) -> Outcome<()> {
    let panels = ["p of the mean", "p averaged"].iter().enumerate().map(|(k, name)| {
        let line = |score: usize| shares.iter().map(|(epoch, all)| (*epoch as f64, 100.0 * all[score][k])).collect();
        let series = SCORES.iter().enumerate().map(|(score, name)| ((*name).to_owned(), line(score)));
        Curves { y_label: format!("wrong labels found (%), {name}"), series: series.collect() }
    });
    pictures::training_curves(&folder.join("found.svg"), "epoch", &panels.collect::<Vec<_>>())
}
