//! Which digits the network depends on.

use crate::network::{DRAWS, Evolution, sensitivities};
use serde_json::{Value, json};
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr::{Ivon, Optimizer, selection};
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::Digits;
use tch_blr_examples::model::Mlp;
use tch_blr_examples::pictures::{self, Cloud, Curves};
use tch_blr_examples::sheets::{self, Row};

/// Of these and the last, all are drawn in their order.
const RANKED: [u64; 3] = [1, 3, 10];

/// The most sensitive digits above, the least sensitive below, each in order.
pub fn sheet(data: &Digits, net: &Mlp, opt: &Optimizer<Ivon>, folder: &Path) -> Outcome<()> {
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
pub fn ranked(evolution: &Evolution, folder: &Path) -> Outcome<Value> {
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
pub fn kinds(data: &Digits, net: &Mlp, opt: &Optimizer<Ivon>, folder: &Path) -> Outcome<Value> {
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
