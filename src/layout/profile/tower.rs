//! What the vision tower's stages took: kept and believed as layers' times are.

use serde::{Deserialize, Serialize};

use super::{FACTOR_MIN, FACTORS, PASSES_MIN, Profile, ROWS_MAX, SECONDS, VERSION, between, shape_of};
use crate::{
    backend::DType,
    layout::{
        Device, DeviceSpec, Layout, StageTime,
        cost::Costs,
        measured::{VisionTime, size},
        tower::leaving,
    },
    model::{
        spec::ModelSpec,
        vision::{VisionPass, VisionSpec, vision_units},
    },
};

/// A measured time of a whole tower, all of whose units share what a stage took as predictions do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TowerPoint {
    /// The tower's shape: models of one shape may have towers of several.
    pub shape: String,
    /// Patches of the pass.
    pub rows: usize,
    /// Pairs of a row and another of its window.
    pub window_pairs: f64,
    /// Pairs of a row and another of its frame.
    pub frame_pairs: f64,
    /// How long.
    pub seconds: f64,
}

impl TowerPoint {
    fn pass(&self) -> VisionPass {
        let TowerPoint { rows, window_pairs, frame_pairs, .. } = *self;
        VisionPass { rows, window_pairs, frame_pairs }
    }

    pub(super) fn is_usable(&self) -> bool {
        let pairs = |n: f64| n.is_finite() && n >= 0.0;
        let pairs = pairs(self.window_pairs) && pairs(self.frame_pairs);
        SECONDS.contains(&self.seconds) && (1..=ROWS_MAX).contains(&self.rows) && pairs
    }

    /// Whether it is of the same tower and of about as many patches.
    pub(super) fn is_of_kind(&self, other: &TowerPoint) -> bool {
        self.shape == other.shape && size(self.rows.max(1)) == size(other.rows.max(1))
    }
}

/// The stages' times that say something of layers: not those of a device on which the vision tower worked meanwhile, nor then
/// those of the head's stage, which others would have to tell it from.
pub(crate) fn without_towers(
    mut times: Vec<StageTime>,
    spec: &ModelSpec,
    layout: &Layout,
    vision: &[VisionTime],
) -> Vec<StageTime> {
    let Some(tower) = spec.vision.as_deref() else { return times };
    let Ok(stages) = layout.tower(Some(tower.full.len())) else { return times };
    let worked =
        |device| vision.iter().any(|time| stages.get(time.stage).is_some_and(|(on, _)| *on == device));
    let (all, last) = (times.len(), layout.stages().len() - 1);
    times.retain(|time| layout.stages().get(time.stage).is_some_and(|stage| !worked(stage.device)));
    let some = times.len() < all;
    times.retain(|time| !some || time.stage < last);
    times
}

