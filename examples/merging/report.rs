//! Tables, pictures and numbers of all seeds.

use crate::measure::{POINTS, Run, grid};
use crate::networks::WEIGHTED;
use serde_json::{Map, Value, json};
use std::path::Path;
use tch_blr_examples::Outcome;
use tch_blr_examples::pictures::{Curves, training_curves};

/// Mean and standard deviation of what the runs say.
pub fn over(runs: &[Run], of: impl Fn(&Run) -> f64) -> [f64; 2] {
    let n = runs.len() as f64;
    let mean = runs.iter().map(&of).sum::<f64>() / n;
    let squares: f64 = runs.iter().map(|r| (of(r) - mean).powi(2)).sum();
    [mean, if runs.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 }]
}

pub fn table(runs: &[Run]) -> Value {
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
            json!({
                "accuracy_percent": all, "accuracy_0_4": low, "accuracy_5_9": high,
                "gradient_mismatch": [first, second],
            }),
        );
    }
    Value::Object(report)
}

/// The weights that the validation digits choose, and the accuracies over all weights.
pub fn sweep(runs: &[Run], path: &Path) -> Outcome<Value> {
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

pub fn line(runs: &[Run], path: &Path) -> Outcome<Value> {
    let (mut series, mut report) = (Vec::new(), Map::new());
    // Neither end knows the digits of the other, so no barrier rises above the chord; the lowest loss says more.
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
