//! Pictures of figures, as SVG: lines over axes, and what stages do over time.

mod chart;
mod growth;
mod svg;
mod timeline;

pub(super) use growth::{X, Y, growth, latencies};
pub(super) use timeline::timeline;
