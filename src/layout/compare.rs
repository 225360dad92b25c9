//! What was predicted beside what was measured.

use serde::Serialize;

use super::{Layout, Planner, StageTime, measured::VisionTime, predict::Pipeline};
use crate::{error::Result, model::units::Pass};

/// A pass of a stage, predicted and measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Compared {
    /// Which stage.
    pub stage: usize,
    /// Which pass.
    pub pass: Pass,
    /// How many were measured.
    pub passes: u64,
    /// Seconds.
    pub predicted: f64,
    /// Seconds.
    pub measured: f64,
    /// How much longer it took than predicted, in percent of what it took.
    pub error_percent: f64,
}

/// A pass of a stage of the vision tower, predicted and measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct VisionCompared {
    /// Which stage.
    pub stage: usize,
    /// Patches of the pass.
    pub patches: usize,
    /// How many were measured.
    pub passes: u64,
    /// Seconds.
    pub predicted: f64,
    /// Seconds. What others do on the same device meanwhile is among them.
    pub measured: f64,
    /// How much longer it took than predicted, in percent of what it took.
    pub error_percent: f64,
}

/// What was measured of a layout's stages, for whatever passes, beside what the planner says of the same passes.
///
/// ```
/// use pipeline_infer::{
///     Layout,
///     backend::DType,
///     layout::{DeviceSpec, Planner, StageTime, compare},
///     model::{shapes, units::Pass},
/// };
///
/// let (spec, devices) = (shapes::find("7b").unwrap()?, DeviceSpec::list("2xh200-141g")?);
/// let planner = Planner::new(&spec, DType::BF16, &devices);
/// let layout: Layout = "0-14@cuda:0,15-27@cuda:1".parse()?;
/// let pass = Pass::Decode { rows: 64, context: 640 };
/// let measured = [StageTime { stage: 1, pass, seconds: 2.5e-3, passes: 100 }];
/// let compared = compare(&planner, &layout, &measured)?;
/// assert!(compared[0].error_percent.abs() < 30.0);
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
pub fn compare(planner: &Planner<'_>, layout: &Layout, measured: &[StageTime]) -> Result<Vec<Compared>> {
    let pipeline = Pipeline::new(planner, layout)?;
    let known = measured.iter().filter(|time| time.stage < layout.stages().len());
    let compared = |time: &StageTime| {
        let StageTime { stage, pass, seconds: measured, passes } = *time;
        let predicted = pipeline.seconds(stage, pass);
        let error_percent = 100.0 * (measured - predicted) / measured;
        Compared { stage, pass, passes, predicted, measured, error_percent }
    };
    Ok(known.map(compared).collect())
}

/// The same of the vision tower's stages.
pub fn compare_vision(
    planner: &Planner<'_>,
    layout: &Layout,
    measured: &[VisionTime],
) -> Result<Vec<VisionCompared>> {
    let pipeline = Pipeline::new(planner, layout)?;
    let known = measured.iter().filter(|time| time.stage < layout.vision().len());
    let compared = |time: &VisionTime| {
        let VisionTime { stage, pass, seconds: measured, passes } = *time;
        let predicted = pipeline.vision_seconds(stage, pass);
        let error_percent = 100.0 * (measured - predicted) / measured;
        VisionCompared { stage, patches: pass.rows, passes, predicted, measured, error_percent }
    };
    Ok(known.map(compared).collect())
}

/// What a table shows of the vision tower's passes, as [`rows`] does.
pub fn vision_rows(compared: &[VisionCompared], kinds: usize) -> Vec<Vec<String>> {
    let row = |c: &VisionCompared| {
        let ms = |seconds: f64| format!("{:.3}", 1e3 * seconds);
        let (pass, stage) = (format!("{} patches", c.patches), format!("v{}", c.stage));
        let error = format!("{:+.1}%", c.error_percent);
        vec![pass, stage, ms(c.predicted), ms(c.measured), error, c.passes.to_string()]
    };
    // Kinds come one after another, the stages of each in order.
    compared.chunk_by(|a, b| a.stage < b.stage).take(kinds).flatten().map(row).collect()
}

/// What a table shows: below a heading, a row for each stage and each of the first `kinds` kinds of passes.
pub fn rows(compared: &[Compared], kinds: usize) -> Vec<Vec<String>> {
    let head = ["pass", "stage", "predicted ms", "measured ms", "error", "passes"];
    let row = |c: &Compared| {
        let ms = |seconds: f64| format!("{:.3}", 1e3 * seconds);
        let error = format!("{:+.1}%", c.error_percent);
        let (pass, stage) = (c.pass.to_string(), c.stage.to_string());
        vec![pass, stage, ms(c.predicted), ms(c.measured), error, c.passes.to_string()]
    };
    let shown = compared.chunk_by(|a, b| a.pass == b.pass).take(kinds).flatten();
    std::iter::once(head.map(String::from).to_vec()).chain(shown.map(row)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{backend::DType, layout::DeviceSpec, model::shapes};

    #[test]
    fn each_measured_pass_stands_beside_its_prediction() {
        let spec = shapes::find("7b").unwrap().unwrap();
        let devices = DeviceSpec::list("2xh200-141g").unwrap();
        let planner = Planner::new(&spec, DType::BF16, &devices);
        let layout: Layout = "0-14@cuda:0,15-27@cuda:1".parse().unwrap();
        let pass = Pass::Decode { rows: 9, context: 70 };
        let time = |stage, seconds| StageTime { stage, pass, seconds, passes: 5 };
        let compared = compare(&planner, &layout, &[time(1, 1.0), time(0, 2.0), time(7, 1.0)]).unwrap();
        assert_eq!(compared.iter().map(|c| (c.stage, c.measured)).collect::<Vec<_>>(), [(1, 1.0), (0, 2.0)]);
        assert!(compared.iter().all(|c| c.predicted > 1e-3 && c.predicted < 5e-3 && c.error_percent > 99.0));
        let times = (1e-3, 1.25e-3);
        let one = Compared {
            stage: 2,
            pass,
            passes: 7,
            predicted: times.0,
            measured: times.1,
            error_percent: 20.0,
        };
        let other = Compared { pass: Pass::Chunk { rows: 3, before: 0 }, ..one };
        let table = rows(&[one, other, one], 2);
        assert_eq!(table[1], ["9 rows at 70", "2", "1.000", "1.250", "+20.0%", "7"]);
        assert_eq!((table.len(), &*table[2][0]), (3, "3 of a prompt"));
    }
}
