//! Reliability diagrams.

use super::frame::{axes, picture, some, titled};
use super::style::{BLACK, BLUE, GREY, Key, MARGIN, OVER, UNDER};
use crate::Outcome;
use plotters::prelude::*;
use std::path::Path;
use tch_blr::metrics::Reliability;

/// Draws reliability diagrams side by side: accuracy per bin of confidence (black line), by how much the mean
/// confidence exceeds it or falls short of it, and below the share of examples in each bin, on one scale.
/// The title holds the expected calibration error.
///
/// # Errors
///
/// If there is no diagram, a diagram holds no examples, or the file cannot be written.
pub fn reliability(path: &Path, diagrams: &[(String, Reliability)]) -> Outcome {
    some(diagrams, "reliability diagrams")?;
    let keys = [
        ("accuracy", Key::Line(BLACK)),
        ("overconfident by", Key::Box(OVER)),
        ("underconfident by", Key::Box(UNDER)),
        ("perfect calibration", Key::Dashes(BLACK)),
    ];
    let counts = diagrams.iter().flat_map(|(_, t)| t.bins.iter().map(|b| b.count as f64 / t.examples().max(1) as f64));
    let top = 1.1 * counts.fold(0.0, f64::max);
    picture(path, (diagrams.len(), 300, 400), &keys, |_, areas| {
        for (i, (area, (name, table))) in areas.iter().zip(diagrams).enumerate() {
            let total = table.examples() as f64;
            if total == 0.0 {
                return Err(format!("no examples in the reliability diagram of {name}").into());
            }
            let area = titled(area, &format!("{name}: ECE {:.2} %", 100.0 * table.ece()))?;
            let (upper, lower) = area.split_vertically(270);
            let mut chart = ChartBuilder::on(&upper)
                .margin(MARGIN)
                .margin_bottom(0)
                .x_label_area_size(8)
                .y_label_area_size(52)
                .build_cartesian_2d(0.0..1.0, 0.0..1.0)?;
            axes(&mut chart, ("", if i == 0 { "accuracy" } else { "" }), (0, 6))?;
            for b in table.bins.iter().filter(|b| b.count > 0) {
                let boxed = |from: f64, to: f64| [(b.lower, from), (b.upper, to)];
                let gap = if b.confidence > b.accuracy { OVER } else { UNDER };
                chart.draw_series([
                    Rectangle::new(boxed(0.0, b.accuracy), BLUE.filled()),
                    Rectangle::new(boxed(b.accuracy.min(b.confidence), b.accuracy.max(b.confidence)), gap.filled()),
                    Rectangle::new(boxed(0.0, b.accuracy.max(b.confidence)), WHITE.stroke_width(1)),
                ])?;
                chart.draw_series([PathElement::new(boxed(b.accuracy, b.accuracy), BLACK.stroke_width(2))])?;
            }
            chart.draw_series(DashedLineSeries::new([(0.0, 0.0), (1.0, 1.0)], 5, 4, BLACK.stroke_width(1)))?;

            let mut chart = ChartBuilder::on(&lower)
                .margin(MARGIN)
                .margin_top(4)
                .x_label_area_size(42)
                .y_label_area_size(52)
                .build_cartesian_2d(0.0..1.0, 0.0..top)?;
            axes(&mut chart, ("confidence", if i == 0 { "share" } else { "" }), (6, 3))?;
            let bars = table
                .bins
                .iter()
                .map(|b| Rectangle::new([(b.lower, 0.0), (b.upper, b.count as f64 / total)], GREY.mix(0.7).filled()));
            chart.draw_series(bars)?;
        }
        Ok(())
    })
}
