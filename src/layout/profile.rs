//! What units took where they ran: kept on disk for a model's shape, a device and a type, and believed before predictions.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{DeviceSpec, Layout, cost::Costs};
use crate::{
    backend::{DType, cuda},
    error::{Error, Result},
    model::{
        spec::ModelSpec,
        units::{Pass, Unit, units_of},
    },
};

/// A profile's file is a few KiB.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Noise does not make a unit free.
const FACTOR_MIN: f64 = 0.1;

/// Measured times of a model's units on a device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// The model's shape, but for how many layers it has.
    pub shape: String,
    /// The device's name.
    pub device: String,
    /// The type of weights, keys and values.
    pub dtype: String,
    /// What was measured.
    pub points: Vec<Point>,
}

/// A measured time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// Of what.
    pub unit: Kind,
    /// In which pass.
    pub pass: Pass,
    /// How long.
    pub seconds: f64,
}

/// A [`Unit`], all layers being alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)] // The names are the documentation.
pub enum Kind {
    Embed,
    Layer,
    Head,
}

impl From<Unit> for Kind {
    fn from(unit: Unit) -> Kind {
        match unit {
            Unit::Embed => Kind::Embed,
            Unit::Layer(_) => Kind::Layer,
            Unit::Head => Kind::Head,
        }
    }
}

/// How long a stage took for passes of a shape.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StageTime {
    /// Which stage.
    pub stage: usize,
    /// The passes' shape.
    pub pass: Pass,
    /// How long one took.
    pub seconds: f64,
}

/// A stage's time as a run has fitted it: so much a pass, a row, a pair of row and token, an output row.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct StageFit {
    /// Seconds a pass.
    pub base: f64,
    /// Seconds a row.
    pub per_row: f64,
    /// Seconds for each token that a row attends to.
    pub per_attended: f64,
    /// Seconds an output row.
    pub per_output: f64,
}

impl StageFit {
    /// Seconds of a pass of this shape.
    pub fn seconds(&self, pass: Pass) -> f64 {
        let rows = self.per_row * pass.rows() as f64;
        self.base + rows + self.per_attended * pass.attended(None) + self.per_output * pass.outputs() as f64
    }
}

/// What fitted stages take for these passes, which should be like those that they were fitted to.
pub fn stage_times(fits: &[StageFit], passes: &[Pass]) -> Vec<StageTime> {
    let times = |(stage, fit): (usize, &StageFit)| {
        let time = move |&pass: &Pass| StageTime { stage, pass, seconds: fit.seconds(pass) };
        passes.iter().map(time).collect::<Vec<_>>()
    };
    fits.iter().enumerate().flat_map(times).collect()
}

/// Where profiles are kept; `None` if the environment names no place.
pub fn folder() -> Option<PathBuf> {
    cuda::cache_folder().map(|folder| folder.join("profiles"))
}

impl Profile {
    /// The profile that is kept for a model on a device; `None` if there is none, or if it is damaged.
    pub fn open(folder: &Path, spec: &ModelSpec, dtype: DType, device: &DeviceSpec) -> Option<Profile> {
        let path = folder.join(file_name(&shape_of(spec), &device.name, dtype.name()));
        if fs::metadata(&path).ok()?.len() > FILE_BYTES_MAX {
            return None;
        }
        let profile = serde_json::from_slice::<Profile>(&fs::read(&path).ok()?).ok();
        let right = |profile: &Profile| {
            let named = (&*profile.device, &*profile.dtype) == (&*device.name, dtype.name());
            let usable = |p: &Point| p.seconds.is_finite() && p.seconds > 0.0 && p.pass.rows() > 0;
            named && profile.shape == shape_of(spec) && profile.points.iter().all(usable)
        };
        let profile = profile.filter(right);
        if profile.is_none() {
            tracing::warn!(path = %path.display(), "damaged: plans use predictions");
        }
        profile
    }

    /// Keeps it, as a whole or not at all.
    pub fn store(&self, folder: &Path) -> Result<PathBuf> {
        let path = folder.join(file_name(&self.shape, &self.device, &self.dtype));
        let text = serde_json::to_vec_pretty(self).expect("plain data becomes JSON; this is a bug");
        cuda::write_aside(&path, &text).map_err(|e| Error::io(&path, e))?;
        Ok(path)
    }

