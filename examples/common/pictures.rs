//! Pictures of the examples, as SVG: training curves, reliability diagrams, entropy planes, histograms, clouds; planes.rs; bands.rs.
//!
//! All take plain numbers and a path, create the parent folders and name what is wrong otherwise. One style: white
//! paper, hairline grid, the palette of Okabe and Ito (2008, "Color Universal Design"), a legend above the panels.
//! Text is left to the viewer's own sans-serif font, so that none is needed here; its width is estimated.

// Each example uses a part of this file.
#![allow(dead_code)]

#[path = "bands.rs"]
pub mod bands;
#[path = "planes.rs"]
pub mod planes;

use std::error::Error;
use std::fs;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use plotters::style::FontTransform;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use tch_blr::metrics::Reliability;

type Outcome = Result<(), Box<dyn Error>>;
type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

const BLACK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const GREY: RGBColor = RGBColor(0x77, 0x77, 0x77);
const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xB2);
const ORANGE: RGBColor = RGBColor(0xE6, 0x9F, 0x00);
const VERMILION: RGBColor = RGBColor(0xD5, 0x5E, 0x00);
/// Vermilion and sky blue, paler.
const OVER: RGBColor = RGBColor(0xF0, 0xB6, 0x8A);
const UNDER: RGBColor = RGBColor(0xA3, 0xD4, 0xF2);
const YELLOW: RGBColor = RGBColor(0xF0, 0xE4, 0x42);
/// Blue, vermilion, green, purple, orange, sky blue, black.
const PALETTE: [RGBColor; 7] = [
    BLUE,
    VERMILION,
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    ORANGE,
    RGBColor(0x56, 0xB4, 0xE9),
    BLACK,
];

// The SVG backend divides font sizes by 1.24.
const TICK_SIZE: f64 = 12.0 * 1.24;
const TEXT_SIZE: f64 = 13.0 * 1.24;
const TITLE_SIZE: f64 = 14.0 * 1.24;
/// Pixels per character at `TEXT_SIZE`, on the generous side.
const TEXT_WIDTH: i32 = 8;
const LEGEND_ROW: i32 = 24;
const MARGIN: u32 = 14;

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

/// Draws the histograms of several samples over one axis, as outlines filled lightly: for instance log₁₀ precisions.
///
/// The vertical axis is the logarithm of each bin's share, so that the few weights that matter show beside the many that
/// do not. Values that are not finite are left out.
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

/// One panel of [`scatter`].
#[derive(Debug, Clone)]
pub struct Cloud {
    pub x_label: String,
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

// --- Style ---

fn color(series: usize) -> RGBColor {
    PALETTE[series % PALETTE.len()]
}

fn text_style(size: f64, h: HPos, v: VPos) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size)).color(&BLACK).pos(Pos::new(h, v))
}

/// How a series looks in the legend, and how a class looks in the plane.
#[derive(Debug, Clone, Copy)]
enum Key {
    Line(RGBColor),
    Dashes(RGBColor),
    Box(RGBColor),
    Outline(RGBColor),
    Dot(RGBAColor),
    Disc,
    Triangle,
    Square,
}

impl Key {
    /// Draws the key with its middle at `at`.
    fn draw(self, area: &Area<'_>, at: (i32, i32)) -> Outcome {
        let (x, y) = at;
        let corners = [(x - 9, y - 6), (x + 9, y + 6)];
        match self {
            Key::Line(color) => area.draw(&PathElement::new([(x - 11, y), (x + 11, y)], color.stroke_width(3)))?,
            Key::Dashes(color) => {
                for left in [x - 11, x - 2, x + 7] {
                    area.draw(&PathElement::new([(left, y), (left + 5, y)], color.stroke_width(1)))?;
                }
            }
            Key::Box(color) => area.draw(&Rectangle::new(corners, color.filled()))?,
            Key::Outline(color) => {
                area.draw(&Rectangle::new(corners, color.mix(0.16).filled()))?;
                area.draw(&Rectangle::new(corners, color.stroke_width(2)))?;
            }
            Key::Dot(color) => area.draw(&Circle::new(at, 4, color.filled()))?,
            Key::Disc => {
                area.draw(&Circle::new(at, 3, VERMILION.filled()))?;
                area.draw(&Circle::new(at, 3, BLACK.stroke_width(1)))?;
            }
            Key::Triangle => {
                let outline = [(x - 4, y + 3), (x + 4, y + 3), (x, y - 4), (x - 4, y + 3)];
                area.draw(&Polygon::new(outline, YELLOW.filled()))?;
                area.draw(&PathElement::new(outline, BLACK.stroke_width(1)))?;
            }
            Key::Square => {
                area.draw(&Rectangle::new([(x - 3, y - 3), (x + 3, y + 3)], WHITE.filled()))?;
                area.draw(&Rectangle::new([(x - 3, y - 3), (x + 3, y + 3)], BLACK.stroke_width(1)))?;
            }
        }
        Ok(())
    }
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

// --- Layout ---

/// A row of `size.0` panels of `size.1` × `size.2` pixels under a legend.
fn picture(
    path: &Path,
    size: (usize, i32, i32),
    keys: &[(&str, Key)],
    paint: impl FnOnce(&Area<'_>, &[Area<'_>]) -> Outcome,
) -> Outcome {
    picture_with(path, size, 0, keys, |root, areas, _| paint(root, areas))
}

/// As [`picture`], with a strip of `rest` pixels to the right of the panels.
fn picture_with(
    path: &Path,
    (count, width, height): (usize, i32, i32),
    rest: i32,
    keys: &[(&str, Key)],
    paint: impl FnOnce(&Area<'_>, &[Area<'_>], &Area<'_>) -> Outcome,
) -> Outcome {
    let whole = count as i32 * width + rest;
    let places = legend(keys, whole);
    let header = places.last().map_or(0, |p| p.1 + LEGEND_ROW / 2 + 4);
    let mut svg = String::new();
    {
        let size = (whole as u32, (height + header) as u32);
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        root.fill(&WHITE)?;
        for ((name, key), &(x, y)) in keys.iter().zip(&places) {
            key.draw(&root, (x, y))?;
            root.draw_text(name, &text_style(TEXT_SIZE, HPos::Left, VPos::Center), (x + 17, y))?;
        }
        let (panels, strip) = root.split_vertically(header).1.split_horizontally(count as i32 * width);
        paint(&root, &panels.split_evenly((1, count)), &strip)?;
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
fn titled<'a>(area: &Area<'a>, title: &str) -> Result<Area<'a>, Box<dyn Error>> {
    let (head, body) = area.split_vertically(24);
    let middle = i32::midpoint(area.dim_in_pixel().0 as i32, 52);
    head.draw_text(title, &text_style(TITLE_SIZE, HPos::Center, VPos::Center), (middle, 16))?;
    Ok(body)
}

fn axes(chart: &mut Chart<'_, '_>, names: (&str, &str), ticks: (usize, usize)) -> Outcome {
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
fn range(values: impl Iterator<Item = f64>, margin: f64) -> Option<(f64, f64)> {
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

fn some<T>(items: &[T], what: &str) -> Outcome {
    if items.is_empty() { Err(format!("no {what} to draw").into()) } else { Ok(()) }
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
