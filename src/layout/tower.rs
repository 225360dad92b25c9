//! A model's vision tower on the devices of its layers: what it costs there, and where its blocks had better go.

use std::ops::Range;

use serde::Serialize;

use super::{
    Device, DeviceSpec, Layout, Planner, VisionStage,
    joint::{self, Tower, TowerSlot},
    plan::{Problem, Sizes, Slot},
    predict::Pipeline,
};
use crate::{
    backend::DType,
    error::{Error, Result},
    grid::Grid,
    model::vision::{VisionPass, VisionSpec, VisionUnit, vision_units},
};

/// Patches of a pass of the tower with several images: more of them gain nothing, and the first would wait for the last.
pub const PATCHES_TOGETHER: usize = 8192;
/// Pixels along the sides of images that nobody describes.
const USUAL_SIDE: usize = 1024;
/// What a request without images counts for where the tower must be somewhere.
pub(super) const HARDLY_ANY: f64 = 1e-3;
/// Costs are whole picoseconds.
const TICKS: f64 = 1e12;

/// Images of a workload's requests, all alike.
///
/// ```
/// use pipeline_infer::{layout::tower::ImageLoad, model::shapes};
///
/// let spec = shapes::find("vl-7b").unwrap()?;
/// let images = ImageLoad::usual(spec.vision.as_ref().unwrap());
/// // 1024x1024 pixels are resized to 1036x1036.
/// assert_eq!((images.per_request, images.grid.patches(), images.tokens), (1, 5476, 1369));
/// # Ok::<(), pipeline_infer::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ImageLoad {
    /// How many a request has.
    pub per_request: usize,
    /// How each is cut.
    pub grid: Grid,
    /// Tokens of each, which a workload's prompts have among theirs.
    pub tokens: usize,
}

/// Bytes that the tower takes beside weights, at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct TowerScratch {
    /// Of every stage of it.
    pub stage: usize,
    /// Of every block: what its weights take more than their size.
    pub block: usize,
    /// Of the image store and what brings tokens there, on the embedding's device.
    pub store: usize,
}

impl ImageLoad {
    /// So many images of such a size, cut for this tower.
    pub fn new(tower: &VisionSpec, per_request: usize, grid: Grid) -> ImageLoad {
        ImageLoad { per_request, grid, tokens: grid.tokens(tower.merge as u32) }
    }

    /// One of 1024x1024 pixels.
    pub fn usual(tower: &VisionSpec) -> ImageLoad {
        let cells = (USUAL_SIDE + tower.patch * tower.merge / 2) / (tower.patch * tower.merge);
        let side = (cells.max(1) * tower.merge) as u32;
        ImageLoad::new(tower, 1, Grid { t: 1, h: side, w: side })
    }

    /// Tokens of a request's images, with one before each and one behind.
    pub fn prompt_tokens(&self) -> usize {
        self.per_request * (self.tokens + 2)
    }

    /// The tower's pass, and how many of it a request makes.
    fn pass(&self, tower: &VisionSpec) -> (VisionPass, f64) {
        let together = (PATCHES_TOGETHER / self.grid.patches().max(1)).max(1);
        let images = (self.per_request as f64).max(HARDLY_ANY);
        (VisionPass::new(tower, &vec![self.grid; together]), images / together as f64)
    }
}

