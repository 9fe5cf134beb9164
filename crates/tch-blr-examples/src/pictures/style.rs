//! Colours, sizes of text, and how a series looks in the legend.

use super::frame::Area;
use crate::Outcome;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

pub(super) const BLACK: RGBColor = RGBColor(0x22, 0x22, 0x22);
pub(super) const GREY: RGBColor = RGBColor(0x77, 0x77, 0x77);
pub(super) const BLUE: RGBColor = RGBColor(0x00, 0x72, 0xB2);
pub(super) const ORANGE: RGBColor = RGBColor(0xE6, 0x9F, 0x00);
pub(super) const VERMILION: RGBColor = RGBColor(0xD5, 0x5E, 0x00);
/// Vermilion and sky blue, paler.
pub(super) const OVER: RGBColor = RGBColor(0xF0, 0xB6, 0x8A);
pub(super) const UNDER: RGBColor = RGBColor(0xA3, 0xD4, 0xF2);
pub(super) const YELLOW: RGBColor = RGBColor(0xF0, 0xE4, 0x42);
/// Blue, vermilion, green, purple, orange, sky blue, black.
pub(super) const PALETTE: [RGBColor; 7] = [
    BLUE,
    VERMILION,
    RGBColor(0x00, 0x9E, 0x73),
    RGBColor(0xCC, 0x79, 0xA7),
    ORANGE,
    RGBColor(0x56, 0xB4, 0xE9),
    BLACK,
];

// The SVG backend divides font sizes by 1.24.
pub(super) const TICK_SIZE: f64 = 12.0 * 1.24;
pub(super) const TEXT_SIZE: f64 = 13.0 * 1.24;
pub(super) const TITLE_SIZE: f64 = 14.0 * 1.24;
/// Pixels per character at `TEXT_SIZE`, on the generous side.
pub(super) const TEXT_WIDTH: i32 = 8;
pub(super) const LEGEND_ROW: i32 = 24;
pub(super) const MARGIN: u32 = 14;

pub(super) fn color(series: usize) -> RGBColor {
    PALETTE[series % PALETTE.len()]
}

pub(super) fn text_style(size: f64, h: HPos, v: VPos) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size)).color(&BLACK).pos(Pos::new(h, v))
}

/// How a series looks in the legend, and how a class looks in the plane.
#[derive(Debug, Clone, Copy)]
pub(super) enum Key {
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
    pub(super) fn draw(self, area: &Area<'_>, at: (i32, i32)) -> Outcome {
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
