//! A second task after the first: yesterday's posterior as today's prior, or nothing of the kind.

use crate::claims::Claim;
use crate::settings::{EPOCHS, LR, NETWORK, OLD_COUNTS, fit, ivon, steps};
use serde_json::{Map, Value, json};
use std::path::Path;
use tch::{Kind, Tensor};
use tch_blr::{DiagonalGaussian, Philox, Prior};
use tch_blr_examples::Outcome;
use tch_blr_examples::digits::rotate90;
use tch_blr_examples::handwritten::Examples;
use tch_blr_examples::model::{Mlp, accuracy, progress};
use tch_blr_examples::pictures::{Curves, training_curves};
use tch_blr_examples::tables::{mean_and_sd, plus_minus};

/// Epochs between two looks at the accuracies.
const EVERY: u64 = 10;

/// What is remembered of the first task.
#[derive(Clone, Copy)]
enum Remembered {
    Nothing,
    /// The means, all with one precision: the mean of the posterior's.
    Means,
    Posterior,
}

impl Remembered {
    const ALL: [(&str, Remembered); 3] = [
        ("no prior of the first task", Remembered::Nothing),
        ("its mean, one precision for all", Remembered::Means),
        ("its posterior as prior", Remembered::Posterior),
    ];

    fn prior(self, q: &DiagonalGaussian) -> tch_blr::Result<Option<Prior>> {
        let tempered = q.temper(1.0 / OLD_COUNTS)?;
        Ok(match self {
            Remembered::Nothing => None,
            Remembered::Means => Some(uniform(&tempered)?.into()),
            Remembered::Posterior => Some(tempered.into()),
        })
    }
}

/// The same means, and for all weights the mean of their precisions: what the learned precision adds to "stay close".
fn uniform(q: &DiagonalGaussian) -> tch_blr::Result<DiagonalGaussian> {
    let tensors =
        || q.names().map(|name| (name, q.mean(name).expect("a name of q"), q.precision(name).expect("a name of q")));
    let total: f64 = tensors().map(|(.., s)| s.sum(Kind::Double).double_value(&[])).sum();
    let precision = total / q.len() as f64;
    DiagonalGaussian::new(tensors().map(|(name, m, _)| {
        let s = m.full_like(precision);
        (name, m, s)
    }))
}

/// On the first and on the second task: of each seed, (epoch, accuracy).
type Looks = [Vec<Vec<(f64, f64)>>; 2];

pub fn run(
    train: &Examples,
    test: &Examples,
    first: &[DiagonalGaussian],
    folder: &Path,
) -> Outcome<(Value, Vec<Claim>)> {
    let n = train.len();
    let (rotated, tests) = (train.with(rotate90), [test.images.shallow_clone(), rotate90(&test.images)]);
    let bar = progress("the second task, five seeds", 3 * first.len() as u64 * steps(n, EPOCHS));
    let net = Mlp::new(&NETWORK);
    let mut curves = Vec::new();
    for (_, remembered) in Remembered::ALL {
        let mut curve: Looks = [Vec::new(), Vec::new()];
        for (seed, q) in (100..).zip(first) {
            q.copy_mean_to(&net.vs)?;
            let ivon = ivon(n, EPOCHS).noise(Philox { seed });
            let ivon = if let Some(prior) = remembered.prior(q)? { ivon.prior(prior) } else { ivon };
            let mut opt = ivon.build(&net.vs, LR)?;
            let look = |x: &Tensor| accuracy(&net, x, &test.labels);
            let mut seen: [Vec<(f64, f64)>; 2] = [vec![(0.0, look(&tests[0])?)], vec![(0.0, look(&tests[1])?)]];
            fit((&net, &mut opt), &rotated, (EPOCHS, seed), &bar, |epoch| {
                if epoch.is_multiple_of(EVERY) {
                    for (seen, x) in seen.iter_mut().zip(&tests) {
                        seen.push((epoch as f64, look(x)?));
                    }
                }
                Ok(())
            })?;
            let [old, new] = seen;
            curve[0].push(old);
            curve[1].push(new);
        }
        curves.push(curve);
    }
    bar.finish_and_clear();
    draw(&curves, folder)?;

    let ends = |runs: &[Vec<(f64, f64)>]| -> Vec<f64> { runs.iter().filter_map(|r| Some(r.last()?.1)).collect() };
    let percent = |values: &[f64]| {
        let values: Vec<f64> = values.iter().map(|v| 100.0 * v).collect();
        plus_minus(mean_and_sd(&values), 1)
    };
    println!("  {:<34} {:>12}   {:>12}", "accuracy (%) on digits that are", "upright", "rotated");
    let before: Vec<f64> = curves[0][0].iter().filter_map(|r| Some(r.first()?.1)).collect();
    println!("  {:<34} {:>12}", "after the first task", percent(&before));
    let mut report = Map::from_iter([("before".to_owned(), json!(before))]);
    for ((name, _), [old, new]) in Remembered::ALL.iter().zip(&curves) {
        println!("  {name:<34} {:>12}   {:>12}", percent(&ends(old)), percent(&ends(new)));
        report.insert((*name).to_owned(), json!({"upright": ends(old), "rotated": ends(new)}));
    }
    let [nothing, means, posterior] = [0, 1, 2].map(|i: usize| ends(&curves[i][0]));
    let claim = |than: &str, lower: &[f64], points| {
        Claim::above(
            format!("more of the first task is kept by its posterior as prior than {than}"),
            &posterior,
            lower,
            points,
        )
    };
    Ok((Value::Object(report), vec![claim("without", &nothing, 30.0), claim("by one precision for all", &means, 2.0)]))
}

/// Means over the seeds.
fn draw(curves: &[Looks], folder: &Path) -> Outcome {
    let mean = |runs: &[Vec<(f64, f64)>]| -> Vec<(f64, f64)> {
        let at = |i: usize| {
            let accuracies: Vec<f64> = runs.iter().map(|r| 100.0 * r[i].1).collect();
            (runs[0][i].0, mean_and_sd(&accuracies).0)
        };
        (0..runs[0].len()).map(at).collect()
    };
    let panel = |task: usize, y_label: &str| {
        let series = Remembered::ALL.iter().zip(curves).map(|((name, _), c)| ((*name).to_owned(), mean(&c[task])));
        Curves { y_label: y_label.to_owned(), series: series.collect() }
    };
    let panels = [panel(0, "accuracy on the first task (%)"), panel(1, "accuracy on the second task (%)")];
    training_curves(&folder.join("second_task.svg"), "epochs of the second task", &panels)
}