impl Profile {
    /// Adds what a run's times of the tower's stages say, to the profiles of their kinds of devices. `devices` are all that the
    /// layout names.
    ///
    /// A stage's time has what others do on its device meanwhile, so only those say something that have theirs for themselves.
    pub fn with_tower(
        profiles: Vec<Profile>,
        (spec, dtype): (&ModelSpec, DType),
        (layout, devices): (&Layout, &[DeviceSpec]),
        times: &[VisionTime],
    ) -> Vec<Profile> {
        let Some(tower) = spec.vision.as_deref() else { return profiles };
        let Ok(stages) = layout.tower(Some(tower.full.len())) else { return profiles };
        let on = |device: Device| devices.iter().find(|spec| spec.device == device);
        let of_layers = |device: Device| layout.stages().iter().any(|stage| stage.device == device);
        let alone = |device: Device| {
            !of_layers(device) && stages.iter().filter(|(other, _)| *other == device).count() == 1
        };
        let mut profiles = profiles;
        let mut found: Vec<(&DeviceSpec, VisionPass, [f64; 2])> = Vec::new();
        for time in times.iter().filter(|time| time.passes >= PASSES_MIN) {
            let Some((device, blocks)) = stages.get(time.stage) else { continue };
            let Some(spec_of) = on(*device).filter(|d| alone(*device) && d.is_as_named()) else { continue };
            let costs = Costs { spec, dtype, device: spec_of, profile: None };
            let next = stages.get(time.stage + 1).map_or(layout.stages()[0].device, |(next, _)| *next);
            let crossing =
                on(next).map_or(0.0, |next| costs.crossing(next, leaving(tower, blocks, time.pass)));
            let units = vision_units(tower, blocks).into_iter();
            let expected: f64 = units.map(|unit| costs.vision(unit, time.pass)).sum();
            let measured = (time.seconds - costs.pass() - crossing).max(expected * FACTOR_MIN);
            let same = |(other, pass, _): &&mut (&DeviceSpec, VisionPass, _)| {
                other.name == spec_of.name && size(pass.rows.max(1)) == size(time.pass.rows.max(1))
            };
            match found.iter_mut().find(same) {
                Some((.., sums)) => *sums = [sums[0] + measured, sums[1] + expected],
                None => found.push((spec_of, time.pass, [measured, expected])),
            }
        }
        for (device, pass, [measured, expected]) in found {
            let costs = Costs { spec, dtype, device, profile: None };
            let seconds = whole(&costs, tower, pass) * measured / expected;
            let VisionPass { rows, window_pairs, frame_pairs } = pass;
            let point = TowerPoint { shape: shape_of_tower(tower), rows, window_pairs, frame_pairs, seconds };
            match profiles.iter_mut().find(|profile| profile.device == device.name) {
                Some(profile) => profile.tower.push(point),
                None => profiles.push(Profile {
                    version: VERSION.clone(),
                    shape: shape_of(spec),
                    device: device.name.clone(),
                    dtype: dtype.name().into(),
                    points: Vec::new(),
                    tower: vec![point],
                }),
            }
        }
        profiles
    }

    /// What a prediction of the tower's units is to be multiplied with: from measured passes with fewer and with more patches.
    pub fn tower_factor(&self, costs: &Costs<'_>, pass: VisionPass) -> f64 {
        let Some(tower) = costs.spec.vision.as_deref() else { return 1.0 };
        let shape = shape_of_tower(tower);
        let apart = |p: &TowerPoint| ((p.rows as f64 + 1.0) / (pass.rows as f64 + 1.0)).log2().abs();
        let factor = |p: &TowerPoint| {
            let predicted = whole(&Costs { profile: None, ..*costs }, tower, p.pass());
            (p.seconds / predicted).clamp(*FACTORS.start(), *FACTORS.end())
        };
        let same = || self.tower.iter().filter(|p| p.shape == shape);
        let below = same().filter(|p| p.rows <= pass.rows).max_by_key(|p| p.rows);
        let above = same().filter(|p| p.rows >= pass.rows).min_by_key(|p| p.rows);
        between([below, above].map(|found| found.map(|p| (apart(p), factor(p)))))
    }
}

/// Seconds of a whole tower, predicted alone.
fn whole(costs: &Costs<'_>, tower: &VisionSpec, pass: VisionPass) -> f64 {
    vision_units(tower, &(0..tower.full.len())).into_iter().map(|unit| costs.vision(unit, pass)).sum()
}

