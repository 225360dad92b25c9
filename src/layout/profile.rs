//! What units took where they ran: kept on disk for a model's shape, a device and a type, and believed before predictions.

mod tower;

use std::{
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::LazyLock,
};

use serde::{Deserialize, Serialize};

pub use self::tower::TowerPoint;
pub(crate) use self::tower::without_towers;
use super::{Device, DeviceSpec, Layout, StageTime, cost::Costs, measured::size};
use crate::{
    backend::{DType, cuda},
    error::{Error, Result},
    model::{
        spec::ModelSpec,
        units::{Pass, Unit},
    },
};

/// A profile's file is a few KiB, and has a few points for each number of rows.
const FILE_BYTES_MAX: u64 = 1 << 20;
const POINTS_MAX: usize = 4096;
/// No pass has more rows, or takes longer or less long: a file that says so is damaged.
const ROWS_MAX: usize = 1 << 20;
const SECONDS: std::ops::RangeInclusive<f64> = 1e-9..=1e5;
/// Noise does not make a unit free; predictions that are not of a device's kind may be far off.
const FACTOR_MIN: f64 = 0.1;
const FACTORS: std::ops::RangeInclusive<f64> = 1e-4..=1e4;
/// Of fewer passes, hiccups are no measurement.
const PASSES_MIN: u64 = 4;

/// What times follow from beside the model and the device: this program, its kernels, and what profiles mean by their fields.
static VERSION: LazyLock<String> =
    LazyLock::new(|| format!("2-{}-{:016x}", env!("CARGO_PKG_VERSION"), cuda::kernels_key() as u64));

/// Measured times of a model's units on a device.
///
/// ```
/// use pipeline_infer::{
///     Layout,
///     backend::DType,
///     layout::{DeviceSpec, Planner, StageTime, compare, profile::Profile},
///     model::{shapes, units::Pass},
/// };
///
/// let (spec, devices) = (shapes::find("7b").unwrap()?, DeviceSpec::list("2xh200-141g")?);
/// let (layout, pass): (Layout, _) = ("0-13@cuda:0,14-27@cuda:1".parse()?, Pass::Decode { rows: 64, context: 640 });
/// let time = |stage, seconds| StageTime { stage, pass, seconds, passes: 100 };
/// let measured = [time(0, 2.0e-3), time(1, 2.3e-3)];
/// let profiles = Profile::of_run(&spec, DType::BF16, &layout, &devices, &measured);
/// let folder = std::env::temp_dir().join("pipeline-infer-profiles");
/// profiles[0].store(&folder, None)?;
///
/// let mut planner = Planner::new(&spec, DType::BF16, &devices);
/// planner.profiles = vec![Profile::open(&folder, &spec, DType::BF16, &devices[0]); 2];
/// let compared = compare(&planner, &layout, &measured)?;
/// assert!(compared.iter().all(|stage| stage.error_percent.abs() < 0.1));
/// # std::fs::remove_dir_all(folder).unwrap();
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Of what it was measured with.
    pub version: String,
    /// The model's shape, but for how many layers it has.
    pub shape: String,
    /// The device's name.
    pub device: String,
    /// The type of weights, keys and values.
    pub dtype: String,
    /// What was measured.
    pub points: Vec<Point>,
    /// The same of vision towers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tower: Vec<TowerPoint>,
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
            Unit::Head | Unit::HeadPart { .. } => Kind::Head,
        }
    }
}

/// Where profiles are kept; `None` if the environment names no place.
pub fn folder() -> Option<PathBuf> {
    cuda::cache_folder().map(|folder| folder.join("profiles"))
}

impl Profile {
    /// The profile that is kept for a model on a device; `None` if there is none, or, with a warning, if it is damaged or of
    /// another version of this program. A device whose description is not what its name stands for has none.
    pub fn open(folder: &Path, spec: &ModelSpec, dtype: DType, device: &DeviceSpec) -> Option<Profile> {
        let path = folder.join(file_name(&shape_of(spec), &device.name, dtype.name()));
        if !device.is_as_named() || !path.exists() {
            return None;
        }
        let profile = read(&path).map_err(|e| e.to_string()).and_then(|profile| {
            let named = (&*profile.shape, &*profile.device, &*profile.dtype);
            if profile.version != *VERSION {
                Err("it is of another version of this program".into())
            } else if named != (&*shape_of(spec), &*device.name, dtype.name()) || !profile.is_usable() {
                Err("it is damaged".into())
            } else {
                Ok(profile)
            }
        });
        profile
            .map_err(|why: String| {
                tracing::warn!(path = %path.display(), why, "a profile is ignored: plans use predictions");
            })
            .ok()
    }

