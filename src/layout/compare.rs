//! What was predicted beside what was measured.

use serde::Serialize;

use super::{Layout, Planner, predict::Pipeline, profile::StageTime};
use crate::{error::Result, model::units::Pass};

/// A pass of a stage, predicted and measured.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Compared {
    /// Which stage.
    pub stage: usize,
    /// Which pass.
    pub pass: Pass,
    /// Seconds.
    pub predicted: f64,
    /// Seconds.
    pub measured: f64,
}

impl Compared {
    /// How much longer it took than predicted, as a share of what it took.
    pub fn error(&self) -> f64 {
        (self.measured - self.predicted) / self.measured
    }
}

/// What was measured of a layout's stages, for whatever passes, beside what the planner says of the same passes.
pub fn compare(planner: &Planner<'_>, layout: &Layout, measured: &[StageTime]) -> Result<Vec<Compared>> {
    let pipeline = Pipeline::new(planner, layout)?;
    let known = measured.iter().filter(|time| time.stage < layout.stages().len());
    let compared = |time: &StageTime| {
        let StageTime { stage, pass, seconds } = *time;
        Compared { stage, pass, predicted: pipeline.seconds(stage, pass), measured: seconds }
    };
    Ok(known.map(compared).collect())
}

/// A row for each, below a heading: what a table shows.
pub fn rows(compared: &[Compared]) -> Vec<Vec<String>> {
    let head = ["stage", "pass", "predicted ms", "measured ms", "error"];
    let row = |c: &Compared| {
        let pass = match c.pass {
            Pass::Decode { rows, context } => format!("{rows} x {context}"),
            Pass::Chunk { rows, before } => format!("chunk of {rows} after {before}"),
        };
        let ms = |seconds: f64| format!("{:.3}", 1e3 * seconds);
        let error = format!("{:+.1}%", 100.0 * c.error());
        vec![c.stage.to_string(), pass, ms(c.predicted), ms(c.measured), error]
    };
    std::iter::once(head.map(String::from).to_vec()).chain(compared.iter().map(row)).collect()
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
        let time = |stage, seconds| StageTime { stage, pass, seconds };
        let compared = compare(&planner, &layout, &[time(1, 1.0), time(0, 2.0), time(7, 1.0)]).unwrap();
        assert_eq!(compared.iter().map(|c| (c.stage, c.measured)).collect::<Vec<_>>(), [(1, 1.0), (0, 2.0)]);
        assert!(compared.iter().all(|c| c.predicted > 1e-3 && c.predicted < 5e-3 && c.error() > 0.99));
        let one = Compared { stage: 2, pass, predicted: 1e-3, measured: 1.25e-3 };
        assert_eq!(rows(&[one])[1], ["2", "9 x 70", "1.000", "1.250", "+20.0%"]);
    }
}