/// What its units' times depend on.
fn shape_of_tower(tower: &VisionSpec) -> String {
    let (heads, full) = (tower.heads, tower.full.iter().filter(|full| **full).count());
    let blocks = format!("b{}-{full}", tower.full.len());
    format!("{blocks}-d{}-f{}-h{}x{}-o{}", tower.dim, tower.ffn, heads.heads, heads.head_dim, tower.out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        grid::Grid,
        layout::{Planner, compare_vision},
        model::{shapes, units::Pass},
    };

    #[test]
    fn a_tower_that_has_devices_for_itself_tells_what_it_takes_there() {
        let spec = shapes::find("vl-7b").unwrap().unwrap();
        let tower = spec.vision.as_deref().unwrap();
        let devices = DeviceSpec::list("3xh200-141g").unwrap();
        let pass = |side: u32| VisionPass::new(tower, &[Grid { t: 1, h: side, w: side }]);
        let layout: Layout = "v0-15@cuda:1,v16-31@cuda:2,0-27@cuda:0".parse().unwrap();
        let plain = Planner::new(&spec, DType::BF16, &devices);
        // Its units take 1.3 times as long as predicted.
        let slow = |stage: usize, side| {
            let none = VisionTime { stage, pass: pass(side), seconds: 1.0, passes: 9 };
            let predicted = compare_vision(&plain, &layout, &[none]).unwrap()[0].predicted;
            let beside = plain.costs(1).pass()
                + plain
                    .costs(1)
                    .crossing(&devices[0], leaving(tower, &(stage * 16..stage * 16 + 16), pass(side)));
            VisionTime { seconds: beside + 1.3 * (predicted - beside), ..none }
        };
        let times = [slow(0, 74), slow(1, 74), slow(0, 16), slow(1, 16)];
        let of = |layout: &Layout, times: &[VisionTime]| {
            Profile::with_tower(Vec::new(), (&spec, DType::BF16), (layout, &devices), times)
        };
        let profiles = of(&layout, &times);
        assert_eq!((profiles.len(), profiles[0].tower.len()), (1, 2));
        // They come back from the disk, beside what is there of other passes.
        let folder = tempfile::tempdir().unwrap();
        let older = Profile {
            tower: vec![TowerPoint { rows: 9, ..profiles[0].tower[0].clone() }],
            ..profiles[0].clone()
        };
        profiles[0].store(folder.path(), Some(&older)).unwrap();
        let kept = Profile::open(folder.path(), &spec, DType::BF16, &devices[0]).unwrap();
        assert_eq!(kept.tower.iter().map(|p| p.rows).collect::<Vec<_>>(), [5476, 256, 9]);
        assert!((kept.tower[0].seconds / profiles[0].tower[0].seconds - 1.0).abs() < 1e-12);
        // Plans believe them, of other images too.
        let planner = Planner {
            profiles: vec![Some(profiles[0].clone()); 3],
            ..Planner::new(&spec, DType::BF16, &devices)
        };
        for time in times {
            let told = compare_vision(&planner, &layout, &[time]).unwrap()[0];
            assert!(told.error_percent.abs() < 0.1, "{told:?}");
        }
        let factor = profiles[0].tower_factor(&plain.costs(0), pass(40));
        assert!((factor - 1.3).abs() < 1e-6, "{factor}");
        // Of a device that has layers too, or of another tower, nothing is known; nor of those layers, if there were images.
        let shared: Layout =
            "v0-15@cuda:0,v16-31@cuda:1,0-9@cuda:0,10-19@cuda:2,20-27@cuda:3".parse().unwrap();
        assert_eq!(of(&shared, &times[..1]), []);
        let layers = [0, 1, 2].map(|stage| {
            let pass = Pass::Decode { rows: 8, context: 500 };
            StageTime { stage, pass, seconds: 1e-3, passes: 9 }
        });
        let told = |vision| without_towers(layers.to_vec(), &spec, &shared, vision);
        assert_eq!(
            (told(&times[..1]), told(&times[1..2]), told(&[])),
            (layers[1..2].to_vec(), layers.to_vec(), layers.to_vec())
        );
        let other = shapes::find("vl-72b").unwrap().unwrap();
        let costs = Costs { spec: &other, ..plain.costs(0) };
        assert_eq!(profiles[0].tower_factor(&costs, pass(74)), 1.0);
        let damaged = TowerPoint { seconds: -1.0, ..profiles[0].tower[0].clone() };
        assert!(!damaged.is_usable() && profiles[0].tower[0].is_usable());
    }
}
