//! Sheets of numbers and of images, as SVG without a library: accuracy matrices and examples.

use crate::Outcome;
use std::fmt::Write as _;
use std::path::Path;
use tch::Tensor;
use tch_blr::metrics::AccuracyMatrix;

const CELL: usize = 44;
const STYLE: &str = "font-family=\"sans-serif\" fill=\"#222\"";

/// Accuracies side by side, R[t, j] in row t and column j: the darker the better, from a tenth to one.
///
/// # Errors
/// If the file cannot be written.
pub fn heat_maps(path: &Path, matrices: &[(String, AccuracyMatrix)]) -> Outcome {
    let tasks = matrices.iter().map(|(_, r)| r.tasks()).max().unwrap_or(0);
    let (side, columns) = (tasks * CELL, matrices.len().clamp(1, 4));
    let (width, height) = ((side + 70).max(230), side + 90);
    let mut body = String::new();
    for (k, (name, r)) in matrices.iter().enumerate() {
        let (left, upper) = (k % columns * width + 46, k / columns * height + 34);
        let middle = left + side / 2;
        writeln!(
            body,
            "<text x=\"{middle}\" y=\"{}\" {STYLE} font-size=\"14\" text-anchor=\"middle\">{name}</text>",
            upper - 12
        )?;
        writeln!(
            body,
            "<text x=\"{middle}\" y=\"{}\" {STYLE} font-size=\"12\" text-anchor=\"middle\">accuracy on task</text>",
            upper + side + 34
        )?;
        let turned = format!("transform=\"rotate(-90 {} {})\"", left - 30, upper + side / 2);
        writeln!(
            body,
            "<text x=\"{}\" y=\"{}\" {turned} {STYLE} font-size=\"12\" text-anchor=\"middle\">after task</text>",
            left - 30,
            upper + side / 2
        )?;
        for t in 0..r.tasks() {
            let (at, half) = (t * CELL, CELL / 2);
            writeln!(
                body,
                "<text x=\"{}\" y=\"{}\" {STYLE} font-size=\"11\" text-anchor=\"end\">{}</text>",
                left - 6,
                upper + at + half + 4,
                t + 1
            )?;
            writeln!(
                body,
                "<text x=\"{}\" y=\"{}\" {STYLE} font-size=\"11\" text-anchor=\"middle\">{}</text>",
                left + at + half,
                upper + side + 16,
                t + 1
            )?;
            for (j, accuracy) in (0..r.tasks()).filter_map(|j| Some((j, r.get(t, j)?))) {
                let (x, y) = (left + j * CELL, upper + at);
                let dark = ((accuracy - 0.1) / 0.9).clamp(0.0, 1.0);
                let mix = |light: f64, deep: f64| (light + dark * (deep - light)).round() as u8;
                let (red, green, blue) = (mix(250.0, 24.0), mix(251.0, 60.0), mix(253.0, 120.0));
                let ink = if dark > 0.55 { "#fff" } else { "#222" };
                writeln!(
                    body,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{CELL}\" height=\"{CELL}\" fill=\"rgb({red},{green},{blue})\" \
                     stroke=\"#fff\"/>"
                )?;
                writeln!(
                    body,
                    "<text x=\"{}\" y=\"{}\" font-family=\"sans-serif\" font-size=\"12\" fill=\"{ink}\" \
                     text-anchor=\"middle\">{:.0}</text>",
                    x + half,
                    y + half + 4,
                    100.0 * accuracy
                )?;
            }
        }
    }
    write(path, columns * width, matrices.len().div_ceil(columns) * height, &body)
}

const SIDE: usize = 28;
const PIXEL: usize = 2;
const GAP: usize = 6;

/// Images `[N, 784]` in [0, 1], so many in a row, ink on white.
///
/// # Errors
/// If they have another shape, or the file cannot be written.
pub fn images(path: &Path, images: &Tensor, per_row: usize) -> Outcome {
    let (step, mut body) = (SIDE * PIXEL + GAP, String::new());
    let all = pixels(images)?;
    for (k, image) in all.iter().enumerate() {
        draw(&mut body, image, (GAP + k % per_row * step, GAP + k / per_row * step))?;
    }
    write(path, GAP + per_row.min(all.len().max(1)) * step, GAP + all.len().div_ceil(per_row) * step, &body)
}

/// Images `[N, 784]` of one kind, a caption below each.
#[derive(Debug)]
pub struct Row {
    /// Stands above the images.
    pub title: String,
    /// `[N, 784]` in [0, 1].
    pub images: Tensor,
    /// One an image.
    pub captions: Vec<String>,
}

/// Rows of images under their titles.
///
/// # Errors
/// As [`images`].
pub fn rows(path: &Path, rows: &[Row]) -> Outcome {
    const HEAD: usize = 26;
    const CAPTION: usize = 18;
    let (side, mut body, mut columns) = (SIDE * PIXEL, String::new(), 1);
    let height = HEAD + side + CAPTION + GAP;
    for (r, row) in rows.iter().enumerate() {
        let upper = GAP + r * height;
        let title = format!("x=\"{GAP}\" y=\"{}\" {STYLE} font-size=\"13\"", upper + HEAD - 9);
        writeln!(body, "<text {title}>{}</text>", row.title)?;
        let all = pixels(&row.images)?;
        columns = columns.max(all.len());
        for (k, (image, caption)) in all.iter().zip(&row.captions).enumerate() {
            let left = GAP + k * (side + GAP);
            draw(&mut body, image, (left, upper + HEAD))?;
            let (x, y) = (left + side / 2, upper + HEAD + side + CAPTION - 5);
            let place = format!("x=\"{x}\" y=\"{y}\" {STYLE} font-size=\"12\" text-anchor=\"middle\"");
            writeln!(body, "<text {place}>{caption}</text>")?;
        }
    }
    write(path, GAP + columns * (side + GAP), GAP + rows.len() * height, &body)
}

fn pixels(images: &Tensor) -> Outcome<Vec<Vec<f32>>> {
    if images.size().get(1) != Some(&((SIDE * SIDE) as i64)) {
        return Err(format!("images of shape {:?}: expected [N, 784]", images.size()).into());
    }
    (0..images.size()[0]).map(|k| Ok(Vec::try_from(images.get(k).contiguous())?)).collect()
}

/// One image, as rectangles of equal ink.
fn draw(body: &mut String, pixels: &[f32], (left, upper): (usize, usize)) -> Outcome {
    const LEVELS: f64 = 8.0;
    let level = |row: usize, column: usize| (f64::from(pixels[row * SIDE + column]) * LEVELS).round() as usize;
    for row in 0..SIDE {
        let mut column = 0;
        while column < SIDE {
            let (from, ink) = (column, level(row, column));
            while column < SIDE && level(row, column) == ink {
                column += 1;
            }
            if ink > 0 {
                let shade = 255 - (ink as f64 / LEVELS * 235.0) as u8;
                let (x, y, width) = (left + from * PIXEL, upper + row * PIXEL, (column - from) * PIXEL);
                writeln!(
                    body,
                    "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{PIXEL}\" \
                     fill=\"rgb({shade},{shade},{shade})\"/>"
                )?;
            }
        }
    }
    Ok(())
}

fn write(path: &Path, width: usize, height: usize, body: &str) -> Outcome {
    let svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
         viewBox=\"0 0 {width} {height}\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#fff\"/>\n{body}</svg>\n"
    );
    std::fs::write(path, svg).map_err(|e| format!("{}: {e}", path.display()).into())
}
