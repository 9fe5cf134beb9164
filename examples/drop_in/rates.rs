//! A picture of how much a learning rate matters.

use super::scores::Better;
use super::table::{Run, distinct};
use std::path::Path;
use tch_blr_examples::Outcome;
use tch_blr_examples::pictures::{Curves, training_curves};

/// Percent, where a curve ends: of what is this bad, it does not matter how bad it is.
const WORST: f64 = 30.0;

/// One panel per optimizer, one curve per program: by how much a learning rate is worse than the best of them all.
pub(crate) fn draw(runs: &[Run], path: &Path) -> Outcome {
    let of = |optimizer: &str, program: &str| -> Vec<(f64, f64)> {
        let all = runs.iter().filter(|run| run.program == program);
        let best = all.clone().filter_map(quality).fold(f64::INFINITY, f64::min);
        let factors = distinct(all.clone().map(|run| run.lr_scale));
        let point = |factor: f64| {
            let seeds: Vec<f64> = all
                .clone()
                .filter(|run| run.optimizer == optimizer && run.lr_scale == factor)
                .map(|run| quality(run).map_or(WORST, |q| (100.0 * (q - best) / best.abs()).min(WORST)))
                .collect();
            (factor.log2(), seeds.iter().sum::<f64>() / seeds.len() as f64)
        };
        factors.into_iter().map(point).collect()
    };
    let programs = distinct(runs.iter().map(|run| run.program));
    let panel = |optimizer: &str| Curves {
        y_label: format!("{optimizer}: worse than the best by (%)"),
        series: programs.iter().map(|program| ((*program).to_owned(), of(optimizer, program))).collect(),
    };
    let panels: Vec<Curves> = distinct(runs.iter().map(|run| &*run.optimizer)).into_iter().map(panel).collect();
    training_curves(path, "log₂ of the factor on the learning rate", &panels)
}

/// A number that is low where a run is good: its first loss or error, or what is missing where it has none.
fn quality(run: &Run) -> Option<f64> {
    let measures = &run.scores()?.measures;
    let lower = measures.iter().find(|m| m.better == Better::Lower).map(|m| m.at_mean);
    lower.or_else(|| measures.first().map(|m| -m.at_mean))
}
