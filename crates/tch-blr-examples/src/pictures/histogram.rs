//! Histograms.

use super::frame::{axes, picture, range, some};
use super::style::{Key, MARGIN, color};
use crate::Outcome;
use plotters::prelude::*;
use std::path::Path;

/// Draws the histograms of several samples over one axis, as outlines filled lightly: for instance log₁₀ precisions.
///
/// The vertical axis is the logarithm of each bin's share, so that the few weights that matter show beside the many
/// that do not. Values that are not finite are left out.
///
/// # Errors
///
/// If there is no sample, a sample has no finite value, or the file cannot be written.
pub fn histograms(path: &Path, x_label: &str, samples: &[(String, Vec<f64>)]) -> Outcome {
    const BINS: usize = 70;
    some(samples, "histograms")?;
    let finite = |values: &[f64]| values.iter().copied().filter(|v| v.is_finite()).collect::<Vec<_>>();
    let samples: Vec<(&str, Vec<f64>)> = samples.iter().map(|(n, v)| (n.as_str(), finite(v))).collect();
    if let Some((name, _)) = samples.iter().find(|(_, v)| v.is_empty()) {
        return Err(format!("no finite values for the histogram of {name}").into());
    }
    let (low, high) = range(samples.iter().flat_map(|(_, v)| v.iter().copied()), 0.02).ok_or("no finite values")?;
    let width = (high - low) / BINS as f64;
    // An empty bin stands half a count below a bin with one.
    let bottom = samples.iter().map(|(_, v)| (0.5 / v.len() as f64).log10()).fold(0.0, f64::min);
    let heights: Vec<Vec<f64>> = samples
        .iter()
        .map(|(_, values)| {
            let mut counts = [0_usize; BINS];
            for v in values {
                counts[(((v - low) / width) as usize).min(BINS - 1)] += 1;
            }
            let share = |c: usize| if c == 0 { bottom } else { (c as f64 / values.len() as f64).log10() };
            counts.iter().map(|&c| share(c)).collect()
        })
        .collect();
    let keys: Vec<(&str, Key)> = samples.iter().enumerate().map(|(i, (n, _))| (*n, Key::Outline(color(i)))).collect();
    picture(path, (1, 560, 330), &keys, |_, areas| {
        let mut chart = ChartBuilder::on(&areas[0])
            .margin(MARGIN)
            .x_label_area_size(42)
            .y_label_area_size(60)
            .build_cartesian_2d(low..high, bottom..0.0)?;
        axes(&mut chart, (x_label, "log₁₀ of the share of weights in a bin"), (8, 6))?;
        for (i, heights) in heights.iter().enumerate() {
            let edge = |b: usize| low + width * b as f64;
            let mut steps = vec![(low, bottom)];
            steps.extend(heights.iter().enumerate().flat_map(|(b, &d)| [(edge(b), d), (edge(b + 1), d)]));
            steps.push((high, bottom));
            chart.draw_series([Polygon::new(steps.clone(), color(i).mix(0.16).filled())])?;
            chart.draw_series(LineSeries::new(steps, color(i).stroke_width(2)))?;
        }
        Ok(())
    })
}