/// What a run of blocks costs.
impl Planner<'_> {
    /// The tower and the images for it, if there are any.
    pub(super) fn seen(&self) -> Option<(&VisionSpec, ImageLoad)> {
        Some((self.spec.vision.as_deref()?, self.images?))
    }

    /// Bytes that the tower takes beside weights on a device.
    pub(super) fn tower_scratch_of(&self, device: usize) -> TowerScratch {
        self.scratch_of(device).tower
    }

    /// Seconds of a pass of so many of its blocks on a device, until what is made of it is with `next`, the next stage's
    /// device or the store's.
    pub(super) fn tower_seconds(
        &self,
        device: usize,
        blocks: &Range<usize>,
        (next, pass): (&DeviceSpec, VisionPass),
    ) -> f64 {
        let Some(tower) = self.spec.vision.as_deref() else { return 0.0 };
        let costs = self.costs(device);
        let units: f64 = vision_units(tower, blocks).into_iter().map(|unit| costs.vision(unit, pass)).sum();
        let crosses = next.device != self.devices[device].device;
        units + costs.pass() + if crosses { costs.crossing(next, leaving(tower, blocks, pass)) } else { 0.0 }
    }

    /// The same for a request of the workload.
    pub(super) fn tower_request_seconds(
        &self,
        device: usize,
        blocks: &Range<usize>,
        next: &DeviceSpec,
    ) -> f64 {
        let Some((tower, images)) = self.seen() else { return 0.0 };
        let (pass, count) = images.pass(tower);
        count * self.tower_seconds(device, blocks, (next, pass))
    }

    /// What its blocks cost on devices in this order; none without a tower.
    pub(super) fn tower(&self, order: &[usize]) -> Option<Tower> {
        let (tower, images) = self.seen()?;
        let (pass, count) = images.pass(tower);
        let depth = tower.full.len();
        let first = &self.devices[*order.first()?];
        let ticks = |seconds: f64| (seconds * count * TICKS) as u64;
        let slot = |(i, &device): (usize, &usize)| {
            let costs = self.costs(device);
            let unit = |unit| costs.vision(unit, pass);
            // The tower's ends are its first block's and its last one's.
            let block = |b: usize| {
                let begins = if b == 0 { unit(VisionUnit::Patches) } else { 0.0 };
                let store = || costs.crossing(first, leaving(tower, &(b..depth), pass));
                let ends = if b + 1 == depth {
                    unit(VisionUnit::Merger) + if i > 0 { store() } else { 0.0 }
                } else {
                    0.0
                };
                ticks(unit(VisionUnit::Block(b)) + begins + ends)
            };
            let next = order.get(i + 1).map(|&next| &self.devices[next]);
            let crossing = next.map_or(0.0, |next| costs.crossing(next, leaving(tower, &(0..0), pass)));
            TowerSlot {
                blocks: (0..depth).map(block).collect(),
                pass: ticks(costs.pass()),
                boundary: ticks(crossing),
                buffers: self.tower_scratch_of(device).stage as u64,
            }
        };
        // Where they differ, of the one that takes more.
        let lost = order.iter().map(|&device| self.tower_scratch_of(device).block).max().unwrap_or(0);
        let bytes = |b| self.tower_weight_bytes(&(b..b + 1)) + lost;
        let blocks = (0..depth).map(|b| bytes(b) as u64).collect();
        Some(Tower { blocks, slots: order.iter().enumerate().map(slot).collect() })
    }

    /// Bytes of the weights of such a run.
    pub(super) fn tower_weight_bytes(&self, blocks: &Range<usize>) -> usize {
        let Some(tower) = self.spec.vision.as_deref() else { return 0 };
        let units = vision_units(tower, blocks).into_iter();
        units.map(|unit| unit.weight_bytes(tower, self.dtype)).sum()
    }

    /// This layout with the tower where it has it, or else where it makes the slowest of its devices as fast as can be.
    ///
    /// ```
    /// use pipeline_infer::{backend::DType, layout::{DeviceSpec, Planner}, model::shapes};
    ///
    /// let (spec, devices) = (shapes::find("vl-7b").unwrap()?, DeviceSpec::list("2xh200-141g")?);
    /// let planner = Planner::new(&spec, DType::BF16, &devices);
    /// // The second device has less to do.
    /// let layout = planner.with_tower(&"0-19@cuda:0,20-27@cuda:1".parse()?)?;
    /// assert_eq!(layout.to_string(), "v0-31@cuda:1,0-19@cuda:0,20-27@cuda:1");
    /// # Ok::<(), pipeline_infer::Error>(())
    /// ```
    pub fn with_tower(&self, layout: &Layout) -> Result<Layout> {
        let depth = self.spec.vision.as_ref().map(|tower| tower.full.len());
        if depth.is_none() || self.images.is_none() || !layout.vision().is_empty() {
            let stages =
                layout.tower(depth.filter(|_| self.images.is_some() || !layout.vision().is_empty()))?;
            return layout.clone().with_vision(stages.into_iter().map(stage).collect());
        }
        let pipeline = Pipeline::new(self, layout)?;
        let order = pipeline.places_in_order();
        let tower = self.tower(&order).expect("a tower and images; this is a bug");
        // What has room for the workload, or else for a request, or a token.
        let requests = [self.workload.running, 1];
        let wanted =
            requests.map(|n| n.saturating_mul(self.workload.prompt.saturating_add(self.workload.new)));
        let wanted = self.kv_tokens.map_or(vec![wanted[0], wanted[1], 1], |tokens| vec![tokens]);
        let cut =
            wanted.into_iter().find_map(|kv_tokens| joint::solve(&pipeline.given(&order, kv_tokens), &tower));
        let Some(cut) = cut else {
            let why = "the vision tower has no room beside the layers of any of its devices".to_owned();
            return Err(Error::Device { device: layout.to_string(), why });
        };
        layout.clone().with_vision(self.vision_stages(&order, cut.blocks))
    }

    /// Stages of the tower of runs that devices in this order have; some may have none.
    pub(super) fn vision_stages(&self, order: &[usize], runs: Vec<Range<usize>>) -> Vec<VisionStage> {
        let on = order.iter().map(|&place| self.devices[place].device);
        on.zip(runs).filter(|(_, run)| !run.is_empty()).map(stage).collect()
    }
}

