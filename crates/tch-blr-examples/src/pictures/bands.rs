//! Bands: a function of one number with its uncertainty, and the data that it was learned from.

use super::frame::{Area, axes, picture, some, titled};
use super::style::{BLACK, BLUE, GREY, Key, MARGIN};
use crate::Outcome;
use plotters::prelude::*;
use std::path::Path;

/// Of the function, and of the data around it: opaque, so that one covers the other.
const INNER: RGBColor = RGBColor(0x9C, 0xC9, 0xE6);
const OUTER: RGBColor = RGBColor(0xE1, 0xEF, 0xF8);

/// One panel of [`bands`].
#[derive(Debug)]
pub struct Panel {
    /// Stands above the panel.
    pub title: String,
    /// x in rising order, the mean there, and the standard deviations of the function and of an observation.
    pub curve: Vec<[f64; 4]>,
    /// (x, y) of the training examples.
    pub seen: Vec<(f64, f64)>,
    /// (x, y) of the others.
    pub held_out: Vec<(f64, f64)>,
}

/// Draws panels side by side: the mean, bands of two standard deviations, and the data, over the rectangle `extent` =
/// ((x₀, x₁), (y₀, y₁)), beyond which nothing is drawn. Dashes stand at both ends of `gap`.
///
/// # Errors
///
/// If there is no panel, the extent is empty, a curve is not finite, or the file cannot be written.
pub fn bands(path: &Path, panels: &[Panel], extent: ((f64, f64), (f64, f64)), gap: (f64, f64)) -> Outcome {
    some(panels, "bands")?;
    let ((x0, x1), (y0, y1)) = extent;
    if !(x0 < x1 && y0 < y1) {
        return Err(format!("extent {extent:?} is empty").into());
    }
    if let Some(panel) = panels.iter().find(|p| p.curve.iter().flatten().any(|v| !v.is_finite())) {
        return Err(format!("{}: the curve is not finite", panel.title).into());
    }
    let keys = [
        ("mean", Key::Line(BLUE)),
        ("± 2σ of the function", Key::Box(INNER)),
        ("± 2σ of an observation", Key::Box(OUTER)),
        ("training data", Key::Disc),
        ("held out", Key::Square),
        ("gap in the training data", Key::Dashes(BLACK)),
    ];
    picture(path, (panels.len(), 380, 330), &keys, |root: &Area<'_>, areas| {
        for (i, (area, panel)) in areas.iter().zip(panels).enumerate() {
            let area = titled(area, &panel.title)?;
            let mut chart = ChartBuilder::on(&area)
                .margin(MARGIN)
                .x_label_area_size(42)
                .y_label_area_size(52)
                .build_cartesian_2d(x0..x1, y0..y1)?;
            let curve = || panel.curve.iter().filter(|c| (x0..=x1).contains(&c[0]));
            for (deviation, shade) in [(3, OUTER), (2, INNER)] {
                let edge = |c: &[f64; 4], sign: f64| (c[0], (c[1] + sign * 2.0 * c[deviation]).clamp(y0, y1));
                let outline = curve().map(|c| edge(c, 1.0)).chain(curve().rev().map(|c| edge(c, -1.0)));
                chart.draw_series([Polygon::new(outline.collect::<Vec<_>>(), shade.filled())])?;
            }
            axes(&mut chart, ("x", if i == 0 { "y" } else { "" }), (6, 6))?;
            for x in [gap.0, gap.1] {
                chart.draw_series(DashedLineSeries::new([(x, y0), (x, y1)], 5, 4, GREY.stroke_width(1)))?;
            }
            for (points, key) in [(&panel.seen, Key::Disc), (&panel.held_out, Key::Square)] {
                for &(x, y) in points.iter().filter(|p| (x0..=x1).contains(&p.0) && (y0..=y1).contains(&p.1)) {
                    key.draw(root, chart.backend_coord(&(x, y)))?;
                }
            }
            let mean: Vec<_> = curve().map(|c| (c[0], c[1])).collect();
            for part in mean.split(|p| !(y0..=y1).contains(&p.1)) {
                chart.draw_series(LineSeries::new(part.iter().copied(), BLUE.stroke_width(2)))?;
            }
        }
        Ok(())
    })
}
