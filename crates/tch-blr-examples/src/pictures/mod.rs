//! Pictures as SVG: training curves, reliability diagrams, entropy planes, histograms, clouds of points; in
//! [`planes`](mod@planes) functions and paths in the plane, in [`bands`](mod@bands) functions with their uncertainty.
//!
//! All take plain numbers and a path, create the parent folders and name what is wrong if something is. One style:
//! white paper, hairline grid, the palette of Okabe and Ito (2008, "Color Universal Design"), a legend above the
//! panels. Text is left to the viewer's own sans-serif font, so that no font is needed here; its width is estimated.
//!
//! A new kind of picture is a file with one function; what pictures share is in `frame.rs` (legend, panels, axes) and
//! `style.rs` (colours, sizes, keys of the legend).

pub mod bands;
mod clouds;
mod curves;
mod entropy;
mod frame;
mod histogram;
pub mod planes;
mod reliable;
mod style;

pub use clouds::{Cloud, scatter};
pub use curves::{Curves, training_curves};
pub use entropy::{Plane, entropy_planes};
pub use histogram::histograms;
pub use reliable::reliability;