    /// What a run's stage times say about units: a profile for each kind of device. `devices` are the stages', in order.
    ///
    /// Layers are told from the head by the stages that lack it. On a kind of device that has the last stage alone, all its
    /// units share what was measured as predictions do.
    pub fn of_run(
        spec: &ModelSpec,
        dtype: DType,
        layout: &Layout,
        devices: &[DeviceSpec],
        times: &[StageTime],
    ) -> Vec<Profile> {
        let mut profiles: Vec<Profile> = Vec::new();
        for device in devices {
            if profiles.iter().any(|profile| profile.device == device.name) {
                continue;
            }
            let costs = Costs { spec, dtype, device, profile: None };
            let own: Vec<StageTime> = times
                .iter()
                .copied()
                .filter(|t| devices.get(t.stage).is_some_and(|d| d.name == device.name))
                .collect();
            let mut passes: Vec<Pass> = Vec::new();
            for time in &own {
                if !passes.contains(&time.pass) {
                    passes.push(time.pass);
                }
            }
            let points = passes.iter().flat_map(|&pass| points(&costs, layout, &own, pass)).collect();
            let (shape, device) = (shape_of(spec), device.name.clone());
            profiles.push(Profile { shape, device, dtype: dtype.name().into(), points });
        }
        profiles
    }

    /// What a prediction is to be multiplied with: from measured passes of the same kind with fewer and with more rows.
    pub fn factor(&self, costs: &Costs<'_>, unit: Unit, pass: Pass) -> f64 {
        let same = |p: &&Point| {
            p.unit == unit.into() && std::mem::discriminant(&p.pass) == std::mem::discriminant(&pass)
        };
        // Rows count first, then how much they attend to.
        let distance = |p: &Point| {
            let apart = |a: f64, b: f64| ((a + 1.0) / (b + 1.0)).log2().abs();
            let rows = apart(p.pass.rows() as f64, pass.rows() as f64);
            (rows, apart(p.pass.attended(None), pass.attended(None)))
        };
        let nearest = |wanted: &dyn Fn(&Point) -> bool| {
            let found = self.points.iter().filter(same).filter(|p| wanted(p));
            found.min_by(|a, b| {
                distance(a).partial_cmp(&distance(b)).expect("logarithms of counts; this is a bug")
            })
        };
        let factor = |p: &Point| p.seconds / costs.roofline(unit, p.pass);
        let below = nearest(&|p| p.pass.rows() <= pass.rows());
        let above = nearest(&|p| p.pass.rows() >= pass.rows());
        match (below, above) {
            (None, None) => 1.0,
            (Some(p), None) | (None, Some(p)) => factor(p),
            (Some(a), Some(b)) => {
                let (to_a, to_b) = (distance(a).0, distance(b).0);
                let share = if to_a + to_b > 0.0 { to_a / (to_a + to_b) } else { 0.0 };
                factor(a) * (1.0 - share) + factor(b) * share
            }
        }
    }
}

/// What stages say about units in one pass.
fn points(costs: &Costs<'_>, layout: &Layout, times: &[StageTime], pass: Pass) -> Vec<Point> {
    let point = |unit, seconds| Point { unit, pass, seconds };
    let predicted = |unit| costs.roofline(unit, pass);
    let layer = predicted(Unit::Layer(0));
    let (mut measured, mut expected, mut last) = (0.0, 0.0, None);
    for time in times.iter().filter(|t| t.pass == pass) {
        let Some(stage) = layout.stages().get(time.stage) else { continue };
        let has_head = time.stage + 1 == layout.stages().len();
        let beside = costs.pass() + if has_head { 0.0 } else { costs.boundary(costs.device, pass) };
        let units = units_of(costs.spec, &stage.layers);
        let of_units = (time.seconds - beside).max(0.0);
        if has_head {
            last = Some((of_units, units));
        } else {
            measured += of_units;
            expected += units.into_iter().map(predicted).sum::<f64>();
        }
    }
    let told = |factor: f64| factor.max(FACTOR_MIN);
    let head = predicted(Unit::Head);
    match last {
        None if expected > 0.0 => vec![point(Kind::Layer, layer * told(measured / expected))],
        None => Vec::new(),
        Some((seconds, units)) => {
            let all: f64 = units.iter().map(|&unit| predicted(unit)).sum();
            let alone = expected == 0.0;
            let factor = told(if alone { seconds / all } else { measured / expected });
            let of_head = if alone { head * factor } else { seconds - (all - head) * factor };
            vec![point(Kind::Layer, layer * factor), point(Kind::Head, of_head.max(head * FACTOR_MIN))]
        }
    }
}

/// What units' times depend on.
fn shape_of(spec: &ModelSpec) -> String {
    let heads = spec.heads;
    let attention = format!("h{}x{}x{}", heads.heads, heads.kv_heads, heads.head_dim);
    format!("d{}-f{}-{attention}-v{}", spec.dim, spec.ffn, spec.vocab)
}

