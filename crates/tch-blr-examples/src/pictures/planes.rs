//! Planes: contour lines of a function of two numbers, with arrows, paths and rings on top.

use super::frame::{Area, Chart, axes, picture, some, titled};
use super::style::{BLACK, GREY, Key, MARGIN, color};
use crate::Outcome;
use plotters::prelude::*;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

/// (x, y)
pub type Point = (f64, f64);
type Surface<'a> = &'a dyn Fn(f64, f64) -> f64;
/// Of a grid: its two corners.
type Edge = [(usize, usize); 2];

/// One panel of [`planes`].
pub struct Panel<'a> {
    /// Stands above the panel.
    pub title: String,
    /// Names of the axes.
    pub axes: (&'a str, &'a str),
    /// ((x₀, x₁), (y₀, y₁)); what lies outside is not drawn.
    pub extent: (Point, Point),
    /// A function, and the heights of its contour lines.
    pub contours: Option<(Surface<'a>, Vec<f64>)>,
    /// From, to.
    pub arrows: Vec<[Point; 2]>,
    /// A name and the points on the way, which starts at a small disc and ends at a large one.
    pub paths: Vec<(String, Vec<Point>)>,
    /// Outlines, each with the name of the paths whose colour it has.
    pub rings: Vec<(String, Vec<Point>)>,
    /// Small discs.
    pub points: Vec<Point>,
}

impl fmt::Debug for Panel<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A surface is a function and has nothing to show.
        f.debug_struct("Panel").field("title", &self.title).field("extent", &self.extent).finish_non_exhaustive()
    }
}

