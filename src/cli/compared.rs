//! What stages took beside what plans say of them, as a table or as log lines.

use super::table::columns;
use crate::{
    engine::{Comparison, Engine},
    layout::{
        Measured,
        compare::{rows, vision_rows},
    },
};

/// Kinds of passes that a table has, of those that took longest in all.
const KINDS_SHOWN: usize = 3;

/// Below a heading that says what predictions are of; empty if nothing was measured.
pub(super) fn table(comparison: &Comparison) -> String {
    if comparison.passes.is_empty() && comparison.vision.is_empty() {
        return String::new();
    }
    let mut rows = rows(&comparison.passes, KINDS_SHOWN);
    rows.extend(vision_rows(&comparison.vision, KINDS_SHOWN));
    // Rows of a kind have its name once.
    for i in (2..rows.len()).rev() {
        if rows[i][0] == rows[i - 1][0] {
            rows[i][0].clear();
        }
    }
    let origin = match &comparison.profiled[..] {
        all if all.iter().all(|profiled| *profiled) => "from earlier runs",
        some if some.contains(&true) => "from earlier runs and device data",
        _ => "from device data",
    };
    format!("stage times, predicted {origin}\n{}", columns(&rows))
}

/// Keeps what was measured for plans to come. What cannot be kept is no reason to fail.
pub(super) fn keep(engine: &Engine, measured: &Measured, comparison: &Comparison) {
    match engine.keep_profiles(measured, comparison) {
        Ok(paths) => {
            paths.iter().for_each(|path| tracing::info!(path = %path.display(), "stage times are kept"))
        }
        Err(error) => tracing::warn!(%error, "stage times are not kept"),
    }
}

/// A line for each.
pub(super) fn log(comparison: &Comparison) {
    for pass in &comparison.passes {
        let ms = |seconds: f64| 1e3 * seconds;
        tracing::info!(
            stage = pass.stage,
            pass = %pass.pass,
            predicted_ms = ms(pass.predicted),
            measured_ms = ms(pass.measured),
            error_percent = pass.error_percent,
            passes = pass.passes,
            "stage time"
        );
    }
    for pass in &comparison.vision {
        let ms = |seconds: f64| 1e3 * seconds;
        tracing::info!(
            stage = pass.stage,
            patches = pass.patches,
            predicted_ms = ms(pass.predicted),
            measured_ms = ms(pass.measured),
            error_percent = pass.error_percent,
            passes = pass.passes,
            "vision stage time"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        layout::{Compared, VisionCompared},
        model::units::Pass,
    };

    #[test]
    fn a_kind_of_passes_has_a_row_a_stage() {
        let pass = |rows, stage| Compared {
            stage,
            pass: Pass::Decode { rows, context: 9 },
            passes: 5,
            predicted: 1e-3,
            measured: 2e-3,
            error_percent: 50.0,
        };
        let passes = [4, 3, 2, 1].iter().flat_map(|&rows| [pass(rows, 0), pass(rows, 1)]).collect();
        let mut comparison =
            Comparison { devices: Vec::new(), profiled: vec![true, false], passes, vision: Vec::new() };
        let text = table(&comparison);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!((lines.len(), lines[0]), (8, "stage times, predicted from earlier runs and device data"));
        assert!(
            lines[2].starts_with("4 rows at 9      0") && lines[3].starts_with("                 1"),
            "{text}"
        );
        comparison.passes.clear();
        assert_eq!(table(&comparison), "");
        let of = |stage, patches| VisionCompared {
            stage,
            patches,
            passes: 7,
            predicted: 4e-3,
            measured: 5e-3,
            error_percent: 20.0,
        };
        comparison.vision = vec![of(0, 5476), of(1, 5476), of(0, 64)];
        let text = table(&comparison);
        assert_eq!(text.lines().count(), 5, "{text}");
        assert!(text.contains("5476 patches     v0         4.000        5.000  +20.0%       7"), "{text}");
    }
}
