//! A picture of how much a learning rate matters.

use super::scores::Better;
use super::table::{Run, distinct};
use std::path::Path;
use tch_blr_examples::Outcome;
use tch_blr_examples::pictures::{Curves, training_curves};

/// One panel per program: its loss or error, or what it has instead, over the factor on the learning rate.
pub(crate) fn draw(runs: &[Run], path: &Path) -> Outcome {
    let panels = distinct(runs.iter().map(|run| run.program)).into_iter().filter_map(|program| {
        let all: Vec<&Run> = runs.iter().filter(|run| run.program == program).collect();
        let measures = &all.iter().find_map(|run| run.scores())?.measures;
        let shown = measures.iter().position(|m| m.better == Better::Lower).unwrap_or_default();
        let optimizers = distinct(all.iter().map(|run| &*run.optimizer));
        Some(Curves {
            y_label: format!("{program}: {}", measures[shown].name),
            series: optimizers.into_iter().map(|name| (name.to_owned(), curve(&all, name, shown))).collect(),
        })
    });
    training_curves(path, "log₂ of the factor on the learning rate", &panels.collect::<Vec<_>>())
}

/// Means over the seeds; a training that failed is missing.
fn curve(runs: &[&Run], optimizer: &str, measure: usize) -> Vec<(f64, f64)> {
    let runs = || runs.iter().filter(|run| run.optimizer == optimizer);
    let point = |factor: f64| {
        let of = runs().filter(|run| run.lr_scale == factor).filter_map(|run| run.scores());
        let values: Vec<f64> = of.map(|scores| scores.measures[measure].at_mean).collect();
        (factor.log2(), values.iter().sum::<f64>() / values.len() as f64)
    };
    distinct(runs().map(|run| run.lr_scale)).into_iter().map(point).collect()
}