/// Draws panels side by side; a name has the same colour in all of them.
///
/// # Errors
///
/// If there is no panel, an extent is empty, or the file cannot be written.
pub fn planes(path: &Path, panels: &[Panel<'_>]) -> Outcome {
    some(panels, "planes")?;
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in panels.iter().flat_map(|p| &p.paths) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let shade = |name: &str| names.iter().position(|n| *n == name).map_or(GREY, color);
    let keys: Vec<(&str, Key)> = names.iter().map(|n| (*n, Key::Line(shade(n)))).collect();
    // Around the square plot: margins, the labels and the title.
    let (width, height) = (290 + 52 + 2 * MARGIN as i32, 290 + 42 + 2 * MARGIN as i32 + 24);
    picture(path, (panels.len(), width, height), &keys, |root, areas| {
        for (area, panel) in areas.iter().zip(panels) {
            let ((x0, x1), (y0, y1)) = panel.extent;
            if !(x0 < x1 && y0 < y1) {
                return Err(format!("{}: extent {:?} is empty", panel.title, panel.extent).into());
            }
            let inside = |p: &Point| (x0..=x1).contains(&p.0) && (y0..=y1).contains(&p.1);
            let area = titled(area, &panel.title)?;
            let mut chart = ChartBuilder::on(&area)
                .margin(MARGIN)
                .x_label_area_size(42)
                .y_label_area_size(52)
                .build_cartesian_2d(x0..x1, y0..y1)?;
            axes(&mut chart, panel.axes, (5, 5))?;
            if let Some((f, levels)) = &panel.contours {
                for level in levels {
                    for line in contour(f, panel.extent, *level) {
                        line_of(&mut chart, &line, GREY.mix(0.8).stroke_width(1))?;
                    }
                }
            }
            for [from, to] in panel.arrows.iter().filter(|a| a.iter().all(inside)) {
                arrow(root, chart.backend_coord(from), chart.backend_coord(to))?;
            }
            for p in panel.points.iter().filter(|p| inside(p)) {
                Key::Disc.draw(root, chart.backend_coord(p))?;
            }
            for (name, ring) in &panel.rings {
                for part in ring.split(|p| !inside(p)) {
                    line_of(&mut chart, part, shade(name).stroke_width(1))?;
                }
            }
            for (name, points) in &panel.paths {
                for part in points.split(|p| !inside(p)) {
                    line_of(&mut chart, part, shade(name).stroke_width(2))?;
                }
                if let Some(p) = points.first().filter(|p| inside(p)) {
                    root.draw(&Circle::new(chart.backend_coord(p), 3, BLACK.filled()))?;
                }
                if let Some(p) = points.last().filter(|p| inside(p)) {
                    root.draw(&Circle::new(chart.backend_coord(p), 5, shade(name).filled()))?;
                    root.draw(&Circle::new(chart.backend_coord(p), 5, WHITE.stroke_width(1)))?;
                }
            }
        }
        Ok(())
    })
}

/// Arrows of a vector field on an n×n grid. The longest is as long as a cell, the others shorter with the root of their
/// ratio, so that slow regions show.
pub fn field(((x0, x1), (y0, y1)): (Point, Point), n: usize, f: impl Fn(f64, f64) -> Point) -> Vec<[Point; 2]> {
    let cell = ((x1 - x0) / n as f64, (y1 - y0) / n as f64);
    let at = |k: usize| (x0 + cell.0 * ((k % n) as f64 + 0.5), y0 + cell.1 * ((k / n) as f64 + 0.5));
    let velocities: Vec<Point> = (0..n * n).map(|k| f(at(k).0, at(k).1)).collect();
    // In units of cells.
    let speed = |v: &Point| (v.0 / cell.0).hypot(v.1 / cell.1);
    let fastest = velocities.iter().map(speed).fold(0.0, f64::max);
    let arrow = |(k, v): (usize, &Point)| {
        let length = 0.5 / (fastest * speed(v)).sqrt().max(f64::MIN_POSITIVE);
        let (x, y) = at(k);
        [(x - length * v.0, y - length * v.1), (x + length * v.0, y + length * v.1)]
    };
    velocities.iter().enumerate().filter(|(_, v)| speed(v) > 1e-3 * fastest).map(arrow).collect()
}

/// A closed ellipse with these half axes.
pub fn ellipse((x, y): Point, (a, b): Point) -> Vec<Point> {
    let angle = |k: u32| std::f64::consts::TAU * f64::from(k) / 48.0;
    (0..=48).map(|k| (x + a * angle(k).cos(), y + b * angle(k).sin())).collect()
}

/// A line through points at least three pixels apart: coordinates become whole pixels, which makes stairs of closer
/// ones.
fn line_of(chart: &mut Chart<'_, '_>, points: &[Point], style: ShapeStyle) -> Outcome {
    let mut kept: Vec<Point> = Vec::new();
    let mut last = None;
    for (i, p) in points.iter().enumerate() {
        let (x, y) = chart.backend_coord(p);
        let far = last.is_none_or(|(a, b): (i32, i32)| (x - a).pow(2) + (y - b).pow(2) > 8);
        if far || i + 1 == points.len() {
            kept.push(*p);
            last = Some((x, y));
        }
    }
    chart.draw_series(LineSeries::new(kept, style))?;
    Ok(())
}

fn arrow(root: &Area<'_>, from: (i32, i32), to: (i32, i32)) -> Outcome {
    let (dx, dy) = (f64::from(to.0 - from.0), f64::from(to.1 - from.1));
    let length = dx.hypot(dy).max(1.0);
    let head = (0.5 * length).min(5.0) / length;
    let side = |turn: f64| {
        let (x, y) = (dx - 0.5 * turn * dy, dy + 0.5 * turn * dx);
        (to.0 - (head * x).round() as i32, to.1 - (head * y).round() as i32)
    };
    let ink = BLACK.mix(0.6);
    root.draw(&PathElement::new([from, to], ink.stroke_width(1)))?;
    root.draw(&Polygon::new([to, side(1.0), side(-1.0)], ink.filled()))?;
    Ok(())
}

/// The lines where f has this height: marching squares on a grid, joined to as few lines as there are.
fn contour(f: impl Fn(f64, f64) -> f64, ((x0, x1), (y0, y1)): (Point, Point), level: f64) -> Vec<Vec<Point>> {
    const N: usize = 80;
    let at = |i: usize, j: usize| (x0 + (x1 - x0) * i as f64 / N as f64, y0 + (y1 - y0) * j as f64 / N as f64);
    let heights: Vec<f64> =
        (0..=N).flat_map(|j| (0..=N).map(move |i| at(i, j))).map(|(x, y)| f(x, y) - level).collect();
    let height = |(i, j): (usize, usize)| heights[j * (N + 1) + i];
    // Each edge that is crossed leads to one in each of its cells.
    let mut next: BTreeMap<Edge, Vec<Edge>> = BTreeMap::new();
    for (i, j) in (0..N).flat_map(|j| (0..N).map(move |i| (i, j))) {
        let edges: [Edge; 4] =
            [[(i, j), (i + 1, j)], [(i + 1, j), (i + 1, j + 1)], [(i, j + 1), (i + 1, j + 1)], [(i, j), (i, j + 1)]];
        let crossed: Vec<Edge> = edges.into_iter().filter(|e| (height(e[0]) > 0.0) != (height(e[1]) > 0.0)).collect();
        // Two, or four at a saddle.
        for pair in crossed.chunks_exact(2) {
            next.entry(pair[0]).or_default().push(pair[1]);
            next.entry(pair[1]).or_default().push(pair[0]);
        }
    }
    let place = |[a, b]: Edge| {
        let t = height(a) / (height(a) - height(b));
        let ((ax, ay), (bx, by)) = (at(a.0, a.1), at(b.0, b.1));
        (ax + t * (bx - ax), ay + t * (by - ay))
    };
    let mut lines = Vec::new();
    // From the border first, then around what is closed.
    while let Some(start) = next.iter().find(|(_, n)| n.len() == 1).or(next.iter().next()).map(|(e, _)| *e) {
        let mut line = vec![place(start)];
        let mut edge = start;
        while let Some(following) = next.get_mut(&edge).and_then(Vec::pop) {
            if let Some(back) = next.get_mut(&following) {
                back.retain(|e| *e != edge);
            }
            edge = following;
            line.push(place(edge));
        }
        next.retain(|_, n| !n.is_empty());
        lines.push(line);
    }
    lines
}
