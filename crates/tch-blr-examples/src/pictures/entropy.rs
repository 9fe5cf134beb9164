//! Predictive entropies over the plane.

use super::frame::{axes, picture_with, some, titled};
use super::style::{GREY, Key, MARGIN, TEXT_SIZE, TICK_SIZE, text_style};
use crate::Outcome;
use plotters::prelude::*;
use plotters::style::FontTransform;
use plotters::style::text_anchor::{HPos, VPos};
use std::path::Path;

/// One panel of [`entropy_planes`]: its title, values row by row from the lowest y to the highest (x runs faster),
/// number of columns and number of rows.
pub type Plane = (String, Vec<f64>, usize, usize);

/// Draws predictive entropies (nats) over the rectangle `extent` = ((x₀, x₁), (y₀, y₁)), one panel a method, with the
/// data points (x, y, class) on top. All panels share one colour scale from 0 to the logarithm of the number of
/// classes. Value (i, j) fills the cell i of `n_x`, j of `n_y`, so that it belongs to the cell's centre.
///
/// # Errors
///
/// If there is no plane, a plane has not as many values as cells or values that are not finite, the extent is empty,
/// or the file cannot be written.
pub fn entropy_planes(
    path: &Path,
    planes: &[Plane],
    extent: ((f64, f64), (f64, f64)),
    points: &[(f64, f64, usize)],
) -> Outcome {
    const BAR: i32 = 66;
    some(planes, "entropy planes")?;
    let ((x0, x1), (y0, y1)) = extent;
    if !(x0 < x1 && y0 < y1) {
        return Err(format!("extent {extent:?} is empty").into());
    }
    for (name, values, n_x, n_y) in planes {
        if values.is_empty() || values.len() != n_x * n_y || values.iter().any(|v| !v.is_finite()) {
            return Err(format!("{name}: expected {n_x}·{n_y} finite values, got {}", values.len()).into());
        }
    }
    let classes = points.iter().map(|p| p.2 + 1).max().unwrap_or(0).max(2);
    let top = (classes as f64).ln();
    let marks = [Key::Disc, Key::Triangle, Key::Square];
    let names: Vec<String> = (0..classes).map(|c| format!("class {c}")).collect();
    let keys: Vec<(&str, Key)> = names.iter().zip(marks.iter().cycle()).map(|(n, k)| (n.as_str(), *k)).collect();

    // Equal scales on both axes, within reason; around the plot: margins, the labels and the title.
    let plot = 250.0;
    let height = (plot * ((y1 - y0) / (x1 - x0)).clamp(0.4, 1.6)) as i32;
    let size = (planes.len(), plot as i32 + 52 + 2 * MARGIN as i32, height + 42 + 2 * MARGIN as i32 + 24);
    picture_with(path, size, BAR, &keys, |root, areas, rest| {
        for (i, (area, (name, values, n_x, n_y))) in areas.iter().zip(planes).enumerate() {
            let area = titled(area, name)?;
            let mut chart = ChartBuilder::on(&area)
                .margin(MARGIN)
                .x_label_area_size(42)
                .y_label_area_size(52)
                .build_cartesian_2d(x0..x1, y0..y1)?;
            let (left, lower) = chart.backend_coord(&(x0, y0));
            let (right, upper) = chart.backend_coord(&(x1, y1));
            let column = |i: usize| left + (f64::from(right - left) * i as f64 / *n_x as f64).round() as i32;
            let row = |j: usize| upper + (f64::from(lower - upper) * j as f64 / *n_y as f64).round() as i32;
            let levels: Vec<usize> = values
                .chunks_exact(*n_x)
                .rev()
                .flatten()
                .map(|v| (v / top * LEVELS as f64).floor().clamp(0.0, LEVELS as f64 - 1.0) as usize)
                .collect();
            for (level, columns, rows) in rectangles(&levels, *n_x) {
                // One pixel more, which the neighbours drawn later cover: no seams when the viewer scales.
                let far = ((column(columns.end) + 1).min(right), (row(rows.end) + 1).min(lower));
                let corners = [(column(columns.start), row(rows.start)), far];
                root.draw(&Rectangle::new(corners, shade(level).filled()))?;
            }
            axes(&mut chart, ("x₁", if i == 0 { "x₂" } else { "" }), (5, 5))?;
            for &(x, y, class) in points.iter().filter(|p| (x0..=x1).contains(&p.0) && (y0..=y1).contains(&p.1)) {
                marks[class % marks.len()].draw(root, chart.backend_coord(&(x, y)))?;
            }
        }

        let (left, upper) = (4, 24 + MARGIN as i32);
        let pixel = |v: f64| upper + ((1.0 - v / top) * f64::from(height)).round() as i32;
        for level in (0..LEVELS).rev() {
            let at = |l: usize| pixel(top * l as f64 / LEVELS as f64);
            rest.draw(&Rectangle::new([(left, at(level + 1)), (left + 14, at(level))], shade(level).filled()))?;
        }
        rest.draw(&Rectangle::new([(left, upper), (left + 14, pixel(0.0))], GREY.stroke_width(1)))?;
        for (value, text) in [(0.0, "0".to_owned()), (top, format!("ln {classes}"))] {
            rest.draw_text(&text, &text_style(TICK_SIZE, HPos::Left, VPos::Center), (left + 19, pixel(value)))?;
        }
        let style = text_style(TEXT_SIZE, HPos::Center, VPos::Center).transform(FontTransform::Rotate270);
        rest.draw_text("entropy (nats)", &style, (left + 36, pixel(top / 2.0)))?;
        Ok(())
    })
}

/// Shades of the plane, from none to all of the entropy.
const LEVELS: usize = 20;

/// White over blue to nearly black: lightness falls evenly, so that it reads in grey too.
fn shade(level: usize) -> RGBColor {
    const STOPS: [(f64, f64, f64); 5] =
        [(250.0, 251.0, 253.0), (200.0, 216.0, 234.0), (133.0, 168.0, 208.0), (63.0, 108.0, 168.0), (24.0, 44.0, 92.0)];
    let at = level as f64 / (LEVELS - 1) as f64 * (STOPS.len() - 1) as f64;
    let k = (at as usize).min(STOPS.len() - 2);
    let (a, b, t) = (STOPS[k], STOPS[k + 1], at - k as f64);
    let mix = |a: f64, b: f64| (a + t * (b - a)).round() as u8;
    RGBColor(mix(a.0, b.0), mix(a.1, b.1), mix(a.2, b.2))
}

type Span = std::ops::Range<usize>;

/// Cuts a grid (row by row) into rectangles of equal cells: as wide as possible, then as high as possible.
fn rectangles(cells: &[usize], columns: usize) -> Vec<(usize, Span, Span)> {
    let rows = cells.len() / columns;
    let mut done = vec![false; cells.len()];
    let mut found = Vec::new();
    for start in 0..cells.len() {
        if done[start] {
            continue;
        }
        let (row, column, value) = (start / columns, start % columns, cells[start]);
        let free = |done: &[bool], r: usize, c: usize| !done[r * columns + c] && cells[r * columns + c] == value;
        let right = (column..columns).find(|&c| !free(&done, row, c)).unwrap_or(columns);
        let lower = (row..rows).find(|&r| (column..right).any(|c| !free(&done, r, c))).unwrap_or(rows);
        for r in row..lower {
            done[r * columns + column..r * columns + right].fill(true);
        }
        found.push((value, column..right, row..lower));
    }
    found
}