    /// Keeps it, as a whole or not at all; for passes that it knows nothing of, what an older one says stays.
    pub fn store(&self, folder: &Path, older: Option<&Profile>) -> Result<PathBuf> {
        let path = folder.join(file_name(&self.shape, &self.device, &self.dtype));
        let kind = |p: &Point| (p.unit, p.pass.decodes(), size(p.pass.rows().max(1)));
        let mut points = self.points.clone();
        let old = older.into_iter().flat_map(|older| &older.points);
        points.extend(old.filter(|old| self.points.iter().all(|new| kind(new) != kind(old))));
        points.truncate(POINTS_MAX);
        let mut tower = self.tower.clone();
        let old = older.into_iter().flat_map(|older| &older.tower);
        tower.extend(old.filter(|old| !self.tower.iter().any(|new| new.is_of_kind(old))).cloned());
        tower.truncate(POINTS_MAX);
        let text = serde_json::to_vec_pretty(&Profile { points, tower, ..self.clone() });
        let text = text.expect("plain data becomes JSON; this is a bug");
        cuda::write_aside(&path, &text).map_err(|e| Error::io(&path, e))?;
        Ok(path)
    }

    fn is_usable(&self) -> bool {
        let usable = |p: &Point| {
            let (rows, outputs) = (p.pass.rows(), p.pass.outputs());
            SECONDS.contains(&p.seconds) && (1..=ROWS_MAX).contains(&rows) && outputs <= rows
        };
        let points = self.points.len() <= POINTS_MAX && self.points.iter().all(usable);
        points && self.tower.len() <= POINTS_MAX && self.tower.iter().all(TowerPoint::is_usable)
    }

    /// What a run's stage times say about units: a profile for each kind of device. `devices` are the stages', in order.
    ///
    /// Layers are told from the head by the stages that lack it. On a kind of device that has the last stage alone, all its
    /// units share what was measured as predictions do. Stages that work on one GPU at once say nothing of units.
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
            let shares = |own: &DeviceSpec| {
                own.device != Device::Cpu && devices.iter().filter(|d| d.device == own.device).count() > 1
            };
            let is_own = |own: &DeviceSpec| own.name == device.name && own.is_as_named() && !shares(own);
            let of_enough = times.iter().copied().filter(|t| t.passes >= PASSES_MIN);
            let own: Vec<StageTime> =
                of_enough.filter(|t| devices.get(t.stage).is_some_and(is_own)).collect();
            let mut passes: Vec<Pass> = Vec::new();
            for time in &own {
                if !passes.contains(&time.pass) {
                    passes.push(time.pass);
                }
            }
            let points: Vec<Point> =
                passes.iter().flat_map(|&pass| points(&costs, (layout, devices), &own, pass)).collect();
            let (shape, device) = (shape_of(spec), device.name.clone());
            let (version, dtype, tower) = (VERSION.clone(), dtype.name().into(), Vec::new());
            profiles.push(Profile { version, shape, device, dtype, points, tower });
        }
        profiles.retain(|profile| !profile.points.is_empty());
        profiles
    }

    /// Whether anything but a vision tower has been measured.
    pub fn knows_layers(&self) -> bool {
        !self.points.is_empty()
    }

    /// What a prediction is to be multiplied with: from measured passes of the same kind with fewer and with more rows.
    pub fn factor(&self, costs: &Costs<'_>, unit: Unit, pass: Pass) -> f64 {
        // A part of the head is to what is predicted of it as all of it is.
        let unit = if let Unit::HeadPart { .. } = unit { Unit::Head } else { unit };
        let tells = |p: &&Point| costs.roofline(unit, p.pass) > 0.0;
        let same = |p: &&Point| p.unit == unit.into() && p.pass.decodes() == pass.decodes() && tells(p);
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
        let factor =
            |p: &Point| (p.seconds / costs.roofline(unit, p.pass)).clamp(*FACTORS.start(), *FACTORS.end());
        let below = nearest(&|p| p.pass.rows() <= pass.rows());
        let above = nearest(&|p| p.pass.rows() >= pass.rows());
        between([below, above].map(|found| found.map(|p| (distance(p).0, factor(p)))))
    }
}

/// Between a factor of fewer rows and one of more, each with how far away it is; 1 if there is none.
fn between(found: [Option<(f64, f64)>; 2]) -> f64 {
    match found {
        [None, None] => 1.0,
        [Some((_, factor)), None] | [None, Some((_, factor))] => factor,
        [Some((to_a, a)), Some((to_b, b))] => {
            let share = if to_a + to_b > 0.0 { to_a / (to_a + to_b) } else { 0.0 };
            a * (1.0 - share) + b * share
        }
    }
}

