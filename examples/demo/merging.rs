//! Two fine-tunes of one posterior, merged by adding natural parameters.
//!
//! The base knows centred digits. One fine-tune sees shifted 0-4, the other shifted 5-9; wanted is a network for all
//! shifted digits.

use crate::claims::Claim;
use crate::settings::{FINE_TUNE, LR, NETWORK, fit, ivon, steps};
use serde_json::{Map, Value, json};
use tch::Tensor;
use tch_blr::{DiagonalGaussian, Philox, combine};
use tch_blr_examples::Outcome;
use tch_blr_examples::batches::subset;
use tch_blr_examples::handwritten::{Examples, SIDE};
use tch_blr_examples::model::{Mlp, ProgressBar, accuracy, progress};
use tch_blr_examples::tables::{mean_and_sd, plus_minus};

const HALVES: [[i64; 5]; 2] = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]];

/// A pixel to the right and down, over the edge.
fn shifted(images: &Tensor) -> Tensor {
    let side = SIDE as i64;
    // Left, right, top, bottom.
    let wide = images.view([-1, side, side]).constant_pad_nd([1, 0, 1, 0]);
    wide.narrow(1, 0, side).narrow(2, 0, side).reshape([-1, side * side])
}

fn average(a: &DiagonalGaussian, b: &DiagonalGaussian) -> tch_blr::Result<DiagonalGaussian> {
    DiagonalGaussian::new(a.names().map(|name| {
        let mean = |q: &DiagonalGaussian| q.mean(name).expect("fine-tunes have the base's parameters");
        (name.to_owned(), (mean(a) + mean(b)) * 0.5, mean(a).ones_like())
    }))
}

/// The base, its fine-tunes and their merges.
fn models(
    net: &Mlp,
    base: &DiagonalGaussian,
    halves: &[Examples; 2],
    (seed, bar): (u64, &ProgressBar),
) -> Outcome<Vec<(&'static str, DiagonalGaussian)>> {
    let fine_tune = |data: &Examples| -> Outcome<DiagonalGaussian> {
        base.copy_mean_to(&net.vs)?;
        let mut opt = ivon(data.len(), FINE_TUNE).prior(base).noise(Philox { seed }).build(&net.vs, LR)?;
        fit((net, &mut opt), data, (FINE_TUNE, seed), bar, |_| Ok(()))?;
        Ok(opt.learned_posterior()?)
    };
    let (low, high) = (fine_tune(&halves[0])?, fine_tune(&halves[1])?);
    // Both contain the base once; so does the merge.
    let merged = combine(&[(1.0, &low), (1.0, &high), (-1.0, base)])?;
    let average = average(&low, &high)?;
    Ok(vec![
        ("base", base.shallow_clone()),
        ("fine-tune on 0-4", low),
        ("fine-tune on 5-9", high),
        ("plain average", average),
        ("posterior merge", merged),
    ])
}

pub fn run(train: &Examples, test: &Examples, bases: &[DiagonalGaussian]) -> Outcome<(Value, Vec<Claim>)> {
    let (wanted, test) = (train.with(shifted), test.with(shifted));
    let halves = HALVES.map(|digits| wanted.at(&subset(&wanted.labels, &digits)));
    let each: u64 = halves.iter().map(|half| steps(half.len(), FINE_TUNE)).sum();
    let bar = progress("two fine-tunes, five seeds", bases.len() as u64 * each);
    let net = Mlp::new(&NETWORK);
    let mut table: Vec<(&str, Vec<f64>)> = Vec::new();
    for (seed, base) in (200..).zip(bases) {
        for (i, (name, q)) in models(&net, base, &halves, (seed, &bar))?.into_iter().enumerate() {
            q.copy_mean_to(&net.vs)?;
            if table.len() == i {
                table.push((name, Vec::new()));
            }
            table[i].1.push(accuracy(&net, &test.images, &test.labels)?);
        }
    }
    bar.finish_and_clear();
    println!("  {:<34} {:>12}", "accuracy (%) on shifted digits 0-9", "");
    for (name, accuracies) in &table {
        let percent: Vec<f64> = accuracies.iter().map(|a| 100.0 * a).collect();
        println!("  {name:<34} {:>12}", plus_minus(mean_and_sd(&percent), 1));
    }
    let [.., (_, average), (_, merged)] = &table[..] else { return Err("there are no models".into()) };
    let what = "the merge of two fine-tunes' posteriors is above their plain average".to_owned();
    let claim = Claim::above(what, merged, average, 3.0);
    let report: Map<_, _> = table.iter().map(|(name, accuracies)| ((*name).to_owned(), json!(accuracies))).collect();
    Ok((Value::Object(report), vec![claim]))
}
