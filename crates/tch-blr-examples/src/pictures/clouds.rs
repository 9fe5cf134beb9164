//! Clouds of points.

use super::frame::{axes, picture, range, some};
use super::style::{GREY, Key, MARGIN, color};
use crate::Outcome;
use plotters::prelude::*;
use std::path::Path;

/// One panel of [`scatter`].
#[derive(Debug, Clone)]
pub struct Cloud {
    /// What the horizontal axis shows.
    pub x_label: String,
    /// What the vertical axis shows.
    pub y_label: String,
    /// A name and points (x, y) per group; later groups lie on top. Points that are not finite are left out.
    pub groups: Vec<(String, Vec<(f64, f64)>)>,
}

/// Draws panels side by side, a dot for each point; a name has the same colour in every panel, the first one grey.
///
/// # Errors
///
/// If there is no panel, a panel has no finite point, or the file cannot be written.
pub fn scatter(path: &Path, panels: &[Cloud]) -> Outcome {
    some(panels, "clouds of points")?;
    let shade = |i: usize| if i == 0 { GREY.mix(0.45) } else { color(i - 1).to_rgba() };
    let names = panels[0].groups.iter().enumerate();
    let keys: Vec<(&str, Key)> = names.map(|(i, (n, _))| (n.as_str(), Key::Dot(shade(i)))).collect();
    picture(path, (panels.len(), 430, 340), &keys, |root, areas| {
        for (area, panel) in areas.iter().zip(panels) {
            let finite = |p: &&(f64, f64)| p.0.is_finite() && p.1.is_finite();
            let points = || panel.groups.iter().flat_map(|(_, p)| p).filter(finite);
            let of = |range: Option<(f64, f64)>| range.ok_or_else(|| format!("no points for {}", panel.y_label));
            let (x, y) = (of(range(points().map(|p| p.0), 0.03))?, of(range(points().map(|p| p.1), 0.03))?);
            let mut chart = ChartBuilder::on(area)
                .margin(MARGIN)
                .x_label_area_size(42)
                .y_label_area_size(60)
                .build_cartesian_2d(x.0..x.1, y.0..y.1)?;
            axes(&mut chart, (&panel.x_label, &panel.y_label), (6, 6))?;
            for (i, (_, points)) in panel.groups.iter().enumerate() {
                let radius = if i == 0 { 1 } else { 3 };
                for p in points.iter().filter(finite) {
                    root.draw(&Circle::new(chart.backend_coord(p), radius, shade(i).filled()))?;
                }
            }
        }
        Ok(())
    })
}