/// What stages say about units in one pass.
fn points(
    costs: &Costs<'_>,
    (layout, devices): (&Layout, &[DeviceSpec]),
    times: &[StageTime],
    pass: Pass,
) -> Vec<Point> {
    let point = |unit, seconds| Point { unit, pass, seconds };
    let predicted = |unit| costs.roofline(unit, pass);
    let layer = predicted(Unit::Layer(0));
    let (mut measured, mut expected, mut last) = (0.0, 0.0, None);
    for time in times.iter().filter(|t| t.pass == pass) {
        if time.stage >= layout.stages().len() {
            continue;
        }
        // Parts of the head are little beside the layers, and their devices do them while they do something else.
        let has_head = layout.head_of(time.stage) == Some(Unit::Head);
        let next = devices.get(time.stage + 1);
        let beside = costs.pass() + next.map_or(0.0, |next| costs.boundary(next, pass));
        let units = layout.units(time.stage, costs.spec);
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
            let mut points = vec![point(Kind::Layer, layer * factor)];
            // In a pass of which nobody wants logits it does nothing.
            if head > 0.0 {
                points.push(point(Kind::Head, of_head.max(head * FACTOR_MIN)));
            }
            points
        }
    }
}

/// What units' times depend on.
fn shape_of(spec: &ModelSpec) -> String {
    let heads = spec.heads;
    let attention = format!("h{}x{}x{}", heads.heads, heads.kv_heads, heads.head_dim);
    format!("d{}-f{}-{attention}-v{}", spec.dim, spec.ffn, spec.vocab)
}

/// A file's contents, if it is a file of bounded size.
fn read(path: &Path) -> io::Result<Profile> {
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it is not a file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(io::Error::other("it is too large"));
    }
    Ok(serde_json::from_slice(&bytes)?)
}

