//! Accuracy and calibration of Adam, VOGN and IVON, at the mean and averaged over the posterior.

use serde_json::{Map, Value, json};
use std::path::Path;
use tch_blr::rule::Row;
use tch_blr::{Adam, DiagonalGaussian, Ivon, Optimizer, Schedule, Von};
use tch_blr_examples::digits::{Digits, letters};
use tch_blr_examples::model::{Mlp, Scores, averaged, train};
use tch_blr_examples::{Outcome, pictures};

const EPOCHS: u64 = 5;
const BATCH: usize = 128;
const SAMPLES: usize = 64;

/// Everything that the pictures and the report show of one optimizer.
struct Trained {
    name: &'static str,
    curve: Vec<(f64, f64)>,
    at_mean: Scores,
    over_samples: Option<Scores>,
    posterior: Option<DiagonalGaussian>,
}

pub fn run(data: &Digits, folder: &Path) -> Outcome<Value> {
    let n = data.train_labels.numel() as f64;
    let steps = (data.train_labels.numel() as u64).div_ceil(BATCH as u64);
    let schedule = Schedule::Cosine { warmup: steps, total: EPOCHS * steps, end: 0.0 };

    let adam = |net: &Mlp| Adam::default().schedule(schedule).build(&net.vs, 1e-3);
    let adam = trained("Adam", data, adam, |_| Ok(None))?;
    let vogn = Von::vogn().ess(n).hess_init(0.01).damping(0.01).weight_decay(2e-5);
    let vogn =
        trained("VOGN", data, |net| vogn.schedule(schedule).build(&net.vs, 0.03), |opt| opt.posterior().map(Some))?;
    let ivon = Ivon::default().ess(n).hess_init(0.1).weight_decay(2e-5).beta2(0.9999);
    let ivon =
        trained("IVON", data, |net| ivon.schedule(schedule).build(&net.vs, 0.5), |opt| opt.posterior().map(Some))?;
    let all = [adam, vogn, ivon];

    println!("\n  {:<28} accuracy     NLL     ECE  OOD AUROC", "");
    for t in &all {
        line(&format!("{}, at the mean", t.name), &t.at_mean);
        if let Some(scores) = &t.over_samples {
            line(&format!("{}, {SAMPLES} samples", t.name), scores);
        }
    }
    println!("  OOD: letters drawn with the same pen, told from digits by predictive entropy.");
    draw(&all, folder)?;

    let mut report = Map::new();
    for t in &all {
        let over_samples = t.over_samples.as_ref().map(Scores::json);
        report.insert(
            t.name.to_owned(),
            json!({"at_mean": t.at_mean.json(), "over_samples": over_samples, "curve": t.curve}),
        );
    }
    Ok(Value::Object(report))
}

fn trained<R: Row>(
    name: &'static str,
    data: &Digits,
    build: impl Fn(&Mlp) -> tch_blr::Result<Optimizer<R>>,
    posterior: impl Fn(&Optimizer<R>) -> tch_blr::Result<Option<DiagonalGaussian>>,
) -> Outcome<Trained> {
    tch::manual_seed(0);
    let net = Mlp::new(&[784, 256, 256, 10]);
    let mut opt = build(&net)?;
    let curve = train(name, &net, &mut opt, (&data.train_images, &data.train_labels), (EPOCHS, BATCH), 0)?;
    let letters = letters(2000, 0);
    let scores = |p: &tch::Tensor, out: &tch::Tensor| Scores::of(p, &data.test_labels, out);
    let at_mean = scores(&net.probabilities(&data.test_images), &net.probabilities(&letters))?;
    let posterior = posterior(&opt)?;
    let over_samples = match &posterior {
        Some(q) => {
            let [test, out] = averaged(q, &net, SAMPLES, [&data.test_images, &letters])?;
            Some(scores(&test, &out)?)
        }
        None => None,
    };
    Ok(Trained { name, curve, at_mean, over_samples, posterior })
}

fn line(name: &str, s: &Scores) {
    let (accuracy, ece) = (100.0 * s.accuracy, s.reliability.ece());
    println!("  {name:<28} {accuracy:>6.2} %  {:>6.4}  {ece:>6.4}     {:>6.4}", s.nll, s.ood_auroc);
}

fn draw(all: &[Trained], folder: &Path) -> Outcome<()> {
    let panel = |y_label: &str, from: f64| {
        let after = |curve: &[(f64, f64)]| curve.iter().copied().filter(|p| p.0 > from).collect();
        let series = all.iter().map(|t| (t.name.to_owned(), after(&t.curve))).collect();
        pictures::Curves { y_label: y_label.to_owned(), series }
    };
    let panels = [panel("training loss (nats per example)", 0.0), panel("the same, after the first epoch", 1.0)];
    pictures::training_curves(&folder.join("training.svg"), "epoch", &panels)?;

    let best = |t: &Trained| t.over_samples.as_ref().unwrap_or(&t.at_mean).reliability.clone();
    let label = |t: &Trained| match t.over_samples {
        Some(_) => format!("{}, {SAMPLES} samples", t.name),
        None => t.name.to_owned(),
    };
    let diagrams: Vec<_> = all.iter().map(|t| (label(t), best(t))).collect();
    pictures::reliability(&folder.join("reliability.svg"), &diagrams)?;

    let mut precisions = Vec::new();
    for t in all {
        if let Some(q) = &t.posterior {
            let mut logs = Vec::new();
            for name in q.names() {
                let s = q.precision(name).expect("a name of the posterior");
                logs.extend(Vec::<f64>::try_from(s.log10().flatten(0, -1).to_kind(tch::Kind::Double))?);
            }
            precisions.push((t.name.to_owned(), logs));
        }
    }
    pictures::histograms(&folder.join("precisions.svg"), "log₁₀ of the posterior precision of a weight", &precisions)
}