fn file_name(shape: &str, device: &str, dtype: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    format!("{shape}-{}-{dtype}.json", device.chars().map(plain).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    fn spec() -> ModelSpec {
        shapes::find("7b").unwrap().unwrap()
    }

    /// Stage times of a machine whose layers take `layer` times as long as predicted, and its head `head` times.
    fn run(layout: &Layout, device: &DeviceSpec, layer: f64, head: f64) -> Vec<StageTime> {
        let spec = spec();
        let costs = Costs { spec: &spec, dtype: DType::BF16, device, profile: None };
        let mut times = Vec::new();
        for pass in [Pass::Decode { rows: 4, context: 500 }, Pass::Decode { rows: 64, context: 500 }] {
            for (stage, own) in layout.stages().iter().enumerate() {
                let unit = |unit| costs.roofline(unit, pass) * if unit == Unit::Head { head } else { layer };
                let last = stage + 1 == layout.stages().len();
                let beside = costs.pass() + if last { 0.0 } else { costs.boundary(device, pass) };
                let seconds = units_of(&spec, &own.layers).into_iter().map(unit).sum::<f64>() + beside;
                times.push(StageTime { stage, pass, seconds });
            }
        }
        times
    }

    #[test]
    fn a_run_tells_layers_from_the_head() {
        let (spec, device) = (spec(), DeviceSpec::known("h200-141g").unwrap());
        for (layout, layer, head) in [("0-6,7-13,14-20,21-27", 1.2, 0.8), ("0-27", 1.1, 1.1)] {
            let layout: Layout = layout.parse().unwrap();
            let devices = vec![device.clone(); layout.stages().len()];
            let times = run(&layout, &device, layer, head);
            let profiles = Profile::of_run(&spec, DType::BF16, &layout, &devices, &times);
            assert_eq!(profiles.len(), 1);
            let costs =
                Costs { spec: &spec, dtype: DType::BF16, device: &device, profile: Some(&profiles[0]) };
            // Between, below and above what was measured; other kinds of passes stay predictions.
            for rows in [1, 4, 20, 64, 256] {
                let pass = Pass::Decode { rows, context: 900 };
                let factor = |unit| costs.seconds(unit, pass) / costs.roofline(unit, pass);
                assert!(
                    (factor(Unit::Layer(3)) / layer - 1.0).abs() < 0.01,
                    "{rows}: {}",
                    factor(Unit::Layer(3))
                );
                assert!((factor(Unit::Head) / head - 1.0).abs() < 0.05, "{rows}: {}", factor(Unit::Head));
            }
            let chunk = Pass::Chunk { rows: 64, before: 0 };
            assert_eq!(costs.seconds(Unit::Layer(0), chunk), costs.roofline(Unit::Layer(0), chunk));
        }
    }

    #[test]
    fn fits_become_times() {
        let fit = StageFit { base: 1.0, per_row: 0.5, per_attended: 0.01, per_output: 2.0 };
        let times = stage_times(&[fit, fit], &[Pass::Decode { rows: 2, context: 10 }]);
        assert_eq!((times.len(), times[1].stage, times[1].seconds), (2, 1, 1.0 + 1.0 + 0.2 + 4.0));
    }

    #[test]
    fn files_come_back_and_damaged_ones_count_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let (spec, device) = (spec(), DeviceSpec::known("h200-141g").unwrap());
        let open = || Profile::open(folder.path(), &spec, DType::BF16, &device);
        assert_eq!(open(), None);
        let point = Point { unit: Kind::Head, pass: Pass::Decode { rows: 1, context: 2 }, seconds: 1e-3 };
        let [shape, name, dtype] = [shape_of(&spec), device.name.clone(), "bf16".into()];
        let profile = Profile { shape, device: name, dtype, points: vec![point] };
        let path = profile.store(folder.path()).unwrap();
        assert_eq!(open(), Some(profile.clone()));
        let other = ModelSpec { ffn: 5, ..spec.clone() };
        assert_eq!(Profile::open(folder.path(), &other, DType::BF16, &device), None);
        for seconds in [0.0, -1.0] {
            Profile { points: vec![Point { seconds, ..point }], ..profile.clone() }
                .store(folder.path())
                .unwrap();
            assert_eq!(open(), None);
        }
        for text in ["", "{", "[]", "{\"shape\": \"x\"}"] {
            fs::write(&path, text).unwrap();
            assert_eq!(open(), None, "{text}");
        }
    }
}