fn file_name(shape: &str, device: &str, dtype: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    format!("{shape}-{}-{dtype}.json", device.chars().map(plain).collect::<String>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        batch::PassShape,
        model::{shapes, units::units_of},
    };

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
                times.push(StageTime { stage, pass, seconds, passes: 9 });
            }
        }
        times
    }

    #[test]
    fn a_run_tells_layers_from_the_head() {
        let (spec, device) = (spec(), DeviceSpec::known("h200-141g").unwrap());
        for (layout, layer, head) in [("0-6,7-13,14-20,21-27", 1.2, 0.8), ("0-27", 1.1, 1.1)] {
            let layout: Layout = layout.parse().unwrap();
            let on = |i| DeviceSpec { device: Device::Cuda(i), ..device.clone() };
            let devices: Vec<DeviceSpec> = (0..layout.stages().len()).map(on).collect();
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

    /// Chunks in the middle of prompts: the head does nothing, and nothing is said of it.
    #[test]
    fn passes_of_which_nobody_wants_logits_tell_of_layers_alone() {
        let (spec, device) = (spec(), DeviceSpec::known("h200-141g").unwrap());
        let shape = PassShape { rows: 2048, attended: 2048 * 1024, read: 0, outputs: 0 };
        let pass = Pass::Batch(shape);
        for (layout, noise) in [("0-27", 1.0), ("0-6,7-13,14-20,21-27", 1.05), ("0-6,7-13,14-20,21-27", 0.95)]
        {
            let layout: Layout = layout.parse().unwrap();
            let on = |i| DeviceSpec { device: Device::Cuda(i), ..device.clone() };
            let devices: Vec<DeviceSpec> = (0..layout.stages().len()).map(on).collect();
            let plain = Costs { spec: &spec, dtype: DType::BF16, device: &device, profile: None };
            let all = units_of(&spec, &layout.stages()[0].layers);
            let seconds = all.into_iter().map(|unit| 1.2 * plain.roofline(unit, pass)).sum::<f64>();
            let last = layout.stages().len() - 1;
            let time = |stage| {
                let seconds = if stage == last { seconds * noise } else { seconds };
                StageTime { stage, pass, seconds, passes: 9 }
            };
            let times: Vec<StageTime> = (0..=last).map(time).collect();
            let profiles = Profile::of_run(&spec, DType::BF16, &layout, &devices, &times);
            let folder = tempfile::tempdir().unwrap();
            profiles[0].store(folder.path(), None).unwrap();
            let kept = Profile::open(folder.path(), &spec, DType::BF16, &device).expect("it is whole");
            let costs = Costs { profile: Some(&kept), ..plain };
            let wanted = Pass::Batch(PassShape { outputs: 4, ..shape });
            for pass in [pass, wanted] {
                let slower = costs.seconds(Unit::Layer(3), pass) / plain.roofline(Unit::Layer(3), pass);
                assert!((slower / 1.2 - 1.0).abs() < 0.05, "{slower}");
                assert_eq!(costs.seconds(Unit::Head, pass), plain.roofline(Unit::Head, pass));
            }
        }
    }

    #[test]
    fn stages_on_one_gpu_and_devices_that_are_not_as_named_give_no_profile() {
        let (spec, device) = (spec(), DeviceSpec::known("h200-141g").unwrap());
        let layout: Layout = "0-13@cuda:0,14-27@cuda:0".parse().unwrap();
        let times = run(&layout, &device, 1.2, 1.2);
        let of = |devices: &[DeviceSpec], times: &[StageTime]| {
            Profile::of_run(&spec, DType::BF16, &layout, devices, times)
        };
        assert_eq!(of(&[device.clone(), device.clone()], &times), []);
        let other = DeviceSpec { device: Device::Cuda(1), ..device.clone() };
        assert_eq!(of(&[device.clone(), other.clone()], &times).len(), 1);
        let slow = |device: &DeviceSpec| DeviceSpec { bandwidth: 1e12, ..device.clone() };
        assert_eq!(of(&[slow(&device), slow(&other)], &times), []);
        let few: Vec<StageTime> = times.iter().map(|t| StageTime { passes: 3, ..*t }).collect();
        assert_eq!(of(&[device, other], &few), []);
    }

    fn profile(points: Vec<Point>) -> Profile {
        let [version, shape, device, dtype] =
            [VERSION.clone(), shape_of(&spec()), "h200-141g".into(), "bf16".into()];
        Profile { version, shape, device, dtype, points, tower: Vec::new() }
    }

    const POINT: Point =
        Point { unit: Kind::Head, pass: Pass::Decode { rows: 1, context: 2 }, seconds: 1e-3 };

    #[test]
    fn files_come_back_and_damaged_or_outdated_ones_count_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let (spec, device) = (spec(), DeviceSpec::known("h200-141g").unwrap());
        let open = || Profile::open(folder.path(), &spec, DType::BF16, &device);
        assert_eq!(open(), None);
        let kept = profile(vec![POINT]);
        let path = kept.store(folder.path(), None).unwrap();
        assert_eq!(open(), Some(kept.clone()));
        let other = ModelSpec { ffn: 5, ..spec.clone() };
        assert_eq!(Profile::open(folder.path(), &other, DType::BF16, &device), None);
        let slow = DeviceSpec { bandwidth: 1e12, ..device.clone() };
        assert_eq!(Profile::open(folder.path(), &spec, DType::BF16, &slow), None);
        let pass = |rows, outputs| Pass::Batch(PassShape { rows, outputs, ..PassShape::default() });
        for point in [
            Point { seconds: 0.0, ..POINT },
            Point { seconds: -1.0, ..POINT },
            Point { seconds: 1e300, ..POINT },
            Point { pass: pass(0, 0), ..POINT },
            Point { pass: pass(usize::MAX, 0), ..POINT },
            Point { pass: pass(3, 4), ..POINT },
        ] {
            profile(vec![POINT, point]).store(folder.path(), None).unwrap();
            assert_eq!(open(), None, "{point:?}");
        }
        Profile { version: "1".into(), ..kept.clone() }.store(folder.path(), None).unwrap();
        assert_eq!(open(), None);
        let large = format!("[{}", " ".repeat(2 << 20));
        for text in ["", "{", "[]", "{\"shape\": \"x\"}", &large, &"[".repeat(1 << 19)] {
            fs::write(&path, text).unwrap();
            assert_eq!(open(), None, "{}", &text[..text.len().min(20)]);
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        assert_eq!(open(), None);
        // What never ends is no file.
        #[cfg(unix)]
        {
            fs::remove_dir(&path).unwrap();
            std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
            assert_eq!(open(), None);
        }
    }

    #[test]
    fn what_a_run_did_not_have_stays_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let (spec, device) = (spec(), DeviceSpec::known("h200-141g").unwrap());
        let at = |rows, seconds| Point { pass: Pass::Decode { rows, context: 9 }, seconds, ..POINT };
        let old = profile(vec![at(1, 1e-3), at(64, 2e-3)]);
        profile(vec![at(70, 3e-3), at(256, 4e-3)]).store(folder.path(), Some(&old)).unwrap();
        let kept = Profile::open(folder.path(), &spec, DType::BF16, &device).unwrap();
        assert_eq!(kept.points, [at(70, 3e-3), at(256, 4e-3), at(1, 1e-3)]);
    }
}