impl Pipeline<'_> {
    /// Layers that are where they are, for a tower to be put beside them: what each device has is one layer.
    fn given(&self, order: &[usize], kv_tokens: usize) -> Problem {
        let busy = self.by_device(&self.request_seconds());
        let bytes: Vec<u64> = order.iter().map(|&place| self.bytes_on(place, kv_tokens) as u64).collect();
        let slot = |&place: &usize| Slot {
            layers: vec![(busy[&place] * TICKS) as u64; order.len()],
            room: self.room_of(place) as u64,
            ..Slot::default()
        };
        let sizes = Sizes { layers: bytes, ..Sizes::default() };
        Problem { sizes, slots: order.iter().map(slot).collect() }
    }
}

/// Bytes that leave such a run: rows, or the tokens that they have become.
pub(super) fn leaving(tower: &VisionSpec, blocks: &Range<usize>, pass: VisionPass) -> f64 {
    let numbers = match blocks.end == tower.full.len() {
        true => pass.rows / tower.cell_rows() * tower.out,
        false => pass.rows * tower.dim,
    };
    (numbers * DType::F32.size()) as f64
}

fn stage((device, blocks): (Device, Range<usize>)) -> VisionStage {
    VisionStage { device, blocks: Some(blocks) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::shapes;

    /// Milliseconds of the whole tower for an image of 1024x1024, as an H200 takes them.
    #[test]
    fn the_time_of_an_image_is_predicted() {
        let (spec, devices) =
            (shapes::find("vl-7b").unwrap().unwrap(), DeviceSpec::list("h200-141g").unwrap());
        let planner = Planner::new(&spec, DType::BF16, &devices);
        let ms = 1e3 * planner.tower_request_seconds(0, &(0..32), &devices[0]);
        assert!((ms / 16.5 - 1.0).abs() < 0.05, "{ms}");
        let tower = planner.tower(&[0]).unwrap();
        let of = &tower.slots[0].blocks;
        // 554 us are attention to the whole frame.
        let more = (of[7] - of[6]) as f64 / TICKS * 1e6;
        assert!((more / 545.0 - 1.0).abs() < 0.05, "{more}");
        assert!(of[0] > of[1] && of[31] > of[7]);
    }
}
