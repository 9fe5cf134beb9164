//! The hand that writes characters: from strokes to pixels.

use super::strokes::Stroke::{self, Arc, Line};
use super::strokes::Styles;
use super::{PIXELS, SIDE, to_images};
use crate::random::Rng;
use std::f64::consts::PI;
use tch::Tensor;

/// Image i shows `styles[classes[i]]` and depends on (seed, stream, i) only.
pub(super) fn draw(classes: &[usize], styles: &[Styles], seed: u64, stream: u64) -> Tensor {
    let mut pixels = vec![0_u8; classes.len() * PIXELS];
    let streams = Rng::new(seed, stream).bits();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let share = classes.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (t, (images, classes)) in pixels.chunks_mut(share * PIXELS).zip(classes.chunks(share)).enumerate() {
            scope.spawn(move || {
                for (i, (image, &class)) in images.chunks_exact_mut(PIXELS).zip(classes).enumerate() {
                    let mut rng = Rng::new(streams, (t * share + i) as u64);
                    let styles = styles[class];
                    write(styles[rng.below(styles.len())], &mut rng, image);
                }
            });
        }
    });
    to_images(&pixels)
}

/// Writes one character with a random hand.
fn write(strokes: &[Stroke], rng: &mut Rng, image: &mut [u8]) {
    let mut lines: Vec<Vec<(f64, f64)>> = strokes.iter().map(|s| trace(s, rng)).collect();

    // The hand: bend, then stretch, slant and turn; height about 20 pixels as in MNIST.
    let height = rng.between(15.5, 20.5);
    let width = height * rng.between(0.7, 1.2);
    let slant = 0.22 * rng.normal();
    let (sin, cos) = (0.14 * rng.normal()).sin_cos();
    let bend = [0.06 * rng.normal(), 0.06 * rng.normal()];
    let phase = [rng.between(0.0, 2.0 * PI), rng.between(0.0, 2.0 * PI)];
    for (x, y) in lines.iter_mut().flatten() {
        let u = *x - 0.3 + bend[0] * (4.0 * *y + phase[0]).sin();
        let v = *y - 0.5 + bend[1] * (6.0 * *x + phase[1]).sin();
        let (u, v) = (width * (u - slant * v), height * v);
        (*x, *y) = (cos * u - sin * v, sin * u + cos * v);
    }

    // Centre of mass in the middle of the image, within a pixel or two.
    let middle = (SIDE as f64 - 1.0) / 2.0;
    let (cx, cy) = centre(&lines);
    let shift = (middle - cx + 0.8 * rng.normal(), middle - cy + 0.8 * rng.normal());
    for (x, y) in lines.iter_mut().flatten() {
        (*x, *y) = (*x + shift.0, *y + shift.1);
    }

    let radius = rng.between(0.8, 2.1);
    let darkness = rng.between(0.75, 1.0);
    let mut ink = [0.0_f64; PIXELS];
    for line in &lines {
        for ends in line.windows(2) {
            stamp(ends[0], ends[1], radius, &mut ink);
        }
    }
    for (pixel, ink) in image.iter_mut().zip(ink) {
        if ink > 0.0 {
            let grain = 1.0 - 0.12 * rng.normal().abs();
            *pixel = (255.0 * darkness * ink * grain).round().clamp(0.0, 255.0) as u8;
        }
    }
}

/// The points of a stroke, with an unsteady hand: ends, corners, centres, radii and angles all miss a little.
fn trace(stroke: &Stroke, rng: &mut Rng) -> Vec<(f64, f64)> {
    const MISS: f64 = 0.03;
    match stroke {
        Line(corners) => {
            let corners: Vec<(f64, f64)> =
                corners.iter().map(|&(x, y)| (x + MISS * rng.normal(), y + MISS * rng.normal())).collect();
            // Points in between, for the bend to act on.
            let mut points = vec![corners[0]];
            for ends in corners.windows(2) {
                let ((x0, y0), (x1, y1)) = (ends[0], ends[1]);
                points.extend((1..=4).map(|k| f64::from(k) / 4.0).map(|t| (x0 + t * (x1 - x0), y0 + t * (y1 - y0))));
            }
            points
        }
        Arc((cx, cy), (rx, ry), (from, to)) => {
            let (cx, cy) = (cx + MISS * rng.normal(), cy + MISS * rng.normal());
            let (rx, ry) = (rx * (1.0 + 3.0 * MISS * rng.normal()), ry * (1.0 + 2.0 * MISS * rng.normal()));
            let (from, to) = (from + 10.0 * rng.normal(), to + 14.0 * rng.normal());
            let pieces = ((to - from).abs() / 18.0).ceil().max(1.0);
            (0..=pieces as u32)
                .map(|k| (from + (to - from) * f64::from(k) / pieces).to_radians())
                .map(|a| (cx + rx * a.cos(), cy + ry * a.sin()))
                .collect()
        }
    }
}

/// Centre of mass of lines of constant thickness.
fn centre(lines: &[Vec<(f64, f64)>]) -> (f64, f64) {
    let (mut mass, mut x, mut y) = (0.0, 0.0, 0.0);
    for ends in lines.iter().flat_map(|l| l.windows(2)) {
        let ((x0, y0), (x1, y1)) = (ends[0], ends[1]);
        let length = (x1 - x0).hypot(y1 - y0);
        mass += length;
        x += length * (x0 + x1) / 2.0;
        y += length * (y0 + y1) / 2.0;
    }
    (x / mass, y / mass)
}

/// Draws a line with round ends: full ink within `radius`, fading to none over the pixel around it.
fn stamp(a: (f64, f64), b: (f64, f64), radius: f64, ink: &mut [f64; PIXELS]) {
    let (dx, dy) = (b.0 - a.0, b.1 - a.1);
    let length2 = (dx * dx + dy * dy).max(1e-12);
    let reach = radius + 0.5;
    let range = |a: f64, b: f64| {
        let low = (a.min(b) - reach).ceil().clamp(0.0, SIDE as f64) as usize;
        let high = (a.max(b) + reach).floor().clamp(-1.0, SIDE as f64 - 1.0) + 1.0;
        low..high as usize
    };
    for row in range(a.1, b.1) {
        for column in range(a.0, b.0) {
            let (px, py) = (column as f64 - a.0, row as f64 - a.1);
            let t = ((px * dx + py * dy) / length2).clamp(0.0, 1.0);
            let (ex, ey) = (px - t * dx, py - t * dy);
            let distance = (ex * ex + ey * ey).sqrt();
            let pixel = &mut ink[row * SIDE + column];
            *pixel = pixel.max((reach - distance).clamp(0.0, 1.0));
        }
    }
}
