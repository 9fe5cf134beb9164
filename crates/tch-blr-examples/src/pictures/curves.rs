//! Curves: training losses and other functions of one number.

use super::frame::{axes, picture, range, some};
use super::style::{Key, MARGIN, color};
use crate::Outcome;
use plotters::prelude::*;
use std::path::Path;

/// One panel of [`training_curves`].
#[derive(Debug, Clone)]
pub struct Curves {
    /// What the vertical axis shows, with its unit.
    pub y_label: String,
    /// A name and points (x, y) per curve. Points that are not finite are left out.
    pub series: Vec<(String, Vec<(f64, f64)>)>,
}

/// Draws panels side by side, each with one line per series; a name has the same colour in every panel.
///
/// # Errors
///
/// If there is no panel, a panel has no finite point, or the file cannot be written.
pub fn training_curves(path: &Path, x_label: &str, panels: &[Curves]) -> Outcome {
    some(panels, "training curves")?;
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in panels.iter().flat_map(|p| &p.series) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let keys: Vec<(&str, Key)> = names.iter().enumerate().map(|(i, &n)| (n, Key::Line(color(i)))).collect();
    picture(path, (panels.len(), 430, 320), &keys, |_, areas| {
        for (area, panel) in areas.iter().zip(panels) {
            let points = || panel.series.iter().flat_map(|(_, p)| p).filter(|p| p.0.is_finite() && p.1.is_finite());
            let x = range(points().map(|p| p.0), 0.0).ok_or_else(|| format!("no points for {}", panel.y_label))?;
            let y = range(points().map(|p| p.1), 0.05).ok_or_else(|| format!("no points for {}", panel.y_label))?;
            let mut chart = ChartBuilder::on(area)
                .margin(MARGIN)
                .x_label_area_size(42)
                .y_label_area_size(60)
                .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
            axes(&mut chart, (x_label, &panel.y_label), (6, 6))?;
            for (name, points) in &panel.series {
                let style = color(names.iter().position(|n| n == name).unwrap_or(0)).stroke_width(2);
                let finite = points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite());
                chart.draw_series(LineSeries::new(finite, style))?;
            }
        }
        Ok(())
    })
}
