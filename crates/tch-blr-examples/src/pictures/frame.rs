//! Rows of panels under a legend, their titles and axes, and the file that they are written to.

use super::style::{BLACK, GREY, Key, LEGEND_ROW, MARGIN, TEXT_SIZE, TEXT_WIDTH, TICK_SIZE, TITLE_SIZE, text_style};
use crate::Outcome;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};
use std::fs;
use std::path::Path;

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
pub(super) type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Panels side by side, at most.
const COLUMNS: usize = 6;

/// `size.0` panels of `size.1` × `size.2` pixels under a legend, in a row, or in two if they are many.
pub(super) fn picture(
    path: &Path,
    size: (usize, i32, i32),
    keys: &[(&str, Key)],
    paint: impl FnOnce(&Area<'_>, &[Area<'_>]) -> Outcome,
) -> Outcome {
    picture_with(path, size, 0, keys, |root, areas, _| paint(root, areas))
}

/// As [`picture`], with a strip of `rest` pixels to the right of the panels.
pub(super) fn picture_with(
    path: &Path,
    (count, width, height): (usize, i32, i32),
    rest: i32,
    keys: &[(&str, Key)],
    paint: impl FnOnce(&Area<'_>, &[Area<'_>], &Area<'_>) -> Outcome,
) -> Outcome {
    let (rows, columns) = if count <= COLUMNS { (1, count) } else { (2, count.div_ceil(2)) };
    let whole = columns as i32 * width + rest;
    let places = legend(keys, whole);
    let header = places.last().map_or(0, |p| p.1 + LEGEND_ROW / 2 + 4);
    let mut svg = String::new();
    {
        let size = (whole as u32, (rows as i32 * height + header) as u32);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        for ((name, key), &(x, y)) in keys.iter().zip(&places) {
            key.draw(&root, (x, y))?;
            root.draw_text(name, &text_style(TEXT_SIZE, HPos::Left, VPos::Center), (x + 17, y))?;
        }
        let (panels, strip) = root.split_vertically(header).1.split_horizontally(columns as i32 * width);
        paint(&root, &panels.split_evenly((rows, columns)), &strip)?;
        root.present()?;
    }
    // Both are SVG's defaults, and a third of an entropy plane.
    let svg = svg.replace(" opacity=\"1\"", "").replace(" stroke=\"none\"", "");
    let fail = |e: std::io::Error| format!("{}: {e}", path.display());
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(fail)?;
    }
    fs::write(path, svg).map_err(fail)?;
    Ok(())
}

/// Where the middle of each key goes: from left to right, in as many rows as it takes.
fn legend(keys: &[(&str, Key)], width: i32) -> Vec<(i32, i32)> {
    let left = MARGIN as i32 + 12;
    let (mut x, mut y) = (left, LEGEND_ROW / 2 + 6);
    keys.iter()
        .map(|(name, _)| {
            let needed = 17 + TEXT_WIDTH * name.chars().count() as i32;
            if x > left && x + needed > width {
                (x, y) = (left, y + LEGEND_ROW);
            }
            let place = (x, y);
            x += needed + 28;
            place
        })
        .collect()
}

/// Writes a title over the middle of the plot and hands back what is below it.
pub(super) fn titled<'a>(area: &Area<'a>, title: &str) -> Outcome<Area<'a>> {
    let (head, body) = area.split_vertically(24);
    let middle = i32::midpoint(area.dim_in_pixel().0 as i32, 52);
    head.draw_text(title, &text_style(TITLE_SIZE, HPos::Center, VPos::Center), (middle, 16))?;
    Ok(body)
}

pub(super) fn axes(chart: &mut Chart<'_, '_>, names: (&str, &str), ticks: (usize, usize)) -> Outcome {
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GREY.mix(0.18))
        .axis_style(GREY)
        .set_all_tick_mark_size(4)
        .x_labels(ticks.0)
        .y_labels(ticks.1)
        .x_label_formatter(&|v| number(*v))
        .y_label_formatter(&|v| number(*v))
        .label_style(("sans-serif", TICK_SIZE, &BLACK))
        .axis_desc_style(("sans-serif", TEXT_SIZE, &BLACK))
        .x_desc(names.0)
        .y_desc(names.1)
        .draw()?;
    Ok(())
}

/// A tick's number without trailing zeros.
fn number(v: f64) -> String {
    if v != 0.0 && !(1e-3..1e5).contains(&v.abs()) {
        return format!("{v:.1e}");
    }
    let text = format!("{v:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.replace('-', "−") }
}

/// Smallest and largest value with a margin (a share of their distance) on both sides, never of length zero.
pub(super) fn range(values: impl Iterator<Item = f64>, margin: f64) -> Option<(f64, f64)> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return None;
    }
    if low == high {
        let half = 0.5 * low.abs().max(1.0);
        return Some((low - half, high + half));
    }
    let margin = margin * (high - low);
    Some((low - margin, high + margin))
}

pub(super) fn some<T>(items: &[T], what: &str) -> Outcome {
    if items.is_empty() { Err(format!("no {what} to draw").into()) } else { Ok(()) }
}
